"""Schedules requests over workers; its gateway sub-package speaks HTTP and text."""

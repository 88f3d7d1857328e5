"""What can go wrong before anything is measured. A failed request is a record, not an exception."""

from __future__ import annotations


class BenchError(RuntimeError):
    """The run cannot start or go on; one clear line for the user."""

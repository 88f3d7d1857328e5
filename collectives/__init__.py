"""Bytes between ranks: all-reduce and all-gather behind one protocol."""

"""Schedules requests over workers; its gateway sub-package speaks HTTP and text."""

import os

# Before gRPC is imported, and for every process that is started from here: gRPC's handlers at fork kill about every
# seventh child that starts while its threads are busy. Children here are programs of their own, which need no handlers.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

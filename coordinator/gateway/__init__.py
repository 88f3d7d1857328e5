"""HTTP and text: the OpenAI API, chat templates, tokenizers and server-sent events."""

import os

# Before gRPC is imported: its handlers at fork kill every seventh child that starts while its threads are busy, and
# children here (the compiler of grammars) are programs of their own, which need no handlers.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

"""`python -m tpserve.coordinator.gateway.grammar_process MODEL_DIR VOCAB_SIZE PARENT`: tells which grammars compile.

A process of its own, because a compilation that takes too long, or too much memory, can only be ended with its process.
It reads one JSON object per line, `{"kind", "source"}`, and answers each with one line, `{"error": null or why}`.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from pathlib import Path

from tpserve.coordinator.process import end_with_parent
from tpserve.proto.grammar import GrammarCompiler, GrammarError, GrammarUnavailable
from tpserve.proto.messages import Grammar, GrammarKind

MAX_MEMORY_BYTES = 4 << 30
"""Of address space on top of what the process has when it is ready."""


def main() -> int:
    """Answer until the input ends."""
    model_dir, vocab_size, parent = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    end_with_parent(parent)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints is no answer
    try:
        compiler = GrammarCompiler(model_dir, vocab_size)
    except GrammarUnavailable as error:
        answers.write(json.dumps({"unavailable": str(error)}) + "\n")
        return 1
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MAX_MEMORY_BYTES, resource.RLIM_INFINITY))
    answers.write(json.dumps({"ready": True}) + "\n")
    for line in sys.stdin:
        request = json.loads(line)
        why: str | None = None
        try:
            compiler.compile(Grammar(GrammarKind(request["kind"]), request["source"], ()))
        except GrammarError as refused:
            why = str(refused)
        answers.write(json.dumps({"error": why}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

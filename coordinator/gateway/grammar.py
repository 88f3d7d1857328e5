"""Sees that a grammar compiles before a request is sent on, without stopping the event loop.

Owns the process that compiles, and what is known of grammars seen before. Workers compile again: what they get is known
to be possible, and to be quick enough.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections import OrderedDict
from typing import Any

from tpserve.coordinator.gateway.errors import EngineUnavailable, InvalidRequest
from tpserve.proto.messages import Grammar

logger = logging.getLogger(__name__)

COMPILE_TIMEOUT_S = 5.0
START_TIMEOUT_S = 60.0
MAX_SOURCE_BYTES = 256 << 10
MAX_REMEMBERED = 4096
LATE_REMEMBERED_S = 60.0
"""So long a grammar that was not compiled in time is refused unseen; the host may have been busy with other things."""


class GrammarChecker:
    """Compiles grammars in a process that is started with the first one, and again after one that it did not survive.

    Parameters
    ----------
    model_dir
        Folder with the tokenizer.
    """

    def __init__(self, model_dir: str, *, compile_timeout_s: float = COMPILE_TIMEOUT_S) -> None:
        self._model_dir = model_dir
        self._compile_timeout_s = compile_timeout_s
        self._process: Process | None = None
        self._one_at_a_time = asyncio.Lock()
        self._known: OrderedDict[bytes, str | None] = OrderedDict()
        """By hash of the grammar: what is wrong with it."""
        self._late: dict[bytes, float] = {}
        """By hash of those of them that were not compiled in time: when that is forgotten, of `time.monotonic()`."""

    async def check(self, grammar: Grammar, vocab_size: int, *, param: str) -> None:
        """Return if the grammar compiles.

        Raises
        ------
        InvalidRequest
            If it does not, takes too long, or is too long; names `param`.
        EngineUnavailable
            If grammars cannot be compiled here; says what to install.
        """
        source = grammar.source.encode()
        if len(source) > MAX_SOURCE_BYTES:
            raise InvalidRequest(
                f"{param} makes a grammar of {len(source)} bytes; at most {MAX_SOURCE_BYTES} are allowed", param=param
            )
        key = hashlib.sha256(bytes([grammar.kind.value]) + source).digest()
        self._forget_late(key)
        if key not in self._known:
            async with self._one_at_a_time:
                if key not in self._known:  # nobody has asked the same meanwhile
                    self._known[key] = await self._compile(key, grammar, vocab_size)
                    if len(self._known) > MAX_REMEMBERED:
                        oldest, _ = self._known.popitem(last=False)
                        self._late.pop(oldest, None)
        self._known.move_to_end(key)
        if (error := self._known[key]) is not None:
            raise InvalidRequest(f"{param}: {error}", param=param)

    async def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            process.kill()
            await process.wait()

    def _forget_late(self, key: bytes) -> None:
        if key in self._late and time.monotonic() >= self._late[key]:
            del self._late[key], self._known[key]

    async def _compile(self, key: bytes, grammar: Grammar, vocab_size: int) -> str | None:
        process = await self._ready_process(vocab_size)
        assert process.stdin is not None
        process.stdin.write(json.dumps({"kind": grammar.kind.value, "source": grammar.source}).encode() + b"\n")
        try:
            answer = await asyncio.wait_for(_read(process), self._compile_timeout_s)
        except TimeoutError:
            await self.close()
            self._late[key] = time.monotonic() + LATE_REMEMBERED_S
            return f"the grammar was not compiled within {self._compile_timeout_s:g} s; make it simpler"
        except BaseException:  # this request was cancelled: its answer must not become another's
            if self._process is not None:
                self._process.kill()
                self._process = None
            raise
        if answer is None:
            await self.close()
            return "the grammar is too large to be compiled; make it simpler"
        error: str | None = answer["error"]
        return error

    async def _ready_process(self, vocab_size: int) -> Process:
        if self._process is not None and self._process.returncode is None:
            return self._process
        command = ("-m", "tpserve.coordinator.gateway.grammar_process", self._model_dir)
        # The child finds what this process finds, installed or not.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        process = await asyncio.create_subprocess_exec(
            sys.executable, *command, str(vocab_size), str(os.getpid()), stdin=PIPE, stdout=PIPE, env=environment
        )
        self._process = process
        try:
            answer = await asyncio.wait_for(_read(process), START_TIMEOUT_S)
        except TimeoutError:
            answer = {"unavailable": f"the compiler of grammars was not ready within {START_TIMEOUT_S:g} s"}
        except BaseException:
            process.kill()
            self._process = None
            raise
        if answer is None or "unavailable" in answer:
            if answer is None:
                logger.error("the compiler of grammars ended with status %d before it was ready", await process.wait())
            await self.close()
            why = "its compiler has ended; the log says why" if answer is None else answer["unavailable"]
            raise EngineUnavailable(f"Structured output is not available: {why}")
        return process


async def _read(process: Process) -> dict[str, Any] | None:
    """Return the next answer; None if the process has ended."""
    assert process.stdout is not None
    line = await process.stdout.readline()
    answer: dict[str, Any] | None = json.loads(line) if line else None
    return answer

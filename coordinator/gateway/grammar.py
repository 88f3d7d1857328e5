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
from pathlib import Path
from typing import Any

from tpserve.coordinator.gateway.errors import EngineUnavailable, InvalidRequest
from tpserve.proto.messages import Grammar

logger = logging.getLogger(__name__)

COMPILE_TIMEOUT_S = 5.0
"""Of one core: what it takes is the grammar's, how soon it gets that is the host's."""
BUSY_FACTOR = 6
"""So many times longer a compilation may take where others have the cores."""
START_TIMEOUT_S = 60.0
MAX_SOURCE_BYTES = 256 << 10
MAX_REMEMBERED = 4096
_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


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

    async def check(self, grammar: Grammar, vocab_size: int, *, param: str) -> None:
        """Return if the grammar compiles.

        Raises
        ------
        InvalidRequest
            If it does not, takes too long, or is too long; names `param`.
        EngineUnavailable
            If grammars cannot be compiled here, or not now; says what to install, or to try again.
        """
        source = grammar.source.encode()
        if len(source) > MAX_SOURCE_BYTES:
            raise InvalidRequest(
                f"{param} makes a grammar of {len(source)} bytes; at most {MAX_SOURCE_BYTES} are allowed", param=param
            )
        key = hashlib.sha256(bytes([grammar.kind.value]) + source).digest()
        if key not in self._known:
            async with self._one_at_a_time:
                if key not in self._known:  # nobody has asked the same meanwhile
                    self._known[key] = await self._compile(grammar, vocab_size)
                    if len(self._known) > MAX_REMEMBERED:
                        self._known.popitem(last=False)
        self._known.move_to_end(key)
        if (error := self._known[key]) is not None:
            raise InvalidRequest(f"{param}: {error}", param=param)

    async def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            process.kill()
            await process.wait()

    async def _compile(self, grammar: Grammar, vocab_size: int) -> str | None:
        process = await self._ready_process(vocab_size)
        assert process.stdin is not None
        process.stdin.write(json.dumps({"kind": grammar.kind.value, "source": grammar.source}).encode() + b"\n")
        try:
            answer = await self._answer(process)
        except TimeoutError:
            await self.close()
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

    async def _answer(self, process: Process) -> dict[str, Any] | None:
        """Return the answer to what was just asked.

        Raises
        ------
        TimeoutError
            If it has taken a core for longer than it may.
        EngineUnavailable
            If it has not even got that.
        """
        limit_s, began, used_before = self._compile_timeout_s, time.monotonic(), _cpu_seconds(process)
        reading = asyncio.create_task(_read(process))
        left_s = limit_s
        try:
            while not (await asyncio.wait([reading], timeout=left_s))[0]:
                left_s = limit_s - (_cpu_seconds(process) - used_before)
                if left_s <= 0:
                    raise TimeoutError
                if time.monotonic() - began >= BUSY_FACTOR * limit_s:
                    raise EngineUnavailable(
                        f"Structured output is not available: this host was too busy to compile the grammar within "
                        f"{BUSY_FACTOR * limit_s:g} s; try again"
                    )
                left_s = max(left_s, _TICK_S)
            return reading.result()
        finally:
            reading.cancel()

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


def _cpu_seconds(process: Process) -> float:
    """Return the seconds of cores that a process has had; of one that has ended 0."""
    try:
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) * _TICK_S  # utime and stime, proc(5)


async def _read(process: Process) -> dict[str, Any] | None:
    """Return the next answer; None if the process has ended."""
    assert process.stdout is not None
    line = await process.stdout.readline()
    answer: dict[str, Any] | None = json.loads(line) if line else None
    return answer

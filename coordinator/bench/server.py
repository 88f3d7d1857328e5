"""Starts `tpserve serve` for a configuration, waits until it is ready, and stops it as Ctrl-C would."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from tpserve.coordinator.bench.errors import BenchError
from tpserve.coordinator.bench.results import Configuration
from tpserve.coordinator.process import end_with_parent

logger = logging.getLogger(__name__)

_POLL_S = 0.1
_STOP_WITHIN_S = 90.0
_READY = re.compile(r"Ready at (http\S+)")
_ERROR = re.compile(r"error: (.*)")


def serve_command(
    model: str, configuration: Configuration, *, max_num_seqs: int | None, prefix_cache: bool
) -> list[str]:
    """Return the command that serves a configuration; what the user's arguments say comes last and wins.

    Parameters
    ----------
    max_num_seqs
        The highest concurrency, all of which must run at once; None takes as many as memory allows.
    """
    command = [sys.executable, "-m", "tpserve.cli", "serve", model, "--tp", str(configuration.tp), "--port", "0"]
    command += ["--mode", "server"] if max_num_seqs is None else ["--max-num-seqs", str(max_num_seqs)]
    if configuration.quantization is not None:
        command += ["--quantization", configuration.quantization]
    if not prefix_cache:
        command += ["--no-prefix-cache"]
    return [*command, *configuration.serve_args]


@asynccontextmanager
async def running(command: Sequence[str], log_path: Path, *, start_timeout_s: float) -> AsyncIterator[str]:
    """Run a server and yield its address once it is ready.

    Raises
    ------
    BenchError
        If it ends or is not ready in time; with its last error and the path of its log.
    """
    pid = os.getpid()
    with log_path.open("wb") as log:
        process = subprocess.Popen(  # noqa: ASYNC220  # starting takes no time; waiting is done below
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for this process, which then ends the server in order
            preexec_fn=lambda: end_with_parent(pid),
        )
    try:
        yield await _ready(process, log_path, start_timeout_s)
        if process.poll() is not None:
            raise _ended(process, log_path)
    finally:
        await _stop(process)


async def _ready(process: subprocess.Popen[bytes], log_path: Path, timeout_s: float) -> str:
    deadline = time.monotonic() + timeout_s
    while True:
        ended = process.poll() is not None  # before reading, so that its last words are read
        log = _text(log_path)
        if found := _READY.search(log):
            return found[1]
        if ended:
            raise _ended(process, log_path)
        if time.monotonic() > deadline:
            raise BenchError(f"the server is not ready within {timeout_s:g} s; its log is {log_path}")
        await asyncio.sleep(_POLL_S)


def _text(log_path: Path) -> str:
    return log_path.read_text(errors="replace")


def _ended(process: subprocess.Popen[bytes], log_path: Path) -> BenchError:
    errors = _ERROR.findall(_text(log_path))
    why = errors[-1] if errors else f"exit code {process.returncode}"
    return BenchError(f"the server ended: {why} (its log is {log_path})")


async def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
    try:
        await asyncio.to_thread(process.wait, _STOP_WITHIN_S)
    except subprocess.TimeoutExpired:
        logger.warning("the server did not end within %g s and is killed", _STOP_WITHIN_S)
        process.kill()  # what it started ends with it
        process.wait()

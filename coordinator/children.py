"""The processes that a server starts: how they are configured, what they say first and last, and a port for them."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import select
import subprocess
import sys
from collections.abc import Callable
from typing import IO, Any

from tpserve.coordinator.process import bind

RAY_ON_LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""Makes a Ray of one host take 127.0.0.1 as its address, as it does on those two systems: at any other one its daemons
and every rank listen on all interfaces."""
_NICENESS = "RAY_worker_niceness"
_TASK_EVENTS = "RAY_task_events_report_interval_ms"
_POLL_S = 0.1


class ServeError(RuntimeError):
    """The server cannot start or go on; one clear line for the user."""


class AlreadyTold(ServeError):
    """As above, where a process that ran in the foreground has written the line itself."""


def log_lines(stream: IO[str]) -> None:
    """Log what a process writes that knows no JSON."""
    for line in stream:
        if text := line.strip():
            logging.getLogger("tpserve.compile").info("%s", text)


def spawn_child(
    module: str, config: dict[str, Any], environment: dict[str, str], pass_fds: tuple[int, ...] = ()
) -> subprocess.Popen[str]:
    """Start a module as a process that reads `config` from standard input and says its first words on standard output.

    It keeps the descriptors `pass_fds`, and has `environment` beside what this process has.
    """
    # A session of its own: Ctrl-C reaches this process alone, which then ends the others in order.
    process = subprocess.Popen(
        [sys.executable, "-m", module, "-"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | environment,
        pass_fds=pass_fds,
    )
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError), process.stdin:  # one that is gone at once is seen by its parent
        json.dump(config, process.stdin)  # not as an argument, which every user of this host could read
    return process


def ray_environment(ray_address: str | None) -> dict[str, str]:
    """Return what must stand in the environment before Ray is imported."""
    environment = {"RAY_USAGE_STATS_ENABLED": "0"}
    # A rank chooses its GPU by number: peer memory needs every GPU visible in every rank.
    environment |= {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    # Ray starts actors at nice 15, behind all else that a host runs: made for batch jobs, and here each step waits.
    environment |= {_NICENESS: os.environ.get(_NICENESS, "0")}
    if ray_address is None:
        environment |= RAY_ON_LOOPBACK
        # What each task did is shown by Ray's dashboard alone, which is not there; and whoever ends waits 0.3 s, most
        # times, until the last of it has been sent.
        environment |= {_TASK_EVENTS: os.environ.get(_TASK_EVENTS, "0")}
    if ray_address is None and "RAY_AUTH_MODE" not in os.environ:
        # A secret for this run alone: left to itself, Ray keeps a lasting token in the home folder.
        environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    return environment


def first_words(
    name: str, process: subprocess.Popen[str], key: str, meanwhile: Callable[[], None] = lambda: None
) -> str:
    """Wait until a process tells where it listens; call `meanwhile` now and then, which may raise."""
    assert process.stdout is not None
    while not select.select([process.stdout], [], [], _POLL_S)[0]:
        meanwhile()
    line = process.stdout.readline()
    facts: dict[str, str] = json.loads(line) if line else {}
    if key not in facts:
        process.wait()
        raise ServeError(last_words(name, process, line))
    return facts[key]


def last_words(name: str, process: subprocess.Popen[str], line: str) -> str:
    """Return why a process ended, from its last line on standard output if it said so."""
    error: str | None = json.loads(line).get("error") if line else None
    return error or f"the {name} ended with status {process.returncode}"


def require_free_port(kind: str, host: str, port: int) -> None:
    """Fail before anything is built if the port of --`kind`port is taken; its process binds it later."""
    if not 0 <= port <= 65535:
        raise ServeError(f"--{kind}port {port} is not in 0..65535")
    try:
        bind(host, port).close()
    except OSError as error:
        raise ServeError(
            f"cannot listen on {host}:{port} ({error.strerror}): choose another --{kind}host or --{kind}port"
        ) from None

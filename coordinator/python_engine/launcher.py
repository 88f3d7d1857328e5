"""Starts an engine without HTTP (`tpserve serve --no-gateway`) as a child process, and ends it."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, NoReturn

from tpserve.coordinator.engine_door import TOKEN_VARIABLE, door_fields, own_door
from tpserve.coordinator.gateway.tls import TlsError
from tpserve.coordinator.python_engine.errors import EngineError
from tpserve.coordinator.python_engine.loop import BackgroundLoop
from tpserve.coordinator.serve_arguments import add_arguments

HTTP_OPTIONS = (
    *("host", "port", "api_key", "api_key_file", "allow_origins", "gateway_processes", "no_gateway", "parent_pid"),
    *(
        "limits_dir",
        "max_connections",
        "ssl_certfile",
        "ssl_keyfile",
        "ssl_keyfile_password_file",
        "ssl_ca_certs",
        "ssl_client_auth",
    ),
)
"""Options of `tpserve serve` that mean nothing to an engine without a gateway."""

_ERROR = re.compile(r"^.*tpserve( \w+)?: error: ")
"""How every command of ours begins that line."""

_KILL_AFTER_S = 15.0
"""After its drain time a launcher that is still there is killed."""


def serve_arguments(model: str, options: dict[str, Any]) -> list[str]:
    """Return the arguments of `tpserve serve` for keyword options.

    Parameters
    ----------
    options
        The flags' names with underscores; None and False leave a flag out, True is a flag without a value.

    Raises
    ------
    TypeError
        If an option is unknown, or one of the HTTP server's.
    ValueError
        If a value is not one that the flag takes.
    """
    arguments = [model]
    for name, value in options.items():
        if name in HTTP_OPTIONS:
            raise TypeError(f"{name!r} is an option of the HTTP server, which this engine does not start")
        if value is None or value is False:
            continue
        arguments.append("--" + name.replace("_", "-"))
        if isinstance(value, list | tuple):
            arguments += map(str, value)
        elif value is not True:
            arguments.append(str(value))
    _, unknown = _parser().parse_known_args(arguments)
    if unknown:
        name = unknown[0].removeprefix("--").replace("-", "_")
        raise TypeError(f"{name!r} is not an option of the engine; `tpserve serve --help` lists them")
    return arguments


def options_of_flags(model: str, flags: list[str]) -> dict[str, Any]:
    """Return flags of `tpserve serve` as keyword options.

    Raises
    ------
    ValueError
        If a flag is unknown or its value not one that it takes.
    """
    parser = _parser()
    defaults = vars(parser.parse_args([model]))
    return {name: value for name, value in vars(parser.parse_args([model, *flags])).items() if value != defaults[name]}


def own_door_fields(arguments: list[str], token: str | None) -> dict[str, Any]:
    """Return how the engine that these arguments start is met, as fields of a gateway's configuration.

    Raises
    ------
    EngineError
        If its port would be open to a network, or a file cannot be used.
    """
    args = _parser().parse_args(arguments)
    if token is not None:
        args.engine_token = token
    try:
        door = own_door(args)
    except TlsError as error:
        raise EngineError(str(error)) from None
    return {**door_fields(args), "engine_ssl_server_name": None if door is None else door.server_name}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="tpserve serve", allow_abbrev=False, add_help=False)
    add_arguments(parser)
    return parser


class Launcher:
    """The child process at the root of an engine's process tree.

    Parameters
    ----------
    arguments
        As `serve_arguments` returns them.
    log_file
        Gets what the engine logs; None is this process's standard error.
    engine_token
        Goes by the environment: everybody can read a process's arguments.
    """

    def __init__(self, arguments: list[str], log_file: Path | None, engine_token: str | None = None) -> None:
        self._environ = {} if engine_token is None else {TOKEN_VARIABLE: engine_token}
        self._arguments = arguments
        self._log_file = log_file
        self._process: subprocess.Popen[str] | None = None
        self.facts: dict[str, str] = {}
        """`address` and `model_dir`, once it is ready."""

    @property
    def has_ended(self) -> bool:
        """Whether it is gone, on its own or by `stop`."""
        return self._process is None or self._process.poll() is not None

    def start(self, loop: BackgroundLoop, timeout_s: float) -> None:
        """Start, and wait until the engine takes requests.

        Raises
        ------
        EngineError
            If it cannot be started or is not ready in time. Nothing is left of it.
        """
        # From the loop's thread, which does not end before this process does.
        loop.run(self._spawn(), timeout_s=30.0)
        process = self._process
        assert process is not None
        output = process.stdout
        assert output is not None
        lines: list[str] = []
        reader = threading.Thread(target=lambda: lines.append(output.readline()), daemon=True)
        reader.start()
        try:
            reader.join(timeout_s)
        except BaseException:  # Ctrl-C while it starts
            self.stop(drain_s=0.0)
            raise
        facts = json.loads(lines[0]) if lines and lines[0] else {}
        if "address" in facts:
            self.facts = facts
            return
        timed_out = reader.is_alive()
        self.stop(drain_s=0.0)
        if timed_out:
            raise EngineError(f"the engine was not ready within {timeout_s:g} s: raise start_timeout_s")
        raise EngineError(self._last_error() or facts.get("error", f"it ended with status {process.returncode}"))

    def _last_error(self) -> str | None:
        """Return the one line that says what is wrong, from the log if that is a file."""
        if self._log_file is None:
            return None
        lines = [line for line in self._log_file.read_text(errors="replace").splitlines() if _ERROR.search(line)]
        return _ERROR.sub("", lines[-1]) + f" (log: {self._log_file})" if lines else None

    async def _spawn(self) -> None:
        command = [sys.executable, "-m", "tpserve.cli", "serve", *self._arguments, "--no-gateway"]
        command += ["--parent-pid", str(os.getpid())]
        log = None if self._log_file is None else self._log_file.open("ab")
        try:
            self._process = subprocess.Popen(  # noqa: ASYNC220  # the start itself is all that it waits for
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, "PYTHONPATH": _python_path(), **self._environ},
                start_new_session=True,  # Ctrl-C reaches this process alone, which then ends the engine
            )
        finally:
            if log is not None:
                log.close()

    def stop(self, drain_s: float) -> None:
        """End the engine: politely, then by force."""
        process = self._process
        if process is None:
            return
        deadline = time.monotonic() + drain_s + _KILL_AFTER_S
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()


def _python_path() -> str:
    """Return a path by which the child finds the package that this process has, installed or not."""
    package = str(Path(sys.modules["tpserve"].__path__[0]).parent)
    return os.pathsep.join(dict.fromkeys(filter(None, [package, *os.environ.get("PYTHONPATH", "").split(os.pathsep)])))

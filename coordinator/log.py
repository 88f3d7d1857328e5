"""How every process of a replica writes its log: as lines for people, or as one JSON object per line.

The JSON has `timestamp`, `level`, `process`, `logger`, `message`, and `request_id`, `rank`, `pid` where a line is about
one. Prompts and keys are in neither.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Mapping
from typing import Any, Literal

from pythonjsonlogger.json import JsonFormatter

LogFormat = Literal["text", "json"]
LOG_FORMATS: tuple[LogFormat, ...] = ("text", "json")

_RANK_LINE = re.compile(r"(DEBUG|INFO|WARNING|ERROR|CRITICAL) rank ((?:draft )?\d+): (.*)", re.DOTALL)
_HANDLER = "tpserve"
"""Name of the handler, by which it is found and replaced when a process has read its configuration."""
_RAY_HANDLER = "ray_print_logs"

rank_logger = logging.getLogger("tpserve.rank")


def configure(log_format: str, process: str, level: int = logging.INFO) -> None:
    """Set up the root logger of this process, on standard error.

    Parameters
    ----------
    log_format
        One of LOG_FORMATS.
    process
        `serve`, `coordinator` or `gateway`.
    """
    root = logging.getLogger()
    for old in [old for old in root.handlers if old.get_name() == _HANDLER]:
        root.removeHandler(old)
    handler = logging.StreamHandler(sys.stderr)
    handler.set_name(_HANDLER)
    if log_format == "json":
        handler.setFormatter(
            JsonFormatter(
                "{levelname}{name}{message}",
                style="{",
                timestamp=True,
                rename_fields={"levelname": "level", "name": "logger"},
                static_fields={"process": process},
            )
        )
    else:
        where = "" if process == "serve" else f" {process}:"
        handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)s{where} %(message)s"))
    root.addHandler(handler)
    root.setLevel(level)


def take_over_rank_output() -> None:
    """Log what ranks write, line by line, where Ray would print it with a prefix of its own; after `ray.init`.

    Ray has no public door for this; `ray` is pinned, and a test of the real server fails if the place moves.
    """
    from ray._private.ray_logging import global_worker_stdstream_dispatcher as dispatcher

    dispatcher.remove_handler(_RAY_HANDLER)
    dispatcher.add_handler(_RAY_HANDLER, _log_lines)


def _log_lines(data: Mapping[str, Any]) -> None:
    pid = data.get("pid")
    if pid == "autoscaler":
        return  # pages of status, of which Ray itself prints nothing either
    for line in data.get("lines", ()):
        log_rank_line(str(line), pid if isinstance(pid, int) else None)


def log_rank_line(line: str, pid: int | None) -> None:
    """Log one line that a rank wrote, with its number and level if the line has them."""
    found = _RANK_LINE.fullmatch(line)
    level, rank, message = (found[1], found[2], found[3]) if found else ("INFO", None, line)
    extra: dict[str, object] = {} if rank is None else {"rank": int(rank) if rank.isdecimal() else rank}
    if pid is not None:
        extra["rank_pid"] = pid
    rank_logger.log(logging.getLevelNamesMapping()[level], message, extra=extra)

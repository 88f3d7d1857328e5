"""Keeps the gateways of one server running: a gateway that dies is started again, on the port that it had.

The parent holds the port: connections that come while no gateway is there wait for the next one, and are not refused.
Knows nothing of HTTP.
"""

from __future__ import annotations

import json
import logging
import socket
import subprocess
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from prometheus_client.multiprocess import mark_process_dead

logger = logging.getLogger(__name__)

MAX_RESTARTS = 5
WINDOW_S = 60.0
"""More than `MAX_RESTARTS` within it are given up: whatever kills gateways will go on."""
_FIRST_DELAY_S = 0.1
"""Doubled with each restart of the window."""

_MOST_BESIDE_GPUS = 4
_CPUS_OF_EACH = 8

Spawn = Callable[[socket.socket], "subprocess.Popen[str]"]


def gateways_beside_gpus(num_cpus: int) -> int:
    """Return how many gateways a host with GPUs has, if nobody says.

    A step ends for all at once: of 64 streams one gateway writes the last about 3 ms after the first. With four, mean
    TTFT of Llama-3-70B on four H200s is 54 -> 47 ms at 64 requests, and 33 -> 30 at 16.
    """
    return max(1, min(_MOST_BESIDE_GPUS, num_cpus // _CPUS_OF_EACH))


class GatewayLost(RuntimeError):
    """A gateway ended so often that it is not started again; the message says how."""


@dataclass(slots=True)
class _Place:
    """Of one gateway."""

    process: subprocess.Popen[str]
    restart_at: float | None = None
    """When the next one is due; None while one runs."""
    words: str = ""
    """Why the last one ended."""
    restarts: deque[float] = field(default_factory=deque)


class GatewayKeeper:
    """The gateways that share one port.

    Parameters
    ----------
    shared
        The bound socket; closed by `close_port`.
    spawn
        Starts a gateway on it.
    metrics_dir
        Where several gateways add up their metrics.
    """

    def __init__(
        self,
        shared: socket.socket,
        spawn: Spawn,
        count: int,
        metrics_dir: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._shared = shared
        self._spawn = spawn
        self._metrics_dir = metrics_dir
        self._clock = clock
        self._places = [_Place(spawn(shared)) for _ in range(count)]

    @property
    def processes(self) -> list[subprocess.Popen[str]]:
        """One by place, living or ended."""
        return [place.process for place in self._places]

    def look(self) -> None:
        """Start again what has ended and is due.

        Raises
        ------
        GatewayLost
            If one has ended more than `MAX_RESTARTS` times within `WINDOW_S`.
        """
        now = self._clock()
        for place in self._places:
            if place.restart_at is not None:
                if now >= place.restart_at:
                    place.restart_at = None
                    place.process = self._spawn(self._shared)
            elif place.process.poll() is not None:
                self._plan_restart(place, now)

    def close_port(self) -> None:
        """Let the gateways alone hold the port: once they drain, nobody takes connections."""
        self._shared.close()

    def _plan_restart(self, place: _Place, now: float) -> None:
        process = place.process
        place.words = _last_words(process)
        if self._metrics_dir is not None:
            # What it counted stays; what it held, as requests in flight, is gone with it.
            mark_process_dead(process.pid, str(self._metrics_dir))  # type: ignore[no-untyped-call]
        while place.restarts and now - place.restarts[0] > WINDOW_S:
            place.restarts.popleft()
        if len(place.restarts) == MAX_RESTARTS:
            raise GatewayLost(f"{place.words}, for the {MAX_RESTARTS + 1}th time within {WINDOW_S:g} s")
        delay_s = _FIRST_DELAY_S * 2 ** len(place.restarts)
        place.restarts.append(now)
        place.restart_at = now + delay_s
        logger.error("%s and is started again in %g s", place.words, delay_s)


def _last_words(process: subprocess.Popen[str]) -> str:
    """Return how a gateway ended: by its own last line if it said so."""
    error = ""
    if process.stdout is not None:
        with process.stdout as lines:
            for line in lines:
                error = json.loads(line).get("error", error)
    return f"the gateway ended with status {process.returncode}" + (f" ({error})" if error else "")

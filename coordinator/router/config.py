"""What a router is started with."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from urllib.parse import urlsplit

from tpserve.coordinator.router.choice import Policy


class RouterConfigError(ValueError):
    """The configuration cannot work; the message holds the value and the remedy."""


@dataclass(frozen=True, slots=True)
class RouterConfig:
    """Arguments of one router process."""

    backends: tuple[str, ...]
    """Base URLs of the replicas' gateways, `http://host:port`."""
    policy: Policy = Policy.PREFIX
    host: str = "127.0.0.1"
    port: int = 8000
    """0 takes a free one."""
    router_token: str | None = None
    """Secret shared with the gateways; None: streams cannot move."""
    admin_token: str | None = None
    """Secret of /admin; None: there is none."""
    max_in_flight_per_backend: int = 256
    max_queued: int = 1024
    """Requests that wait for a replica with room; more are answered with 429."""
    queue_timeout_s: float = 30.0
    """A request that waits longer is answered with 429, or with 503 if no replica is ready."""
    max_moves: int = 3
    """Times that one request may lose its replica: one that kills replicas must not have them all."""
    prefix_blocks: int = 1 << 16
    """Blocks of prompts that are remembered of each replica; see `choice`."""
    health_interval_s: float = 1.0
    health_timeout_s: float = 2.0
    silent_after_s: float = 40.0
    """A stream of which nothing comes for longer is lost: gateways send a comment every 15 s. So is an answer in one
    piece, if its replica's health does not answer either."""
    breaker_failures: int = 3
    breaker_open_s: float = 1.0
    breaker_max_open_s: float = 30.0
    """See `breaker` for these."""
    drain_timeout_s: float = 30.0
    """After SIGTERM, running requests get this long."""
    max_body_bytes: int = 16 * 2**20
    body_timeout_s: float = 30.0
    """A body must come within this time, and a second more for each 16 KiB of it."""
    merge_metrics: bool = False
    """/metrics holds those of all replicas besides, told apart by the label `replica`."""
    log_format: str = "text"
    parent_pid: int | None = None
    """The process that started this one; the router ends with it. None: it stands alone."""

    def __post_init__(self) -> None:
        if not self.backends:
            raise RouterConfigError("no backend is given: name each replica by --backend http://host:port")
        for url in self.backends:
            parse_backend(url)
        if len(set(self.backends)) < len(self.backends):
            raise RouterConfigError(f"backends holds one twice: {', '.join(self.backends)}")
        if not 0 <= self.port <= 65535:
            raise RouterConfigError(f"port is {self.port}: it must lie in [0, 65535]")
        for name in ("router_token", "admin_token"):
            if getattr(self, name) == "":
                raise RouterConfigError(f"{name} is empty: leave it out to do without")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name in ("port", "max_queued", "max_moves", "drain_timeout_s") else 1e-9
            if isinstance(value, int | float) and not least <= value < math.inf and field.name != "merge_metrics":
                raise RouterConfigError(
                    f"{field.name} is {value}: it must be {'0 or more' if not least else 'above 0'}"
                )


def parse_backend(url: str) -> tuple[str, int]:
    """Return host and port of a replica's base URL.

    Raises
    ------
    RouterConfigError
        If it is not `http://host:port`.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise RouterConfigError(f"backend {url!r} is no URL ({error}): it must be http://host:port") from None
    if parts.scheme == "https":
        raise RouterConfigError(f"backend {url!r}: replicas are spoken to over plain HTTP; put TLS before the router")
    if parts.scheme != "http" or not host or parts.path not in ("", "/") or parts.query or parts.username:
        raise RouterConfigError(f"backend {url!r} must be http://host:port")
    return host, port or 80

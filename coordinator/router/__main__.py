"""`tpserve router --backend URL --backend URL ...`: one door before several replicas.

SIGTERM and SIGINT drain: no new connections, running requests get `--drain-timeout`, exit code 0.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import math
import os
import signal
import socket
import sys
from collections.abc import Iterator

import uvicorn

from tpserve.coordinator.gateway.guard import MAX_CONNECTIONS, connection_limit, guarded_protocol
from tpserve.coordinator.gateway.tls import TlsError, TlsFiles, TlsServer, add_tls_arguments, tls_files_of, url_of
from tpserve.coordinator.log import LOG_FORMATS, configure
from tpserve.coordinator.process import bind, end_with_parent, tell_parent
from tpserve.coordinator.router.app import Router, signal_parent
from tpserve.coordinator.router.arguments import ADMIN_VARIABLE, add_policy_arguments
from tpserve.coordinator.router.choice import Policy
from tpserve.coordinator.router.config import RouterConfig, RouterConfigError
from tpserve.proto.garbage import spare_standing_objects

logger = logging.getLogger("tpserve.coordinator.router")

IDLE_CONNECTION_S = 75
"""Idle connections stay open longer than load balancers' usual 60 s, so that those close first."""
_DRAIN_GRACE_S = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `tpserve router`."""
    default = RouterConfig(("http://x:1",))
    parser.add_argument(
        "--backend", action="append", default=[], metavar="URL", help="a replica, http://host:port; once for each"
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free port")
    parser.add_argument(
        "--max-connections", type=int, default=MAX_CONNECTIONS, metavar="N", help="of clients at once (%(default)s)"
    )
    add_policy_arguments(parser)
    add_tls_arguments(parser)
    parser.add_argument("--health-interval", type=float, default=default.health_interval_s, metavar="SECONDS")
    parser.add_argument("--drain-timeout", type=float, default=default.drain_timeout_s, metavar="SECONDS")
    parser.add_argument("--merge-metrics", action="store_true", help="/metrics holds those of all replicas besides")
    parser.add_argument("--log-format", choices=LOG_FORMATS, default="text", help="json: one object per line")
    parser.add_argument("--parent-pid", type=int, help=argparse.SUPPRESS)  # of a process that this ends with


def config_of(args: argparse.Namespace) -> RouterConfig:
    """Return the configuration.

    Raises
    ------
    RouterConfigError
        Naming the value that cannot be.
    """
    return RouterConfig(
        backends=tuple(url.rstrip("/") for url in args.backend),
        policy=Policy(args.policy),
        host=args.host,
        port=args.port,
        router_token=args.router_token,
        admin_token=None if args.parent_pid is None else os.environ.get(ADMIN_VARIABLE),
        max_in_flight_per_backend=args.max_inflight_per_backend,
        max_queued=args.max_queued,
        queue_timeout_s=args.queue_timeout,
        max_moves=args.max_moves,
        health_interval_s=args.health_interval,
        drain_timeout_s=args.drain_timeout,
        merge_metrics=args.merge_metrics,
        log_format=args.log_format,
        parent_pid=args.parent_pid,
    )


class Server(TlsServer):
    """Drains on SIGTERM and SIGINT and then returns, instead of dying by the signal."""

    def __init__(self, config: uvicorn.Config, router: Router, tls: TlsFiles | None = None) -> None:
        super().__init__(config, tls)
        self._router = router

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to listen, and say so: in the log, and as one JSON line on standard output for the parent."""
        await super().startup(sockets)
        for bound in sockets or ():
            url = url_of(bound, self.tls)
            logger.info("routing at %s to %s", url, ", ".join(self._router.config.backends))
            if self._router.config.parent_pid is not None:
                tell_parent(url=url)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Install the drain for as long as the server runs."""
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(signum, self._drain, signum)
        try:
            yield
        finally:
            for signum in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(signum)

    def _drain(self, signum: int) -> None:
        if self.should_exit:
            self.force_exit = True  # the second time nobody is waited for
            return
        num_live, timeout_s = self._router.replicas.num_in_flight, self._router.config.drain_timeout_s
        logger.info("%s: draining %d requests, at most %g s", signal.Signals(signum).name, num_live, timeout_s)
        self._router.is_draining = True
        self.should_exit = True
        asyncio.get_running_loop().call_later(timeout_s, self._router.give_up_all)


def main(args: argparse.Namespace) -> int:
    """Run the router; return the exit code."""
    configure(args.log_format, "router")
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)  # its start and end are told here
    try:
        config, tls = config_of(args), tls_files_of(args)
    except (RouterConfigError, TlsError) as error:
        return _fail(args, str(error))
    if config.parent_pid is not None:
        end_with_parent(config.parent_pid)
    if config.router_token is None and config.parent_pid is None:
        logger.warning("no --router-token: a stream whose replica dies ends with an error")
    try:
        bound = bind(config.host, config.port)
    except OSError as error:
        return _fail(args, f"cannot listen on {config.host}:{config.port}: {error.strerror}")
    router = Router(config, None if config.parent_pid is None else signal_parent(config.parent_pid))
    with bound:
        uvicorn_config = uvicorn.Config(
            router,
            loop="uvloop",
            http=guarded_protocol(max_connections=connection_limit(args.max_connections, files_each=2)),
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=IDLE_CONNECTION_S,
            timeout_graceful_shutdown=math.ceil(config.drain_timeout_s) + _DRAIN_GRACE_S,
        )
        spare_standing_objects()
        Server(uvicorn_config, router, tls).run(sockets=[bound])
    return 0


def _fail(args: argparse.Namespace, message: str) -> int:
    """Say why the router ends: to the parent, which shows it, or in the log."""
    if args.parent_pid is not None:
        tell_parent(error=message)
    else:
        logger.error("tpserve router: error: %s", message)
    return 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="tpserve router")
    add_arguments(parser)
    sys.exit(main(parser.parse_args()))

"""`python -m tpserve.coordinator.gateway CONFIG`: one gateway process.

CONFIG is a JSON object with the fields of `GatewayConfig`; `-` reads it from standard input. SIGTERM and SIGINT drain:
no new connections, running requests get `drain_timeout_s`, exit code 0.
"""

from __future__ import annotations

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

from tpserve.coordinator.gateway.app import create_app
from tpserve.coordinator.gateway.config import ConfigError, GatewayConfig
from tpserve.coordinator.gateway.errors import SHUTTING_DOWN, EngineUnavailable
from tpserve.coordinator.gateway.guard import connection_limit, guarded_protocol
from tpserve.coordinator.gateway.service import Service
from tpserve.coordinator.gateway.tls import TlsError, TlsFiles, TlsServer, url_of
from tpserve.coordinator.gateway.tokenizer import ModelFilesError
from tpserve.coordinator.log import configure
from tpserve.coordinator.process import bind, end_with_parent, tell_parent
from tpserve.coordinator.tracing import TracingUnavailable
from tpserve.proto.garbage import spare_standing_objects

logger = logging.getLogger("tpserve.coordinator.gateway")

IDLE_CONNECTION_S = 75
"""Idle connections stay open longer than load balancers' usual 60 s, so that those close first."""

DRAIN_GRACE_S = 2
"""Between telling clients that time is up and cutting their connections."""


class Server(TlsServer):
    """Drains on SIGTERM and SIGINT and then returns, instead of dying by the signal."""

    def __init__(self, config: uvicorn.Config, service: Service, tls: TlsFiles | None = None) -> None:
        super().__init__(config, tls)
        self._service = service

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to listen, and say so: in the log, and as one JSON line on standard output for the parent."""
        await super().startup(sockets)
        for bound in sockets or ():
            url = url_of(bound, self.tls)
            logger.info("listening on %s", url)
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
            return
        timeout_s = self._service.config.drain_timeout_s
        num_live = self._service.engine.num_live_requests
        logger.info("%s: draining %d requests, at most %g s", signal.Signals(signum).name, num_live, timeout_s)
        self.should_exit = True
        self._service.engine.stop_waiting()  # one that still starts would look for its coordinator first
        asyncio.get_running_loop().call_later(
            timeout_s, self._service.engine.fail_all, EngineUnavailable(SHUTTING_DOWN, retry_after_s=1)
        )


def main(argv: list[str] | None = None) -> int:
    """Run the gateway; return the exit code."""
    args = sys.argv[1:] if argv is None else argv
    configure("text", "gateway")
    if len(args) != 1:
        logger.error("usage: python -m tpserve.coordinator.gateway CONFIG (a JSON object, or - for standard input)")
        return 2
    try:
        config = GatewayConfig.from_json(sys.stdin.read() if args[0] == "-" else args[0])
    except ConfigError as error:
        logger.error("%s", error)
        return 2
    configure(
        "json" if config.log_format == "json" else "text", "gateway", logging.getLevelName(config.log_level.upper())
    )
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)  # its start and end are told here
    if config.parent_pid is not None:
        end_with_parent(config.parent_pid)
    try:
        bound = bind(config.host, config.port) if config.listen_fd is None else socket.socket(fileno=config.listen_fd)
    except OSError as error:
        return _fail(f"cannot listen on {config.host}:{config.port}: {error.strerror}")
    with bound:
        # Prompts are tokenised one at a time, so the library's own threads would only cost.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        try:
            service = Service.load(config)
        except (ModelFilesError, TracingUnavailable, TlsError) as error:
            return _fail(str(error))
        try:
            tls = config.tls_files()
            app = create_app(service)
        except (ConfigError, TlsError) as error:
            return _fail(str(error))
        uvicorn_config = uvicorn.Config(
            app,
            loop="uvloop",
            http=guarded_protocol(
                config.header_timeout_s, config.write_timeout_s, connection_limit(config.max_connections)
            ),
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=IDLE_CONNECTION_S,
            timeout_graceful_shutdown=math.ceil(config.drain_timeout_s) + DRAIN_GRACE_S,
        )
        spare_standing_objects()
        Server(uvicorn_config, service, tls).run(sockets=[bound])
        if service.tracing is not None:
            service.tracing.shutdown()
    return 0


def _fail(message: str) -> int:
    """Say why the gateway ends: to the parent, which shows it, or in the log."""
    logger.error("%s", message)
    tell_parent(error=message)
    return 1


if __name__ == "__main__":
    sys.exit(main())

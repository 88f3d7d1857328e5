"""ASGI middleware that holds requests to the limits of their key's account and counts what they use."""

from __future__ import annotations

import logging
import sqlite3
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tpserve.coordinator.gateway.errors import RateLimited
from tpserve.coordinator.gateway.keys import Account
from tpserve.coordinator.gateway.limits import FLUSH_S, Ledger, Level, rate_headers
from tpserve.coordinator.gateway.metrics import HttpMetrics

logger = logging.getLogger(__name__)


class Meter:
    """Of one request: takes its tokens off the account as they become known.

    A ledger that fails (a full disk) costs limits, not requests: that is logged.
    """

    def __init__(self, account: Account, ledger: Ledger, metrics: HttpMetrics, *, resumed: bool) -> None:
        self.account = account
        self._ledger = ledger if account.is_limited else None
        self._metrics = metrics
        self._resumed = resumed
        self._pending = 0
        """Output tokens that are not in the ledger yet."""
        self._flushed_at = 0.0
        self._level: Level | None = None
        self._is_in = False

    def admit(self) -> None:
        """Begin.

        Raises
        ------
        RateLimited
            If a limit is reached.
        """
        if not self._resumed:
            self._metrics.key_request(self.account.name)
        if self._ledger is None:
            return
        self._flushed_at = self._ledger.clock()
        try:
            self._level = (self._ledger.rejoin if self._resumed else self._ledger.admit)(self.account)
            self._is_in = True
        except RateLimited as error:
            self._metrics.key_limited(self.account.name, error.limit)
            raise
        except sqlite3.Error as error:
            _tell(error)

    def take_prompt(self, num_tokens: int) -> None:
        """Charge a prompt before it is computed; of a stream that goes on here it has been charged.

        Raises
        ------
        RateLimited
            If the account has not so many tokens left.
        """
        if self._resumed:
            return
        if self._ledger is not None:
            try:
                self._level = self._ledger.take(self.account, num_tokens, at_most=True)
            except RateLimited as error:
                self._metrics.key_limited(self.account.name, error.limit)
                raise
            except sqlite3.Error as error:
                _tell(error)
        self._metrics.key_tokens(self.account.name, prompt=num_tokens)

    def take_output(self, num_tokens: int) -> None:
        """Charge output tokens, which are never refused."""
        self._metrics.key_tokens(self.account.name, generation=num_tokens)
        if self._ledger is None:
            return
        self._pending += num_tokens
        now = self._ledger.clock()
        if now - self._flushed_at >= FLUSH_S:
            self._flushed_at = now
            try:
                self._ledger.take(self.account, self._pending, at_most=False)
                self._pending = 0
            except sqlite3.Error as error:
                _tell(error)

    def leave(self) -> None:
        """End."""
        if self._ledger is not None and self._is_in:
            self._is_in = False
            try:
                self._ledger.leave(self.account, self._pending)
            except sqlite3.Error as error:
                _tell(error)

    @property
    def headers(self) -> dict[str, str]:
        """What the client is told of its limits."""
        return {} if self._level is None else rate_headers(self.account, self._level)


def meter_of(state: dict[str, Any]) -> Meter | None:
    """Return the meter of a request, by its scope's state; None: there are no keys."""
    meter: Meter | None = state.get("meter")
    return meter


class Metering:
    """The middleware. Every POST of an account is a request; what only looks (GET) is free."""

    def __init__(self, app: ASGIApp, ledger: Ledger, metrics: HttpMetrics) -> None:
        self._app = app
        self._ledger = ledger
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        account: Account | None = scope["state"].get("account") if scope["type"] == "http" else None
        if account is None or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        origin = scope["state"].get("origin")
        resumed = origin is not None and origin.progress is not None and origin.progress.resumed
        meter = Meter(account, self._ledger, self._metrics, resumed=resumed)

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                there = {name for name, _ in message["headers"]}
                ours = [(name.encode(), value.encode()) for name, value in meter.headers.items()]
                message = {**message, "headers": [*message["headers"], *(h for h in ours if h[0] not in there)]}
            await send(message)

        meter.admit()
        scope["state"]["meter"] = meter
        try:
            await self._app(scope, receive, with_headers)
        finally:
            meter.leave()


def _tell(error: sqlite3.Error) -> None:
    logger.error("limits of API keys are not held: %s", error)

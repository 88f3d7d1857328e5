"""One client's request: sent to a replica, and to another one for as long as that is of use.

What came of an attempt      what follows
-----------------------      ------------
no answer has begun          another replica gets the request; a connection that breaks before is a failure
429 or 503                   another replica gets it; if all have refused, the client gets the last refusal
a marked stream breaks       another replica goes on with it (`relay`); the client sees a pause
any other stream breaks      an error event ends it
anything else                the client gets it
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Iterable

import orjson
from starlette.types import Receive, Scope, Send

from tpserve.coordinator.gateway.errors import ApiError, EngineUnavailable, error_json
from tpserve.coordinator.gateway.limited_body import limited_body
from tpserve.coordinator.relay import SECRET_HEADER, STREAM_HEADER, Identity
from tpserve.coordinator.router.config import RouterConfig
from tpserve.coordinator.router.marks import KEEP_ALIVE, MarkedStream
from tpserve.coordinator.router.prompt import GENERATION_PATHS, Prompt, read_prompt
from tpserve.coordinator.router.replicas import Lease, Replicas, Tried
from tpserve.coordinator.router.upstream import Headers, Response, UpstreamLost

logger = logging.getLogger(__name__)

KEEP_ALIVE_S = 15.0
"""A stream that waits for another replica says so this often."""
_MAX_ATTEMPTS = 20
_HOP_BY_HOP = frozenset(
    {b"connection", b"keep-alive", b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade"}
)
_NOT_SENT_ON = _HOP_BY_HOP | {b"host", b"content-length", b"expect", b"accept-encoding"}
_NOT_SENT_BACK = _HOP_BY_HOP | {b"date", b"server"}
_OURS = b"x-tpserve-"


class ClientLeft(Exception):
    """Nobody waits for the answer any more."""


class Exchange:
    """One request of a client.

    Parameters
    ----------
    request_id
        Given to the replica as the client's, so that both logs have it.
    """

    def __init__(
        self, config: RouterConfig, replicas: Replicas, scope: Scope, receive: Receive, send: Send, request_id: bytes
    ) -> None:
        self._config = config
        self._replicas = replicas
        self._scope = scope
        self._receive = receive
        self._send = send
        self._id = request_id
        self._prompt = Prompt()
        self._body = b""
        self._identity: Identity | None = None
        """Of a stream that can move."""
        self._stream = MarkedStream()
        self._tried = Tried()
        self._num_attempts = 0
        self._num_losses = 0
        self._has_begun = False
        """The client has status and headers."""
        self._has_passed = False
        """And something of the body."""
        self.status: int | None = None
        """What the client has got."""
        self._refusal: tuple[Response, bytes] | None = None
        self._serving: asyncio.Task[None] | None = None
        self._given_up: ApiError | None = None

    def give_up(self, error: ApiError) -> None:
        """End it with an error, wherever it is."""
        if self._serving is not None and self._given_up is None:
            self._given_up = error
            self._serving.cancel()

    async def run(self) -> None:
        """Serve it; returns when the client has everything, or has left."""
        self._body = await self._read_body()
        path: str = self._scope["path"]
        if self._scope["method"] == "POST":
            self._prompt = read_prompt(path, self._body)
            if self._prompt.is_stream and self._config.router_token is not None and path in GENERATION_PATHS:
                self._identity = Identity.fresh(int(time.time()), secrets.randbits(64))
        serving = self._serving = asyncio.current_task()
        assert serving is not None
        watch = asyncio.create_task(self._watch_client(serving))
        try:
            await self._attempt_all(serving, watch)
        except ApiError as error:
            if not self._has_begun:
                raise
            await self._fail(error)
        finally:
            self._serving = None
            watch.cancel()

    async def _attempt_all(self, serving: asyncio.Task[None], watch: asyncio.Task[None]) -> None:
        """Try replicas until the client has its answer."""
        try:
            while not await self._attempt():
                pass
        except asyncio.CancelledError:
            if watch.done():
                serving.uncancel()
                raise ClientLeft from None
            if self._given_up is not None:
                serving.uncancel()
                raise self._given_up from None
            raise

    async def _read_body(self) -> bytes:
        receive = limited_body(
            dict(self._scope["headers"]),
            self._receive,
            max_bytes=self._config.max_body_bytes,
            timeout_s=self._config.body_timeout_s,
        )
        parts: list[bytes] = []
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientLeft
            if part := message.get("body"):
                parts.append(part)
            if not message.get("more_body"):
                return parts[0] if len(parts) == 1 else b"".join(parts)

    async def _watch_client(self, serving: asyncio.Task[None]) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        serving.cancel()

    # ---- attempts

    async def _attempt(self) -> bool:
        """Try one replica; return whether the client has its answer.

        Raises
        ------
        ApiError
            If nobody can answer.
        """
        lease = await self._acquire()
        if lease is None:
            assert self._refusal is not None
            await self._send_whole(*self._refusal)
            return True
        response: Response | None = None
        try:
            response = await self._request(lease)
            # At a limit of the client's own key it is at every replica.
            if response.status == 503 or (response.status == 429 and not response.is_limit_of_key):
                await self._refuse(lease, response, await response.body())
                return False
            if response.status == 200 and response.is_stream:
                done = await self._pass_stream(lease, response)
            elif self._has_begun:
                raise self._cannot_go_on(lease, response.status, await response.body())
            else:
                body = await response.body()
                lease.answered()
                await self._send_whole(response, body)
                done = True
            lease.end("answered")
            return done
        except UpstreamLost as error:
            lease.end("lost", str(error))
            self._lose(lease, error)
            return False
        finally:
            lease.end("left")
            if response is not None:
                response.close()

    async def _acquire(self) -> Lease | None:
        """Wait for a replica; None if all that could be asked have refused.

        Raises
        ------
        ApiError
            If none has room in time, or too many were tried.
        """
        self._num_attempts += 1
        if self._num_attempts > _MAX_ATTEMPTS:
            raise EngineUnavailable(f"No replica could be reached in {_MAX_ATTEMPTS} attempts", retry_after_s=1)
        if not self._has_begun:
            return await self._replicas.acquire(self._prompt, self._tried, goes_on=False)
        lease: Lease | None = None
        acquiring = asyncio.ensure_future(self._replicas.acquire(self._prompt, self._tried, goes_on=True))
        try:
            while not (await asyncio.wait({acquiring}, timeout=KEEP_ALIVE_S))[0]:
                await self._send({"type": "http.response.body", "body": KEEP_ALIVE, "more_body": True})
            if (lease := acquiring.result()) is None:
                raise EngineUnavailable("The replica was lost, and no other one takes its stream", retry_after_s=1)
            return lease
        finally:
            if not acquiring.done():
                acquiring.cancel()
                await asyncio.gather(acquiring, return_exceptions=True)
            elif lease is None and not acquiring.cancelled() and acquiring.exception() is None:
                if (granted := acquiring.result()) is not None:
                    granted.end("left")  # the client left just when its turn had come

    async def _request(self, lease: Lease) -> Response:
        headers = [
            header
            for header in self._scope["headers"]
            if header[0] not in _NOT_SENT_ON and not header[0].startswith(_OURS) and header[0] != b"x-request-id"
        ]
        headers.append((b"x-request-id", self._id))
        body = self._body
        if self._identity is not None:
            assert self._config.router_token is not None
            headers.append((SECRET_HEADER.encode(), self._config.router_token.encode()))
            marks = self._stream.restart()
            if self._stream.has_begun:
                headers.append((STREAM_HEADER.encode(), self._identity.to_header(len(body))))
                body += marks
            else:
                headers.append((STREAM_HEADER.encode(), self._identity.to_header()))
        query: bytes = self._scope["query_string"]
        target = self._scope["raw_path"] + (b"?" + query if query else b"")
        # A HEAD is asked as a GET: the server here drops the body.
        method = self._scope["method"].replace("HEAD", "GET").encode()
        return await lease.backend.upstream.request(method, target, headers, body)

    async def _refuse(self, lease: Lease, response: Response, body: bytes) -> None:
        """Take in a 429 or 503."""
        self._refusal = response, body
        self._tried.refused.add((lease.backend.name, lease.life))
        lease.end("refused")
        if response.status == 503:  # of this request alone, or it drains: then it is to be waited for, or another one
            await self._replicas.look(lease.backend)

    def _lose(self, lease: Lease, error: UpstreamLost) -> None:
        """Decide whether a request whose replica was lost goes to another one.

        Raises
        ------
        ApiError
            If not.
        """
        name = lease.backend.name
        self._tried.lost.add((name, lease.life))
        if not error.was_sent:
            logger.info("request %s: replica %s: %s; another one is tried", self._id.decode(), name, error)
            return
        self._num_losses += 1
        logger.warning(
            "request %s lost replica %s%s: %s",
            self._id.decode(),
            name,
            " in mid-stream" if self._has_begun else "",
            error,
        )
        lost = EngineUnavailable(f"The replica that served the request was lost: {error}", retry_after_s=1)
        if self._has_passed and self._identity is None:
            raise lost
        if self._num_losses > self._config.max_moves:
            raise EngineUnavailable(
                f"The request lost its replica {self._num_losses} times: {error}", retry_after_s=1
            ) from None

    def _cannot_go_on(self, lease: Lease, status: int, body: bytes) -> ApiError:
        """Return the error of a stream that a replica does not go on with."""
        logger.error(
            "request %s: replica %s does not go on with its stream: %d %r",
            self._id.decode(),
            lease.backend.name,
            status,
            body[:300],
        )
        return EngineUnavailable(f"The replica was lost, and another one does not go on ({status})", retry_after_s=1)

    # ---- answers

    async def _pass_stream(self, lease: Lease, response: Response) -> bool:
        """Pass a stream on; return whether it has ended. Raises UpstreamLost."""
        moved = self._has_begun
        if not moved:
            await self._begin(response.status, _headers_back(response.headers, b"content-length"))
        if self._identity is None:
            while part := await response.read():
                lease.answered()
                self._has_passed = True
                await self._send({"type": "http.response.body", "body": part, "more_body": True})
        else:
            feed, send = self._stream.feed, self._send
            while part := await response.read():
                lease.answered()
                if events := feed(part):
                    if moved:
                        moved = False
                        self._replicas.metrics.move("moved")
                        logger.info("request %s goes on at replica %s", self._id.decode(), lease.backend.name)
                    await send({"type": "http.response.body", "body": events, "more_body": True})
            if self._stream.failure is not None:
                raise UpstreamLost(_message(self._stream.failure), was_sent=True)
        await self._send({"type": "http.response.body", "body": self._stream.finish(), "more_body": False})
        return True

    async def _send_whole(self, response: Response, body: bytes) -> None:
        await self._begin(response.status, _headers_back(response.headers))
        await self._send({"type": "http.response.body", "body": body, "more_body": False})

    async def _begin(self, status: int, headers: Headers) -> None:
        self._has_begun = True
        self.status = status
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def _fail(self, error: ApiError) -> None:
        """End a stream that has begun with an error event, as its route writes one."""
        if self._identity is not None:
            self._replicas.metrics.move("failed")
        logger.warning("request %s failed while streaming: %s", self._id.decode(), error.message)
        if self._scope["path"] == "/v1/responses":
            data = {"type": "error", "code": error.code, "message": error.message, "param": None}
            event = b"event: error\ndata: " + orjson.dumps(data) + b"\n\n"
        else:
            event = b"data: " + error_json(error) + b"\n\n"
        await self._send({"type": "http.response.body", "body": event, "more_body": False})


def _headers_back(headers: Headers, *but: bytes) -> Headers:
    return [header for header in headers if header[0] not in _NOT_SENT_BACK and header[0] not in but]


def _message(event: bytes) -> str:
    """Return what an error says, as an event of either form or as a body."""
    for line in event.split(b"\n"):
        if line.startswith((b"data: ", b"{")):
            try:
                data = orjson.loads(line.removeprefix(b"data: "))
                error = data.get("error") or data["response"]["error"]
                return str(error["message"])
            except (ValueError, KeyError, TypeError, AttributeError):
                break
    return "without a reason"


def request_id(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Return the client's id if it is fit for headers and logs, or a new one."""
    for name, value in headers:
        if name == b"x-request-id" and 0 < len(value) <= 128 and all(0x21 <= byte <= 0x7E for byte in value):
            return value
    return secrets.token_hex(16).encode()

"""Everything the API says when it says no, and the HTTP form of it.

ApiError                        status  type                   code
├── InvalidRequest              400     invalid_request_error  (given)
│   ├── ContextLengthExceeded   400     invalid_request_error  context_length_exceeded
│   └── UnsupportedFeature      400     invalid_request_error  unsupported_feature
├── InvalidApiKey               401     invalid_request_error  invalid_api_key
├── RouterOnly                  403     invalid_request_error  router_only
├── ModelNotFound               404     invalid_request_error  model_not_found
├── BodyTooLarge                413     invalid_request_error  request_too_large
├── BodyTooSlow                 408     invalid_request_error  request_too_slow
├── QueueFull                   429     rate_limit_error       rate_limit_exceeded     + Retry-After
├── RateLimited                 429     rate_limit_error       rate_limit_exceeded     + Retry-After, x-ratelimit-*
├── ClientDisconnected          499     (nobody reads it; it shows in logs and metrics)
├── InternalError               500     server_error           internal_error
├── EngineUnavailable           503     server_error           engine_unavailable      + Retry-After
└── RequestTimeout              504     server_error           request_timeout
"""

from __future__ import annotations

from typing import Any, ClassVar

import orjson

FAULT_MESSAGE = "The server failed on this request"
"""All that a client learns of a fault of ours; the log has the rest."""
SHUTTING_DOWN = "The server is shutting down"
"""What those learn whom the server has not served when its grace ends."""


LIMIT_HEADER = "x-tpserve-limit"
"""Of a 429 that comes of the client's own limits, by which a router tells it from a full queue."""


class ApiError(Exception):
    """A refusal with its HTTP status and OpenAI error object.

    Parameters
    ----------
    message
        For the client; names the value and the remedy.
    param
        The request field at fault, as in `messages[0].content`.
    code
        Overrides the class's machine-readable code.
    retry_after_s
        Sent as `Retry-After` where given.
    """

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    default_code: ClassVar[str | None] = None

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code or self.default_code
        self.retry_after_s = retry_after_s

    def to_dict(self) -> dict[str, Any]:
        """Return OpenAI's error object."""
        return error_object(self.message, self.type, param=self.param, code=self.code)

    @property
    def headers(self) -> dict[str, str]:
        """HTTP headers that go with the status."""
        return {} if self.retry_after_s is None else {"retry-after": str(max(1, self.retry_after_s))}


class InvalidRequest(ApiError):
    """The request can never succeed as it is."""

    status = 400
    type = "invalid_request_error"


class ContextLengthExceeded(InvalidRequest):
    """The prompt, or the prompt and the tokens asked for, do not fit the model."""

    default_code = "context_length_exceeded"


class UnsupportedFeature(InvalidRequest):
    """A valid OpenAI request that this server does not implement."""

    default_code = "unsupported_feature"


class InvalidApiKey(ApiError):
    """The bearer token is missing or wrong."""

    status = 401
    type = "invalid_request_error"
    default_code = "invalid_api_key"

    @property
    def headers(self) -> dict[str, str]:
        """HTTP headers that go with the status."""
        return {"www-authenticate": "Bearer"}


class RouterOnly(ApiError):
    """The request says what only a router that shares this server's secret may say."""

    status = 403
    type = "invalid_request_error"
    default_code = "router_only"


class ModelNotFound(ApiError):
    """The request names a model that is not served."""

    status = 404
    type = "invalid_request_error"
    default_code = "model_not_found"


class BodyTooLarge(ApiError):
    """The request body is over the configured limit."""

    status = 413
    type = "invalid_request_error"
    default_code = "request_too_large"


class BodyTooSlow(ApiError):
    """The request body did not come in time."""

    status = 408
    type = "invalid_request_error"
    default_code = "request_too_slow"

    @property
    def headers(self) -> dict[str, str]:
        """HTTP headers that go with the status; what still comes of the body is not read."""
        return {"connection": "close"}


class QueueFull(ApiError):
    """The coordinator's queue is full; the client should come back later."""

    status = 429
    type = "rate_limit_error"
    default_code = "rate_limit_exceeded"


class RateLimited(ApiError):
    """A limit of the client's own key is reached.

    Parameters
    ----------
    limit
        Which: requests, tokens or parallel.
    rate_headers
        OpenAI's `x-ratelimit-*`.
    """

    status = 429
    type = "rate_limit_error"
    default_code = "rate_limit_exceeded"

    def __init__(
        self, message: str, *, limit: str, rate_headers: dict[str, str], retry_after_s: int | None = None
    ) -> None:
        super().__init__(message, retry_after_s=retry_after_s)
        self.limit = limit
        self._rate_headers = rate_headers

    @property
    def headers(self) -> dict[str, str]:
        """HTTP headers that go with the status."""
        return {**super().headers, **self._rate_headers, LIMIT_HEADER: self.limit}


class ClientDisconnected(ApiError):
    """The client closed the connection before the answer was complete."""

    status = 499
    default_code = "client_disconnected"


class InternalError(ApiError):
    """A fault of this program; the log has the traceback."""

    default_code = "internal_error"


class EngineUnavailable(ApiError):
    """The engine is not connected, takes no requests, or lost this one."""

    status = 503
    default_code = "engine_unavailable"


class RequestTimeout(ApiError):
    """The request ran longer than the server allows."""

    status = 504
    default_code = "request_timeout"


def error_object(message: str, type_: str, *, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """Return `{"error": {...}}` as OpenAI writes it."""
    return {"error": {"message": message, "type": type_, "param": param, "code": code}}


def error_json(error: ApiError) -> bytes:
    """Return the body of an error response."""
    return orjson.dumps(error.to_dict())

"""The OpenAPI document of the HTTP door, made of the same models that check requests and describe answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from tpserve.coordinator.gateway.answers import (
    ChatCompletion,
    ChatCompletionChunk,
    Completion,
    Error,
    Health,
    ModelList,
    ModelObject,
    Tasks,
    Version,
)
from tpserve.coordinator.gateway.embeddings import EmbeddingsAnswer, EmbeddingsRequest
from tpserve.coordinator.gateway.protocol import ChatCompletionRequest, CompletionRequest
from tpserve.coordinator.gateway.responses_wire import ResponseEvent, ResponseObject, ResponsesRequest
from tpserve.coordinator.gateway.stream import END
from tpserve.coordinator.gateway.tokens import (
    DetokenizeAnswer,
    DetokenizeRequest,
    TokenizeAnswer,
    TokenizeRequest,
)

Method = Literal["get", "post"]

_REF = "#/components/schemas/{model}"
_CAUSES = {
    400: "The request can never succeed as it is; `error.param` names the field.",
    401: "The API key is missing or wrong.",
    404: "The model, or what else the path names, is not here.",
    408: "The headers or the body did not come in time.",
    413: "The body is larger than the server's limit.",
    429: "The queue is full; come back after `Retry-After` seconds.",
    500: "A fault of the server; its log says more.",
    503: "The engine takes no requests now, or lost this one.",
    504: "The request ran longer than the server allows.",
}


@dataclass(frozen=True, slots=True)
class Operation:
    """One route."""

    path: str
    method: Method
    summary: str
    answer: type[BaseModel] | str
    """The model of its JSON, or a media type of text."""
    body: type[BaseModel] | None = None
    events: type[BaseModel] | None = None
    """The model of each server-sent event, where the answer may be streamed."""
    is_done_told: bool = True
    """Whether [DONE] ends the events, and a failure is an error object in its place; else both are such events."""
    errors: tuple[int, ...] = ()
    unhealthy: bool = False
    """Whether 503 carries the answer's own model."""
    parameters: tuple[dict[str, Any], ...] = field(default=())
    key: bool = False
    """Whether an API key opens it, if the server has any."""


_ENGINE = (400, 401, 404, 408, 413, 429, 500, 503, 504)
_TEXT = (400, 401, 404, 408, 413, 500, 503)
_PROBE = {
    "name": "probe",
    "in": "path",
    "required": True,
    "schema": {"type": "string", "enum": ["startup", "ready", "live"]},
}
_NAME = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}


def _number(name: str, kind: str, least: float, most: float, default: float) -> dict[str, Any]:
    schema = {"type": kind, "minimum": least, "maximum": most, "default": default}
    return {"name": name, "in": "query", "required": False, "schema": schema}


OPERATIONS = (
    Operation(
        "/v1/chat/completions",
        "post",
        "Answer a chat",
        ChatCompletion,
        ChatCompletionRequest,
        ChatCompletionChunk,
        errors=_ENGINE,
        key=True,
    ),
    Operation(
        "/v1/completions",
        "post",
        "Continue prompts",
        Completion,
        CompletionRequest,
        Completion,
        errors=_ENGINE,
        key=True,
    ),
    Operation(
        "/v1/responses",
        "post",
        "Answer items of a conversation",
        ResponseObject,
        ResponsesRequest,
        ResponseEvent,
        is_done_told=False,
        errors=_ENGINE,
        key=True,
    ),
    Operation("/v1/embeddings", "post", "Embed texts", EmbeddingsAnswer, EmbeddingsRequest, errors=_ENGINE, key=True),
    Operation("/v1/models", "get", "List the names of the model", ModelList, errors=(401, 500, 503), key=True),
    Operation(
        "/v1/models/{name}",
        "get",
        "Describe the model",
        ModelObject,
        errors=(401, 404, 500, 503),
        parameters=(_NAME,),
        key=True,
    ),
    Operation("/tokenize", "post", "Tokens of a text", TokenizeAnswer, TokenizeRequest, errors=_TEXT, key=True),
    Operation("/detokenize", "post", "Text of tokens", DetokenizeAnswer, DetokenizeRequest, errors=_TEXT, key=True),
    Operation("/health", "get", "Whether requests are taken", Health, unhealthy=True),
    Operation("/health/{probe}", "get", "One probe", Health, errors=(404,), unhealthy=True, parameters=(_PROBE,)),
    Operation("/metrics", "get", "Metrics in Prometheus text format", "text/plain"),
    Operation("/version", "get", "The server's version", Version, errors=(503,)),
    Operation("/openapi.json", "get", "This document", "application/json"),
)
DEBUG_OPERATIONS = (
    Operation("/debug/tasks", "get", "What the gateway's event loop runs", Tasks, errors=(401,), key=True),
    Operation(
        "/debug/trace",
        "get",
        "A trace of the next steps",
        "application/json",
        errors=(400, 401, 503),
        key=True,
        parameters=(_number("steps", "integer", 1, 10_000, 100), _number("timeout", "number", 0.1, 300, 30)),
    ),
)


def openapi_document(*, enable_debug: bool, with_keys: bool) -> dict[str, Any]:
    """Return the document.

    Parameters
    ----------
    enable_debug
        Whether the routes under /debug are there.
    with_keys
        Whether the server asks for API keys.
    """
    operations = OPERATIONS + (DEBUG_OPERATIONS if enable_debug else ())
    paths: dict[str, Any] = {}
    for operation in operations:
        paths.setdefault(operation.path, {})[operation.method] = _operation(operation, with_keys)
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "tpserve", "version": "1"},
        "paths": paths,
        "components": {"schemas": _schemas(operations)},
    }
    if with_keys:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return document


def _operation(operation: Operation, with_keys: bool) -> dict[str, Any]:
    answer = operation.answer
    content = {answer: {}} if isinstance(answer, str) else {"application/json": {"schema": _ref(answer)}}
    good: dict[str, Any] = {"description": "The answer.", "content": content}
    if operation.events is not None:
        data: dict[str, Any] = {"contentMediaType": "application/json", "contentSchema": _ref(operation.events)}
        if operation.is_done_told:
            data["contentSchema"] = {"anyOf": [_ref(operation.events), _ref(Error)]}
            data = {"if": {"const": END.decode()}, "else": data}
        data["type"] = "string"
        event = {"type": "object", "properties": {"event": {"type": "string"}, "data": data}, "required": ["data"]}
        good["content"] = {**content, "text/event-stream": {"schema": event}}
        good["description"] = f"The answer; with `stream`, events whose data is `{operation.events.__name__}`."
    out: dict[str, Any] = {
        "summary": operation.summary,
        "operationId": f"{operation.method}{operation.path.title()}".translate(_TO_NAME),
        "responses": {"200": good},
    }
    for status in operation.errors:
        out["responses"][str(status)] = {
            "description": _CAUSES[status],
            "content": {"application/json": {"schema": _ref(Error)}},
        }
    if operation.unhealthy:
        out["responses"]["503"] = {"description": "Not now.", "content": content}
    if operation.parameters:
        out["parameters"] = list(operation.parameters)
    if operation.body is not None:
        out["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": _ref(operation.body)}},
        }
    if with_keys and operation.key:
        out["security"] = [{"key": []}]
    return out


_TO_NAME = str.maketrans("", "", "/{}._")


def _ref(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": _REF.format(model=model.__name__)}


def _schemas(operations: tuple[Operation, ...]) -> dict[str, Any]:
    """Return the schemas of requests as they are checked, and of answers as they are written."""
    models: set[type[BaseModel]] = {Error}
    for operation in operations:
        models |= {model for model in (operation.answer, operation.body, operation.events) if isinstance(model, type)}
    ordered = sorted(models, key=lambda model: model.__name__)
    _, definitions = models_json_schema([(model, "validation") for model in ordered], ref_template=_REF)
    schemas: dict[str, Any] = definitions["$defs"]
    return schemas

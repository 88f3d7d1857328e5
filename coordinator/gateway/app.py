"""The routes, and how errors become responses."""

from __future__ import annotations

import asyncio
import contextlib
import http
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp

from tpserve.coordinator.gateway import chat, completions, debug, embeddings, responses, tokens
from tpserve.coordinator.gateway.edge import Edge
from tpserve.coordinator.gateway.engine_types import EngineStatus
from tpserve.coordinator.gateway.errors import FAULT_MESSAGE, ApiError, EngineUnavailable, InternalError, error_object
from tpserve.coordinator.gateway.keys import KeyRing
from tpserve.coordinator.gateway.limits import RATE_HEADERS, Ledger
from tpserve.coordinator.gateway.metering import Metering
from tpserve.coordinator.gateway.metrics import CONTENT_TYPE
from tpserve.coordinator.gateway.openapi import openapi_document
from tpserve.coordinator.gateway.origin import RouterDoor
from tpserve.coordinator.gateway.page_routes import add_page_routes
from tpserve.coordinator.gateway.service import Service
from tpserve.coordinator.gateway.stream import error_response, json_response
from tpserve.coordinator.gateway.tracing import TraceRequests
from tpserve.coordinator.health import PROBES, passes


def create_app(service: Service) -> ASGIApp:
    """Return the application; its lifespan starts and closes the engine session.

    Raises
    ------
    ConfigError
        If the key file cannot be used.
    """
    config = service.config
    keys = KeyRing(config.api_keys, None if config.api_key_file is None else Path(config.api_key_file))
    ledger = Ledger(None if config.limits_dir is None else Path(config.limits_dir))

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        watching = asyncio.create_task(keys.watch())
        if config.listen_fd is not None:
            # Beside others that answer already, this one takes no connections before it can serve them.
            await service.engine.wait_connected(config.session_timeout_s)
        yield
        watching.cancel()
        await service.close()
        ledger.close()

    app = FastAPI(title="tpserve", lifespan=lifespan, openapi_url=None, docs_url=None, redoc_url=None)
    _add_openai_routes(app, service)
    _add_operations_routes(app, service)
    add_page_routes(app)
    if config.enable_debug:
        debug.add_routes(app, service)
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(Exception, _on_fault)
    traced = app if service.tracing is None else TraceRequests(app, service.tracing)
    edge: ASGIApp = Edge(
        RouterDoor(Metering(traced, ledger, service.metrics), config.router_token),
        metrics=service.metrics,
        routes=[path for route in app.routes if isinstance(path := getattr(route, "path", None), str)],
        keys=keys,
        max_body_bytes=config.max_body_bytes,
        body_timeout_s=config.body_timeout_s,
    )
    if config.allow_origins:
        edge = CORSMiddleware(
            edge,
            allow_origins=config.allow_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after", *RATE_HEADERS],
        )
    return edge


def _add_openai_routes(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await chat.create_chat_completion(service, request)

    @app.post("/v1/completions")
    async def text_completions(request: Request) -> Response:
        return await completions.create_completion(service, request)

    @app.post("/v1/embeddings")
    async def create_embeddings(request: Request) -> Response:
        return await embeddings.create_embeddings(service, request)

    @app.post("/v1/responses")
    async def create_response(request: Request) -> Response:
        return await responses.create_response(service, request)

    @app.get("/v1/models")
    async def models() -> Response:
        return json_response(
            {"object": "list", "data": [_model_object(service, name) for name in service.config.served_model_names]}
        )

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        return json_response(_model_object(service, service.resolve_model(name)))


def _add_operations_routes(app: FastAPI, service: Service) -> None:
    config = service.config
    # With the standard library: bounds of seeds are integers of more than 64 bits.
    document = json.dumps(
        openapi_document(enable_debug=config.enable_debug, with_keys=bool(config.api_keys or config.api_key_file))
    )

    @app.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        return await tokens.tokenize(service, request)

    @app.post("/detokenize")
    async def detokenize(request: Request) -> Response:
        return await tokens.detokenize(service, request)

    @app.get("/openapi.json")
    async def openapi() -> Response:
        return Response(document, media_type="application/json")

    @app.get("/health")
    async def health() -> Response:
        state = service.engine.state
        body = {"status": state.status.value, "detail": state.detail}
        return json_response(body, 200 if state.status is EngineStatus.READY else 503)

    @app.get("/health/{probe}")
    async def probe(probe: str) -> Response:
        if probe not in PROBES:
            raise HTTPException(404)
        state = service.engine.state
        body = {"status": state.status.value, "detail": state.detail}
        good = passes(probe, state.status.value, was_ready=service.engine.was_ready)
        return json_response(body, 200 if good else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        try:
            engine_text = await service.engine.metrics()
        except EngineUnavailable:
            engine_text = None  # tpserve_gateway_engine_up says so
        return Response(service.metrics.render(engine_text), media_type=CONTENT_TYPE)

    @app.get("/version")
    async def version() -> Response:
        return json_response({"version": service.engine.info.version})


def _model_object(service: Service, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "tpserve",
        "max_model_len": service.engine.info.max_model_len,
    }


async def _on_api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error_response(error)


async def _on_fault(_: Request, __: Exception) -> Response:
    """Answer; the framework raises the fault again, and `Edge` logs it."""
    return error_response(InternalError(FAULT_MESSAGE))


async def _on_http_exception(request: Request, error: Exception) -> Response:
    """Give the framework's refusals (unknown route, wrong method) OpenAI's form."""
    assert isinstance(error, HTTPException)
    reason = http.HTTPStatus(error.status_code).phrase
    message = f"{reason}: {request.method} {request.url.path[:200]}"
    code = {404: "unknown_route", 405: "method_not_allowed"}.get(error.status_code)
    body = error_object(message, "invalid_request_error", code=code)
    return json_response(body, error.status_code, dict(error.headers or {}))

"""The OpenAPI document names every route, and its schemas are whole."""

from __future__ import annotations

import re
from typing import Any

import jsonschema
import pytest

from tpserve.coordinator.gateway.app import create_app
from tpserve.coordinator.gateway.openapi import openapi_document
from unit.gateway.conftest import StackFactory

HIDDEN = re.compile(r"/$|/page/|/favicon.ico$")


def routes_of(app: Any) -> set[tuple[str, str]]:
    """Return what the application answers, below its middleware."""
    while not hasattr(app, "routes"):
        app = next(inner for name in ("app", "_app") if (inner := getattr(app, name, None)) is not None)
    found = {(route.path.replace(":path", ""), method.lower()) for route in app.routes for method in route.methods}
    return {(path, method) for path, method in found if not HIDDEN.match(path) and method != "head"}


@pytest.mark.parametrize("enable_debug", [False, True])
async def test_it_names_every_route(make_stack: StackFactory, enable_debug: bool) -> None:
    async with make_stack(enable_debug=enable_debug, api_keys=("k",)) as stack:
        document = (await stack.http.get("/openapi.json")).json()
        assert document == openapi_document(enable_debug=enable_debug, with_keys=True)
        documented = {(path, method) for path, methods in document["paths"].items() for method in methods}
        assert documented == routes_of(create_app(stack.service))
        for path, methods in document["paths"].items():
            for method, operation in methods.items():
                if "security" in operation:
                    url = path.replace("{name}", "tiny")
                    assert (await stack.http.request(method, url)).status_code == 401


def test_references_lead_somewhere() -> None:
    document = openapi_document(enable_debug=True, with_keys=False)
    names = set(re.findall(r"'#/components/schemas/(\w+)'", repr(document)))
    assert names == set(document["components"]["schemas"])
    for schema in document["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)
    for methods in document["paths"].values():
        assert "requestBody" not in methods.get("get", {})
    for route in ("/v1/chat/completions", "/v1/completions"):
        events = document["paths"][route]["post"]["responses"]["200"]["content"]["text/event-stream"]["schema"]
        assert jsonschema.Draft202012Validator(events).is_valid({"data": "[DONE]"})
    ids = [operation["operationId"] for methods in document["paths"].values() for operation in methods.values()]
    assert len(ids) == len(set(ids))


def test_what_takes_a_body_may_find_it_too_slow() -> None:
    document = openapi_document(enable_debug=True, with_keys=True)
    for methods in document["paths"].values():
        for operation in methods.values():
            assert ("408" in operation["responses"]) == ("requestBody" in operation), operation["summary"]

"""What operators reach at the gateway: probes, debugging, keys from a file, and its configuration."""

from __future__ import annotations

from pathlib import Path

import pytest

from tpserve.coordinator.gateway.config import ConfigError, GatewayConfig
from unit.gateway.conftest import StackFactory


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("enable_debug", "1", '"enable_debug": "1"'),
        ("log_format", '"xml"', "xml"),
        ("api_key_file", "3", "api_key_file"),
    ],
)
def test_bad_values_are_refused(field: str, value: str, words: str) -> None:
    text = f'{{"engine_address": "h:1", "model_dir": "/m", "served_model_names": ["m"], "{field}": {value}}}'
    with pytest.raises(ConfigError, match=field if field in words else words):
        GatewayConfig.from_json(text)
    good = {"enable_debug": "true", "log_format": '"json"', "api_key_file": "null"}[field]
    GatewayConfig.from_json(text.replace(f'"{field}": {value}', f'"{field}": {good}'))


async def test_probes_are_answered_and_debugging_is_not_there_unless_asked_for(make_stack: StackFactory) -> None:
    async with make_stack() as stack:
        for probe in ("startup", "ready", "live"):
            assert (await stack.http.get(f"/health/{probe}")).status_code == 200
        assert (await stack.http.get("/health/else")).status_code == 404
        assert (await stack.http.get("/debug/trace")).status_code == 404
        text = (await stack.http.get("/metrics")).text
        assert 'route="/health/{probe}"' in text


async def test_debugging_needs_a_key_where_there_are_keys(make_stack: StackFactory) -> None:
    async with make_stack(enable_debug=True, api_keys=("secret",)) as stack:
        assert (await stack.http.get("/debug/trace", headers={"authorization": "Bearer no"})).status_code == 401
        assert (await stack.http.get("/health/live")).status_code == 200
        # The scripted engine has no steps to trace, which is said as such.
        reply = await stack.http.get("/debug/trace", headers={"authorization": "Bearer secret"})
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "engine_unavailable")


async def test_a_key_file_guards_the_api(make_stack: StackFactory, tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("from-the-file\n")
    async with make_stack(api_key_file=str(path)) as stack:
        assert (await stack.http.get("/v1/models", headers={"authorization": "Bearer other"})).status_code == 401
        good = await stack.http.get("/v1/models", headers={"authorization": "Bearer from-the-file"})
        assert good.status_code == 200

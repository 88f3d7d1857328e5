"""The two commands of the chart's `gateway.separate` as it gives them: an engine alone, and a gateway beside it.

Between them there is mutual TLS with a token: the files and the variable of the chart's Secrets.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

import helm
from certificates import Authority
from patience import patient
from server import Server, environment, free_port, until
from tpserve.coordinator.engine_door import TOKEN_VARIABLE
from tpserve.coordinator.python_engine.engine import MLCEngine
from tpserve.coordinator.python_engine.errors import EngineError

EXAMPLE = "ingress-tls"
KEY = "a-key-of-this-test"


def container(name: str) -> dict[str, Any]:
    """Return a container of the rendered chart."""
    found: dict[str, Any]
    (found,) = (
        one
        for document in helm.render(EXAMPLE)
        if document["kind"] == "Deployment"
        for one in document["spec"]["template"]["spec"]["containers"]
        if one["name"] == name
    )
    return found


def test_gateway_and_engine_as_the_chart_starts_them(tiny_folder: Path, tmp_path: Path) -> None:
    engine_port, operations_port, http_port = free_port(), free_port(), free_port()
    authority = Authority.make(tmp_path)
    certfile, keyfile = authority.issue("engine-and-gateway")
    token = {TOKEN_VARIABLE: "a-token-of-this-test"}
    # As the chart has them, but for what this machine is not: a GPU host with a volume at /models and room for all.
    _, _, *flags = container("engine")["args"]
    here = {
        "device": "cpu",
        "mode": "local",
        "max-num-seqs": "4",
        "max-num-batched-tokens": "64",
        "engine-host": "127.0.0.1",
        "engine-port": str(engine_port),
        "operations-port": str(operations_port),
        "log-format": "text",
        "engine-ssl-certfile": str(certfile),
        "engine-ssl-keyfile": str(keyfile),
        "engine-ssl-ca-certs": str(authority.cert),
    }
    assert {f"--{name}" for name in here} <= {flag.partition("=")[0] for flag in flags}, "the chart has them all"
    changed = [
        f"{name}={here[name.removeprefix('--')]}" if name.removeprefix("--") in here else flag
        for flag in flags
        for name in [flag.partition("=")[0]]
    ]
    config = json.loads(container("gateway")["args"][0])
    keys = tmp_path / "keys"
    keys.write_text(f"{KEY}\nanother-key\n")
    config |= {"engine_address": f"127.0.0.1:{engine_port}", "model_dir": str(tiny_folder), "host": "127.0.0.1"}
    config |= {"port": http_port, "api_key_file": str(keys)}
    files = {"engine_ssl_certfile": certfile, "engine_ssl_keyfile": keyfile, "engine_ssl_ca_certs": authority.cert}
    assert files.keys() <= config.keys()
    config |= {name: str(path) for name, path in files.items()}
    url = f"http://127.0.0.1:{http_port}"
    gateway = subprocess.Popen(
        [sys.executable, "-m", "tpserve.coordinator.gateway", json.dumps(config)],
        env=environment("a gateway", token),
        stdout=subprocess.DEVNULL,
    )
    engine: Server | None = None
    try:
        # The gateway is up before the engine, as pods come in any order.
        until(lambda: httpx_status(f"{url}/health/live") == 200, within_s=60, what="the gateway lives")
        assert httpx_status(f"{url}/health/startup") == 503
        engine = Server(tiny_folder, *changed, "--load-format", "dummy", folder=tmp_path, environ=token)

        def ready(address: str) -> bool:
            assert engine.process.poll() is None, engine.report("the engine ended")
            assert gateway.poll() is None
            try:
                return httpx.get(f"{address}/health/ready", timeout=5).status_code == 200
            except httpx.TransportError:
                return False

        until(lambda: ready(f"http://127.0.0.1:{operations_port}"), within_s=240, what="the engine is ready")
        until(lambda: ready(url), within_s=20, what="the gateway is ready")
        with openai.OpenAI(base_url=f"{url}/v1", api_key="another-key", max_retries=0) as client:
            reply = client.completions.create(model="qwen3-8b", prompt=[5, 6, 7], max_tokens=4)
            assert reply.usage is not None
            assert reply.usage.completion_tokens >= 1
        with openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0) as client:
            with pytest.raises(openai.AuthenticationError):
                client.completions.create(model="qwen3-8b", prompt=[5, 6, 7], max_tokens=4)
        # Who reaches the port and has neither certificate nor token is told so, and answered nothing.
        with pytest.raises(EngineError, match="the engine's port speaks TLS: give --engine-ssl-certfile"):
            MLCEngine(tiny_folder, address=config["engine_address"], start_timeout_s=2.0)
        doors: dict[str, Any] = {**files, "engine_token": token[TOKEN_VARIABLE]}
        with MLCEngine(tiny_folder, address=config["engine_address"], start_timeout_s=20.0, **doors) as joined:
            answer = joined.completions.create(prompt=[5, 6, 7], max_tokens=4, temperature=0)
            assert answer.usage is not None
            assert answer.usage.completion_tokens >= 1
        gateway.terminate()
        assert gateway.wait(patient(30)) == 0
        engine.interrupt()
        assert engine.process.wait(patient(60)) == 0
        engine.footprint.assert_gone(within_s=2)
    finally:
        gateway.kill()
        gateway.wait(10)
        if engine is not None:
            engine.kill_all()


def httpx_status(url: str) -> int | None:
    try:
        return httpx.get(url, timeout=5).status_code
    except httpx.TransportError:
        return None

"""Probes follow the engine's state, at the coordinator's own door."""

from __future__ import annotations

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from simulated_group import running_engine
from tpserve.coordinator.engine import EngineStatus
from tpserve.coordinator.health import passes
from tpserve.coordinator.metrics import Metrics
from tpserve.coordinator.operations import make_app

# (startup, ready, live) once the engine has been ready
EXPECTED = {
    "starting": (True, False, True),
    "ready": (True, True, True),
    "stalled": (True, False, True),
    "rebuilding": (True, False, True),
    "draining": (True, False, True),
    "dead": (False, False, False),
    "disconnected": (True, False, True),
    "unresponsive": (True, False, True),
}


@pytest.mark.parametrize(("status", "expected"), EXPECTED.items())
def test_probes(status: str, expected: tuple[bool, bool, bool]) -> None:
    assert tuple(passes(probe, status, was_ready=True) for probe in ("startup", "ready", "live")) == expected
    assert not passes("startup", "starting", was_ready=False)


def test_every_state_of_the_engine_is_known() -> None:
    assert {status.name.lower() for status in EngineStatus} <= set(EXPECTED)


async def test_the_operations_door() -> None:
    metrics = Metrics("m")
    async with running_engine(1, metrics) as engine:
        transport = httpx.ASGITransport(make_app(engine, metrics))
        async with httpx.AsyncClient(transport=transport, base_url="http://operations") as http:
            for path in ("/health", "/health/live", "/health/ready", "/health/startup"):
                assert (await http.get(path)).status_code == 200, path
            assert (await http.get("/health/other")).status_code == 404
            engine._set_status(EngineStatus.REBUILDING, "lost rank 1")
            ready = await http.get("/health/ready")
            assert (ready.status_code, ready.json()["detail"]) == (503, "lost rank 1")
            assert (await http.get("/health/live")).status_code == 200
            engine._set_status(EngineStatus.DEAD, "no rank comes up")
            assert (await http.get("/health/live")).status_code == 503
            scrape = await http.get("/metrics")
            assert scrape.headers["content-type"].startswith("text/plain; version=0.0.4")
            names = {family.name for family in text_string_to_metric_families(scrape.text)}
            assert "tpserve_engine_state" in names

"""What stands in the environment of a coordinator before it imports Ray."""

from __future__ import annotations

import pytest

from tpserve.coordinator.children import ray_environment

TASK_EVENTS = "RAY_task_events_report_interval_ms"


def test_only_a_ray_that_is_started_here_collects_no_task_events(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TASK_EVENTS, raising=False)
    assert ray_environment(None)[TASK_EVENTS] == "0"
    assert TASK_EVENTS not in ray_environment("10.0.0.1:6379"), "its dashboard may show them"


def test_what_a_user_has_set_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TASK_EVENTS, "1000")
    assert ray_environment(None)[TASK_EVENTS] == "1000"

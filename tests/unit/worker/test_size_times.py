"""What a rank says that its captured steps take, on a device whose clock is a number."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tpserve.proto.rank import SizeTime
from tpserve.worker.buckets import Bucket

_ON_A_DEVICE = ("tpserve.worker.device_", "tpserve.worker.captured_")


class Stream:
    """Runs what is queued when somebody waits for it."""

    def __init__(self) -> None:
        self.now_ms = 0.0
        self.queued: list[Any] = []

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        pass

    def synchronize(self) -> None:
        for work in self.queued:
            work()
        self.queued.clear()


class Event:
    """Knows when the stream came to it."""

    at_ms: float | None = None

    def record(self, stream: Stream) -> None:
        def reach() -> None:
            self.at_ms = stream.now_ms

        stream.queued.append(reach)


class Graph:
    """Takes its time, and half a second more when it is new: another rank began later."""

    def __init__(self, step_ms: float) -> None:
        self.step_ms = step_ms
        self.is_new = True

    def launch(self, stream: Stream) -> None:
        def run() -> None:
            stream.now_ms += self.step_ms + 500 * self.is_new
            self.is_new = False

        stream.queued.append(run)


def elapsed_ms(begin: Event, end: Event) -> float:
    assert begin.at_ms is not None, "asked before the device came to it"
    assert end.at_ms is not None
    return end.at_ms - begin.at_ms


@pytest.fixture
def captured_step(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module, with that device for CuPy's."""
    cupy: Any = ModuleType("cupy")
    cupy.int32 = int
    cupy.arange = np.arange
    cupy.cuda = SimpleNamespace(Event=Event, get_elapsed_time=elapsed_ms)
    for name in [name for name in sys.modules if name.startswith(_ON_A_DEVICE)]:
        monkeypatch.delattr(sys.modules["tpserve.worker"], name.rpartition(".")[2], raising=False)
        monkeypatch.delitem(sys.modules, name)
    before = set(sys.modules)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    import tpserve.worker.captured_step as module

    yield module
    for name in set(sys.modules) - before:  # who wants them next may have another CuPy
        if name.startswith(_ON_A_DEVICE):
            del sys.modules[name]
            delattr(sys.modules["tpserve.worker"], name.rpartition(".")[2])


def test_each_size_is_timed_once_all_ranks_are_at_it(captured_step: Any) -> None:
    buckets = [Bucket(1, 1, decode_only=True), Bucket(64, 64, decode_only=True), Bucket(64, 64), Bucket(512, 64)]
    steps = []
    for bucket, step_ms in zip(buckets, (5.5, 8.0, 8.1004, 23.0), strict=True):
        step = object.__new__(captured_step.CapturedStep)
        step.bucket, step.graph, step.inputs = bucket, Graph(step_ms), np.zeros(bucket.num_inputs, np.int32)
        steps.append(step)
    assert captured_step.time_steps(steps, Stream(), 32000) == (
        SizeTime(1, True, 5500),
        SizeTime(64, True, 8000),
        SizeTime(64, False, 8100),
        SizeTime(512, False, 23000),
    )
    tokens = steps[-1].inputs[:512]
    assert len(set(tokens)) == 512, "rows that are alike would take less time"
    assert 0 <= tokens.min() <= tokens.max() < 32000
    assert not steps[-1].inputs[512:].any()

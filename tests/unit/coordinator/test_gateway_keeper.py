"""A gateway that dies is started again, later each time, and not for ever; its port stays open meanwhile."""

from __future__ import annotations

import itertools
import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tpserve.coordinator.gateway_keeper import (
    MAX_RESTARTS,
    WINDOW_S,
    GatewayKeeper,
    GatewayLost,
    gateways_beside_gpus,
)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def port() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as bound:
        yield bound


def ending(code: int, line: dict[str, str] | None = None) -> subprocess.Popen[str]:
    """Start a process that ends at once."""
    program = f"print({json.dumps(line)!r}); raise SystemExit({code})" if line else f"raise SystemExit({code})"
    process = subprocess.Popen([sys.executable, "-Sc", program], stdout=subprocess.PIPE, text=True)
    process.wait(10)
    return process


def test_it_is_started_again_later_each_time_and_not_for_ever(port: socket.socket, clock: Clock) -> None:
    started: list[float] = []

    def spawn(shared: socket.socket) -> subprocess.Popen[str]:
        assert shared is port
        started.append(clock.now)
        return ending(3)

    keeper = GatewayKeeper(port, spawn, 1, clock=clock)

    def look_on() -> None:
        for _ in range(10_000):
            keeper.look()
            clock.now += 0.01

    with pytest.raises(GatewayLost, match=r"^the gateway ended with status 3, for the 6th time within 60 s$"):
        look_on()
    assert len(started) == 1 + MAX_RESTARTS
    gaps = [later - earlier for earlier, later in itertools.pairwise(started)]
    assert gaps == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6], abs=0.03)
    with socket.create_connection(port.getsockname(), timeout=5):
        pass  # waits for the next gateway
    address = port.getsockname()
    keeper.close_port()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address, timeout=5)


def test_rare_deaths_are_forgotten(port: socket.socket, clock: Clock) -> None:
    num_started = 0

    def spawn(shared: socket.socket) -> subprocess.Popen[str]:
        nonlocal num_started
        num_started += 1
        return ending(1)

    keeper = GatewayKeeper(port, spawn, 1, clock=clock)
    for _ in range(3 * MAX_RESTARTS):
        keeper.look()  # sees that it ended
        clock.now += WINDOW_S / MAX_RESTARTS + 1
        keeper.look()  # starts it
    assert num_started == 1 + 3 * MAX_RESTARTS
    for process in keeper.processes:
        assert process.stdout is not None
        process.stdout.close()


def test_what_a_gateway_said_is_told(port: socket.socket, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    keeper = GatewayKeeper(port, lambda _: ending(1, {"error": "tokenizer.json is missing"}), 1, clock=clock)
    keeper.look()
    assert "the gateway ended with status 1 (tokenizer.json is missing) and is started again in 0.1 s" in caplog.text


def test_one_of_several_dies_alone(port: socket.socket, clock: Clock, tmp_path: Path) -> None:
    """The others are let be; of its metrics the counts stay, and what it held goes."""
    living = subprocess.Popen(["sleep", "60"], stdout=subprocess.PIPE, text=True)
    made = [living, dead := ending(9), subprocess.Popen(["sleep", "60"], stdout=subprocess.PIPE, text=True)]
    queue = iter(made)
    try:
        for name in (f"gauge_livesum_{dead.pid}.db", f"counter_{dead.pid}.db"):
            (tmp_path / name).write_bytes(b"")
        keeper = GatewayKeeper(port, lambda _: next(queue), 2, tmp_path, clock=clock)
        keeper.look()
        assert [path.name for path in tmp_path.iterdir()] == [f"counter_{dead.pid}.db"]
        clock.now += 1
        keeper.look()
        assert keeper.processes == [made[0], made[2]]
    finally:
        for process in made:
            process.kill()
            process.wait(10)
            if process.stdout is not None:
                process.stdout.close()


@pytest.mark.parametrize(("num_cpus", "count"), [(1, 1), (8, 1), (15, 1), (16, 2), (31, 3), (32, 4), (192, 4)])
def test_beside_gpus_there_are_as_many_as_cores_allow(num_cpus: int, count: int) -> None:
    assert gateways_beside_gpus(num_cpus) == count

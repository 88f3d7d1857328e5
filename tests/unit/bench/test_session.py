"""Whole runs against an endpoint in virtual time: what is written, shown, resumed and returned."""

from __future__ import annotations

import asyncio
import io
import signal
from pathlib import Path

import pytest
from rich.console import Console

from tpserve.coordinator.bench.errors import BenchError
from tpserve.coordinator.bench.results import Run
from tpserve.coordinator.bench.session import Session
from unit.bench.test_options import options
from unit.bench.virtual import FakeEndpoint, now_s, run

FILES = {"results.json", "results.csv", "report.txt", "chart.png", "chart.svg"}


def bench(
    folder: Path, endpoint: FakeEndpoint, *arguments: str, interrupt_at_s: float | None = None
) -> tuple[int, str]:
    """Run bench-tp; return its exit code and what it showed."""
    output = io.StringIO()
    common = (
        "--base-url",
        "http://x",
        "--model",
        "m",
        "--dataset",
        "fixed",
        "--output-len",
        "21",
        "--num-requests",
        "4",
    )
    chosen = options(*common, "--output-dir", str(folder), *arguments)

    async def main() -> int:
        if interrupt_at_s is not None:
            asyncio.get_running_loop().call_later(interrupt_at_s, signal.raise_signal, signal.SIGINT)
        session = Session(chosen, Console(file=output, width=120), clock=now_s, transport=endpoint)
        return await session.measure_all()

    return run(main), output.getvalue()


def loads(folder: Path) -> list[tuple[int | None, bool]]:
    return [(point.concurrency, point.complete) for point in Run.load(folder / "results.json").points]


def test_a_run_writes_everything(tmp_path: Path) -> None:
    code, shown = bench(tmp_path, FakeEndpoint(ttft_s=0.1, tpot_s=0.01), "--concurrency", "1,2", "--goodput", "tpot:20")
    assert code == 0
    assert {path.name for path in tmp_path.iterdir()} == FILES
    assert "Mean TPOT (ms):                          10.00 " in shown
    assert "For 50 tok/s per user (TPOT at most 20.0 ms): http://x up to concurrency 2" in shown
    assert "Request goodput (req/s):                 3.33 " in (tmp_path / "report.txt").read_text()
    saved = Run.load(tmp_path / "results.json")
    assert saved.arguments["dataset"] == "fixed"
    assert "api_key" not in saved.arguments
    assert [len(point.requests) for point in saved.points] == [4, 4]


def test_resume_measures_only_what_is_missing(tmp_path: Path) -> None:
    first, second = FakeEndpoint(), FakeEndpoint()
    bench(tmp_path, first, "--concurrency", "1")
    with pytest.raises(BenchError, match="add --resume"):
        bench(tmp_path, second, "--concurrency", "1,2")
    with pytest.raises(BenchError, match="another --seed: 0, not 5"):
        bench(tmp_path, second, "--concurrency", "1,2", "--seed", "5", "--resume")
    assert not second.bodies
    code, _ = bench(tmp_path, second, "--concurrency", "1,2", "--resume")
    assert (code, loads(tmp_path)) == (0, [(1, True), (2, True)])
    assert second.most_running == 2
    third = FakeEndpoint()
    assert bench(tmp_path, third, "--concurrency", "1,2", "--resume")[0] == 0
    assert not third.bodies


def test_ctrl_c_keeps_what_was_measured_and_resume_goes_on(tmp_path: Path) -> None:
    endpoint = FakeEndpoint(ttft_s=0.1, tpot_s=0.1)
    # Of the first point, with 2.1 s a request, everything; of the second only a part.
    code, shown = bench(tmp_path, endpoint, "--concurrency", "1,2,4", interrupt_at_s=16.0)
    assert code == 130
    assert endpoint.num_running == 0
    assert loads(tmp_path) == [(1, True), (2, False)]
    assert "This point was cut short." in shown
    assert {path.name for path in tmp_path.iterdir()} == FILES
    code, _ = bench(tmp_path, FakeEndpoint(), "--concurrency", "1,2,4", "--resume")
    assert (code, loads(tmp_path)) == (0, [(1, True), (2, True), (4, True)])


def test_ctrl_c_before_the_first_answer(tmp_path: Path) -> None:
    endpoint = FakeEndpoint(ttft_s=100.0)
    code, _ = bench(tmp_path, endpoint, "--concurrency", "1", interrupt_at_s=5.0)
    assert (code, endpoint.num_running) == (130, 0)
    assert not list(tmp_path.iterdir())


def test_failed_requests_are_shown_and_make_the_exit_code(tmp_path: Path) -> None:
    code, shown = bench(tmp_path, FakeEndpoint(statuses={4: 500}), "--concurrency", "1")
    assert code == 1
    assert "1 requests failed: HTTP 500: no" in shown


def test_an_endpoint_that_serves_nothing(tmp_path: Path) -> None:
    code, shown = bench(tmp_path, FakeEndpoint(statuses={0: 503}), "--concurrency", "1")
    assert code == 1
    assert "http://x: the endpoint does not serve a request: HTTP 503: no" in shown


def test_an_endpoint_that_ends_meanwhile(tmp_path: Path) -> None:
    refusals = dict.fromkeys(range(2, 1000), 503)
    code, shown = bench(tmp_path, FakeEndpoint(statuses=refusals), "--concurrency", "1,2")
    assert code == 1
    assert "no request succeeded: HTTP 503: no" in shown
    assert loads(tmp_path) == [(1, True)]
    code, _ = bench(tmp_path, FakeEndpoint(), "--concurrency", "1,2", "--resume")  # nothing was measured: once more
    assert [point.metrics.num_succeeded for point in Run.load(tmp_path / "results.json").points] == [4, 4]
    assert code == 0


def test_open_loop(tmp_path: Path) -> None:
    code, shown = bench(tmp_path, FakeEndpoint(), "--request-rate", "2")
    assert code == 0
    assert "Request rate configured (RPS):           2.00 " in shown

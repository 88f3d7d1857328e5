"""The client in virtual time: every figure is exact, and nothing waits."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from tpserve.coordinator.bench.client import Client, Load, Sent
from tpserve.coordinator.bench.definitions import Metrics, measure
from tpserve.coordinator.bench.errors import BenchError
from tpserve.coordinator.bench.workload import Workload, fixed, poisson_arrivals
from unit.bench.virtual import FakeEndpoint, now_s, run


def with_client(
    endpoint: FakeEndpoint, use: Callable[[Client], Awaitable[Sent]], *, timeout_s: float = 600.0
) -> tuple[Sent, Metrics]:
    async def main() -> Sent:
        async with Client("http://x", "m", clock=now_s, transport=endpoint, timeout_s=timeout_s) as client:
            return await use(client)

    sent = run(main)
    return sent, measure(sent.records, sent.window)


def measured(
    endpoint: FakeEndpoint, load: Load, workload: Workload | None = None, *, timeout_s: float = 600.0
) -> tuple[Sent, Metrics]:
    work = workload or fixed(10, 11)
    return with_client(endpoint, lambda client: client.run(work, load, stop=asyncio.Event()), timeout_s=timeout_s)


def test_one_worker() -> None:
    endpoint = FakeEndpoint(ttft_s=0.5, tpot_s=0.1)
    sent, metrics = measured(endpoint, Load(4, concurrency=1))
    assert sent.complete
    assert [r.role for r in sent.records if r.end_s is not None] == ["ramp"] + ["measured"] * 4
    summaries = (metrics.ttft_s, metrics.tpot_s, metrics.itl_s, metrics.e2el_s)
    for summary, expected in zip(summaries, (0.5, 0.1, 0.1, 1.5), strict=True):
        assert summary is not None
        assert (summary.mean, summary.p99) == pytest.approx((expected, expected))
    assert metrics.duration_s == pytest.approx(4 * 1.5)
    assert metrics.output_throughput == pytest.approx(44 / 6)
    assert metrics.request_throughput == pytest.approx(4 / 6)
    assert (metrics.num_succeeded, metrics.num_failed, metrics.num_first_chunk_assumed) == (4, 0, 0)


@pytest.mark.parametrize("counts_by_chunk", [True, False])
def test_a_server_that_sends_tokens_in_pairs(counts_by_chunk: bool) -> None:
    endpoint = FakeEndpoint(tokens_per_chunk=2, counts_by_chunk=counts_by_chunk)
    _, metrics = measured(endpoint, Load(2, concurrency=1), fixed(10, 12))
    assert metrics.tpot_s is not None
    # 12 tokens in 6 chunks, 5 gaps of 0.1 s; the first chunk's second token is known only if the server counts.
    assert metrics.tpot_s.mean == pytest.approx(0.5 / 10 if counts_by_chunk else 0.5 / 11)
    assert metrics.num_first_chunk_assumed == (0 if counts_by_chunk else 2)
    assert metrics.output_throughput == pytest.approx(12 / 1.0)


def test_a_closed_loop_keeps_its_concurrency_and_falls_out_of_phase() -> None:
    endpoint = FakeEndpoint(ttft_s=0.1, tpot_s=0.1)
    sent, metrics = measured(endpoint, Load(12, concurrency=4), fixed(10, 40))
    assert endpoint.most_running == metrics.peak_concurrency == 4
    ramps = [record for record in sent.records if record.role == "ramp"]
    assert [record.asked_output_tokens for record in ramps] == [5, 15, 25, 35]
    assert sent.window[0] == pytest.approx(3.5)  # when the longest ramp ends
    assert metrics.num_requests == metrics.num_succeeded == 12
    assert sent.window[1] == pytest.approx(max(r.end_s or 0.0 for r in sent.records if r.role == "measured"))
    assert any(record.role == "filler" for record in sent.records)
    # Four streams that never pause: 40 tokens a second.
    assert metrics.output_throughput == pytest.approx(40, rel=0.02)
    prompts = [tuple(body["prompt"]) for body in endpoint.bodies]
    assert len(set(prompts)) == len(prompts)


def test_an_open_loop_sends_when_it_is_time_whatever_the_server_does() -> None:
    endpoint = FakeEndpoint(ttft_s=5.0)
    arrivals = poisson_arrivals(2.0, 20, seed=3)
    sent, metrics = measured(endpoint, Load(20, arrivals_s=arrivals))
    assert endpoint.arrivals_s == pytest.approx(arrivals)
    assert endpoint.most_running > 5
    assert metrics.num_succeeded == 20
    assert sent.window == pytest.approx((0.0, arrivals[-1] + 6.0))


def test_errors_are_counted_by_kind_and_backed_off() -> None:
    endpoint = FakeEndpoint(statuses={2: 429, 4: 500}, cut_after={3: 5})
    sent, metrics = measured(endpoint, Load(5, concurrency=1))
    assert metrics.errors == {"HTTP 429: no": 1, "ReadError: broken": 1, "HTTP 500: no": 1}
    assert (metrics.num_requests, metrics.num_succeeded, metrics.num_failed) == (5, 2, 3)
    refused = next(number for number, r in enumerate(sent.records) if r.error == "HTTP 429: no")
    assert sent.records[refused + 1].sent_s - sent.records[refused].sent_s == pytest.approx(0.1)
    broken = next(r for r in sent.records if r.error == "ReadError: broken")
    assert broken.num_received_tokens == 5


def test_a_request_has_a_time_limit() -> None:
    _, metrics = measured(FakeEndpoint(ttft_s=5.0), Load(2, concurrency=1), timeout_s=2.0)
    assert (metrics.num_succeeded, metrics.errors) == (0, {"no end within 2 s": 3})


def test_a_point_has_a_time_limit_and_what_is_unfinished_counts() -> None:
    endpoint = FakeEndpoint(ttft_s=0.1, tpot_s=0.1)
    sent, metrics = measured(endpoint, Load(3, concurrency=1, time_limit_s=12.05), fixed(10, 64))
    assert not sent.complete
    # The ramp ends at 1.6, the first request at 8.0, and the second is cut off with 40 of its tokens.
    assert (metrics.num_succeeded, metrics.num_unfinished, metrics.num_failed) == (1, 1, 0)
    assert metrics.tpot_s is not None
    assert metrics.tpot_s.num_values == 2
    assert metrics.tpot_s.mean == pytest.approx(0.1)
    assert metrics.num_output_tokens == 104


def test_stop_keeps_what_was_measured() -> None:
    async def use(client: Client) -> Sent:
        stop = asyncio.Event()
        asyncio.get_running_loop().call_later(6.0, stop.set)
        return await client.run(fixed(10, 11), Load(100, concurrency=1), stop=stop)

    sent, metrics = with_client(FakeEndpoint(), use)
    assert not sent.complete
    assert (metrics.num_succeeded, metrics.num_unfinished) == (3, 1)


def test_probe_does_without_counts_by_chunk_where_they_are_refused() -> None:
    endpoint = FakeEndpoint(refuses_continuous=True)

    async def use(client: Client) -> Sent:
        await client.probe(fixed(10, 11).item(0, 0))
        assert not client.counts_by_chunk
        return await client.run(fixed(10, 11), Load(1, concurrency=1), stop=asyncio.Event())

    _, metrics = with_client(endpoint, use)
    assert metrics.num_succeeded == 1
    assert ["continuous_usage_stats" in body["stream_options"] for body in endpoint.bodies[:3]] == [True, False, False]


def test_probe_tells_what_is_wrong() -> None:
    async def use(client: Client) -> Sent:
        with pytest.raises(BenchError, match="HTTP 401: no"):
            await client.probe(fixed(10, 11).item(0, 0))
        return Sent()

    with_client(FakeEndpoint(statuses={0: 401}), use)


def test_warm_up_is_short_and_comes_at_once() -> None:
    endpoint = FakeEndpoint()

    async def use(client: Client) -> Sent:
        await client.warm_up(fixed(100, 500), Load(1, concurrency=3, num_warmups=3))
        return Sent()

    with_client(endpoint, use)
    assert endpoint.most_running == 3
    assert {(len(body["prompt"]), body["max_tokens"]) for body in endpoint.bodies} == {(32, 8)}


def test_the_body_asks_for_exactly_what_is_measured() -> None:
    endpoint = FakeEndpoint()
    measured(endpoint, Load(1, concurrency=1))
    body = endpoint.bodies[1]
    assert len(body.pop("prompt")) == 10
    assert body == {
        "model": "m",
        "max_tokens": 11,
        "temperature": 0.0,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        "ignore_eos": True,
    }

"""The client over a real socket, with known times: HTTP framing, server-sent events and definitions together."""

from __future__ import annotations

import pytest

from tpserve.coordinator.bench.client import Client
from tpserve.coordinator.bench.definitions import Record
from tpserve.coordinator.bench.workload import fixed
from unit.bench.loopback import Loopback, event

USAGE = event({"choices": [], "usage": {"prompt_tokens": 10, "completion_tokens": 7}})


def token(text: str, count: int | None) -> bytes:
    usage = None if count is None else {"prompt_tokens": 10, "completion_tokens": count}
    return event({"choices": [{"index": 0, "text": text, "finish_reason": None}], "usage": usage})


async def sent_to(endpoint: Loopback) -> Record:
    async with endpoint.running(), Client(endpoint.url, "m", clock=endpoint.clock) as client:
        return await client.send(fixed(10, 7).item(0, 0), "measured", 7)


async def test_known_times() -> None:
    """The first chunk has three tokens, one chunk has none, one event comes in two pieces, one token has no text."""
    middle = token("d", 4)
    endpoint = Loopback(
        [
            (0.25, token("abc", 3)),
            (0.30, token("", 3)),
            (0.35, middle[:20]),
            (0.40, middle[20:]),
            (0.50, token("", 5)),
            (0.85, token("fg", 7)),
            (0.90, USAGE + b"data: [DONE]\n\n"),
        ]
    )
    record = await sent_to(endpoint)
    assert record.error is None
    assert record.chunk_tokens == [3, 1, 1, 2]
    assert record.ttft_s == pytest.approx(0.25)
    assert record.itls_s == pytest.approx([0.15, 0.10, 0.35])
    assert record.tpot_s == pytest.approx(0.60 / 4)
    assert record.e2el_s == pytest.approx(0.85)
    assert (record.num_prompt_tokens, record.num_output_tokens) == (10, 7)


async def test_roles_and_ends_carry_no_tokens() -> None:
    def delta(**fields: str) -> bytes:
        return event({"choices": [{"index": 0, "delta": fields, "finish_reason": None}], "usage": None})

    endpoint = Loopback(
        [
            (0.1, delta(role="assistant", content="")),
            (0.2, delta(content="a")),
            (0.5, delta(content="b")),
            (0.8, delta()),
            (0.9, USAGE + b"data: [DONE]\n\n"),
        ]
    )
    record = await sent_to(endpoint)
    assert record.error is None
    assert (record.ttft_s, record.e2el_s) == pytest.approx((0.2, 0.5))
    assert record.tpot_s == pytest.approx(0.3 / 6)  # n by usage, the first chunk taken as one token
    assert record.first_chunk_is_assumed


@pytest.mark.parametrize("drops", [True, False])
async def test_an_error_in_the_stream_ends_the_request(drops: bool) -> None:
    last = (0.6, b": still here\n\n") if drops else (0.6, event({"error": {"message": "a rank was lost", "code": 503}}))
    record = await sent_to(Loopback([(0.2, token("a", 1)), (0.4, token("b", 2)), last], drops=drops))
    assert record.error is not None
    assert record.error.startswith("RemoteProtocolError" if drops else "stream: a rank was lost")
    assert not record.succeeded
    assert (record.chunk_times_s, record.num_received_tokens) == ([0.2, 0.4], 2)


async def test_a_refused_connection_is_an_error() -> None:
    endpoint = Loopback([])
    async with endpoint.running():
        pass
    async with Client(endpoint.url, "m") as client:
        record = await client.send(fixed(10, 7).item(0, 0), "measured", 7)
    assert record.error is not None
    assert record.error.startswith("ConnectError")
    assert record.end_s is not None

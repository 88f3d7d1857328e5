"""Time that passes only when nothing else is to do, and an endpoint that lives in it: exact timings without waiting."""

from __future__ import annotations

import asyncio
import json
import selectors
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

import httpx

T = TypeVar("T")


class _Selector(selectors.SelectSelector):
    """Instead of waiting, moves the clock."""

    now_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready:
            assert timeout is not None, "nothing will ever happen"
            self.now_s += max(0.0, timeout)
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self.clock = _Selector()
        super().__init__(self.clock)

    def time(self) -> float:
        return self.clock.now_s


def run(main: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run to the end in virtual time."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main())


def now_s() -> float:
    return asyncio.get_running_loop().time()


@dataclass
class FakeEndpoint(httpx.AsyncBaseTransport):
    """Answers completions: the first token after `ttft_s`, then one every `tpot_s`.

    `statuses` and `cut_after` break some requests, by their number in the order of arrival.
    """

    ttft_s: float = 0.5
    tpot_s: float = 0.1
    tokens_per_chunk: int = 1
    counts_by_chunk: bool = True
    statuses: dict[int, int] = field(default_factory=dict)
    cut_after: dict[int, int] = field(default_factory=dict)
    """Tokens after which the connection breaks."""
    refuses_continuous: bool = False
    bodies: list[dict[str, Any]] = field(default_factory=list)
    arrivals_s: list[float] = field(default_factory=list)
    num_running: int = 0
    most_running: int = 0

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        number = len(self.bodies)
        body = json.loads(await request.aread())
        self.bodies.append(body)
        self.arrivals_s.append(now_s())
        continuous = body["stream_options"].get("continuous_usage_stats", False)
        if self.refuses_continuous and continuous:
            return httpx.Response(400, json={"error": {"message": "unknown stream option"}})
        if number in self.statuses:
            return httpx.Response(self.statuses[number], json={"error": {"message": "no"}})
        return httpx.Response(200, stream=_Stream(self, number, body, continuous and self.counts_by_chunk))


class _Stream(httpx.AsyncByteStream):
    def __init__(self, endpoint: FakeEndpoint, number: int, body: dict[str, Any], continuous: bool) -> None:
        self._endpoint, self._number, self._body, self._continuous = endpoint, number, body, continuous

    async def __aiter__(self) -> AsyncIterator[bytes]:
        endpoint = self._endpoint
        endpoint.num_running += 1
        endpoint.most_running = max(endpoint.most_running, endpoint.num_running)
        try:
            num_tokens, num_prompt = self._body["max_tokens"], len(self._body["prompt"])
            done = 0
            while done < num_tokens:
                await asyncio.sleep(endpoint.tpot_s if done else endpoint.ttft_s)
                done = min(num_tokens, done + endpoint.tokens_per_chunk)
                usage = {"prompt_tokens": num_prompt, "completion_tokens": done} if self._continuous else None
                yield sse({"choices": [{"text": "x"}], "usage": usage})
                if done == endpoint.cut_after.get(self._number):
                    raise httpx.ReadError("broken")
            yield sse({"choices": [], "usage": {"prompt_tokens": num_prompt, "completion_tokens": num_tokens}})
            yield b"data: [DONE]\n\n"
        finally:
            endpoint.num_running -= 1


def sse(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data).encode() + b"\n\n"

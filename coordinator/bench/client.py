"""Sends the requests of a point and notes when what arrives: closed loop, or open loop by a list of arrivals.

Closed loop of C: C workers with always one request in flight each. A worker's first request is a ramp, shortened to
another length for each, so that the batch is out of phase; then come requests 0 .. N-1, which are measured; fillers
keep C in flight until the last measured one has ended. The window of rates goes from the last ramp's end to there.
"""

from __future__ import annotations

import asyncio
import functools
import ssl
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import httpx
import orjson

from tpserve.coordinator.bench.definitions import Record, Role
from tpserve.coordinator.bench.errors import BenchError
from tpserve.coordinator.bench.stream import http_error, read_into
from tpserve.coordinator.bench.workload import Item, Workload

_BACK_OFF_S = 0.1
"""After a failed request, so that a server that refuses is not flooded."""
_RAMP_OUTPUT_TOKENS = 190
"""Ramps are spread over at most so many tokens."""
_WARM_UP = (32, 8)
"""Prompt and output tokens of a warm-up request, at most."""
_UNMEASURED = 2**32
"""Numbers of requests that are not measured begin here, so that their prompts are others."""

Api = Literal["completions", "chat"]


@dataclass(frozen=True, slots=True)
class Load:
    """How requests are sent: exactly one of `concurrency` and `arrivals_s`."""

    num_requests: int
    """Measured ones."""
    concurrency: int | None = None
    arrivals_s: tuple[float, ...] | None = None
    """When each is sent, seconds after the begin."""
    num_warmups: int = 0
    """Short requests at once, before the point."""
    time_limit_s: float | None = None
    salt: int = 0
    """Of the prompts."""


@dataclass(slots=True)
class Sent:
    """What came of a point."""

    records: list[Record] = field(default_factory=list)
    window: tuple[float, float] = (0.0, 0.0)
    complete: bool = True
    """False if it was interrupted or ran into its time limit."""


def trusting(ca_certs: Path | None) -> ssl.SSLContext:
    """Return what endpoints are believed by: the usual authorities (SSL_CERT_FILE among them) and those of a PEM file.

    Raises
    ------
    BenchError
        If the file cannot be used.
    """
    context = httpx.create_ssl_context()
    if ca_certs is not None:
        try:
            context.load_verify_locations(ca_certs)
        except OSError as error:
            raise BenchError(f"--ssl-ca-certs {ca_certs} cannot be used: {error}") from None
    return context


class Client:
    """Talks to one OpenAI endpoint.

    Parameters
    ----------
    base_url
        With or without `/v1`.
    ignore_eos
        Ask the server to go on to the output length (an extra of vLLM, SGLang and tpserve).
    counts_by_chunk
        Ask for usage in every chunk; `probe` finds out whether the server refuses that.
    timeout_s
        Of one request, from the first byte sent to the last received.
    clock
        Seconds, monotonic.
    ca_certs
        See `trusting`.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api: Api = "completions",
        api_key: str | None = None,
        ignore_eos: bool = True,
        counts_by_chunk: bool = True,
        timeout_s: float = 600.0,
        clock: Callable[[], float] = time.perf_counter,
        transport: httpx.AsyncBaseTransport | None = None,
        ca_certs: Path | None = None,
    ) -> None:
        self.model = model
        self.counts_by_chunk = counts_by_chunk
        self._api = api
        self._ignore_eos = ignore_eos
        self._timeout_s = timeout_s
        self._clock = clock
        self._path = "/completions" if api == "completions" else "/chat/completions"
        headers = {"Accept-Encoding": "identity"}  # compression would hold chunks back
        if api_key:
            headers["Authorization"] = f"Bearer {api_key}"
        self._new_connection = functools.partial(
            httpx.AsyncClient,
            base_url=api_root(base_url),
            headers=headers,
            timeout=httpx.Timeout(None, connect=30.0),  # the whole request has one limit, see `send`
            verify=trusting(ca_certs),
            trust_env=False,  # a proxy would be measured with it
            transport=transport,
        )
        # One client for each request in flight: a shared pool looks at every connection for every other one whenever
        # a request begins or ends, which takes milliseconds at a concurrency of 64.
        self._connections: list[httpx.AsyncClient] = []
        self._free: list[httpx.AsyncClient] = []

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *error: object) -> None:
        await asyncio.gather(*(connection.aclose() for connection in self._connections))

    async def probe(self, item: Item) -> None:
        """Send one short request; without usage by chunk, if the server refuses that.

        Raises
        ------
        BenchError
            If it cannot be served at all.
        """
        record = await self.send(item, "ramp", _WARM_UP[1])
        if record.error is not None and record.error.startswith(("HTTP 400", "HTTP 422")) and self.counts_by_chunk:
            first_error = record.error
            self.counts_by_chunk = False
            record = await self.send(item, "ramp", _WARM_UP[1])
            if record.error is not None:
                raise BenchError(f"the endpoint refuses a request: {first_error}")
        if record.error is not None:
            raise BenchError(f"the endpoint does not serve a request: {record.error}")

    async def warm_up(self, workload: Workload, load: Load) -> None:
        """Send the warm-up requests, all at once; what they say is not looked at, the point will show it."""
        items = [workload.item(_UNMEASURED + number, load.salt) for number in range(load.num_warmups)]
        await asyncio.gather(*(self.send(_shortened(item), "ramp", _WARM_UP[1]) for item in items))

    async def run(
        self,
        workload: Workload,
        load: Load,
        *,
        stop: asyncio.Event,
        on_change: Callable[[Sequence[Record]], None] = lambda records: None,
    ) -> Sent:
        """Measure one point.

        Parameters
        ----------
        stop
            Set by Ctrl-C; what has been measured by then is returned.
        on_change
            Called with all records after each request, for progress.
        """
        sent = Sent()
        finished = asyncio.Event()
        sending = self._closed_loop if load.arrivals_s is None else self._open_loop
        task = asyncio.create_task(sending(workload, load, sent, finished, on_change))
        waiting = [asyncio.create_task(finished.wait()), asyncio.create_task(stop.wait())]
        begin_s = self._clock()
        try:
            await asyncio.wait({task, *waiting}, timeout=load.time_limit_s, return_when=asyncio.FIRST_COMPLETED)
            end_s = self._clock()
            sent.complete = finished.is_set()
        finally:
            task.cancel()
            for waiter in waiting:
                waiter.cancel()
            outcome, *_ = await asyncio.gather(task, *waiting, return_exceptions=True)
        if isinstance(outcome, Exception):
            raise outcome
        sent.window = (_window_begin(sent.records, begin_s, end_s), end_s)
        return sent

    async def send(self, item: Item, role: Role, num_output_tokens: int, into: list[Record] | None = None) -> Record:
        """Send one request and return its record when it has ended.

        Parameters
        ----------
        into
            The record is put here at once, so that it is not lost if this is cancelled.
        """
        record = Record(item.index, role, item.num_prompt_tokens, num_output_tokens)
        if into is not None:
            into.append(record)
        content = orjson.dumps(self._body(item, num_output_tokens))
        connection = self._take_connection()
        request = connection.build_request(
            "POST", self._path, content=content, headers={"Content-Type": "application/json"}
        )
        reads: list[tuple[float, bytes]] = []
        clock = self._clock
        cut_off = False
        record.sent_s = clock()
        try:
            async with asyncio.timeout(self._timeout_s), _stream(connection, request) as response:
                if response.status_code == 200:
                    async for data in response.aiter_raw():
                        reads.append((clock(), data))
                else:
                    record.error = http_error(response.status_code, await response.aread())
        except TimeoutError:
            record.error = f"no end within {self._timeout_s:g} s"
        except httpx.HTTPError as error:
            record.error = f"{type(error).__name__}: {error}".rstrip(": ")
        except asyncio.CancelledError:
            cut_off = True
            raise
        finally:
            if not cut_off:
                record.end_s = clock()
            self._free.append(connection)
            if record.error is None or reads:
                why = record.error
                read_into(record, reads, cut_off=cut_off or why is not None)
                record.error = why or record.error
        return record

    def _take_connection(self) -> httpx.AsyncClient:
        if not self._free:
            self._connections.append(self._new_connection())
            self._free.append(self._connections[-1])
        return self._free.pop()

    def _body(self, item: Item, num_output_tokens: int) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": num_output_tokens,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.counts_by_chunk:
            body["stream_options"]["continuous_usage_stats"] = True
        if self._ignore_eos:
            body["ignore_eos"] = True
        if self._api == "completions":
            body["prompt"] = item.prompt
        else:
            body["messages"] = [{"role": "user", "content": item.prompt}]
        return body

    async def _closed_loop(
        self,
        workload: Workload,
        load: Load,
        sent: Sent,
        finished: asyncio.Event,
        on_change: Callable[[Sequence[Record]], None],
    ) -> None:
        assert load.concurrency is not None
        concurrency, numbers = load.concurrency, iter(range(10**9))
        num_left = load.num_requests

        async def work(worker: int) -> None:
            nonlocal num_left
            # Pairs from the workload's end, so that ramps and the first measured requests differ.
            item = workload.item(_UNMEASURED * len(workload) - 1 - worker, load.salt)
            await self.send(item, "ramp", ramp_output_tokens(item, worker, concurrency), sent.records)
            while True:
                item = workload.item(next(numbers), load.salt)
                role: Role = "measured" if item.index < load.num_requests else "filler"
                record = await self.send(item, role, item.num_output_tokens, sent.records)
                if role == "measured":
                    num_left -= 1
                    if num_left == 0:
                        finished.set()
                on_change(sent.records)
                if record.error is not None:
                    await asyncio.sleep(_BACK_OFF_S)

        await _all_or_none(work(worker) for worker in range(concurrency))

    async def _open_loop(
        self,
        workload: Workload,
        load: Load,
        sent: Sent,
        finished: asyncio.Event,
        on_change: Callable[[Sequence[Record]], None],
    ) -> None:
        assert load.arrivals_s is not None
        loop = asyncio.get_running_loop()
        begin_s = loop.time()

        async def one(index: int, at_s: float) -> None:
            item = workload.item(index, load.salt)
            await asyncio.sleep(begin_s + at_s - loop.time())
            await self.send(item, "measured", item.num_output_tokens, sent.records)
            on_change(sent.records)

        await _all_or_none(one(index, at_s) for index, at_s in enumerate(load.arrivals_s))
        finished.set()


@asynccontextmanager
async def _stream(connection: httpx.AsyncClient, request: httpx.Request) -> AsyncIterator[httpx.Response]:
    response = await connection.send(request, stream=True)
    try:
        yield response
    finally:
        await response.aclose()


def api_root(base_url: str) -> str:
    """Return the address under which the routes of the API are."""
    base_url = base_url.rstrip("/")
    return base_url if base_url.endswith("/v1") else f"{base_url}/v1"


def ramp_output_tokens(item: Item, worker: int, concurrency: int) -> int:
    """Return the output length of a worker's first request: spread evenly, so that workers fall out of phase."""
    if concurrency == 1:
        return min(16, item.num_output_tokens)
    return max(2, int(min(item.num_output_tokens, _RAMP_OUTPUT_TOKENS) * (worker + 0.5) / concurrency))


def _shortened(item: Item) -> Item:
    return item if isinstance(item.prompt, str) else Item(item.index, item.prompt[: _WARM_UP[0]], _WARM_UP[1])


def _window_begin(records: Sequence[Record], begin_s: float, end_s: float) -> float:
    """Return the end of the last ramp; if all was over by then, or there was none, when measuring began."""
    ramps = [end_s if record.end_s is None else record.end_s for record in records if record.role == "ramp"]
    measured = [record.sent_s for record in records if record.role == "measured"]
    last = [record.end_s or end_s for record in records if record.role == "measured"]
    if ramps and last and max(ramps) < max(last):
        return max(ramps)
    return min(measured, default=begin_s)


async def _all_or_none(coroutines: Any) -> None:
    async with asyncio.TaskGroup() as group:
        for coroutine in coroutines:
            group.create_task(coroutine)

"""What is measured, exactly: from the times of one request's chunks to the figures of a point.

A request is sent at t_0; its first token arrives at t_1, its last, the n-th, at t_n. Tokens are counted by the server's
`usage`, never by counting chunks or by tokenising text again:

- TTFT = t_1 - t_0
- ITL = each gap between two chunks that carry tokens
- TPOT = (t_n - t_1) / (n - k), with k the tokens of the first chunk (1, unless the server batches or speculates)
- E2EL = t_n - t_0
- pooled TPOT = sum of (t_n - t_1) / sum of (n - k) over requests

Knows nothing of HTTP, of clocks or of files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

MIN_TOKENS_IF_UNFINISHED = 16
"""A request that was cut off counts for TPOT and ITL only with so many tokens."""

Role = Literal["ramp", "measured", "filler"]


@dataclass(slots=True)
class Record:
    """One request: what was asked, when its chunks came, what the server counted. Times share one clock, in seconds."""

    index: int
    role: Role
    asked_prompt_tokens: int | None
    """None if the prompt is text that nobody has counted."""
    asked_output_tokens: int
    sent_s: float = 0.0
    chunk_times_s: list[float] = field(default_factory=list)
    """Arrival of each chunk that carries tokens."""
    chunk_tokens: list[int] | None = None
    """Tokens of each of them, if the server counts as it goes."""
    end_s: float | None = None
    """When the stream ended, well or not; None for a request that was cut off."""
    num_prompt_tokens: int | None = None
    num_output_tokens: int | None = None
    num_cached_tokens: int = 0
    error: str | None = None

    @property
    def succeeded(self) -> bool:
        """Whether the stream came to its regular end."""
        return self.end_s is not None and self.error is None

    @property
    def num_received_tokens(self) -> int:
        """What the server's final usage says, n; of a request without one, what its chunks carried."""
        if self.num_output_tokens is not None:
            return self.num_output_tokens
        return len(self.chunk_times_s) if self.chunk_tokens is None else sum(self.chunk_tokens)

    @property
    def num_first_chunk_tokens(self) -> int:
        """k; 1 where the server does not say."""
        return self.chunk_tokens[0] if self.chunk_tokens else 1

    @property
    def first_chunk_is_assumed(self) -> bool:
        """Whether k is a guess: the server does not count by chunk, and chunks and tokens are not one to one."""
        return self.chunk_tokens is None and len(self.chunk_times_s) != self.num_received_tokens

    @property
    def ttft_s(self) -> float | None:
        """Time to the first token."""
        return self.chunk_times_s[0] - self.sent_s if self.chunk_times_s else None

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first chunk; None if there is none after it."""
        return self.decode_s / self.num_decoded_tokens if self.num_decoded_tokens > 0 else None

    @property
    def decode_s(self) -> float:
        """The numerator of TPOT."""
        return self.chunk_times_s[-1] - self.chunk_times_s[0] if self.chunk_times_s else 0.0

    @property
    def num_decoded_tokens(self) -> int:
        """The denominator of TPOT; 0 for a request that has too few tokens to count."""
        if not self.succeeded and self.num_received_tokens < MIN_TOKENS_IF_UNFINISHED:
            return 0
        return max(0, self.num_received_tokens - self.num_first_chunk_tokens) if len(self.chunk_times_s) > 1 else 0

    @property
    def itls_s(self) -> list[float]:
        """Gaps between chunks; none for a request that has too few tokens to count."""
        if self.num_decoded_tokens == 0:
            return []
        return [after - before for before, after in zip(self.chunk_times_s, self.chunk_times_s[1:], strict=False)]

    @property
    def e2el_s(self) -> float | None:
        """Time to the last token of a request that succeeded."""
        return self.chunk_times_s[-1] - self.sent_s if self.succeeded and self.chunk_times_s else None

    def tokens_by_time(self) -> list[tuple[float, float]]:
        """Return (time, tokens) of each chunk; without counts by chunk, n is spread evenly over them."""
        if self.chunk_tokens is not None:
            return list(zip(self.chunk_times_s, map(float, self.chunk_tokens), strict=True))
        share = self.num_received_tokens / len(self.chunk_times_s) if self.chunk_times_s else 0.0
        return [(time_s, share) for time_s in self.chunk_times_s]


@dataclass(frozen=True, slots=True)
class Summary:
    """Statistics of one quantity; percentiles interpolate linearly, stddev is that of the values themselves."""

    num_values: int
    mean: float
    stddev: float
    p25: float
    median: float
    p75: float
    p90: float
    p95: float
    p99: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Summary | None:
        """Return the statistics, or None of nothing."""
        if not values:
            return None
        array = np.asarray(values, dtype=np.float64)
        p25, median, p75, p90, p95, p99 = map(float, np.percentile(array, [25, 50, 75, 90, 95, 99]))
        return cls(
            len(values), float(array.mean()), float(array.std()), p25, median, p75, p90, p95, p99,
            float(array.min()), float(array.max()),
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Slo:
    """Limits that a good request keeps, in seconds; None is no limit."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    e2el_s: float | None = None

    @classmethod
    def parse(cls, text: str) -> Slo:
        """Read `ttft:200,tpot:20,e2el:5000`, in milliseconds.

        Raises
        ------
        ValueError
            If a name is unknown or given twice, or a limit is not a positive number.
        """
        limits: dict[str, float] = {}
        for part in text.split(","):
            name, _, value = part.strip().partition(":")
            if name not in ("ttft", "tpot", "e2el") or f"{name}_s" in limits:
                raise ValueError(f"{part!r}: write ttft:MS, tpot:MS or e2el:MS, each at most once")
            limit = float(value)
            if not limit > 0:
                raise ValueError(f"{part!r}: a limit is more than 0 ms")
            limits[f"{name}_s"] = limit / 1e3
        return cls(**limits)

    def is_good(self, record: Record) -> bool:
        """Whether a request succeeded within all limits; one with a single token has a TPOT of 0, as in vLLM."""
        return record.succeeded and all(
            limit is None or (value is not None and value <= limit)
            for limit, value in (
                (self.ttft_s, record.ttft_s),
                (self.tpot_s, record.tpot_s or 0.0),
                (self.e2el_s, record.e2el_s),
            )
        )


@dataclass(frozen=True, slots=True)
class Metrics:
    """The figures of one point. Latencies are of measured requests, rates of everything within the window."""

    num_requests: int
    """Measured ones that were sent."""
    num_succeeded: int
    num_failed: int
    """Of all requests, fillers and ramp included: none is hidden."""
    num_unfinished: int
    """Measured ones that were cut off by a time limit or by Ctrl-C."""
    errors: Mapping[str, int]
    """How often each."""
    num_first_chunk_assumed: int
    """Measured requests whose TPOT rests on a guess of the first chunk's tokens."""
    num_cached_tokens: int
    """Prompt tokens that the server took from a prefix cache."""
    duration_s: float
    """Length of the window."""
    num_completed_in_window: int
    num_input_tokens: int
    """Prompts of the requests completed in the window."""
    num_output_tokens: int
    """Received in the window."""
    request_throughput: float
    goodput: float | None
    """Good requests per second; None without an SLO."""
    output_throughput: float
    """Tokens per second."""
    total_throughput: float
    """Tokens per second, in and out."""
    peak_output_throughput: float
    """Tokens of the best second of the window."""
    peak_concurrency: int
    tpot_pooled_s: float | None
    ttft_s: Summary | None
    tpot_s: Summary | None
    itl_s: Summary | None
    e2el_s: Summary | None
    input_tokens: Summary | None
    output_tokens: Summary | None


def measure(records: Sequence[Record], window: tuple[float, float], slo: Slo | None = None) -> Metrics:
    """Return the figures of a point.

    Parameters
    ----------
    records
        Every request that was sent, whatever became of it.
    window
        After and until when rates are taken, on the records' clock.
    """
    begin_s, end_s = window
    duration_s = max(end_s - begin_s, 1e-9)
    measured = [record for record in records if record.role == "measured"]
    succeeded = [record for record in measured if record.succeeded]
    completed = [r for r in records if r.succeeded and r.end_s is not None and begin_s < r.end_s <= end_s]
    chunks = [chunk for r in records for chunk in r.tokens_by_time() if begin_s < chunk[0] <= end_s]
    num_output_tokens = round(sum(tokens for _, tokens in chunks))
    num_input_tokens = sum(record.num_prompt_tokens or 0 for record in completed)
    num_decoded_tokens = sum(record.num_decoded_tokens for record in measured)
    decode_s = sum(record.decode_s for record in measured if record.num_decoded_tokens)
    request_throughput = len(completed) / duration_s
    goodput = None
    if slo is not None:
        # The window holds fillers too: the share of good ones is taken from those that are measured.
        goodput = request_throughput * sum(map(slo.is_good, succeeded)) / max(1, len(succeeded))

    def summary(value: Callable[[Record], float | None], of: Sequence[Record]) -> Summary | None:
        return Summary.of([x for x in map(value, of) if x is not None])

    return Metrics(
        num_requests=len(measured),
        num_succeeded=len(succeeded),
        num_failed=sum(record.error is not None for record in records),
        num_unfinished=sum(record.end_s is None and record.error is None for record in measured),
        errors=dict(Counter(record.error for record in records if record.error is not None)),
        num_first_chunk_assumed=sum(r.first_chunk_is_assumed for r in measured if r.chunk_times_s),
        num_cached_tokens=sum(record.num_cached_tokens for record in measured),
        duration_s=duration_s,
        num_completed_in_window=len(completed),
        num_input_tokens=num_input_tokens,
        num_output_tokens=num_output_tokens,
        request_throughput=request_throughput,
        goodput=goodput,
        output_throughput=num_output_tokens / duration_s,
        total_throughput=(num_input_tokens + num_output_tokens) / duration_s,
        peak_output_throughput=_peak_rate(chunks, begin_s, duration_s),
        peak_concurrency=_peak_concurrency(records, end_s),
        tpot_pooled_s=decode_s / num_decoded_tokens if num_decoded_tokens else None,
        ttft_s=summary(lambda r: r.ttft_s if r.error is None else None, measured),
        tpot_s=summary(lambda r: r.tpot_s if r.error is None else None, measured),
        itl_s=Summary.of([gap for r in measured if r.error is None for gap in r.itls_s]),
        e2el_s=summary(lambda r: r.e2el_s, succeeded),
        input_tokens=summary(lambda r: r.num_prompt_tokens, succeeded),
        output_tokens=summary(lambda r: r.num_output_tokens, succeeded),
    )


def _peak_rate(chunks: Sequence[tuple[float, float]], begin_s: float, duration_s: float) -> float:
    """Return the tokens of the best whole second; of a shorter window, its rate."""
    if duration_s < 1:
        return sum(tokens for _, tokens in chunks) / duration_s
    seconds = np.zeros(int(duration_s))
    for time_s, tokens in chunks:
        if (second := int(time_s - begin_s)) < len(seconds):  # the last, begun one is left out
            seconds[second] += tokens
    return float(seconds.max())


def _peak_concurrency(records: Sequence[Record], end_s: float) -> int:
    changes = [(record.sent_s, 1) for record in records]
    changes += [(end_s if record.end_s is None else record.end_s, -1) for record in records]
    running = peak = 0
    for _, change in sorted(changes):  # at one time, ends come first
        running += change
        peak = max(peak, running)
    return peak

from __future__ import annotations

from collections.abc import Sequence

from tpserve.coordinator.bench.definitions import Metrics, Record, Role, measure
from tpserve.coordinator.bench.results import Configuration, Point, request_rows
from tpserve.coordinator.draft_counts import Drafts


def make_record(
    index: int = 0,
    *,
    sent_s: float = 0.0,
    times_s: Sequence[float] = (0.5, 0.6, 0.7),
    tokens: Sequence[int] | None = (1, 1, 1),
    num_output: int | None = 3,
    end_s: float | None = None,
    finished: bool = True,
    role: Role = "measured",
    error: str | None = None,
) -> Record:
    end = (times_s[-1] if times_s else sent_s) if end_s is None else end_s
    return Record(
        index,
        role,
        asked_prompt_tokens=10,
        asked_output_tokens=3,
        sent_s=sent_s,
        chunk_times_s=list(times_s),
        chunk_tokens=None if tokens is None else list(tokens),
        end_s=end if finished else None,
        num_prompt_tokens=10,
        num_output_tokens=num_output,
        error=error,
    )


def steady_records(tpot_s: float, count: int = 4, num_output: int = 21, ttft_s: float = 0.5) -> list[Record]:
    """Requests one after the other, with equal gaps between tokens."""
    records = []
    for index in range(count):
        sent_s = round(index * (ttft_s + tpot_s * (num_output - 1)), 9)
        times_s = [round(sent_s + ttft_s + tpot_s * token, 9) for token in range(num_output)]
        record = make_record(index, sent_s=sent_s, times_s=times_s, tokens=[1] * num_output, num_output=num_output)
        records.append(record)
    return records


def make_metrics(tpot_s: float = 0.01, **options: float) -> Metrics:
    records = steady_records(tpot_s, **options)  # type: ignore[arg-type]  # counts are given as whole numbers
    return measure(records, (0.0, records[-1].end_s or 0.0))


def make_point(
    label: str = "TP=4",
    concurrency: int | None = 8,
    tpot_s: float = 0.01,
    *,
    tp: int = 4,
    serve_args: tuple[str, ...] = (),
    throughput: float | None = None,
    failed: int = 0,
    complete: bool = True,
    request_rate: float | None = None,
    floor_tpot_s: float | None = None,
    drafts: Drafts | None = None,
) -> Point:
    records = steady_records(tpot_s)
    records += [
        make_record(90 + n, times_s=(), tokens=(), num_output=None, error="HTTP 500: no") for n in range(failed)
    ]
    metrics = measure(records, (0.0, records[3].end_s or 0.0))
    if throughput is not None:
        values = {name: getattr(metrics, name) for name in Metrics.__slots__}
        metrics = Metrics(**{**values, "output_throughput": throughput})
    configuration = Configuration(label, tp, tp, serve_args=serve_args, floor_tpot_s=floor_tpot_s)
    return Point(configuration, concurrency, request_rate, metrics, complete, request_rows(records), drafts)

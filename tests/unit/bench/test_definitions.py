from __future__ import annotations

import numpy as np
import pytest

from tpserve.coordinator.bench.definitions import Slo, Summary, measure
from unit.bench.builders import make_record


def test_the_definitions_on_known_times() -> None:
    record = make_record(sent_s=10.0, times_s=(10.5, 10.6, 10.9), tokens=(1, 1, 1), num_output=3)
    assert record.ttft_s == pytest.approx(0.5)
    assert record.itls_s == pytest.approx([0.1, 0.3])
    assert record.tpot_s == pytest.approx(0.4 / 2)
    assert record.e2el_s == pytest.approx(0.9)
    assert not record.first_chunk_is_assumed


def test_a_first_chunk_of_several_tokens_is_respected() -> None:
    record = make_record(times_s=(1.0, 1.2, 1.6), tokens=(4, 2, 2), num_output=8)
    assert record.tpot_s == pytest.approx(0.6 / 4)
    assert record.itls_s == pytest.approx([0.2, 0.4])  # gaps between chunks, as everybody has them


def test_without_counts_by_chunk_the_first_is_taken_as_one_and_said_to_be() -> None:
    record = make_record(times_s=(1.0, 1.2, 1.6), tokens=None, num_output=8)
    assert record.tpot_s == pytest.approx(0.6 / 7)
    assert record.first_chunk_is_assumed
    assert not make_record(times_s=(1.0, 1.2, 1.6), tokens=None, num_output=3).first_chunk_is_assumed
    assert measure([record], (0.0, 2.0)).num_first_chunk_assumed == 1


def test_one_token_or_one_chunk_has_no_tpot() -> None:
    assert make_record(times_s=(1.0,), tokens=(1,), num_output=1).tpot_s is None
    assert make_record(times_s=(1.0,), tokens=(5,), num_output=5).tpot_s is None
    metrics = measure([make_record(times_s=(1.0,), tokens=(1,), num_output=1)], (0.0, 2.0), Slo(tpot_s=0.001))
    assert (metrics.tpot_s, metrics.tpot_pooled_s) == (None, None)
    assert metrics.goodput == pytest.approx(0.5)


def test_mean_and_pooled_tpot_differ_by_the_weight_of_long_requests() -> None:
    short = make_record(0, times_s=(1.0, 2.0), tokens=(1, 1), num_output=2)
    long = make_record(1, times_s=np.linspace(1.0, 2.0, 11).tolist(), tokens=[1] * 11, num_output=11)
    metrics = measure([short, long], (0.0, 2.0))
    assert metrics.tpot_s is not None
    assert metrics.tpot_s.mean == pytest.approx((1.0 + 0.1) / 2)
    assert metrics.tpot_pooled_s == pytest.approx(2.0 / 11)


@pytest.mark.parametrize(("num_tokens", "counts"), [(15, False), (16, True)])
def test_a_request_that_was_cut_off_counts_from_16_tokens_on(num_tokens: int, counts: bool) -> None:
    times_s = [1.0 + 0.1 * token for token in range(num_tokens)]
    record = make_record(times_s=times_s, tokens=[1] * num_tokens, num_output=None, finished=False)
    metrics = measure([record], (0.0, 5.0))
    assert (metrics.num_unfinished, metrics.num_succeeded, metrics.num_failed) == (1, 0, 0)
    assert (metrics.tpot_s is not None) == counts
    if metrics.tpot_s is not None:
        assert metrics.tpot_s.mean == pytest.approx(0.1)


def test_rates_are_of_the_window_and_of_all_requests_in_it() -> None:
    records = [
        make_record(0, role="ramp", sent_s=0.0, times_s=(0.5, 1.0), tokens=(1, 1), num_output=2),
        make_record(1, sent_s=1.0, times_s=(1.5, 2.0, 2.5), tokens=(1, 1, 1), num_output=3),
        make_record(2, role="filler", sent_s=1.0, times_s=(1.5, 4.0), tokens=(1, 1), num_output=2),
        make_record(3, sent_s=2.5, times_s=(2.6, 3.0), tokens=(2, 2), num_output=4),
    ]
    metrics = measure(records, (1.0, 3.0))
    assert metrics.duration_s == pytest.approx(2.0)
    assert metrics.num_output_tokens == 3 + 1 + 4  # with the filler's first; the ramp ends where the window begins
    assert metrics.output_throughput == pytest.approx(8 / 2)
    assert metrics.num_completed_in_window == 2
    assert metrics.request_throughput == pytest.approx(1.0)
    assert metrics.total_throughput == pytest.approx((8 + 20) / 2)
    assert metrics.num_requests == metrics.num_succeeded == 2
    assert metrics.peak_output_throughput == pytest.approx(4.0)  # at 2.0, 2.5 and twice 2.6
    assert metrics.peak_concurrency == 2


def test_failures_are_counted_and_kept_out_of_the_latencies() -> None:
    records = [
        make_record(0),
        make_record(1, error="HTTP 500: no", times_s=(), tokens=(), num_output=None),
        make_record(2, error="ReadError: broken", times_s=(9.0, 30.0), tokens=(1, 1), num_output=None),
        make_record(3, role="filler", error="HTTP 500: no", times_s=(), tokens=(), num_output=None),
    ]
    metrics = measure(records, (0.0, 1.0))
    assert (metrics.num_requests, metrics.num_succeeded, metrics.num_failed) == (3, 1, 3)
    assert metrics.errors == {"HTTP 500: no": 2, "ReadError: broken": 1}
    assert metrics.ttft_s is not None
    assert metrics.ttft_s.num_values == 1
    assert metrics.ttft_s.max == pytest.approx(0.5)


def test_goodput_needs_every_limit() -> None:
    records = [make_record(0), make_record(1, times_s=(0.9, 1.0, 1.1))]
    window = (0.0, 2.0)
    assert measure(records, window).goodput is None
    for text, good in (("ttft:600", 1), ("ttft:1000", 2), ("tpot:99", 0), ("ttft:600,e2el:700.1", 1), ("e2el:650", 0)):
        assert measure(records, window, Slo.parse(text)).goodput == pytest.approx(good / 2), text


@pytest.mark.parametrize("text", ["", "ttft", "ttft:x", "ttft:0", "ttft:nan", "itl:5", "ttft:1,ttft:2"])
def test_a_wrong_slo_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"ttft:MS|could not convert|more than 0"):
        Slo.parse(text)


def test_summary() -> None:
    values = [float(value) for value in range(1, 101)]
    summary = Summary.of(values)
    assert summary is not None
    assert (summary.mean, summary.median, summary.min, summary.max) == (50.5, 50.5, 1.0, 100.0)
    assert summary.p90 == pytest.approx(90.1)
    assert summary.p99 == pytest.approx(99.01)
    assert summary.stddev == pytest.approx(28.866, abs=1e-3)
    assert Summary.of([]) is None

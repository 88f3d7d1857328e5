from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest

from tpserve.coordinator.bench.chart import draw
from tpserve.coordinator.bench.errors import BenchError
from tpserve.coordinator.bench.report import text_block, write_csv
from tpserve.coordinator.bench.results import Run
from tpserve.coordinator.draft_counts import Drafts
from unit.bench.builders import make_point

GOLDEN = """\
============ Serving Benchmark Result ============
Successful requests:                     4         
Failed requests:                         0         
Maximum request concurrency:             8         
Benchmark duration (s):                  2.80      
Total input tokens:                      40        
Total generated tokens:                  84        
Request throughput (req/s):              1.43      
Output token throughput (tok/s):         30.00     
Peak output token throughput (tok/s):    31.00     
Peak concurrent requests:                1         
Total token throughput (tok/s):          44.29     
---------------Time to First Token----------------
Mean TTFT (ms):                          500.00    
Median TTFT (ms):                        500.00    
P90 TTFT (ms):                           500.00    
P99 TTFT (ms):                           500.00    
-----Time per Output Token (excl. 1st token)------
Mean TPOT (ms):                          10.00     
Median TPOT (ms):                        10.00     
P90 TPOT (ms):                           10.00     
P99 TPOT (ms):                           10.00     
---------------Inter-token Latency----------------
Mean ITL (ms):                           10.00     
Median ITL (ms):                         10.00     
P90 ITL (ms):                            10.00     
P99 ITL (ms):                            10.00     
----------------End-to-end Latency----------------
Mean E2EL (ms):                          700.00    
Median E2EL (ms):                        700.00    
P90 E2EL (ms):                           700.00    
P99 E2EL (ms):                           700.00    
-----------------------TP=4-----------------------
Number of GPUs:                          4         
Output token throughput per GPU (tok/s): 7.50      
Pooled TPOT (ms):                        10.00     
Output speed per user (tok/s):           100.00    
Mean TPOT over floor:                    1.25      
=================================================="""


def make_run(tmp_path: Path) -> Run:
    run = Run("2026-01-01T00:00:00+00:00", "abc", "1 x device", {"python": "3"}, {"tp": [4, 8], "seed": 0})
    run.add(make_point("TP=4", 1))
    run.add(make_point("TP=8 spec", 2, 0.02, tp=8, serve_args=("--x", "y"), failed=2, complete=False))
    run.add(make_point("TP=4", None, request_rate=2.5, drafts=Drafts(10, 30, 15, (9, 4, 2))))
    return run


def test_text_block() -> None:
    assert text_block(make_point(floor_tpot_s=0.008)) == GOLDEN


def test_text_block_hides_nothing() -> None:
    text = text_block(make_point(failed=3, complete=False, concurrency=None, request_rate=2.5))
    assert "Failed requests:                         3 " in text
    assert "Request rate configured (RPS):           2.50 " in text
    assert "3 requests failed: HTTP 500: no" in text
    assert "This point was cut short." in text


def test_what_was_drafted_is_shown_as_vllm_does() -> None:
    text = text_block(make_point(drafts=Drafts(10, 30, 15, (9, 4, 2))))
    assert (
        """---------------Speculative Decoding---------------
Acceptance rate (%):                     50.00     
Acceptance length:                       2.50      
Drafts:                                  10        
Draft tokens:                            30        
Accepted tokens:                         15        
Per-position acceptance (%):
  Position 0:                            90.00     
  Position 1:                            40.00     
  Position 2:                            20.00     
"""
        in text
    )


def test_json_round_trip(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    path = tmp_path / "results.json"
    run.save(path)
    assert Run.load(path) == run
    assert [entry.name for entry in tmp_path.iterdir()] == ["results.json"]
    parsed = json.loads(path.read_text())
    assert {"commit", "device", "versions", "arguments"} <= parsed.keys()
    assert dict(zip(parsed["request_columns"], parsed["points"][0]["requests"][1], strict=True)) == {
        "index": 1,
        "prompt_tokens": 10,
        "output_tokens": 21,
        "first_chunk_tokens": 1,
        "ttft_s": 0.5,
        "tpot_s": 0.01,
        "e2el_s": 0.7,
        "error": None,
    }


def test_a_point_measured_again_replaces_the_earlier_one(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    (cut_short,) = (point for point in run.points if not point.complete)
    assert not run.has(*cut_short.key)
    again = make_point("TP=8 spec", 2, 0.03, tp=8, serve_args=("--x", "y"))
    run.add(again)
    assert len(run.points) == 3
    assert run.has(*again.key)
    assert not run.has(again.configuration, 4, None)


def test_csv_has_mlc_columns(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    write_csv(run.points, tmp_path / "results.csv")
    with (tmp_path / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["label"], row["num_concurrent_requests"], row["request_rate"]) for row in rows] == [
        ("TP=4", "1", ""),
        ("TP=8 spec", "2", ""),
        ("TP=4", "", "2.5"),
    ]
    assert float(rows[1]["time_per_output_token_s.quantiles.p50"]) == pytest.approx(0.02)
    assert float(rows[0]["time_to_first_token_s.mean"]) == pytest.approx(0.5)
    assert float(rows[0]["output_token_throughput_per_gpu"]) == pytest.approx(7.5)
    assert rows[1]["num_failed_requests"] == "2"
    for name in ("end_to_end_latency_s", "inter_token_latency_s", "input_tokens", "output_tokens"):
        for key in (
            "quantiles.p25",
            "quantiles.p75",
            "quantiles.p90",
            "quantiles.p95",
            "quantiles.p99",
            "stddev",
            "max",
        ):
            assert float(rows[0][f"{name}.{key}"]) >= 0


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format_version": 1}', '{"format_version": 9}'])
def test_other_files_are_no_results(tmp_path: Path, text: str) -> None:
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(BenchError, match=r"results\.json"):
        Run.load(path)


def test_chart(tmp_path: Path) -> None:
    points = [
        make_point("TP=4", concurrency, tpot_s, tp=4) for concurrency, tpot_s in ((1, 0.008), (8, 0.0095), (64, 0.0175))
    ] + [make_point("TP=8", 30, 0.0125, tp=8)]
    png, svg = tmp_path / "chart.png", tmp_path / "chart.svg"
    assert draw(points, "a title", [png, svg])
    assert png.read_bytes().startswith(b"\x89PNG")
    # Text is drawn as paths; what it says stands beside it in comments.
    said = {text.strip() for text in re.findall(r"<!--(.*?)-->", svg.read_text())}
    expected = {"a title", "TP=4", "TP=8", "1", "8", "64", "30", "50 tok/s", "70 tok/s", "100 tok/s", "Mean TPOT (s)"}
    assert expected <= said
    assert not draw([], "nothing", [tmp_path / "none.png"])
    assert not (tmp_path / "none.png").exists()

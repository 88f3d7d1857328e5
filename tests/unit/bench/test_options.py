from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from tpserve.coordinator.bench.client import trusting
from tpserve.coordinator.bench.errors import BenchError
from tpserve.coordinator.bench.options import Options, add_arguments, concurrencies, parse
from tpserve.coordinator.bench.results import Configuration
from tpserve.coordinator.bench.server import serve_command


def options(*arguments: str) -> Options:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parse(parser.parse_args(arguments))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1..64", (1, 2, 4, 8, 16, 32, 64)),
        ("1,2,8", (1, 2, 8)),
        ("4..30", (4, 8, 16, 30)),
        ("1,4..16,60", (1, 4, 8, 16, 60)),
        ("7", (7,)),
    ],
)
def test_concurrencies(text: str, expected: tuple[int, ...]) -> None:
    assert concurrencies(text) == expected


@pytest.mark.parametrize("text", ["", "0", "8..4", "1..", "x", "1,,2"])
def test_wrong_concurrencies(text: str) -> None:
    with pytest.raises((ValueError, argparse.ArgumentTypeError)):
        concurrencies(text)


def test_configurations_are_degrees_times_variants() -> None:
    chosen = options(
        "m",
        "--tp",
        "4,8",
        "--quantization",
        "a,b",
        "--serve-args=",
        "--serve-args=spec: --spec 'x y'",
        "--floor",
        "8:2",
    )
    assert [configuration.label for configuration in chosen.configurations] == [
        f"TP={tp} {quantization}{variant}" for tp in (4, 8) for quantization in "ab" for variant in ("", " spec")
    ]
    last = chosen.configurations[-1]
    assert last == Configuration("TP=8 b spec", 8, 8, "b", ("--spec", "x y"), floor_tpot_s=0.002)
    expected = "serve m --tp 8 --port 0 --max-num-seqs 64 --quantization b --no-prefix-cache --spec".split()
    assert serve_command("m", last, max_num_seqs=64, prefix_cache=False)[3:] == [*expected, "x y"]
    assert "--mode" in serve_command("m", last, max_num_seqs=None, prefix_cache=True)


def test_ways_to_speculate_are_configurations() -> None:
    chosen = options("m", "--tp", "2", "--draft-model", "d", "--draft-tp", "1,2", "--spec", "off,3,auto")
    plain, *drafting = chosen.configurations
    assert (plain.label, plain.serve_args) == ("TP=2", ())
    labels = ["draft 3 TP=1", "draft 3 TP=2", "draft auto TP=1", "draft auto TP=2"]
    assert [configuration.label for configuration in drafting] == [f"TP=2 {label}" for label in labels]
    flags = ("--draft-model", "d", "--draft-tp", "2", "--num-speculative-tokens", "3")
    assert drafting[1].serve_args == flags
    plain, ngram = options("m", "--spec-method", "ngram").configurations
    assert (plain.serve_args, ngram.label) == ((), "TP=1 ngram auto")
    assert ngram.serve_args == ("--spec-method", "ngram", "--num-speculative-tokens", "auto")


@pytest.mark.parametrize("text", ["0", "9", "some", "3,x"])
def test_wrong_draft_lengths(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        options("m", "--spec-method", "ngram", "--spec", text)
    assert "is not off, auto, mlc or 1 to 8" in capsys.readouterr().err


def test_an_endpoint_is_one_configuration() -> None:
    chosen = options("--base-url", "http://h:1", "--num-gpus", "4", "--label", "other", "--model", "name")
    assert chosen.configurations == (Configuration("other", 4, base_url="http://h:1"),)
    assert chosen.model == "name"


def test_loads() -> None:
    closed = options("m", "--concurrency", "1,8").loads()
    assert [(c, load.concurrency, load.num_requests, load.num_warmups) for c, _, load in closed] == [
        (1, 1, 8, 1),
        (8, 8, 24, 8),
    ]
    assert len({load.salt for *_, load in closed}) == 2
    opened = options("m", "--request-rate", "1,2.5", "--num-requests", "10", "--num-warmups", "2").loads()
    assert [(rate, load.num_requests, load.num_warmups) for _, rate, load in opened] == [(1.0, 10, 2), (2.5, 10, 2)]
    assert opened[0][2].arrivals_s != opened[1][2].arrivals_s


def test_a_trace_brings_its_own_times(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    rows = [{"timestamp": 1000 * second, "input_length": 5, "output_length": 6} for second in range(4)]
    path.write_text("\n".join(map(json.dumps, rows)))
    arguments = ("m", "--dataset", "trace", "--dataset-path", str(path))
    ((concurrency, rate, load),) = options(*arguments, "--trace-scale", "0.5", "--num-requests", "3").loads()
    assert (concurrency, rate, load.arrivals_s) == (None, None, (0.0, 0.5, 1.0))
    with pytest.raises(BenchError, match="trace says itself"):
        options(*arguments, "--concurrency", "4")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give a MODEL"),
        (("m", "--spec", "4"), "need a proposer: give --draft-model, or --spec-method"),
        (("m", "--draft-tp", "2"), "need a proposer"),
        (("--base-url", "http://x", "--spec-method", "ngram"), "not for --base-url"),
        (("--base-url", "http://x", "--serve-args=--y"), "not for --base-url"),
        (("m", "--concurrency", "1", "--request-rate", "1"), "not both"),
        (("m", "--dataset", "sharegpt"), "needs --dataset-path"),
        (("m", "--endpoint", "chat"), "takes text"),
        (("m", "--dataset-path", "nowhere.json"), "nowhere.json"),
    ],
)
def test_what_does_not_fit_together(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(BenchError, match=message):
        options(*arguments)


def test_authorities_are_those_of_an_endpoint(tmp_path: Path) -> None:
    ca_certs = tmp_path / "ca.pem"
    given = options("--base-url", "https://h:1", "--ssl-ca-certs", str(ca_certs))
    assert given.ca_certs == ca_certs
    json.dumps(given.arguments)  # as the report has them
    with pytest.raises(BenchError, match="--ssl-ca-certs is for --base-url"):
        options("m", "--ssl-ca-certs", str(ca_certs))
    with pytest.raises(BenchError, match=r"--ssl-ca-certs .*ca\.pem cannot be used"):
        trusting(ca_certs)

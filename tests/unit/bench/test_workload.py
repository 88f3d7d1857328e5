from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tpserve.coordinator.bench.errors import BenchError
from tpserve.coordinator.bench.workload import (
    FIRST_TOKEN_ID,
    SHARED_LENGTHS,
    fixed,
    from_lengths,
    from_sharegpt,
    from_trace,
    poisson_arrivals,
)


def test_requests_follow_from_seed_salt_and_number() -> None:
    work = from_lengths(SHARED_LENGTHS, seed=1)
    item = work.item(7, salt=3)
    assert item == from_lengths(SHARED_LENGTHS, seed=1).item(7, salt=3)
    others = [from_lengths(SHARED_LENGTHS, seed=2).item(7, 3), work.item(7, 4), work.item(8, 3)]
    assert all(other.prompt != item.prompt for other in others)
    assert all(FIRST_TOKEN_ID <= token < 32000 for token in item.prompt if isinstance(token, int))


def test_the_shared_lengths_are_taken_in_order_and_again() -> None:
    lengths = json.loads(SHARED_LENGTHS.read_text())
    work = from_lengths(SHARED_LENGTHS, seed=9)
    assert len(work) == 1024
    for index in (0, 5, 1023, 1024):
        item = work.item(index, 0)
        place = index % 1024
        expected = (lengths["prompt_len"][place], lengths["output_len"][place])
        assert (item.num_prompt_tokens, item.num_output_tokens) == expected
    assert work.item(0, 0).prompt != work.item(1024, 0).prompt[: work.item(0, 0).num_prompt_tokens]


def test_npz_pairs_are_drawn_by_the_seed(tmp_path: Path) -> None:
    path = tmp_path / "lengths.npz"
    pairs = np.array([[number, 2 * number] for number in range(1, 51)], dtype=np.uint16)
    np.savez(path, first_turn_human=np.ones((1, 2)), first_turn_all=pairs)
    work = from_lengths(path, seed=4)
    assert work.prompt_lengths is not None
    assert sorted(work.prompt_lengths) == list(range(1, 51))
    assert all(2 * prompt == output for prompt, output in zip(work.prompt_lengths, work.output_lengths, strict=True))
    assert work == from_lengths(path, seed=4) != from_lengths(path, seed=5)


def test_sharegpt_keeps_first_turns_of_fitting_length(tmp_path: Path) -> None:
    def conversation(prompt: str, answer: str, who: str = "human") -> dict[str, object]:
        return {"conversations": [{"from": who, "value": prompt}, {"from": "gpt", "value": answer}]}

    good = [conversation(f"a prompt number {number}", "answer " * 20) for number in range(5)]
    bad = [
        conversation("hi", "answer " * 20),
        conversation("long " * 2000, "answer " * 20),
        conversation("a prompt number x", "long " * 4000),
        conversation("a prompt number y", "answer " * 20, who="gpt"),
        {"conversations": []},
    ]
    path = tmp_path / "sharegpt.json"
    path.write_text(json.dumps(bad + good))
    work = from_sharegpt(path, seed=2)
    assert work.texts is not None
    assert sorted(work.texts) == [f"a prompt number {number}" for number in range(5)]
    assert set(work.output_lengths) == {35}  # 140 characters
    assert work == from_sharegpt(path, seed=2)
    assert work.item(6, 0).prompt == work.texts[1]
    assert work.item(6, 0).num_prompt_tokens is None
    path.write_text(json.dumps(bad))
    with pytest.raises(BenchError, match="no conversation is left"):
        from_sharegpt(path)


def test_traces_of_both_forms(tmp_path: Path) -> None:
    lines = [
        {"timestamp": 27500, "input_length": 30, "output_length": 5, "hash_ids": [1]},
        {"timestamp": 27000, "input_length": 10, "output_length": 4},
    ]
    jsonl = tmp_path / "trace.jsonl"
    jsonl.write_text("\n".join(map(json.dumps, lines)) + "\n")
    table = tmp_path / "trace.csv"
    rows = ["2023-11-16 18:15:46.6805900,10,4", "2023-11-16 18:15:47.1805900,30,5"]
    table.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]))
    for path in (jsonl, table):
        work = from_trace(path)
        assert (work.prompt_lengths, work.output_lengths) == ((10, 30), (4, 5))
        assert work.arrivals_s == pytest.approx((0.0, 0.5))


def test_broken_files_are_told(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    for text in ("", "[]", "{}", '{"prompt_len": [], "output_len": []}', '{"prompt_len": [0], "output_len": [1]}'):
        path.write_text(text)
        with pytest.raises(BenchError, match=r"x\.json"):
            from_lengths(path)
    for read in (from_lengths, from_sharegpt, from_trace):
        with pytest.raises(BenchError, match="nowhere"):
            read(tmp_path / "nowhere.json")
    path.write_text('{"timestamp": 1}\n')
    with pytest.raises(BenchError, match="not a trace"):
        from_trace(path)


def test_poisson_arrivals() -> None:
    arrivals = poisson_arrivals(4.0, 4001, seed=1)
    assert arrivals == poisson_arrivals(4.0, 4001, seed=1)
    assert arrivals[0] == 0.0
    gaps = np.diff(arrivals)
    assert gaps.min() >= 0
    assert gaps.mean() == pytest.approx(0.25, rel=0.05)
    assert gaps.std() == pytest.approx(0.25, rel=0.05)  # of an exponential, mean and deviation are the same
    assert len(poisson_arrivals(1.0, 1, seed=0)) == 1


def test_fixed() -> None:
    work = fixed(100, 500)
    assert (work.item(3, 1).num_prompt_tokens, work.item(3, 1).num_output_tokens) == (100, 500)
    assert work.item(3, 1).prompt != work.item(4, 1).prompt

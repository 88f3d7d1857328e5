"""The benchmark of speculation on GPUs without one: its knob on the host, and its figures of simulated ranks."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections import deque
from dataclasses import dataclass, field, replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from scripts import ROOT
from simulated_worker import VOCAB_SIZE, SimulatedWorker, _Slot, _Work
from tiny_models import MODELS
from tpserve.coordinator.config import SchedulerConfig
from tpserve.proto.manifest import Manifest
from tpserve.proto.messages import StepPlan, StepResult
from worker_builders import make_manifest

sys.path.append(str(ROOT))

from benchmarks.gpu_decode import pages_for
from benchmarks.gpu_speculation import Bench, Floors, expected_accept_length

Ints = npt.NDArray[np.int32]
DRAFT_S, VERIFY_S = 0.003, 0.005


@pytest.fixture(scope="module")
def knob(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    library = tmp_path_factory.mktemp("knob") / "knob.so"
    source = Path(__file__).with_name("synthetic_acceptance.cpp")
    command = ["c++", "-std=c++17", "-O1", "-shared", "-fPIC", f"-I{ROOT / 'benchmarks'}"]
    subprocess.run([*command, str(source), "-o", str(library)], check=True, timeout=60)
    loaded = ctypes.CDLL(str(library))
    loaded.bits.restype = ctypes.c_uint
    return loaded


def threshold_of(rate: float) -> int:
    return min(round(rate * 2**32), 2**32 - 1)


def test_a_draft_token_is_right_as_the_hash_says(knob: ctypes.CDLL) -> None:
    rng = np.random.default_rng(3)
    slots, drafts, most, vocab, salt = 6, 3, 5, 9, 77
    draft_tokens = rng.integers(0, vocab, (slots, most), np.int32)
    draft_tokens[4, 1] = -1  # the draft has none
    sample_slots = np.repeat(np.asarray([2, 0, -1, 4, 5], np.int32), 1 + drafts)
    positions = rng.integers(1, 500, len(sample_slots), np.int32)
    before = rng.integers(0, vocab, len(sample_slots), np.int32)
    before[1] = -1  # logits with a NaN
    after = before.copy()
    arrays = [ctypes.c_void_p(array.ctypes.data) for array in (draft_tokens, sample_slots, positions, after)]
    limit = ctypes.c_uint(threshold_of(0.5))
    knob.synthesize(len(after), drafts, arrays[0], most, *arrays[1:3], limit, ctypes.c_uint(salt), vocab, arrays[3])
    seen = set()
    for row, (slot, token) in enumerate(zip(sample_slots.tolist(), after.tolist(), strict=True)):
        index = row % (1 + drafts)
        drafted = draft_tokens[slot, index] if slot >= 0 and index < drafts else -1
        if drafted < 0 or before[row] < 0:
            assert token == before[row]
            continue
        right = knob.bits(slot, int(positions[row]), salt) < threshold_of(0.5)
        assert (token == drafted) == right
        assert 0 <= token < vocab
        seen.add(right)
    assert seen == {True, False}


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.6, 0.8, 1.0])
def test_its_rate_is_the_one_that_was_set(knob: ctypes.CDLL, rate: float) -> None:
    """Also of runs of neighbours, which decide how long an accepted draft is."""
    found = [knob.bits(slot, position, 1) < threshold_of(rate) for slot in range(32) for position in range(257, 385)]
    assert abs(np.mean(found) - rate) < 0.02
    pairs = [first and second for first, second in pairwise(found)]
    assert abs(np.mean(pairs) - rate**2) < 0.03


@dataclass(slots=True)
class _Worker(SimulatedWorker):
    """Drafts as many tokens as it can, and accepts them as the knob does."""

    knob: Any = None
    rate: float = 0.0
    salt: int = 0

    def _decode(self, plan: StepPlan, number: int, slot: _Slot) -> _Work:
        assert slot.last_token is not None
        assert slot.next_position is not None
        first = slot.next_position
        count = max(0, min(plan.num_draft_tokens, slot.max_len - first - 2))
        right = [self.knob.bits(number, first + 1 + i, self.salt) < threshold_of(self.rate) for i in range(count)]
        return _Work(number, first, (slot.last_token,), count, [*right, False].index(False))


@dataclass(slots=True)
class _Ranks:
    """A `RankGroup` of one simulated rank."""

    worker: _Worker
    distrusted: bool = False
    _results: deque[StepResult] = field(default_factory=deque)
    _next_step: int = 1

    def submit(self, plan: StepPlan) -> None:
        result = self.worker.execute(replace(plan, step_id=self._next_step))
        self._results.append(replace(result, step_id=plan.step_id))
        self._next_step += 1

    def wait(self) -> StepResult:
        return self._results.popleft()

    def call(self, method: str, *arguments: Any) -> list[Any]:
        if method == "round_times":
            return [[(DRAFT_S, VERIFY_S)] * 9]
        assert method == "set_acceptance"
        rate, self.worker.salt = arguments
        self.worker.rate = rate / 2 if self.distrusted else rate
        return [None]

    def clear(self) -> None:
        self.worker.slots.clear()


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    folder: Path = tmp_path_factory.mktemp("model")
    MODELS["llama_4q_2kv"].write(folder)
    sizes = {"max_model_len": 512, "max_num_batched_tokens": 512, "max_num_seqs": 8, "max_num_rows": 48}
    return replace(make_manifest(folder, 1), vocab_size=VOCAB_SIZE, **sizes)  # type: ignore[arg-type]


def make_bench(knob: Any, manifest: Manifest, *, distrusted: bool = False) -> Bench:
    num_pages = pages_for(manifest, 8, 16 + 2 * 6)
    config = SchedulerConfig(
        max_num_seqs=manifest.max_num_seqs,
        max_num_batched_tokens=manifest.max_num_batched_tokens,
        max_model_len=manifest.max_model_len,
        page_size=manifest.kv.page_size,
        num_pages=num_pages,
        max_num_draft_tokens=5,
        drafts_on_device=True,
    )
    ranks: Any = _Ranks(_Worker(config, 1, knob=knob), distrusted)
    return Bench(ranks, manifest, num_pages, Floors(draft_ms=0.5, target_ms=2.5))


@pytest.mark.parametrize("concurrency", [1, 8])
def test_figures_are_those_of_the_rate(knob: ctypes.CDLL, manifest: Manifest, concurrency: int) -> None:
    bench = make_bench(knob, manifest)
    plain = bench.plain(concurrency)
    assert plain["ratio_to_floor"] == pytest.approx(plain["tpot_ms"] / 2.5)
    for length, rate in product([1, 3, 5], [0.6, 0.8]):
        point = bench.speculate(concurrency, length, rate)
        assert point["expected_accept_length"] == expected_accept_length(rate, length)
        assert point["mean_accept_length"] == pytest.approx(1 + length * point["accept_rate"])
        assert point["mean_accept_length"] == pytest.approx(point["expected_accept_length"], rel=0.1)
        assert point["draft_ms"] == pytest.approx(3.0)
        assert point["verify_ms"] == pytest.approx(5.0)
        assert point["draft_ratio_to_floor"] == pytest.approx(3.0 / length / 0.5)
        assert point["verify_ratio_to_floor"] == pytest.approx(2.0)
        assert 0 < point["tpot_ms"] < point["round_ms"] * 2


def test_a_knob_that_does_something_else_ends_it(knob: ctypes.CDLL, manifest: Manifest) -> None:
    bench = make_bench(knob, manifest, distrusted=True)
    with pytest.raises(RuntimeError, match=r"C=8, K=3: .* tokens a round where a rate of 0.8 gives 2.95"):
        bench.speculate(8, 3, 0.8)


def test_the_mean_length_is_that_of_the_paper() -> None:
    assert expected_accept_length(0.8, 5) == pytest.approx((1 - 0.8**6) / (1 - 0.8))
    assert expected_accept_length(1.0, 5) == 6

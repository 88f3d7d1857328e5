"""Logits of tiny models of every family on real tensor-parallel groups, against transformers and against themselves."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from rank_group import Artifacts, Logits, RankGroup, RankProcesses
from tiny_models import GOLDEN_POSITIONS, MODELS, NUM_PROMPT_TOKENS, TinyModel
from tpserve.proto.messages import PromptChunk, SamplingParams, SlotAdd, StepPlan

logger = logging.getLogger(__name__)

GOLDENS = Path(__file__).parents[2] / "goldens"
PAGE = 16
PAGES_PER_SLOT = 16  # 256 positions
GREEDY = SamplingParams(temperature=0.0)
TOLERANCE = 1e-3
"""Relative to the largest logit."""
WRONG_BY = 1e-2
"""What any mistake in mask, angle, split or bias exceeds by far; the tolerance is far below it."""

TP_SIZES = (1, 2, 4)
CASES = [(name, tp, "tuned") for name in MODELS for tp in TP_SIZES]
CASES += [("llama_9q_3kv_tied", 8, "tuned"), ("llama_8q_1kv_biases", 8, "tuned")]
CASES += [(name, 1, "portable") for name in MODELS]
CASES += [("llama_9q_3kv_tied", 2, "portable")]


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model running on a group."""

    model: TinyModel
    group: RankGroup
    sha256: str

    def run(self, *slots: tuple[int, list[list[int]]], shared: int = 0) -> list[Logits]:
        """Run slots at once, each given as chunks of its tokens, step by step; return the logits of last chunks.

        Parameters
        ----------
        slots
            Slot and its chunks; a slot with fewer chunks starts later, so that all end in the same step.
        shared
            Pages that every slot but the first has from the first, instead of its own.

        Returns
        -------
        list of (num slots, vocabulary)
            By rank.
        """
        self.group.clear()
        num_steps = max(len(chunks) for _, chunks in slots)
        first = slots[0][0]
        for step in range(num_steps):
            added, run = [], []
            for slot, chunks in slots:
                at = step - (num_steps - len(chunks))
                if at < 0:
                    continue
                start = sum(map(len, chunks[:at]))
                if slot != first and shared:
                    start += shared * PAGE
                if at == 0:
                    pages = list(range(slot * PAGES_PER_SLOT, (slot + 1) * PAGES_PER_SLOT))
                    if slot != first:
                        pages[:shared] = range(first * PAGES_PER_SLOT, first * PAGES_PER_SLOT + shared)
                    added.append(SlotAdd(slot, GREEDY, tuple(pages)))
                run.append(PromptChunk(slot, start, tuple(chunks[at]), sample=step == num_steps - 1))
            plan = StepPlan(0, added_slots=tuple(added), chunks=tuple(run))
            if step == num_steps - 1:
                return [logits[:, : self.model.config["vocab_size"]] for logits in self.group.logits(plan)]
            self.group.execute(plan)
        raise AssertionError("no slots")


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-tp{case[1]}-{case[2]}")
def loaded(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    artifacts: Artifacts,
    rank_processes: RankProcesses,
) -> Iterator[Loaded]:
    name, tp_size, kernels = request.param
    folder = tmp_path_factory.mktemp(name)
    sha256 = MODELS[name].write(folder)
    artifact = artifacts.build(folder, tp_size, kernels=kernels)
    with rank_processes.group(folder, artifact, tp_size, num_pages=16 * PAGES_PER_SLOT) as group:
        yield Loaded(MODELS[name], group, sha256)


def test_logits_are_those_of_transformers_on_all_ranks(loaded: Loaded) -> None:
    golden = np.load(GOLDENS / f"tiny_{loaded.model.name}.npz")
    assert str(golden["weights_sha256"]) == loaded.sha256, "the random weights are not those of the golden"
    prompt = loaded.model.prompt()
    # Each prefix in a slot of its own, all in one step.
    ranks = loaded.run(*((slot, [prompt[: end + 1]]) for slot, end in enumerate(GOLDEN_POSITIONS)))
    for other in ranks[1:]:
        np.testing.assert_array_equal(other, ranks[0])
    expected = golden["logits"]
    error = float(np.abs(ranks[0] - expected).max() / np.abs(expected).max())
    logger.info("largest error relative to the largest logit: %.2g", error)
    assert error < TOLERANCE


def test_chunks_and_company_change_no_bit(loaded: Loaded) -> None:
    prompt = loaded.model.prompt()
    alone = loaded.run((0, [prompt]))[0]
    chunkings = ([1, 159], [159, 1], [16] * 10, [7, 9, 17, 64, 63], [100, *[1] * 60])
    for sizes in chunkings:
        ends = np.cumsum(sizes)
        chunks = [prompt[end - size : end] for size, end in zip(sizes, ends, strict=True)]
        np.testing.assert_array_equal(loaded.run((3, chunks))[0], alone, err_msg=f"chunks of {sizes}")
    # Other sequences in the same steps, before and after it in the batch.
    others = [prompt[::-1], prompt[5:90], prompt[:1]]
    half = [prompt[:50], prompt[50:]]
    together = loaded.run((2, [others[0]]), (5, half), (1, [others[1][:30], others[1][30:]]), (7, [others[2]]))[0]
    np.testing.assert_array_equal(together[1:2], alone)
    for row, tokens in zip((0, 2, 3), others, strict=True):
        np.testing.assert_array_equal(together[row : row + 1], loaded.run((0, [tokens]))[0])


def test_shared_pages_are_as_good_as_computed_ones(loaded: Loaded) -> None:
    prompt = loaded.model.prompt()
    shared = 3
    other = prompt[: shared * PAGE] + prompt[::-1][:40]
    whole = loaded.run((0, [other]))[0]
    both = loaded.run((4, [prompt]), (2, [other[shared * PAGE :]]), shared=shared)[0]
    np.testing.assert_array_equal(both[1:], whole)
    np.testing.assert_array_equal(both[:1], loaded.run((0, [prompt]))[0])


def test_the_golden_models_feel_mistakes() -> None:
    """Every position's logits differ from its neighbours' by far more than the tolerance: the check can fail."""
    for name in MODELS:
        logits = np.load(GOLDENS / f"tiny_{name}.npz")["logits"]
        scale = np.abs(logits).max()
        for one, two in itertools.pairwise(logits):
            assert np.abs(one - two).max() / scale > WRONG_BY
    assert max(GOLDEN_POSITIONS) == NUM_PROMPT_TOKENS - 1

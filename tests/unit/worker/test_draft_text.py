"""What a target with a draft model emits: plain decoding's text, with its distribution, in fewer steps."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from draft_pairs import MOST, NUM_SLOTS, Pairs, started
from rank_group import Artifacts
from speculating import GREEDY, VOCAB, Driver, PlainDecoding, Text, assert_same, varied_texts
from tiny_models import knob_pair
from tpserve.proto.messages import PromptChunk, SamplingParams, SlotAdd, StepPlan
from tpserve.proto.rank import RankConfig
from tpserve.worker import verify as verify_module
from tpserve.worker.arrays import Array
from tpserve.worker.batch import DraftTokens
from tpserve.worker.errors import LibraryError, WorkerError
from tpserve.worker.proposers.draft import DraftModel
from tpserve.worker.runner import Runner


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory, artifacts: Artifacts) -> Pairs:
    return Pairs(tmp_path_factory.mktemp("pairs"), artifacts)


def prompts(seed: int, count: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(VOCAB) for _ in range(rng.randrange(3, 20))] for _ in range(count)]


@pytest.mark.parametrize("seed", [20, 21, 22])
def test_text_and_logprobs_are_those_of_plain_decoding(pairs: Pairs, seed: int) -> None:
    config = pairs.config(0.1)
    texts = varied_texts(seed, 20)
    rng = random.Random(seed)
    with started(config) as runner:
        driver = Driver(runner, num_slots=NUM_SLOTS, caches=True)
        driver.run(texts, lambda step: MOST if step < 20 else rng.randrange(MOST + 1))
        again = [text.again(start_step=0) for text in texts]  # finds pages in the prefix cache
        driver.run(again, 3)
    with started(replace(config, speculation=None)) as runner:
        expected = PlainDecoding(Driver(runner, num_slots=NUM_SLOTS, speculates=False)).of(texts)
    assert sum(map(sum, (text.drafted for text in texts))) > 100
    assert_same(texts, expected)
    assert_same(again, expected)


def accept_rate(config: RankConfig, sampling: SamplingParams) -> float:
    texts = [
        Text(prompt, replace(sampling, seed=seed), max_tokens=80) for seed, prompt in enumerate(prompts(5, NUM_SLOTS))
    ]
    with started(config) as runner:
        Driver(runner, num_slots=NUM_SLOTS).run(texts, MOST)
    drafted = accepted = 0
    for text in texts:
        for count, num_drafted in zip(text.counts, text.drafted, strict=True):
            # Those behind a rejected one were not looked at.
            drafted += min(num_drafted, count)
            accepted += max(0, count - 1)
    assert drafted > 100
    return accepted / drafted


@pytest.mark.parametrize("sampling", [GREEDY, SamplingParams()], ids=["greedy", "temperature 1"])
def test_acceptance_falls_as_the_knob_is_turned(pairs: Pairs, sampling: SamplingParams) -> None:
    rates = [accept_rate(pairs.config(later), sampling) for later in (0.0, 0.05, 0.1, 0.3)]
    assert rates[0] == 1.0
    assert all(high > low for high, low in itertools.pairwise(rates))
    assert 0.2 < rates[-1] < 0.9


def test_a_round_costs_no_draft_step_beside_its_tokens(pairs: Pairs, monkeypatch: pytest.MonkeyPatch) -> None:
    """With every draft accepted: one forward for each token drafted, the first with the one that was not computed."""
    text = Text([1, 2, 3, 4, 5], max_tokens=1 + 5 * 4)
    sizes: list[int] = []
    with started(pairs.config(0.0)) as runner:
        assert runner._speculator is not None
        draft = runner._speculator._proposer
        assert isinstance(draft, DraftModel)
        forward = draft._model.step

        def counted(token_ids: Array, *rest: Any) -> Any:
            sizes.append(len(token_ids))
            return forward(token_ids, *rest)

        monkeypatch.setattr(draft._model, "step", counted)
        driver = Driver(runner)
        driver.run([text], MOST)
    assert text.counts == [1, 5, 5, 5, 5]
    # Nothing while the prompt ran; then the prompt with the first token, and two tokens at the start of each round.
    assert sizes == [6, 1, 1, 1, *[2, 1, 1, 1] * 3]
    assert [result.draft_us > 0 for result in driver.results] == [False, True, True, True, True, False]


FEW = 6
"""Tokens of the small vocabulary."""
PROMPT = [1, 4, 2, 0, 3]
BATCH = 48
NUM_SAMPLES = 84 * BATCH


def distribution(logits: Array, sampling: SamplingParams) -> Array:
    """What a row of logits is sampled from: temperature, then the smallest set of tokens with `top_p` of the mass."""
    scaled = logits[:FEW].astype(np.float64) / sampling.temperature
    weights = np.exp(scaled - scaled.max())
    probabilities = weights / weights.sum()
    order = np.argsort(-probabilities, kind="stable")
    needed = int(np.argmax(np.cumsum(probabilities[order]) >= sampling.top_p - 1e-12)) + 1
    kept = np.zeros(FEW)
    kept[order[:needed]] = probabilities[order[:needed]]
    out: Array = kept / kept.sum()
    return out


class ExactModel:
    """The distributions of a model behind any prefix."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._step = 0

    def after(self, prefix: Sequence[int], sampling: SamplingParams) -> Array:
        """(FEW,) float64."""
        self._step += 2
        chunk = PromptChunk(0, 0, tuple(prefix), sample=True)
        plan = StepPlan(self._step - 1, added_slots=(SlotAdd(0, sampling, (0,)),), chunks=(chunk,))
        arrays, logits = self._runner.forward(plan)
        row = np.from_dlpack(logits)[0].copy()
        self._runner.sample(arrays, logits)
        self._runner.execute(StepPlan(self._step, removed_slots=(0,)))
        return distribution(row, sampling)

    def second_and_third(self, prompt: list[int], sampling: SamplingParams) -> Array:
        """The joint distribution of the second and the third token of the output, (FEW, FEW)."""
        joint = np.zeros((FEW, FEW))
        for one, of_one in enumerate(self.after(prompt, sampling)):
            if of_one == 0.0:
                continue
            for two, of_two in enumerate(self.after([*prompt, one], sampling)):
                if of_two > 0.0:
                    joint[two] += of_one * of_two * self.after([*prompt, one, two], sampling)
        return joint


def chi_square(observed: Array, expected: Array) -> tuple[float, float]:
    """Return the statistic, and what it exceeds once in 30000 times (Wilson and Hilferty, 1931).

    Cells that are expected less than five times are one cell.
    """
    observed, expected = observed.ravel(), expected.ravel()
    if observed[expected == 0.0].any():
        return math.inf, 0.0
    rare = expected < 5.0
    expected = np.append(expected[~rare], expected[rare].sum())
    observed = np.append(observed[~rare], observed[rare].sum())
    if expected[-1] < 5.0:
        expected, observed = expected[:-1], observed[:-1]
    freedom = len(expected) - 1
    limit = freedom * (1 - 2 / (9 * freedom) + 4.0 * (2 / (9 * freedom)) ** 0.5) ** 3
    return float(((observed - expected) ** 2 / expected).sum()), limit


@pytest.fixture(scope="module")
def small(pairs: Pairs) -> Iterator[tuple[Runner, ExactModel, ExactModel]]:
    """A target with a draft that often errs, over six tokens; and what both say exactly."""
    config = pairs.config(0.7, vocab_size=FEW, num_slots=BATCH, draft_tokens=512)
    draft = pairs.alone(knob_pair(0.7, vocab_size=FEW)[1], f"draft-{FEW}", 64)
    with (
        started(config) as runner,
        started(replace(config, speculation=None)) as target_alone,
        started(draft) as draft_alone,
    ):
        yield runner, ExactModel(target_alone), ExactModel(draft_alone)


def sampled_pairs(runner: Runner, sampling: SamplingParams) -> tuple[Array, float]:
    """How often each second and third token came, (FEW, FEW), and the share of drafts that were accepted whole."""
    runner._next_step_id = None  # each run counts its steps from one
    texts = [
        Text(PROMPT, replace(sampling, seed=seed), max_tokens=4, start_step=2 * (seed // BATCH))
        for seed in range(NUM_SAMPLES)
    ]
    Driver(runner, num_slots=BATCH, num_pages=64).run(texts, 2)
    counts = np.zeros((FEW, FEW))
    for text in texts:
        counts[text.output[1], text.output[2]] += 1
    assert all(text.drafted[1] == 2 for text in texts)
    return counts, float(np.mean([text.counts[1] == 3 for text in texts]))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.5])
@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_what_is_sampled_has_the_targets_distribution(
    small: tuple[Runner, ExactModel, ExactModel], temperature: float, top_p: float
) -> None:
    """Chi-square of the second and third token over thousands of seeds."""
    runner, target, draft = small
    sampling = SamplingParams(temperature=temperature, top_p=top_p)
    counts, accepted = sampled_pairs(runner, sampling)
    exact = target.second_and_third(PROMPT, sampling)
    statistic, limit = chi_square(counts, NUM_SAMPLES * exact)
    assert statistic < limit
    # It is not easy: the draft says something else, and is often right all the same.
    assert np.abs(exact - draft.second_and_third(PROMPT, sampling)).sum() / 2 > 0.15
    assert 0.05 < accepted < 0.8


def test_a_wrong_distribution_is_seen(
    small: tuple[Runner, ExactModel, ExactModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same with each draft token taken for right: the second token is, the third follows another one."""

    def accept_always(drafted: DraftTokens, alive: Array, wave: int, token_ids: Array) -> Array:
        accepted: Array = alive < len(drafted.counts)
        accepted[accepted] = drafted.counts[alive[accepted]] > wave
        return accepted

    runner, target, _ = small
    monkeypatch.setattr(verify_module, "_accepted", accept_always)
    counts, _ = sampled_pairs(runner, SamplingParams())
    statistic, limit = chi_square(counts, NUM_SAMPLES * target.second_and_third(PROMPT, SamplingParams()))
    assert statistic > 3 * limit


def test_a_draft_that_does_not_fit_is_refused(pairs: Pairs) -> None:
    config = pairs.config(0.3)
    wanted = config.speculation
    assert wanted is not None
    other = pairs.config(0.7, vocab_size=FEW, num_slots=BATCH, draft_tokens=512).speculation
    assert other is not None
    few_tokens = pairs.alone(knob_pair(0.3)[1], f"draft-{VOCAB}", NUM_SLOTS - 1).artifact_dir
    wrong: list[tuple[dict[str, Any], type[WorkerError], str]] = [
        (
            {"draft_model_dir": None},
            WorkerError,
            "method draft needs a draft model and its library: give --draft-model",
        ),
        ({"draft_tp_size": 2}, WorkerError, "the draft's TP degree 2 does not divide the target's 1"),
        ({"draft_model_dir": other.draft_model_dir}, LibraryError, "model_config_sha256 is .* compile again"),
        (
            {"draft_model_dir": other.draft_model_dir, "draft_artifact_dir": other.draft_artifact_dir},
            WorkerError,
            "the draft has 6 tokens and the target 200: give a draft with the same vocabulary",
        ),
        (
            {"draft_artifact_dir": few_tokens},
            WorkerError,
            "the draft's library takes 5 tokens in a step, 6 sequences need as many",
        ),
    ]
    for changes, error, message in wrong:
        with pytest.raises(error, match=message):
            Runner(replace(config, speculation=replace(wanted, **changes)), lambda done, total: None)

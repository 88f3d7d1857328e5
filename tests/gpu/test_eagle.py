"""EAGLE-3 heads on GPUs: draft logits against float64's, and texts of a model with which its head agrees.

The libraries are tiny; `gpu.eagle_folders` builds them.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from eagle_models import TinyHead
from eagle_pairs import MOST
from gpu.eagle_folders import HEADS, NUM_PAGES, NUM_SLOTS, given_folder, pair
from gpu.eagle_ranks import Made, WatchedRunner
from gpu.test_speculation import Cycle
from gpu_devices import NUM_DEVICES
from rank_group import RankGroup, RankProcesses
from reference_eagle import ReferenceHead, ReferenceTarget
from speculating import VOCAB, Driver, Text, varied_texts
from text_models import EOS, byte_tokenizer
from tpserve.coordinator.config import SchedulerConfig
from tpserve.coordinator.request import Request
from tpserve.coordinator.scheduler import Scheduler
from tpserve.proto.messages import Grammar, GrammarKind, SamplingParams, StepPlan, StepResult

pytestmark = pytest.mark.gpu(count=1)

Collectives = Literal["auto", "push", "nccl"]
NAMES = Grammar(GrammarKind.REGEX, "[a-d]{3}_[a-d]{4}", (EOS,))
FAR, TYPICAL = 0.1, 0.04
"""Of draft logits, ||found - float64's|| / ||float64's||, the most and the median. Rounding to bfloat16 where the
kernels do gave 0.03 and 0.015 in numpy; another token in the middle of the text, 0.13 at least and 0.34."""

CASES = [
    # Which pair, by how many ranks, and by which they exchange activations.
    pytest.param(("random", 1, "auto"), id="tp1"),
    pytest.param(("normed", 1, "auto"), id="tp1-normed"),
    pytest.param(("random", 2, "push"), marks=pytest.mark.gpu(count=2), id="tp2"),
    pytest.param(("random", 2, "nccl"), marks=pytest.mark.gpu(count=2), id="tp2-nccl"),
    # On two GPUs the ranks take turns; slow, but the same kernels and protocol.
    pytest.param(("random", 4, "push"), marks=[pytest.mark.gpu(count=2), pytest.mark.timeout(1200)], id="tp4"),
]
MARKOV = [
    pytest.param(("markov", 1, "auto"), id="tp1"),
    pytest.param(("markov", 2, "push"), marks=pytest.mark.gpu(count=2), id="tp2"),
]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return given_folder() or tmp_path_factory.mktemp("eagle")


@contextmanager
def running(folder: Path, name: str, tp_size: int, collectives: Collectives, *, watched: bool) -> Iterator[RankGroup]:
    config = pair(folder, name, tp_size)
    processes = RankProcesses(WatchedRunner if watched else None)
    try:
        with processes.group(
            config.model_dir,
            config.artifact_dir,
            tp_size,
            num_pages=NUM_PAGES,
            max_num_seqs=NUM_SLOTS,
            devices=[rank % NUM_DEVICES for rank in range(tp_size)],
            collectives=collectives,
            speculation=config.speculation,
            start_timeout_s=600.0,
        ) as ranks:
            yield ranks
    finally:
        processes.close()


class WatchedRanks:
    """Runs plans as they may come on a GPU, one by one, and keeps what was drafted."""

    def __init__(self, ranks: RankGroup) -> None:
        self._ranks = ranks
        self.made: list[Made] = []

    def execute(self, plan: StepPlan) -> StepResult:
        added = tuple(
            replace(each, max_len=0, prefix_token_ids=()) if each.sampling.needs_output_history else each
            for each in plan.added_slots
        )
        drafts = 0 if plan.chunks else plan.num_draft_tokens
        result = self._ranks.execute(replace(plan, added_slots=added, num_draft_tokens=drafts))
        first, *others = self._ranks.call("take_proposals")
        assert bool(first) <= bool(drafts)
        for other in others:
            assert len(other) == len(first)
            for ours, theirs in zip(first, other, strict=True):
                assert ours[:2] == theirs[:2], "ranks draft different tokens"
                assert (ours[2] == theirs[2]).all(), "ranks have other bits"
        self.made += first
        return result


def rounded(weights: dict[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
    """Weights as the library stores them: all but norms in bfloat16."""

    def stored(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return values.astype(ml_dtypes.bfloat16).astype(np.float64) if values.ndim == 2 else values

    return {name: stored(values) for name, values in weights.items()}


def reference_of(head: TinyHead) -> ReferenceHead:
    target = ReferenceTarget(head.target.config, rounded(head.target.weights()))
    return ReferenceHead(head.config, rounded(head.weights()), target, (2, 4, 5))


def errors(made: Sequence[Made], reference: ReferenceHead) -> list[float]:
    """Return how far each token's draft logits are from the reference's; none are where the head has no token."""
    found = []
    for tokens, drafted, logits in made:
        for have, want in zip(logits[:, :VOCAB], reference.draft(tokens, drafted), strict=True):
            assert (np.isinf(have) == np.isinf(want)).all()
            finite = np.isfinite(want)
            have, want = have[finite], want[finite]
            found.append(float(np.linalg.norm(have - want) / np.linalg.norm(want)))
    return found


def long_run(ranks: WatchedRanks, seed: int, rounds: int) -> Driver:
    """Many sequences with shared beginnings come in chunks, draft, do not, and leave."""
    rng = random.Random(seed)
    driver = Driver(ranks, num_slots=NUM_SLOTS, num_pages=NUM_PAGES, caches=True, lookahead=1)
    stems = [[rng.randrange(VOCAB) for _ in range(rng.choice([20, 40, 70]))] for _ in range(4)]
    over: list[Text] = []
    num_draft_tokens = MOST
    for _ in range(rounds):
        coming: list[Text] = []
        leaving: list[Text] = []
        prompts = any(text.num_computed < len(text.prompt) for text in driver.running)
        if not prompts and rng.random() < 0.2:
            for _ in range(min(4, NUM_SLOTS - 1 - len(driver.running))):
                stem = rng.choice([*stems, *(text.tokens for text in over[-4:] if text.over)])
                prompt = [*stem[:100], *(rng.randrange(VOCAB) for _ in range(rng.randrange(1, 12)))]
                (text,) = varied_texts(rng.randrange(1 << 30), 1)
                changes = {"start_step": 0, "grammar": None, "max_tokens": rng.randrange(2, 60)}
                coming.append(text.again(prompt=prompt, chunk=rng.choice([16, 33, 54]), **changes))
            over += coming
        elif driver.running and rng.random() < 0.03:
            leaving.append(rng.choice(driver.running))
        if rng.random() < 0.2:
            num_draft_tokens = rng.choice([0, 0, 1, 3, MOST, MOST])
        driver.step(coming, num_draft_tokens, leaving)
    while driver.running:
        driver.step([])
    driver.step([])
    return driver


@pytest.mark.parametrize("case", CASES)
def test_draft_logits_are_the_references(folder: Path, case: tuple[str, int, Collectives]) -> None:
    """After chunks, prefixes from the cache, plain steps, rejections, and other sequences in the slot's place."""
    with running(folder, *case, watched=True) as group:
        ranks = WatchedRanks(group)
        driver = long_run(ranks, 1, 160 if case[1] < 4 else 60)
    assert len(ranks.made) > (200 if case[1] < 4 else 60)
    found = errors(random.Random(1).sample(ranks.made, 60), reference_of(HEADS[case[0]]))
    assert max(found) < FAR
    assert float(np.median(found)) < TYPICAL
    # It was not always easy: rejected tokens, and several in a round.
    verified = [
        (count, drafted)
        for result in driver.results
        for count, drafted in zip(result.counts, result.drafted, strict=True)
    ]
    assert any(count <= drafted for count, drafted in verified)
    if case[1] < 4:  # in fewer rounds a head of random weights may guess nothing
        assert any(count > 1 for count, _ in verified)


def test_a_slot_drafts_whenever_it_may(folder: Path) -> None:
    """In the first round after its prompt, and behind any number of plain steps."""
    with running(folder, "random", 1, "auto", watched=True) as group:
        for num_plain in (0, 1, 40):
            ranks = WatchedRanks(group)
            driver = Driver(ranks, num_slots=NUM_SLOTS, num_pages=NUM_PAGES)
            texts = [Text([slot, 7, slot + 1], max_tokens=60) for slot in range(5)]
            driver.step(texts)
            for _ in range(num_plain):
                driver.step([])
            driver.step([], MOST)
            assert len(ranks.made) == 5
            assert [len(tokens) for tokens, *_ in ranks.made] == [4 + num_plain] * 5
            assert {len(drafted) for _, drafted, _ in ranks.made} == {MOST}
            assert max(errors(ranks.made, reference_of(HEADS["random"]))) < FAR
            driver.step([], 0, texts)
            driver.step([])


def make_scheduler(lengths: list[int]) -> Scheduler:
    return Scheduler(
        SchedulerConfig(
            max_num_seqs=NUM_SLOTS,
            max_num_batched_tokens=256,
            max_model_len=256,
            page_size=16,
            num_pages=NUM_PAGES,
            max_num_draft_tokens=MOST,
            drafts_on_device=True,
            prefix_lookahead=1,
        ),
        Cycle(lengths),
    )


def successors(head: TinyHead) -> list[int]:
    """Return what the model says behind each token; see `MarkovTarget`."""
    weights = head.target.weights()
    best: list[int] = (weights["model.embed_tokens.weight"] @ weights["lm_head.weight"].T).argmax(1).tolist()
    return best


@pytest.mark.parametrize("lengths", [[MOST], [0, 0, 2, 1, MOST, 0]], ids=["most", "switching"])
@pytest.mark.parametrize("case", MARKOV)
def test_texts_are_the_models_and_drafts_are_accepted(
    folder: Path, case: tuple[str, int, Collectives], lengths: list[int]
) -> None:
    """With plans ahead of results, beside requests with penalties and grammars, and behind cached prefixes."""
    behind = successors(HEADS[case[0]])
    greedy = SamplingParams(temperature=0.0)
    requests = []
    for number in range(3 * NUM_SLOTS):
        prompt = (*range(3, 3 + 5 * (number % 9 + 1)), 3 + number)
        sampling, grammar = greedy, None
        if number % 6 == 4:
            sampling = SamplingParams(temperature=0.0, presence_penalty=0.5)
        if number % 6 == 5:
            grammar = NAMES
        stops = frozenset() if grammar is None else frozenset({EOS})
        requests.append(Request(number, prompt, sampling, 20 + number % 31, 1, stops, grammar))
    output: dict[int, list[int]] = {request.request_id: [] for request in requests}
    details: set[str] = set()
    results: list[StepResult] = []
    with running(folder, *case, watched=False) as ranks:
        scheduler = make_scheduler(lengths)
        for request in requests:
            scheduler.add_request(request)
        while scheduler.has_unfinished or scheduler.num_in_flight_steps:
            while (plan := scheduler.schedule()) is not None:
                ranks.submit(plan)
            results.append(ranks.wait())
            for event in scheduler.update(results[-1]):
                output[event.request_id] += event.token_ids
                details.add(event.detail)
        ranks.clear()
    assert details == {""}
    for request in requests:
        tokens = output[request.request_id]
        if request.grammar is not None:
            assert re.fullmatch(NAMES.source, byte_tokenizer().decode(tokens[:-1]))
            assert tokens[-1] == EOS
        elif not request.sampling.needs_output_history:
            expected, last = [], request.prompt_token_ids[-1]
            for _ in range(request.max_tokens):
                last = behind[last]
                expected.append(last)
            assert tokens == expected
    drafted = sum(sum(result.drafted) for result in results)
    accepted = sum(count - 1 for result in results if result.drafted for count in result.counts if count)
    assert drafted > 500
    assert accepted > 0.7 * drafted, "a twentieth of the tokens is none of the head's, all others agree"

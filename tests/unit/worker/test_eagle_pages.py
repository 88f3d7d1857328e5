"""An EAGLE-3 head's pages: found in the prefix cache with every pair of the sequence that finds them, or not at all."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator
from typing import Any

import pytest

from eagle_models import TinyHead, deep
from eagle_pairs import MOST, NUM_SLOTS, build_pair, check_proposals, head_of, reference_of, watched_runner
from rank_group import Artifacts
from reference_eagle import ReferenceHead
from speculating import GREEDY, PAGE, VOCAB, Driver, Text
from tiny_models import MODELS
from tpserve.coordinator.config import SchedulerConfig
from tpserve.coordinator.request import Request
from tpserve.coordinator.scheduler import Scheduler
from tpserve.proto.messages import SamplingParams, StepPlan, StepResult

HEAD = TinyHead(deep(MODELS["llama_4q_2kv"]))


@pytest.fixture(scope="module")
def made_once(tmp_path_factory: pytest.TempPathFactory, artifacts: Artifacts) -> Iterator[Any]:
    runner: Any = watched_runner(
        build_pair(tmp_path_factory.mktemp("eagle"), artifacts, HEAD), lambda done, total: None
    )
    yield runner
    runner.close()


@pytest.fixture
def runner(made_once: Any) -> Any:
    """A rank whose slots are empty, and whose pages hold what the test before left in them."""
    clear(made_once)
    return made_once


def clear(runner: Any) -> None:
    """Empty the slots; the next plan may have any number."""
    slots = tuple(slot for slot in range(NUM_SLOTS) if runner._batch._occupied[slot])
    runner._next_step_id = None
    runner.execute(StepPlan(1, removed_slots=slots))
    runner._next_step_id = None
    runner.take_proposals()


@pytest.fixture(scope="module")
def reference() -> ReferenceHead:
    return reference_of(HEAD)


def tokens(seed: int, count: int) -> list[int]:
    return random.Random(seed).choices(range(VOCAB), k=count)


@pytest.mark.parametrize("num_left_aside", range(0, 20, 3))
def test_pages_of_plain_steps_are_found(runner: Any, reference: ReferenceHead, num_left_aside: int) -> None:
    """Whoever wrote them has left, with rows that had been left aside."""
    driver = Driver(runner, num_slots=NUM_SLOTS, caches=True, lookahead=1)
    first = Text(tokens(num_left_aside, 30), max_tokens=40 + num_left_aside)
    driver.run([first])
    num_pages = (len(first.tokens) - 2) // PAGE
    again = Text([*first.tokens[: num_pages * PAGE + 1], 3], max_tokens=6)
    driver.step([again], MOST)
    assert head_of(runner)._num_valid[again.slot] == num_pages
    driver.run([], MOST)
    made, silent = runner.take_proposals()
    assert silent == 0
    assert made
    check_proposals(made, reference)


@pytest.mark.parametrize("lookahead", [0, 1])
def test_two_that_part_at_a_pages_border(runner: Any, reference: ReferenceHead, lookahead: int) -> None:
    """The second has the page's tokens, but another one behind it: with the first's last pair its logits are wrong."""
    stem = tokens(7, 2 * PAGE)
    driver = Driver(runner, num_slots=NUM_SLOTS, caches=True, lookahead=lookahead)
    driver.run([Text([*stem, 9, 8], max_tokens=3)], MOST)
    runner.take_proposals()
    second = Text([*stem, 4, 5], max_tokens=6)
    driver.run([second], MOST)
    made, silent = runner.take_proposals()
    assert (len(made) > 0, silent) == (True, 0)
    if lookahead:
        check_proposals(made, reference)
        return
    with pytest.raises(AssertionError):
        check_proposals(made, reference)


class Served:
    """A rank under the real scheduler."""

    def __init__(self, runner: Any, *, num_pages: int = 64, ahead: int = 1, budget: int = 64) -> None:
        self.num_draft_tokens = MOST
        self.has_had_enough = False
        self.num_given_up = 0
        self.scheduler = Scheduler(
            SchedulerConfig(
                NUM_SLOTS, budget, 200, PAGE, num_pages, max_in_flight_steps=ahead, max_num_draft_tokens=MOST,
                prefix_lookahead=1, drafts_cost_upkeep=True,
            ),
            self,
        )  # fmt: skip
        self.outputs: dict[int, list[int]] = {}
        self._runner = runner
        self._pending: deque[StepResult] = deque()

    def choose(self, num_decoding: int, num_drafting: int) -> int:
        return self.num_draft_tokens

    def gives_up(self, num_decoding: int) -> bool:
        return self.has_had_enough

    def observe(self, result: StepResult, num_draft_tokens: int, num_drafting: int) -> None:
        """In place of a rule."""

    def forget(self, slot: int) -> None:
        """In place of a rule."""

    def add(self, number: int, prompt: list[int], max_tokens: int, sampling: SamplingParams = GREEDY) -> None:
        self.outputs[number] = []
        self.scheduler.add_request(Request(number, tuple(prompt), sampling, max_tokens))

    def step(self) -> None:
        while (plan := self.scheduler.schedule()) is not None:
            self.scheduler.check_integrity()
            self.num_given_up += len(plan.undrafted_slots)
            self._pending.append(self._runner.execute(StepPlan.from_pb(plan.to_pb())))
        if self._pending:
            for event in self.scheduler.update(self._pending.popleft()):
                self.outputs[event.request_id] += event.token_ids

    def finish(self) -> None:
        while self.scheduler.has_unfinished or self._pending:
            self.step()


def fill_pages(runner: Any) -> None:
    """Let every page be one that once held a sequence's pairs."""
    served = Served(runner)
    for number in range(5):
        served.add(number, tokens(100 + number, 190), 5)
    served.finish()
    clear(runner)


def test_a_page_is_found_while_its_rows_are_left_aside(runner: Any, reference: ReferenceHead) -> None:
    """In pages that another sequence has filled before: what is left of it must not be taken for the pairs."""
    fill_pages(runner)
    served = Served(runner, num_pages=8, budget=30)
    served.num_draft_tokens = 0
    prompt = tokens(11, 35)
    served.add(0, prompt, 60)
    served.step()
    served.step()
    assert head_of(runner)._num_computed.max() == 29
    served.add(1, [*prompt, 3, 2], 8)
    served.step()
    assert served.scheduler.stats().num_prefix_hit_tokens == 2 * PAGE
    served.num_draft_tokens = MOST
    served.finish()
    made, silent = runner.take_proposals()
    assert (len(made) > 3, silent) == (True, 0)
    check_proposals(made, reference)


@pytest.mark.parametrize("num_hits", [2, 4], ids=["prompt", "grown"])
def test_pages_of_a_slot_without_rows_are_not_trusted(runner: Any, num_hits: int) -> None:
    """They were valid once, for others."""
    fill_pages(runner)
    head = head_of(runner)
    driver = Driver(runner, num_slots=NUM_SLOTS, caches=True, lookahead=1)
    stem = tokens(12, 40)
    driver.run([Text(stem[:18], max_tokens=2)])
    (first_page,) = driver._cached.values()
    assert head._valid.sum() > 10
    head._valid[first_page] = False
    lost = Text(stem, max_tokens=30)
    driver.run([lost])
    head._valid[first_page] = True
    if num_hits == 4:
        head._valid[lost.pages[:3]] = True  # of its prompt
    finds = Text([*lost.tokens[: num_hits * PAGE + 1], 5], max_tokens=5)
    driver.run([finds], MOST)
    assert finds.pages[0] == first_page
    assert sum(finds.drafted) == 0


def test_who_is_given_up_costs_no_rows_and_leaves_its_prompts_pages(runner: Any, reference: ReferenceHead) -> None:
    fill_pages(runner)
    served = Served(runner)
    served.num_draft_tokens = 0
    prompt = tokens(13, 2 * PAGE + 3)
    for number in range(2):  # the first is the one that is drafted for in any case
        served.add(number, [number, *prompt], 60)
    served.step()
    served.has_had_enough = True
    served.step()
    head = head_of(runner)
    num_rows = head._num_rows.copy()
    for _ in range(40):
        served.step()
    assert (head._num_rows - num_rows)[:2].tolist() == [40, 0]
    served.has_had_enough = False
    served.num_draft_tokens = MOST
    served.finish()
    made, _ = runner.take_proposals()
    assert made
    assert all(proposal.tokens[0] == 0 for proposal in made)
    # Its prompt's pages have what the head needs. Those behind do not, and whoever finds them is not drafted for.
    served.add(2, [1, *prompt[: 2 * PAGE], 5], 8)
    served.finish()
    found, silent = runner.take_proposals()
    assert (len(found) > 3, silent) == (True, 0)
    check_proposals([*made[-8:], *found], reference)
    served.add(3, [1, *prompt, *served.outputs[1][:50], 5], 8)
    served.finish()
    made, silent = runner.take_proposals()
    assert (made, silent > 3) == ([], True)


@pytest.mark.parametrize(("ahead", "seed", "give_up"), [(1, 0, 0.0), (2, 1, 0.0), (2, 2, 0.0), (2, 3, 0.3)])
def test_under_the_scheduler(runner: Any, reference: ReferenceHead, ahead: int, seed: int, give_up: float) -> None:
    """Hits, chunks, preemption and clients that go, with pages for three sequences."""
    fill_pages(runner)
    rng = random.Random(seed)
    served = Served(runner, num_pages=14, ahead=ahead)
    prompts = [tokens(seed, rng.choice([33, 50])) for _ in range(3)]
    for number in range(24):
        stem = rng.choice([*prompts, *prompts[-2:]])
        prompt = [*stem[: rng.choice([16, 17, 32, 33, 48, 60])], *tokens(number, rng.randrange(1, 20))][:130]
        served.add(
            number, prompt, rng.randrange(1, 100), SamplingParams(temperature=rng.choice([0.0, 1.0]), seed=number)
        )
        for _ in range(rng.randrange(1, 6)):
            served.step()
            if rng.random() < 0.1:
                served.num_draft_tokens = rng.choice([0, 0, 1, MOST])
            served.has_had_enough = rng.random() < give_up
            if rng.random() < 0.03:
                served.scheduler.abort(rng.randrange(number + 1))
        prompts.append([*prompt, *served.outputs[number]])
    served.num_draft_tokens, served.has_had_enough = MOST, False
    served.finish()
    stats = served.scheduler.stats()
    assert stats.num_preemptions > 0
    assert stats.num_prefix_hit_tokens > 200
    made, silent = runner.take_proposals()
    assert len(made) > 100
    assert (served.num_given_up >= 5) == (give_up > 0)
    assert silent == 0 or give_up  # who finds pages of one that was given up is not drafted for
    check_proposals(rng.sample(made, 80), reference)


def test_a_page_waits_for_the_token_behind() -> None:
    """A page is known once the token behind it is computed, not before."""
    from tpserve.coordinator.kv_pages import KVPages
    from tpserve.coordinator.request import make_group

    def sequence(ids: list[int]) -> Any:
        return make_group(Request(0, tuple(ids), GREEDY, 4), 0, 64, 1, False).sequences[0]

    pages = KVPages(8, 4, enable_prefix_cache=True, lookahead=1)
    first = sequence(list(range(9)))
    pages.take(first, [])
    for num_computed, num_found in ((4, 0), (5, 1), (8, 1), (9, 2)):
        pages.commit(first, num_computed)
        assert len(pages.match(sequence([*range(9), 20]))) == num_found
    assert len(pages.match(sequence([0, 1, 2, 3, 9, 9]))) == 0
    assert len(pages.match(sequence([0, 1, 2, 3, 4, 9]))) == 1
    assert [pages.has_shared(count, 9) for count in (8, 9)] == [False, True]
    assert pages.has_shared(0, 4)

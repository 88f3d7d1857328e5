"""Seeded random runs: every text is the one computed alone, whatever happens around it."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import pytest

from builders import Loop, make_config
from simulated_worker import VOCAB_SIZE, expected_output
from tpserve.coordinator.config import SchedulerConfig
from tpserve.coordinator.draft_length import FixedLength
from tpserve.coordinator.request import QueueFull, Request, RequestInvalid
from tpserve.proto.messages import Grammar, GrammarKind, SamplingParams
from tpserve.proto.rank import SizeTime

SIZE_TIMES = (
    *(SizeTime(tokens, True, 100 + tokens) for tokens in (1, 2, 4, 8)),
    *(SizeTime(tokens, False, step_us) for tokens, step_us in ((4, 120), (8, 130), (16, 155), (24, 230), (32, 300))),
)
ANYTHING = Grammar(GrammarKind.REGEX, ".*", (VOCAB_SIZE - 1,))


@dataclass(frozen=True, slots=True)
class Scenario:
    """A config and how rough the run is."""

    config: SchedulerConfig
    arrival: float = 0.3
    """Probability of a new request before each step."""
    abort: float = 0.0
    group_loss: float = 0.0
    max_n: int = 1
    num_steps: int = 1500
    num_prefixes: int = 0
    """Prompts start with one of that many common prefixes."""
    gives_up: float = 0.0
    """Probability that a step gives up the drafts of who decodes."""
    grammar: float = 0.0
    """Probability that a request has a grammar, which the simulated worker does not follow."""
    size_times: tuple[SizeTime, ...] = ()
    """What the scheduler is told that steps of each size take."""
    preempts: bool = False
    """Whether the run is rough enough to preempt; checked, so that the scenario stays worth its name."""


SCENARIOS = {
    "roomy": Scenario(make_config()),
    "roomy_unpipelined": Scenario(make_config(max_in_flight_steps=1)),
    "deep_pipeline": Scenario(make_config(max_in_flight_steps=4, num_pages=24), abort=0.05, preempts=True),
    "tiny_pool": Scenario(make_config(num_pages=17), abort=0.02, preempts=True),
    "tiny_pool_unpipelined": Scenario(make_config(num_pages=17, max_in_flight_steps=1), preempts=True),
    "tiny_pool_no_cache": Scenario(make_config(num_pages=17, enable_prefix_cache=False), max_n=4, preempts=True),
    "prefixes": Scenario(make_config(num_pages=40), num_prefixes=3, abort=0.02, preempts=True),
    "prefixes_tiny": Scenario(make_config(num_pages=18, aging_steps=5), num_prefixes=2, preempts=True),
    "choices": Scenario(make_config(num_pages=40, max_num_seqs=4), arrival=0.1, max_n=9, num_prefixes=2, abort=0.02),
    "choices_no_cache": Scenario(
        make_config(num_pages=40, enable_prefix_cache=False), arrival=0.1, max_n=9, abort=0.05
    ),
    "one_token_pages": Scenario(make_config(page_size=1, num_pages=70), max_n=3, num_prefixes=2, preempts=True),
    "one_slot": Scenario(make_config(max_num_seqs=1, max_num_batched_tokens=1), arrival=0.02, max_n=2),
    "tight_budget": Scenario(make_config(max_num_batched_tokens=8), arrival=0.15, num_prefixes=2),
    "group_losses": Scenario(make_config(num_pages=24), group_loss=0.02, max_n=3, num_prefixes=2, abort=0.02),
    "speculation": Scenario(make_config(max_num_draft_tokens=3), abort=0.02, num_prefixes=2),
    "speculation_unpipelined": Scenario(make_config(max_num_draft_tokens=4, max_in_flight_steps=1), max_n=3),
    "speculation_tiny_pool": Scenario(
        make_config(max_num_draft_tokens=5, num_pages=18, max_in_flight_steps=3), max_n=3, abort=0.03, preempts=True
    ),
    "speculation_one_token_pages": Scenario(
        make_config(max_num_draft_tokens=4, page_size=1, num_pages=70), num_prefixes=2, preempts=True
    ),
    "speculation_on_device": Scenario(
        make_config(max_num_draft_tokens=3, num_pages=20, drafts_on_device=True), max_n=2, abort=0.02, preempts=True
    ),
    "speculation_on_device_beside_grammars": Scenario(
        make_config(max_num_draft_tokens=4, max_in_flight_steps=3, num_pages=30, drafts_on_device=True),
        arrival=0.1,
        group_loss=0.005,
        grammar=0.3,
        num_prefixes=2,
        preempts=True,
    ),
    "speculation_given_up": Scenario(
        make_config(max_num_draft_tokens=4, max_in_flight_steps=3, num_pages=24, drafts_cost_upkeep=True),
        gives_up=0.05,
        abort=0.02,
        group_loss=0.003,
        max_n=2,
        num_prefixes=2,
        preempts=True,
    ),
    "speculation_group_losses": Scenario(
        make_config(max_num_draft_tokens=2, num_pages=24), group_loss=0.02, max_n=3, num_prefixes=2, abort=0.02
    ),
    "sizes": Scenario(make_config(num_pages=24), size_times=SIZE_TIMES, abort=0.02, num_prefixes=2, preempts=True),
    "sizes_group_losses": Scenario(
        make_config(max_num_seqs=4, num_pages=40), size_times=SIZE_TIMES, group_loss=0.02, max_n=3, abort=0.02
    ),
    "everything": Scenario(
        make_config(num_pages=20, max_num_seqs=6, max_in_flight_steps=3, aging_steps=10, max_passed_sequences=2),
        group_loss=0.01,
        max_n=4,
        num_prefixes=3,
        abort=0.05,
        preempts=True,
    ),
}


class SometimesGivesUp(FixedLength):
    """Always drafts for whom it may."""

    def __init__(self, scenario: Scenario, random: Random) -> None:
        super().__init__(scenario.config.max_num_draft_tokens)
        self._random, self._probability = random, scenario.gives_up

    def gives_up(self, num_decoding: int) -> bool:
        return self._random.random() < self._probability


def random_request(random: Random, request_id: int, scenario: Scenario, prefixes: list[list[int]]) -> Request:
    prefix = random.choice(prefixes) if prefixes else []
    tail = [random.randrange(VOCAB_SIZE) for _ in range(random.randint(0 if prefix else 1, 20))]
    stops = random.sample(range(VOCAB_SIZE), random.choice([0, 0, 1, 2]))
    sampling = SamplingParams(
        seed=random.getrandbits(64),
        frequency_penalty=random.choice([0.0, 0.5]),
        num_logprobs=random.choice([None, 0]),
    )
    max_tokens = random.choice([1, 2, 8, 30, 100])
    n = random.randint(1, scenario.max_n)
    grammar = ANYTHING if random.random() < scenario.grammar else None
    return Request(request_id, tuple(prefix + tail), sampling, max_tokens, n, frozenset(stops), grammar)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", SCENARIOS)
def test_every_text_is_the_one_computed_alone(name: str, seed: int) -> None:
    scenario = SCENARIOS[name]
    random = Random(f"{name} {seed}")
    loop = Loop(scenario.config, SometimesGivesUp(scenario, random) if scenario.gives_up else None)
    loop.scheduler.learn_size_times(scenario.size_times)
    scheduler = loop.scheduler
    prefixes = [
        [random.randrange(VOCAB_SIZE) for _ in range(random.randint(3, 24))] for _ in range(scenario.num_prefixes)
    ]
    requests: dict[int, Request] = {}
    aborted: set[tuple[int, int]] = set()
    for request_id in range(scenario.num_steps):
        if random.random() < scenario.arrival and scheduler.num_waiting < 24:
            request = random_request(random, request_id, scenario, prefixes)
            try:
                loop.add(request)
                requests[request_id] = request
            except (RequestInvalid, QueueFull):
                pass
        if requests and random.random() < scenario.abort:
            victim = random.choice(list(requests.values())[-12:])
            choice = random.choice([None, random.randrange(victim.n)])
            scheduler.abort(victim.request_id, choice)
            scheduler.check_integrity()
            aborted |= {(victim.request_id, i) for i in range(victim.n) if choice in (None, i)}
        if random.random() < scenario.group_loss:
            loop.lose_group()
        plan = loop.plan() if random.random() < 0.6 else None
        if loop.results and (plan is None or random.random() < 0.5):
            loop.update()
    loop.run()

    assert len(requests) > 20
    assert any(plan.undrafted_slots for plan in loop.plans) == (scenario.gives_up > 0)
    for (request_id, choice), output in loop.outputs.items():
        tokens, finish = expected_output(requests[request_id], choice, scenario.config.max_model_len)
        if (request_id, choice) in aborted and output.finish is None:
            assert output.tokens == tokens[: len(output.tokens)]
        else:
            assert (output.tokens, output.finish) == (tokens, finish)
    stats = scheduler.stats()
    assert (stats.num_held_pages, stats.num_running, stats.num_waiting, stats.num_queued_requests) == (0, 0, 0, 0)
    assert (stats.num_preemptions > 0) or not scenario.preempts
    assert (stats.num_prefix_hit_tokens > 0) or not scenario.num_prefixes


def test_the_same_calls_give_the_same_plans() -> None:
    def plans() -> list[object]:
        random = Random(1)
        loop = Loop(make_config(num_pages=24))
        for request_id in range(30):
            loop.add(random_request(random, request_id, Scenario(loop.config, max_n=3), []))
            loop.step()
        loop.run()
        return list(loop.plans)

    assert plans() == plans()

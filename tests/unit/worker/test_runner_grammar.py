"""Constrained and free sequences on one real rank, through the real scheduler with plans in flight."""

from __future__ import annotations

import re
from collections import deque
from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers

from rank_group import Artifacts
from text_models import EOS, write_byte_tokenizer
from tiny_models import MODELS
from tpserve.coordinator.config import SchedulerConfig
from tpserve.coordinator.request import Request, TokenEvent
from tpserve.coordinator.scheduler import Scheduler
from tpserve.proto.messages import FinishReason, Grammar, GrammarKind, SamplingParams, StepPlan, StepResult
from tpserve.proto.rank import RankConfig
from tpserve.worker.runner import Runner

NUM_SEQS = 6
WORDS = Grammar(GrammarKind.REGEX, "([a-d]{2,5}_){3}[x-z]+!", (EOS,))
HOT = SamplingParams(temperature=1.5, num_logprobs=3)


class Engine:
    """The scheduler and one rank."""

    def __init__(self, folder: Path, artifacts: Artifacts) -> None:
        artifact = artifacts.build(folder, 1, max_num_batched_tokens=32, max_num_seqs=NUM_SEQS)
        self._config = RankConfig(0, 1, folder, artifact, "auto", 64, NUM_SEQS, 1, "unused", 10.0)
        self._runner = self._new_runner()
        self._tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._step = 0
        self.num_preemptions = 0
        self.mask_us = 0

    def _new_runner(self) -> Runner:
        return Runner(self._config, lambda done, total: None)

    def run(
        self, requests: list[Request], num_pages: int = 64, ahead: int = 2, lose_after: int | None = None
    ) -> dict[tuple[int, int], Output]:
        """Return what became of each choice; after `lose_after` results, the rank is lost and started again."""
        config = SchedulerConfig(NUM_SEQS, 32, 128, 16, num_pages, max_in_flight_steps=ahead)
        scheduler = Scheduler(config)
        for request in requests:
            scheduler.add_request(request)
        outputs = {(r.request_id, c): Output(self._tokenizer) for r in requests for c in range(r.n)}
        pending: deque[tuple[int, StepResult]] = deque()
        before = self._step
        while scheduler.has_unfinished or pending:
            while (plan := scheduler.schedule()) is not None:
                self._step += 1
                pending.append((plan.step_id, self._runner.execute(replace(plan, step_id=self._step))))
            if lose_after is not None and self._step - before >= lose_after:
                lose_after = None
                pending.clear()
                self._runner.close()
                self._runner = self._new_runner()
                scheduler.reset_after_group_loss()
                continue
            step_id, result = pending.popleft()
            self.mask_us += result.mask_us
            for event in scheduler.update(replace(result, step_id=step_id)):
                outputs[event.request_id, event.choice].take(event)
        self.num_preemptions = scheduler.stats().num_preemptions
        self._step += 1
        self._runner.execute(replace(self._cleared(scheduler), step_id=self._step))
        return outputs

    @staticmethod
    def _cleared(scheduler: Scheduler) -> StepPlan:
        return StepPlan(0, removed_slots=scheduler._slots.take_removed())


class Output:
    """Tokens of one choice."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.token_ids: list[int] = []
        self.events: list[TokenEvent] = []

    def take(self, event: TokenEvent) -> None:
        self.token_ids += event.token_ids
        self.events.append(event)

    @property
    def finish(self) -> FinishReason | None:
        return self.events[-1].finish

    @property
    def text(self) -> str:
        return str(self._tokenizer.decode(self.token_ids))


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory, artifacts: Artifacts) -> Engine:
    folder: Path = tmp_path_factory.mktemp("model")
    MODELS["llama_4q_2kv"].write(folder)
    write_byte_tokenizer(folder)
    return Engine(folder, artifacts)


def request(number: int, grammar: Grammar | None, sampling: SamplingParams = HOT, n: int = 1) -> Request:
    prompt = tuple(10 + (number * 7 + i) % 90 for i in range(5 + number))
    seeded = replace(sampling, seed=number)
    stops = frozenset({EOS}) if grammar is not None else frozenset()
    return Request(number, prompt, seeded, 40, n, stops, grammar)


def matches(output: Output) -> bool:
    return output.finish is FinishReason.STOP and re.fullmatch(WORDS.source, output.text) is not None


@pytest.mark.parametrize("ahead", [1, 2, 4])
def test_constrained_ones_match_and_free_ones_are_untouched(engine: Engine, ahead: int) -> None:
    free = [request(number, None) for number in range(3)]
    alone = {key: output.token_ids for key, output in engine.run(free).items()}
    before = engine.mask_us
    constrained = [request(number, WORDS) for number in range(3, 9)]  # more than slots: some come later
    outputs = engine.run([*constrained[:2], *free, *constrained[2:]], ahead=ahead)
    assert {key: outputs[key].token_ids for key in alone} == alone
    assert all(matches(outputs[number, 0]) for number in range(3, 9))
    assert engine.mask_us > before
    assert len({outputs[number, 0].text for number in range(3, 9)}) > 3


def test_preempted_sequences_go_on_in_their_grammar(engine: Engine) -> None:
    long = Grammar(GrammarKind.REGEX, "([a-d]{2,5}_){30}!", (EOS,))
    requests = [request(number, long) for number in range(6)]
    expected = {key: output.token_ids for key, output in engine.run(requests).items()}
    outputs = engine.run(requests, num_pages=7)
    assert engine.num_preemptions > 0
    assert {key: output.token_ids for key, output in outputs.items()} == expected
    assert all(re.fullmatch("([a-d]{2,5}_)+[a-d]{0,5}", output.text) for output in outputs.values())


@pytest.mark.parametrize("lose_after", [3, 12])
def test_a_lost_rank_goes_on_in_its_grammars(engine: Engine, lose_after: int) -> None:
    requests = [request(number, WORDS if number % 2 else None) for number in range(6)]
    expected = {key: output.token_ids for key, output in engine.run(requests).items()}
    outputs = engine.run(requests, lose_after=lose_after)
    assert {key: output.token_ids for key, output in outputs.items()} == expected
    assert all(matches(outputs[number, 0]) for number in (1, 3, 5))


def test_with_penalties_bias_and_logprobs(engine: Engine) -> None:
    penalised = replace(HOT, frequency_penalty=1.0, presence_penalty=0.5, logit_bias=((70, 5.0), (3, 50.0)))
    outputs = engine.run([request(number, WORDS, penalised) for number in range(4)])
    assert all(matches(output) for output in outputs.values())
    for output in outputs.values():
        for event in output.events:
            (logprobs,) = event.logprobs
            assert logprobs.logprob <= 0
            assert 1 <= len(logprobs.top) <= 3
            allowed = [value for _, value in logprobs.top]
            assert allowed == sorted(allowed, reverse=True)
    # The end's only continuation is the stop token: of the distribution sampled from, it is certain.
    last = next(iter(outputs.values())).events[-1]
    assert last.token_ids == (EOS,)
    assert last.logprobs[0].logprob == pytest.approx(0.0)
    assert [token for token, _ in last.logprobs[0].top] == [EOS]


def test_choices_follow_the_grammar_each_for_itself(engine: Engine) -> None:
    outputs = engine.run([request(1, WORDS, n=4)])
    assert all(matches(outputs[1, choice]) for choice in range(4))
    assert len({outputs[1, choice].text for choice in range(4)}) > 1
    again = engine.run([request(1, WORDS, n=4)])
    assert [o.token_ids for o in again.values()] == [o.token_ids for o in outputs.values()]


def test_a_grammar_that_cannot_go_on_ends_its_sequence_alone(engine: Engine) -> None:
    broken = Grammar(GrammarKind.REGEX, "(", (EOS,))
    no_space = Grammar(GrammarKind.REGEX, "a b", (EOS,))  # the model's vocabulary ends before the space
    outputs = engine.run([request(1, broken), request(2, WORDS), request(3, no_space), request(4, None)])
    assert outputs[1, 0].finish is FinishReason.FAILED
    assert "does not compile" in outputs[1, 0].events[-1].detail
    assert outputs[3, 0].finish is FinishReason.FAILED
    assert outputs[3, 0].text == "a"
    assert "allows no token" in outputs[3, 0].events[-1].detail
    assert matches(outputs[2, 0])
    assert outputs[4, 0].finish is FinishReason.LENGTH

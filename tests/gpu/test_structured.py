"""Constrained and free requests in one batch on GPUs, through the real scheduler with plans in flight."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import tokenizers

from gpu.test_engine import MAX_NUM_SEQS, NUM_PAGES, folders, make_scheduler
from gpu_devices import NUM_DEVICES
from rank_group import RankGroup, RankProcesses, run_scheduler
from tpserve.coordinator.request import Request, TokenEvent
from tpserve.proto.messages import FinishReason, Grammar, GrammarKind, SamplingParams

EOS = 2
MAX_TOKENS = 40
GREEDY = SamplingParams(temperature=0.0)
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "pattern": "^[a-z]{1,12}$"}, "age": {"type": "integer", "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
PERSON = Grammar(GrammarKind.JSON_SCHEMA, json.dumps(SCHEMA), (EOS,))
PHONE = Grammar(GrammarKind.REGEX, r"\d{3}-\d{4}", (EOS,))
YES = Grammar(GrammarKind.REGEX, "yes|no", (EOS,))

Asked = tuple[str, SamplingParams, Grammar | None]

CASES = [
    pytest.param(1, marks=pytest.mark.gpu(count=1), id="tp1"),
    pytest.param(2, marks=pytest.mark.gpu(count=2), id="tp2"),
]


class Answer:
    """One request's tokens."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.token_ids: list[int] = []
        self.finish: FinishReason | None = None
        self.detail = ""

    def take(self, event: TokenEvent) -> None:
        self.token_ids += event.token_ids
        self.finish, self.detail = event.finish, event.detail

    @property
    def text(self) -> str:
        return str(self._tokenizer.decode(self.token_ids))


class Engine:
    """A group and the tokenizer of its model."""

    def __init__(self, ranks: RankGroup, model: Path) -> None:
        self._ranks = ranks
        self._tokenizer = tokenizers.Tokenizer.from_file(str(model / "tokenizer.json"))

    def run(self, requests: Sequence[Asked], num_pages: int = NUM_PAGES) -> list[Answer]:
        """Return what became of prompts that run together."""
        scheduler = make_scheduler(num_pages)
        answers = [Answer(self._tokenizer) for _ in requests]
        for number, (prompt, sampling, grammar) in enumerate(requests):
            ids = tuple(self._tokenizer.encode(prompt, add_special_tokens=False).ids)
            stops = frozenset({EOS})
            request = Request(number, ids, sampling, MAX_TOKENS, stop_token_ids=stops, grammar=grammar)
            scheduler.add_request(request)
        for event in run_scheduler(self._ranks, scheduler):
            answers[event.request_id].take(event)
        return answers


@pytest.fixture(scope="module", params=CASES)
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    tp_size: int = request.param
    model, artifact = folders(tmp_path_factory, tp_size, ("q0bf16", "auto"))
    processes = RankProcesses()
    devices = [rank % NUM_DEVICES for rank in range(tp_size)]
    try:
        with processes.group(
            model, artifact, tp_size, num_pages=NUM_PAGES, max_num_seqs=MAX_NUM_SEQS, devices=devices
        ) as ranks:
            yield Engine(ranks, model)
    finally:
        processes.close()


def check_person(answer: Answer) -> None:
    assert answer.detail == ""
    if answer.finish is FinishReason.STOP:
        value = json.loads(answer.text)
        assert re.fullmatch("[a-z]{1,12}", value["name"])
        assert value["age"] <= 99
    else:
        assert answer.text.lstrip().startswith("{")


def test_every_constrained_answer_matches_and_free_ones_stay_as_they_are(engine: Engine) -> None:
    free: list[Asked] = [(f"Number {number}: the story of a", GREEDY, None) for number in range(4)]
    alone = [engine.run([request])[0].token_ids for request in free]
    constrained: list[Asked] = [
        (f"Person {seed} is", SamplingParams(temperature=1.5, seed=seed, num_logprobs=5), PERSON) for seed in range(6)
    ]
    phone: Asked = ("Call", SamplingParams(temperature=1.0, seed=3, frequency_penalty=0.3), PHONE)
    answers = engine.run([*free, *constrained, phone])
    for answer in answers[4:10]:
        check_person(answer)
    assert any(answer.finish is FinishReason.STOP for answer in answers[4:10])
    assert re.fullmatch(PHONE.source, answers[10].text)
    # Not whole texts: in bfloat16, sizes of batches move logits by a little.
    assert [answer.token_ids[:4] for answer in answers[:4]] == [ids[:4] for ids in alone]


def test_masks_go_with_their_requests(engine: Engine) -> None:
    """After constrained ones, the slots of free requests are free of masks."""
    free: list[Asked] = [("Once upon a time", GREEDY, None)] * 3
    first = [answer.token_ids for answer in engine.run(free)]
    assert {answer.text for answer in engine.run([("Is it so?", GREEDY, YES)] * MAX_NUM_SEQS)} <= {"yes", "no"}
    assert [answer.token_ids for answer in engine.run(free)] == first


def test_the_same_seed_gives_the_same_constrained_answer(engine: Engine) -> None:
    asked: Asked = ("A person:", SamplingParams(temperature=1.2, seed=11), PERSON)
    others: list[Asked] = [("Something else", SamplingParams(temperature=1.0, seed=5), None)] * 5
    one, two = (engine.run([*others, asked, *others])[5].token_ids for _ in range(2))
    assert one == two


def test_preempted_ones_go_on_in_their_grammar(engine: Engine) -> None:
    asked: list[Asked] = [(f"Person {i}", SamplingParams(temperature=1.2, seed=i), PERSON) for i in range(8)]
    for answer in engine.run(asked, num_pages=12):
        check_person(answer)


def test_a_grammar_that_does_not_compile_ends_its_sequence_alone(engine: Engine) -> None:
    broken: Asked = ("a", GREEDY, Grammar(GrammarKind.REGEX, "(", (EOS,)))
    answers = engine.run([broken, ("Is it so?", GREEDY, YES), ("Once upon a time", GREEDY, None)])
    assert answers[0].finish is FinishReason.FAILED
    assert "does not compile" in answers[0].detail
    assert answers[1].text in ("yes", "no")
    assert answers[2].finish is not FinishReason.FAILED

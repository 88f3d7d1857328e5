"""Drives one rank as a coordinator would that knows every result: sequences in, tokens and log-probabilities out."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from text_models import EOS
from tpserve.proto.messages import (
    Grammar,
    GrammarKind,
    PromptChunk,
    SamplingParams,
    SlotAdd,
    StepPlan,
    StepResult,
    TokenLogprobs,
)

PAGE = 16
GREEDY = SamplingParams(temperature=0.0)
VOCAB = 200
WORDS = Grammar(GrammarKind.REGEX, "([a-d]{2,5}_){6}[x-z]+!", (EOS,))
"""For models with the byte tokenizer."""


class Executor(Protocol):
    """A runner, or a group of them."""

    def execute(self, plan: StepPlan) -> StepResult: ...


@dataclass(eq=False, slots=True)
class Text:
    """One sequence and what became of it."""

    prompt: Sequence[int]
    sampling: SamplingParams = GREEDY
    max_tokens: int = 20
    speculates: bool = True
    grammar: Grammar | None = None
    start_step: int = 0
    """Steps of the run before it comes."""
    chunk: int = 1 << 30
    """Most tokens of its prompt in one step."""
    output: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    """Tokens of each step in which it decoded."""
    drafted: list[int] = field(default_factory=list)
    failure: str = ""
    slot: int = -1
    num_computed: int = 0
    pages: list[int] = field(default_factory=list)

    @property
    def max_len(self) -> int:
        return len(self.prompt) + self.max_tokens

    @property
    def tokens(self) -> list[int]:
        return [*self.prompt, *self.output]

    @property
    def over(self) -> bool:
        return bool(self.failure) or len(self.output) >= self.max_tokens

    def again(self, **changes: object) -> Text:
        """The same sequence, of which nothing has run."""
        given = {
            name: getattr(self, name)
            for name in ("prompt", "sampling", "max_tokens", "speculates", "grammar", "start_step", "chunk")
        }
        return Text(**(given | changes))


class Driver:
    """Gives slots and pages, one step after another.

    Full pages are found again by what they hold if `caches`, and by `lookahead` tokens behind; nothing else may change
    the runner's batch.
    """

    def __init__(
        self,
        runner: Executor,
        *,
        num_slots: int = 8,
        num_pages: int = 64,
        speculates: bool = True,
        caches: bool = False,
        lookahead: int = 0,
    ) -> None:
        self._runner = runner
        self._lookahead = lookahead
        self._speculates = speculates
        self._caches = caches
        self._free_slots = list(range(num_slots))[::-1]
        self._free_pages = list(range(num_pages))[::-1]
        self._cached: dict[tuple[int, ...], int] = {}
        self._uses = dict.fromkeys(range(num_pages), 0)
        self._step = 0
        self.running: list[Text] = []
        self._gone: list[int] = []
        self.results: list[StepResult] = []

    def run(self, texts: Iterable[Text], num_draft_tokens: int | Callable[[int], int] = 0) -> None:
        """Run sequences to their end."""
        waiting = list(texts)
        first = self._step
        while waiting or self.running:
            here = self._step - first
            coming = [text for text in waiting if text.start_step <= here][: len(self._free_slots)]
            waiting = [text for text in waiting if text not in coming]
            self.step(coming, num_draft_tokens(here) if callable(num_draft_tokens) else num_draft_tokens)
            assert here < 2000, "no end"
        self.step([])  # removes the last ones

    def step(self, coming: Sequence[Text], num_draft_tokens: int = 0, leaving: Sequence[Text] = ()) -> StepResult:
        """Run one step; those in `leaving` are removed before their end."""
        self._step += 1
        removed = tuple(self._gone) + tuple(text.slot for text in leaving)
        self._gone = []
        for text in leaving:
            self._leave(text)
        added = [self._add(text) for text in coming]
        appended: list[tuple[int, int]] = []
        chunks: list[PromptChunk] = []
        for text in self.running:
            if text.num_computed < len(text.prompt):
                end = min(len(text.prompt), text.num_computed + text.chunk)
                part = tuple(text.prompt[text.num_computed : end])
                chunks.append(PromptChunk(text.slot, text.num_computed, part, end == len(text.prompt)))
                text.num_computed = end
            else:
                count = len(text.tokens)
                more = min(num_draft_tokens, text.max_len - count - 1) if self._drafts(text) else 0
                appended += [(text.slot, page) for page in self._grow(text, count + max(0, more))]
        plan = StepPlan(self._step, removed, tuple(added), tuple(appended), tuple(chunks), num_draft_tokens)
        # As it travels: nothing may depend on what the messages do not carry.
        plan = StepPlan.from_pb(plan.to_pb())
        result = StepResult.from_pb(self._runner.execute(plan).to_pb())
        self.results.append(result)
        self._take(result)
        return result

    def _drafts(self, text: Text) -> bool:
        return self._speculates and text.speculates

    def _add(self, text: Text) -> SlotAdd:
        text.slot = self._free_slots.pop()
        self.running.append(text)
        hits: list[int] = []
        while self._caches and (len(hits) + 1) * PAGE < len(text.prompt):
            page = self._cached.get(tuple(text.prompt[: (len(hits) + 1) * PAGE + self._lookahead]))
            if page is None:
                break
            hits.append(page)
        for page in hits:
            if page in self._free_pages:
                self._free_pages.remove(page)
            self._uses[page] += 1
        text.pages = list(hits)
        text.num_computed = len(hits) * PAGE
        fresh = self._grow(text, len(text.prompt))
        drafts = self._drafts(text)
        return SlotAdd(
            text.slot,
            text.sampling,
            (*hits, *fresh),
            grammar=text.grammar,
            max_len=text.max_len if drafts else 0,
            prefix_token_ids=tuple(text.prompt[: text.num_computed]) if drafts else (),
        )

    def _grow(self, text: Text, num_tokens: int) -> list[int]:
        """Give a sequence pages for so many tokens."""
        fresh: list[int] = []
        while len(text.pages) * PAGE < num_tokens:
            page = self._free_pages.pop()  # the one freed last, so that contents are soon overwritten
            self._cached = {key: value for key, value in self._cached.items() if value != page}
            self._uses[page] += 1
            text.pages.append(page)
            fresh.append(page)
        return fresh

    def _take(self, result: StepResult) -> None:
        by_slot = {text.slot: text for text in self.running}
        counts = result.counts or (1,) * len(result.slots)
        drafted = result.drafted or (0,) * len(result.slots)
        assert len(set(result.slots)) == len(result.slots) == len(counts) == len(drafted)
        assert sum(counts) == len(result.token_ids)
        start = 0
        for slot, count, num_drafted in zip(result.slots, counts, drafted, strict=True):
            text = by_slot[slot]
            text.output += result.token_ids[start : start + count]
            text.logprobs += result.logprobs.get(slot, ())
            text.counts.append(count)
            text.drafted.append(num_drafted)
            assert len(text.output) <= text.max_tokens
            start += count
        for slot, detail in result.failures.items():
            by_slot[slot].failure = detail
        for text in [text for text in self.running if text.over]:
            self._gone.append(text.slot)
            self._leave(text)

    def _leave(self, text: Text) -> None:
        self.running.remove(text)
        self._free_slots.append(text.slot)
        computed = text.tokens[: max(text.num_computed, len(text.tokens) - 1 if text.output else 0)]
        for index, page in enumerate(text.pages):
            end = (index + 1) * PAGE + self._lookahead
            if self._caches and end <= len(computed):
                self._cached.setdefault(tuple(computed[:end]), page)
            self._uses[page] -= 1
            if not self._uses[page]:
                self._free_pages.append(page)


class PlainDecoding:
    """What sequences are without speculation, each alone in its batch."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver

    def of(self, texts: Sequence[Text]) -> list[Text]:
        alone = [text.again(start_step=0) for text in texts]
        for text in alone:
            self._driver.run([text])
        return alone


def assert_same(texts: Sequence[Text], expected: Sequence[Text]) -> None:
    for text, plain_text in zip(texts, expected, strict=True):
        assert text.output == plain_text.output
        assert text.logprobs == plain_text.logprobs
        assert text.failure == plain_text.failure


def varied_texts(seed: int, count: int = 12) -> list[Text]:
    """Sequences of every kind, some that do not speculate."""
    rng = random.Random(seed)
    texts = []
    for _ in range(count):
        phrase = [rng.randrange(VOCAB) for _ in range(rng.randrange(2, 7))]
        prompt = [rng.randrange(VOCAB) for _ in range(rng.randrange(1, 40))] + phrase * rng.randrange(1, 4)
        sampling = SamplingParams(
            temperature=rng.choice([0.0, 0.0, 0.3, 0.7, 1.0, 1.5]),
            top_p=rng.choice([1.0, 0.9, 0.5]),
            top_k=rng.choice([None, 1, 20]),
            min_p=rng.choice([0.0, 0.05]),
            frequency_penalty=rng.choice([0.0, 0.0, 0.7, -0.5]),
            presence_penalty=rng.choice([0.0, 0.0, 0.4]),
            seed=rng.randrange(1 << 64),
            logit_bias=rng.choice([(), ((3, 2.0), (17, -4.0), (150, 1.0))]),
            num_logprobs=rng.choice([None, 0, 3]),
        )
        if sampling.num_logprobs is not None and rng.random() < 0.4:
            sampling = SamplingParams(
                **{name: getattr(sampling, name) for name in SamplingParams.__slots__} | {"wants_hidden": True}
            )
        texts.append(
            Text(
                prompt,
                sampling,
                max_tokens=rng.randrange(1, 40),
                speculates=rng.random() < 0.8,
                grammar=WORDS if rng.random() < 0.3 else None,
                start_step=rng.randrange(12),
                chunk=rng.choice([5, 1000]),
            )
        )
    return texts

"""The step contract between coordinator and worker as plain data, and its protobuf form.

Owns what `worker.proto` carries. Knows nothing of schedulers, tensors or transport.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from itertools import accumulate

from tpserve.proto.pb import common_pb2, worker_pb2


class FinishReason(Enum):
    """Why a sequence ended; values are those of `engine.proto`."""

    STOP = 1
    LENGTH = 2
    ABORTED = 3
    FAILED = 4


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token of one sequence is drawn from its logits."""

    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    """Smallest set of tokens with this probability mass; 1 is off."""
    top_k: int | None = None
    """Only the k best; None is off."""
    min_p: float = 0.0
    """Drop tokens below this share of the best one's probability; 0 is off."""
    frequency_penalty: float = 0.0
    """Subtracted once for each time the token stands in the output so far."""
    presence_penalty: float = 0.0
    """Subtracted once if the token stands in the output so far."""
    seed: int = 0
    """Key of the counter-based generator, 64 bits unsigned; the counter is the position."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, value) pairs added to the logits."""
    num_logprobs: int | None = None
    """None: no log-probabilities; k: the chosen token's and those of the k best."""
    wants_hidden: bool = False
    """Report the final hidden row from which each token was sampled; needs `num_logprobs`, with which it is told."""

    @property
    def needs_output_history(self) -> bool:
        """Whether the sampler counts output tokens for this sequence."""
        return self.frequency_penalty != 0.0 or self.presence_penalty != 0.0

    def to_pb(self) -> common_pb2.SamplingParams:
        """Return the protobuf form."""
        return common_pb2.SamplingParams(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k or 0,
            min_p=self.min_p,
            frequency_penalty=self.frequency_penalty,
            presence_penalty=self.presence_penalty,
            seed=self.seed,
            bias_token_ids=[token for token, _ in self.logit_bias],
            bias_values=[value for _, value in self.logit_bias],
            num_logprobs=self.num_logprobs,
            wants_hidden=self.wants_hidden,
        )

    @classmethod
    def from_pb(cls, pb: common_pb2.SamplingParams) -> SamplingParams:
        """Read the protobuf form."""
        return cls(
            temperature=pb.temperature,
            top_p=pb.top_p,
            top_k=pb.top_k or None,
            min_p=pb.min_p,
            frequency_penalty=pb.frequency_penalty,
            presence_penalty=pb.presence_penalty,
            seed=pb.seed,
            logit_bias=tuple(zip(pb.bias_token_ids, pb.bias_values, strict=True)),
            num_logprobs=pb.num_logprobs if pb.HasField("num_logprobs") else None,
            wants_hidden=pb.wants_hidden,
        )


class GrammarKind(Enum):
    """How a grammar's source is written; values are those of `common.proto`."""

    JSON_SCHEMA = 1
    REGEX = 2
    EBNF = 3
    STRUCTURAL_TAG = 4


@dataclass(frozen=True, slots=True)
class Grammar:
    """What the output of one sequence must match; `tpserve.proto.grammar` compiles it."""

    kind: GrammarKind
    source: str
    stop_token_ids: tuple[int, ...]
    """Allowed once the output matches, and only then."""

    def to_pb(self) -> common_pb2.Grammar:
        """Return the protobuf form."""
        return common_pb2.Grammar(
            kind=common_pb2.Grammar.Kind.Name(self.kind.value), source=self.source, stop_token_ids=self.stop_token_ids
        )

    @classmethod
    def from_pb(cls, pb: common_pb2.Grammar) -> Grammar:
        """Read the protobuf form."""
        return cls(GrammarKind(pb.kind), pb.source, tuple(pb.stop_token_ids))


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities at one sampled position, of the distribution that a grammar leaves."""

    logprob: float
    """Of the chosen token, after grammar, penalties and bias, before temperature and cuts."""
    top: tuple[tuple[int, float], ...] = ()
    """(token id, log-probability), best first; fewer than asked for where a grammar allows fewer."""
    hidden: bytes = b""
    """The final hidden row as little-endian float32, (hidden_size,), of sequences that asked for it."""

    def to_pb(self) -> common_pb2.TokenLogprobs:
        """Return the protobuf form."""
        return common_pb2.TokenLogprobs(
            logprob=self.logprob,
            top_token_ids=[token for token, _ in self.top],
            top_logprobs=[value for _, value in self.top],
            hidden=self.hidden,
        )

    @classmethod
    def from_pb(cls, pb: common_pb2.TokenLogprobs) -> TokenLogprobs:
        """Read the protobuf form."""
        return cls(pb.logprob, tuple(zip(pb.top_token_ids, pb.top_logprobs, strict=True)), pb.hidden)


@dataclass(frozen=True, slots=True)
class SlotAdd:
    """A sequence enters the worker's batch."""

    slot: int
    sampling: SamplingParams
    page_ids: tuple[int, ...]
    """Start of the page table: prefix-cache hits first, then fresh pages."""
    output_token_ids: tuple[int, ...] = ()
    """Tokens emitted before a preemption, given only when penalties count them or a grammar has to follow them."""
    grammar: Grammar | None = None
    """None: any token may follow any other."""
    max_len: int = 0
    """Tokens at which the sequence ends, if its slot speculates: none is sampled past it. 0: the slot never does."""
    prefix_token_ids: tuple[int, ...] = ()
    """Tokens of the prefix-cache hits, which no chunk will bring, if its slot speculates."""


@dataclass(frozen=True, slots=True)
class PromptChunk:
    """Known tokens [start, start + len(token_ids)) of one sequence, run in this step."""

    slot: int
    start: int
    token_ids: tuple[int, ...]
    sample: bool
    """Last chunk: the next token is sampled and the slot decodes from the next step on."""


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What one step runs, as a diff against the worker's slots, applied in field order.

    Every slot whose last chunk ran in an earlier step decodes in each step until it is removed: one token, or with
    speculation one more than the draft tokens that were accepted. So a pure decode step carries only its id, the number
    of draft tokens and the pages appended.
    """

    step_id: int
    removed_slots: tuple[int, ...] = ()
    added_slots: tuple[SlotAdd, ...] = ()
    appended_pages: tuple[tuple[int, int], ...] = ()
    """(slot, page id) pairs, put at the end of the slot's page table."""
    chunks: tuple[PromptChunk, ...] = ()
    num_draft_tokens: int = 0
    """Verified for each slot that speculates, at most; 0 is plain decoding."""
    undrafted_slots: tuple[int, ...] = ()
    """Decoding slots that speculate no more, from this step on. Applied before all other fields."""

    def to_pb(self) -> worker_pb2.StepPlan:
        """Return the protobuf form."""
        return worker_pb2.StepPlan(
            step_id=self.step_id,
            removed_slots=self.removed_slots,
            added_slots=[
                worker_pb2.SlotAdd(
                    slot=added.slot,
                    sampling=added.sampling.to_pb(),
                    page_ids=added.page_ids,
                    output_token_ids=added.output_token_ids,
                    grammar=None if added.grammar is None else added.grammar.to_pb(),
                    max_len=added.max_len,
                    prefix_token_ids=added.prefix_token_ids,
                )
                for added in self.added_slots
            ],
            append_slots=[slot for slot, _ in self.appended_pages],
            append_pages=[page for _, page in self.appended_pages],
            chunks=[
                worker_pb2.PromptChunk(
                    slot=chunk.slot,
                    start=chunk.start,
                    token_ids=chunk.token_ids,
                    sample=chunk.sample,
                )
                for chunk in self.chunks
            ],
            num_draft_tokens=self.num_draft_tokens,
            undrafted_slots=self.undrafted_slots,
        )

    @classmethod
    def from_pb(cls, pb: worker_pb2.StepPlan) -> StepPlan:
        """Read the protobuf form."""
        return cls(
            step_id=pb.step_id,
            removed_slots=tuple(pb.removed_slots),
            added_slots=tuple(
                SlotAdd(
                    slot=added.slot,
                    sampling=SamplingParams.from_pb(added.sampling),
                    page_ids=tuple(added.page_ids),
                    output_token_ids=tuple(added.output_token_ids),
                    grammar=Grammar.from_pb(added.grammar) if added.HasField("grammar") else None,
                    max_len=added.max_len,
                    prefix_token_ids=tuple(added.prefix_token_ids),
                )
                for added in pb.added_slots
            ),
            appended_pages=tuple(zip(pb.append_slots, pb.append_pages, strict=True)),
            chunks=tuple(
                PromptChunk(chunk.slot, chunk.start, tuple(chunk.token_ids), chunk.sample) for chunk in pb.chunks
            ),
            num_draft_tokens=pb.num_draft_tokens,
            undrafted_slots=tuple(pb.undrafted_slots),
        )


@dataclass(frozen=True, slots=True)
class CollectiveUse:
    """What one rank did in one kind of collective during one step."""

    kind: str
    """all_reduce or all_gather."""
    num_calls: int
    num_bytes: int
    """Put in by this rank."""
    busy_us: int
    """Inside the calls, waiting included."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one rank says of one step. Rank 0 carries tokens, the others the id alone."""

    step_id: int
    rank: int = 0
    slots: tuple[int, ...] = ()
    """Slots sampled in this step, each once."""
    token_ids: tuple[int, ...] = ()
    """The sampled tokens, slot by slot."""
    logprobs: dict[int, tuple[TokenLogprobs, ...]] = field(default_factory=dict)
    """By slot, for the slots that asked, one for each of its tokens."""
    step_us: int = 0
    collective_us: int = 0
    error: str = ""
    """Set when the rank cannot go on; it names the cause."""
    failures: dict[int, str] = field(default_factory=dict)
    """By slot, why its sequence cannot go on; its token of this step is void."""
    mask_us: int = 0
    """Time spent on grammar masks, beside the step or within it."""
    collectives: tuple[CollectiveUse, ...] = ()
    """Of this step, by kind; empty where they are not timed one by one, as inside a captured graph."""
    started_us: int = 0
    """Unix time at which the step began on this rank."""
    num_tokens: int = 0
    """Run in this step; 0 if the plan only changed the batch."""
    bucket_tokens: int = 0
    """Tokens of the captured graph that the step ran in, padding included; 0 where steps run at their exact size."""
    bucket_rows: int = 0
    """Sampled rows of that graph."""
    counts: tuple[int, ...] = ()
    """Tokens of each slot, parallel to `slots`: the accepted draft tokens and one more, or none of a slot at its
    `max_len`. Empty: one of each."""
    drafted: tuple[int, ...] = ()
    """Draft tokens that were verified for each slot, parallel to `slots`; empty: none."""
    draft_us: int = 0
    """Of `step_us`, spent on drafting."""

    def tokens_by_slot(self) -> list[tuple[int, ...]]:
        """Return the tokens of each slot, parallel to `slots`."""
        if not self.counts:
            return [(token,) for token in self.token_ids]
        ends = accumulate(self.counts)
        return [self.token_ids[end - count : end] for count, end in zip(self.counts, ends, strict=True)]

    def to_pb(self) -> worker_pb2.StepResult:
        """Return the protobuf form."""
        return worker_pb2.StepResult(
            step_id=self.step_id,
            rank=self.rank,
            slots=self.slots,
            token_ids=self.token_ids,
            logprobs=[
                worker_pb2.SlotLogprobs(slot=slot, logprobs=value.to_pb())
                for slot, values in self.logprobs.items()
                for value in values
            ],
            step_us=self.step_us,
            collective_us=self.collective_us,
            error=self.error,
            failures=[worker_pb2.SlotFailure(slot=slot, detail=detail) for slot, detail in self.failures.items()],
            mask_us=self.mask_us,
            collectives=[
                worker_pb2.CollectiveUse(
                    kind=use.kind, num_calls=use.num_calls, num_bytes=use.num_bytes, busy_us=use.busy_us
                )
                for use in self.collectives
            ],
            started_us=self.started_us,
            num_tokens=self.num_tokens,
            bucket_tokens=self.bucket_tokens,
            bucket_rows=self.bucket_rows,
            counts=self.counts,
            drafted=self.drafted,
            draft_us=self.draft_us,
        )

    @classmethod
    def from_pb(cls, pb: worker_pb2.StepResult) -> StepResult:
        """Read the protobuf form."""
        logprobs: dict[int, tuple[TokenLogprobs, ...]] = {}
        for item in pb.logprobs:
            logprobs[item.slot] = (*logprobs.get(item.slot, ()), TokenLogprobs.from_pb(item.logprobs))
        return cls(
            step_id=pb.step_id,
            rank=pb.rank,
            slots=tuple(pb.slots),
            token_ids=tuple(pb.token_ids),
            logprobs=logprobs,
            step_us=pb.step_us,
            collective_us=pb.collective_us,
            error=pb.error,
            failures={item.slot: item.detail for item in pb.failures},
            mask_us=pb.mask_us,
            collectives=tuple(
                CollectiveUse(use.kind, use.num_calls, use.num_bytes, use.busy_us) for use in pb.collectives
            ),
            started_us=pb.started_us,
            num_tokens=pb.num_tokens,
            bucket_tokens=pb.bucket_tokens,
            bucket_rows=pb.bucket_rows,
            counts=tuple(pb.counts),
            drafted=tuple(pb.drafted),
            draft_us=pb.draft_us,
        )

"""What is scheduled: requests, their sequences, and the token events that come out.

Owns the state of one request. Knows nothing of pages other than their ids, nor of how steps are planned.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import NamedTuple

from tpserve.coordinator.config import SchedulerConfig
from tpserve.proto.messages import FinishReason, Grammar, SamplingParams, TokenLogprobs

_MASK_64 = (1 << 64) - 1


class RequestInvalid(ValueError):
    """The request can never run; the message names the numbers."""


class QueueFull(RuntimeError):
    """As many requests wait as may wait; the client should come back later."""


@dataclass(frozen=True, slots=True)
class Request:
    """What a client asked for, in tokens."""

    request_id: int
    """Chosen by the caller, unique among unfinished requests."""
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    max_tokens: int
    """Output tokens of each choice; `max_model_len` may end it earlier."""
    n: int = 1
    """Choices; each is a sequence of its own."""
    stop_token_ids: frozenset[int] = frozenset()
    """A sequence ends after one of these, which is reported like any token."""
    grammar: Grammar | None = None
    """What each choice must match; only passed on."""
    emitted: tuple[tuple[int, ...], ...] = ()
    """By choice, output tokens that another replica has sent to the client; it goes on behind them, as after the loss
    of a group. Empty: nothing was."""


class TokenEvent(NamedTuple):
    """New tokens of one choice.

    A named tuple: a step makes one for each running sequence, and a frozen dataclass costs three times as much.
    """

    request_id: int
    choice: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    """Parallel to `token_ids`, or empty if none were asked for."""
    finish: FinishReason | None = None
    num_cached_tokens: int = 0
    """Prompt tokens whose KV was there when the sequence first ran; given in its first event. Choices after the first
    find most of the prompt computed by the first, so only choice 0 says what earlier requests have left."""
    detail: str = ""
    """With FAILED, why."""


class SequenceStatus(Enum):
    """Where a sequence is. Only PREFILLING and DECODING ones hold a slot and pages."""

    WAITING = 0
    PREFILLING = 1
    """Known tokens are being computed by chunks."""
    DECODING = 2
    """Its last chunk is scheduled; every plan decodes one token of it."""
    DRAINING = 3
    """All its tokens are scheduled; the results of the last steps are still to come."""
    FINISHED = 4


@dataclass(slots=True, eq=False)
class Sequence:
    """One token stream: one choice of a request."""

    group: RequestGroup
    request_id: int
    choice: int
    order: int
    """Arrival order over all sequences: earlier ones have right of way, later ones are preempted first."""
    sampling: SamplingParams
    stop_token_ids: frozenset[int]
    tokens: list[int]
    """Prompt and confirmed output tokens."""
    num_prompt_tokens: int
    max_len: int
    """Tokens at which the sequence ends."""
    status: SequenceStatus = SequenceStatus.WAITING
    slot: int | None = None
    page_ids: list[int] = field(default_factory=list)
    """Page table, as the worker has it after the plans made so far."""
    page_keys: list[bytes] = field(default_factory=list)
    """Prefix-cache keys of the leading full pages, as far as computed."""
    num_committed_pages: int = 0
    """Leading pages of `page_ids` that the prefix cache knows."""
    num_computed_tokens: int = 0
    """Tokens whose KV is scheduled, while PREFILLING."""
    decode_base: int = 0
    """See `StepProgress`; the next two as well."""
    last_step: int = 0
    """Step that samples the last token that `max_len` allows, while DECODING."""
    next_page_step: int = 0
    """Step that writes the first token past the page table, while DECODING."""
    speculates: bool = False
    """Whether draft tokens are verified for it; not any more, once it was given up."""
    planned: deque[int] = field(default_factory=deque)
    """With speculation, the most tokens that each step in flight can give it, oldest first."""
    waiting_since_step: int = 0
    resume_after_step: int = 0
    """Step whose result must be known before the sequence may run again."""
    has_run: bool = False
    """It lost its place to a preemption or a lost group; nobody passes it on its way back."""
    num_cached_tokens: int = 0
    """Not yet reported; zero after the first event."""


@dataclass(slots=True, eq=False)
class RequestGroup:
    """The sequences of one unfinished request."""

    request: Request
    sequences: tuple[Sequence, ...] = ()
    num_unfinished: int = 0
    started: bool = False
    """Whether one of the sequences has run."""
    speculates: bool = False
    """Whether its sequences are drafted for when they start."""
    prompt_leader: Sequence | None = None
    """The sequence that is computing the prompt's full pages, for which the other choices wait."""


def make_group(request: Request, first_order: int, max_len: int, step: int, speculates: bool) -> RequestGroup:
    """Return the sequences of a request, waiting since `step`, in arrival order from `first_order` on."""
    group = RequestGroup(request, num_unfinished=request.n, speculates=speculates)
    group.sequences = tuple(
        Sequence(
            group=group,
            request_id=request.request_id,
            choice=choice,
            order=first_order + choice,
            sampling=replace(request.sampling, seed=choice_seed(request.sampling.seed, choice)),
            stop_token_ids=request.stop_token_ids,
            tokens=[*request.prompt_token_ids, *(request.emitted[choice] if request.emitted else ())],
            num_prompt_tokens=len(request.prompt_token_ids),
            max_len=max_len,
            waiting_since_step=step,
            speculates=speculates,
        )
        for choice in range(request.n)
    )
    return group


def checked_max_len(request: Request, config: SchedulerConfig) -> int:
    """Return the number of tokens at which the request's sequences end.

    Raises
    ------
    RequestInvalid
        The request can never run; the message names the numbers.
    """
    num_prompt = len(request.prompt_token_ids)
    if num_prompt == 0:
        raise RequestInvalid("the prompt has no tokens; it needs at least one")
    if request.n < 1:
        raise RequestInvalid(f"n is {request.n}; it must be 1 or more")
    if request.max_tokens < 1:
        raise RequestInvalid(f"max_tokens is {request.max_tokens}; it must be 1 or more")
    if num_prompt >= config.max_model_len:
        raise RequestInvalid(
            f"the prompt has {num_prompt} tokens; with one output token it exceeds the model's "
            f"{config.max_model_len} tokens, so shorten it to {config.max_model_len - 1} or less"
        )
    max_len = min(num_prompt + request.max_tokens, config.max_model_len)
    if request.emitted and len(request.emitted) != request.n:
        raise RequestInvalid(f"emitted tokens are given for {len(request.emitted)} choices; there are {request.n}")
    if (most := max(map(len, request.emitted), default=0)) >= max_len - num_prompt:
        raise RequestInvalid(f"{most} tokens of a choice were emitted already; it may have {max_len - num_prompt}")
    num_pages = -(-(max_len - 1) // config.page_size)  # the last token is sampled, but never fed back
    if num_pages > config.num_pages:
        raise RequestInvalid(
            f"{num_prompt} prompt tokens and up to {max_len - num_prompt} output tokens need {num_pages} KV pages "
            f"of {config.page_size} tokens; there are {config.num_pages}, so shorten the prompt or max_tokens"
        )
    return max_len


def choice_seed(seed: int, choice: int) -> int:
    """Return the generator key of one choice: the seed itself for choice 0, a mix of both for the others.

    The mix is one output of SplitMix64 (Steele, Lea, Flood 2014, figure 15), started at `seed` and `choice` steps on.
    """
    if choice == 0:
        return seed
    z = (seed + choice * 0x9E3779B97F4A7C15) & _MASK_64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return z ^ (z >> 31)

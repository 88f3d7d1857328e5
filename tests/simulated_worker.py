"""A worker that executes step plans by the letter of `worker.proto`, with tokens in place of tensors.

It is the oracle of the scheduler's tests. KV of a position is simulated as the pair (token, digest of all tokens up to
it), as a real one depends on its whole prefix. Attention of a position reads every earlier position through the page
table, and fails on a page that was never written, was overwritten, or belongs to another prefix. The sampled token is a
function of what was read, so a sequence's text is right only if every read was.

With speculation, some of its draft tokens are right and the others are not, by a random number of the step.
"""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass, field
from hashlib import blake2b
from random import Random

from tpserve.coordinator.config import SchedulerConfig
from tpserve.coordinator.request import Request, choice_seed
from tpserve.proto.messages import FinishReason, SamplingParams, StepPlan, StepResult, TokenLogprobs

VOCAB_SIZE = 24
_EMPTY = b"\0" * 8


@functools.lru_cache(maxsize=1 << 16)
def extend_digest(digest: bytes, token: int) -> bytes:
    """Digest of a prefix and one more token."""
    return blake2b(digest + token.to_bytes(4, "little"), digest_size=8).digest()


def sample_token(sampling: SamplingParams, digest: bytes, output: list[int]) -> int:
    """The token after a prefix; it depends on the output so far only if penalties are on, as in a real sampler."""
    penalised = bytes(sorted(output)) if sampling.needs_output_history else b""
    key = sampling.seed.to_bytes(8, "little") + digest + penalised
    return int.from_bytes(blake2b(key, digest_size=4).digest(), "little") % VOCAB_SIZE


def expected_output(request: Request, choice: int, max_model_len: int) -> tuple[list[int], FinishReason]:
    """Output tokens of one choice, computed alone."""
    sampling = SamplingParams(
        seed=choice_seed(request.sampling.seed, choice), frequency_penalty=request.sampling.frequency_penalty
    )
    digest = _EMPTY
    for token in request.prompt_token_ids:
        digest = extend_digest(digest, token)
    output: list[int] = []
    while True:
        output.append(sample_token(sampling, digest, output))
        if output[-1] in request.stop_token_ids:
            return output, FinishReason.STOP
        if len(output) == request.max_tokens or len(request.prompt_token_ids) + len(output) == max_model_len:
            return output, FinishReason.LENGTH
        digest = extend_digest(digest, output[-1])


class ContractBroken(AssertionError):
    """A plan asks for what the contract forbids, or reads what is not there."""


def require(condition: bool, message: str) -> None:
    """Raise ContractBroken unless the condition holds; unlike `assert`, says the same at any optimisation level."""
    if not condition:
        raise ContractBroken(message)


@dataclass(slots=True)
class _Slot:
    sampling: SamplingParams
    page_table: list[int]
    output: list[int]
    next_position: int | None = None
    """First position not computed; None before the first chunk."""
    last_token: int | None = None
    """Sampled and not fed back yet; None while the prompt is incomplete."""
    max_len: int = 0
    """Tokens at which it ends, if it speculates."""
    is_drafted: bool = False

    @property
    def is_full(self) -> bool:
        """Whether it has reached its end, and only waits to be removed."""
        return bool(self.max_len) and self.next_position is not None and self.next_position + 1 >= self.max_len


@dataclass(frozen=True, slots=True)
class _Work:
    """What one slot computes in one step."""

    slot: int
    start: int
    tokens: tuple[int, ...]
    num_draft_tokens: int = 0
    """Verified behind `tokens`."""
    num_accepted: int = 0

    @property
    def num_tokens(self) -> int:
        return len(self.tokens) + self.num_draft_tokens


@dataclass(frozen=True, slots=True)
class _Cell:
    token: int
    digest: bytes


@dataclass(slots=True)
class SimulatedWorker:
    """Rank 0 of a simulated group."""

    config: SchedulerConfig
    next_step: int
    slots: dict[int, _Slot] = field(default_factory=dict)
    kv: dict[tuple[int, int], _Cell] = field(default_factory=dict)
    """(page, offset) -> what was written there last."""

    def execute(self, plan: StepPlan) -> StepResult:
        """Run one plan and return the sampled tokens.

        Raises
        ------
        ContractBroken
            The plan is not one that a worker can run.
        """
        require(plan.step_id == self.next_step, f"plan {plan.step_id} after {self.next_step - 1}")
        self.next_step += 1
        self._apply_diff(plan)
        work = [self._decode(plan, number, slot) for number, slot in self.slots.items() if slot.last_token is not None]
        full = [number for number, slot in self.slots.items() if slot.is_full]
        work = [item for item in work if item.slot not in full]
        for chunk in plan.chunks:
            slot = self._slot(chunk.slot)
            require(slot.last_token is None, f"chunk for decoding slot {chunk.slot}")
            require(len(chunk.token_ids) > 0, f"empty chunk for slot {chunk.slot}")
            require(
                slot.next_position in (None, chunk.start), f"chunk at {chunk.start}, slot is at {slot.next_position}"
            )
            work.append(_Work(chunk.slot, chunk.start, chunk.token_ids))
        if self.config.drafts_on_device:
            self._check_device(plan)
        num_tokens = sum(item.num_tokens for item in work)
        require(num_tokens <= self.config.max_num_batched_tokens, f"{num_tokens} tokens in one step")
        require(num_tokens > 0 or bool(full), "a step without tokens")
        require(len({item.slot for item in work}) == len(work), "two chunks for one slot")
        self._check_writes(work)
        # Whatever this step reads was written by an earlier one: all reads come before any write.
        prefixes = [self._read_prefix(item.slot, item.start) for item in work]
        unsampled = {chunk.slot for chunk in plan.chunks if not chunk.sample}
        tokens: dict[int, list[int]] = {number: [] for number in full}
        for item, prefix in zip(work, prefixes, strict=True):
            digest = self._run(item, prefix)
            if item.slot not in unsampled:
                tokens[item.slot] = self._sample(item, digest)
        return self._result(plan, tokens, {item.slot: item.num_draft_tokens for item in work})

    def _check_device(self, plan: StepPlan) -> None:
        """Require what a GPU does."""
        require(not plan.undrafted_slots, "drafts are given up, which saves nothing here")
        for added in plan.added_slots:
            plain = added.sampling.needs_output_history or added.grammar is not None
            require(not (plain and added.max_len), f"slot {added.slot} speculates with penalties or a grammar")
        if not plan.num_draft_tokens:
            return
        require(not plan.chunks, "draft tokens are verified beside prompts")
        decoding = [slot for slot in self.slots.values() if slot.last_token is not None]
        # Those that do not speculate, and those at their end, have padded rows.
        num_rows = len(decoding) * (1 + plan.num_draft_tokens)
        require(num_rows <= self.config.max_num_batched_tokens, f"{num_rows} rows in one step")
        require(any(slot.max_len for slot in decoding), "draft tokens for nobody")

    def _decode(self, plan: StepPlan, number: int, slot: _Slot) -> _Work:
        """What a decoding slot runs; how many of its draft tokens are right is up to chance."""
        assert slot.last_token is not None
        assert slot.next_position is not None
        random = Random(f"{plan.step_id} {number}")
        most = max(0, min(plan.num_draft_tokens, slot.max_len - slot.next_position - 2)) if slot.is_drafted else 0
        num_drafts = random.choice([most, random.randint(0, most)])
        return _Work(number, slot.next_position, (slot.last_token,), num_drafts, random.randint(0, num_drafts))

    def _slot(self, number: int) -> _Slot:
        require(number in self.slots, f"slot {number} is empty")
        return self.slots[number]

    def _apply_diff(self, plan: StepPlan) -> None:
        for number in plan.undrafted_slots:
            slot = self._slot(number)
            require(slot.is_drafted and slot.last_token is not None, f"slot {number} has no drafts to be given up")
            slot.is_drafted = False
        for number in plan.removed_slots:
            self._slot(number)
            del self.slots[number]
        for added in plan.added_slots:
            require(added.slot not in self.slots, f"slot {added.slot} is taken")
            require(0 <= added.slot < self.config.max_num_seqs, f"slot {added.slot} does not exist")
            require(
                added.sampling.needs_output_history or added.grammar is not None or not added.output_token_ids,
                "output history nobody asked for",
            )
            require(
                not added.max_len or len(added.prefix_token_ids) % self.config.page_size == 0,
                f"slot {added.slot} has hits of {len(added.prefix_token_ids)} tokens",
            )
            self.slots[added.slot] = _Slot(
                added.sampling,
                list(added.page_ids),
                list(added.output_token_ids),
                max_len=added.max_len,
                is_drafted=added.max_len > 0,
            )
        for number, page in plan.appended_pages:
            slot = self._slot(number)
            require(slot.last_token is not None, f"slot {number} gets a page before it decodes")
            assert slot.next_position is not None
            # What is in flight may bring it that far, and this step further.
            ahead = (self.config.max_num_draft_tokens + 1) * self.config.max_in_flight_steps if slot.max_len else 0
            room = len(slot.page_table) * self.config.page_size - slot.next_position
            require(0 <= room <= ahead, f"slot {number} gets a page while it computes position {slot.next_position}")
            slot.page_table.append(page)
        for number, slot in self.slots.items():
            table = slot.page_table
            require(len(set(table)) == len(table), f"slot {number} has a page twice: {table}")
            require(all(0 <= page < self.config.num_pages for page in table), f"slot {number} leaves the pool: {table}")

    def _check_writes(self, work: list[_Work]) -> None:
        """Require that nobody writes past its page table, or into a page that another slot holds."""
        holders = Counter(page for slot in self.slots.values() for page in slot.page_table)
        size = self.config.page_size
        for item in work:
            table = self.slots[item.slot].page_table
            end = item.start + item.num_tokens
            require(end < self.config.max_model_len, f"slot {item.slot} computes position {end - 1}")
            require(end <= len(table) * size, f"slot {item.slot} has no page for position {end - 1}")
            for page in table[item.start // size : -(-end // size)]:
                require(holders[page] == 1, f"slot {item.slot} writes to page {page}, held {holders[page]} times")

    def _cell_key(self, slot: _Slot, position: int) -> tuple[int, int]:
        index, offset = divmod(position, self.config.page_size)
        return slot.page_table[index], offset

    def _read_prefix(self, number: int, end: int) -> bytes:
        """Attend to positions [0, end) and return their digest."""
        size, table = self.config.page_size, self.slots[number].page_table
        digest = _EMPTY
        for start in range(0, end, size):  # most of the time of random runs is spent here
            page = table[start // size]
            for offset in range(min(size, end - start)):
                cell = self.kv.get((page, offset))
                if cell is None:
                    raise ContractBroken(f"slot {number} reads position {start + offset}, which was never written")
                digest = extend_digest(digest, cell.token)
                if cell.digest != digest:
                    raise ContractBroken(f"slot {number} reads position {start + offset} of another prefix")
        return digest

    def _run(self, item: _Work, digest: bytes) -> bytes:
        """Compute tokens behind the prefix with that digest, write their KV, and return the digest at the last one."""
        slot = self.slots[item.slot]
        for position, token in enumerate(item.tokens, item.start):
            digest = extend_digest(digest, token)
            self.kv[self._cell_key(slot, position)] = _Cell(token, digest)
        slot.next_position = item.start + len(item.tokens)
        return digest

    def _sample(self, item: _Work, digest: bytes) -> list[int]:
        """Sample the token after the last one that ran, and after each draft token that it turns out to be."""
        slot = self.slots[item.slot]
        emitted: list[int] = []
        for index in range(item.num_draft_tokens + 1):
            token = sample_token(slot.sampling, digest, slot.output)
            slot.output.append(token)
            emitted.append(token)
            if index == item.num_draft_tokens:
                break
            right = index < item.num_accepted
            draft = token if right else (token + 1) % VOCAB_SIZE
            digest = extend_digest(digest, draft)
            self.kv[self._cell_key(slot, item.start + 1 + index)] = _Cell(draft, digest)
            if not right:
                for wrong in range(index + 1, item.num_draft_tokens):
                    self.kv[self._cell_key(slot, item.start + 1 + wrong)] = _Cell(0, _EMPTY)
                break
        slot.last_token = emitted[-1]
        slot.next_position = item.start + len(item.tokens) + len(emitted) - 1
        return emitted

    def _result(self, plan: StepPlan, tokens: dict[int, list[int]], drafted: dict[int, int]) -> StepResult:
        logprobs: dict[int, tuple[TokenLogprobs, ...]] = {
            number: tuple(TokenLogprobs(-float(token)) for token in emitted)
            for number, emitted in tokens.items()
            if self.slots[number].sampling.num_logprobs is not None
        }
        plain = all(len(emitted) == 1 for emitted in tokens.values()) and not any(drafted.values())
        return StepResult(
            plan.step_id,
            slots=tuple(tokens),
            token_ids=tuple(token for emitted in tokens.values() for token in emitted),
            logprobs=logprobs,
            counts=() if plain else tuple(len(emitted) for emitted in tokens.values()),
            drafted=() if plain else tuple(drafted.get(number, 0) for number in tokens),
        )

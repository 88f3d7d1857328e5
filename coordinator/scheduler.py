"""Decides what each step runs: `schedule() -> StepPlan`, then `update(StepResult) -> token events`.

Pure and deterministic: no clock, I/O, random numbers or asyncio; the same calls give the same plans. Owns the life of
every sequence. Knows nothing of text, tensors or workers other than the contract in `worker.proto`.

There is no prefill phase and no decode phase. Computed tokens of each sequence catch up with its tokens: a step gives
one token to every decoding slot, and what is left of the token budget, or as much as is well spent on them
(`prompt_share`), to chunks of known tokens, of sequences that have begun and of those that wait, the shortest first
(`prompt_turns`). "Known tokens" are the prompt and, after a preemption or the loss of the group, the tokens emitted so
far.

Plans are made ahead of results. A worker runs plans in order, so whatever plan k frees, plan k may hand out, and pages
and slots are freed here as soon as it is decided that the next plan will remove their slot.

A decode step touches only the sequences for which something changes, unless it verifies draft tokens; see
`decode_progress`.
"""

from __future__ import annotations

from collections.abc import Iterable

from tpserve.coordinator.config import SchedulerConfig
from tpserve.coordinator.decode_progress import BoundedProgress, DecodeProgress, StepProgress
from tpserve.coordinator.draft_length import DraftLength
from tpserve.coordinator.drafting import Drafting
from tpserve.coordinator.integrity import check_sequences
from tpserve.coordinator.kv_pages import KVPages
from tpserve.coordinator.prompt_share import PromptShare
from tpserve.coordinator.prompt_turns import prompts_in_turn
from tpserve.coordinator.request import (
    QueueFull,
    Request,
    RequestGroup,
    Sequence,
    SequenceStatus,
    TokenEvent,
    checked_max_len,
    make_group,
)
from tpserve.coordinator.scheduler_stats import SchedulerStats
from tpserve.coordinator.sequence_list import SequenceList
from tpserve.coordinator.slot_table import SlotTable
from tpserve.coordinator.step_pace import StepSize
from tpserve.proto.messages import FinishReason, PromptChunk, SlotAdd, StepPlan, StepResult
from tpserve.proto.rank import SizeTime


class Scheduler:
    """Continuous batching over paged KV, for one TP group.

    Parameters
    ----------
    draft_length
        With speculation, a rule in place of the one that the configuration names.
    """

    def __init__(self, config: SchedulerConfig, draft_length: DraftLength | None = None) -> None:
        self._config = config
        self._groups: dict[int, RequestGroup] = {}
        self._waiting = SequenceList()
        self._prefilling = SequenceList()
        self._running = SequenceList()
        self._slots = SlotTable(config.max_num_seqs)
        self._pages = self._make_pages()
        progress = BoundedProgress if config.max_num_draft_tokens else StepProgress
        self._progress: DecodeProgress = progress(config.page_size)
        self._drafting = Drafting(config, draft_length)
        self._share = PromptShare(config.max_num_batched_tokens, config.wait_weight)
        self.latest_size = StepSize(0, has_prompts=False)
        """Of the latest plan."""
        self._next_step = 1
        self._last_result = 0
        self._next_order = 0
        self._num_decoding = 0
        self._num_queued = 0
        self._num_query_tokens = 0
        self._num_hit_tokens = 0
        self._num_preemptions = 0
        self._started: list[tuple[int, int]] = []
        # False once nobody who waits can run, until a slot, a page or a result comes in: spares the search.
        self._admission_open = True

    def _make_pages(self) -> KVPages:
        config = self._config
        return KVPages(config.num_pages, config.page_size, config.enable_prefix_cache, config.prefix_lookahead)

    # ---- state

    @property
    def has_unfinished(self) -> bool:
        """Whether any sequence still owes an event with `finish`."""
        return bool(self._groups)

    @property
    def speculates(self) -> bool:
        """Whether steps may verify draft tokens."""
        return self._config.max_num_draft_tokens > 0

    @property
    def num_running(self) -> int:
        """Sequences that hold a slot."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for a slot or for pages."""
        return len(self._waiting)

    @property
    def num_in_flight_steps(self) -> int:
        """Plans whose result has not come yet."""
        return self._slots.num_in_flight

    @property
    def is_full(self) -> bool:
        """Whether as many plans as may be wait for their results."""
        return self._slots.num_in_flight >= self._config.max_in_flight_steps

    def stats(self) -> SchedulerStats:
        """Return gauges and counters; costs no more than a look at who waits."""
        return SchedulerStats(
            num_running=len(self._running),
            num_waiting=len(self._waiting),
            num_deferred=sum(sequence.group.prompt_leader is not None for sequence in self._waiting),
            num_queued_requests=self._num_queued,
            num_pages=self._config.num_pages,
            page_size=self._config.page_size,
            has_prefix_cache=self._config.enable_prefix_cache,
            num_held_pages=self._pages.num_held,
            num_evictable_pages=self._pages.num_evictable,
            num_prefix_query_tokens=self._num_query_tokens,
            num_prefix_hit_tokens=self._num_hit_tokens,
            num_preemptions=self._num_preemptions,
            num_steps=self._next_step - 1,
        )

    def check_integrity(self) -> None:
        """Compare every redundant piece of state; for tests, costs as much as there is.

        Raises
        ------
        AssertionError
            A page or a slot is leaked or owned twice, or the lists disagree; the message says which.
        """
        running = list(self._running)
        self._pages.check_integrity(running)
        self._slots.check_integrity(running)
        check_sequences(
            self._groups.values(), self._waiting, self._prefilling, running, self._num_decoding, self._num_queued
        )
        num_drafting = sum(s.speculates for s in running if s.status is SequenceStatus.DECODING)
        counted = self._drafting.num_drafting
        assert num_drafting == counted, f"{counted} counted as drafting, {num_drafting} are"
        self._progress.check_integrity(self._num_decoding)

    def take_started(self) -> list[tuple[int, int]]:
        """Return (request id, choice) of what has entered the batch for the first time since the last call."""
        started, self._started = self._started, []
        return started

    def learn_size_times(self, times: Iterable[SizeTime]) -> None:
        """Take in what steps of each size take on the workers at hand."""
        self._share.learn(tuple(times))

    # ---- requests come and go

    def add_request(self, request: Request) -> None:
        """Queue a request.

        Raises
        ------
        RequestInvalid
            It can never run.
        QueueFull
            `max_num_queued_requests` wait already.
        ValueError
            The id belongs to an unfinished request.
        """
        if request.request_id in self._groups:
            raise ValueError(f"request id {request.request_id} is in use; ids of unfinished requests must differ")
        max_len = checked_max_len(request, self._config)
        if self._num_queued >= self._config.max_num_queued_requests + self._slots.num_free:
            raise QueueFull(f"{self._num_queued} requests wait already; try again later")
        speculates = self._drafting.may_draft_for(request)
        group = make_group(request, self._next_order, max_len, self._next_step, speculates)
        self._next_order += request.n
        self._groups[request.request_id] = group
        self._num_queued += 1
        for sequence in group.sequences:
            self._waiting.add(sequence)
        self._admission_open = True

    def abort(self, request_id: int, choice: int | None = None) -> None:
        """End a request, or one choice of it, without events.

        Its pages are free at once, its slots leave with the next plan, and tokens still in flight are dropped.
        An unknown id is a request that has just finished, and is ignored.
        """
        group = self._groups.get(request_id)
        if group is None:
            return
        for sequence in group.sequences:
            if sequence.status is not SequenceStatus.FINISHED and choice in (None, sequence.choice):
                self._finish(sequence)

    def reset_after_group_loss(self) -> None:
        """Start over on rebuilt workers, whose batch and KV are empty.

        Plans in flight are forgotten and so is the prefix cache. Every unfinished sequence waits again, with its prompt
        and the tokens emitted so far; a result that comes in late from the lost group must not be given to `update`.
        Step ids go on.
        """
        self._slots.reset()
        self._pages = self._make_pages()
        self._progress.clear()
        self._drafting.clear()
        self._running.clear()
        self._prefilling.clear()
        self._waiting.clear()
        self._num_decoding = 0
        self._last_result = self._next_step - 1
        for group in self._groups.values():
            group.prompt_leader = None
            for sequence in group.sequences:
                if sequence.status is not SequenceStatus.FINISHED:
                    sequence.page_ids = []
                    sequence.planned.clear()
                    self._requeue(sequence, has_run=sequence.status is not SequenceStatus.WAITING)

    # ---- a step

    def schedule(self) -> StepPlan | None:
        """Plan the next step.

        Returns
        -------
        StepPlan or None
            None if there is nothing to run now, or if `max_in_flight_steps` plans wait for their results. Then a
            result, a new request or nothing at all is to be waited for.
        """
        if self.is_full:
            return None
        step = self._next_step
        undrafted = self._drafting.give_up(self._num_decoding, self._running)
        has_prompts = bool(self._prefilling or (self._waiting and self._admission_open and self._slots.num_free))
        num_draft_tokens = self._drafting.choose(self._num_decoding, has_prompts)
        appended = self._grow_page_tables(step, num_draft_tokens)
        if not self._drafting.num_drafting:
            num_draft_tokens = 0  # those whom they were for have just been preempted
        num_decoding = self._num_decoding
        budget = self._config.max_num_batched_tokens - num_decoding * (1 + num_draft_tokens)
        touched: list[Sequence] = []
        chunks: list[PromptChunk] = []
        added: list[SlotAdd] = []
        admits = not (num_draft_tokens and self._config.drafts_on_device)
        self._feed_prompts(step, budget, admits, added, chunks, touched)
        if not chunks and not num_decoding:
            return None
        num_prompt_tokens = sum(len(chunk.token_ids) for chunk in chunks)
        num_tokens = num_decoding * (1 + num_draft_tokens) + num_prompt_tokens
        self.latest_size = StepSize(num_tokens, bool(chunks), num_draft_tokens)
        removed = self._slots.take_removed()
        plan = StepPlan(step, removed, tuple(added), tuple(appended), tuple(chunks), num_draft_tokens, undrafted)
        self._next_step += 1
        self._slots.open_step(step, num_decoding + sum(chunk.sample for chunk in chunks))
        self._progress.plan(step, num_draft_tokens)
        self._drafting.plan(num_draft_tokens)
        # From here on things count for the next plan: what this one computes may be shared, and who ends here leaves.
        for sequence in touched:
            self._after_chunk(sequence, step)
        for sequence in self._progress.take_ended(step):
            self._vacate(sequence)
            sequence.status = SequenceStatus.DRAINING
        return plan

    def _grow_page_tables(self, step: int, num_draft_tokens: int) -> list[tuple[int, int]]:
        """Give pages to each decoding sequence that may write past its page table in this step.

        Without a page left, the latest arrival is preempted, until there is one. The oldest running sequence is never
        preempted, since alone it always has room: so somebody always advances.
        """
        appended: list[tuple[int, int]] = []
        # Oldest first: whoever has got its page here is older than the ones to come, hence never their victim.
        for sequence in self._progress.due(step, num_draft_tokens):
            if sequence.status is not SequenceStatus.DECODING:
                continue  # preempted in this loop
            self._pages.commit(sequence, self._progress.num_computed(sequence, step - 1))
            num_pages = len(sequence.page_ids)
            missing = self._progress.num_missing_pages(sequence, num_draft_tokens)
            if self._grow(sequence, missing, step):
                assert sequence.slot is not None
                appended += [(sequence.slot, page_id) for page_id in sequence.page_ids[num_pages:]]
                self._progress.granted(sequence)
        return appended

    def _grow(self, sequence: Sequence, num_pages: int, step: int) -> bool:
        """Give pages to a sequence; return whether it is still there, or was itself the latest to be preempted."""
        for _ in range(num_pages):
            while not self._pages.grow(sequence):
                victim = self._running.latest
                self._preempt(victim, step)
                if victim is sequence:
                    return False
        return True

    def _run_chunk(self, sequence: Sequence, budget: int, chunks: list[PromptChunk], touched: list[Sequence]) -> int:
        """Schedule the next known tokens of a sequence, at most `budget`; return how many."""
        start = sequence.num_computed_tokens
        tokens = tuple(sequence.tokens[start : start + budget])
        sequence.num_computed_tokens = start + len(tokens)
        assert sequence.slot is not None
        sample = sequence.num_computed_tokens == len(sequence.tokens)
        chunks.append(PromptChunk(sequence.slot, start, tokens, sample))
        touched.append(sequence)
        return len(tokens)

    def _after_chunk(self, sequence: Sequence, step: int) -> None:
        self._pages.commit(sequence, sequence.num_computed_tokens)
        group = sequence.group
        if group.prompt_leader is sequence:
            if self._pages.has_shared(sequence.num_computed_tokens, sequence.num_prompt_tokens):
                group.prompt_leader = None
                self._admission_open = True
        if sequence.num_computed_tokens == len(sequence.tokens):
            self._prefilling.remove(sequence)
            self._num_decoding += 1
            self._drafting.begin(sequence)
            sequence.status = SequenceStatus.DECODING
            self._progress.begin(sequence, step)

    # ---- admission

    def _feed_prompts(
        self,
        step: int,
        budget: int,
        admits: bool,
        added: list[SlotAdd],
        chunks: list[PromptChunk],
        touched: list[Sequence],
    ) -> None:
        """Give the step's budget to prompts that have begun and, while slots and pages last, to those that wait.

        Whose turn it is, `prompts_in_turn` says. One without room may be passed by others that have it, unless it has
        waited `aging_steps` or has run before: such a one bars the way until it fits, which it does at the latest when
        nothing else runs.
        """
        admits = admits and self._admission_open and self._slots.num_free > 0
        waiting = self._waiting if admits else ()
        patience_steps = min(self._config.patience_steps, self._config.aging_steps)
        num_passed = 0
        turns = prompts_in_turn((*self._prefilling, *waiting), step, patience_steps)
        # Who has drafts gets none in a step with prompts: the fewer of those, the better.
        if turns and self._share.knows_times and not self._drafting.num_drafting:
            budget = min(budget, self._well_spent(turns))
        for sequence in turns:
            if budget == 0:
                return
            if sequence.status is SequenceStatus.WAITING:
                if not self._admission_open or self._slots.num_free == 0 or sequence.group.prompt_leader is not None:
                    continue  # no room for anybody, or it waits for a choice of its own request
                if not self._try_start(sequence, added):
                    num_passed += 1
                    if (
                        sequence.has_run
                        or step - sequence.waiting_since_step >= self._config.aging_steps
                        or num_passed > self._config.max_passed_sequences
                    ):
                        self._admission_open = False
                    continue
            budget -= self._run_chunk(sequence, budget, chunks, touched)
        if admits and self._slots.num_free:
            self._admission_open = False

    def _well_spent(self, sequences: Iterable[Sequence]) -> int:
        """Return how many known tokens to compute, of those that have a slot or would get one."""
        num_prompts, num_tokens, num_slots = 0, 0, self._slots.num_free
        for sequence in sequences:
            if sequence.status is SequenceStatus.WAITING:
                if num_slots == 0:
                    continue
                num_slots -= 1
            num_prompts += 1
            num_tokens += len(sequence.tokens) - sequence.num_computed_tokens
        return self._share.num_tokens(self._num_decoding, num_prompts, num_tokens) - self._num_decoding

    def _try_start(self, sequence: Sequence, added: list[SlotAdd]) -> bool:
        """Move a waiting sequence into the batch, if it may run again and there are pages for it."""
        if sequence.resume_after_step > self._last_result:
            return False
        matched = self._pages.match(sequence)
        # Each running sequence takes at most one page in the next page_size steps; with that much left over, nobody is
        # preempted soon for the sake of the one admitted now.
        if not self._pages.fits(sequence, matched, headroom=len(self._running)):
            return False
        added.append(self._start(sequence, matched))
        return True

    def _start(self, sequence: Sequence, matched: list[int]) -> SlotAdd:
        """Move a waiting sequence into the batch."""
        group = sequence.group
        num_cached = len(matched) * self._config.page_size
        if not sequence.has_run:
            # What was emitted elsewhere may be cached too, and is no prompt.
            num_hits = min(num_cached, sequence.num_prompt_tokens)
            self._num_query_tokens += sequence.num_prompt_tokens
            self._num_hit_tokens += num_hits
            sequence.num_cached_tokens = num_hits
            self._started.append((sequence.request_id, sequence.choice))
        if not group.started:
            group.started = True
            self._num_queued -= 1
        if len(group.sequences) > 1 and len(matched) < self._pages.num_shareable_pages(sequence.num_prompt_tokens):
            group.prompt_leader = sequence
        self._pages.take(sequence, matched)
        self._waiting.remove(sequence)
        self._running.add(sequence)
        self._prefilling.add(sequence)
        sequence.status = SequenceStatus.PREFILLING
        sequence.num_computed_tokens = num_cached
        grammar = group.request.grammar
        needs_output = sequence.sampling.needs_output_history or grammar is not None
        output = sequence.tokens[sequence.num_prompt_tokens :] if needs_output else ()
        slot = self._slots.acquire(sequence)
        self._drafting.start(slot)
        if not sequence.speculates:
            return SlotAdd(slot, sequence.sampling, tuple(sequence.page_ids), tuple(output), grammar)
        prefix = tuple(sequence.tokens[:num_cached])
        return SlotAdd(
            slot, sequence.sampling, tuple(sequence.page_ids), tuple(output), grammar, sequence.max_len, prefix
        )

    # ---- leaving

    def _preempt(self, sequence: Sequence, step: int) -> None:
        """Take slot and pages from a sequence before `step`; it computes its tokens again later.

        Tokens of it still in flight are valid samples and will be credited. It does not run again before they are
        known, so that none is sampled twice.
        """
        self._num_preemptions += 1
        self._vacate(sequence)
        sequence.resume_after_step = step - 1
        self._requeue(sequence, has_run=True)

    def _requeue(self, sequence: Sequence, has_run: bool) -> None:
        sequence.status = SequenceStatus.WAITING
        sequence.num_computed_tokens = 0
        sequence.speculates = sequence.group.speculates
        sequence.has_run = sequence.has_run or has_run
        self._waiting.add(sequence)
        self._admission_open = True

    def _vacate(self, sequence: Sequence) -> None:
        """Take a running sequence out of its slot and its pages; the caller sets its new status."""
        num_computed = sequence.num_computed_tokens
        if sequence.status is SequenceStatus.DECODING:
            num_computed = self._progress.num_computed(sequence, self._next_step - 1)
        self._pages.commit(sequence, num_computed)
        self._pages.free(sequence)
        self._slots.release(sequence)
        self._running.remove(sequence)
        if sequence.status is SequenceStatus.DECODING:
            self._num_decoding -= 1
            self._drafting.leave(sequence)
            self._progress.leave(sequence)
        else:
            self._prefilling.remove(sequence)
            if sequence.group.prompt_leader is sequence:
                sequence.group.prompt_leader = None
        self._admission_open = True

    def _finish(self, sequence: Sequence) -> None:
        """End a sequence in whatever state it is, and its request with its last sequence."""
        if sequence.status is SequenceStatus.WAITING:
            self._waiting.remove(sequence)
            self._admission_open = True  # it may have barred the way
        elif sequence.status is not SequenceStatus.DRAINING:
            self._vacate(sequence)
        sequence.status = SequenceStatus.FINISHED
        group = sequence.group
        group.num_unfinished -= 1
        if group.num_unfinished == 0:
            del self._groups[sequence.request_id]
            group.sequences, group.prompt_leader = (), None  # no cycle: tokens and all go with the last reference
            if not group.started:
                self._num_queued -= 1

    # ---- results

    def update(self, result: StepResult) -> list[TokenEvent]:
        """Take in the tokens of the oldest step in flight.

        Returns
        -------
        list of TokenEvent
            One for each sequence that got a token, or that its worker cannot go on with. Tokens of sequences that ended
            meanwhile are dropped.

        Raises
        ------
        ResultMismatch
            The result is not the one that is due; the group cannot go on.
        """
        sequences = self._slots.close_step(result)
        self._last_result = result.step_id
        self._drafting.observe(result)
        logprobs, failures = result.logprobs, result.failures
        finished, progress = SequenceStatus.FINISHED, self._progress
        events: list[TokenEvent] = []
        for sequence, slot, new in zip(sequences, result.slots, result.tokens_by_slot(), strict=True):
            if sequence.status is finished:
                continue
            progress.credited(sequence)
            if failures and slot in failures:
                events.append(self._failed(sequence, failures[slot]))
                continue
            if not new:
                continue  # it was at its end before this step
            new, finish = self._take(sequence, new)
            values = logprobs.get(slot, ())
            events.append(
                TokenEvent(
                    sequence.request_id,
                    sequence.choice,
                    new,
                    values[: len(new)],
                    finish,
                    sequence.num_cached_tokens,
                )
            )
            sequence.num_cached_tokens = 0
            if finish is not None:
                self._finish(sequence)
            elif sequence.status is SequenceStatus.WAITING:
                self._admission_open = True  # preempted; these were the tokens it waited for
        return events

    @staticmethod
    def _take(sequence: Sequence, new: tuple[int, ...]) -> tuple[tuple[int, ...], FinishReason | None]:
        """Append tokens to a sequence up to its end; return those taken, and why it ends if it does."""
        for index, token in enumerate(new, 1):
            sequence.tokens.append(token)
            if token in sequence.stop_token_ids:
                return new[:index], FinishReason.STOP
            if len(sequence.tokens) == sequence.max_len:
                return new[:index], FinishReason.LENGTH
        return new, None

    def _failed(self, sequence: Sequence, detail: str) -> TokenEvent:
        """End a sequence that its worker cannot go on with."""
        self._finish(sequence)
        return TokenEvent(sequence.request_id, sequence.choice, (), finish=FinishReason.FAILED, detail=detail)

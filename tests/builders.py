"""Small builders for tests: configs and requests with defaults, and a scheduler run against a simulated worker."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from simulated_worker import SimulatedWorker
from tpserve.coordinator.config import SchedulerConfig
from tpserve.coordinator.draft_length import DraftLength
from tpserve.coordinator.request import Request, TokenEvent
from tpserve.coordinator.scheduler import Scheduler
from tpserve.proto.messages import FinishReason, SamplingParams, StepPlan, StepResult


def make_config(
    *,
    max_num_seqs: int = 8,
    max_num_batched_tokens: int = 32,
    max_model_len: int = 64,
    page_size: int = 4,
    num_pages: int = 64,
    max_num_queued_requests: int = 64,
    max_in_flight_steps: int = 2,
    enable_prefix_cache: bool = True,
    patience_steps: int = 32,
    wait_weight: float = 4.0,
    aging_steps: int = 256,
    max_passed_sequences: int = 32,
    max_num_draft_tokens: int = 0,
    drafts_on_device: bool = False,
    drafts_cost_upkeep: bool = False,
) -> SchedulerConfig:
    """A small config; pages of 4 tokens."""
    return SchedulerConfig(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_model_len=max_model_len,
        page_size=page_size,
        num_pages=num_pages,
        max_num_queued_requests=max_num_queued_requests,
        max_in_flight_steps=max_in_flight_steps,
        enable_prefix_cache=enable_prefix_cache,
        patience_steps=patience_steps,
        wait_weight=wait_weight,
        aging_steps=aging_steps,
        max_passed_sequences=max_passed_sequences,
        max_num_draft_tokens=max_num_draft_tokens,
        drafts_on_device=drafts_on_device,
        drafts_cost_upkeep=drafts_cost_upkeep,
    )


def make_request(
    request_id: int,
    prompt: int | Iterable[int] = 5,
    max_tokens: int = 4,
    *,
    n: int = 1,
    seed: int = 0,
    stop: Iterable[int] = (),
    frequency_penalty: float = 0.0,
    num_logprobs: int | None = None,
) -> Request:
    """A request; an integer prompt is that many tokens, which differ from those of other request ids."""
    tokens = [(request_id * 7 + i) % 24 for i in range(prompt)] if isinstance(prompt, int) else prompt
    sampling = SamplingParams(seed=seed, frequency_penalty=frequency_penalty, num_logprobs=num_logprobs)
    return Request(request_id, tuple(tokens), sampling, max_tokens, n, frozenset(stop))


@dataclass(slots=True)
class Output:
    """What one choice has got so far."""

    tokens: list[int] = field(default_factory=list)
    finish: FinishReason | None = None
    num_cached_tokens: int = 0


class Loop:
    """A scheduler and a simulated worker; the state is checked after every move."""

    def __init__(self, config: SchedulerConfig, draft_length: DraftLength | None = None) -> None:
        self.config = config
        self.scheduler = Scheduler(config, draft_length)
        self.worker = SimulatedWorker(config, next_step=1)
        self.plans: list[StepPlan] = []
        self.results: deque[StepResult] = deque()
        self.outputs: dict[tuple[int, int], Output] = {}

    def add(self, *requests: Request) -> None:
        """Queue requests."""
        for request in requests:
            self.scheduler.add_request(request)
            for choice in range(request.n):
                self.outputs[request.request_id, choice] = Output()
        self.scheduler.check_integrity()

    def plan(self) -> StepPlan | None:
        """Make one plan and execute it; its result waits in `results`."""
        plan = self.scheduler.schedule()
        self.scheduler.check_integrity()
        if plan is not None:
            self.plans.append(plan)
            self.results.append(self.worker.execute(plan))
        return plan

    def update(self) -> list[TokenEvent]:
        """Give the oldest result to the scheduler."""
        events = self.scheduler.update(self.results.popleft())
        self.scheduler.check_integrity()
        for event in events:
            output = self.outputs[event.request_id, event.choice]
            assert output.finish is None, f"{event} after the end"
            assert (event.num_cached_tokens == 0) or not output.tokens, f"{event} is not the first"
            output.tokens += event.token_ids
            output.finish = event.finish
            output.num_cached_tokens += event.num_cached_tokens
        return events

    def step(self) -> StepPlan | None:
        """Plan, execute and update: the plain path."""
        plan = self.plan()
        if plan is not None:
            self.update()
        return plan

    def lose_group(self) -> None:
        """Kill the worker with whatever is in flight, and rebuild it."""
        self.results.clear()
        self.scheduler.reset_after_group_loss()
        self.scheduler.check_integrity()
        self.worker = SimulatedWorker(self.config, next_step=self.worker.next_step)

    def run(self, max_steps: int = 10_000) -> None:
        """Keep as many plans in flight as allowed until every request has ended."""
        for _ in range(max_steps):
            if not self.scheduler.has_unfinished:
                break
            while self.plan() is not None:
                pass
            self.update()
        assert not self.scheduler.has_unfinished, f"not done after {max_steps} steps"
        while self.results:
            self.update()

    def output(self, request_id: int, choice: int = 0) -> Output:
        """What a choice has got so far."""
        return self.outputs[request_id, choice]

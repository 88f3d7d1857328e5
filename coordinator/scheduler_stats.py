"""What a scheduler tells of itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SchedulerStats:
    """Gauges, and counters since the start."""

    num_running: int
    """Sequences with a slot."""
    num_waiting: int
    """Sequences without one that still have tokens to schedule."""
    num_deferred: int
    """Of those, that wait for the prompt of another choice of their request."""
    num_queued_requests: int
    """Requests of which nothing has run."""
    num_pages: int
    page_size: int
    """Tokens in one page."""
    has_prefix_cache: bool
    num_held_pages: int
    num_evictable_pages: int
    """Pages kept only for their content; they count as free."""
    num_prefix_query_tokens: int
    """Prompt tokens of sequences that have started."""
    num_prefix_hit_tokens: int
    """Of those, found computed: in the prefix cache, or by another choice of the request."""
    num_preemptions: int
    num_steps: int
    """Plans made."""

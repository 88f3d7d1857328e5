"""Configuration of the coordinator, one frozen dataclass per concern, checked once when it is built."""

from __future__ import annotations

from dataclasses import dataclass

from tpserve.proto.speculation import MAX_DRAFT_TOKENS, DraftLengthRule


class ConfigError(ValueError):
    """A configuration value cannot work; the message holds the value and the remedy."""


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Bounds and policies of one replica's scheduler."""

    max_num_seqs: int
    """Slots of the worker's batch: how many sequences run at once."""
    max_num_batched_tokens: int
    """Token budget of one step, over decoding slots and prompt chunks."""
    max_model_len: int
    """Prompt and output tokens of one sequence."""
    page_size: int
    """Tokens in one KV page."""
    num_pages: int
    """KV pages of each rank."""
    max_num_queued_requests: int = 1024
    """Requests that may wait while every slot is taken; one more is answered with `QueueFull`."""
    max_in_flight_steps: int = 2
    """Plans sent ahead of their results. 1 is the plain path: plan, wait, plan; 2 hides the host behind the device."""
    enable_prefix_cache: bool = True
    """Keep full pages of ended sequences for prompts that start alike."""
    patience_steps: int = 32
    """Steps from its arrival on in which shorter prompts pass a prompt, begun or not; then it goes before all that came
    later. 0: prompts in arrival order."""
    wait_weight: float = 6.0
    """What a millisecond counts for a prompt that waits, over one by which a decode is delayed. A step's size is chosen
    by that, where it is known what steps of each size take and nobody who decodes has drafts; see `prompt_share`."""
    aging_steps: int = 256
    """Steps after which a waiting sequence is passed by no later one any more."""
    max_passed_sequences: int = 32
    """Waiting sequences without room that one step looks past for smaller ones; bounds the search."""
    max_num_draft_tokens: int = 0
    """Most draft tokens that a step verifies for a sequence; 0: no speculation."""
    draft_length: DraftLengthRule = "fixed"
    """How many of them a step takes, see `draft_length`."""
    drafts_on_device: bool = False
    """Whether draft tokens are compared where grammars and penalties are not followed, and not beside prompts, as on a
    GPU: then a sequence that has one of them gets one token a step, beside the others' drafts, and a step that may take
    in prompts drafts for nobody."""
    drafts_are_sparse: bool = False
    """Whether the proposer has nothing for most sequences, as one that looks tokens up."""
    drafts_cost_upkeep: bool = False
    """Whether the proposer works in every step for every sequence that it may be asked to draft for, as a head on the
    ranks of a CPU does. Then a rule may give sequences up, see `DraftLength.gives_up`."""
    prefix_lookahead: int = 0
    """Tokens behind a page that what is kept of it hangs on: 1 with an EAGLE-3 head, whose last pair of a page takes
    the token behind. A page is then shared by sequences that agree on it."""

    def __post_init__(self) -> None:
        for name in (
            "max_num_seqs",
            "max_num_batched_tokens",
            "page_size",
            "num_pages",
            "max_num_queued_requests",
            "max_in_flight_steps",
        ):
            value = getattr(self, name)
            if value < 1:
                raise ConfigError(f"{name} is {value}; set it to 1 or more")
        for name in ("patience_steps", "aging_steps", "max_passed_sequences"):
            value = getattr(self, name)
            if value < 0:
                raise ConfigError(f"{name} is {value}; set it to 0 or more")
        if self.wait_weight <= 0:
            raise ConfigError(f"wait_weight is {self.wait_weight:g}; set it above 0")
        if not 0 <= self.max_num_draft_tokens <= MAX_DRAFT_TOKENS:
            raise ConfigError(
                f"max_num_draft_tokens is {self.max_num_draft_tokens}; set it to 0 (no speculation) to "
                f"{MAX_DRAFT_TOKENS}"
            )
        if self.max_model_len < 2:
            raise ConfigError(
                f"max_model_len is {self.max_model_len}; set it to 2 or more: one prompt and one output token"
            )
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens is {self.max_num_batched_tokens}, less than max_num_seqs {self.max_num_seqs}: "
                "one step could not decode every running sequence; raise the former or lower the latter"
            )

"""Counts of verified drafts, and how they stand in a server's metrics."""

from __future__ import annotations

from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

_PREFIXES = ("tpserve_", "vllm:")
_NAMES = {
    "spec_decode_num_drafts_total": "num_drafts",
    "spec_decode_num_draft_tokens_total": "num_draft_tokens",
    "spec_decode_num_accepted_tokens_total": "num_accepted_tokens",
}
_PER_POSITION = "spec_decode_num_accepted_tokens_per_pos_total"


@dataclass(frozen=True, slots=True)
class Drafts:
    """Counts of verified drafts."""

    num_drafts: int
    num_draft_tokens: int
    num_accepted_tokens: int
    accepted_per_position: tuple[int, ...] = ()

    @property
    def accept_rate(self) -> float:
        """Accepted over drafted tokens."""
        return self.num_accepted_tokens / self.num_draft_tokens

    @property
    def accept_length(self) -> float:
        """Mean tokens of a draft's step, the bonus token counted."""
        return 1.0 + self.num_accepted_tokens / self.num_drafts

    def since(self, before: Drafts) -> Drafts | None:
        """Return what was counted after `before`; None if nothing was drafted."""
        if self.num_drafts <= before.num_drafts:
            return None
        earlier = (*before.accepted_per_position, *(0 for _ in self.accepted_per_position))
        return Drafts(
            self.num_drafts - before.num_drafts,
            self.num_draft_tokens - before.num_draft_tokens,
            self.num_accepted_tokens - before.num_accepted_tokens,
            tuple(now - then for now, then in zip(self.accepted_per_position, earlier, strict=False)),
        )


def parse_drafts(text: str) -> Drafts | None:
    """Read the counters, summed over models and engines, from Prometheus text; None if they are not there.

    Raises
    ------
    ValueError
        If the text is not valid.
    """
    for prefix in _PREFIXES:
        counts: dict[str, int] = {}
        by_position: dict[int, int] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                name = sample.name.removeprefix(prefix)
                if not sample.name.startswith(prefix):
                    continue
                if (field := _NAMES.get(name)) is not None:
                    counts[field] = counts.get(field, 0) + int(sample.value)
                elif name == _PER_POSITION:
                    position = int(sample.labels["position"])
                    by_position[position] = by_position.get(position, 0) + int(sample.value)
        if len(counts) == len(_NAMES):
            positions = range(max(by_position, default=-1) + 1)
            return Drafts(**counts, accepted_per_position=tuple(by_position.get(p, 0) for p in positions))
    return None

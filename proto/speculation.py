"""Which proposer drafts for a replica, and how far; the same for coordinator and ranks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

Method = Literal["draft", "eagle3", "ngram", "suffix"]
METHODS: tuple[Method, ...] = ("draft", "ngram", "suffix")
"""Which a user names: whether a draft is a model of its own or an EAGLE-3 head, its config.json says."""
SPARSE_METHODS: tuple[Method, ...] = ("ngram", "suffix")
"""Which look tokens up, and often find nothing."""
DraftPlacement = Literal["colocated", "dedicated"]
"""colocated: in the processes of the model's own ranks; dedicated: in processes of the draft's own."""
DraftLengthRule = Literal["fixed", "auto", "mlc"]
"""fixed: always the most; auto: by measured times and accept rates; mlc: MLC's table by batch size."""
DEVICE_DRAFT_WINDOWS = (2, 4)
"""On a GPU, tokens that the draft's first step of a round runs for each sequence: two that the round before may have
left out, and where other steps stood between, two of those that were planned before the draft was asked again."""
HEAD_PENDING_ROWS = 16
"""Hidden rows of a sequence that an EAGLE-3 head leaves aside at most before it computes their keys and values: then
one pass of its projections is shared by as many plain steps."""
MAX_DRAFT_TOKENS = 8
"""More are never worth their verification at the accept rates of real drafts."""


@dataclass(frozen=True, slots=True)
class Speculation:
    """How draft tokens are proposed."""

    method: Method
    """draft: a smaller model with the same vocabulary; eagle3: a decoder layer over the target's own hidden rows;
    ngram: what followed the last occurrence of the last few tokens; suffix: what most often followed the longest suffix
    that occurred before."""
    max_num_draft_tokens: int
    """Most tokens that one step drafts and verifies for a sequence."""
    draft_model_dir: Path | None = None
    """Hugging Face folder with the draft's weights."""
    draft_artifact_dir: Path | None = None
    """The draft's compiled library and manifest."""
    draft_tp_size: int = 1
    """Ranks of one draft group. On the target's ranks it divides their number, and each group drafts the same; on their
    GPUs it is 1 or their number. A head is split as the target is."""
    draft_placement: DraftPlacement = "colocated"
    draft_load_format: Literal["auto", "dummy"] = "auto"
    min_ngram: int = 2
    max_ngram: int = 4
    """Lengths of the run of last tokens that prompt lookup searches for; the longest that occurs wins."""

    @property
    def num_draft_ranks(self) -> int:
        """Ranks that the draft has to itself."""
        return self.draft_tp_size if self.draft_placement == "dedicated" else 0

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Self:
        """Read the fields as JSON has them: folders are text."""
        folders = ("draft_model_dir", "draft_artifact_dir")
        return cls(**(fields | {name: Path(fields[name]) for name in folders if fields.get(name)}))

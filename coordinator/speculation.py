"""The flags about speculation: what they mean together, and what the coordinator is told."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from tpserve.coordinator.errors import ClusterError
from tpserve.proto.manifest import Manifest
from tpserve.proto.speculation import (
    DEVICE_DRAFT_WINDOWS,
    MAX_DRAFT_TOKENS,
    METHODS,
    DraftLengthRule,
    DraftPlacement,
    Method,
)

MOST_BY_RULE: dict[DraftLengthRule, int] = {"auto": 5, "mlc": 4}
"""Draft tokens up to which a rule goes; the library is compiled for them."""
_TP_DEGREES = (1, 2, 4, 8)


@dataclass(frozen=True, slots=True)
class SpeculationChoice:
    """What the flags ask for."""

    method: Method
    max_num_draft_tokens: int
    draft_length: DraftLengthRule
    draft_model: str | None
    draft_tp: int
    draft_placement: DraftPlacement = "colocated"

    @property
    def num_draft_ranks(self) -> int:
        """Ranks that the draft has to itself."""
        return self.draft_tp if self.draft_placement == "dedicated" else 0

    def require_gpus(self, tp_size: int) -> None:
        """Check that it is built for GPUs.

        Parameters
        ----------
        tp_size
            Of the model.

        Raises
        ------
        ClusterError
            If it is not; names the remedy.
        """
        if self.draft_placement == "colocated" and self.draft_tp not in (1, tp_size):
            raise ClusterError(
                f"--draft-tp {self.draft_tp} beside --tp {tp_size}: on GPUs each has the whole draft or its shard; "
                f"give --draft-tp {' or '.join(map(str, dict.fromkeys((1, tp_size))))}, or --draft-placement dedicated"
            )

    def of_head(self, tp_size: int, given_draft_tp: int | None) -> SpeculationChoice:
        """Return this with a draft that has turned out to be an EAGLE-3 head.

        Parameters
        ----------
        tp_size
            Of the model, whose ranks hold the head's shards.
        given_draft_tp
            What `--draft-tp` says, if it was given.

        Raises
        ------
        ClusterError
            If the flags want it elsewhere; names the remedy.
        """
        what = f"--draft-model {self.draft_model} is an EAGLE-3 head, which reads the model's rows on the model's ranks"
        if self.draft_placement != "colocated":
            raise ClusterError(f"{what}: leave --draft-placement {self.draft_placement} away")
        if given_draft_tp not in (None, tp_size):
            raise ClusterError(f"{what}: leave --draft-tp {given_draft_tp} away, or give that of the model, {tp_size}")
        return replace(self, method="eagle3", draft_tp=tp_size)

    def config(self, draft: dict[str, str] | None, load_format: str) -> dict[str, Any]:
        """Return the coordinator's fields.

        Parameters
        ----------
        draft
            Folders of the draft's model and library.
        """
        speculation: dict[str, Any] = {"method": self.method, "max_num_draft_tokens": self.max_num_draft_tokens}
        if draft is not None:
            speculation |= {f"draft_{name}": folder for name, folder in draft.items()}
            speculation |= {"draft_tp_size": self.draft_tp, "draft_load_format": load_format}
            speculation |= {"draft_placement": self.draft_placement}
        return {"speculation": speculation, "draft_length": self.draft_length}


def add_speculation_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `tpserve serve` about speculation."""
    group = parser.add_argument_group(
        "speculation", "draft tokens are verified by the model itself: the text is the same, only sooner"
    )
    group.add_argument(
        "--draft-model",
        metavar="MODEL",
        help="a smaller model with the same vocabulary, or this model's EAGLE-3 head, as MODEL is given",
    )
    group.add_argument(
        "--draft-tp",
        type=int,
        metavar="1|2|4|8",
        help="ranks of one draft group (default: 1; colocated on GPUs as --tp); where colocated they divide --tp, on "
        "GPUs 1 or as --tp; of an EAGLE-3 head always as --tp",
    )
    group.add_argument(
        "--draft-placement",
        choices=get_args(DraftPlacement),
        default="colocated",
        help="colocated: on the ranks of the model itself; dedicated: on ranks of its own, which on GPUs have GPUs of "
        "their own",
    )
    group.add_argument(
        "--spec-method",
        choices=METHODS,
        help="draft: needs --draft-model, and is its default; ngram: prompt lookup; suffix: repeated suffixes",
    )
    group.add_argument(
        "--num-speculative-tokens",
        type=_length,
        metavar="K|auto|mlc",
        help=f"draft tokens of a step: 1 to {MAX_DRAFT_TOKENS}; auto (default): by measured times and accept rates; "
        "mlc: MLC's table by running sequences",
    )


def choose_speculation(args: argparse.Namespace, *, on_gpu: bool = False) -> SpeculationChoice | None:
    """Return what the flags ask for; None for plain decoding.

    Parameters
    ----------
    on_gpu
        Whether the model is: there a draft is split as the model is, unless the flags say otherwise. On four H200s a
        draft of 1B was faster so at every concurrency, and one of 8B wherever it was measured (benchmarks/README.md).

    Raises
    ------
    ClusterError
        If they contradict each other; names the flags and the remedy.
    """
    method: Method | None = args.spec_method or ("draft" if args.draft_model else None)
    if method is None:
        for flag in ("draft_tp", "num_speculative_tokens"):
            if getattr(args, flag) is not None:
                raise ClusterError(
                    f"--{flag.replace('_', '-')} {getattr(args, flag)} without a proposer: "
                    "give --draft-model, or --spec-method ngram or suffix"
                )
        if args.draft_placement != "colocated":
            raise ClusterError(f"--draft-placement {args.draft_placement} without a proposer: give --draft-model")
        return None
    if method == "draft" and not args.draft_model:
        raise ClusterError("--spec-method draft needs a model that drafts: give --draft-model, or --spec-method ngram")
    if method != "draft" and (args.draft_model or args.draft_tp is not None):
        raise ClusterError(f"--spec-method {method} looks tokens up: leave --draft-model and --draft-tp away")
    placement: DraftPlacement = args.draft_placement
    if placement == "dedicated" and method != "draft":
        raise ClusterError(f"--spec-method {method} has no model to place: leave --draft-placement dedicated away")
    draft_tp = args.draft_tp or (args.tp if on_gpu and placement == "colocated" else 1)
    if placement == "dedicated" and draft_tp not in _TP_DEGREES:
        raise ClusterError(f"--draft-tp {draft_tp} is not one of {', '.join(map(str, _TP_DEGREES))}")
    if placement == "colocated" and (draft_tp < 1 or args.tp % draft_tp != 0):
        raise ClusterError(
            f"--draft-tp {draft_tp} does not divide --tp {args.tp}: each group of that many ranks drafts for itself; "
            "lower it, or give the draft ranks of its own with --draft-placement dedicated"
        )
    length: int | DraftLengthRule = args.num_speculative_tokens or "auto"
    rule: DraftLengthRule = "fixed" if isinstance(length, int) else length
    most = length if isinstance(length, int) else MOST_BY_RULE[length]
    return SpeculationChoice(method, most, rule, args.draft_model, draft_tp, placement)


def num_own_draft_ranks(args: argparse.Namespace) -> int:
    """Return how many ranks the flags give a draft to itself, before they are checked."""
    return max(1, args.draft_tp or 1) if args.draft_placement == "dedicated" else 0


def draft_step_tokens(max_num_batched_tokens: int, max_num_seqs: int, *, on_gpu: bool) -> int:
    """Return for how many tokens in a step a draft is compiled: as the model, or more for a GPU's windows."""
    return max(max_num_batched_tokens, max(DEVICE_DRAFT_WINDOWS) * max_num_seqs) if on_gpu else max_num_batched_tokens


def check_draft_tokens(target_dir: Path, draft_dir: Path) -> None:
    """Check that the tokenizer of a draft, if there is one, gives the ids of the model's.

    Raises
    ------
    ClusterError
        If it does not, or if one of them cannot be read.
    """
    ours, theirs = (_vocabulary(folder) for folder in (target_dir, draft_dir))
    if ours is not None and theirs is not None and ours != theirs:
        raise ClusterError(
            f"the tokenizer of {draft_dir} gives other ids than that of {target_dir}: "
            "give a --draft-model of the same family"
        )


def check_draft(target: Manifest, draft: Manifest) -> None:
    """Check that a draft has as many tokens as the model, or that a head reads what the model's library gives.

    Raises
    ------
    ClusterError
        Naming what differs.
    """
    if draft.head is not None:
        if target.aux_layers != draft.aux_layers:
            raise ClusterError(
                f"the EAGLE-3 head reads hidden rows before layers {_layers(draft)} of the model, whose library gives "
                f"those of {_layers(target)}: compile the model with that --draft-model, or leave --model-lib away"
            )
        return  # its tokens are the model's, by numbers that were compared when it was compiled
    if draft.vocab_size != target.vocab_size:
        raise ClusterError(
            f"the draft has {draft.vocab_size} tokens, the model {target.vocab_size}: "
            "give a --draft-model of the same family"
        )


def _layers(manifest: Manifest) -> str:
    return ", ".join(map(str, manifest.aux_layers)) or "none"


def _vocabulary(folder: Path) -> dict[str, int] | None:
    """Return token ids by text; None for a model without tokenizer."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    try:
        raw = json.loads(path.read_text())
        vocabulary = raw.get("model", {}).get("vocab")
        if not isinstance(vocabulary, dict):  # unigram models list pairs, whose order gives the ids
            vocabulary = {pair[0]: index for index, pair in enumerate(vocabulary or [])}
        added = {token["content"]: token["id"] for token in raw.get("added_tokens", [])}
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise ClusterError(f"{path} cannot be read ({type(error).__name__}: {error}): fetch it again") from None
    return vocabulary | added


def _length(text: str) -> int | DraftLengthRule:
    for rule in MOST_BY_RULE:
        if text == rule:
            return rule
    try:
        value = int(text)
    except ValueError:
        value = 0
    if not 1 <= value <= MAX_DRAFT_TOKENS:
        raise argparse.ArgumentTypeError(f"{text!r} is neither 1 to {MAX_DRAFT_TOKENS} nor auto nor mlc")
    return value

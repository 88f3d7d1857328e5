"""Targets with EAGLE-3 heads, compiled; and a rank that keeps what its head proposes, and from which logits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import numpy.typing as npt

from eagle_models import TinyHead
from rank_group import Artifacts
from reference_eagle import ReferenceHead, ReferenceTarget
from shared_cache import as_cache
from text_models import write_byte_tokenizer
from tpserve.compile.artifact import build_artifact
from tpserve.compile.cache import CachePolicy
from tpserve.compile.config import CompileConfig, ModelConfig
from tpserve.compile.eagle import EagleHeadConfig
from tpserve.proto.rank import RankConfig
from tpserve.proto.speculation import Speculation

if TYPE_CHECKING:
    from tpserve.worker.proposers.eagle import EagleHead
    from tpserve.worker.runner import Runner

MOST = 4
NUM_SLOTS = 6
NUM_PAGES = 64


def build_pair(
    folder: Path,
    artifacts: Artifacts,
    head: TinyHead,
    *,
    tp_size: int = 1,
    head_tokens: int = 40,
    head_len: int = 256,
    num_tokens: int = 128,
    num_slots: int = NUM_SLOTS,
    target: Literal["llvm", "cuda"] = "llvm",
    kernels: Literal["tuned", "portable"] = "tuned",
    quantization: Literal["q0f32", "q0bf16"] = "q0f32",
    head_quantization: Literal["q0f32", "q0bf16"] = "q0f32",
) -> RankConfig:
    """Write and compile a target and its head; return the first rank's configuration.

    A step of the target takes `num_tokens`, one of the head `head_tokens`: on a CPU, catching up may take several.
    """
    target_dir, head_dir = folder / "target", folder / "head"
    if not target_dir.exists():
        head.target.write(target_dir)
        write_byte_tokenizer(target_dir)
    head.write(head_dir)
    config = ModelConfig.from_hf(target_dir)
    read = EagleHeadConfig.from_hf(head_dir, config)
    large = CompileConfig(
        tp_size=tp_size,
        quantization=quantization,
        kernels=kernels,
        target=target,
        max_model_len=256,
        max_num_batched_tokens=num_tokens,
        max_num_seqs=num_slots,
        max_num_draft_tokens=MOST,
        aux_layers=read.aux_layers,
    )
    small = replace(large, max_model_len=head_len, max_num_batched_tokens=head_tokens, max_num_draft_tokens=0)
    small = replace(small, quantization=head_quantization)
    with as_cache(artifacts.home):
        target_lib = build_artifact(config, large, CachePolicy.ON)
        head_lib = build_artifact(read, small, CachePolicy.ON)
    speculation = Speculation(
        "eagle3", MOST, draft_model_dir=head_dir, draft_artifact_dir=head_lib, draft_tp_size=tp_size
    )
    return RankConfig(
        0, tp_size, target_dir, target_lib, "auto", NUM_PAGES, num_slots, 1, "unused", 10.0, speculation=speculation
    )


def reference_of(head: TinyHead, layers: tuple[int, ...] | None = None) -> ReferenceHead:
    """The same head in float64, by layers 2, n / 2 and n - 3 if no others are given."""
    count = head.target.config["num_hidden_layers"]
    target = ReferenceTarget(head.target.config, head.target.weights())
    return ReferenceHead(head.config, head.weights(), target, layers or (2, count // 2, count - 3))


@dataclass(frozen=True, slots=True)
class Proposal:
    """What a head proposed for one slot."""

    tokens: tuple[int, ...]
    """Of the sequence."""
    drafted: tuple[int, ...]
    logits: tuple[npt.NDArray[np.float32], ...]
    """(V,) of each, before bias and penalties."""


def head_of(runner: Runner) -> EagleHead:
    """The head of a rank."""
    from tpserve.worker.proposers.eagle import EagleHead

    assert runner._speculator is not None
    proposer = runner._speculator._proposer
    assert isinstance(proposer, EagleHead)
    return proposer


def watched_runner(config: RankConfig, progress: Any, drafts_door: Any = None) -> Runner:
    """A rank whose `take_proposals` returns what was proposed since the last call, and how many slots might have
    drafted and did not."""
    from tpserve.worker.runner import Runner  # which chooses TVM's runtime: not before the compiler is imported

    runner = Runner(config, progress, drafts_door=drafts_door)
    head = head_of(runner)
    made: list[Proposal] = []
    silent = [0]
    seen: dict[int, list[npt.NDArray[np.float32]]] = {}
    propose, sampled = head.propose, head._sampled
    vocab_size = runner._model.manifest.vocab_size

    def watched_propose(slots: Any, limits: Any, count: int) -> Any:
        seen.clear()
        out = propose(slots, limits, count)
        for row, slot in enumerate(slots.tolist()):
            drafted = out[row][out[row] >= 0].tolist()
            if not drafted:
                silent[0] += bool(limits[row])
                continue
            tokens = head._batch.tokens[slot, : head._batch.num_tokens[slot]].tolist()
            made.append(Proposal(tuple(tokens), tuple(drafted), tuple(seen[slot])))
        return out

    def watched_sampled(logits: Any, slots: Any, positions: Any) -> Any:
        values = np.from_dlpack(logits)
        for row, slot in enumerate(slots.tolist()):
            spread = np.full(vocab_size, -np.inf, np.float32)
            spread[head._token_ids_of] = values[row, : len(head._token_ids_of)]
            seen.setdefault(slot, []).append(spread)
        return sampled(logits, slots, positions)

    def take_proposals() -> tuple[list[Proposal], int]:
        taken = list(made), silent[0]
        made.clear()
        silent[0] = 0
        return taken

    watched = cast("Any", runner)
    cast("Any", head).propose, cast("Any", head)._sampled = watched_propose, watched_sampled
    watched.take_proposals = take_proposals
    return runner


def check_proposals(made: list[Proposal], reference: ReferenceHead, *, within: float = 2e-3) -> None:
    """Compare the logits of every draft token with the reference's, given those before it."""
    for proposal in made:
        expected = reference.draft(proposal.tokens, proposal.drafted)
        for found, wanted in zip(proposal.logits, expected, strict=True):
            assert (np.isinf(found) == np.isinf(wanted)).all()
            finite = np.isfinite(wanted)
            np.testing.assert_allclose(found[finite], wanted[finite], rtol=0, atol=within)

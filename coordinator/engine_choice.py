"""What the flags of `tpserve serve` come to on this host, before a model is fetched and anything is started."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from tpserve.coordinator.memory import MODE_MAX_NUM_SEQS
from tpserve.coordinator.replica_memory import memory_of_ranks
from tpserve.coordinator.speculation import SpeculationChoice, choose_speculation
from tpserve.proto.manifest import CPU_STEP_TOKENS, GPU_STEP_TOKENS, Manifest


@dataclass(frozen=True, slots=True)
class EngineChoice:
    """Where a replica's ranks are, for what sizes its library is made, and who drafts."""

    on_gpu: bool
    rank_bytes: int
    """Memory that each rank may count on."""
    library: Manifest | None
    """Of --model-lib; None: it is taken from the cache, or compiled."""
    max_num_seqs: int
    max_num_batched_tokens: int
    speculation: SpeculationChoice | None
    """None: plain decoding."""

    @property
    def device(self) -> str:
        """As the compiler calls it."""
        return "cuda" if self.on_gpu else "cpu"


def choose_engine(args: argparse.Namespace) -> EngineChoice:
    """Return what the flags come to; what they leave out is the library's, or the device's and the mode's.

    Raises
    ------
    ServeError
        If there are fewer GPUs than ranks.
    ClusterError
        If a Ray that was named does not tell of its nodes, or the flags about speculation contradict each other.
    ManifestError
        If --model-lib cannot be used.
    """
    on_gpu, rank_bytes = memory_of_ranks(args)
    library = None if args.model_lib is None else Manifest.load(args.model_lib.expanduser())
    if library is not None:
        num_seqs, num_tokens = library.max_num_seqs, library.max_num_batched_tokens
    else:
        num_seqs, num_tokens = MODE_MAX_NUM_SEQS[args.mode], GPU_STEP_TOKENS if on_gpu else CPU_STEP_TOKENS
    return EngineChoice(
        on_gpu,
        rank_bytes,
        library,
        args.max_num_seqs or num_seqs,
        args.max_num_batched_tokens or num_tokens,
        choose_speculation(args, on_gpu=on_gpu),
    )

"""A compiled model on one rank of a CPU: its library, communicator, parameters and pages. Knows nothing of steps."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tpserve.collectives.cpu import CollectiveStats
from tpserve.collectives.tls import GroupTls
from tpserve.proto.manifest import Manifest
from tpserve.worker.arrays import Array, aligned_zeros, as_tensor
from tpserve.worker.host_group import join
from tpserve.worker.kv_cache import KVCache
from tpserve.worker.library import Library, load_kernels
from tpserve.worker.weights import dummy_parameters, load_parameters, shared_parameter

Progress = Callable[[int, int], None]
"""Called with (parameters loaded, parameters in all)."""


@dataclass(frozen=True, slots=True)
class ModelRank:
    """One rank of one model: where it is, and its group."""

    manifest: Manifest
    artifact_dir: Path
    model_dir: Path
    rank: int
    tp_size: int
    group_name: str
    """Under which the ranks of this model find each other's memory; the secret by which they meet."""
    load_format: Literal["auto", "dummy"]
    num_pages: int
    num_threads: int
    collective_timeout_s: float
    rendezvous: str | None = None
    """`host:port` of the first rank's door, if the ranks are on several nodes."""
    host: str = "127.0.0.1"
    """Address at which the other ranks reach this one."""
    tls: GroupTls | None = None
    """With what they do; None: plain connections."""


class LoadedModel:
    """A model's library, parameters and pages.

    Attributes
    ----------
    manifest : Manifest
    sample_kernel : callable
        `sample` of its kernel library.
    """

    def __init__(
        self,
        config: ModelRank,
        progress: Progress,
        door: socket.socket | None = None,
        target: LoadedModel | None = None,
    ) -> None:
        """Join the group and load everything; returns when all ranks have come.

        Parameters
        ----------
        door
            Of the first rank, if the ranks are on several nodes.
        target
            Whose ranks this one drafts on, and whose group and shared parameters it takes.

        Raises
        ------
        WorkerError
            If the artifact or the weights cannot be used.
        TimeoutError
            If a rank of the group does not come in time; names it.
        """
        self.manifest = manifest = config.manifest
        kernels = load_kernels(config.artifact_dir)
        self.sample_kernel: Callable[..., None] = kernels["sample"]
        # The library looks its collectives up by name when it is made: those of the model loaded last.
        if target is None:
            self._communicator = join(config, kernels, door)
        else:
            self._communicator = target._communicator
            if self._communicator is not None:
                self._communicator.register()
        kernels["set_num_threads"](config.num_threads)
        self._library = Library(config.artifact_dir, manifest, kernels)
        if config.load_format == "dummy":
            arrays = dummy_parameters(manifest, config.rank)
        else:
            arrays = load_parameters(manifest, config.model_dir, config.rank)
        self._params: list[Any] = []
        for spec in manifest.params:
            if spec.layout == "shared":
                own = None if target is None else (target.manifest, target._params)
                self._params.append(shared_parameter(spec, own))
            else:
                self._params.append(as_tensor(next(arrays)))
            progress(len(self._params), len(manifest.params))
        self._kv = KVCache(manifest.kv, config.num_pages)
        # Attention on a CPU needs neither a plan nor room for partial sums.
        self._no_workspace = (as_tensor(aligned_zeros((0,), np.int32)), as_tensor(aligned_zeros((0,), np.float32)))

    @property
    def collectives(self) -> str:
        """By which ranks exchange activations."""
        return "none" if self._communicator is None else self._communicator.backend

    def collective_totals(self) -> dict[str, CollectiveStats]:
        """Return what this rank has done in collectives since the start, by kind; nothing of a model on one rank."""
        return {} if self._communicator is None else self._communicator.stats()

    def close(self) -> None:
        """Leave the group; of a model and its head, the model does."""
        if self._communicator is not None:
            self._communicator.close()


class Model(LoadedModel):
    """A model that may run."""

    def step(
        self, token_ids: Array, positions: Array, token_slots: Array, page_table: Array, sample_rows: Array
    ) -> tuple[Any, Any, Any]:
        """Run the graph over a ragged batch; see `LlamaForCausalLM.step`.

        Returns
        -------
        logits : tensor (R, padded_vocab_size) float32
        hidden : tensor (R, hidden_size) float32
        aux : tensor (T, layers * hidden_size) float32, or None
            If the library was compiled with `aux_layers`.
        """
        inputs = (token_ids, positions, token_slots, page_table, sample_rows)
        out = self._library.step(*map(as_tensor, inputs), *self._no_workspace, self._kv.layers, self._params)
        return out[0], out[1], out[2] if self.manifest.aux_layers else None


class HeadModel(LoadedModel):
    """An EAGLE-3 head that may run: on the ranks of its target, in that one's group."""

    def __init__(self, config: ModelRank, progress: Progress, target: LoadedModel) -> None:
        """Load everything.

        Raises
        ------
        WorkerError
            If the artifact or the weights cannot be used.
        """
        super().__init__(config, progress, target=target)
        self._project = self._library.function("project")
        self._append = self._library.function("append")

    def project(self, rows: Array) -> Any:
        """(T, 3 * target's hidden size) float32, aligned -> tensor (T, hidden_size) float32; see `Eagle3Head`."""
        return self._project(as_tensor(rows), self._params)

    def append(self, token_ids: Array, positions: Array, token_slots: Array, page_table: Array, hidden: Any) -> None:
        """Write keys and values of pairs, and compute nothing else; each argument as in `step`."""
        inputs = map(as_tensor, (token_ids, positions, token_slots, page_table))
        self._append(*inputs, hidden, self._kv.layers, self._params)

    def step(
        self,
        token_ids: Array,
        positions: Array,
        token_slots: Array,
        page_table: Array,
        sample_rows: Array,
        hidden: Any,
    ) -> tuple[Any, Any]:
        """Run the head over a ragged batch of pairs; see `Eagle3Head.step`.

        Parameters
        ----------
        hidden : tensor (T, hidden_size) float32

        Returns
        -------
        logits : tensor (R, padded_vocab_size) float32
        rows : tensor (R, hidden_size) float32
        """
        inputs = map(as_tensor, (token_ids, positions, token_slots, page_table, sample_rows))
        logits, rows = self._library.step(*inputs, *self._no_workspace, hidden, self._kv.layers, self._params)
        return logits, rows

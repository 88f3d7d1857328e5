"""A rank whose draft tokens are right at a given rate: for benchmarks on random weights alone, where none would be.

Behind the real sampling, one more kernel of each captured round writes draft tokens over sampled ones; the texts mean
nothing. Everything else of a round is the engine's own. Three more kernels of one thread note when it began to draft,
began to verify, and ended. The four take some microseconds of each round and keep their neighbours from overlapping.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import cupy
import numpy as np

from tpserve.proto.manifest import Manifest
from tpserve.proto.speculation import Speculation
from tpserve.worker.device_runner import DeviceRunner
from tpserve.worker.device_sampler import DeviceSampler
from tpserve.worker.device_speculation import DeviceSpeculation, Round

_NUM_ROUNDS = 4096
"""Whose times are kept."""
_BEGINS, _DRAFTED, _ENDS = range(3)
_KERNELS = r"""
extern "C" __global__ void synthesize(int num_rows, int num_drafts, unsigned long long draft_tokens, int max_drafts,
                                      unsigned long long sample_slots, unsigned long long sample_positions,
                                      const unsigned* control, int vocab_size, unsigned long long sampled) {
  const int r = blockIdx.x * blockDim.x + threadIdx.x;
  if (r >= num_rows) return;
  synthesize_row(r, num_drafts, reinterpret_cast<const int*>(draft_tokens), max_drafts,
                 reinterpret_cast<const int*>(sample_slots), reinterpret_cast<const int*>(sample_positions), control[0],
                 control[1], vocab_size, reinterpret_cast<int*>(sampled));
}

extern "C" __global__ void stamp(unsigned long long* rounds, int num_kept, int which) {
  unsigned long long now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
  const unsigned long long round = rounds[0];
  rounds[1 + round % num_kept * 3 + which] = now;
  if (which == 2) rounds[0] = round + 1;
}
"""


class SyntheticSpeculation(DeviceSpeculation):
    """Accepts draft tokens by a hash of slot, position and salt, at the rate that was set last."""

    def __init__(self, speculation: Speculation, *others: Any) -> None:
        super().__init__(speculation, *others)
        assert speculation.draft_artifact_dir is not None, "lookups accept what they find"
        self._draft_vocab_size = Manifest.load(speculation.draft_artifact_dir).vocab_size
        source = Path(__file__).with_suffix(".cuh").read_text().replace("#pragma once", "") + _KERNELS
        module = cupy.RawModule(code=source, options=("-std=c++17",))
        self._synthesize = module.get_function("synthesize")  # compiles: nothing may while a graph is captured
        self._stamp = module.get_function("stamp")
        self._control = cupy.zeros(2, cupy.uint32)
        """Below which of 2^32 a draft token is right, and the salt."""
        self._rounds = cupy.zeros(1 + 3 * _NUM_ROUNDS, cupy.uint64)
        """Rounds so far, and the three times of each that is kept, in nanoseconds."""
        self._draft_tokens = self._address(self._state[3])

    def set_acceptance(self, rate: float, salt: int, stream: Any) -> None:
        """Set the probability with which a draft token is right, if those before it are, and begin to time anew."""
        self._control.set(np.asarray([min(round(rate * 2**32), 2**32 - 1), salt], np.uint32), stream)
        self._rounds.set(np.zeros(self._rounds.shape, np.uint64), stream)

    def round_times(self, stream: Any) -> list[tuple[float, float]]:
        """Return the seconds of drafting and of verifying of each round since; waits for the device."""
        stream.synchronize()
        values = self._rounds.get()
        kept = min(int(values[0]), _NUM_ROUNDS)
        times = values[1 : 1 + 3 * kept].reshape(kept, 3).astype(np.int64)
        return [(float(draft) * 1e-9, float(verify) * 1e-9) for draft, verify in np.diff(times, axis=1)]

    def draft(self, run: Round, sampler: DeviceSampler) -> None:
        """See DeviceSpeculation."""
        self._note(_BEGINS)
        super().draft(run, sampler)
        self._note(_DRAFTED)

    def accept(
        self, num_slots: int, num_draft_tokens: int, sampled: Any, sample_slots: Any, sample_positions: Any
    ) -> None:
        """See DeviceSpeculation."""
        if num_draft_tokens:
            rows = num_slots * (1 + num_draft_tokens)
            arguments = (
                np.int32(rows),
                np.int32(num_draft_tokens),
                self._draft_tokens,
                np.int32(self.max_num_draft_tokens),
                self._address(sample_slots),
                self._address(sample_positions),
                self._control,
                np.int32(self._draft_vocab_size),
                self._address(sampled),
            )
            self._synthesize((-(-rows // 128),), (128,), arguments)
        super().accept(num_slots, num_draft_tokens, sampled, sample_slots, sample_positions)
        if num_draft_tokens:
            self._note(_ENDS)

    def _note(self, which: int) -> None:
        self._stamp((1,), (1,), (self._rounds, np.int32(_NUM_ROUNDS), np.int32(which)))

    def _address(self, tensor: Any) -> Any:
        # Not by DLPack: that makes streams wait for each other, which a capture forbids.
        return np.uint64(self._kernels["device_address"](tensor))


class SyntheticRunner(DeviceRunner):
    """A rank for `gpu_speculation.py`."""

    speculation_type: ClassVar[type[DeviceSpeculation]] = SyntheticSpeculation

    def set_acceptance(self, rate: float, salt: int) -> None:
        """See SyntheticSpeculation; all ranks must be told the same."""
        self._synthetic.set_acceptance(rate, salt, self._stream)

    def round_times(self) -> list[tuple[float, float]]:
        """See SyntheticSpeculation."""
        return self._synthetic.round_times(self._stream)

    @property
    def _synthetic(self) -> SyntheticSpeculation:
        assert isinstance(self._speculation, SyntheticSpeculation)
        return self._speculation

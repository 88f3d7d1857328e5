"""A captured step with its inputs, and a step on its way through the device."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import cupy
import tvm_ffi

from tpserve.proto.messages import StepPlan, StepResult
from tpserve.proto.rank import SizeTime
from tpserve.worker.arrays import Array
from tpserve.worker.buckets import Bucket
from tpserve.worker.device_speculation import Round
from tpserve.worker.device_weights import as_device_tensor
from tpserve.worker.verify_layout import VerifyBucket

_TOKEN_STEP = 7919
"""From a timed step's token to its next: a prime, so that they are spread over the vocabulary."""


class Finisher(Protocol):
    """Who has queued a step."""

    def finish(self, pending: PendingStep) -> StepResult:
        """Wait for a step and return its result."""


class CapturedStep:
    """One bucket's graph with the device buffer of its inputs."""

    def __init__(self, bucket: Bucket, verify: VerifyBucket | None = None, window: int = 0) -> None:
        self.bucket = bucket
        self.window = window
        """Tokens of each slot that the draft's first step runs."""
        self.num_slots = 0 if verify is None else verify.num_slots
        """Decoding slots that the step verifies draft tokens of."""
        self.num_draft_tokens = 0 if verify is None else verify.num_draft_tokens
        self.prompt_graph: Any = None
        """A draft model's pass over the same tokens, for steps with prompts."""
        self.inputs = cupy.zeros(bucket.num_inputs, cupy.int32)
        self.graph: Any = None
        self.forward_graph: Any = None
        """The same without the sampling; captured when a step of this size first has a grammar."""
        self.logits: Any = None
        """What the forward graph writes: memory of the pool, good until the next launch of any graph."""
        self.head_rows: Any = None
        """The same, of a replica with an EAGLE-3 head: rows of the step's tokens that slots may keep."""
        parts = [self.inputs[start : start + size] for start, size in zip(bucket.starts, bucket.sizes, strict=True)]
        parts[2].fill(-1)
        parts[4].fill(-1)
        self.tensors = [tvm_ffi.from_dlpack(part) for part in parts]
        """token_ids, positions, token_slots, sample_rows, sample_slots, sample_positions."""
        self.plan: Any = None
        self.hidden: Any = None
        """What the graph writes: (R, hidden_size) bfloat16, good until the next launch of any graph."""
        self.forward_hidden: Any = None
        """The same of the forward graph."""

    def round_over(self, page_table: Any) -> Round:
        """Return what of the step the draft is told, with the (S, P) int32 page table."""
        return Round(self.tensors[2], self.num_slots, self.num_draft_tokens, page_table, self.window)

    def launch_timed(self, stream: Any, vocab_size: int) -> tuple[Any, Any]:
        """Launch the graph on padding alone, twice; return events at the second's beginning and end.

        The first brings ranks that began at different moments to the same one. Padding has tokens here, all of them
        different: products of equal rows take less time (an H200, 512 tokens: 11.4 ms instead of 13.4), it seems for
        they take less power.
        """
        begin, end = cupy.cuda.Event(), cupy.cuda.Event()
        with stream:
            self.inputs[: self.bucket.num_tokens] = cupy.arange(self.bucket.num_tokens) * _TOKEN_STEP % vocab_size
        self.graph.launch(stream)
        begin.record(stream)
        self.graph.launch(stream)
        end.record(stream)
        return begin, end

    def release(self) -> None:
        """Let the graphs go."""
        self.graph = self.prompt_graph = self.forward_graph = None


def capture_graph(stream: Any, run: Callable[[], None]) -> Any:
    """Capture what `run` queues on the stream, which is the current one; return the graph."""
    for _ in range(2):  # the pool must be warm: nothing may be allocated while capturing
        run()
    stream.synchronize()
    stream.begin_capture(cupy.cuda.runtime.streamCaptureModeRelaxed)
    run()
    graph = stream.end_capture()
    graph.upload(stream)
    return graph


def time_steps(steps: Sequence[CapturedStep], stream: Any, vocab_size: int) -> tuple[SizeTime, ...]:
    """Return what each step takes; every rank of a group calls this at once."""
    events = [step.launch_timed(stream, vocab_size) for step in steps]
    stream.synchronize()
    times_us = [round(1e3 * cupy.cuda.get_elapsed_time(begin, end)) for begin, end in events]
    return tuple(
        SizeTime(step.bucket.num_tokens, step.bucket.decode_only, time_us)
        for step, time_us in zip(steps, times_us, strict=True)
    )


class PendingStep:
    """A step on its way; `wait` blocks until the device has done it."""

    def __init__(
        self,
        runner: Finisher,
        plan: StepPlan,
        staging: int,
        slots: Array | None = None,
        num_tokens: int = 0,
        bucket: Bucket | None = None,
        failures: dict[int, str] | None = None,
        mask_us: int = 0,
        hidden: dict[int, Array] | None = None,
    ) -> None:
        """Note what was queued; without slots nothing was.

        `slots` are those that decode or were sampled, each once; `hidden` is by slot, of those that asked for rows.
        """
        self.hidden = hidden or {}
        self.plan = plan
        self.slots = slots
        self.staging = staging
        self.num_tokens = num_tokens
        self.bucket = bucket
        self.submitted = time.perf_counter()
        self.failures = failures or {}
        self.mask_us = mask_us
        self._runner = runner

    def wait(self) -> StepResult:
        """Return the result; the coordinator's deadline of a step bounds the wait.

        Raises
        ------
        WorkerError
            If the logits of a slot had a NaN or no finite maximum.
        """
        return self._runner.finish(self)


def unowned(tensor: Any) -> Any:
    """Return a tensor over the same memory that does not keep it from its allocator."""
    view = (
        cupy.from_dlpack(tensor)
        if tensor.dtype != "bfloat16"
        else cupy.from_dlpack(tensor._create_view(tensor.shape, dtype="uint16"))
    )
    memory = cupy.cuda.UnownedMemory(view.data.ptr, view.nbytes, owner=None)
    bare = cupy.ndarray(view.shape, view.dtype, cupy.cuda.MemoryPointer(memory, 0))
    return as_device_tensor(bare, str(tensor.dtype))

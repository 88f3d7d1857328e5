"""What a layer of a 1B e4m3 draft takes with qkv and attention as one kernel, and as two.

Regime: Llama-3.2-1B's sizes, sixteen layers of random weights one after the other in a captured graph, so that weights
are cold and each kernel starts while the one before it drains: attention's plan, then qkv and attention, o and the MLP.
Tokens of so many slots, or following each other in one, as in the draft's first step of a round. Floor: a layer's
weights once at 4.70 TB/s, 12.9 us. Prints a line per point and, last, one JSON object.

Run on a host with a GPU: python benchmarks/gpu_draft_layer.py [--library kernels.so] [--output FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import cupy
import numpy as np
import tvm_ffi

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from gpu.begun_norm import BegunFp8
from gpu.device import BF16, FP8, poisoned, random_bf16, random_fp8, to_device
from gpu.gemm_operands import pack, padded, uniform
from tpserve.compile import native_cuda
from tpserve.compile.kernels.cuda import sizes

HIDDEN, ACTIVATIONS, HEADS, KV_HEADS, DIM, LAYERS = 2048, 8192, 32, 8, 64, 16
SLOTS, MAX_LEN, PAGE_SIZE, EPS = 8, 4096, 16, 1e-5
QKV = (HEADS + 2 * KV_HEADS) * DIM
CASES = [(1, False), (2, False), (4, False), (8, False), (4, True), (8, True)]
"""Tokens, and whether they are of one slot."""
REPEATS, REPLAYS = 7, 20


class Layer:
    """Weights and pages of a layer, and what it gives."""

    def __init__(self, kernels: Any, seed: int) -> None:
        shapes = {"qkv": (QKV, HIDDEN), "o": (HIDDEN, HEADS * DIM), "gate_up": (2 * ACTIVATIONS, HIDDEN)}
        shapes["down"] = (HIDDEN, ACTIVATIONS)
        self._kernels = kernels
        self._packed = {
            name: pack(lambda kernel: kernels[kernel], random_fp8(shape, seed + i * LAYERS))
            for i, (name, shape) in enumerate(shapes.items())
        }
        self._scales = {name: uniform(shape[0], 1, 2e-4) for name, shape in shapes.items()}
        self._norm = uniform(HIDDEN, 2)
        self._pages = random_bf16((SLOTS * MAX_LEN // PAGE_SIZE, KV_HEADS, 2, PAGE_SIZE * DIM), 1.0, seed)

    def make_room(self, num_m: int) -> None:
        """Make what the layer writes of so many tokens."""
        grouped = poisoned((HEADS * DIM // 256, 2, padded(num_m)), np.float32)
        self._qkv, self._q = poisoned((num_m, QKV), BF16), poisoned((num_m, HEADS * DIM), BF16)
        self._attended = poisoned((num_m, HEADS * DIM), FP8), grouped
        self._between = [
            poisoned((num_m, 2 * ACTIVATIONS), BF16),
            poisoned((num_m, ACTIVATIONS), FP8),
            poisoned((ACTIVATIONS // 256, 8, padded(num_m)), np.float32),
        ]
        self._middle, self.out = BegunFp8(num_m, HIDDEN), BegunFp8(num_m, HIDDEN)

    def weights(self, *names: str) -> list[Any]:
        """Return packed weights and scales of channels, in turn."""
        return [part[name] for name in names for part in (self._packed, self._scales)]

    def begin(self, num_m: int) -> BegunFp8:
        """Return the rows of a norm, as the layer before would."""
        begun = BegunFp8(num_m, HIDDEN)
        x, scale = random_fp8((num_m, HEADS * DIM), 1), uniform(num_m, 2, 0.02)
        residual = random_bf16((num_m, HIDDEN), 2.0, 3)
        self._kernels["gemm_fp8_add_rms_norm"](x, scale, *self.weights("o"), residual, self._norm, EPS, *begun.outputs)
        return begun

    def queue(self, x: BegunFp8, where: list[Any], rest: list[Any], *, joined: bool) -> None:
        """`where`: positions, slots and page table; `rest`: what else attention takes."""
        kernels, batch = self._kernels, [self._pages, *where, *rest]
        if joined:
            operands = [x.out, x.norms, *self.weights("qkv"), *batch, self._qkv, self._q]
            kernels["qkv_attention_grouped"](*operands, *self._attended)
        else:
            kernels["gemm_fp8_normed"](x.out, x.norms, *self.weights("qkv"), self._qkv)
            kernels["attention_grouped"](self._qkv, *batch, self._q, *self._attended)
        begin = [x.stream, self._norm, EPS, *self._middle.outputs]
        kernels["gemm_fp8_grouped_add_rms_norm"](*self._attended, *self.weights("o"), *begin)
        middle = self._middle
        end = [middle.stream, self._norm, EPS, *self._between, *self.out.outputs]
        kernels["mlp_fp8_add_rms_norm"](middle.out, middle.norms, *self.weights("gate_up", "down"), *end)


def microseconds(stream: Any, graph: Any) -> float:
    """Return the median of a replay."""
    graph.launch(stream)
    times = []
    for _ in range(REPEATS):
        begin, end = cupy.cuda.Event(), cupy.cuda.Event()
        begin.record(stream)
        for _ in range(REPLAYS):
            graph.launch(stream)
        end.record(stream)
        end.synchronize()
        times.append(float(cupy.cuda.get_elapsed_time(begin, end)) / REPLAYS * 1000)
    return statistics.median(times)


def measure(
    kernels: Any, stream: Any, layers: list[Layer], context: int, num_m: int, *, is_run: bool
) -> dict[str, Any]:
    """Return a row of microseconds a layer."""
    slots = [0] * num_m if is_run else list(range(num_m))
    positions = [context - num_m + i if is_run else context + 7 * i for i in range(num_m)]
    table = np.random.default_rng(0).permutation(SLOTS * MAX_LEN // PAGE_SIZE).astype(np.int32).reshape(SLOTS, -1)
    where = [to_device(np.array(a, np.int32)) for a in (positions, slots, table)]
    rope = np.concatenate([np.ones((MAX_LEN, DIM // 2)), np.zeros((MAX_LEN, DIM // 2))], axis=1)
    plan = poisoned((sizes.attention_plan_size(num_m, SLOTS, not is_run),), np.int32)
    workspace = poisoned((sizes.attention_workspace_size(num_m, SLOTS, HEADS, KV_HEADS, DIM),), np.float32)
    rest = [to_device(rope.astype(np.float32)), plan, DIM**-0.5, 0, workspace]
    row: dict[str, Any] = {"context": context, "tokens": num_m, "of_one_slot": is_run}
    for layer in layers:
        layer.make_room(num_m)
    begun = layers[0].begin(num_m)
    for joined in (False, True):
        stream.synchronize()
        stream.begin_capture()
        kernels["attention_plan"](where[0], where[1], SLOTS, HEADS, KV_HEADS, 0, plan)
        for i, layer in enumerate(layers):
            layer.queue(layers[i - 1].out if i else begun, where, rest, joined=joined)
        row["joined_us" if joined else "two_us"] = round(microseconds(stream, stream.end_capture()) / LAYERS, 2)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", type=Path, help="built before")
    parser.add_argument("--contexts", type=int, nargs="+", default=[300, 1500])
    parser.add_argument("--commit", default="", help="of the tree that is measured")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        library = args.library
        if library is None:
            library = Path(folder) / "kernels.so"
            native_cuda.build_cuda_library(native_cuda.CUDA_KERNEL_SOURCES, library)
        kernels = tvm_ffi.load_module(str(library))
        kernels["init_device"](0)
        stream = cupy.cuda.Stream(non_blocking=True)
        with stream, tvm_ffi.use_raw_stream(tvm_ffi.device("cuda", 0), stream.ptr):
            layers = [Layer(kernels, seed) for seed in range(LAYERS)]
            rows = []
            for context in args.contexts:
                for num_m, is_run in CASES:
                    rows.append(measure(kernels, stream, layers, context, num_m, is_run=is_run))
                    print(rows[-1], flush=True)
    result = {
        "benchmark": "gpu_draft_layer",
        "commit": args.commit,
        "device": cupy.cuda.runtime.getDeviceProperties(0)["name"].decode(),
        "floor": "a layer's weights once at 4.70 TB/s: 12.9 us",
        "rows": rows,
    }
    text = json.dumps(result, indent=1)
    if args.output is not None:
        args.output.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()

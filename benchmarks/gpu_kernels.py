"""Time the CUDA kernels on one device inside captured graphs, every launch on other weights, so that L2 is cold.

    python benchmarks/gpu_kernels.py [--library kernels_sm90a.so] [--only gemm,attention,...]

The last line is JSON: rows of kernel, case, microseconds, GB/s with its share of what the memory can give, TFLOP/s.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import cupy
import numpy as np
import tvm_ffi

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from gpu.device import BF16, FP8, DeviceArray, poisoned, random_bf16, random_fp8, to_device
from tpserve.compile import native_cuda
from tpserve.compile.kernels.cuda import sizes
from tpserve.proto import packing

PEAK_GB_S = 4700.0
"""What one kernel that only streams reads from an H200's memory."""

ROTATED_BYTES = 1 << 30
REPEATS = 7

SHAPES = {
    "8b tp1": {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)},
    "70b tp4": {"qkv": (2560, 8192), "o": (8192, 2048), "gate_up": (14336, 8192), "down": (8192, 7168)},
}

rows: list[dict[str, Any]] = []


def timed(stream: Any, launches: list[Callable[[], None]]) -> float:
    """Return microseconds per launch of a graph of all launches, the median over replays."""
    for launch in launches[:2]:
        launch()
    stream.synchronize()
    stream.begin_capture()
    for launch in launches:
        launch()
    graph = stream.end_capture()
    graph.launch(stream)
    times = []
    for _ in range(REPEATS):
        begin, end = cupy.cuda.Event(), cupy.cuda.Event()
        begin.record(stream)
        graph.launch(stream)
        end.record(stream)
        end.synchronize()
        times.append(cupy.cuda.get_elapsed_time(begin, end) * 1e3 / len(launches))
    return float(statistics.median(times))


def report(kernel: str, case: str, us: float, num_bytes: float = 0.0, flops: float = 0.0) -> None:
    row: dict[str, Any] = {"kernel": kernel, "case": case, "us": round(us, 2)}
    if num_bytes:
        row["gb_s"] = round(num_bytes / us / 1e3)
        row["of_peak"] = round(num_bytes / us / 1e3 / PEAK_GB_S, 3)
    if flops:
        row["tflop_s"] = round(flops / us / 1e6, 1)
    rows.append(row)
    print(" ".join(f"{key}={value}" for key, value in row.items()), flush=True)


def activations(num_m: int, size: int, dtype: Any) -> tuple[DeviceArray, ...]:
    """Return what SiLU gives: (M, F), and for e4m3 its scales."""
    values = poisoned((num_m, size), dtype)
    return (values, poisoned((size // 256, 8, (num_m + 7) // 8 * 8), np.float32)) if dtype == FP8 else (values,)


def gate_up_pair(kernels: Any, inputs: tuple[Any, ...], product: DeviceArray, outputs: tuple[Any, ...]) -> None:
    """Run gate_up's product and SiLU as two kernels."""
    fp8 = len(outputs) == 2
    kernels["gemm_fp8" if fp8 else "gemm"](*inputs, product)
    kernels["silu_mul_grouped" if fp8 else "silu_mul_interleaved"](product, *outputs)


def gemms(kernels: Any, stream: Any, dtype: Any, models: list[str], all_m: list[int]) -> None:
    name = "gemm_fp8" if dtype == FP8 else "gemm"
    for model in models:
        for part, (num_n, num_k) in SHAPES[model].items():
            size = num_n * num_k * dtype.itemsize
            shape = packing.packed_shape(num_n, num_k, dtype.itemsize)
            make = random_fp8 if dtype == FP8 else random_bf16
            weights = [make(shape, seed=i) for i in range(max(2, min(24, ROTATED_BYTES // size)))]
            channels = DeviceArray(cupy.ones(num_n, cupy.float32), np.float32)
            for num_m in all_m:
                x = make((num_m, num_k), seed=99)
                tokens = DeviceArray(cupy.ones(num_m, cupy.float32), np.float32)
                out = poisoned((num_m, num_n), BF16)

                count = 24 if num_m <= 128 else len(weights)
                launches: list[Callable[[], None]] = []
                for weight in (weights[i % len(weights)] for i in range(count)):
                    arguments = (x, tokens, weight, channels, out) if dtype == FP8 else (x, weight, out)
                    launches.append(partial(kernels[name], *arguments))
                us = timed(stream, launches)
                flops = 2.0 * num_m * num_n * num_k if num_m > 128 else 0.0
                report(name, f"{model} {part} M={num_m}", us, size if num_m <= 256 else 0, flops)
                if dtype == FP8 and part in ("o", "down") and num_m <= 128:
                    grouped = to_device(np.ones((num_k // 256, 2, (num_m + 7) // 8 * 8), np.float32))
                    launches = [
                        partial(kernels["gemm_fp8_grouped"], x, grouped, weights[i % len(weights)], channels, out)
                        for i in range(count)
                    ]
                    report("gemm_fp8_grouped", f"{model} {part} M={num_m}", timed(stream, launches), size)
                if part == "gate_up" and (num_m <= 128 or dtype == BF16):
                    head = (x, tokens) if dtype == FP8 else (x,)
                    tail = (channels,) if dtype == FP8 else ()
                    outputs = activations(num_m, num_n // 2, dtype)
                    launches = [
                        partial(gate_up_pair, kernels, (*head, weights[i % len(weights)], *tail), out, outputs)
                        for i in range(count)
                    ]
                    fused, scratch = f"{name}_silu_mul", (out,) if dtype == FP8 else ()
                    report(f"{name}, SiLU", f"{model} {part} M={num_m}", timed(stream, launches), size)
                    launches = [
                        partial(kernels[fused], *head, weights[i % len(weights)], *tail, *scratch, *outputs)
                        for i in range(count)
                    ]
                    report(fused, f"{model} {part} M={num_m}", timed(stream, launches), size)
                if dtype == FP8 and part == "down" and num_m <= 128:
                    fine = to_device(np.ones((num_k // 256, 8, (num_m + 7) // 8 * 8), np.float32))
                    launches = [
                        partial(kernels["gemm_fp8_after_silu"], x, fine, weights[i % len(weights)], channels, out)
                        for i in range(count)
                    ]
                    report("gemm_fp8_after_silu", f"{model} {part} M={num_m}", timed(stream, launches), size)
            del weights
            cupy.get_default_memory_pool().free_all_blocks()


def attention(kernels: Any, stream: Any) -> None:
    for model, num_heads, num_kv_heads in (("8b tp1", 32, 8), ("70b tp4", 16, 2)):
        for name, runs in {
            "decode B=1 ctx 1k": [(1023, 1)],
            "decode B=1 ctx 8k": [(8191, 1)],
            "decode B=8 ctx 1k": [(1023, 1)] * 8,
            "decode B=64 ctx 1k": [(1023, 1)] * 64,
            "mixed B=64 ctx 1k + prompt 128": [(1023, 1)] * 64 + [(0, 128)],
            "prompt 2048": [(0, 2048)],
        }.items():
            dim, page_size, num_slots = 128, 16, len(runs)
            positions = np.concatenate([np.arange(s, s + n) for s, n in runs]).astype(np.int32)
            slots = np.concatenate([np.full(n, i) for i, (_, n) in enumerate(runs)]).astype(np.int32)
            max_pages = -(-int(positions.max() + 1) // page_size)
            table = np.random.default_rng(0).permutation(num_slots * max_pages).astype(np.int32).reshape(num_slots, -1)
            on_device = [to_device(a) for a in (positions, slots, table)]
            rope = DeviceArray(cupy.ones((max_pages * page_size, dim), cupy.float32), np.float32)
            qkv = random_bf16((len(slots), (num_heads + 2 * num_kv_heads) * dim))
            q, out = (poisoned((len(slots), num_heads * dim), BF16) for _ in "ab")
            need = sizes.attention_workspace_size(len(slots), num_slots, num_heads, num_kv_heads, dim)
            workspace, scales = poisoned((need,), np.float32), to_device(np.ones(2, np.float32))
            flops = sum(4.0 * num_heads * dim * (s + n / 2) * n for s, n in runs) if "prompt 2048" in name else 0.0
            for decode_only in (False, True) if len(slots) == num_slots else (False,):
                case = f"{model} {name}{', as decodes' if decode_only else ''}"
                plan = poisoned((sizes.attention_plan_size(len(slots), num_slots, decode_only),), np.int32)
                arguments = (*on_device[:2], num_slots, num_heads, num_kv_heads, 0, plan)
                kernels["attention_plan"](*arguments)
                tail = (*on_device, rope, plan, dim**-0.5, 0, workspace, q, out)
                for kernel, kv, make in (("attention", BF16, random_bf16), ("attention_fp8", FP8, random_fp8)):
                    read = sum(s + n for s, n in runs) * num_kv_heads * dim * 2 * kv.itemsize
                    layers = ROTATED_BYTES // (table.size * page_size * num_kv_heads * dim * 2 * kv.itemsize)
                    shape = (table.size, num_kv_heads, 2, page_size * dim)
                    pages = [make(shape, seed=i) for i in range(max(4, min(32, layers)))]
                    head = (qkv,) if kv == BF16 else (qkv, scales)
                    us = timed(stream, [partial(kernels[kernel], *head, layer, *tail) for layer in pages])
                    report(kernel, case, us, 0 if flops else read, flops)
                    del pages
                    cupy.get_default_memory_pool().free_all_blocks()
                if name.startswith("decode B=64"):
                    us = timed(stream, [partial(kernels["attention_plan"], *arguments)] * 16)
                    report("attention_plan", case, us)


def small(kernels: Any, stream: Any) -> None:
    for hidden, ffn in ((4096, 14336), (8192, 7168)):
        weight = DeviceArray(cupy.ones(hidden, cupy.float32), np.float32)
        for num_m in (1, 64):
            x, residual = random_bf16((num_m, hidden)), random_bf16((num_m, hidden))
            total, out = poisoned((num_m, hidden), BF16), poisoned((num_m, hidden), BF16)
            q, scale = poisoned((num_m, max(hidden, ffn)), FP8), poisoned((num_m,), np.float32)
            quantised = DeviceArray(q.bits[:, :hidden], FP8)
            gate_up, act = random_bf16((num_m, 2 * ffn)), poisoned((num_m, ffn), BF16)
            act8, grouped = activations(num_m, ffn, FP8)
            add = (x, residual, weight, 1e-5, total)
            cases: dict[str, tuple[Any, ...]] = {
                "add_rms_norm": (*add, out),
                "add_rms_norm_fp8": (*add, quantised, scale),
                "silu_mul": (gate_up, act),
                "silu_mul_interleaved": (gate_up, act),
                "silu_mul_fp8": (gate_up, act8, scale),
                "silu_mul_grouped": (gate_up, act8, grouped),
            }
            for name, arguments in cases.items():
                us = timed(stream, [partial(kernels[name], *arguments)] * 32)
                report(name, f"H={hidden} F={ffn} M={num_m}", us)


def sampling(kernels: Any, stream: Any) -> None:
    vocab, num_slots = 128256, 64
    for num_rows in (1, 64):
        logits = DeviceArray(
            cupy.random.RandomState(0).standard_normal((num_rows, vocab), dtype=cupy.float32) * 3, np.float32
        )
        masks = to_device(np.full((num_slots, vocab // 32), 0x11111111, np.int32))
        for name, (temperature, top_p, top_k, masked) in {
            "greedy": (0.0, 1.0, 0, False),
            "greedy, masked": (0.0, 1.0, 0, True),
            "temperature": (1.0, 1.0, 0, False),
            "top_p": (0.7, 0.9, 0, False),
            "top_k top_p": (0.7, 0.9, 50, False),
        }.items():
            mask_rows = to_device(np.arange(num_slots, dtype=np.int32) if masked else np.full(num_slots, -1, np.int32))
            floats = [to_device(np.full(num_slots, v, np.float32)) for v in (temperature, top_p, 0.0, 0.0, 0.0)]
            ints = [to_device(np.full(num_slots, v, np.int32)) for v in (top_k, 0, -1)]
            index = to_device(np.arange(num_rows, dtype=np.int32))
            arguments = (
                logits, to_device(np.zeros((num_rows, 8), np.int64)), False, to_device(np.zeros(num_rows, np.int32)),
                vocab, index, index, floats[0], floats[1], ints[0], *floats[2:],
                to_device(np.arange(num_slots, dtype=np.int64)), to_device(np.zeros((num_slots, 1), np.int32)),
                to_device(np.zeros((num_slots, 1), np.float32)), ints[1], to_device(np.zeros((0, vocab), np.int32)),
                ints[2], masks, mask_rows, poisoned((num_rows, vocab), np.float32), poisoned((num_rows,), np.int32),
                poisoned((num_rows,), np.float32), poisoned((num_rows, 20), np.int32),
                poisoned((num_rows, 20), np.float32),
            )  # fmt: skip
            us = timed(stream, [partial(kernels["sample"], *arguments)] * 8)
            report("sample", f"{name} R={num_rows} V={vocab}", us)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", type=Path)
    parser.add_argument("--only", default="small,attention,sampling,fp8,bf16,large bf16,large fp8")
    parser.add_argument("--tokens", type=int, nargs="+", help="of products, instead of each part's own")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        library = options.library
        if library is None:
            library = Path(folder) / "kernels_sm90a.so"
            native_cuda.build_cuda_library(native_cuda.CUDA_KERNEL_SOURCES, library)
        kernels = tvm_ffi.load_module(str(library))
        kernels["init_device"](0)
        stream = cupy.cuda.Stream(non_blocking=True)
        with stream, tvm_ffi.use_raw_stream(tvm_ffi.device("cuda", 0), stream.ptr):
            decode = options.tokens or [1, 8, 16, 32, 64, 128]
            large = options.tokens or [160, 192, 256, 512, 2048]
            parts: dict[str, Callable[[], None]] = {
                "small": lambda: small(kernels, stream),
                "attention": lambda: attention(kernels, stream),
                "sampling": lambda: sampling(kernels, stream),
                "fp8": lambda: gemms(kernels, stream, FP8, ["70b tp4"], decode),
                "bf16": lambda: gemms(kernels, stream, BF16, ["8b tp1"], decode),
                "large bf16": lambda: gemms(kernels, stream, BF16, ["8b tp1"], large),
                "large fp8": lambda: gemms(kernels, stream, FP8, ["70b tp4"], large),
            }
            for name in options.only.split(","):
                parts[name]()
    print(json.dumps({"device": cupy.cuda.runtime.getDeviceProperties(0)["name"].decode(), "rows": rows}))


if __name__ == "__main__":
    main()

"""How near the CPU kernels come to memory bandwidth (one row) and FMA peak (many rows), at SmolLM2-135M's shapes.

Regime: weights larger than the second-level cache are read from a rotating set of copies, so a decode step's cold reads
are what is timed. All numbers are medians. The all-reduce runs between two spawned processes.

    python benchmarks/cpu_kernels.py [--threads N] [--quick]
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import tvm.runtime
import tvm_ffi

from tpserve.collectives.cpu import SharedMemoryCommunicator
from tpserve.compile import native
from tpserve.proto.host import cpu_features

HIDDEN = 576
GEMMS = {"qkv": (HIDDEN, 960), "o": (HIDDEN, HIDDEN), "gate_up": (HIDDEN, 3072), "down": (1536, HIDDEN)}
LM_HEAD = (HIDDEN, 49152)
ROWS = (1, 8, 64, 512)
COLD_BYTES = 64 << 20

Results = dict[str, dict[str, float]]
log = logging.getLogger("cpu_kernels")


def tensor(array: Any) -> Any:
    return tvm.runtime.tensor(np.ascontiguousarray(array))


def median_s(run: Callable[[int], None], budget_s: float) -> float:
    """Median over as many runs as fit the budget, five at least; `run` gets the number of the run."""
    run(0)
    times: list[float] = []
    while len(times) < 5 or (sum(times) < budget_s and len(times) < 500):
        begin = time.perf_counter()
        run(len(times))
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def gemm(kernels: Any, budget_s: float) -> Results:
    results: Results = {}
    rng = np.random.default_rng(0)
    for name, (num_k, num_n) in {**GEMMS, "lm_head": LM_HEAD}.items():
        for dtype in (ml_dtypes.bfloat16, np.float32):
            weight = rng.standard_normal((num_n // 16, num_k, 16), np.float32).astype(dtype)
            copies = [tensor(weight) for _ in range(max(1, min(24, COLD_BYTES // weight.nbytes)))]
            for num_m in ROWS:
                if name == "lm_head" and num_m > 64:
                    continue  # logits are only computed for rows that are sampled
                x = tensor(rng.standard_normal((num_m, num_k), np.float32))
                out = tensor(np.zeros((num_m, num_n), np.float32))
                seconds = median_s(lambda i: kernels["gemm"](x, copies[i % len(copies)], out), budget_s)  # noqa: B023
                label = f"gemm {name} {np.dtype(dtype).name} M={num_m}"
                results[label] = {
                    "us": seconds * 1e6,
                    "GB/s": weight.nbytes / seconds / 1e9,
                    "GFLOP/s": 2e-9 * num_m * num_k * num_n / seconds,
                }
    return results


def attention(kernels: Any, budget_s: float) -> Results:
    results: Results = {}
    num_heads, num_kv_heads, dim, page_size = 9, 3, 64, 16
    rng = np.random.default_rng(0)
    for label, num_slots, num_new, length in (
        ("decode 1 x 256", 1, 1, 256),
        ("decode 8 x 256", 8, 1, 256),
        ("decode 8 x 2048", 8, 1, 2048),
        ("prefill 512", 1, 512, 512),
    ):
        pages_per_slot = length // page_size
        pages = rng.standard_normal((num_slots * pages_per_slot, num_kv_heads, 2, dim * page_size), np.float32)
        table = rng.permutation(num_slots * pages_per_slot).astype(np.int32).reshape(num_slots, -1)
        positions = np.tile(np.arange(length - num_new, length, dtype=np.int32), num_slots)
        slots = np.repeat(np.arange(num_slots, dtype=np.int32), num_new)
        query = rng.standard_normal((len(slots), num_heads, dim), np.float32)
        out = tensor(np.zeros((len(slots), num_heads * dim), np.float32))
        before = [tensor(a) for a in (query, pages, positions, slots, table)]
        seconds = median_s(lambda _: kernels["attention"](*before, dim**-0.5, 0, out), budget_s)  # noqa: B023
        flops = 4.0 * num_heads * dim * float((positions.astype(np.int64) + 1).sum())
        results[f"attention {label}"] = {"us": seconds * 1e6, "GFLOP/s": flops / seconds / 1e9}
    return results


def sampler(kernels: Any, budget_s: float) -> Results:
    results: Results = {}
    rng = np.random.default_rng(0)
    for vocab in (49152, 151936):
        logits = tensor(rng.standard_normal((1, vocab), np.float32) * 3)
        for label, temperature, top_p, num_logprobs, mask_row in (
            ("greedy", 0.0, 1.0, -1, -1),
            ("greedy, masked", 0.0, 1.0, -1, 0),
            ("greedy, 20 logprobs", 0.0, 1.0, 20, -1),
            ("temperature", 1.0, 1.0, -1, -1),
            ("top_p 0.9", 1.0, 0.9, -1, -1),
        ):
            before = [
                *(np.zeros(1, np.int32), np.zeros(1, np.int32)),
                *(np.array([value], np.float32) for value in (temperature, top_p)),
                *(np.zeros(1, np.int32), *(np.zeros(1, np.float32) for _ in range(3)), np.ones(1, np.int64)),
                *(np.zeros((1, 1), np.int32), np.zeros((1, 1), np.float32), np.zeros(1, np.int32)),
                *(np.zeros((0, vocab), np.int32), np.array([num_logprobs], np.int32)),
                *(np.full((1, (vocab + 31) // 32), 0x11111111, np.int32), np.array([mask_row], np.int32)),
                *(np.zeros(1, np.int32), np.zeros(1, np.float32)),
                *(np.zeros((1, 20), np.int32), np.zeros((1, 20), np.float32)),
            ]
            arguments = [tensor(a) for a in before]
            seconds = median_s(lambda _: kernels["sample"](logits, vocab, *arguments), budget_s)  # noqa: B023
            results[f"sample {label}, vocabulary {vocab}"] = {"us": seconds * 1e6}
    return results


def reduce_rank(library: str, name: str, rank: int, sizes: list[int], pipe: Connection) -> None:
    with SharedMemoryCommunicator(tvm_ffi.load_module(library), name, rank, 2) as communicator:
        medians = []
        for size in sizes:
            x, out = tensor(np.ones(size, np.float32)), tensor(np.zeros(size, np.float32))
            times = []
            for _ in range(3000):
                begin = time.perf_counter()
                communicator.all_reduce(x, out)
                times.append(time.perf_counter() - begin)
            medians.append(statistics.median(times))
        pipe.send(medians)
        pipe.recv()


def all_reduce(library: str) -> Results:
    context = multiprocessing.get_context("spawn")
    name = f"tpserve-bench-{uuid.uuid4().hex}"
    sizes = [HIDDEN, 8 * HIDDEN, 512 * HIDDEN]
    pipes, processes = [], []
    for rank in range(2):
        ours, theirs = context.Pipe()
        processes.append(context.Process(target=reduce_rank, args=(library, name, rank, sizes, theirs), daemon=True))
        processes[-1].start()
        pipes.append(ours)
    medians = [pipe.recv() for pipe in pipes]
    for pipe, process in zip(pipes, processes, strict=True):
        pipe.send(None)
        process.join()
    return {f"all_reduce 2 x {size}": {"us": max(m[i] for m in medians) * 1e6} for i, size in enumerate(sizes)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="a tenth of the time, rougher medians")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    budget_s = 0.03 if arguments.quick else 0.3
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "kernels.so"
        native.build_library(native.CPU_KERNEL_SOURCES, library)
        kernels = tvm_ffi.load_module(str(library))
        kernels["set_num_threads"](arguments.threads)
        results: Results = {}
        for part in (gemm, attention, sampler):
            results |= part(kernels, budget_s)
        results |= all_reduce(str(library))
    for label, values in results.items():
        log.info("%-42s %s", label, "  ".join(f"{value:9.1f} {unit}" for unit, value in values.items()))
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    report = {
        "benchmark": "cpu_kernels",
        "commit": commit,
        "device": cpu_features(),
        "compiler": native.compiler_version(),
        "threads": arguments.threads,
        "quick": arguments.quick,
        "results": {label: {k: round(v, 3) for k, v in values.items()} for label, values in results.items()},
    }
    log.info("%s", json.dumps(report))


if __name__ == "__main__":
    main()

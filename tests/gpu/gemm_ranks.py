"""One rank of a group whose GEMMs are part of its all-reduces, run as a process of its own; prints JSON.

Compared with two twins: float64, and bit for bit the same GEMM into memory with the sum over ranks after it. All ranks
make all ranks' operands from seeds. Scratch memory tells which way a call took: what is sent to peers leaves it as it
was.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import cupy
import numpy as np
import tvm_ffi

from gpu.collective_ranks import (
    EPS,
    Check,
    Ranks,
    check_late_word,
    decode,
    narrow,
    relative,
    run,
    tensor,
    widen,
)
from gpu.gemm_chains import Chain, failures
from tpserve.collectives.names import GEMM_ALL_REDUCE_ADD_RMS_NORM
from tpserve.proto.packing import packed_shape

KINDS = ("gemm", "gemm_bias", "gemm_fp8", "gemm_fp8_grouped", "gemm_fp8_grouped_bias", "gemm_fp8_after_silu")
MOST_PUSHED = 512
POISON = 0xABCD


class Outputs:
    """What a call writes, poisoned: bits and tensors of them, made before any capture."""

    def __init__(self, rows: int, hidden: int, *, quantized: bool) -> None:
        shape = (rows, hidden)
        self.scratch, self.total = cupy.full(shape, POISON, cupy.uint16), cupy.full(shape, POISON, cupy.uint16)
        self.out = cupy.full(shape, 0xFF if quantized else POISON, cupy.uint8 if quantized else cupy.uint16)
        self.scale = cupy.full(rows, cupy.nan, cupy.float32)
        self.part = tensor(self.scratch, "bfloat16")
        self.tensors = [tensor(self.total, "bfloat16"), tensor(self.out, "float8_e4m3fn" if quantized else "bfloat16")]
        if quantized:
            self.tensors.append(tvm_ffi.from_dlpack(self.scale))

    def poison(self) -> None:
        self.scratch.fill(POISON)
        self.total.fill(POISON)
        self.out.fill(0xFF)
        self.scale.fill(cupy.nan)


class Product:
    """One GEMM of every rank for up to `most` rows, with a residual stream and a norm.

    Parameters
    ----------
    size
        K of each rank.
    """

    def __init__(self, ranks: Ranks, kind: str, hidden: int, size: int, most: int) -> None:
        self._ranks, self.kind, self.hidden, self._size = ranks, kind, hidden, size
        self._is_fp8, self._after_silu = "fp8" in kind, "after_silu" in kind
        self._is_grouped = self._after_silu or "grouped" in kind
        rng = cupy.random.RandomState(3)
        self.residual = narrow(rng.standard_normal((most, hidden), dtype=cupy.float32))
        self._norm = rng.standard_normal(hidden, dtype=cupy.float32)
        self._bias = rng.standard_normal(hidden, dtype=cupy.float32)
        self._channels = rng.uniform(0.5, 1.5, hidden).astype(cupy.float32) * (size**-0.5 / 64 if self._is_fp8 else 1)
        self._x = [self._random((most, size), 1.0, 10 + r) for r in range(ranks.world_size)]
        # Of a token: scales of its groups, of which the first is the row's where a GEMM takes one.
        self._scales = [
            (10.0 ** cupy.random.RandomState(50 + r).uniform(-1, 1, (size // 32, most))).astype(cupy.float32)
            for r in range(ranks.world_size)
        ]
        weight = self._random((hidden, size), size**-0.5, 100 + ranks.rank)
        dtype = "float8_e4m3fn" if self._is_fp8 else "bfloat16"
        packed = cupy.zeros(packed_shape(hidden, size, weight.itemsize), weight.dtype)
        self._packed, self._dtype = tensor(packed, dtype), dtype
        ranks.kernels["pack_weight"](tensor(weight, dtype), self._packed)
        # Added by one rank, as biases of row-split layers are.
        self._own_bias = tvm_ffi.from_dlpack(self._bias if ranks.rank == 0 else cupy.zeros_like(self._bias))
        self._norm_tensor, self._channel_tensor = tvm_ffi.from_dlpack(self._norm), tvm_ffi.from_dlpack(self._channels)
        cupy.cuda.get_current_stream().synchronize()

    def _random(self, shape: tuple[int, int], deviation: float, seed: int) -> Any:
        rng = cupy.random.RandomState(seed)
        if not self._is_fp8:
            return narrow(rng.standard_normal(shape, dtype=cupy.float32) * cupy.float32(deviation))
        bits = rng.randint(0, 256, shape, dtype=cupy.uint8)
        return cupy.where((bits & 0x7F) > 0x77, bits & 0xBF, bits)  # finite

    def _given_scales(self, rank: int, rows: int) -> Any:
        """What the GEMM takes: for each row, or grouped with NaN for tokens that are not there."""
        if not self._is_grouped:
            return cupy.ascontiguousarray(self._scales[rank][0, :rows])
        padded, groups = -(-rows // 8) * 8, self._size // self._group_size(rows)
        given = cupy.full((self._size // 256, 8 if self._after_silu else 2, padded), cupy.nan, cupy.float32)
        if rows > 128:  # one for each row
            given.reshape(-1)[:rows] = self._scales[rank][0, :rows]
        else:  # at the head, where there is room for more
            given.reshape(-1, padded)[:groups, :rows] = self._scales[rank][:groups, :rows]
        return given

    def _group_size(self, rows: int) -> int:
        """Elements of K with a scale of their own, as grouped_scales.cuh has it."""
        return 32 if self._after_silu and rows <= 16 else 128

    def operands(self, rows: int) -> list[Any]:
        """Of this rank's GEMM."""
        rank = self._ranks.rank
        x = tensor(cupy.ascontiguousarray(self._x[rank][:rows]), self._dtype)
        operands = [x, self._packed]
        if self._is_fp8:
            operands = [x, tvm_ffi.from_dlpack(self._given_scales(rank, rows)), self._packed, self._channel_tensor]
        return [*operands, self._own_bias] if "bias" in self.kind else operands

    def exact(self, rows: int) -> Any:
        """The norm of the sum, in float64."""
        total = widen(self.residual[:rows]).astype(cupy.float64)
        for rank in range(self._ranks.world_size):
            weight = self._random((self.hidden, self._size), self._size**-0.5, 100 + rank)
            if self._is_fp8:
                scales = self._scales[rank][:, :rows].T.astype(cupy.float64)
                by_row = not self._is_grouped or rows > 128
                group = self._group_size(rows)
                scales = scales[:, :1] if by_row else cupy.repeat(scales[:, : self._size // group], group, axis=1)
                product = (decode(self._x[rank][:rows]) * scales) @ decode(weight).T
                total += product * self._channels.astype(cupy.float64)
            else:
                x, w = (widen(bits).astype(cupy.float64) for bits in (self._x[rank][:rows], weight))
                total += x @ w.T
        if "bias" in self.kind:
            total += self._bias.astype(cupy.float64)
        factor = 1 / cupy.sqrt((total**2).mean(axis=1, keepdims=True) + EPS)
        return total * factor * self._norm.astype(cupy.float64)


class Call:
    """A product of so many rows, to be called again and again; inputs and outputs stay in place."""

    def __init__(self, ranks: Ranks, product: Product, rows: int, *, quantized: bool) -> None:
        self._ranks, self._product, self.rows, self._quantized = ranks, product, rows, quantized
        self._operands = product.operands(rows)
        self._residual = tensor(cupy.ascontiguousarray(product.residual[:rows]), "bfloat16")
        self.outputs = Outputs(rows, product.hidden, quantized=quantized)
        self._suffix = "_fp8" if quantized else ""

    @property
    def name(self) -> str:
        return f"{self._product.kind} {self.rows} x {self._product.hidden}{self._suffix}"

    def fused(self, residual: Any = None, outputs: Outputs | None = None) -> None:
        norm = (self._residual if residual is None else residual, self._product._norm_tensor, EPS)
        outputs = outputs or self.outputs
        name = f"{GEMM_ALL_REDUCE_ADD_RMS_NORM}{self._suffix}"
        self._ranks.call(name, self._product.kind, *self._operands, *norm, outputs.part, *outputs.tensors)

    @property
    def residual_bits(self) -> Any:
        """(rows, hidden) of what is added if no other residual stream is given."""
        return self._product.residual[: self.rows]

    def product_of_rank(self, bits: Any) -> None:
        """Write this rank's part of the sums."""
        self._ranks.kernels[self._product.kind](*self._operands, tensor(bits, "bfloat16"))

    def twin(self, outputs: Outputs) -> None:
        self._ranks.kernels[self._product.kind](*self._operands, outputs.part)
        norm = (self._residual, self._product._norm_tensor, EPS)
        self._ranks.call(f"all_reduce_add_rms_norm{self._suffix}", outputs.part, *norm, *outputs.tensors)

    def keep_expected(self) -> None:
        """Remember what the twin gives."""
        self.expected = Outputs(self.rows, self._product.hidden, quantized=self._quantized)
        self.twin(self.expected)

    def differences(self, actual: Outputs) -> Any:
        """Elements that are not the twin's, counted on the device; of the residual stream where it is whole."""
        own, expected = self._ranks.owns(self.rows), self.expected
        wrong = (actual.total[own] != expected.total[own]).sum() + (actual.out != expected.out).sum()
        return wrong + (actual.scale.view(cupy.uint32) != expected.scale.view(cupy.uint32)).sum()

    def check(self) -> None:
        self.fused()
        outputs = self.outputs
        if self._ranks.is_push:
            self.keep_expected()
            wrong = int(self.differences(outputs))
            assert wrong == 0, f"{self.name}: {wrong} elements are not those of the sums that go by memory"
            pushed = bool((outputs.scratch == POISON).all())
            assert pushed == (self.rows <= MOST_PUSHED), f"{self.name}: pushed is {pushed}"
        values = widen(outputs.out) if not self._quantized else decode(outputs.out) * outputs.scale[:, None]
        error = relative(values, self._product.exact(self.rows))
        assert error < (4e-2 if self._quantized else 1.2e-2), f"{self.name}: off by {error}"
        self._ranks.same_everywhere((outputs.out, outputs.scale) if self._quantized else (outputs.out,))


def check_products(ranks: Ranks, args: argparse.Namespace) -> dict[str, Any]:
    """Every kind of GEMM of every size, for all rows, and both outputs."""
    calls = 0
    for hidden, size in zip(args.sizes[::2], args.sizes[1::2], strict=True):
        for kind in KINDS:
            product = Product(ranks, kind, hidden, size, max(args.rows))
            for rows in args.rows:
                for quantized in (False, True):
                    Call(ranks, product, rows, quantized=quantized).check()
                    calls += 1
    return {"calls": calls}


def mixed_calls(ranks: Ranks, args: argparse.Namespace) -> list[Call]:
    """Calls of two models, pushed and not, one-shot and two-shot."""
    first = Product(ranks, "gemm_fp8_grouped", ranks.hidden, 1024, max(args.rows))
    second = Product(ranks, "gemm_bias", args.also_hidden[0], 512, max(args.rows))
    return [
        Call(ranks, product, rows, quantized=quantized)
        for product, quantized in ((first, True), (first, False), (second, False))
        for rows in args.rows
    ]


def check_turns(ranks: Ranks, args: argparse.Namespace) -> dict[str, Any]:
    """Calls in a random order with ranks out of step; now and then one of those whose sums go by memory."""
    calls = mixed_calls(ranks, args)
    for call in calls:
        call.keep_expected()
    rng, delays = np.random.default_rng(5), np.random.default_rng(ranks.rank)  # the first is the same on all ranks
    wrong = cupy.zeros(1, cupy.int64)
    for _ in range(args.iterations):
        call = calls[rng.integers(len(calls))]
        call.outputs.poison()
        if delays.random() < 0.02:
            time.sleep(delays.random() * 2e-3)
        call.fused() if rng.random() < 0.8 else call.twin(call.outputs)
        wrong += call.differences(call.outputs)
    assert int(wrong[0]) == 0, f"{int(wrong[0])} elements differ"
    return {"calls": args.iterations}


def check_graph(ranks: Ranks, args: argparse.Namespace) -> dict[str, Any]:
    """Replay one graph of as many calls as there are iterations, each with the residual stream of an earlier one.

    Every replay gives all calls' outputs as they were without the graph, the same on all ranks.
    """
    calls = mixed_calls(ranks, args)
    num_steps = args.iterations // len(calls)
    chains = [
        Chain(
            ranks,
            call,
            [Outputs(call.rows, call._product.hidden, quantized=call._quantized) for _ in range(num_steps)],
        )
        for call in calls
    ]

    def queue() -> None:
        for step in range(num_steps):
            for chain in chains:
                chain.queue(step)

    queue()
    for chain in chains:
        chain.keep()
    stream = cupy.cuda.get_current_stream()
    stream.synchronize()
    stream.begin_capture(cupy.cuda.runtime.streamCaptureModeRelaxed)
    queue()
    graph = stream.end_capture()
    wrong: list[str] = []
    for replay in range(args.replays):
        for chain in chains:
            chain.poison()
        graph.launch(stream)
        wrong += failures(chains, replay)
    assert ranks.late_rank() < 0, f"a wait for rank {ranks.late_rank()} gave up"
    assert not wrong, f"{len(wrong)} chains of {args.replays} replays: " + "\n".join(wrong[:3])
    ranks.same_everywhere(tuple(outputs.out for chain in chains for outputs in chain.steps))
    return {"calls": num_steps * len(chains)}


def check_late(ranks: Ranks, args: argparse.Namespace) -> dict[str, Any]:
    """The last rank does not come to a pushed call."""
    call = Call(ranks, Product(ranks, "gemm", ranks.hidden, 512, max(args.rows)), args.rows[0], quantized=False)
    return check_late_word(ranks, call.fused)


CHECKS: dict[str, Check] = {
    "products": check_products,
    "turns": check_turns,
    "graph": check_graph,
    "late": check_late,
}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", type=int, nargs="+", default=[], help="N and K of each product, in turns")
    parser.add_argument("--replays", type=int, default=5, help="of a graph")
    try:
        run(CHECKS, parser)
    except OSError as error:
        sys.exit(f"{type(error).__name__}: {error}")

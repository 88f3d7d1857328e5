"""qkv and attention in one kernel: against float64 and the product and attention that they are of more tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cupy
import numpy as np
import pytest

from gpu.begun_norm import BegunFp8
from gpu.device import BF16, FP8, DeviceArray, poisoned, random_bf16, random_fp8, relative_error, to_device
from gpu.gemm_operands import Kernels, pack, padded, uniform
from gpu.paged import Batch, Paged, reference
from tpserve.compile.kernels.cuda import sizes

pytestmark = pytest.mark.gpu

EPS = 1e-3
DIM = 64
MOST_JOINED = {True: 4, False: 8}
"""Tokens of steps that only decode, and of others."""
HEADS = [(32, 8), (8, 2)]
"""Query and KV heads: those of Llama-3.2-1B, and of a rank of four."""
BATCHES = {
    "first": [(0, 0, 1)],
    "second": [(0, 1, 1)],
    "end-of-slice": [(0, 15, 1)],
    "new-slice": [(0, 16, 1)],
    "short": [(0, 190, 1)],
    "long": [(0, 1999, 1)],
    "two": [(1, 700, 1), (0, 33, 1)],
    "three-and-padding": [(2, 5, 1), (-1, 0, 1), (0, 129, 1), (1, 64, 1)],
    "eight": [(7 - slot, start, 1) for slot, start in enumerate((0, 15, 16, 63, 200, 511, 512, 1500))],
    "all-padding": [(-1, 0, 3)],
    "run-over-slices": [(0, 14, 4)],
    "run-from-nothing": [(0, 0, 8)],
    "two-runs": [(0, 301, 4), (1, 29, 4)],
    "run-and-decode": [(0, 1021, 5), (1, 400, 1), (2, 0, 1), (-1, 0, 1)],
}
"""Runs of (slot, first position, tokens)."""


@dataclass
class Layer:
    """What begins a norm, qkv, and what turns heads."""

    kernels: Kernels
    num_heads: int
    num_kv_heads: int
    hidden: int = 2048

    def __post_init__(self) -> None:
        rows = (self.num_heads + 2 * self.num_kv_heads) * DIM
        self.o, self.qkv = random_fp8((self.hidden, 1024), 2), random_fp8((rows, self.hidden), 5)
        self.packed_o, self.packed = pack(self.kernels, self.o), pack(self.kernels, self.qkv)
        # Queries, keys and values of about one.
        size = float((self.qkv.float64() ** 2).mean()) ** 0.5
        self.scale = uniform(rows, 7, (self.hidden**0.5 * size) ** -1)
        self.norm, self.o_scale = uniform(self.hidden, 4), uniform(self.hidden, 9, 0.02)
        angles = np.arange(2048)[:, None] * 10000.0 ** (-np.arange(DIM // 2) / (DIM // 2))
        self.rope = to_device(np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32))

    def begin(self, num_m: int) -> BegunFp8:
        begun = BegunFp8(num_m, self.hidden)
        x, scale = random_fp8((num_m, 1024), 1), uniform(num_m, 2, 0.02)
        residual = random_bf16((num_m, self.hidden), 2.0, 3)
        self.kernels("gemm_fp8_add_rms_norm")(
            x, scale, self.packed_o, self.o_scale, residual, self.norm, EPS, *begun.outputs
        )
        return begun

    def queries(self, x: BegunFp8, positions: list[int]) -> Any:
        """(T, Hq, D) float64, turned."""
        rows = self.num_heads * DIM
        factor = 1 / cupy.sqrt((x.stream.float64() ** 2).mean(1, keepdims=True) + EPS)
        product = (x.weighted * factor) @ self.qkv.float64()[:rows].T * self.scale.float64()[:rows]
        q = product.reshape(len(positions), -1, DIM)
        angles = self.rope.float64()[cupy.asarray(positions)][:, None]
        cosines, sines = angles[..., : DIM // 2], angles[..., DIM // 2 :]
        first, second = q[..., : DIM // 2], q[..., DIM // 2 :]
        return cupy.concatenate([first * cosines - second * sines, second * cosines + first * sines], axis=-1)


@dataclass
class Given:
    """What a step gave: e4m3 (T, Hq D) with scales, and the pages afterwards."""

    out: DeviceArray
    scales: DeviceArray
    pages: Any

    def widened(self) -> Any:
        num_m, size = self.out.shape
        scales = self.scales.float64().reshape(size // 128, -1)[:, :num_m].T
        return self.out.float64() * cupy.repeat(scales, 128, axis=1)

    def same_as(self, other: Given) -> bool:
        num_m = self.out.shape[0]
        mine, theirs = (given.scales.bits.view(cupy.uint32)[..., :num_m] for given in (self, other))
        pairs = (self.out.bits, other.out.bits), (mine, theirs), (self.pages, other.pages)
        return all(bool((a == b).all()) for a, b in pairs)


class Step:
    """A batch over pages, with either plan."""

    def __init__(self, layer: Layer, state: Paged, batch: Batch, *, decode_only: bool, window: int = 0) -> None:
        self._layer, self._state, self._window = layer, state, window
        self._num_m, num_slots = len(batch.slots), state.table.shape[0]
        self._positions, self._slots = (to_device(np.array(a, np.int32)) for a in (batch.positions, batch.slots))
        self._plan = poisoned((sizes.attention_plan_size(self._num_m, num_slots, decode_only),), np.int32)
        heads = layer.num_heads, layer.num_kv_heads
        need = sizes.attention_workspace_size(self._num_m, num_slots, *heads, DIM)
        self._workspace = poisoned((need,), np.float32)
        layer.kernels("attention_plan")(self._positions, self._slots, num_slots, *heads, window, self._plan)
        self._kv_scale = [] if state.scales is None else [to_device(np.array(state.scales, np.float32))]
        self._suffix = "grouped" if state.scales is None else "fp8_grouped"

    def _between(self) -> tuple[DeviceArray, DeviceArray]:
        layer = self._layer
        columns = (layer.num_heads + 2 * layer.num_kv_heads) * DIM
        return poisoned((self._num_m, columns), BF16), poisoned((self._num_m, layer.num_heads * DIM), BF16)

    def _run(self, call: Any) -> Given:
        size = self._layer.num_heads * DIM
        pages = DeviceArray(self._state.pages.bits.copy(), self._state.pages.dtype)
        guarded = poisoned((self._num_m + 1, size), FP8)
        out = DeviceArray(guarded.bits[: self._num_m], FP8)
        scales = poisoned((size // 256, 2, padded(self._num_m)), np.float32)
        where = [*self._kv_scale, pages, self._positions, self._slots, self._state.table, self._layer.rope, self._plan]
        call([*where, DIM**-0.5, self._window, self._workspace], out, scales)
        cupy.cuda.get_current_stream().synchronize()
        assert bool((guarded.bits[self._num_m] == 0xFF).all())
        assert bool((self._workspace.bits == 0xFFFFFFFF).all())
        return Given(out, scales, pages.bits.copy())

    def joined(self, x: BegunFp8) -> Given:
        layer = self._layer
        function = layer.kernels(f"qkv_attention_{self._suffix}")
        operands = [x.out, x.norms, layer.packed, layer.scale]
        return self._run(lambda where, out, scales: function(*operands, *where, *self._between(), out, scales))

    def plain(self, x: BegunFp8) -> Given:
        layer, (qkv, q) = self._layer, self._between()
        layer.kernels("gemm_fp8_normed")(x.out, x.norms, layer.packed, layer.scale, qkv)
        function = layer.kernels(f"attention_{self._suffix}")
        return self._run(lambda where, out, scales: function(qkv, *where, q, out, scales))


def make(layer: Layer, batch: Batch, kv: Any, page_size: int) -> Paged:
    num_slots = 1 + max(0, *batch.slots)
    max_len = -(-(max(batch.positions) + 1) // 64) * 64
    return Paged.make(batch.starts(num_slots), max_len, layer.num_kv_heads, DIM, page_size, kv)


@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize("kv", [BF16, FP8], ids=["bf16", "e4m3"])
@pytest.mark.parametrize("heads", HEADS)
def test_against_float64_and_two_kernels(kernels: Kernels, heads: tuple[int, int], kv: Any, page_size: int) -> None:
    layer = Layer(kernels, *heads)
    for name, runs in BATCHES.items():
        batch = Batch.of(runs)
        state, x = make(layer, batch, kv, page_size), layer.begin(len(batch.slots))
        step = Step(layer, state, batch, decode_only=False)
        given, twin = step.joined(x), step.plain(x)
        if batch.decode_only and len(batch.slots) <= MOST_JOINED[True]:
            assert Step(layer, state, batch, decode_only=True).joined(x).same_as(given), name
        if max(batch.slots) < 0:
            assert given.same_as(twin), name
            continue
        # Nothing else in the pages has changed, and what has is what two kernels store but for the order of sums.
        changed, of_twin = given.pages != state.pages.bits, twin.pages != state.pages.bits
        assert bool((changed == of_twin).all()), name
        rows, rows_of_twin = (DeviceArray(pages[changed], kv).float64() for pages in (given.pages, twin.pages))
        assert relative_error(rows, rows_of_twin) < (1e-3 if kv == BF16 else 1e-2), name
        assert relative_error(given.widened(), twin.widened()) < (2e-2 if kv == BF16 else 4e-2), name
        state.take_over(given.pages, batch.positions, batch.slots)
        expected = reference(state, layer.queries(x, batch.positions), batch.positions, batch.slots, DIM**-0.5, 0)
        assert relative_error(given.widened(), expected) < 4e-2, name


@pytest.mark.parametrize(("count", "decode_only", "window"), [(5, True, 0), (9, False, 0), (1, True, 64)])
def test_other_steps_take_two_kernels(kernels: Kernels, count: int, decode_only: bool, window: int) -> None:
    layer = Layer(kernels, 32, 8)
    assert window or count == MOST_JOINED[decode_only] + 1
    batch = Batch.of([(slot, 200 + 40 * slot, 1) for slot in range(count)])
    state, x = make(layer, batch, BF16, 16), layer.begin(count)
    step = Step(layer, state, batch, decode_only=decode_only, window=window)
    assert step.joined(x).same_as(step.plain(x))


def test_the_same_bits_again_and_again(kernels: Kernels) -> None:
    layer = Layer(kernels, 32, 8)
    for name in ("short", "two-runs", "eight"):
        batch = Batch.of(BATCHES[name])
        state, x = make(layer, batch, BF16, 16), layer.begin(len(batch.slots))
        step = Step(layer, state, batch, decode_only=False)
        first = step.joined(x)
        assert all(step.joined(x).same_as(first) for _ in range(50)), name


@pytest.mark.parametrize("decode_only", [True, False])
def test_what_is_no_number_stays_so(kernels: Kernels, decode_only: bool) -> None:
    """NaN in one token ends in NaN in that one alone, and nobody waits forever for a sum that looks like none."""
    layer = Layer(kernels, 32, 8)
    batch = Batch.of([(0, 200, 1), (1, 90, 1), (2, 33, 1)])
    state, x = make(layer, batch, BF16, 16), layer.begin(3)
    step = Step(layer, state, batch, decode_only=decode_only)
    clean = step.joined(x).widened()
    x.out.bits[1, 100] = 0x7F
    found = step.joined(x).widened()
    assert bool(cupy.isnan(found[1]).all())
    assert bool((found[::2] == clean[::2]).all())

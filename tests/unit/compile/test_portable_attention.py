"""Portable attention against float64, over shuffled pages full of NaN where nobody wrote: bfloat16 and e4m3 pages."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pytest
from tvm.relax.frontend.nn import Tensor

from portable_twins import (
    BF16,
    BF16_ERROR,
    E4M3,
    Spec,
    Twin,
    aligned,
    check_quantized,
    fresh_rng,
    random_bf16,
    relative_error,
)
from tpserve.compile.operators import AttentionShape, BatchInputs, PagedKV
from tpserve.compile.portable_operators import PortableOperators
from tpserve.worker.arrays import Array

PAGE = 16
NUM_SLOTS = 13
"""Or more."""
MAX_LEN = 320
EPS = 1e-6
SCALES = np.array([0.037, 0.021], np.float32)
"""Of keys and values in e4m3 pages: what is stored is then up to about 200."""

Runs = list[tuple[int, int]]
"""First position and number of tokens, by slot."""
DECODE: Runs = [(start, 1) for start in (0, 1, 14, 15, 16, 17, 31, 32, 33, 63, 64, 255, 256)]
MIXED: Runs = [(100, 1), (0, 1), (0, 40), (15, 17), (63, 2), (16, 16), (31, 1)]


@dataclass(frozen=True, slots=True)
class Case:
    """What is compiled."""

    heads: tuple[int, int, int]
    """Query heads, KV heads, dimensions."""
    page_type: np.dtype = BF16
    quantize: bool = False
    qk_norm: bool = False
    window: int = 0

    @property
    def row(self) -> int:
        num_q, num_kv, dim = self.heads
        return (num_q + 2 * num_kv) * dim


@cache
def compiled(case: Case, num_slots: int) -> Twin:
    num_q, num_kv, dim = case.heads
    operators = PortableOperators("bfloat16", quantize=case.quantize)
    shape = AttentionShape(num_q, num_kv, dim, PAGE, case.window)

    def build(*given: Tensor) -> tuple[Tensor, ...]:
        qkv, positions, slots, table, rope, pages, kv_scale, q_norm, k_norm, empty = given
        batch = BatchInputs(positions, slots, table, rope, empty, empty)
        kv = PagedKV(pages, kv_scale if case.page_type == E4M3 else None)
        out = operators.attention(qkv, (q_norm, k_norm, EPS) if case.qk_norm else None, batch, kv, shape)
        return (out.values,) if out.scale is None else (out.values, out.scale)

    pages: Spec = (("pages", num_kv, 2, PAGE * dim), case.page_type.name)
    inputs: list[Spec] = [(("T", case.row), "bfloat16"), (("T",), "int32"), (("T",), "int32")]
    inputs += [((num_slots, MAX_LEN // PAGE), "int32"), ((MAX_LEN, dim), "float32"), pages, ((2,), "float32")]
    return Twin(build, *inputs, ((dim,), "float32"), ((dim,), "float32"), ((0,), "float32"))


class Pages:
    """Pages that hold random keys and values before each run's first position, and NaN elsewhere."""

    def __init__(self, case: Case, runs: Runs, rng: np.random.Generator) -> None:
        _, num_kv, dim = case.heads
        self.case = case
        per_slot = MAX_LEN // PAGE
        num_pages = len(runs) * per_slot + 3
        self.table = rng.permutation(num_pages)[: len(runs) * per_slot].astype(np.int32).reshape(len(runs), per_slot)
        bits = np.full((num_pages, num_kv, 2, PAGE * dim), 0x7F if case.page_type == E4M3 else 0x7FC0)
        self.data = aligned(bits.astype(np.uint8 if case.page_type == E4M3 else np.uint16).view(case.page_type))
        for slot, (start, _) in enumerate(runs):
            history = rng.standard_normal((2, num_kv, start, dim), dtype=np.float32)
            for which in range(2):
                self.view(which)[slot, :, :start] = (history[which] / self.scale(which)).astype(case.page_type)

    def scale(self, which: int) -> np.float32:
        return SCALES[which] if self.case.page_type == E4M3 else np.float32(1)

    def view(self, which: int) -> _View:
        return _View(self, which)

    def widened(self, which: int, slot: int, stop: int) -> Array:
        """(Hkv, stop, D) float64."""
        out: Array = self.view(which)[slot, :, :stop].astype(np.float64) * np.float64(self.scale(which))
        return out


@dataclass(frozen=True, slots=True)
class _View:
    """Keys (0) or values (1) by slot, head, position and dimension."""

    pages: Pages
    which: int

    def _rows(self, slot: int) -> tuple[Array, Array]:
        num_kv, dim = self.pages.case.heads[1:]
        table = self.pages.table[slot]
        stored = self.pages.data[table, :, self.which]  # (P, Hkv, page_size * D), a copy
        shape = (len(table), num_kv, PAGE, dim) if self.which else (len(table), num_kv, dim, PAGE)
        rows = stored.reshape(shape) if self.which else stored.reshape(shape).swapaxes(2, 3)
        return table, rows.transpose(1, 0, 2, 3).reshape(num_kv, -1, dim)

    def __getitem__(self, index: tuple[int, slice, slice]) -> Array:
        slot, heads, positions = index
        return self._rows(slot)[1][heads, positions]

    def __setitem__(self, index: tuple[int, slice, slice], values: Array) -> None:
        slot, heads, positions = index
        num_kv, dim = self.pages.case.heads[1:]
        table, rows = self._rows(slot)
        rows = rows.copy()
        rows[heads, positions] = values
        paged = rows.reshape(num_kv, len(table), PAGE, dim).transpose(1, 0, 2, 3)
        paged = paged if self.which else paged.swapaxes(2, 3)
        self.pages.data[table, :, self.which] = paged.reshape(len(table), num_kv, -1)


def turned(x: Array, angles: Array) -> Array:
    """(T, H, D), (T, D) -> the same, turned, in the order of operations of the kernel."""
    half = x.shape[-1] // 2
    cos, sin = angles[:, None, :half], angles[:, None, half:]
    first, second = x[..., :half], x[..., half:]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def normed(x: Array, weight: Array) -> Array:
    out: Array = x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS) * weight
    return out


def check(case: Case, runs: Runs) -> None:
    rng = fresh_rng()
    runs = [*runs, *[(0, 0)] * (NUM_SLOTS - len(runs))]  # most of the time goes into compiling: once for all runs
    num_q, num_kv, dim = case.heads
    slots = np.array([slot for slot, (_, count) in enumerate(runs) for _ in range(count)], np.int32)
    positions = np.array([start + i for start, count in runs for i in range(count)], np.int32)
    if len(slots) > 1:  # tokens of a sequence need not stand together
        order = rng.permutation(len(slots))
        slots, positions = slots[order], positions[order]
    pages = Pages(case, runs, rng)
    before = pages.data.copy()
    angle = np.outer(np.arange(MAX_LEN), 10000.0 ** (-np.arange(dim // 2) / (dim // 2)))
    rope = np.concatenate([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)
    qkv = random_bf16(rng, (len(slots), case.row), 1.5)
    weights = [rng.uniform(0.5, 1.5, dim).astype(np.float32) for _ in range(2)]
    twin = compiled(case, len(runs))
    empty = np.zeros(0, np.float32)
    inputs = (qkv, positions, slots, pages.table, rope, pages.data, SCALES, *weights, empty)
    found = twin(*inputs)

    heads = qkv.astype(np.float32).reshape(len(slots), case.row // dim, dim)
    q, k, v = np.split(heads, [num_q, num_q + num_kv], axis=1)
    if case.qk_norm:
        q, k = (normed(x.astype(np.float64), w).astype(np.float32) for x, w in zip((q, k), weights, strict=True))
    q, k = turned(q, rope[positions]), turned(k, rope[positions])
    q = q.astype(BF16).astype(np.float64)
    apart, bits = 0, np.uint8 if case.page_type == E4M3 else np.uint16
    for t, (slot, position) in enumerate(zip(slots, positions, strict=True)):
        here = slice(int(position), int(position) + 1)
        for which, new in enumerate((k, v)):
            stored = pages.view(which)[int(slot), :, here][:, 0]
            exact = (
                np.clip(new[t] * (np.float32(1) / pages.scale(which)), -448, 448) if case.page_type == E4M3 else new[t]
            )
            wanted = exact.astype(case.page_type)
            distance = np.abs(stored.view(bits).astype(int) - wanted.view(bits).astype(int))
            if case.qk_norm:
                # A norm's float32 may be on a tie's other side; and where a rotation's terms nearly cancel, what is
                # left keeps the terms' error, which may be several steps of so small a number.
                error = np.abs(stored.astype(np.float64) - wanted.astype(np.float64))
                assert not ((distance > 1) & (error > 2**-21 * np.abs(new[t]).max())).any()
            else:
                assert not distance.any()
            apart += int(np.count_nonzero(distance))
    assert apart <= 1e-3 * 2 * k.size
    written = np.unique([pages.table[slot, position // PAGE] for slot, position in zip(slots, positions, strict=True)])
    others = np.setdiff1d(np.arange(len(before)), written)
    np.testing.assert_array_equal(pages.data.view(bits)[others], before.view(bits)[others])

    expected = np.zeros((len(slots), num_q, dim))
    for t, (slot, position) in enumerate(zip(slots, positions, strict=True)):
        begin = max(0, int(position) - case.window + 1) if case.window else 0
        keys, values = (pages.widened(which, int(slot), int(position) + 1)[:, begin:] for which in range(2))
        rows = q[t].reshape(num_kv, -1, dim)
        scores = rows @ keys.transpose(0, 2, 1) * dim**-0.5
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        expected[t] = (shares / shares.sum(-1, keepdims=True) @ values).reshape(num_q, dim)
    flat = expected.reshape(len(slots), num_q * dim)
    assert found[0].shape == flat.shape
    if not len(slots):
        return
    if not case.quantize:
        assert relative_error(found[0], flat) < BF16_ERROR
        return
    group = 128
    if num_q // num_kv * dim % 128 or num_q * dim % 256 or len(slots) > 128:
        # These rows are bfloat16 first, as they are without quantisation.
        plain = compiled(replace(case, quantize=False), len(runs))
        group, flat = num_q * dim, plain(*inputs)[0].astype(np.float64)
    check_quantized(found[0], found[1], flat, group, slack=1e-3)


PAGE_TYPES = pytest.mark.parametrize("page_type", [BF16, E4M3], ids=["bf16", "fp8"])
HEADS = [(32, 8, 128), (8, 1, 128), (4, 1, 128), (9, 3, 64), (5, 5, 16)]
"""Llama-3 8B on one rank, 70B and 8B on eight, and small ones."""


@PAGE_TYPES
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("runs", [DECODE, MIXED], ids=["decode", "mixed"])
def test_page_borders_and_odd_lengths(page_type: np.dtype, heads: tuple[int, int, int], runs: Runs) -> None:
    check(Case(heads, page_type), runs)


@PAGE_TYPES
def test_an_empty_batch_writes_nothing(page_type: np.dtype) -> None:
    check(Case((4, 1, 128), page_type), [(20, 0), (0, 0)])


@PAGE_TYPES
def test_a_full_batch(page_type: np.dtype) -> None:
    starts = np.random.default_rng().integers(0, 60, 64)
    print(f"starts {starts.tolist()}")
    check(Case((4, 1, 128), page_type), [(int(start), 1) for start in starts])


@PAGE_TYPES
@pytest.mark.parametrize("window", [1, 20])
def test_windows(page_type: np.dtype, window: int) -> None:
    check(Case((8, 2, 64), page_type, window=window), MIXED)


@PAGE_TYPES
def test_heads_that_are_normed(page_type: np.dtype) -> None:
    check(Case((5, 5, 128), page_type, qk_norm=True), MIXED)


@PAGE_TYPES
@pytest.mark.parametrize(
    "heads",
    [(4, 1, 128), (8, 2, 64), (12, 4, 64), (5, 1, 128)],
    ids=["grouped", "two heads of 64", "three heads of 64", "odd heads"],
)
def test_output_is_quantised(page_type: np.dtype, heads: tuple[int, int, int]) -> None:
    check(Case(heads, page_type, quantize=True), MIXED)


@PAGE_TYPES
def test_output_of_many_tokens_is_quantised_by_row(page_type: np.dtype) -> None:
    check(Case((4, 1, 128), page_type, quantize=True), [(0, 100), (7, 29)])

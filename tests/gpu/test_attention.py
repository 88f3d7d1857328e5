"""Rope, append and attention against float64, over shuffled pages full of NaN where nobody wrote."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cupy
import numpy as np
import pytest

from gpu.device import BF16, DeviceArray, poisoned, random_bf16, relative_error, to_device
from tpserve.compile.kernels.cuda import sizes

Kernels = Callable[[str], Any]

pytestmark = pytest.mark.gpu

HEADS = [(32, 8, 128), (8, 2, 128), (16, 2, 128), (8, 1, 128), (4, 1, 128), (9, 3, 64), (14, 2, 64), (5, 5, 128)]


def page_offsets(page_size: int, dim: int) -> Any:
    """Return (page_size, dim): place of each element within the keys or values of a page and head, see kv.cuh."""
    row, d = cupy.mgrid[:page_size, :dim]
    return (d // 64 * page_size + row) * 64 + ((d // 8 % 8) ^ (row % 8)) * 8 + d % 8


@dataclass(slots=True)
class Paged:
    """Pages, and the plain history they must be equal to: bfloat16 bits by slot and position."""

    pages: DeviceArray
    table: DeviceArray
    keys: DeviceArray  # (num_slots, max_len, num_kv_heads, head_dim)
    values: DeviceArray
    page_size: int

    @classmethod
    def make(cls, lengths: list[int], max_len: int, num_kv_heads: int, dim: int, page_size: int) -> Paged:
        """Pages that hold the first `lengths` positions of each slot."""
        num_slots, pages_per_slot = len(lengths), max_len // page_size
        rng = np.random.default_rng(max_len)
        num_pages = num_slots * pages_per_slot + 3
        table = rng.permutation(num_pages)[: num_slots * pages_per_slot].astype(np.int32).reshape(num_slots, -1)
        shape = (num_slots, max_len, num_kv_heads, dim)
        state = cls(
            poisoned((num_pages, num_kv_heads, 2, page_size * dim), BF16),
            to_device(table),
            random_bf16(shape, 1.0, 1),
            random_bf16(shape, 1.0, 2),
            page_size,
        )
        offsets = page_offsets(page_size, dim)
        for slot, length in enumerate(lengths):
            for which, history in enumerate((state.keys, state.values)):
                bits = history.bits[slot].copy()
                bits[length:] = 0xFFFF
                bits = bits.reshape(pages_per_slot, page_size, num_kv_heads, dim).transpose(0, 2, 1, 3)
                packed = cupy.empty((pages_per_slot, num_kv_heads, page_size * dim), cupy.uint16)
                packed[:, :, offsets.ravel()] = bits.reshape(pages_per_slot, num_kv_heads, -1)
                state.pages.bits[cupy.asarray(table[slot]), :, which] = packed
        return state


def reference(state: Paged, q: Any, positions: list[int], slots: list[int], scale: float, window: int) -> Any:
    num_tokens, num_heads, dim = q.shape
    num_kv_heads = state.keys.shape[2]
    out = cupy.zeros((num_tokens, num_heads, dim))
    widened: dict[int, tuple[Any, Any]] = {}
    for t in range(num_tokens):
        slot = slots[t]
        if slot < 0:
            continue
        if slot not in widened:
            widened[slot] = tuple(
                DeviceArray(h.bits[slot], BF16).float64().transpose(1, 0, 2) for h in (state.keys, state.values)
            )
        begin = max(0, positions[t] - window + 1) if window else 0
        keys, values = (h[:, begin : positions[t] + 1] for h in widened[slot])
        rows = q[t].reshape(num_kv_heads, -1, dim)
        scores = rows @ keys.transpose(0, 2, 1) * scale
        weights = cupy.exp(scores - scores.max(-1, keepdims=True))
        out[t] = (weights / weights.sum(-1, keepdims=True) @ values).reshape(num_heads, dim)
    return out.reshape(num_tokens, -1)


@dataclass(slots=True)
class Batch:
    positions: list[int]
    slots: list[int]

    @classmethod
    def of(cls, runs: list[tuple[int, int, int]]) -> Batch:
        """Runs of (slot, first position, tokens); slot -1 is padding."""
        return cls(
            [start + i for _, start, count in runs for i in range(count)],
            [slot for slot, _, count in runs for _ in range(count)],
        )

    def lengths(self, num_slots: int) -> list[int]:
        lengths = [0] * num_slots
        for position, slot in zip(self.positions, self.slots, strict=True):
            if slot >= 0:
                lengths[slot] = max(lengths[slot], position + 1)
        return lengths


def attend(kernels: Kernels, state: Paged, q: DeviceArray, batch: Batch, window: int = 0) -> DeviceArray:
    num_tokens, num_heads, dim = q.shape
    num_slots, num_kv_heads = state.table.shape[0], state.keys.shape[2]
    positions, slots = (to_device(np.array(a, np.int32)) for a in (batch.positions, batch.slots))
    plan = poisoned((sizes.attention_plan_size(num_tokens, num_slots),), np.int32)
    need = sizes.attention_workspace_size(num_tokens, num_slots, num_heads, num_kv_heads, dim)
    assert need == kernels("attention_workspace_size")(num_tokens, num_slots, num_heads, num_kv_heads, dim)
    assert plan.shape[0] == kernels("attention_plan_size")(num_tokens, num_slots)
    workspace = poisoned((need,), np.float32)
    kernels("attention_plan")(positions, slots, num_slots, num_heads, num_kv_heads, window, plan)
    first = None
    for _ in range(2):  # two layers share a plan
        out = poisoned((num_tokens, num_heads * dim), BF16)
        kernels("attention")(q, state.pages, state.table, plan, dim**-0.5, window, workspace, out)
        assert first is None or bool((first.bits == out.bits).all())
        first = out
    cupy.cuda.get_current_stream().synchronize()
    return out


def check(kernels: Kernels, heads: tuple[int, int, int], batch: Batch, num_slots: int, **options: Any) -> None:
    num_heads, num_kv_heads, dim = heads
    window, page_size = options.get("window", 0), options.get("page_size", 16)
    max_len = -(-(max(batch.positions) + 1) // 64) * 64
    state = Paged.make(batch.lengths(num_slots), max_len, num_kv_heads, dim, page_size)
    q = random_bf16((len(batch.slots), num_heads, dim), 2.0, 5)
    out = attend(kernels, state, q, batch, window)
    expected = reference(state, q.float64(), batch.positions, batch.slots, dim**-0.5, window)
    assert relative_error(out.float64(), expected) < 6e-3
    worst = abs(out.float64() - expected).reshape(len(batch.slots), -1).max(-1)
    assert float(worst.max()) < 0.05, cupy.asnumpy(worst)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("page_size", [16, 64])
def test_decode(kernels: Kernels, heads: tuple[int, int, int], page_size: int) -> None:
    starts = [0, 1, 14, 15, 16, 17, 63, 64, 255, 256, 257, 511, 512, 700, 1023, 1500]
    runs = [(slot, start, 1) for slot, start in enumerate(starts)]
    check(kernels, heads, Batch.of([*runs[8:], *runs[:8], (-1, 0, 3)]), len(starts), page_size=page_size)


@pytest.mark.parametrize("heads", HEADS)
def test_mixed(kernels: Kernels, heads: tuple[int, int, int]) -> None:
    runs = [(0, 300, 1), (1, 0, 1), (2, 0, 200), (3, 90, 70), (4, 513, 2), (-1, 0, 100), (5, 31, 33), (6, 1000, 1)]
    check(kernels, heads, Batch.of(runs), 7)


@pytest.mark.parametrize("window", [1, 20, 300])
@pytest.mark.parametrize("page_size", [16, 64])
def test_window(kernels: Kernels, window: int, page_size: int) -> None:
    runs = [(0, 300, 1), (1, 0, 1), (2, 0, 200), (3, 600, 70), (4, 1513, 2)]
    check(kernels, (8, 2, 128), Batch.of(runs), 5, window=window, page_size=page_size)


def test_long_contexts(kernels: Kernels) -> None:
    check(kernels, (8, 2, 128), Batch.of([(0, 8191, 1), (1, 20000, 1), (2, 8192, 1), (3, 9000, 40)]), 4)


def test_a_whole_prompt(kernels: Kernels) -> None:
    check(kernels, (8, 2, 128), Batch.of([(0, 0, 2048)]), 1)


def test_only_padding(kernels: Kernels) -> None:
    state = Paged.make([0, 0], 64, 2, 128, 16)
    out = attend(kernels, state, random_bf16((8, 8, 128)), Batch([0] * 8, [-1] * 8))
    assert not bool(out.bits.any())


def test_a_token_does_not_depend_on_its_batch(kernels: Kernels) -> None:
    rng = np.random.default_rng(3)
    starts = rng.integers(0, 1100, 64).tolist()
    state = Paged.make([start + 1 for start in starts], 1152, 2, 128, 16)
    q = random_bf16((64, 16, 128), 2.0, 6)
    whole = attend(kernels, state, q, Batch(starts, list(range(64))))
    for t in (0, 7, 63):
        alone = attend(kernels, state, DeviceArray(q.bits[t : t + 1], BF16), Batch([starts[t]], [t]))
        assert bool((alone.bits[0] == whole.bits[t]).all())


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("page_size", [16, 64])
def test_rope_append(kernels: Kernels, norm: bool, heads: tuple[int, int, int], page_size: int) -> None:
    num_heads, num_kv_heads, dim = heads
    positions = np.array([0, 15, 16, 17, 63, 5, 0], np.int32)
    slots = np.array([0, 0, 0, 1, 2, 1, -1], np.int32)
    num_tokens = len(slots)
    state = Paged.make([0, 0, 0], 64, num_kv_heads, dim, page_size)
    before = state.pages.bits.copy()
    qkv = random_bf16((num_tokens, (num_heads + 2 * num_kv_heads) * dim), 1.0, dim)
    angles = np.outer(np.arange(64), 1e4 ** (-np.arange(0, dim, 2) / dim))
    table = np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    weights = np.random.default_rng(0).uniform(0.5, 1.5, (2, dim)).astype(np.float32)
    q_out = poisoned((num_tokens, num_heads, dim), BF16)
    shared = [to_device(positions), to_device(slots), state.table, to_device(table), state.pages, q_out]
    if norm:
        norms = [to_device(weights[0]), to_device(weights[1])]
        kernels("qk_norm_rope_append")(qkv, *norms, 1e-6, *shared)
    else:
        kernels("rope_append")(qkv, *shared)

    values = cupy.asnumpy(qkv.float64()).reshape(num_tokens, -1, dim)
    q, k, v = np.split(values, [num_heads, num_heads + num_kv_heads], axis=1)
    if norm:
        q = q / np.sqrt((q**2).mean(-1, keepdims=True) + 1e-6) * weights[0]
        k = k / np.sqrt((k**2).mean(-1, keepdims=True) + 1e-6) * weights[1]

    def rotate(x: Any) -> Any:
        a, b = np.split(x, 2, axis=-1)
        cosines, sines = np.split(table[positions][:, None].astype(np.float64), 2, axis=-1)
        return np.concatenate([a * cosines - b * sines, b * cosines + a * sines], axis=-1)

    assert relative_error(q_out.float64()[:-1], rotate(q)[:-1]) < 3e-3
    assert bool(cupy.isfinite(q_out.float64()).all())
    offsets = page_offsets(page_size, dim)
    after = state.pages.bits
    host_table = state.table.bits.get()
    for t in range(num_tokens - 1):
        page, row = int(host_table[slots[t], positions[t] // page_size]), positions[t] % page_size
        for which, expected in ((0, rotate(k)[t]), (1, v[t])):
            stored = DeviceArray(after[page, :, which][:, offsets[row]], BF16)
            assert relative_error(stored.float64(), expected) < 3e-3
            before[page, :, which, offsets[row]] = after[page, :, which, offsets[row]]
    assert bool((before == after).all())  # and nothing else was written

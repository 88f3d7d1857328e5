"""Rope, append and attention against float64, over shuffled pages full of NaN where nobody wrote: bfloat16 and e4m3."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cupy
import ml_dtypes
import numpy as np
import pytest

from gpu.device import BF16, FP8, DeviceArray, poisoned, random_bf16, relative_error, to_device
from tpserve.compile.kernels.cuda import sizes

Kernels = Callable[[str], Any]

pytestmark = pytest.mark.gpu

both = pytest.mark.parametrize("kv", [BF16, FP8], ids=["bf16", "fp8"])
SCALES = (0.037, 0.021)
"""Of keys and values: what is stored is then up to about 200."""
HEADS = [(32, 8, 128), (8, 2, 128), (16, 2, 128), (8, 1, 128), (4, 1, 128), (9, 3, 64), (14, 2, 64), (5, 5, 128)]


def page_offsets(page_size: int, dim: int, kv: Any = BF16, *, is_value: bool = False) -> Any:
    """Return (page_size, dim): place of each element in the keys or values of a page and head, see kv_layout.cuh."""
    row, d = cupy.mgrid[:page_size, :dim]
    if kv == BF16:
        return (d // 64 * page_size + row) * 64 + ((d // 8 % 8) ^ (row % 8)) * 8 + d % 8
    swizzle = row % 8 if dim == 128 else row // 2 % 4
    i = d % 16
    byte = i % 8 * 2 + i // 8 if is_value else i % 8 // 2 * 4 + i // 8 * 2 + i % 2
    return row * dim + (d // 16 ^ swizzle) * 16 + byte


def random_fp8_history(shape: tuple[int, ...], scale: float, seed: int) -> DeviceArray:
    """Normal values divided by a scale, as e4m3."""
    values = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32) / np.float32(scale)
    return to_device(values.astype(ml_dtypes.float8_e4m3fn))


@dataclass(slots=True)
class Paged:
    """Pages, and the plain history they must be equal to: bfloat16 bits or e4m3 codes by slot and position."""

    pages: DeviceArray
    table: DeviceArray
    keys: DeviceArray  # (num_slots, max_len, num_kv_heads, head_dim)
    values: DeviceArray
    page_size: int
    scales: tuple[float, float] | None  # of keys and values in e4m3 pages

    @classmethod
    def make(
        cls,
        lengths: list[int],
        max_len: int,
        num_kv_heads: int,
        dim: int,
        page_size: int,
        kv: Any = BF16,
        scales: tuple[float, float] = SCALES,
    ) -> Paged:
        """Pages that hold the first `lengths` positions of each slot."""
        num_slots, pages_per_slot = len(lengths), max_len // page_size
        rng = np.random.default_rng(max_len)
        num_pages = num_slots * pages_per_slot + 3
        table = rng.permutation(num_pages)[: num_slots * pages_per_slot].astype(np.int32).reshape(num_slots, -1)
        shape = (num_slots, max_len, num_kv_heads, dim)
        state = cls(
            poisoned((num_pages, num_kv_heads, 2, page_size * dim), kv),
            to_device(table),
            random_bf16(shape, 1.0, 1) if kv == BF16 else random_fp8_history(shape, scales[0], 1),
            random_bf16(shape, 1.0, 2) if kv == BF16 else random_fp8_history(shape, scales[1], 2),
            page_size,
            None if kv == BF16 else scales,
        )
        for slot, length in enumerate(lengths):
            state.fill(slot, length)
        return state

    def fill(self, slot: int, length: int) -> None:
        """Write the first positions of a slot's history to its pages, and NaN to the others."""
        page_size, (_, _, num_kv_heads, dim) = self.page_size, self.keys.shape
        pages = cupy.asarray(self.table.bits[slot])
        for which, history in enumerate((self.keys, self.values)):
            offsets = page_offsets(page_size, dim, self.pages.dtype, is_value=which == 1)
            bits = history.bits[slot].copy()
            bits[length:] = np.iinfo(np.dtype(bits.dtype)).max
            bits = bits.reshape(len(pages), page_size, num_kv_heads, dim).transpose(0, 2, 1, 3)
            packed = cupy.empty((len(pages), num_kv_heads, page_size * dim), bits.dtype)
            packed[:, :, offsets.ravel()] = bits.reshape(len(pages), num_kv_heads, -1)
            self.pages.bits[pages, :, which] = packed

    def arguments(self) -> list[DeviceArray]:
        """What a kernel takes of the layer: its scales, if it has any, and its pages."""
        return [*([] if self.scales is None else [to_device(np.array(self.scales, np.float32))]), self.pages]

    @property
    def suffix(self) -> str:
        """Of the kernels' names."""
        return "" if self.scales is None else "_fp8"

    def widened(self, slot: int) -> list[Any]:
        """Keys and values of a slot in float64: (num_kv_heads, max_len, head_dim) each."""
        return [
            DeviceArray(history.bits[slot], history.dtype).float64().transpose(1, 0, 2) * np.float64(np.float32(scale))
            for history, scale in zip((self.keys, self.values), self.scales or (1.0, 1.0), strict=True)
        ]


def reference(state: Paged, q: Any, positions: list[int], slots: list[int], scale: float, window: int) -> Any:
    num_tokens, num_heads, dim = q.shape
    num_kv_heads = state.keys.shape[2]
    out = cupy.zeros((num_tokens, num_heads, dim))
    widened: dict[int, list[Any]] = {}
    for t in range(num_tokens):
        slot = slots[t]
        if slot < 0:
            continue
        if slot not in widened:
            widened[slot] = state.widened(slot)
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
    workspace = zero_arrivals(poisoned((need,), np.float32), num_slots, num_kv_heads)
    kernels("attention_plan")(positions, slots, num_slots, num_heads, num_kv_heads, window, plan)
    layer, kernel = state.arguments(), kernels(f"attention{state.suffix}")
    first = None
    for _ in range(2):  # two layers share a plan
        out = poisoned((num_tokens, num_heads * dim), BF16)
        kernel(q, *layer, state.table, plan, dim**-0.5, window, workspace, out)
        assert first is None or bool((first.bits == out.bits).all())
        first = out
    cupy.cuda.get_current_stream().synchronize()
    assert not bool(workspace.bits[: sizes.attention_arrivals(num_slots, num_kv_heads)].any())
    return out


def zero_arrivals(workspace: DeviceArray, num_slots: int, num_kv_heads: int) -> DeviceArray:
    """As the kernels want a new workspace, and leave it."""
    workspace.bits[: sizes.attention_arrivals(num_slots, num_kv_heads)] = 0
    return workspace


def attend_grouped(kernels: Kernels, state: Paged, q: DeviceArray, batch: Batch) -> tuple[Any, Any]:
    """Return what e4m3 output with its scales stands for, in float64, and the scales: (T, Hq) or, for rows, (T, 1)."""
    num_tokens, num_heads, dim = q.shape
    num_slots, num_kv_heads = state.table.shape[0], state.keys.shape[2]
    positions, slots = (to_device(np.array(a, np.int32)) for a in (batch.positions, batch.slots))
    plan = poisoned((sizes.attention_plan_size(num_tokens, num_slots),), np.int32)
    need = sizes.attention_workspace_size(num_tokens, num_slots, num_heads, num_kv_heads, dim)
    workspace = zero_arrivals(poisoned((need,), np.float32), num_slots, num_kv_heads)
    kernels("attention_plan")(positions, slots, num_slots, num_heads, num_kv_heads, 0, plan)
    scratch = poisoned((num_tokens, num_heads * dim), BF16)
    out = poisoned((num_tokens, num_heads * dim), FP8)
    scales = poisoned((num_heads // 2, 2, -(-num_tokens // 8) * 8), np.float32)
    kernel = kernels(f"attention{state.suffix}_grouped")
    kernel(q, *state.arguments(), state.table, plan, dim**-0.5, 0, workspace, scratch, out, scales)
    cupy.cuda.get_current_stream().synchronize()
    by_head = scales.float64().reshape(num_heads, -1)[:, :num_tokens].T
    if num_tokens > 128:
        by_head = by_head[:, :1]
    widened = out.float64().reshape(num_tokens, num_heads, dim) * by_head[:, :, None]
    return widened.reshape(num_tokens, -1), by_head


def check(kernels: Kernels, heads: tuple[int, int, int], batch: Batch, num_slots: int, **options: Any) -> None:
    num_heads, num_kv_heads, dim = heads
    window, page_size = options.get("window", 0), options.get("page_size", 16)
    max_len = -(-(max(batch.positions) + 1) // 64) * 64
    state = Paged.make(batch.lengths(num_slots), max_len, num_kv_heads, dim, page_size, options.get("kv", BF16))
    q = random_bf16((len(batch.slots), num_heads, dim), 2.0, 5)
    out = attend(kernels, state, q, batch, window)
    expected = reference(state, q.float64(), batch.positions, batch.slots, dim**-0.5, window)
    assert relative_error(out.float64(), expected) < 6e-3
    worst = abs(out.float64() - expected).reshape(len(batch.slots), -1).max(-1)
    assert float(worst.max()) < 0.05, cupy.asnumpy(worst)


@both
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("page_size", [16, 64])
def test_decode(kernels: Kernels, heads: tuple[int, int, int], page_size: int, kv: Any) -> None:
    starts = [0, 1, 14, 15, 16, 17, 63, 64, 255, 256, 257, 511, 512, 700, 1023, 1500]
    runs = [(slot, start, 1) for slot, start in enumerate(starts)]
    check(kernels, heads, Batch.of([*runs[8:], *runs[:8], (-1, 0, 3)]), len(starts), page_size=page_size, kv=kv)


@both
@pytest.mark.parametrize("heads", HEADS)
def test_mixed(kernels: Kernels, heads: tuple[int, int, int], kv: Any) -> None:
    runs = [(0, 300, 1), (1, 0, 1), (2, 0, 200), (3, 90, 70), (4, 513, 2), (-1, 0, 100), (5, 31, 33), (6, 1000, 1)]
    check(kernels, heads, Batch.of(runs), 7, kv=kv)


@both
@pytest.mark.parametrize("window", [1, 20, 300])
@pytest.mark.parametrize("page_size", [16, 64])
def test_window(kernels: Kernels, window: int, page_size: int, kv: Any) -> None:
    runs = [(0, 300, 1), (1, 0, 1), (2, 0, 200), (3, 600, 70), (4, 1513, 2)]
    check(kernels, (8, 2, 128), Batch.of(runs), 5, window=window, page_size=page_size, kv=kv)


@both
def test_long_contexts(kernels: Kernels, kv: Any) -> None:
    check(kernels, (8, 2, 128), Batch.of([(0, 8191, 1), (1, 20000, 1), (2, 8192, 1), (3, 9000, 40)]), 4, kv=kv)


@both
def test_a_whole_prompt(kernels: Kernels, kv: Any) -> None:
    check(kernels, (8, 2, 128), Batch.of([(0, 0, 2048)]), 1, kv=kv)


@both
def test_only_padding(kernels: Kernels, kv: Any) -> None:
    state = Paged.make([0, 0], 64, 2, 128, 16, kv)
    out = attend(kernels, state, random_bf16((8, 8, 128)), Batch([0] * 8, [-1] * 8))
    assert not bool(out.bits.any())


GROUPED = [
    pytest.param([(slot, start, 1) for slot, start in enumerate([0, 15, 63, 511, 512, 700, 1500])], id="decode"),
    pytest.param([(0, 300, 1), (1, 0, 1), (2, 40, 60), (-1, 0, 9), (3, 1000, 2), (4, 9000, 1)], id="mixed"),
    pytest.param([(0, 300, 1), (1, 0, 200), (-1, 0, 9)], id="rows"),
]


@both
@pytest.mark.parametrize("heads", [heads for heads in HEADS if heads[2] == 128 and heads[0] % 2 == 0])
@pytest.mark.parametrize("runs", GROUPED)
def test_e4m3_output(kernels: Kernels, heads: tuple[int, int, int], runs: list[tuple[int, int, int]], kv: Any) -> None:
    num_heads, num_kv_heads, dim = heads
    batch = Batch.of(runs)
    num_slots = 1 + max(batch.slots)
    max_len = -(-(max(batch.positions) + 1) // 64) * 64
    state = Paged.make(batch.lengths(num_slots), max_len, num_kv_heads, dim, 16, kv)
    q = random_bf16((len(batch.slots), num_heads, dim), 2.0, 5)
    found, scales = attend_grouped(kernels, state, q, batch)
    expected = reference(state, q.float64(), batch.positions, batch.slots, dim**-0.5, 0)
    assert relative_error(found, expected) < 4e-2
    size = dim if len(batch.slots) <= 128 else num_heads * dim
    largest = abs(expected).reshape(len(batch.slots), -1, size).max(-1)
    present = cupy.asarray(np.array(batch.slots) >= 0)
    assert float(abs(scales * 448 / largest - 1)[present].max()) < 0.02
    assert not bool(found[~present].any())


@pytest.mark.parametrize("dim", [64, 128])
def test_every_e4m3_code_is_read_exactly(kernels: Kernels, dim: int) -> None:
    """A token that sees itself alone gets its value, which bfloat16 holds."""
    num_slots = 256 // dim
    state = Paged.make([1] * num_slots, 16, 1, dim, 16, FP8, (1.0, 0.5))
    codes = np.arange(256, dtype=np.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0  # NaN
    state.values.bits[:, 0, 0] = cupy.asarray(codes.reshape(num_slots, dim))
    for slot in range(num_slots):
        state.fill(slot, 1)
    q = random_bf16((num_slots, 4, dim), 2.0, 5)
    out = attend(kernels, state, q, Batch([0] * num_slots, list(range(num_slots))))
    expected = codes.view(FP8).astype(np.float64).reshape(num_slots, 1, dim) * 0.5
    found = cupy.asnumpy(out.float64()).reshape(num_slots, 4, dim)
    np.testing.assert_array_equal(found, np.broadcast_to(expected, found.shape))


def test_queries_beyond_float16_are_clipped(kernels: Kernels) -> None:
    """With e4m3 pages products are in float16: a query larger than it holds takes its largest score, not NaN."""
    state = Paged.make([40], 64, 1, 128, 16, FP8)
    q = random_bf16((1, 8, 128), 1e6, 5)
    out = attend(kernels, state, q, Batch([39], [0]))
    clipped = q.float64().clip(-65504, 65504)
    expected = reference(state, clipped, [39], [0], 128**-0.5, 0)
    assert relative_error(out.float64(), expected) < 6e-3


def test_pages_of_another_type_are_refused(kernels: Kernels) -> None:
    q, plan = random_bf16((1, 4, 128)), poisoned((sizes.attention_plan_size(1, 1),), np.int32)
    workspace = zero_arrivals(poisoned((sizes.attention_workspace_size(1, 1, 4, 1, 128),), np.float32), 1, 1)
    out = poisoned((1, 512), BF16)
    wide, narrow = (Paged.make([1], 16, 1, 128, 16, kv) for kv in (BF16, FP8))
    scales, one = (to_device(np.ones(count, np.float32)) for count in (2, 1))
    rest = (plan, 0.1, 0, workspace, out)
    with pytest.raises(TypeError, match="kv_layer has dtype code 10 with 8 bits, expected bfloat16"):
        kernels("attention")(q, narrow.pages, narrow.table, *rest)
    with pytest.raises(TypeError, match="kv_layer has dtype code 4 with 16 bits, expected float8_e4m3fn"):
        kernels("attention_fp8")(q, scales, wide.pages, wide.table, *rest)
    with pytest.raises(ValueError, match=r"kv_scale has shape \(1\), expected \(2\)"):
        kernels("attention_fp8")(q, one, narrow.pages, narrow.table, *rest)


@both
def test_a_token_does_not_depend_on_its_batch(kernels: Kernels, kv: Any) -> None:
    rng = np.random.default_rng(3)
    starts = rng.integers(0, 1100, 64).tolist()
    state = Paged.make([start + 1 for start in starts], 1152, 2, 128, 16, kv)
    q = random_bf16((64, 16, 128), 2.0, 6)
    whole = attend(kernels, state, q, Batch(starts, list(range(64))))
    for t in (0, 7, 63):
        alone = attend(kernels, state, DeviceArray(q.bits[t : t + 1], BF16), Batch([starts[t]], [t]))
        assert bool((alone.bits[0] == whole.bits[t]).all())


@both
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("page_size", [16, 64])
def test_rope_append(kernels: Kernels, norm: bool, heads: tuple[int, int, int], page_size: int, kv: Any) -> None:
    num_heads, num_kv_heads, dim = heads
    positions = np.array([0, 15, 16, 17, 63, 5, 0], np.int32)
    slots = np.array([0, 0, 0, 1, 2, 1, -1], np.int32)
    num_tokens = len(slots)
    state = Paged.make([0, 0, 0], 64, num_kv_heads, dim, page_size, kv)
    before = state.pages.bits.copy()
    qkv = random_bf16((num_tokens, (num_heads + 2 * num_kv_heads) * dim), 1.0, dim)
    angles = np.outer(np.arange(64), 1e4 ** (-np.arange(0, dim, 2) / dim))
    table = np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    weights = np.random.default_rng(0).uniform(0.5, 1.5, (2, dim)).astype(np.float32)
    q_out = poisoned((num_tokens, num_heads, dim), BF16)
    shared = [to_device(positions), to_device(slots), state.table, to_device(table), *state.arguments(), q_out]
    if norm:
        norms = [to_device(weights[0]), to_device(weights[1])]
        kernels(f"qk_norm_rope_append{state.suffix}")(qkv, *norms, 1e-6, *shared)
    else:
        kernels(f"rope_append{state.suffix}")(qkv, *shared)

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
    after = state.pages.bits
    host_table = state.table.bits.get()
    for t in range(num_tokens - 1):
        page, row = int(host_table[slots[t], positions[t] // page_size]), positions[t] % page_size
        for which, expected in ((0, rotate(k)[t]), (1, v[t])):
            places = page_offsets(page_size, dim, kv, is_value=which == 1)[row]
            stored = DeviceArray(after[page, :, which][:, places], kv)
            if state.scales is None:
                assert relative_error(stored.float64(), expected) < 3e-3
            else:
                check_codes(stored.host(), expected / np.float64(np.float32(state.scales[which])))
            before[page, :, which, places] = after[page, :, which, places]
    assert bool((before == after).all())  # and nothing else was written


def check_codes(stored: Any, expected: Any) -> None:
    """See that codes are the nearest ones; float32 may take the neighbour where it is as near."""
    nearest = np.clip(expected, -448, 448).astype(np.float32).astype(FP8)
    assert np.mean(stored.view(np.uint8) != nearest.view(np.uint8)) < 0.02
    error = np.abs(stored.astype(np.float64) - np.clip(expected, -448, 448))
    assert (error <= np.abs(expected) * (2**-4 * 1.01) + 2**-10 * 1.01).all()


def test_values_beyond_e4m3_are_clipped_and_nan_stays(kernels: Kernels) -> None:
    state = Paged.make([0], 64, 1, 128, 16, FP8, (1e-3, 1e-3))
    values = np.random.default_rng(1).standard_normal((1, 3, 128)).astype(np.float32)
    values[0, 1:, :4] = [np.inf, -np.inf, 1e30, -1e30]
    values[0, 2, 7] = np.nan
    rope = np.concatenate([np.ones((64, 64)), np.zeros((64, 64))], axis=1).astype(np.float32)  # turns nothing
    zeros = to_device(np.zeros(1, np.int32))
    q_out = poisoned((1, 1, 128), BF16)
    qkv = to_device(values.astype(BF16).reshape(1, -1))
    kernels("rope_append_fp8")(qkv, zeros, zeros, state.table, to_device(rope), *state.arguments(), q_out)
    page = int(state.table.bits[0, 0])
    for which, row in ((0, values[0, 1]), (1, values[0, 2])):
        places = cupy.asnumpy(page_offsets(16, 128, FP8, is_value=which == 1)[0])
        stored = state.pages.host()[page, 0, which][places].astype(np.float32)
        if which == 0:  # infinity times a sine of zero is NaN, in bfloat16 pages too
            row, stored = row[2:64], stored[2:64]
        np.testing.assert_array_equal(np.isnan(stored), np.isnan(row))
        kept = ~np.isnan(row)
        assert np.abs(stored[kept]).max() == 448
        np.testing.assert_array_equal(np.sign(stored[kept]), np.sign(row[kept]))

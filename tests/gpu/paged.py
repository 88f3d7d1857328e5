"""Paged keys and values with the plain history they stand for, and attention to new tokens, by either plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cupy
import numpy as np

from gpu.device import BF16, FP8, DeviceArray, poisoned, random_bf16, to_device
from tpserve.compile.kernels.cuda import sizes

Kernels = Callable[[str], Any]

SCALES = (0.037, 0.021)
"""Of keys and values: what is stored is then up to about 200."""


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
    """Normal values divided by a scale, as e4m3; none is -0, which a rotation by nothing may make 0."""
    values = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32) / np.float32(scale)
    codes = values.astype(FP8).view(np.uint8)
    codes[codes == 0x80] = 0
    return to_device(codes.view(FP8))


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

    def rows(self, positions: list[int], slots: list[int], *, are_values: bool) -> Any:
        """Return (T, num_kv_heads, head_dim) bfloat16 bits that are stored as the history's rows; zeros for padding."""
        history, scale = (self.keys, self.values)[are_values], (self.scales or (1.0, 1.0))[are_values]
        stored = DeviceArray(history.bits[cupy.asarray(np.maximum(slots, 0)), cupy.asarray(positions)], history.dtype)
        values = stored.host().astype(np.float32) * np.float32(scale)
        values[np.array(slots) < 0] = 0.0
        return to_device(values.astype(BF16)).bits

    def take_over(self, pages: Any, positions: list[int], slots: list[int]) -> None:
        """Make the histories what pages (bits) hold for these positions."""
        table, page_size, dim = cupy.asnumpy(self.table.bits), self.page_size, self.keys.shape[3]
        for position, slot in zip(positions, slots, strict=True):
            if slot >= 0:
                for which, history in enumerate((self.keys, self.values)):
                    places = page_offsets(page_size, dim, self.pages.dtype, is_value=which == 1)[position % page_size]
                    history.bits[slot, position] = pages[int(table[slot, position // page_size]), :, which][:, places]

    def widened(self, slot: int) -> list[Any]:
        """Keys and values of a slot in float64: (num_kv_heads, max_len, head_dim) each."""
        return [
            DeviceArray(history.bits[slot], history.dtype).float64().transpose(1, 0, 2) * np.float64(np.float32(scale))
            for history, scale in zip((self.keys, self.values), self.scales or (1.0, 1.0), strict=True)
        ]


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

    def ends(self, num_slots: int) -> list[int]:
        """Return how many positions each slot has after the step."""
        ends = [0] * num_slots
        for position, slot in zip(self.positions, self.slots, strict=True):
            if slot >= 0:
                ends[slot] = max(ends[slot], position + 1)
        return ends

    def starts(self, num_slots: int) -> list[int]:
        """Return how many positions each slot has before the step."""
        starts = self.ends(num_slots)
        for position, slot in zip(self.positions, self.slots, strict=True):
            if slot >= 0:
                starts[slot] = min(starts[slot], position)
        return starts

    @property
    def decode_only(self) -> bool:
        """Whether each token is its slot's only one."""
        real = [slot for slot in self.slots if slot >= 0]
        return len(set(real)) == len(real)


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
class NewTokens:
    """What a layer's projections give for the tokens of a step, and what turns them."""

    qkv: DeviceArray  # (T, (Hq + 2 Hkv) D)
    rope: DeviceArray  # (max_len, D)
    num_heads: int
    norms: tuple[DeviceArray, DeviceArray] | None = None

    @classmethod
    def of_history(cls, state: Paged, batch: Batch, q: DeviceArray) -> NewTokens:
        """Queries (T, Hq, D), and the keys and values that the histories have, with a rotation that turns nothing."""
        keys, values = (state.rows(batch.positions, batch.slots, are_values=which) for which in (False, True))
        qkv = cupy.concatenate([q.bits, keys, values], axis=1).reshape(len(batch.slots), -1)
        max_len, dim = state.keys.shape[1], state.keys.shape[3]
        rope = np.concatenate([np.ones((max_len, dim // 2)), np.zeros((max_len, dim // 2))], axis=1)
        return cls(DeviceArray(qkv, BF16), to_device(rope.astype(np.float32)), q.shape[1])


@dataclass(slots=True)
class Attended:
    """What a step gave."""

    out: DeviceArray  # (T, Hq D)
    scales: DeviceArray | None  # of e4m3 out
    q: DeviceArray  # (T, Hq D), turned by the kernel of its own
    pages: Any  # bits

    def same_as(self, other: Attended) -> bool:
        """Compare all bits but those of the queries."""
        pairs = [(self.out.bits, other.out.bits), (self.pages, other.pages)]
        if self.scales is not None and other.scales is not None:
            pairs.append((self.scales.bits.view(cupy.uint32), other.scales.bits.view(cupy.uint32)))
        return all(bool((mine == theirs).all()) for mine, theirs in pairs)


def attend(
    kernels: Kernels, state: Paged, batch: Batch, tokens: NewTokens, window: int = 0, *, grouped: bool = False
) -> Attended:
    """Attend with a plan for any step; where it only decodes, see that a plan of decodes gives the same bits.

    Pages of `state` stay as they are.
    """
    result = run(kernels, state, batch, tokens, window, grouped=grouped)
    if batch.decode_only:
        fused = run(kernels, state, batch, tokens, window, grouped=grouped, decode_only=True)
        assert fused.same_as(result)
        if not grouped:  # no kernel of its own has turned the queries
            assert bool((fused.q.bits == 0xFFFF).all())
    return result


def run(
    kernels: Kernels,
    state: Paged,
    batch: Batch,
    tokens: NewTokens,
    window: int = 0,
    *,
    grouped: bool = False,
    decode_only: bool = False,
) -> Attended:
    """Attend by one of the two plans, twice over the same plan and workspace, as layers do."""
    num_tokens, num_heads = len(batch.slots), tokens.num_heads
    num_slots, num_kv_heads, dim = state.table.shape[0], state.keys.shape[2], state.keys.shape[3]
    positions, slots = (to_device(np.array(a, np.int32)) for a in (batch.positions, batch.slots))
    plan = poisoned((sizes.attention_plan_size(num_tokens, num_slots, decode_only),), np.int32)
    assert plan.shape[0] == kernels("attention_plan_size")(num_tokens, num_slots, decode_only)
    need = sizes.attention_workspace_size(num_tokens, num_slots, num_heads, num_kv_heads, dim)
    assert need == kernels("attention_workspace_size")(num_tokens, num_slots, num_heads, num_kv_heads, dim)
    workspace = poisoned((need,), np.float32)  # all bits set: empty, as the kernels leave it
    kernels("attention_plan")(positions, slots, num_slots, num_heads, num_kv_heads, window, plan)
    name = "attention" if tokens.norms is None else "qk_norm_attention"
    if state.scales is not None:
        name += "_fp8"
    kernel = kernels(f"{name}_grouped" if grouped else name)
    norm = [] if tokens.norms is None else [*tokens.norms, 1e-6]
    scales = [] if state.scales is None else [to_device(np.array(state.scales, np.float32))]
    pages = DeviceArray(state.pages.bits.copy(), state.pages.dtype)
    found: list[Attended] = []
    for _ in range(2):
        q = poisoned((num_tokens, num_heads * dim), BF16)
        out = poisoned(q.shape, FP8 if grouped else BF16)
        out_scales = poisoned((q.shape[1] // 256, 2, -(-num_tokens // 8) * 8), np.float32) if grouped else None
        kernel(
            tokens.qkv, *norm, *scales, pages, positions, slots, state.table, tokens.rope, plan, dim**-0.5, window,
            workspace, q, out, *([] if out_scales is None else [out_scales]),
        )  # fmt: skip
        cupy.cuda.get_current_stream().synchronize()
        assert bool((workspace.bits == 0xFFFFFFFF).all())
        found.append(Attended(out, out_scales, q, pages.bits.copy()))
    assert found[0].same_as(found[1])
    return found[0]

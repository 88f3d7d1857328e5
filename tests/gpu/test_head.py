"""Kernels of an EAGLE-3 head: pairs as on the host, rows side by side, logits in the target's places, the append."""

from __future__ import annotations

import ctypes
import shutil
from typing import Any

import cupy
import numpy as np
import pytest

from gpu.device import BF16, poisoned, random_bf16, to_device
from gpu.paged import Batch, Kernels, NewTokens, Paged, attend
from gpu.test_new_tokens import HEADS, angles
from unit.compile.test_cuda_head import build
from unit.compile.test_cuda_speculation import MOST, NUM_SLOTS, WIDTH, SlotState, address

pytestmark = pytest.mark.gpu(count=1)

Ints = np.ndarray[Any, np.dtype[np.int32]]


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if shutil.which("c++") is None:
        pytest.skip("needs a C++ compiler for the host's side")
    return build(tmp_path_factory.mktemp("rows"))


def step(rng: np.random.Generator, kept_at: Ints) -> tuple[Ints, Ints, Ints]:
    """Positions and slots of a step with runs of several slots and padding, and a number of tokens of each slot."""
    positions: list[int] = []
    slots: list[int] = []
    num_tokens = np.zeros(NUM_SLOTS, np.int32)
    for slot in rng.permutation(NUM_SLOTS)[: rng.integers(1, NUM_SLOTS + 1)]:
        first = int(kept_at[slot]) + 1 if rng.random() < 0.7 else int(rng.integers(0, 40))
        count = int(rng.integers(1, 9))
        positions += range(first, first + count)
        slots += [slot] * count
        if rng.random() < 0.3:
            positions.append(0)
            slots.append(-1)
        if rng.random() < 0.7:  # else its prompt still runs
            num_tokens[slot] = first + rng.integers(1, count + 1) + 1
    return np.array(positions, np.int32), np.array(slots, np.int32), num_tokens


@pytest.mark.parametrize("hidden", [64, 576, 8192])
@pytest.mark.parametrize("seed", range(5))
def test_pairs_are_those_of_the_host(host: ctypes.CDLL, kernels: Kernels, seed: int, hidden: int) -> None:
    rng = np.random.default_rng(seed)
    kept_at = rng.integers(-1, 40, NUM_SLOTS, dtype=np.int32)
    positions, slots, num_tokens = step(rng, kept_at)
    count = len(slots)
    tokens = rng.integers(0, 9, (NUM_SLOTS, WIDTH), dtype=np.int32)
    max_len, drafts = np.full(NUM_SLOTS, WIDTH, np.int32), np.full((NUM_SLOTS, MOST), -1, np.int32)
    state = SlotState(*(array.ctypes.data for array in (tokens, num_tokens, max_len, drafts)), WIDTH, MOST)
    found = [np.zeros(count, np.int32) for _ in range(4)]
    pair_positions, pair_slots, sources, kept_flags = found
    where = [address(array) for array in (positions, slots, kept_at)]
    host.pairs(ctypes.byref(state), count, *where, 35, *map(address, found[:3]))
    host.keep(ctypes.byref(state), count, *where[:2], address(kept_flags))

    rows, kept = random_bf16((count, hidden), 1.0, seed), random_bf16((NUM_SLOTS, hidden), 1.0, seed + 1)
    on_device = [to_device(array) for array in (positions, slots, kept_at)]
    out = [poisoned((count,), np.int32), poisoned((count,), np.int32), poisoned((count, hidden), BF16)]
    kernels("head_pairs")(*on_device, 35, rows, kept, *out)
    np.testing.assert_array_equal(out[0].host(), pair_positions)
    np.testing.assert_array_equal(out[1].host(), pair_slots)
    bits, row_bits, kept_bits = out[2].bits.get(), rows.bits.get(), kept.bits.get()
    for t in range(count):
        expected = np.zeros(hidden, np.uint16)
        if pair_slots[t] >= 0:
            expected = row_bits[sources[t]] if sources[t] >= 0 else kept_bits[pair_slots[t]]
        np.testing.assert_array_equal(bits[t], expected)
    assert (sources[pair_slots >= 0] >= 0).any()

    num_tokens_there = to_device(num_tokens)
    kernels("head_keep")(on_device[0], on_device[1], num_tokens_there, rows, kept, on_device[2])
    for t in np.flatnonzero(kept_flags).tolist():
        kept_bits[slots[t]], kept_at[slots[t]] = row_bits[t], positions[t]
    np.testing.assert_array_equal(kept.bits.get(), kept_bits)
    np.testing.assert_array_equal(on_device[2].host(), kept_at)


@pytest.mark.parametrize("seed", range(5))
def test_rounds_begin_as_on_the_host(host: ctypes.CDLL, kernels: Kernels, seed: int) -> None:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 9, (NUM_SLOTS, WIDTH), dtype=np.int32)
    num_tokens = rng.integers(1, WIDTH, NUM_SLOTS, dtype=np.int32)
    max_len = (rng.integers(0, WIDTH + 10, NUM_SLOTS) * (rng.random(NUM_SLOTS) < 0.8)).astype(np.int32)
    drafts = rng.integers(-1, 9, (NUM_SLOTS, MOST), dtype=np.int32)
    arrays = (tokens, num_tokens, max_len, drafts)
    state = SlotState(*(array.ctypes.data for array in arrays), WIDTH, MOST)
    kept_at = np.where(rng.random(NUM_SLOTS) < 0.8, num_tokens - 2, -1).astype(np.int32)
    stride = int(rng.integers(1, 4))
    at = np.repeat(np.concatenate([rng.permutation(NUM_SLOTS), [-1]]).astype(np.int32), stride)
    batch = NUM_SLOTS + 1
    out = [np.zeros(batch, np.int32) for _ in range(4)]
    on_device = [to_device(array) for array in arrays]
    kept_there, at_there = to_device(kept_at), to_device(at)
    out_there = [to_device(array) for array in out]
    host.first(ctypes.byref(state), batch, 50, address(kept_at), address(at), stride, *map(address, out))
    kernels("head_begin")(*on_device, kept_there, at_there, stride, 50, *out_there)
    later = [np.zeros((MOST - 1, batch), np.int32) for _ in range(3)]
    later_there = [to_device(array) for array in later]
    host.later(ctypes.byref(state), batch, MOST - 1, batch, 1, 50, address(out[2]), *map(address, later))
    kernels("draft_later")(*on_device, out_there[2], 1, 50, *later_there)
    for ours, theirs in zip([*out, *later], [*out_there, *later_there], strict=True):
        np.testing.assert_array_equal(ours, theirs.host())


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize(("rows", "size"), [(1, 64), (7, 576), (130, 8192)])
def test_rows_stand_side_by_side(kernels: Kernels, count: int, rows: int, size: int) -> None:
    parts = [random_bf16((rows, size), 1.0, seed) for seed in range(count)]
    out = poisoned((rows, count * size), BF16)
    kernels(f"concat_{count}")(*parts, out)
    assert bool((out.bits == cupy.concatenate([part.bits for part in parts], axis=1)).all())


@pytest.mark.parametrize(("rows", "tokens", "width", "target"), [(1, 5, 16, 40), (9, 32000, 32000, 128256)])
def test_logits_come_to_the_targets_tokens(kernels: Kernels, rows: int, tokens: int, width: int, target: int) -> None:
    rng = np.random.default_rng(rows)
    ids = np.sort(rng.choice(target, tokens, replace=False)).astype(np.int32)
    logits = rng.standard_normal((rows, width), dtype=np.float32)
    out = to_device(np.full((rows, target), -np.inf, np.float32))
    ids_there, logits_there = to_device(ids), to_device(logits)
    kernels("spread_logits")(logits_there, ids_there, out)
    expected = np.full((rows, target), -np.inf, np.float32)
    expected[:, ids] = logits[:, :tokens]
    np.testing.assert_array_equal(out.host(), expected)


@pytest.mark.parametrize("heads", HEADS)
def test_an_append_alone_is_that_of_attention(kernels: Kernels, heads: tuple[int, int, int]) -> None:
    num_heads, num_kv_heads, dim = heads
    batch = Batch.of([(0, 0, 1), (1, 15, 3), (-1, 0, 2), (2, 63, 1), (3, 5, 40), (-1, 0, 1)])
    state = Paged.make(batch.starts(4), 128, num_kv_heads, dim, 16)
    qkv = random_bf16((len(batch.slots), (num_heads + 2 * num_kv_heads) * dim), 1.0, dim)
    table = to_device(angles(128, dim))
    attended = attend(kernels, state, batch, NewTokens(qkv, table, num_heads, None))
    before = state.pages.bits.copy()
    queries = poisoned((len(batch.slots), num_heads, dim), BF16)
    where = (to_device(np.array(batch.positions, np.int32)), to_device(np.array(batch.slots, np.int32)))
    kernels("rope_append")(qkv, *where, state.table, table, state.pages, queries)
    assert not bool((before == state.pages.bits).all())
    assert bool((state.pages.bits == attended.pages).all())
    present = np.flatnonzero(np.array(batch.slots) >= 0)
    assert bool((queries.bits[present] == attended.q.bits.reshape(queries.shape)[present]).all())

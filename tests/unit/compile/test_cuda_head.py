"""Which pairs an EAGLE-3 head computes on a GPU, row by row on the host, in the steps of test_cuda_speculation.

A row is a number that hangs on all tokens up to its own; the head's KV of a position, on its row and the token behind.
So a draft is made from the right ones only if each pair has the row of its token and no other.
"""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import numpy as np
import numpy.typing as npt
import pytest

from scripts import ROOT
from unit.compile.test_cuda_speculation import (
    MOST,
    NUM_SLOTS,
    WIDTH,
    Device,
    Ints,
    Running,
    check_texts,
    ints,
    sample,
)

Longs = npt.NDArray[np.int64]


def build(folder: Path, header: str | None = None) -> ctypes.CDLL:
    """Compile the rows for the host, with another header if one is given."""
    here, library = Path(__file__).parent, folder / "rows.so"
    if header is not None:
        (folder / "head_rows.cuh").write_text(header)
    source = folder / "head_rows.cpp"
    source.write_text((here / "head_rows.cpp").read_text())
    folders = [f"-I{path}" for path in (folder, here, ROOT / "compile/kernels/cuda")]
    command = ["c++", "-std=c++20", "-O1", "-shared", "-fPIC", *folders, str(source), "-o", str(library)]
    subprocess.run(command, check=True, timeout=60)
    return ctypes.CDLL(str(library))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return build(tmp_path_factory.mktemp("rows"))


def row_of(tokens: list[int]) -> int:
    """The target's row of the last of these tokens."""
    return hash(("row", *tokens)) >> 1


def pair_kv(row: int, token: int) -> int:
    return hash(("pair", row, token)) >> 1


def own_row(kv: list[int]) -> int:
    """What the head gives in place of a row, by all that it has attended to."""
    return hash(("own", *kv)) >> 1


@dataclass
class HeadDevice(Device):
    """The head's KV, and the row that is kept of each slot."""

    head_kv: Longs = field(default_factory=lambda: np.zeros((NUM_SLOTS, WIDTH), np.int64))
    kept: Longs = field(default_factory=lambda: np.zeros(NUM_SLOTS, np.int64))
    kept_at: Ints = field(default_factory=lambda: ints(NUM_SLOTS, value=-1))
    max_head_len: int = WIDTH
    step_rows: Longs = field(default_factory=lambda: np.zeros(0, np.int64))
    num_drafted: int = 0
    num_silent: int = 0

    def enter(self, slot: int, state: Running) -> None:
        super().enter(slot, state)
        self.kept_at[slot] = -1
        self.head_kv[slot] = -7
        for position in range(min(state.num_run, self.max_head_len)):  # of pages that were found, all pairs
            self.head_kv[slot, position] = self.true_pair(state.prompt, position)

    @staticmethod
    def true_pair(tokens: list[int], position: int) -> int:
        return pair_kv(row_of(tokens[: position + 1]), tokens[position + 1])

    def prepare(self, decoding: list[int], num_drafts: int, random: Random, draft_max_len: int) -> None:
        """A head has nothing to catch up with."""

    def extend(self, ids: Ints, positions: Ints, slots: Ints) -> None:
        count = len(ids)
        self.step_rows = np.zeros(count, np.int64)
        for t, (position, slot) in enumerate(zip(positions.tolist(), slots.tolist(), strict=True)):
            if slot >= 0:
                self.step_rows[t] = row_of(self.kv[slot, : position + 1].tolist())
        pair_positions, pair_slots, sources = ints(count), ints(count), ints(count)
        found = (pair_positions, pair_slots, sources)
        self.call("pairs", count, positions, slots, self.kept_at, self.max_head_len, *found)
        for t in range(count):
            if pair_slots[t] >= 0:
                assert pair_positions[t] < self.max_head_len
                self.require_page(int(pair_slots[t]), int(pair_positions[t]))
                row = self.kept[pair_slots[t]] if sources[t] < 0 else self.step_rows[sources[t]]
                self.head_kv[pair_slots[t], pair_positions[t]] = pair_kv(int(row), int(ids[t]))

    def keep(self, positions: Ints, slots: Ints) -> None:
        kept = ints(len(slots))
        self.call("keep", len(slots), positions, slots, kept)
        kept_slots = slots[kept.astype(bool)].tolist()
        assert len(kept_slots) == len(set(kept_slots)), "two rows of a slot are kept in one step"
        for t in np.flatnonzero(kept):
            self.kept[slots[t]], self.kept_at[slots[t]] = self.step_rows[t], positions[t]

    def draft(self, decode_slots: Ints, num_drafts: int, wrong: float, random: Random, draft_max_len: int) -> None:
        self.max_head_len = draft_max_len
        batch, stride = len(decode_slots), random.randint(1, 3)
        laid_out = np.repeat(decode_slots, stride)
        ids, positions, slots, sample_positions = ints(batch), ints(batch), ints(batch), ints(batch)
        where = (laid_out, stride, ids, positions, slots, sample_positions)
        self.call("first", batch, draft_max_len, self.kept_at, *where)
        hidden = np.where(slots >= 0, self.kept[slots], 0)
        later = self.later_steps(slots, num_drafts, 1, draft_max_len)
        next_ids = ints(batch)
        for index in range(num_drafts):
            if index:
                ids, (positions, slots, sample_positions) = next_ids.copy(), later[index - 1]
            sampled = ints(batch)
            for b in range(batch):
                slot, position = int(slots[b]), int(positions[b])
                if slot < 0:
                    self.num_silent += index == 0 and decode_slots[b] >= 0 and self.max_len[decode_slots[b]] > 0
                    continue
                assert slot not in self.num_counted, "a draft's token would be counted"
                self.require_page(slot, position)
                self.head_kv[slot, position] = pair_kv(int(hidden[b]), int(ids[b]))
                true = self._true(slot, int(sample_positions[b]))
                assert position == sample_positions[b] - 2
                seen = self.head_kv[slot, : position + 1].tolist()
                expected: list[int] = []
                for place in range(position + 1):
                    of_target = place + 2 <= self.num_tokens[slot]
                    row = row_of(true[: place + 1]) if of_target else own_row(expected)
                    expected.append(pair_kv(row, true[place + 1]))
                assert seen == expected, "the head's KV is stale"
                hidden[b] = own_row(seen)
                self.num_drafted += 1
                sampled[b] = sample(true, salt=int(random.random() < wrong))
            self.call("store", batch, index, laid_out, stride, sampled, slots, next_ids)
        self.draft_tokens[:, num_drafts:] = -1


def check_drafted_texts(library: ctypes.CDLL, seeds: Iterable[int]) -> None:
    for seed in seeds:
        device = HeadDevice(library)
        check_texts(device, seed)
        assert device.num_drafted > 20 * MOST


@pytest.mark.parametrize("seed", range(6))
def test_texts_are_those_of_plain_decoding(rows: ctypes.CDLL, seed: int) -> None:
    check_drafted_texts(rows, [seed])


def test_a_slot_is_silent_only_at_the_heads_end(rows: ctypes.CDLL) -> None:
    """Whatever came before, plain steps, rejections or a prefix from the cache: the row that it needs is kept."""

    class Long(HeadDevice):
        def draft(self, decode_slots: Ints, num_drafts: int, wrong: float, random: Random, draft_max_len: int) -> None:
            open_ends = [
                slot for slot in decode_slots.tolist() if slot >= 0 and self.num_tokens[slot] < self.max_len[slot]
            ]
            before = self.num_silent
            super().draft(decode_slots, num_drafts, wrong, random, WIDTH)
            full = sum(slot >= 0 and self.max_len[slot] > 0 for slot in decode_slots.tolist()) - len(open_ends)
            assert self.num_silent - before == full

    device = Long(rows)
    check_texts(device, 3)
    assert device.num_drafted > 20 * MOST


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("position = fresh(positions + t) - 1;", "position = fresh(positions + t);"),
        ("position < 0 || position >= max_len", "position < 0"),
        ("t > 0 && fresh(slots + t - 1) == slot", "t > 0 && fresh(slots + t - 1) >= 0"),
        ("return {position, slot, t - 1};", "return {position, slot, t};"),
        ("if (fresh(kept_at + slot) != position) return {0, -1, -1};", ""),
        ("== held - 2;", "== held - 1;"),
        ("if (held > 0) return", "if (false) return"),
        ("return t + 1 == count || fresh(slots + t + 1) != slot;", "return false;"),
        ("fresh(s.max_len + slot) > 0 && !is_full(s, slot)", "!is_full(s, slot)"),
        ("token = token_at(s, slot, count - 1)", "token = token_at(s, slot, count - 2)"),
        ("position = count - 2, row_slot", "position = count - 1, row_slot"),
    ],
)
def test_a_wrong_rule_is_noticed(right: str, wrong: str, tmp_path: Path) -> None:
    header = (ROOT / "compile/kernels/cuda/head_rows.cuh").read_text()
    assert header.count(right) == 1
    library = build(tmp_path, header.replace(right, wrong))
    with pytest.raises((AssertionError, IndexError, ValueError)):
        check_drafted_texts(library, range(4))

"""Suffix decoding on GPUs: what the kernels' blocks do, with threads of the host, against the host's proposer."""

from __future__ import annotations

import ctypes
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from unittest.mock import patch

import numpy as np
import pytest

from planted_faults import one_of_many
from scripts import ROOT
from tpserve.proto.messages import SamplingParams, SlotAdd
from tpserve.worker.batch import Batch
from tpserve.worker.proposers import suffix
from tpserve.worker.proposers.suffix import SuffixProposer
from unit.compile.test_cuda_speculation import Ints, SlotState, address

NUM_SLOTS, NUM_PAGES, MOST = 4, 12, 8
KERNELS = ROOT / "compile/kernels/cuda"


class Slots:
    """What is known of every slot: the tokens are those of a batch, where the proposer reads them."""

    def __init__(self, num_pages: int = NUM_PAGES) -> None:
        self.batch = Batch(NUM_SLOTS, 16, num_pages, 16)
        self.tokens, self.num_tokens = self.batch.tokens, self.batch.num_tokens
        self.max_len = np.zeros(NUM_SLOTS, np.int32)
        self.draft_tokens = np.full((NUM_SLOTS, MOST), -7, np.int32)

    @property
    def arrays(self) -> tuple[Ints, ...]:
        return (self.tokens, self.num_tokens, self.max_len, self.draft_tokens)

    def enter(self, slot: int, tokens: Ints, max_len: int) -> None:
        self.tokens[slot, : len(tokens)] = tokens
        self.num_tokens[slot] = len(tokens)
        self.max_len[slot] = max_len


class SuffixDevice(Protocol):
    """The kernels, and the earlier sequences that they keep."""

    def held(self) -> tuple[Ints, Ints]:
        """Return the ring, (capacity,) int32, and (2,) int32, where its next token goes and how many it holds."""

    def keep(self, slots: Slots, slot: int) -> None: ...

    def draft(self, slots: Slots, decode_slots: Ints, stride: int, num_drafts: int) -> None: ...


class Earlier(ctypes.Structure):
    _fields_ = [("tokens", ctypes.c_void_p), ("held", ctypes.c_void_p), ("capacity", ctypes.c_int)]


class HostDevice:
    """Blocks of a few threads on the host."""

    def __init__(self, library: Rows, capacity: int, num_threads: int) -> None:
        self._library = library
        self._num_threads = num_threads
        self._tokens, self._held = np.full(capacity, -9, np.int32), np.zeros(2, np.int32)
        self._earlier = Earlier(self._tokens.ctypes.data, self._held.ctypes.data, capacity)

    def held(self) -> tuple[Ints, Ints]:
        return self._tokens, self._held

    def keep(self, slots: Slots, slot: int) -> None:
        self._library.keep(*self._given(slots), self._num_threads, slot)

    def draft(self, slots: Slots, decode_slots: Ints, stride: int, num_drafts: int) -> None:
        count = len(decode_slots) // stride
        at = (address(decode_slots), stride)
        self._library.suffix(*self._given(slots), count, num_drafts, self._num_threads, *at)

    def _given(self, slots: Slots) -> tuple[object, object]:
        pointers = (array.ctypes.data for array in slots.arrays)
        state = SlotState(*pointers, slots.tokens.shape[1], slots.draft_tokens.shape[1])
        return ctypes.byref(state), ctypes.byref(self._earlier)


NAMES = ("suffix", "keep")


@dataclass(frozen=True, slots=True)
class Rows:
    """What a library does with rows."""

    suffix: Any
    keep: Any


def build(folder: Path, text: str) -> ctypes.CDLL:
    source = folder / "suffix_rows.cpp"
    source.write_text(text)
    # Not optimised: that takes as long for all forms of the header as the rest, and what runs is short.
    command = ["c++", "-std=c++20", "-O0", "-shared", "-fPIC", "-pthread", str(source), f"-I{KERNELS}"]
    subprocess.run([*command, "-o", str(folder / "rows.so")], check=True, timeout=60)
    return ctypes.CDLL(str(folder / "rows.so"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    library = build(tmp_path_factory.mktemp("rows"), Path(__file__).with_name("suffix_rows.cpp").read_text())
    return Rows(*(library[name] for name in NAMES))


def make_text(rng: np.random.Generator, alphabet: Ints, seen: list[Ints], longest: int) -> Ints:
    """A prompt with what the proposer lives on: few kinds of tokens, repetitions, and pieces of other sequences."""
    length = int(rng.integers(1, longest))
    few = alphabet[: int(rng.integers(1, len(alphabet) + 1))]
    match rng.integers(0, 5):
        case 0:
            text = np.full(length, few[-1])
        case 1:
            text = np.resize(rng.choice(few, int(rng.integers(1, 6))), length)
        case 2:  # one token that almost any other follows, and often the same
            text = rng.choice(np.concatenate([few, np.resize(few[:1], rng.integers(0, 4))]), length)
            text[rng.integers(0, 2) :: 2] = alphabet[-1]
        case 3 if seen:
            text = seen[int(rng.integers(0, len(seen)))].copy()
            text[rng.random(len(text)) < 0.02] = few[0]
            text = text[int(rng.integers(0, 3)) :][:longest]
        case _:
            text = rng.choice(few, length)
    return text.astype(np.int32)


def expected(slots: Slots, proposer: SuffixProposer, decoding: Ints, num_drafts: int) -> Ints:
    limits = slots.max_len[decoding] - slots.num_tokens[decoding] - 1  # `Batch.draft_limits`
    return proposer.propose(decoding, limits.clip(0, num_drafts) * (slots.max_len[decoding] > 0), num_drafts)


def check_drafts(device: SuffixDevice, capacity: int, seed: int, num_steps: int = 40) -> None:
    """Let sequences come, grow and leave, and compare each slot's draft tokens with those of the host's proposer."""
    rng = np.random.default_rng(seed)
    slots = Slots()
    width = slots.tokens.shape[1]
    proposer = SuffixProposer(slots.batch)
    # Tokens that differ in some of their digits only, and one of all ones but for the sign.
    alphabet = rng.permutation(np.asarray([0, 1, 2, 256, 258, 1 << 16, 1 << 24, 1 << 30, 2**31 - 1, 7, 300, 70000]))
    seen: list[Ints] = []
    lengths = []

    def add(slot: int) -> None:
        text = make_text(rng, alphabet, seen, width - 20)
        seen.append(text)
        if rng.random() < 0.1:
            text = text[:0]  # its prompt runs
        max_len = int(rng.integers(len(text), width)) if rng.random() < 0.8 else 0
        slots.enter(slot, text, max_len)
        proposer.add(SlotAdd(slot, SamplingParams(), (), max_len=max_len))

    with patch.object(suffix, "KEPT_TOKENS", capacity):
        for slot in range(NUM_SLOTS):
            add(slot)
        for _ in range(num_steps):
            gone = rng.permutation(NUM_SLOTS)[: rng.choice([0, 0, 1, 2])].tolist()
            for slot in gone:
                proposer.remove(slot)
                device.keep(slots, slot)
                ring, (after, count) = device.held()
                kept = np.roll(ring, -after)[capacity - count :]
                np.testing.assert_array_equal(kept, proposer._earlier)
            for slot in gone:
                add(slot)
            num_drafts, stride = int(rng.integers(1, MOST + 1)), int(rng.integers(1, 4))
            decoding = rng.permutation(NUM_SLOTS).astype(np.int32)
            decoding = decoding[slots.num_tokens[decoding] > 0]
            if not len(decoding):
                continue
            wanted = expected(slots, proposer, decoding, num_drafts)
            padding = np.full(int(rng.integers(0, 2)), -1, np.int32)
            slots.draft_tokens[:] = -7
            device.draft(slots, np.repeat(np.concatenate([padding, decoding]), stride), stride, num_drafts)
            np.testing.assert_array_equal(slots.draft_tokens[decoding, :num_drafts], wanted)
            assert (slots.draft_tokens[:, num_drafts:] == -7).all()
            lengths += (wanted >= 0).sum(axis=1).tolist()
            for slot in decoding:  # as accepted, or not
                if slots.max_len[slot] > slots.num_tokens[slot]:
                    token = slots.draft_tokens[slot, 0]
                    slots.tokens[slot, slots.num_tokens[slot]] = rng.choice(alphabet) if token < 0 else token
                    slots.num_tokens[slot] += 1
    assert len(set(lengths)) > 4, "draft tokens were as many almost everywhere"


@pytest.mark.parametrize("num_threads", [1, 3, 40])
@pytest.mark.parametrize("capacity", [1, 30, 250, 2000])
def test_drafts_are_those_of_the_host(rows: Rows, capacity: int, num_threads: int) -> None:
    for seed in range(6 if num_threads == 1 else 1):
        check_drafts(HostDevice(rows, capacity, num_threads), capacity, seed)


def check_long_texts(device: SuffixDevice, num_pages: int = 512) -> None:
    """Long texts beside as many tokens as are ever kept: all equal, or one is followed by thousands of others."""
    slots = Slots(num_pages)
    width = slots.tokens.shape[1]
    proposer = SuffixProposer(slots.batch)
    decoding = np.arange(NUM_SLOTS, dtype=np.int32)
    several = np.arange(1, width // 2) % 11
    several[-2] = 10  # the last two tokens stand there alone, so that the run is one token
    hub = np.stack([np.full(len(several), 5), np.where(several < 2, 6, 100 + np.arange(len(several)))], axis=1)
    texts = [np.full(width - 10, 3), hub.reshape(-1)[:-1], np.resize([1, 2, 3, 4], width - 10), np.asarray([7, 5])]
    for slot, text in enumerate(texts):
        slots.enter(slot, text.astype(np.int32), width)
    for slot in [0, 0, 0, 1, 2, 3]:
        proposer.add(SlotAdd(slot, SamplingParams(), (), max_len=width))
        wanted = expected(slots, proposer, decoding, MOST)
        device.draft(slots, decoding, 1, MOST)
        np.testing.assert_array_equal(slots.draft_tokens, wanted)
        assert slot == 3 or slots.draft_tokens[1, 0] == (-1 if slot == 2 else 6), "once kept, its end follows"
        proposer.remove(slot)
        device.keep(slots, slot)
    assert (slots.draft_tokens[[0, 2]] >= 0).all()


@pytest.mark.parametrize("num_threads", [1, 5])
def test_long_texts_are_drafted_as_on_the_host(rows: Rows, num_threads: int) -> None:
    check_long_texts(HostDevice(rows, suffix.KEPT_TOKENS, num_threads))


WRONG_RULES = [
    # The text.
    ("position == num_earlier ? -1 : token", "token"),
    ("place < capacity ? place : place - capacity", "place < capacity ? place : 0"),
    ("first < 0 ? first + earlier.capacity : first", "first < 0 ? 0 : first"),
    # The run.
    ("constexpr int kMaxRun = 32;", "constexpr int kMaxRun = 40;"),
    ("first + i > end || tokens[i]", "tokens[i]"),
    ("best = length, marked = 0, since = word", "best = length, since = word"),
    ("best < longest || word < since", "best < longest"),
    # The walk.
    ("constexpr int kTokensPerLength = 2;", "constexpr int kTokensPerLength = 3;"),
    ("constexpr double kMinLikelihood = 0.1;", "constexpr double kMinLikelihood = 0.11;"),
    ("constexpr double kMinLikelihood = 0.1;", "constexpr double kMinLikelihood = 0.09;"),
    ("likelihood *= static_cast", "likelihood = static_cast"),
    ("if (token < 0 ||", "if (token < -1 ||"),
    ("(drafted > 0 && text.at(place + drafted) != token)", "false"),
    ("place + ahead >= text.size || ", "place + ahead > text.size || "),
    # The count.
    ("(value >> shift) % kNumDigits", "static_cast<int>(value >> shift) % kNumDigits"),
    ("level < 32 / kDigitBits", "level < 24 / kDigitBits"),
    ("if (times > 0) team.add(shared.counts + at, times);\n        at", "at"),
    ("likely.counts[which] == most) last", "true) last"),
    ("*count = most;", "*count = num_places;"),
    # Slots and their limits.
    ("return room < num_drafts ? room : num_drafts;", "return num_drafts;"),
    ("fresh(s.max_len + slot) <= 0 || num_tokens < 1", "num_tokens < 1"),
    ("fresh(s.max_len + slot) <= 0 || num_tokens < 1", "fresh(s.max_len + slot) <= 0"),
    ("i == 0 ? -1 : token_at(s, slot, i - 1)", "token_at(s, slot, i == 0 ? 0 : i - 1)"),
    ("earlier.held[0] = (next + count) % earlier.capacity", "earlier.held[0] = count % earlier.capacity"),
]


@pytest.fixture(scope="module")
def wrong_rows(tmp_path_factory: pytest.TempPathFactory) -> list[Rows]:
    """The blocks with each of these rules, all in one library: most of what a compiler does for one are its headers."""
    header = (KERNELS / "suffix_rows.cuh").read_text()
    source = Path(__file__).with_name("suffix_rows.cpp").read_text()
    texts = []
    for right, wrong in WRONG_RULES:
        assert header.count(right) == 1
        texts.append(header.replace(right, wrong))
    texts.append(header)
    library = build(tmp_path_factory.mktemp("wrong"), "".join(one_of_many(source, texts, "tpserve::cuda", NAMES)))
    *forms, right_form = [Rows(*(library[f"{name}_{i}"] for name in NAMES)) for i in range(len(texts))]
    check_drafts(HostDevice(right_form, 250, 1), 250, 0)  # only a wrong rule makes one wrong
    return forms


@pytest.mark.parametrize("rule", range(len(WRONG_RULES)), ids=[" -> ".join(rule) for rule in WRONG_RULES])
def test_a_wrong_rule_is_noticed(wrong_rows: list[Rows], rule: int) -> None:
    with pytest.raises(AssertionError):
        check_several(wrong_rows[rule])


def check_several(library: Rows) -> None:
    for capacity in (30, 250, 2000):
        for seed in range(10):
            check_drafts(HostDevice(library, capacity, 1), capacity, seed)

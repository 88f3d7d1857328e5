"""What the GPU's kernels do in speculating steps, row by row on the host, against sequences decoded one by one.

KV is simulated: each position holds the token that was run there. A row samples a function of all tokens that it sees,
so a text is right only if every token, position and slot was. Sequences that may not be drafted for have penalties:
what they sample hangs on how often their slot has been sampled, too.
"""

from __future__ import annotations

import ctypes
import subprocess
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from scripts import ROOT
from tpserve.proto.messages import SamplingParams, SlotAdd
from tpserve.proto.speculation import DEVICE_DRAFT_WINDOWS
from tpserve.worker.draft_lag import DraftLag, passes_before, smallest_window

NUM_SLOTS, WIDTH, MOST, VOCAB = 5, 64, 4, 7
Ints = npt.NDArray[np.int32]


class SlotState(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("tokens", "num_tokens", "max_len", "draft_tokens")] + [
        ("width", ctypes.c_int),
        ("max_drafts", ctypes.c_int),
    ]


def build_rows(folder: Path) -> ctypes.CDLL:
    library, source = folder / "rows.so", Path(__file__).with_name("speculation_rows.cpp")
    command = ["c++", "-std=c++20", "-O1", "-shared", "-fPIC", f"-I{ROOT / 'compile/kernels/cuda'}"]
    subprocess.run([*command, str(source), "-o", str(library)], check=True, timeout=60)
    return ctypes.CDLL(str(library))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return build_rows(tmp_path_factory.mktemp("rows"))


def address(array: Ints) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def ints(*shape: int, value: int = -7) -> Ints:
    return np.full(shape, value, np.int32)


def sample(tokens: list[int], salt: int = 0) -> int:
    return blake2b(bytes([salt, *tokens]), digest_size=1).digest()[0] % VOCAB


def plain(prompt: list[int], max_len: int, *, penalised: bool) -> list[int]:
    tokens = list(prompt)
    while len(tokens) < max_len:
        tokens.append(sample(tokens, salt=len(tokens) - len(prompt) if penalised else 0))
    return tokens


@dataclass
class Device:
    """The slots' state, simulated KV of target and draft, and of penalised slots how many tokens were counted."""

    library: Any
    tokens: Ints = field(default_factory=lambda: ints(NUM_SLOTS, WIDTH))
    num_tokens: Ints = field(default_factory=lambda: ints(NUM_SLOTS))
    max_len: Ints = field(default_factory=lambda: ints(NUM_SLOTS))
    draft_tokens: Ints = field(default_factory=lambda: ints(NUM_SLOTS, MOST))
    kv: Ints = field(default_factory=lambda: ints(NUM_SLOTS, WIDTH))
    draft_kv: Ints = field(default_factory=lambda: ints(NUM_SLOTS, WIDTH))
    num_counted: dict[int, int] = field(default_factory=dict)
    lengths: dict[int, int] = field(default_factory=dict)
    """At which sequences end, whether they speculate or not."""
    lag: DraftLag = field(default_factory=lambda: DraftLag(NUM_SLOTS))
    window: int = 0
    windows_seen: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        arrays = (self.tokens, self.num_tokens, self.max_len, self.draft_tokens)
        self.state = SlotState(*(array.ctypes.data for array in arrays), WIDTH, MOST)

    def call(self, name: str, *arguments: int | Ints) -> None:
        given = [address(item) if isinstance(item, np.ndarray) else ctypes.c_int(int(item)) for item in arguments]
        getattr(self.library, name)(ctypes.byref(self.state), *given)

    def run(self, kv: Ints, ids: Ints, positions: Ints, slots: Ints) -> None:
        """Write all KV of a step before any is read, as the graph does."""
        for token, position, slot in zip(ids.tolist(), positions.tolist(), slots.tolist(), strict=True):
            if slot >= 0:
                self.require_page(slot, position)
                kv[slot, position] = token

    def require_page(self, slot: int, position: int) -> None:
        """A sequence has pages for all of its tokens but the last; what is behind them may be another's."""
        assert position < self.lengths[slot] - 1, "a token runs where its sequence has no page"

    def enter(self, slot: int, state: Running) -> None:
        """Take a sequence whose first `num_run` tokens are in the prefix cache."""
        self.max_len[slot] = state.max_len if state.speculates else 0
        self.num_tokens[slot] = 0
        self.lengths[slot] = state.max_len
        self.num_counted.pop(slot, None)
        if not state.speculates:
            self.num_counted[slot] = 0
        self.lag.add([SlotAdd(slot, SamplingParams(), (), max_len=int(self.max_len[slot]))])
        for array in (self.kv, self.draft_kv, self.tokens):
            array[slot] = -7
            if state.speculates or array is not self.tokens:  # nobody sends the tokens of hits otherwise
                array[slot, : state.num_run] = state.prompt[: state.num_run]

    def sample(self, slot: int, position: int) -> int:
        """Sample behind a position, as the model does."""
        salt = self.num_counted.get(slot, 0)
        if slot in self.num_counted:
            self.num_counted[slot] += 1
        return sample(self.kv[slot, : position + 1].tolist(), salt)

    def prepare(self, decoding: list[int], num_drafts: int, random: Random, draft_max_len: int) -> None:
        """Let the draft compute what it does before the captured steps: what lies before the round's window."""
        if not num_drafts:
            return
        missing = self.lag.take(np.asarray(decoding, np.int32))
        self.window = smallest_window(missing, DEVICE_DRAFT_WINDOWS)
        self.windows_seen.add(self.window)
        for size, behind in passes_before(self.window, missing, random.randint(1, 9)):
            where = self.window_of(np.asarray(decoding, np.int32), size, behind, random, draft_max_len)
            self.run(self.draft_kv, *where[:3])

    def window_of(
        self, decode_slots: Ints, size: int, behind: int, random: Random, draft_max_len: int
    ) -> tuple[Ints, ...]:
        """Return token ids, positions and slots of a window, and the slots and positions that are sampled."""
        batch, stride = len(decode_slots), random.randint(1, 3)
        where = (*(ints(batch * size) for _ in "abc"), ints(batch), ints(batch))
        self.call("window", batch, size, behind, draft_max_len, np.repeat(decode_slots, stride), stride, *where)
        return where

    def follow(
        self, ids: Ints, positions: Ints, slots: Ints, decoding: list[int], num_drafts: int, draft_max_len: int
    ) -> None:
        """Let the draft run what a step with prompts has run; only their tokens, if it has verified drafts."""
        is_decode = np.isin(slots, [*decoding, -1])  # -1: padding
        if is_decode.all() and not num_drafts:
            self.lag.plain_step(np.asarray(decoding, np.int32))
            return
        known = ints(len(slots))
        self.call("prompt", len(slots), draft_max_len, positions, slots, known)
        assert (positions[known >= 0] < draft_max_len).all(), "a token runs beyond the draft's length"
        self.run(self.draft_kv, ids, positions, np.where(is_decode & (num_drafts > 0), -1, known))
        if not num_drafts:
            self.lag.prompt_step(np.asarray(decoding, np.int32))

    def extend(self, ids: Ints, positions: Ints, slots: Ints) -> None:
        """Do what follows the target's step; `keep` what follows the comparison."""

    def keep(self, positions: Ints, slots: Ints) -> None: ...

    def draft(self, decode_slots: Ints, num_drafts: int, wrong: float, random: Random, draft_max_len: int) -> None:
        batch, stride = len(decode_slots), random.randint(1, 3)
        laid_out = np.repeat(decode_slots, stride)
        window = self.window_of(decode_slots, self.window, 0, random, draft_max_len)
        ids, positions, slots, sample_slots, sample_positions = window
        later = self.later_steps(sample_slots, num_drafts, 0, draft_max_len)
        next_ids = ints(batch)
        for index in range(num_drafts):
            if index:
                ids, (positions, slots, sample_positions) = next_ids.copy(), later[index - 1]
                assert (ids >= 0).all(), "what a row runs must be a token, even if it is padding"
                sample_slots = slots
            self.run(self.draft_kv, ids, positions, slots)
            sampled = ints(batch)
            for b in range(batch):
                if sample_slots[b] >= 0:
                    assert sample_slots[b] not in self.num_counted, "a draft's token would be counted"
                    seen = self.draft_kv[sample_slots[b], : sample_positions[b]].tolist()
                    assert seen == self._true(int(sample_slots[b]), int(sample_positions[b])), "the draft's KV is stale"
                    sampled[b] = sample(seen, salt=int(random.random() < wrong))
            self.call("store", batch, index, laid_out, stride, sampled, sample_slots, next_ids)
        self.draft_tokens[:, num_drafts:] = -1

    def later_steps(
        self, first_slots: Ints, num_drafts: int, behind: int, draft_max_len: int
    ) -> list[tuple[Ints, ...]]:
        """Return positions, slots and sampled positions of each step but the first."""
        count, batch, pitch = num_drafts - 1, len(first_slots), len(first_slots) + 3
        where = [ints(count, pitch) for _ in "abc"]
        self.call("later", batch, count, pitch, behind, draft_max_len, first_slots, *where)
        assert all((array[:, batch:] == -7).all() for array in where), "what is behind a step's rows is not its own"
        return [tuple(array[step, :batch].copy() for array in where) for step in range(count)]

    def _true(self, slot: int, count: int) -> list[int]:
        """The slot's tokens and the draft tokens behind them."""
        held = int(self.num_tokens[slot])
        return [*self.tokens[slot, :held].tolist(), *self.draft_tokens[slot, : count - held].tolist()]


class Apart(Device):
    """A model whose draft has slots of its own: its draft tokens come as a letter, and what a step gave goes back."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.other = Device(self.library, num_counted=self.num_counted, lengths=self.lengths)

    def enter(self, slot: int, state: Running) -> None:
        super().enter(slot, state)
        self.other.enter(slot, state)

    def prepare(self, decoding: list[int], num_drafts: int, random: Random, draft_max_len: int) -> None:
        self.other.prepare(decoding, num_drafts, random, draft_max_len)
        self.windows_seen = self.other.windows_seen

    def follow(self, *step: Any) -> None:
        self.other.follow(*step)

    def draft(self, decode_slots: Ints, num_drafts: int, wrong: float, random: Random, draft_max_len: int) -> None:
        self.other.draft(decode_slots, num_drafts, wrong, random, draft_max_len)
        self.draft_tokens[:] = self.other.draft_tokens

    def call(self, name: str, *arguments: int | Ints) -> None:
        if name == "load":
            self.other.call(name, *(each.copy() if isinstance(each, np.ndarray) else each for each in arguments))
        super().call(name, *arguments)

    def keep(self, positions: Ints, slots: Ints) -> None:
        words = ints(NUM_SLOTS, 2 + MOST)
        self.call("tell", NUM_SLOTS, words)
        self.other.call("take", NUM_SLOTS, words)
        assert (self.other.num_tokens == self.num_tokens).all()
        for slot in self.lengths:
            held = int(self.num_tokens[slot])
            assert (self.other.tokens[slot, :held] == self.tokens[slot, :held]).all()


@dataclass
class Running:
    prompt: list[int]
    max_len: int
    speculates: bool
    num_run: int = 0
    output: list[int] = field(default_factory=list)


@pytest.mark.parametrize("seed", range(6))
def test_texts_are_those_of_plain_decoding(rows: ctypes.CDLL, seed: int) -> None:
    check_texts(Device(rows), seed)


@pytest.mark.parametrize("seed", range(6))
def test_a_draft_elsewhere_knows_the_slots(rows: ctypes.CDLL, seed: int) -> None:
    check_texts(Apart(rows), seed)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("return 2 + s.max_drafts;", "return 1 + s.max_drafts;"),  # a step's tokens but one
        ("token_at(s, slot, count - w)", "token_at(s, slot, count - 1)"),
        ("s.num_tokens[slot] = count;", ";"),
        ("s.width + count - w]", "s.width + count - w + 1]"),
    ],
)
def test_a_wrong_letter_is_noticed(right: str, wrong: str, tmp_path: Path) -> None:
    library = wrong_library(right, wrong, tmp_path)
    with pytest.raises((AssertionError, IndexError, ValueError)):
        check_texts(Apart(library), 1)


@pytest.mark.parametrize("rule", ["plain_step", "prompt_step", "take"])
def test_a_draft_that_is_further_behind_than_is_counted_is_noticed(
    rule: str, rows: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = getattr(DraftLag, rule)
    wrong = (lambda lag, slots: min(1, right(lag, slots))) if rule == "take" else (lambda lag, slots: None)
    monkeypatch.setattr(DraftLag, rule, wrong)
    monkeypatch.setattr("unit.compile.test_cuda_speculation.DEVICE_DRAFT_WINDOWS", (1, *DEVICE_DRAFT_WINDOWS))
    with pytest.raises(AssertionError, match="the draft's KV is stale"):
        check_texts(Device(rows), 1)


def check_texts(device: Device, seed: int) -> None:
    """Run sequences that come and go, and compare their texts."""
    random = Random(seed)
    draft_max_len = random.choice([WIDTH, 40])
    running: dict[int, Running] = {}
    decoding: list[int] = []
    finished = 0
    counts_seen: set[tuple[int, int]] = set()
    beside = False
    for _ in range(400):
        for slot in set(range(NUM_SLOTS)) - running.keys():
            prompt = [random.randrange(VOCAB) for _ in range(random.randint(1, 20))]
            max_len = len(prompt) + random.randint(1, 40)
            num_cached = random.choice([0, random.randrange(len(prompt))])
            running[slot] = Running(prompt, max_len, random.random() < 0.6, num_cached)
            device.enter(slot, running[slot])
        num_drafts = random.randint(0, MOST)
        decode_slots = np.asarray([*decoding, *[-1] * random.randint(0, 2)], np.int32)  # padded to a bucket
        chunks = []
        for slot, state in running.items():
            if slot not in decoding and random.random() < 0.7:
                size = random.randint(1, len(state.prompt) - state.num_run)
                chunks.append((slot, state.num_run, state.prompt[state.num_run : state.num_run + size]))
                state.num_run += size
        device.prepare(decoding, num_drafts, random, draft_max_len)
        if num_drafts:
            device.draft(decode_slots, num_drafts, 0.3, random, draft_max_len)
        batch = len(decode_slots)
        ids = [-1 - j for _ in range(batch) for j in range(1 + num_drafts)]
        slots = [int(slot) for slot in decode_slots for _ in range(1 + num_drafts)]
        positions = [0] * len(ids)
        sample_rows, sample_slots = list(range(len(ids))), list(slots)
        sampled_chunks = []
        for slot, start, tokens in chunks:
            ids += tokens
            slots += [slot] * len(tokens)
            positions += range(start, start + len(tokens))
            if start + len(tokens) == len(running[slot].prompt):
                sample_rows.append(len(ids) - 1)
                sample_slots.append(slot)
                sampled_chunks.append(slot)
        arrays = [np.asarray(values, np.int32) for values in (ids, positions, slots, sample_rows, sample_slots)]
        ids_, positions_, slots_, rows_, sample_slots_ = arrays
        sample_positions_ = ints(len(rows_))
        device.call(
            "load", len(ids_), num_drafts, ids_, positions_, slots_, len(rows_), rows_, sample_slots_, sample_positions_
        )
        device.run(device.kv, ids_, positions_, slots_)
        device.extend(ids_, positions_, slots_)
        device.follow(ids_, positions_, slots_, decoding, num_drafts, draft_max_len)
        sampled = ints(len(rows_))
        for r, row in enumerate(rows_):
            if sample_slots_[r] >= 0:
                assert sample_slots_[r] == slots_[row]
                assert sample_positions_[r] == positions_[row] + 1
                sampled[r] = device.sample(int(slots_[row]), int(positions_[row]))
        num_groups = batch + len(sampled_chunks)
        counts, drafted = ints(num_groups), ints(num_groups)
        outputs = (sampled, sample_slots_, sample_positions_, counts, drafted)
        device.call("accept", num_groups, batch, num_drafts, *outputs)
        device.keep(positions_, slots_)
        for group in range(num_groups):
            row = group * (1 + num_drafts) if group < batch else batch * num_drafts + group
            slot = int(decode_slots[group]) if group < batch else sampled_chunks[group - batch]
            if slot < 0:
                assert counts[group] == 0
                continue
            state = running[slot]
            state.output += sampled[row : row + counts[group]].tolist()
            counts_seen.add((int(counts[group]), int(drafted[group])))
            assert counts[group] <= drafted[group] + 1 <= num_drafts + 1
            assert drafted[group] == 0 or state.speculates
            beside |= num_drafts > 0 and not state.speculates and bool(drafted.any())
        decoding += sampled_chunks
        for slot in list(decoding):
            state = running[slot]
            length = len(state.prompt) + len(state.output)
            assert length <= state.max_len
            # One that is full may stay for a while, and gives nothing.
            if length == state.max_len and (not state.speculates or random.random() < 0.5):
                expected = plain(state.prompt, state.max_len, penalised=not state.speculates)
                assert state.prompt + state.output == expected
                decoding.remove(slot)
                del running[slot]
                finished += 1
    assert finished > 30
    assert {(count, drafted) for drafted in range(MOST + 1) for count in range(1, drafted + 2)} <= counts_seen
    assert (0, 0) in counts_seen
    assert beside, "nobody decoded plainly beside verified drafts"
    assert device.windows_seen in (set(), set(DEVICE_DRAFT_WINDOWS)), "a head has none"


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("draft_at(s, slot, count) == token", "true"),
        ("draft_at(s, slot, count) == token", "draft_at(s, slot, 0) == token"),
        ("position = last + index", "position = last + index + 1"),
        ("count < num_drafts && count < room", "count < num_drafts"),
        ("index < draft_room(s, slot) && own", "own"),
        ("next_ids[b] = token < 0 ? 0 : token", "next_ids[b] = token"),
        ("fresh(positions + t) < draft_max_len", "true"),
        ("at = count - behind - window + w", "at = count - behind - window + w - 1"),
        # Of those who may not be drafted for.
        ("fresh(s.max_len + slot) > 0 && !is_full(s, slot)", "!is_full(s, slot)"),
        ("sample_slots[r] = fresh(slots + t);", ""),
        ("fresh(sample_slots + row + verified + 1) >= 0", "true"),
    ],
)
def test_a_wrong_rule_is_noticed(right: str, wrong: str, tmp_path: Path) -> None:
    library = wrong_library(right, wrong, tmp_path)
    with pytest.raises((AssertionError, IndexError, ValueError)):
        test_texts_are_those_of_plain_decoding(library, 5)  # whose draft is shorter than the model


def wrong_library(right: str, wrong: str, tmp_path: Path) -> ctypes.CDLL:
    """Return the rows with a rule changed."""
    header = (ROOT / "compile/kernels/cuda/speculation_rows.cuh").read_text()
    assert header.count(right) == 1
    (tmp_path / "speculation_rows.cuh").write_text(header.replace(right, wrong))
    source = tmp_path / "speculation_rows.cpp"
    source.write_text(Path(__file__).with_name("speculation_rows.cpp").read_text())
    command = ["c++", "-std=c++20", "-O1", "-shared", "-fPIC", str(source), "-o", str(tmp_path / "rows.so")]
    subprocess.run(command, check=True, timeout=60)
    return ctypes.CDLL(str(tmp_path / "rows.so"))

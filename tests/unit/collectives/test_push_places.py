"""The buffers of collectives over peer memory, by the kernels' own index functions: calls of two models in turns.

Ranks run ahead of each other as far as the protocol lets them.
"""

from __future__ import annotations

import ctypes
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from scripts import ROOT

BUFFERS = 3


class Memory(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("one_shot", "two_shot", "reduced", "scales")]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    library = tmp_path_factory.mktemp("places") / "places.so"
    source = Path(__file__).with_name("push_places.cpp")
    command = ["c++", "-std=c++20", "-O1", "-shared", "-fPIC", f"-I{ROOT / 'collectives/kernels'}"]
    subprocess.run([*command, str(source), "-o", str(library)], check=True, timeout=60)
    return ctypes.CDLL(str(library))


@dataclass
class Call:
    is_one_shot: bool
    is_pushed: bool
    """By the GEMM before."""
    rows: int
    vectors: int
    epoch: int
    """Among the calls of its kind."""
    before: Call | None
    """Of its kind."""


@dataclass
class Group:
    library: Any
    num_ranks: int
    row_vectors: int
    arrays: list[list[np.ndarray[Any, np.dtype[np.int32]]]] = field(init=False)

    def __post_init__(self) -> None:
        sizes = (ctypes.c_int64 * 4)()
        self.library.sizes(self.num_ranks, self.row_vectors, sizes)
        self.arrays = [[np.zeros(size, np.int32) for size in sizes] for _ in range(self.num_ranks)]
        self.memory = (Memory * self.num_ranks)(*(Memory(*(one.ctypes.data for one in each)) for each in self.arrays))

    def tags(self, call: Call, number: int) -> Any:
        return (ctypes.c_int * self.num_ranks)(*(1 + number * self.num_ranks + rank for rank in range(self.num_ranks)))

    def call(self, name: str, *arguments: Any) -> int:
        return int(getattr(self.library, name)(self.num_ranks, self.row_vectors, *arguments) or 0)

    def begin(self, rank: int, call: Call, number: int) -> None:
        """Send a rank's part of a call."""
        buffer, tag = call.epoch % BUFFERS, self.tags(call, number)[rank]
        sizes = (call.rows, call.vectors)
        name = "push" if call.is_pushed else "send"
        taken = self.call(name, self.memory, int(call.is_one_shot), rank, buffer, *sizes, tag)
        assert taken == 0, f"rank {rank} wrote {taken} places of call {number} that were not free"

    def free(self, rank: int, call: Call) -> None:
        """Free what the call before used: by a kernel after the one that sends, if that is a GEMM."""
        sizes = (call.rows, call.vectors)
        if call.before is not None:
            used = (call.before.rows, call.before.vectors)
            where = (ctypes.byref(self.memory[rank]), int(call.is_one_shot), rank, (call.epoch - 1) % BUFFERS)
            self.call("free_before", *where, *used, *sizes)

    def reduce(self, rank: int, call: Call, number: int) -> None:
        """The second half of a two-shot call."""
        self.check(rank, call, number, reduced=False)
        buffer, tag = call.epoch % BUFFERS, self.tags(call, number)[rank]
        taken = self.call("send_reduced", self.memory, rank, buffer, call.rows, call.vectors, tag)
        assert taken == 0, f"rank {rank} wrote {taken} reduced places of call {number} that were not free"

    def check(self, rank: int, call: Call, number: int, *, reduced: bool) -> None:
        kind = (int(call.is_one_shot), int(call.is_pushed))
        where = (ctypes.byref(self.memory[rank]), *kind, rank, call.epoch % BUFFERS)
        wrong = self.call("missing", *where, call.rows, call.vectors, int(reduced), self.tags(call, number))
        assert wrong == 0, f"{wrong} places of call {number} on rank {rank} are not those that were sent"

    def end(self, rank: int, call: Call, number: int) -> None:
        self.check(rank, call, number, reduced=not call.is_one_shot)
        if call.epoch:
            where = (ctypes.byref(self.memory[rank]), int(call.is_one_shot), (call.epoch - 1) % BUFFERS)
            left = self.call("taken", *where)
            assert left == 0, f"rank {rank} has left {left} places of the call before {number}"


def make_calls(rng: Random, count: int, sizes: list[int]) -> list[Call]:
    calls: list[Call] = []
    last: dict[bool, Call] = {}
    while len(calls) < count:
        vectors, rows = rng.choice(sizes), rng.randint(1, 20)
        for _ in range(rng.randint(1, 5)):  # of one model's step
            is_one_shot = rows * vectors < 2000
            before = last.get(is_one_shot)
            call = Call(
                is_one_shot, rng.random() < 0.6, rows, vectors, 0 if before is None else before.epoch + 1, before
            )
            last[is_one_shot] = call
            calls.append(call)
    return calls


class Ranks:
    """How far each rank is: calls that it has begun, freed the one before, reduced its rows of, and ended."""

    def __init__(self, group: Group, calls: list[Call]) -> None:
        self._group, self._calls = group, calls
        self._begun, self._freed, self._reduced, self.ended = ([0] * group.num_ranks for _ in range(4))

    def advance(self, rank: int) -> bool:
        """Do what a rank does next, unless it waits for another."""
        number = self.ended[rank]
        if number == len(self._calls):
            return False
        call = self._calls[number]
        if self._begun[rank] == number:
            self._group.begin(rank, call, number)
            self._begun[rank] += 1
        elif self._freed[rank] == number:
            self._group.free(rank, call)
            self._freed[rank] += 1
        elif min(self._begun) <= number:
            return False
        elif self._reduced[rank] == number:
            if not call.is_one_shot:
                self._group.reduce(rank, call, number)
            self._reduced[rank] += 1
        elif not call.is_one_shot and min(self._reduced) <= number:
            return False
        else:
            self._group.end(rank, call, number)
            self.ended[rank] += 1
        return True


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
@pytest.mark.parametrize("seed", range(4))
def test_models_of_several_sizes_share_the_buffers(places: ctypes.CDLL, num_ranks: int, seed: int) -> None:
    rng = Random(seed)
    calls = make_calls(rng, 60, [600, 264, 9, 1])  # a call of 9 has 256 threads in a row
    assert len({(call.is_one_shot, call.is_pushed) for call in calls}) == 4
    ranks = Ranks(Group(places, num_ranks, 600), calls)
    while min(ranks.ended) < len(calls):
        rank = rng.randrange(num_ranks)
        for _ in range(rng.choice([1, 100])):  # a step, or as far as it gets
            if not ranks.advance(rank):
                break


def test_a_stage_has_each_tokens_channels_in_one_piece_and_lanes_in_banks_of_their_own(places: ctypes.CDLL) -> None:
    found = np.array([[places.stage_place(token, channel) for channel in range(64)] for token in range(64)])
    assert (np.diff(found, axis=1) == 2).all()
    assert (found[:, ::8] % 16 == 0).all(), "vectors are read whole"
    assert (np.diff(found[:, 0]) >= 128).all(), "tokens overlap"
    for channel in range(0, 64, 8):  # what a warp writes at once: words of pairs of channels of eight tokens
        for token in range(0, 64, 8):
            words = found[token : token + 8, channel : channel + 8 : 2] // 4
            assert len(set((words % 32).ravel())) == 32


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
@pytest.mark.parametrize("is_one_shot", [True, False])
def test_a_gemm_pushes_every_row_once(places: ctypes.CDLL, num_ranks: int, is_one_shot: bool) -> None:
    for rows, vectors in ((1, 2), (7, 25), (8, 9), (17, 16), (63, 4), (64, 1), (100, 7)):
        group = Group(places, num_ranks, 30)
        for rank in range(num_ranks):
            sent = Call(is_one_shot, True, rows, vectors, 1, None)
            group.begin(rank, sent, 0)
        for rank in range(num_ranks):
            group.check(rank, sent, 0, reduced=False)
            held = num_ranks * vectors * (rows if is_one_shot else len(range(rank, rows, num_ranks)))
            where = (ctypes.byref(group.memory[rank]), int(is_one_shot))
            assert [group.call("taken", *where, buffer) for buffer in range(BUFFERS)] == [0, held, 0]

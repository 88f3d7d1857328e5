"""Which replica takes a request. Pure: knows loads and prompts, no network and no clock.

prefix        The request costs a replica the blocks of its prompt that the replica has not seen, and waits there for
              the blocks that others wait for and for the requests in flight, each of which counts as `REQUEST_BLOCKS`.
              The replica with the least sum takes it: a conversation stays where its beginning is cached, until that
              replica is busier than another by more than the cached part is worth. Whatever is cached, nobody gets a
              request who has over `MAX_IMBALANCE` more in flight than the least busy one.
least-loaded  The replica with the fewest requests in flight.
round-robin   One after the other.

What a replica has cached is estimated: the blocks of the prompts that went there, the latest `capacity` of them. A
replica that starts again has nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

REQUEST_BLOCKS = 4
"""Of about 30 tokens: a step that decodes one sequence more is late by little, but so is each of its tokens. Two blocks
gave the same hit rate (benchmarks/README.md)."""
MAX_IMBALANCE = 16
"""Requests in flight."""


class Policy(Enum):
    """See the module."""

    PREFIX = "prefix"
    LEAST_LOADED = "least-loaded"
    ROUND_ROBIN = "round-robin"


class PrefixIndex:
    """The blocks that one replica has seen, the latest first to stay.

    Parameters
    ----------
    capacity
        Blocks that are remembered.
    """

    __slots__ = ("_blocks", "_capacity")

    def __init__(self, capacity: int) -> None:
        self._blocks: OrderedDict[int, None] = OrderedDict()
        self._capacity = capacity

    def __len__(self) -> int:
        return len(self._blocks)

    def num_matched(self, blocks: Sequence[int]) -> int:
        """Return how many leading blocks are known."""
        known = self._blocks
        for number, block in enumerate(blocks):
            if block not in known:
                return number
        return len(blocks)

    def add(self, blocks: Sequence[int]) -> None:
        """Remember a prompt. Its beginning stays longest: a block is of no use without those before it."""
        known = self._blocks
        for block in reversed(blocks[: self._capacity]):
            known[block] = None
            known.move_to_end(block)
        while len(known) > self._capacity:
            known.popitem(last=False)

    def clear(self) -> None:
        """Forget everything: the replica has started again."""
        self._blocks.clear()


@dataclass(slots=True, eq=False)
class Load:
    """What the router has given to one replica."""

    prefix: PrefixIndex
    num_in_flight: int = 0
    """Requests without an end."""
    num_pending_blocks: int = 0
    """Blocks of requests that have not answered yet, which the replica had not seen."""
    last_turn: int = field(default=0)
    """Number of the latest choice that fell on it."""


class Chooser:
    """Chooses by one policy."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._turn = 0

    def choose(self, loads: Sequence[Load], blocks: Sequence[int]) -> tuple[int, int]:
        """Choose among replicas that may take a request, at least one.

        Returns
        -------
        tuple[int, int]
            The number of the one that takes it, and how many leading blocks it has seen.
        """
        self._turn += 1
        if self._policy is Policy.ROUND_ROBIN:
            best = min(range(len(loads)), key=lambda number: loads[number].last_turn)
        elif self._policy is Policy.LEAST_LOADED:
            best = min(range(len(loads)), key=lambda number: (loads[number].num_in_flight, loads[number].last_turn))
        else:
            best = self._by_prefix(loads, blocks)
        loads[best].last_turn = self._turn
        return best, loads[best].prefix.num_matched(blocks)

    def _by_prefix(self, loads: Sequence[Load], blocks: Sequence[int]) -> int:
        limit = min(load.num_in_flight for load in loads) + MAX_IMBALANCE

        def cost(number: int) -> tuple[int, int, int]:
            load = loads[number]
            num_new = len(blocks) - load.prefix.num_matched(blocks)
            waits = load.num_pending_blocks + REQUEST_BLOCKS * load.num_in_flight
            return num_new + waits, load.num_in_flight, load.last_turn

        return min((number for number, load in enumerate(loads) if load.num_in_flight <= limit), key=cost)

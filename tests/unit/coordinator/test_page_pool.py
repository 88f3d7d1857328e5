"""The page pool, by example and against a naive model."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from builders import make_config
from tpserve.coordinator.page_pool import PagePool


def make_pool(num_pages: int = 4) -> tuple[PagePool, list[int]]:
    evicted: list[int] = []
    return PagePool(num_pages, evicted.append), evicted


def test_allocates_each_page_once_and_then_none() -> None:
    pool, _ = make_pool(4)
    assert sorted(pool.allocate(3) or []) == [0, 1, 2]
    assert pool.allocate(2) is None
    assert pool.num_available == 1
    assert pool.allocate(1) == [3]
    assert pool.num_held == 4


def test_a_shared_page_is_free_after_its_last_holder() -> None:
    pool, _ = make_pool(1)
    page_ids = pool.allocate(1)
    assert page_ids == [0]
    pool.share([0])
    pool.release([0])
    assert pool.num_available == 0
    pool.release([0])
    assert pool.num_available == 1


def test_kept_pages_are_reused_last_and_the_longest_unused_first() -> None:
    pool, evicted = make_pool(4)
    pool.allocate(4)
    for page in (1, 2):
        pool.keep(page)
    pool.release([2])
    pool.release([1, 0, 3])
    assert sorted(pool.allocate(2) or []) == [0, 3]
    assert evicted == []
    assert pool.allocate(2) == [2, 1]
    assert evicted == [2, 1]


def test_a_kept_page_can_be_revived() -> None:
    pool, evicted = make_pool(2)
    pool.allocate(2)
    pool.keep(0)
    pool.release([0, 1])
    assert pool.is_evictable(0)
    pool.share([0])
    assert pool.allocate(1) == [1]
    assert pool.allocate(1) is None
    assert evicted == []


def test_releasing_a_page_that_nobody_holds_is_refused() -> None:
    pool, _ = make_pool()
    with pytest.raises(AssertionError, match="page 2 is released, but nobody holds it"):
        pool.release([2])


@pytest.mark.parametrize(
    ("holders", "kept", "message"),
    [
        ([[0]], [], "page 1 has 1 references, but is in 0 page tables"),
        ([[0, 1], [1]], [], "page 1 has 1 references, but is in 2 page tables"),
        ([[0, 1]], [0], "cache knows"),
    ],
)
def test_integrity_check_names_the_fault(holders: list[list[int]], kept: list[int], message: str) -> None:
    pool, _ = make_pool(make_config().page_size)
    pool.allocate(2)
    with pytest.raises(AssertionError, match=message):
        pool.check_integrity(holders, kept)


class PoolMachine(RuleBasedStateMachine):
    """Any order of calls, beside a model that only counts."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: set[int] = set()
        self.pool = PagePool(6, self.kept.remove)
        self.tables: list[list[int]] = []

    @rule(count=st.integers(0, 4))
    def allocate(self, count: int) -> None:
        held = set().union(*self.tables)
        page_ids = self.pool.allocate(count)
        if count > 6 - len(held):
            assert page_ids is None
        else:
            assert page_ids is not None
            assert len(set(page_ids)) == count
            assert not held & set(page_ids)
            self.tables.append(page_ids)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        table = data.draw(st.sampled_from(self.tables))
        self.pool.share(table)
        self.tables.append(list(table))

    @precondition(lambda self: self.kept)
    @rule(data=st.data())
    def revive(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from(sorted(self.kept)))
        self.pool.share([page])
        self.tables.append([page])

    @precondition(lambda self: any(self.tables))
    @rule(data=st.data())
    def keep(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from([page for table in self.tables for page in table]))
        self.pool.keep(page)
        self.kept.add(page)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        table = data.draw(st.sampled_from(self.tables))
        self.tables.remove(table)
        self.pool.release(table)

    @invariant()
    def agrees(self) -> None:
        self.pool.check_integrity(self.tables, self.kept)
        held = Counter(page for table in self.tables for page in table)
        assert self.pool.num_held == len(held)
        assert self.pool.num_evictable == len(self.kept - set(held))


TestPoolMachine = PoolMachine.TestCase

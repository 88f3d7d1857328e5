"""KV pages: which are free, which are held and by how many, and which are kept only for their content.

Owns reference counts. Knows nothing of tokens or sequences; whether a page's content is worth keeping is told to it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable


class PagePool:
    """Pages 0 ... num_pages - 1, each in one of three states.

    free        nobody holds it and its content is worthless
    held        one or more page tables hold it
    evictable   nobody holds it, but its content is kept until the page is needed: least recently held goes first
    """

    __slots__ = ("_evictable", "_free", "_kept", "_ref_counts", "num_pages", "on_evict")

    def __init__(self, num_pages: int, on_evict: Callable[[int], None]) -> None:
        """Make a pool of free pages.

        Parameters
        ----------
        num_pages
            Size of the pool.
        on_evict
            Called with a page whose kept content is about to be overwritten.
        """
        self.num_pages = num_pages
        self.on_evict = on_evict
        self._ref_counts = [0] * num_pages
        self._kept = [False] * num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._evictable: dict[int, None] = {}

    @property
    def num_available(self) -> int:
        """Pages that `allocate` can hand out now."""
        return len(self._free) + len(self._evictable)

    @property
    def num_evictable(self) -> int:
        """Pages that nobody holds and whose content is kept."""
        return len(self._evictable)

    @property
    def num_held(self) -> int:
        """Pages in at least one page table."""
        return self.num_pages - len(self._free) - len(self._evictable)

    def is_evictable(self, page_id: int) -> bool:
        """Whether nobody holds the page and its content is kept."""
        return page_id in self._evictable

    def allocate(self, count: int) -> list[int] | None:
        """Hand out pages, each held once; None, and nothing changed, if there are not that many."""
        if count > self.num_available:
            return None
        page_ids = []
        for _ in range(count):
            if self._free:
                page_id = self._free.pop()
            else:
                page_id = next(iter(self._evictable))
                del self._evictable[page_id]
                self._kept[page_id] = False
                self.on_evict(page_id)
            self._ref_counts[page_id] = 1
            page_ids.append(page_id)
        return page_ids

    def share(self, page_ids: Iterable[int]) -> None:
        """Hold pages once more; they are held already or evictable."""
        for page_id in page_ids:
            if self._ref_counts[page_id] == 0:
                del self._evictable[page_id]
            self._ref_counts[page_id] += 1

    def release(self, page_ids: Iterable[int]) -> None:
        """Hold pages once less. Those held by nobody are evicted in the order given here, if their content is kept."""
        for page_id in page_ids:
            count = self._ref_counts[page_id] - 1
            assert count >= 0, f"page {page_id} is released, but nobody holds it"
            self._ref_counts[page_id] = count
            if count == 0:
                if self._kept[page_id]:
                    self._evictable[page_id] = None
                else:
                    self._free.append(page_id)

    def keep(self, page_id: int) -> None:
        """Keep the content of a held page after its last holder has gone."""
        assert self._ref_counts[page_id] > 0, f"page {page_id} is to be kept, but nobody holds it"
        self._kept[page_id] = True

    def check_integrity(self, holders: Iterable[Iterable[int]], kept: Iterable[int]) -> None:
        """Compare the pool with what its users believe.

        Parameters
        ----------
        holders
            Every page table in use.
        kept
            Pages whose content somebody can still find.

        Raises
        ------
        AssertionError
            A page is leaked, held twice by mistake, or in two states.
        """
        held = Counter(page_id for page_ids in holders for page_id in page_ids)
        for page_id in range(self.num_pages):
            assert self._ref_counts[page_id] == held[page_id], (
                f"page {page_id} has {self._ref_counts[page_id]} references, but is in {held[page_id]} page tables"
            )
        assert all(0 <= page_id < self.num_pages for page_id in held), f"a page table leaves the pool: {sorted(held)}"
        free = set(self._free)
        assert len(free) == len(self._free), f"pages stand in the free list twice: {sorted(self._free)}"
        parts = (free, set(self._evictable), set(held))
        assert sum(map(len, parts)) == len(set.union(*parts)) == self.num_pages, (
            f"free {sorted(parts[0])}, evictable {sorted(parts[1])}, held {sorted(parts[2])}: "
            f"not a partition of {self.num_pages} pages"
        )
        flagged = {page_id for page_id in range(self.num_pages) if self._kept[page_id]}
        assert flagged == set(kept), f"pool keeps {sorted(flagged)}, cache knows {sorted(kept)}"
        assert set(self._evictable) <= flagged, f"evictable without content: {sorted(set(self._evictable) - flagged)}"

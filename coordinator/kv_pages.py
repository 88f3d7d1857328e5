"""The pages of sequences: found in the prefix cache, allocated, grown, committed, freed.

Joins pool and cache. Knows nothing of slots, steps or budgets.
"""

from __future__ import annotations

from tpserve.coordinator.page_pool import PagePool
from tpserve.coordinator.prefix_cache import PrefixCache
from tpserve.coordinator.request import Sequence


class KVPages:
    """All KV pages of a replica (each rank has the same ones)."""

    __slots__ = ("_cache", "_lookahead", "_page_size", "_pool")

    def __init__(self, num_pages: int, page_size: int, enable_prefix_cache: bool, lookahead: int = 0) -> None:
        self._page_size = page_size
        self._lookahead = lookahead
        self._cache = PrefixCache(page_size, lookahead) if enable_prefix_cache else None
        self._pool = PagePool(num_pages, self._forget)

    @property
    def num_held(self) -> int:
        """Pages in at least one page table."""
        return self._pool.num_held

    @property
    def num_evictable(self) -> int:
        """Pages kept only for their content."""
        return self._pool.num_evictable

    def num_pages_for(self, num_tokens: int) -> int:
        """Return how many pages hold the KV of that many tokens."""
        return -(-num_tokens // self._page_size)

    def num_shareable_pages(self, num_tokens: int) -> int:
        """Return how many leading pages of that many tokens may be shared.

        Only those strictly before the page of the last token: that token is always computed, because its logits are
        needed, and computing it writes its KV, which must not go to a page that others read.
        """
        return (num_tokens - 1) // self._page_size

    def has_shared(self, num_computed: int, num_tokens: int) -> bool:
        """Whether all pages that may be shared of `num_tokens` are, once `num_computed` of them are."""
        num_pages = self.num_shareable_pages(num_tokens)
        return num_pages == 0 or num_computed >= num_pages * self._page_size + self._lookahead

    def match(self, sequence: Sequence) -> list[int]:
        """Return pages that already hold the start of the sequence, and may be shared."""
        if self._cache is None:
            return self._match_sibling(sequence)
        count = self.num_shareable_pages(len(sequence.tokens))
        self._cache.extend_keys(sequence.page_keys, sequence.tokens, count)
        return self._cache.match(sequence.page_keys[:count])

    def _match_sibling(self, sequence: Sequence) -> list[int]:
        """Without a cache, the choices of one request share the prompt's pages while one of them runs.

        Whoever runs has computed them: the scheduler asks only when nobody is the group's `prompt_leader`.
        """
        count = self.num_shareable_pages(sequence.num_prompt_tokens)
        return next((other.page_ids[:count] for other in sequence.group.sequences if other.page_ids), [])

    def fits(self, sequence: Sequence, matched: list[int], headroom: int) -> bool:
        """Whether the sequence's tokens find room beside the matched pages, with `headroom` pages left over."""
        num_fresh = self.num_pages_for(len(sequence.tokens)) - len(matched)
        num_revived = sum(map(self._pool.is_evictable, matched))
        return num_fresh + headroom <= self._pool.num_available - num_revived

    def take(self, sequence: Sequence, matched: list[int]) -> None:
        """Fill the page table of a sequence that `fits`: the matched pages, then fresh ones."""
        self._pool.share(matched)
        fresh = self._pool.allocate(self.num_pages_for(len(sequence.tokens)) - len(matched))
        assert fresh is not None, "take() without fits()"
        sequence.page_ids = [*matched, *fresh]
        sequence.num_committed_pages = len(matched) if self._cache is not None else 0

    def grow(self, sequence: Sequence) -> bool:
        """Append one page to the page table; return False if no page is left."""
        page_ids = self._pool.allocate(1)
        if page_ids is None:
            return False
        sequence.page_ids.append(page_ids[0])
        return True

    def commit(self, sequence: Sequence, num_computed: int) -> None:
        """Make the sequence's full pages known to the cache.

        Parameters
        ----------
        sequence
            Holder of the pages.
        num_computed
            Tokens whose KV is written by the plans made so far. Later plans run after those, so they may read it. With
            a lookahead, a page waits for that of the tokens behind it.
            A page whose tokens are not all confirmed yet waits for a later call; the last page of a sequence that
            runs to its length may never get one, since its pages are freed ahead of its last results.
        """
        count = (min(num_computed, len(sequence.tokens)) - self._lookahead) // self._page_size
        if self._cache is None or count <= sequence.num_committed_pages:
            return
        self._cache.extend_keys(sequence.page_keys, sequence.tokens, count)
        for index in range(sequence.num_committed_pages, count):
            if self._cache.put(sequence.page_keys[index], sequence.page_ids[index]):
                self._pool.keep(sequence.page_ids[index])
        sequence.num_committed_pages = count

    def free(self, sequence: Sequence) -> None:
        """Give up the page table. The tail goes first, because a prefix is of use without its tail, not inversely."""
        self._pool.release(reversed(sequence.page_ids))
        sequence.page_ids = []

    def _forget(self, page_id: int) -> None:
        assert self._cache is not None
        self._cache.forget(page_id)

    def check_integrity(self, sequences: list[Sequence]) -> None:
        """Raise AssertionError unless exactly these sequences hold exactly the pages in use."""
        if self._cache is not None:
            self._cache.check_integrity()
        self._pool.check_integrity(
            [sequence.page_ids for sequence in sequences],
            self._cache.page_ids if self._cache is not None else (),
        )

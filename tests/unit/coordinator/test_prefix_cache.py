"""The prefix cache, alone and under sequences that share pages."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tpserve.coordinator.kv_pages import KVPages
from tpserve.coordinator.prefix_cache import PrefixCache
from tpserve.coordinator.request import Request, Sequence, make_group
from tpserve.proto.messages import SamplingParams


def keys_of(cache: PrefixCache, tokens: list[int], num_pages: int) -> list[bytes]:
    keys: list[bytes] = []
    cache.extend_keys(keys, tokens, num_pages)
    return keys


def make_sequence(tokens: list[int], request_id: int = 0) -> Sequence:
    return make_group(Request(request_id, tuple(tokens), SamplingParams(), 4), request_id, 64, 1, False).sequences[0]


def test_finds_the_longest_known_prefix() -> None:
    cache = PrefixCache(2)
    for page, key in enumerate(keys_of(cache, [1, 2, 3, 4], 2)):
        assert cache.put(key, page)
    assert cache.match(keys_of(cache, [1, 2, 3, 4, 5, 6], 3)) == [0, 1]
    assert cache.match(keys_of(cache, [1, 2, 9, 4], 2)) == [0]
    assert cache.match(keys_of(cache, [3, 4], 1)) == []


def test_equal_pages_behind_unequal_prefixes_differ() -> None:
    cache = PrefixCache(2)
    assert keys_of(cache, [1, 2, 7, 7], 2)[1] != keys_of(cache, [2, 1, 7, 7], 2)[1]


def test_keys_do_not_depend_on_how_they_were_extended() -> None:
    cache = PrefixCache(2)
    keys = keys_of(cache, [1, 2, 3, 4, 5, 6], 1)
    cache.extend_keys(keys, [1, 2, 3, 4, 5, 6], 3)
    assert keys == keys_of(cache, [1, 2, 3, 4, 5, 6], 3)


def test_the_first_page_of_a_prefix_stays_and_a_forgotten_one_is_not_found() -> None:
    cache = PrefixCache(2)
    key = keys_of(cache, [1, 2], 1)[0]
    assert cache.put(key, 5)
    assert not cache.put(key, 6)
    assert cache.put(key, 5)
    assert cache.match([key]) == [5]
    cache.forget(5)
    assert cache.match([key]) == []
    assert len(cache) == 0


def test_the_page_of_the_last_token_is_never_shared() -> None:
    pages = KVPages(num_pages=8, page_size=4, enable_prefix_cache=True)
    first = make_sequence(list(range(8)))
    pages.take(first, [])
    pages.commit(first, 8)
    assert pages.match(make_sequence(list(range(8)))) == first.page_ids[:1]
    assert pages.match(make_sequence(list(range(9)))) == first.page_ids[:2]


def test_tokens_that_are_not_confirmed_do_not_enter_the_cache() -> None:
    pages = KVPages(num_pages=8, page_size=4, enable_prefix_cache=True)
    first = make_sequence([1, 2, 3])
    pages.take(first, [])
    first.tokens += [4, 5]
    pages.commit(first, 3)
    assert pages.match(make_sequence([1, 2, 3, 4, 5])) == []
    pages.commit(first, 4)
    assert pages.match(make_sequence([1, 2, 3, 4, 5])) == first.page_ids


def test_of_an_ended_sequence_the_tail_is_evicted_first() -> None:
    pages = KVPages(num_pages=3, page_size=2, enable_prefix_cache=True)
    first = make_sequence([1, 2, 3, 4, 5, 6])
    pages.take(first, [])
    pages.commit(first, 6)
    kept = first.page_ids
    pages.free(first)
    pages.take(make_sequence([9]), [])
    assert pages.match(make_sequence([1, 2, 3, 4, 5, 6, 7])) == kept[:2]


@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 1), min_size=1, max_size=9), st.booleans()),
        max_size=40,
    )
)
def test_hits_hold_the_right_tokens(moves: list[tuple[list[int], bool]]) -> None:
    """Sequences over two letters come and go; what a page holds is tracked beside the cache."""
    pages = KVPages(num_pages=10, page_size=2, enable_prefix_cache=True)
    written: dict[int, tuple[int, ...]] = {}  # page -> all tokens up to its end
    running: list[Sequence] = []
    for tokens, end_one in moves:
        if running and end_one:
            pages.free(running.pop(0))
        sequence = make_sequence(tokens)
        matched = pages.match(sequence)
        assert len(matched) <= (len(tokens) - 1) // 2
        for index, page in enumerate(matched):
            assert written[page] == tuple(tokens[: 2 * index + 2])
        if pages.fits(sequence, matched, headroom=0):
            pages.take(sequence, matched)
            for index in range(len(matched), len(sequence.page_ids)):
                assert all(sequence.page_ids[index] not in other.page_ids for other in running)
                written[sequence.page_ids[index]] = tuple(tokens[: 2 * index + 2])
            pages.commit(sequence, len(tokens))
            running.append(sequence)
        pages.check_integrity(running)
    for sequence in running:
        pages.free(sequence)
    pages.check_integrity([])
    assert pages.num_held == 0

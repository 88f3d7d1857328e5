"""Proposers that look at tokens alone, against searches written without a thought for speed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tpserve.proto.messages import PromptChunk, SamplingParams, SlotAdd, StepPlan
from tpserve.worker.batch import Batch
from tpserve.worker.proposers import ngram, suffix
from tpserve.worker.proposers.ngram import NgramProposer
from tpserve.worker.proposers.suffix import SuffixProposer

few_kinds = st.lists(st.integers(0, 2), max_size=30) | st.lists(st.integers(0, 5), max_size=60)


def followed(tokens: Sequence[int], count: int, min_ngram: int, max_ngram: int) -> list[int]:
    """The text as it goes on if what followed the last occurrence follows again."""
    for length in range(min(max_ngram, len(tokens) - 1), min_ngram - 1, -1):
        for start in range(len(tokens) - length - 1, -1, -1):
            if tokens[start : start + length] == tokens[len(tokens) - length :]:
                text = list(tokens)
                for place in range(start + length, start + length + count):
                    text.append(text[place])
                return text[len(tokens) :]
    return []


@given(few_kinds, st.integers(1, 8), st.integers(1, 4), st.integers(0, 4))
def test_prompt_lookup_proposes_what_followed_last(tokens: list[int], count: int, shortest: int, more: int) -> None:
    found = ngram.continuation(np.asarray(tokens, np.int32), count, shortest, shortest + more)
    assert found.tolist() == followed(tokens, count, shortest, shortest + more)


def most_often(text: Sequence[int], count: int) -> list[int]:
    """The walk down a suffix tree, by looking for every occurrence again at each token."""

    def next_tokens(run: Sequence[int], length: int) -> list[int]:
        """What follows `run`, where its first `length` tokens end before the text does; the last occurrence first."""
        starts = range(len(text) - length - 1, -1, -1)
        ends = (start + len(run) for start in starts if text[start : start + len(run)] == run)
        return [text[end] for end in ends if end < len(text)]

    length = 0
    while length < min(32, len(text) - 1) and next_tokens(text[len(text) - length - 1 :], length + 1):
        length += 1
    run = list(text[len(text) - length :]) if length else []
    out: list[int] = []
    likelihood = 1.0
    while length and len(out) < min(count, 2 * length):
        tokens = next_tokens([*run, *out], length)
        if not tokens:
            break
        counts = Counter(tokens)
        token = max(counts, key=lambda token: (counts[token], -tokens.index(token)))
        likelihood *= counts[token] / len(tokens)
        if token < 0 or likelihood < 0.1:
            break
        out.append(token)
    return out


@given(st.lists(few_kinds, min_size=1, max_size=4), st.integers(1, 8))
def test_suffixes_go_on_as_they_most_often_did(sequences: list[list[int]], count: int) -> None:
    text = [token for sequence in sequences for token in (-1, *sequence)]
    assert suffix.continuation(np.asarray(text, np.int32), count) == most_often(text, count)


def filled(*sequences: Sequence[int]) -> Batch:
    """A batch with a decoding slot for each sequence: its last token is the sampled one."""
    batch = Batch(max_num_seqs=4, max_num_tokens=256, max_pages_per_seq=8, page_size=16)
    plan = StepPlan(
        1,
        added_slots=tuple(SlotAdd(i, SamplingParams(), tuple(range(8)), max_len=100) for i in range(len(sequences))),
        chunks=tuple(PromptChunk(i, 0, tuple(tokens[:-1]), sample=True) for i, tokens in enumerate(sequences)),
    )
    batch.apply(plan)
    batch.commit(batch.prepare(plan), np.asarray([tokens[-1] for tokens in sequences], np.int32))
    return batch


def test_each_slot_is_continued_from_its_own_tokens_up_to_its_limit() -> None:
    batch = filled([1, 2, 3, 4, 1, 2], [5, 6, 7], [8, 9, 8, 9, 8], [1, 2, 9, 9, 1, 2])
    slots, limits = np.arange(4, dtype=np.int32), np.asarray([3, 3, 2, 0])
    proposed = NgramProposer(batch, 1, 3).propose(slots, limits, 3)
    assert proposed.tolist() == [[3, 4, 1], [-1, -1, -1], [9, 8, -1], [-1, -1, -1]]
    assert SuffixProposer(batch).propose(slots, limits, 3).tolist() == proposed.tolist()


def test_suffixes_are_found_in_sequences_that_have_left() -> None:
    batch = filled([1, 2, 3, 4, 5], [3, 4])
    proposer = SuffixProposer(batch)
    slots, limits = np.asarray([1], np.int32), np.asarray([4])
    assert proposer.propose(slots, limits, 4).tolist() == [[-1] * 4]
    first, second, silent = (
        SlotAdd(slot, SamplingParams(), (), max_len=max_len) for slot, max_len in ((0, 9), (1, 9), (0, 0))
    )
    proposer.add(silent)
    proposer.remove(0)  # not all of its tokens need be known
    assert proposer.propose(slots, limits, 4).tolist() == [[-1] * 4]
    proposer.add(first)
    proposer.remove(0)
    assert proposer.propose(slots, limits, 4).tolist() == [[5, -1, -1, -1]]  # and nothing past that one's end
    for _ in range(6000):
        proposer.add(second)
        proposer.remove(1)  # memory is bounded: the first one is forgotten
    assert len(proposer._earlier) == suffix.KEPT_TOKENS
    assert proposer.propose(slots, limits, 4).tolist() == [[-1] * 4]

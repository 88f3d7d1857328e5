"""A draft beside a target on several ranks, itself on one or more of these or its own: the text is as without it."""

from __future__ import annotations

import pytest

from draft_pairs import MOST, NUM_PAGES, NUM_SLOTS, Pairs
from rank_group import Artifacts, RankProcesses
from speculating import Driver, PlainDecoding, assert_same, varied_texts
from tpserve.proto.speculation import DraftPlacement


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory, artifacts: Artifacts) -> Pairs:
    return Pairs(tmp_path_factory.mktemp("pairs"), artifacts)


@pytest.mark.parametrize(
    ("placement", "tp_size", "draft_tp_size"),
    [("colocated", 2, 1), ("colocated", 2, 2), ("colocated", 4, 2), ("dedicated", 2, 1), ("dedicated", 1, 2)],
)
def test_text_is_that_of_plain_decoding(
    pairs: Pairs, rank_processes: RankProcesses, placement: DraftPlacement, tp_size: int, draft_tp_size: int
) -> None:
    config = pairs.config(0.1, tp_size=tp_size, draft_tp_size=draft_tp_size, placement=placement)
    texts = varied_texts(30, 10)
    where = (config.model_dir, config.artifact_dir, tp_size)
    with rank_processes.group(*where, num_pages=NUM_PAGES, max_num_seqs=NUM_SLOTS) as ranks:
        plain = Driver(ranks, num_slots=NUM_SLOTS, num_pages=NUM_PAGES, speculates=False)
        expected = PlainDecoding(plain).of(texts)
    with rank_processes.group(
        *where, num_pages=NUM_PAGES, max_num_seqs=NUM_SLOTS, speculation=config.speculation
    ) as ranks:
        driver = Driver(ranks, num_slots=NUM_SLOTS, num_pages=NUM_PAGES)
        driver.run(texts, lambda step: step % (MOST + 1))
    assert_same(texts, expected)
    accepted = sum(count - 1 for text in texts for count in text.counts if count)
    assert accepted > 20
    if placement == "dedicated":
        return  # its calls are told by its own ranks
    # The calls of both models are counted; a draft on one rank makes none.
    calls = {
        sum(use.num_calls for use in result.collectives)
        for result in driver.results
        if result.num_tokens and not result.draft_us
    }
    drafting = {
        sum(use.num_calls for use in result.collectives) - max(calls)
        for result in driver.results
        if any(count == MOST for count in result.drafted)
    }
    assert len(calls) == 1
    assert (min(drafting) > 0) == (draft_tp_size > 1)

"""What ranks write keeps its level and rank, a draft's own ranks too."""

from __future__ import annotations

import logging

import pytest

from tpserve.coordinator.log import log_rank_line


@pytest.mark.parametrize(
    ("line", "level", "message", "rank"),
    [
        ("WARNING rank 1: late", logging.WARNING, "late", 1),
        ("INFO rank draft 0: loaded 9 parameters", logging.INFO, "loaded 9 parameters", "draft 0"),
        ("something else", logging.INFO, "something else", None),
    ],
)
def test_a_line_of_a_rank_says_which(
    line: str, level: int, message: str, rank: object, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        log_rank_line(line, 77)
    (record,) = caplog.records
    assert (record.levelno, record.getMessage()) == (level, message)
    assert vars(record).get("rank") == rank
    assert vars(record)["rank_pid"] == 77

"""Cross-checks of the scheduler's lists, for `Scheduler.check_integrity`."""

from __future__ import annotations

from collections.abc import Iterable

from tpserve.coordinator.request import RequestGroup, Sequence, SequenceStatus
from tpserve.coordinator.sequence_list import SequenceList


def check_sequences(
    groups: Iterable[RequestGroup],
    waiting: SequenceList,
    prefilling: SequenceList,
    running: list[Sequence],
    num_decoding: int,
    num_queued: int,
) -> None:
    """Raise AssertionError unless every unfinished sequence is in exactly the lists that its status says."""
    groups = list(groups)
    by_status: dict[SequenceStatus, list[Sequence]] = {status: [] for status in SequenceStatus}
    for group in groups:
        for sequence in group.sequences:
            by_status[sequence.status].append(sequence)
        num_finished = sum(sequence.status is SequenceStatus.FINISHED for sequence in group.sequences)
        assert group.num_unfinished == len(group.sequences) - num_finished > 0, (
            f"request {group.request.request_id}: {group.num_unfinished} sequences counted as unfinished, "
            f"{num_finished} of {len(group.sequences)} are finished"
        )
        leader = group.prompt_leader
        assert leader is None or leader.status is SequenceStatus.PREFILLING, (
            f"request {group.request.request_id}: leader {leader.choice} is {leader.status.name}"
        )

    def expect(name: str, found: Iterable[Sequence], *statuses: SequenceStatus) -> None:
        expected = {(s.request_id, s.choice) for status in statuses for s in by_status[status]}
        actual = [(s.request_id, s.choice) for s in found]
        assert sorted(actual) == sorted(expected), f"{name} holds {actual}, statuses say {sorted(expected)}"

    expect("waiting", waiting, SequenceStatus.WAITING)
    expect("prefilling", prefilling, SequenceStatus.PREFILLING)
    expect("running", running, SequenceStatus.PREFILLING, SequenceStatus.DECODING)
    assert num_decoding == len(by_status[SequenceStatus.DECODING]), (
        f"{num_decoding} counted as decoding, {len(by_status[SequenceStatus.DECODING])} are"
    )
    num_unstarted = sum(not group.started for group in groups)
    assert num_queued == num_unstarted, f"{num_queued} requests counted as queued, {num_unstarted} have not started"
    for status in (SequenceStatus.WAITING, SequenceStatus.DRAINING):
        for sequence in by_status[status]:
            assert not sequence.page_ids, (
                f"{status.name} sequence {sequence.request_id}/{sequence.choice} holds pages {sequence.page_ids}"
            )
            assert sequence.slot is None, (
                f"{status.name} sequence {sequence.request_id}/{sequence.choice} holds slot {sequence.slot}"
            )

"""Who gets which tokens, and in which order."""

from __future__ import annotations

from collections.abc import Sequence

from tpserve.coordinator.active_requests import MAX_GROUPS_LOST, PROGRESS_TOKENS, ActiveRequests, OutputEvent
from tpserve.coordinator.metrics import Metrics
from tpserve.coordinator.request import TokenEvent
from tpserve.proto.messages import FinishReason


def test_first_and_last_tokens_stand_before_those_between() -> None:
    """A gateway writes one after the other, and for those somebody waits."""
    got: list[tuple[int, int]] = []

    def sink(outputs: Sequence[OutputEvent]) -> None:
        got.extend((output.client_id, output.event.choice) for output in outputs)

    active = ActiveRequests(Metrics("m"), on_empty=lambda: None)
    for key in range(5):
        active.add(key, 10 + key, sink, num_prompt_tokens=3, n=2 if key == 3 else 1, spans=None)
    active.publish([TokenEvent(key, 0, (7,)) for key in (0, 1, 3)], step_id=1)
    assert got == [(10, 0), (11, 0), (13, 0)]
    got.clear()
    last = TokenEvent(1, 0, (7,), finish=FinishReason.LENGTH)
    events = [TokenEvent(0, 0, (7,)), last, TokenEvent(2, 0, (7,)), TokenEvent(3, 0, (7,)), TokenEvent(3, 1, (7,))]
    active.publish(events, step_id=2)
    assert got == [(11, 0), (12, 0), (13, 1), (10, 0), (13, 0)]
    assert len(active) == 4


def test_who_gets_nowhere_on_group_after_group_is_ended() -> None:
    """And neither who gets on between two losses, nor who has never run."""
    got: list[OutputEvent] = []
    active = ActiveRequests(Metrics("m"), on_empty=lambda: None)
    stuck, slow, waiting = 1, 2, 3
    for key in (stuck, slow, waiting):
        active.add(key, 10 + key, got.extend, num_prompt_tokens=3, n=1, spans=None)
    active.note_started([(stuck, 0), (slow, 0)])
    for number in range(1, 2 * MAX_GROUPS_LOST - 2):
        # A prompt that is computed anew gives a token, each time.
        tokens = (7,) * (PROGRESS_TOKENS if number == MAX_GROUPS_LOST - 1 else PROGRESS_TOKENS - 1)
        active.publish(
            [TokenEvent(stuck, 0, tokens[: PROGRESS_TOKENS - 1]), TokenEvent(slow, 0, tokens)], step_id=number
        )
        got.clear()
        ended = active.count_lost_group("lost rank 1: gone")
        assert ended == ([stuck] if number == MAX_GROUPS_LOST else [])
        if ended:
            (event,) = got
            assert (event.client_id, event.event.finish) == (11, FinishReason.FAILED)
            assert event.detail == (
                "lost rank 1: gone; the request was on the last 5 groups that were lost and got nowhere"
            )
    assert len(active) == 2

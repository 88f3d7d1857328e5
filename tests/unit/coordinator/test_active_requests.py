"""Who gets which tokens, and in which order."""

from __future__ import annotations

from collections.abc import Sequence

from tpserve.coordinator.active_requests import ActiveRequests, OutputEvent
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

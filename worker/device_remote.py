"""Draft tokens that come from GPUs of the draft's own: the model's ranks wait for them, and say what became of them."""

from __future__ import annotations

from collections.abc import Iterator

from tpserve.worker.device_draft_link import DeviceDraftLink
from tpserve.worker.device_speculation import DraftLogits, ProposerBase, Round, State


class DeviceRemote(ProposerBase):
    """Drafts nothing here; see `DeviceProposer`. How far the draft is, its own ranks know (`device_draft_runner`)."""

    def __init__(self, link: DeviceDraftLink) -> None:
        self._link = link

    def catch_up(self, state: State, run: Round) -> None:
        """Queue the wait for what the draft's first rank sends; not in the round's graph, see `DeviceDraftLink`."""
        self._link.take_drafts(state)

    def steps(self, state: State, run: Round) -> Iterator[DraftLogits]:
        """See DeviceProposer."""
        return iter(())

    def settled(self, state: State) -> None:
        """Queue what the draft's ranks are told, if this is the model's first."""
        self._link.tell(state)

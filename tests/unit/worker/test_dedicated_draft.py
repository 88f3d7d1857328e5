"""A model's ranks and a draft's own: messages of steps, and who is named when one is late, gone or a stranger."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from draft_pairs import MOST, DedicatedPair, Pairs
from group_certificates import identities_of
from rank_group import Artifacts
from speculating import Driver, Text
from tpserve.collectives.rendezvous import listen
from tpserve.proto.messages import StepPlan
from tpserve.proto.rank import RankConfig, TlsIdentity
from tpserve.proto.speculation import Speculation
from tpserve.worker import draft_link
from tpserve.worker.arrays import Array
from tpserve.worker.draft_link import DraftEnd, TargetEnd
from tpserve.worker.errors import PlanError

SLOTS = np.asarray([3, 1, 4], np.int32)
TOKENS = np.asarray([[5, -1], [6, 7], [-1, -1]], np.int32)
LATE_S = 0.4


def make_config(tp_size: int, draft_tp_size: int, timeout_s: float = LATE_S) -> RankConfig:
    own = Speculation("draft", 2, draft_tp_size=draft_tp_size, draft_placement="dedicated")
    return RankConfig(0, tp_size, Path(), Path(), "dummy", 8, 4, 1, "secret", timeout_s, speculation=own)


class Ends:
    """Both ends of every rank, in this process."""

    def __init__(self, config: RankConfig, *, tls: bool = False) -> None:
        speculation = config.speculation
        assert speculation is not None
        doors = [listen("127.0.0.1") for _ in range(2)]
        draft, target = (f"127.0.0.1:{door.getsockname()[1]}" for door in doors)
        config = replace(config, draft_door=draft, target_door=target)
        num_ranks = config.tp_size + speculation.num_draft_ranks
        identities: list[TlsIdentity | None] = [*identities_of(num_ranks)] if tls else [None] * num_ranks
        with ThreadPoolExecutor(num_ranks) as pool:
            made: list[Any] = []
            for rank in range(num_ranks):
                kind: Any = TargetEnd if rank < config.tp_size else DraftEnd
                door = {config.tp_size: doors[0], 0: doors[1]}.get(rank)
                made.append(pool.submit(kind, replace(config, rank=rank, tls=identities[rank]), door))
            ends: list[Any] = [one.result(20) for one in made]
        for door in doors:
            door.close()
        self.targets: list[TargetEnd] = ends[: config.tp_size]
        self.drafts: list[DraftEnd] = ends[config.tp_size :]
        self._ends = ends

    def close(self) -> None:
        for end in self._ends:
            end.close()


def tell_steps(target: TargetEnd, slots: Array, count: int) -> None:
    """Tell of steps in which each slot got one token."""
    for step in range(count):
        target.tell(step, slots, slots[:, None], np.ones_like(slots))
        time.sleep(0.02)


def hear_steps(draft: DraftEnd, count: int) -> None:
    for step in range(count):
        draft.emitted(step)


@pytest.fixture(params=["plain", "tls"])
def ends(request: pytest.FixtureRequest) -> Iterator[Ends]:
    made = Ends(make_config(2, 2), tls=request.param == "tls")
    yield made
    made.close()


def test_every_rank_of_the_other_side_gets_the_same(ends: Ends) -> None:
    counts = np.asarray([1, 2, 0], np.int32)
    for step in (7, 8, 1 << 40):
        for draft in ends.drafts:
            draft.propose(step, SLOTS, TOKENS)
        for target in ends.targets:
            assert target.proposals(step, SLOTS, 2).tolist() == TOKENS.tolist()
            target.tell(step, SLOTS, TOKENS, counts)
        for draft in ends.drafts:
            slots, token_ids, seen = draft.emitted(step)
            assert (slots.tolist(), token_ids.tolist(), seen.tolist()) == ([3, 1, 4], [5, 6, 7], [1, 2, 0])
    none = np.empty(0, np.int32)
    ends.targets[0].tell(9, none, none[:, None], none)  # of a part of a prompt
    assert [len(part) for part in ends.drafts[1].emitted(9)] == [0, 0, 0]


def test_who_is_late_is_named_in_time(ends: Ends) -> None:
    begun = time.monotonic()
    with pytest.raises(TimeoutError, match=r"rank 1 waited 0\.5 s for rank draft 0 to send the proposals of step 5"):
        ends.targets[1].proposals(5, SLOTS, 2)
    assert LATE_S <= time.monotonic() - begun < LATE_S + 15
    # The model may compute for as long as the coordinator allows, which says who is late.
    with pytest.raises(TimeoutError, match=r"rank draft 1 waited 0\.8 s for rank 0 to send the emitted tokens of step"):
        ends.drafts[1].emitted(5)
    many = np.zeros(1 << 18, np.int32)
    with pytest.raises(TimeoutError, match=r"rank 0 waited 0\.4 s for rank draft 0 to take the emitted tokens of step"):
        tell_steps(ends.targets[0], many, count=100)  # that it never reads


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
def test_who_has_gone_is_named_at_once(tls: bool) -> None:
    ends, begun = Ends(make_config(2, 2, 60.0), tls=tls), time.monotonic()
    ends.drafts[0].close()
    with pytest.raises(ConnectionError, match=r"rank 1 in step 5: rank draft 0 has closed its connection or died"):
        ends.targets[1].proposals(5, SLOTS, 2)
    with pytest.raises(ConnectionError, match=r"rank 0 in step \d: rank draft 0 has closed its connection or died"):
        tell_steps(ends.targets[0], SLOTS, count=9)  # the first may be taken before it is known
    ends.targets[0].close()
    with pytest.raises(ConnectionError, match=r"rank draft 1 in step \d: rank 0 has closed its connection or died"):
        hear_steps(ends.drafts[1], count=9)
    assert time.monotonic() - begun < 30
    ends.close()


def test_ranks_that_are_in_different_steps_say_so(ends: Ends) -> None:
    ends.drafts[0].propose(6, SLOTS, TOKENS)
    with pytest.raises(PlanError, match=r"rank 0 waits for proposals of step 5, rank draft 0 sent 9 .* of step 6"):
        ends.targets[0].proposals(5, SLOTS, 2)
    for slots, count in ((SLOTS[::-1], 2), (SLOTS, 1)):
        target = Ends(make_config(1, 1))
        target.drafts[0].propose(7, slots, TOKENS)
        with pytest.raises(PlanError, match=r"step 7: the draft does not propose for slots \[3, 1, 4\]"):
            target.targets[0].proposals(7, SLOTS, count)
        target.close()


def test_a_rank_that_does_not_come_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draft_link, "attach_timeout_s", lambda timeout_s: timeout_s)
    config = replace(make_config(2, 1), rank=2)
    with pytest.raises(TimeoutError, match=r"rank draft 0 waited 0\.4 s for rank 0, 1 to come"):
        DraftEnd(config, listen("127.0.0.1"))
    with listen("127.0.0.1") as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(TimeoutError, match=rf"rank 0 waited 0\.4 s for rank draft 0 at {address} to answer"):
            TargetEnd(replace(config, rank=0, draft_door=address))


def test_a_stranger_is_turned_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draft_link, "attach_timeout_s", lambda timeout_s: timeout_s)
    door = listen("127.0.0.1")
    config = replace(make_config(1, 1, 1.0), draft_door=f"127.0.0.1:{door.getsockname()[1]}")
    with ThreadPoolExecutor(1) as pool:
        draft = pool.submit(DraftEnd, replace(config, rank=1), door)
        TargetEnd(replace(config, group_name="guess")).close()
        with pytest.raises(TimeoutError, match="rank draft 0 waited 1 s for rank 0 to come"):
            draft.result(20)


def test_a_message_that_makes_no_sense_is_not_read_on() -> None:
    ours, theirs = _connected()
    peer = draft_link._Peer(ours, "0", "draft 0")
    theirs.sendall(struct.pack("!QIII", 5, 0, 1, 1 << 31))
    with pytest.raises(PlanError, match="rank draft 0 sent 2147483648 integers"):
        peer.receive(5, "proposals", 1.0)
    theirs.close()
    peer.close()


def _connected() -> tuple[socket.socket, socket.socket]:
    with listen("127.0.0.1") as door:
        theirs = socket.create_connection(door.getsockname())
        return door.accept()[0], theirs


# ---- the runners


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory, artifacts: Artifacts) -> Pairs:
    return Pairs(tmp_path_factory.mktemp("pairs"), artifacts)


def dedicated(pairs: Pairs, timeout_s: float) -> RankConfig:
    return replace(pairs.config(0.0, placement="dedicated"), collective_timeout_s=timeout_s)


def test_steps_in_which_nobody_drafts_send_no_proposals(pairs: Pairs) -> None:
    """Plain steps, slots that do not speculate, parts of prompts and steps without tokens; then drafts are right."""
    pair = DedicatedPair(dedicated(pairs, 10.0))
    sent: list[int] = []
    propose = pair.draft._link.propose
    pair.draft._link.propose = lambda step, *rest: (sent.append(step), propose(step, *rest))[1]  # type: ignore
    driver = Driver(pair, num_slots=6)
    quiet = Text(range(5, 50), max_tokens=30, speculates=False, chunk=16)
    driver.run([quiet], MOST)
    assert not sent
    eager = Text(range(9, 20), max_tokens=30)
    driver.run([eager], lambda step: MOST * (step % 2))
    pair.close()
    drafted = [result.step_id for result in driver.results if any(result.drafted)]
    assert drafted == sent[-len(drafted) :]
    assert all(count == num + 1 for count, num in zip(eager.counts, eager.drafted, strict=True))
    assert sum(eager.drafted) > 15


def test_a_draft_that_stops_is_named_by_the_model(pairs: Pairs) -> None:
    pair = DedicatedPair(dedicated(pairs, 1.0))
    driver = Driver(pair, num_slots=6)
    driver.step([Text(range(9, 20), max_tokens=30)], MOST)
    released = threading.Event()
    pair.draft.execute = lambda plan: released.wait(20)  # type: ignore[method-assign, assignment, return-value]
    begun = time.monotonic()
    with pytest.raises(TimeoutError, match=r"rank 0 waited 1\.25 s for rank draft 0 to send the proposals of step 2"):
        driver.step([], MOST)
    assert time.monotonic() - begun < 15
    released.set()
    pair.close()


def test_a_draft_that_has_gone_is_named_by_the_model_and_the_other_way_round(pairs: Pairs) -> None:
    pair = DedicatedPair(dedicated(pairs, 10.0))
    pair.draft.close()
    driver = Driver(pair.target, num_slots=6)
    with pytest.raises(ConnectionError, match=r"rank 0 in step \d: rank draft 0 has closed its connection"):
        driver.run([Text(range(9, 20), max_tokens=30)], MOST)
    pair.close()
    pair = DedicatedPair(dedicated(pairs, 10.0))
    pair.target.close()
    driver = Driver(pair.draft, num_slots=6)
    with pytest.raises(ConnectionError, match="rank draft 0 in step 1: rank 0 has closed its connection"):
        driver.step([Text(range(9, 20), max_tokens=30)], MOST)
    pair.close()


def test_plans_out_of_order_are_refused(pairs: Pairs) -> None:
    pair = DedicatedPair(dedicated(pairs, 10.0))
    assert pair.draft.execute(StepPlan(4)).num_tokens == 0
    with pytest.raises(PlanError, match="step 6 came where 5 was due"):
        pair.draft.execute(StepPlan(6))
    pair.close()

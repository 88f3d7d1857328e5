"""What ranks are told of where they are: on one node, on another, across nodes, on GPUs that Ray gave."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from group_certificates import identities_of
from tpserve.coordinator.errors import ClusterError
from tpserve.coordinator.group_layout import GroupLayout, order
from tpserve.proto.rank import Place, RankConfig
from tpserve.proto.speculation import Speculation

TEMPLATE = RankConfig(
    rank=0,
    tp_size=2,
    model_dir=Path("/model"),
    artifact_dir=Path("/library"),
    load_format="auto",
    num_pages=1,
    max_num_seqs=1,
    num_threads=1,
    group_name="",
    collective_timeout_s=1.0,
)
OWN, OTHER = "id-a", "id-b"
HERE, THERE = Place(OWN, "a", "10.0.0.1", None), Place(OTHER, "b", "10.0.0.2", None)
FOLDERS = {OTHER: {"model": Path("/kept/m"), "library": Path("/kept/l")}}


def layout(*places: Place, **changes: Any) -> GroupLayout:
    return GroupLayout(replace(TEMPLATE, tp_size=len(places), **changes), places, OWN)


def test_the_coordinators_node_comes_first_and_neighbours_side_by_side() -> None:
    on_gpus = [replace(place, device=device) for place, device in ((THERE, 1), (HERE, 3), (THERE, 0), (HERE, 2))]
    ordered = [on_gpus[at] for at in order(on_gpus, OWN)]
    assert [(place.node, place.device) for place in ordered] == [("a", 2), ("a", 3), ("b", 0), ("b", 1)]
    assert order([HERE] * 4, OWN) == [0, 1, 2, 3]


def test_on_the_coordinators_node_ranks_stay_on_loopback_and_in_shared_memory() -> None:
    found = layout(HERE, HERE)
    assert (found.away, found.needs_door, found.hosts) == ({}, False, ["127.0.0.1"] * 2)
    first, second = found.configs("", {})
    assert (first.rank, second.rank) == (0, 1)
    assert not first.across_nodes
    assert not first.is_away
    assert first.model_dir == TEMPLATE.model_dir
    assert first.group_name == second.group_name != layout(HERE, HERE).configs("", {})[0].group_name
    assert first.token == second.token != layout(HERE, HERE).configs("", {})[0].token
    assert first.token is not None
    assert len(first.token) > 32
    assert first.token not in repr(first), "a secret that is logged is none"


def test_on_another_node_they_share_memory_there_and_listen_to_the_coordinator() -> None:
    found = layout(THERE, THERE)
    assert (list(found.away), found.needs_door) == ([OTHER], False)
    for config in found.configs("", FOLDERS, tls=identities_of(2)):
        assert (config.host, config.is_away, config.across_nodes) == ("10.0.0.2", True, False)
        assert (config.model_dir, config.artifact_dir) == (Path("/kept/m"), Path("/kept/l"))


def test_across_nodes_each_listens_on_its_own_and_they_meet_at_a_door() -> None:
    found = layout(HERE, THERE)
    assert found.needs_door
    first, second = found.configs("10.0.0.1:77", FOLDERS, tls=identities_of(2))
    assert [(one.host, one.is_away, one.across_nodes, one.rendezvous) for one in (first, second)] == [
        ("10.0.0.1", False, True, "10.0.0.1:77"),
        ("10.0.0.2", True, True, "10.0.0.1:77"),
    ]
    assert (first.model_dir, second.model_dir) == (Path("/model"), Path("/kept/m"))


def test_who_leaves_loopback_has_a_certificate_and_nobody_else_does() -> None:
    assert not layout(HERE, HERE).leaves_loopback
    assert [config.tls for config in layout(HERE, HERE).configs("", {})] == [None, None]
    for places in ((HERE, THERE), (THERE, THERE)):
        found, tls = layout(*places), identities_of(2)
        assert found.leaves_loopback
        configs = found.configs("10.0.0.1:77", FOLDERS, tls=tls)
        assert [config.tls for config in configs] == tls
        assert tls[0].key.decode() not in repr(configs)
        with pytest.raises(ValueError, match="need certificates"):
            found.configs("10.0.0.1:77", FOLDERS)


def test_a_gpu_is_the_one_that_ray_gave_or_the_groups_next() -> None:
    given = layout(replace(HERE, device=5), replace(HERE, device=6), device=0)
    assert given.needs_door, "GPUs exchange handles there"
    assert [config.device for config in given.configs("x:1", {})] == [5, 6]
    assert [config.device for config in layout(HERE, HERE, device=2).configs("x:1", {})] == [2, 3]
    assert not layout(HERE, device=0).needs_door


def test_peer_memory_ends_at_the_node() -> None:
    layout(HERE, HERE, device=0, collectives="push")
    layout(HERE, THERE, device=0, collectives="nccl")
    with pytest.raises(ClusterError, match=r"--collectives push .* on a, b: take auto or nccl"):
        layout(HERE, THERE, device=0, collectives="push")


def test_a_drafts_own_ranks_come_behind_and_are_told_where_to_meet() -> None:
    own = Speculation("draft", 3, draft_tp_size=2, draft_placement="dedicated")
    found = GroupLayout(replace(TEMPLATE, tp_size=1, speculation=own), (HERE, THERE, THERE), OWN)
    assert (found.is_across_nodes, found.needs_door) == (False, False), "which is about the model's ranks"
    assert found.hosts == ["10.0.0.1", "10.0.0.2", "10.0.0.2"]
    configs = found.configs("", FOLDERS, "10.0.0.2:5", "10.0.0.1:6", tls=identities_of(3))
    assert [(config.name, config.draft_rank) for config in configs] == [("0", None), ("draft 0", 0), ("draft 1", 1)]
    assert {(config.draft_door, config.target_door) for config in configs} == {("10.0.0.2:5", "10.0.0.1:6")}
    with pytest.raises(ClusterError, match=r"--draft-tp 2 would put a draft group, .* on a, b: lower it"):
        GroupLayout(replace(TEMPLATE, tp_size=1, speculation=own), (HERE, HERE, THERE), OWN)


def test_on_gpus_a_drafts_own_ranks_meet_at_their_first_and_share_a_node_with_the_model() -> None:
    own = Speculation("draft", 3, draft_tp_size=2, draft_placement="dedicated")
    template = replace(TEMPLATE, tp_size=2, device=0, speculation=own)
    found = GroupLayout(template, (HERE, HERE, HERE, HERE), OWN)
    configs = found.configs("h:1", {}, "h:2", "", "h:3")
    assert [config.rendezvous for config in configs] == ["h:1", "h:1", "h:3", "h:3"]
    assert [config.device for config in configs] == [0, 1, 2, 3]
    assert {config.draft_door for config in configs} == {"h:2"}
    with pytest.raises(ClusterError, match=r"--draft-placement dedicated .* on a, b: give --draft-placement colocated"):
        GroupLayout(template, (HERE, HERE, HERE, THERE), OWN)


def test_ranks_of_a_draft_group_are_on_one_node() -> None:
    places = (HERE, HERE, THERE, THERE)
    for size in (1, 2):
        layout(*places, speculation=Speculation("draft", 3, draft_tp_size=size))
    with pytest.raises(ClusterError, match=r"--draft-tp 4 would put a draft group, .* on a, b: lower it"):
        layout(*places, speculation=Speculation("draft", 3, draft_tp_size=4))
    # On GPUs a draft's ranks exchange by the group's collectives.
    layout(*places, device=0, speculation=Speculation("draft", 3, draft_tp_size=4))

"""Certificates of a group of ranks, as the coordinator makes them and ranks load them."""

from __future__ import annotations

from dataclasses import replace

from tpserve.collectives.tls import GroupTls
from tpserve.coordinator.group_authority import GroupAuthority
from tpserve.proto.rank import TlsIdentity, rank_tls_name


def identities_of(num_ranks: int) -> list[TlsIdentity]:
    """Return those of the ranks of a new group."""
    authority = GroupAuthority()
    return [authority.issue(rank_tls_name(rank)) for rank in range(num_ranks)]


def loaded(identity: TlsIdentity) -> GroupTls:
    return GroupTls.load(identity.certificate, identity.key, identity.authority, rank_tls_name)


def group_of(num_ranks: int) -> list[GroupTls]:
    return [loaded(identity) for identity in identities_of(num_ranks)]


def impostor(identity: TlsIdentity, name: str) -> TlsIdentity:
    """Return one of another authority that trusts the group's."""
    return replace(GroupAuthority().issue(name), authority=identity.authority)

"""How a rank knows those that it meets over a network: by the certificates that the coordinator has given them."""

from __future__ import annotations

import grpc

from tpserve.collectives.tls import GroupTls
from tpserve.proto.rank import RankConfig, TlsIdentity, rank_tls_name


def group_tls(config: RankConfig) -> GroupTls | None:
    """Return what this rank meets other ranks with; None: plain connections."""
    if (tls := config.tls) is None:
        return None
    return GroupTls.load(tls.certificate, tls.key, tls.authority, rank_tls_name)


def server_credentials(tls: TlsIdentity) -> grpc.ServerCredentials:
    """Return those of the door for plans, which takes members of the group alone."""
    return grpc.ssl_server_credentials(
        [(tls.key, tls.certificate)], root_certificates=tls.authority, require_client_auth=True
    )

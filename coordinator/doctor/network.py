"""Checks of what goes over the network between the nodes of a cluster, and who can read it there."""

from __future__ import annotations

import os
from collections.abc import Iterator

from tpserve.coordinator.doctor.findings import Finding, Wanted

_ON = ("1", "true")
_PRIVATE = "keep the nodes on a network of their own, which nobody else reaches"


def check_network(wanted: Wanted) -> Iterator[Finding]:
    """Tell which traffic between nodes is not encrypted."""
    if wanted.ray_address is None:
        return
    encrypted = os.environ.get("RAY_USE_TLS", "").lower() in _ON
    if not encrypted:
        yield Finding(
            "ray-tls",
            "warn",
            "Ray's calls between nodes are not encrypted, and they carry models and the keys of a group's ranks",
            f"{_PRIVATE}, or set RAY_USE_TLS=1 with RAY_TLS_SERVER_CERT, RAY_TLS_SERVER_KEY and RAY_TLS_CA_CERT on all",
        )
    else:
        yield Finding("ray-tls", "ok", "Ray's calls between nodes are within TLS")
    if wanted.device != "cpu" and wanted.tp_size > 1:
        yield Finding(
            "nccl-network",
            "warn",
            "GPUs of several nodes exchange activations by NCCL, which encrypts nothing and asks for no secret",
            f"{_PRIVATE}, with --tp-across-nodes",
        )

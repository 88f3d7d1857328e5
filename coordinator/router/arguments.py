"""The flags that `tpserve router` and `tpserve serve --replicas` share; loads nothing but their defaults."""

from __future__ import annotations

import argparse
import os

from tpserve.coordinator.router.choice import Policy
from tpserve.coordinator.router.config import RouterConfig

TOKEN_VARIABLE = "TPSERVE_ROUTER_TOKEN"
ADMIN_VARIABLE = "TPSERVE_ADMIN_TOKEN"


def add_policy_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that `tpserve serve --replicas` has too."""
    default = RouterConfig(("http://x:1",))
    group = parser.add_argument_group("router")
    group.add_argument(
        "--policy",
        choices=[policy.value for policy in Policy],
        default=default.policy.value,
        help="which replica takes a request; prefix: the one that has the prompt's beginning cached, within load",
    )
    group.add_argument(
        "--router-token",
        default=os.environ.get(TOKEN_VARIABLE),
        metavar="SECRET",
        help=f"shared by router and replicas, so that streams can move between them (or ${TOKEN_VARIABLE})",
    )
    group.add_argument(
        "--max-inflight-per-backend",
        type=int,
        default=default.max_in_flight_per_backend,
        metavar="N",
        help="requests at one replica; more wait in the router (%(default)s)",
    )
    group.add_argument(
        "--max-queued",
        type=int,
        default=default.max_queued,
        metavar="N",
        help="requests that wait in the router; more are answered with 429 (%(default)s)",
    )
    group.add_argument(
        "--queue-timeout",
        type=float,
        default=default.queue_timeout_s,
        metavar="SECONDS",
        help="a request that waits longer is answered with 429, or 503 if no replica is ready (%(default)g)",
    )
    group.add_argument(
        "--max-moves",
        type=int,
        default=default.max_moves,
        metavar="N",
        help="times that one request may lose its replica and go on at another one (%(default)s)",
    )

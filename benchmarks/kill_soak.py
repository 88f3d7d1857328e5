"""Whether an answer is lost when ranks are killed, again and again, under load.

Regime: the real server with TP=2 on this machine's CPU; clients without pause, each request greedy, sampled with a
seed, bound to a JSON schema or with n=2; kill -9 of a random rank a random time after the group is ready again. Every
stream must have the text, the finish reason, the log-probabilities and the number of tokens that it had before any
kill; a request may be refused (429, 503), which is counted.

It fails (exit code 1) if one answer was lost or wrong, or if something is left behind in the end. Run as
`PYTHONPATH=tests:deploy/python .venv/bin/python benchmarks/kill_soak.py MODEL`; 50 kills take about 5 minutes on two
cores. Prints one JSON object last and writes it to `--output`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kill_load import KillLoad, mixed_requests
from server import Server


def summary(values: Sequence[float]) -> dict[str, float]:
    """Return median and largest, in seconds."""
    return {"median": round(statistics.median(values), 2), "max": round(max(values), 2)} if values else {}


async def soak(server: Server, args: argparse.Namespace) -> dict[str, Any]:
    """Run the load and the kills; return what came of it."""
    async with server.async_client() as client:
        load = KillLoad(server, client, mixed_requests(args.max_tokens), args.seed)
        await load.learn()
        await load.run(args.kills, args.clients, args.max_pause)
    metrics = server.metrics()
    return {
        "kills": len(load.rebuilds_s),
        "streams": dict(load.outcomes),
        "lost_or_wrong": load.faults,
        "kill_to_ready_s": summary(load.rebuilds_s),
        "longest_pause_of_streams_over_a_kill_s": summary(load.pauses_s),
        "group_rebuilds": metrics["tpserve_group_rebuilds_total"],
        "kv_cache_usage_in_the_end": metrics["tpserve_kv_cache_usage_perc"],
    }


def main() -> int:
    """Serve, soak, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=os.path.abspath)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=80)
    parser.add_argument("--max-pause", type=float, default=2.0, help="seconds from READY to the next kill, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="file for the JSON")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kill-soak-") as folder:
        flags = ("--tp", "2", "--max-num-seqs", "8")
        with Server.running(args.model, *flags, folder=Path(folder)) as server:
            result = asyncio.run(soak(server, args))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    result |= {
        "commit": commit.stdout.strip(),
        "device": f"{os.cpu_count()} cores, {platform.machine()}",
        "arguments": {key: str(value) for key, value in vars(args).items() if key not in ("model", "output")},
    }
    if args.output is not None:
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    return 1 if result["lost_or_wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())

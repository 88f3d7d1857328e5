"""Whether a request fails while every replica is replaced under load.

Regime: `tpserve serve --replicas 2` with the demo model on this machine's CPU; streaming clients without pause, each
request greedy, sampled with a seed, bound to a JSON schema, or with n=2 or log-probabilities; POST
/admin/rolling-restart, again when the last one is done. The drain is shorter than the streams, so that most of them
move to the other replica. Every stream must have the text, the finish reason, the log-probabilities and the number of
tokens that it had undisturbed; nothing may be refused.

It fails (exit code 1) if one answer was lost, wrong or refused, if fewer than N-1 replicas were ready at any time, or
if something is left behind in the end. Run as `PYTHONPATH=tests:deploy/python .venv/bin/python benchmarks/rolling.py
MODEL`. Prints one JSON object last and writes it to `--output`.
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
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

from kill_load import ComparedLoad, mixed_requests
from server import Server

ADMIN = "admin-secret"
REPLACED_WITHIN_S = 240.0


def summary(values: Sequence[float]) -> dict[str, float]:
    """Return median and largest, in seconds."""
    return {"median": round(statistics.median(values), 2), "max": round(max(values), 2)} if values else {}


class Replacement:
    """Replaces all replicas, and counts those that are ready meanwhile."""

    def __init__(self, server: Server, load: ComparedLoad) -> None:
        self._server = server
        self._load = load
        self.took_s: list[float] = []
        self.fewest_ready = sys.maxsize

    async def run(self, times: int) -> None:
        """Do it so many times, one after the other."""
        async with httpx.AsyncClient(base_url=self._server.url, timeout=30) as http:
            for number in range(1, times + 1):
                await asyncio.sleep(2)
                begin = time.monotonic()
                headers = {"authorization": f"Bearer {ADMIN}"}
                (await http.post("/admin/rolling-restart", headers=headers)).raise_for_status()
                self._load.num_kills += 1  # streams that are running now live through it
                while (await asyncio.to_thread(lambda: self._server.log)).count("all replicas are replaced") < number:
                    if time.monotonic() > begin + REPLACED_WITHIN_S:
                        raise AssertionError(self._server.report("the replicas are not replaced"))
                    replicas = (await http.get("/health")).json()["replicas"]
                    self.fewest_ready = min(self.fewest_ready, sum(each["ready"] for each in replicas))
                    await asyncio.sleep(0.1)
                self.took_s.append(time.monotonic() - begin)


async def replace(server: Server, args: argparse.Namespace) -> dict[str, Any]:
    """Run load and replacements; return what came of it."""
    async with server.async_client() as client:
        load = ComparedLoad(client, mixed_requests(args.max_tokens), args.seed)
        await load.learn()
        replacement = Replacement(server, load)
        await load.run_while(replacement.run(args.times), args.clients)
    metrics = server.metrics()
    return {
        "replacements_of_all": len(replacement.took_s),
        "each_took_s": summary(replacement.took_s),
        "fewest_ready": replacement.fewest_ready,
        "streams": dict(load.outcomes),
        "lost_or_wrong": load.faults,
        "moves": metrics["tpserve_router_moves_total{outcome=moved}"],
        "moves_failed": metrics["tpserve_router_moves_total{outcome=failed}"],
        "longest_pause_of_streams_over_the_begin_of_a_replacement_s": summary(load.pauses_s),
    }


def main() -> int:
    """Serve, replace, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=os.path.abspath)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--times", type=int, default=1, help="replacements of all replicas")
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--max-num-seqs", type=int, default=32)
    parser.add_argument("--drain-timeout", type=float, default=3.0, help="seconds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="file for the JSON")
    args = parser.parse_args()
    flags = ["--replicas", str(args.replicas), "--max-num-seqs", str(args.max_num_seqs), "--admin-token", ADMIN]
    flags += ["--drain-timeout", str(args.drain_timeout)]
    with tempfile.TemporaryDirectory(prefix="rolling-") as folder:
        with Server.running(args.model, *flags, folder=Path(folder)) as server:
            result = asyncio.run(replace(server, args))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    result |= {
        "commit": commit.stdout.strip(),
        "device": f"{os.cpu_count()} cores, {platform.machine()}",
        "arguments": {key: str(value) for key, value in vars(args).items() if key not in ("model", "output")},
    }
    if args.output is not None:
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    bad = result["lost_or_wrong"] or set(result["streams"]) - {"complete", "complete, over a kill"}
    return int(bool(bad) or result["fewest_ready"] < args.replicas - 1)


if __name__ == "__main__":
    sys.exit(main())

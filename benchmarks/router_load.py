"""What a router costs: CPU time per request and per streamed token, and time to the first token.

Regime: real gateways on `stepping_engine.py`, so that nothing but HTTP limits the rate; the same clients as in
`gateway_load.py`, some of which hang up, once straight at the gateway and then through `tpserve router` before it, with
marks (streams can move) and without. CPU time is counted by the kernel: of the gateway and of the router, each for
itself. Two loads, of short and of long answers, tell a request's cost from a token's. Time to the first token is taken
with one client alone, requests in turn.

It fails (exit code 1) if a stream ended in anything but a finish reason and [DONE]. Run as
`PYTHONPATH=.:deploy/python .venv/bin/python benchmarks/router_load.py FOLDER --output FILE`; FOLDER has a model's text
side and config.json. Prints one JSON object last.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
from benchmarks.gateway_load import (
    LONG_OUTPUT_TOKENS,
    OUTPUT_TOKENS,
    Phase,
    Server,
    Tally,
    load,
    one_request,
    separated,
)

SECRET = "benchmark"
NUM_ALONE = 400
"""Requests of the client that is alone."""
ALONE_STEP_MS = 0.5


class Stack:
    """A stepping engine, a gateway, and perhaps a router."""

    def __init__(self, model: str, step_ms: float, log: Path, router: str | None) -> None:
        self.log = log
        facts = json.loads((Path(model) / "config.json").read_text())
        limits = (str(step_ms), str(facts["vocab_size"]), str(facts["max_position_embeddings"]))
        script = str(Path(__file__).with_name("stepping_engine.py"))
        engine = self._spawn([script, *limits])
        config = {
            "engine_address": self._told(engine, "address"),
            "model_dir": model,
            "served_model_names": ["model"],
            "port": 0,
            "router_token": SECRET,
        }
        gateway = self._spawn(["-m", "tpserve.coordinator.gateway", json.dumps(config)])
        url = self._told(gateway, "url")
        self.processes = {"engine": engine, "gateway": gateway}
        self.port = int(url.rpartition(":")[2])
        if router is not None:
            flags = ["--backend", url, "--port", "0", "--merge-metrics", "--max-inflight-per-backend", "4096"]
            token = ["--router-token", SECRET] if router == "marked" else []
            parent = ["--parent-pid", str(os.getpid())]
            process = self._spawn(["-m", "tpserve.coordinator.router", *flags, *token, *parent])
            self.processes["router"] = process
            self.port = int(self._told(process, "url").rpartition(":")[2])

    def _spawn(self, arguments: list[str]) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as out:
            return subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, stderr=out)

    @staticmethod
    def _told(process: subprocess.Popen[bytes], key: str) -> str:
        assert process.stdout is not None
        value: str = json.loads(process.stdout.readline())[key]
        return value

    def as_server(self, name: str) -> Server:
        """Return it for `Phase`, which counts the CPU time of one process."""
        server = Server(self.processes["engine"], self.port, self.log)
        server.gateways.append(psutil.Process(self.processes[name].pid))
        return server

    def stop(self) -> None:
        """End it, the outermost process first."""
        for process in reversed(self.processes.values()):
            process.terminate()
            process.wait(60)


def wait_ready(stack: Stack) -> None:
    """Wait until requests are taken, and send some: imports, pools and caches come now."""
    server = stack.as_server("gateway")
    while server.get("/health").status_code != 200:
        time.sleep(0.05)
    asyncio.run(load(stack.port, 16, 1.0))


def alone(port: int) -> list[float]:
    """Return the times to the first token of one client, in seconds, sorted."""
    tally = Tally()

    async def ask() -> None:
        rng = random.Random(3)
        while len(tally.ttft_s) < NUM_ALONE:
            await one_request(port, rng, (4, 8), tally)

    asyncio.run(ask())
    return sorted(tally.ttft_s)


def measure(args: argparse.Namespace, router: str | None, log: Path) -> dict[str, Any]:
    """Start one stack with steps that take no time, for one client, and another one to load."""
    stack = Stack(args.model, ALONE_STEP_MS, log, router)
    try:
        wait_ready(stack)
        ttft_s = alone(stack.port)
    finally:
        stack.stop()
    stack = Stack(args.model, args.step_ms, log, router)
    try:
        wait_ready(stack)
        name = "gateway" if router is None else "router"
        server = stack.as_server(name)
        gateway = psutil.Process(stack.processes["gateway"].pid)
        before = sum(gateway.cpu_times()[:2])
        mixed = Phase.run(server, args.clients, args.seconds, OUTPUT_TOKENS)
        long = Phase.run(server, args.clients, args.seconds, LONG_OUTPUT_TOKENS)
        gateway_s = sum(gateway.cpu_times()[:2]) - before
    finally:
        stack.stop()
    costs = {key.replace("gateway", name): value for key, value in separated(mixed, long).items()}
    return {
        "path": {None: "direct", "plain": "router", "marked": "router, streams can move"}[router],
        "alone_ttft_ms": {
            "p50": round(1e3 * statistics.median(ttft_s), 2),
            "p90": round(1e3 * ttft_s[NUM_ALONE * 9 // 10], 2),
        },
        **costs,
        f"{name}_cpu_us_per_token_of_long_answers": round(1e6 * sum(long.spent_s) / long.num_tokens, 1),
        "gateway_cpu_us_per_token_of_both_loads": round(1e6 * gateway_s / (mixed.num_tokens + long.num_tokens), 1),
        "mixed": {key: value for key, value in mixed.to_dict().items() if "gateway" not in key},
        "long": {key: value for key, value in long.to_dict().items() if "gateway" not in key},
    }


def main() -> int:
    """Measure all three; the last line is one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=15.0, help="of each of the two loads")
    parser.add_argument("--step-ms", type=float, default=20.0)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = [measure(args, router, Path(folder) / "log") for router in (None, "plain", "marked")]
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    result = {
        "commit": git.stdout.strip(),
        "cores": os.cpu_count(),
        "machine": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("httptools", "starlette", "uvicorn", "uvloop")},
        "arguments": {name: getattr(args, name) for name in ("clients", "seconds", "step_ms")},
        "runs": runs,
    }
    if args.output is not None:
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    sys.stdout.write(json.dumps(result) + "\n")
    return int(any(run[phase]["errors"] for run in runs for phase in ("mixed", "long")))


if __name__ == "__main__":
    sys.exit(main())

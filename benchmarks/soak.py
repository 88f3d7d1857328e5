"""Whether memory, file descriptors, KV pages or shared memory grow under a long, rough load.

Regime: the real server with TP=2 on this machine's CPU; 128 streaming clients without pause, prompts of 1 to 300 tokens
and answers of 1 to 120, greedy and sampled; a sixth of the clients leave in mid-stream; a random rank is killed every
three minutes. What the server's processes hold is read every few seconds, and again when it is idle in the end.

It fails (exit code 1) if an accepted stream ended with an error, or if the last third of the run holds more than the
second by more than the tolerance: processes, file descriptors and shared memory of the same number, memory by less than
3 %, and no KV page in the end. Of Ray's own daemons only memory is judged: its log monitor keeps the files of ranks
that have gone open, up to 200. Run as
`PYTHONPATH=tests:deploy/python .venv/bin/python benchmarks/soak.py MODEL --output benchmarks/results/soak.json`. Writes
a plot beside the JSON if matplotlib is there.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import os
import platform
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil

from server import MODEL_NAME, Server, processes_of, until

VOCABULARY = range(100, 40_000)
MAX_MEMORY_GROWTH = 0.03
FAMILIES = {"gateway": "tpserve.coordinator.gateway", "coordinator": "tpserve.coordinator", "serve": "tpserve.cli"}
"""Modules by which our own processes are told; ranks are Ray's."""


@dataclass(frozen=True, slots=True)
class Sample:
    """What the server holds at one time."""

    at_s: float
    memory_bytes: dict[str, int]
    """Unique set size by family of processes: what is shared with others would move with theirs."""
    num_fds: int
    num_processes: int
    num_threads: int
    shared_memory_files: int
    kv_usage: float
    num_running: float
    num_waiting: float


class Soak:
    """The load, the kills, and what was seen."""

    def __init__(self, server: Server, args: argparse.Namespace) -> None:
        self._server = server
        self._args = args
        self._random = random.Random(args.seed)
        self.outcomes: Counter[str] = Counter()
        self.faults: list[str] = []
        self.samples: list[Sample] = []
        self.num_tokens = 0
        self.kills = 0
        self._begin = time.monotonic()

    async def run(self) -> None:
        """Load and kill for the given time, then wait until the server is idle."""
        deadline = self._begin + self._args.minutes * 60
        async with self._server.async_client() as client:
            clients = [
                asyncio.create_task(self._client(client, number, deadline)) for number in range(self._args.clients)
            ]
            killer = asyncio.create_task(self._kill_ranks(deadline))
            while time.monotonic() < deadline:
                await asyncio.to_thread(self._look)
                await asyncio.sleep(self._args.sample_every)
            await asyncio.wait_for(asyncio.gather(*clients, killer), 600)

    async def _client(self, client: openai.AsyncOpenAI, number: int, deadline: float) -> None:
        rng = random.Random(f"{self._args.seed} {number}")
        while time.monotonic() < deadline:
            leaves = rng.random() < 1 / 6
            prompt = [rng.choice(VOCABULARY) for _ in range(rng.randint(1, 300))]
            body: dict[str, Any] = {
                "model": MODEL_NAME,
                "prompt": prompt,
                "max_tokens": rng.randint(1, 120),
                "temperature": rng.choice([0.0, 1.0]),
                "seed": rng.getrandbits(32),
                "extra_body": {"ignore_eos": True},
            }
            try:
                stream = await client.completions.create(**body, stream=True)
                received = 0
                last = rng.randint(1, 40) if leaves else 10**9
                async for _ in stream:
                    received += 1
                    if received >= last:
                        await stream.close()
                        break
                self.num_tokens += received
                self.outcomes["left" if received >= last else "complete"] += 1
            except openai.APIStatusError as error:
                if error.status_code not in (429, 503):
                    self._fault(error)
                self.outcomes[f"refused {error.status_code}"] += 1
                await asyncio.sleep(rng.uniform(0.5, 1.5))
            except (openai.APIError, httpx.HTTPError) as error:
                self._fault(error)

    def _fault(self, error: Exception) -> None:
        self.outcomes["failed"] += 1
        self.faults.append(f"{time.monotonic() - self._begin:.0f} s: {type(error).__name__}: {error}")

    async def _kill_ranks(self, deadline: float) -> None:
        while (begin := time.monotonic() + self._args.kill_every) < deadline:
            await asyncio.sleep(begin - time.monotonic())
            pids = self._server.rank_pids()
            with suppress(ProcessLookupError):
                os.kill(pids[self._random.choice(sorted(pids))], signal.SIGKILL)
                self.kills += 1

    def _look(self) -> None:
        memory: Counter[str] = Counter()
        fds = threads = count = 0
        for process in processes_of(self._server.mark):
            with suppress(psutil.Error, OSError):
                family = _family(process)
                memory[family] += process.memory_full_info().uss
                fds += process.num_fds() if family != "ray" else 0
                threads += process.num_threads()
                count += 1
        metrics: dict[str, float] = {}
        with suppress(httpx.HTTPError):
            metrics = self._server.metrics()
        self.samples.append(
            Sample(
                round(time.monotonic() - self._begin, 1),
                dict(memory),
                fds,
                count,
                threads,
                len(list(Path("/dev/shm").iterdir())),
                metrics.get("tpserve_kv_cache_usage_perc", float("nan")),
                metrics.get("tpserve_num_requests_running", float("nan")),
                metrics.get("tpserve_num_requests_waiting", float("nan")),
            )
        )


def _family(process: psutil.Process) -> str:
    line = process.cmdline()
    for name, module in FAMILIES.items():
        if ["-m", module] == line[1:3]:
            return name
    return "ranks" if any("RankActor" in part for part in line[:1]) else "ray"


def judge(samples: Sequence[Sample]) -> tuple[dict[str, Any], list[str]]:
    """Compare the last third of a run with the one before; return figures, and what has grown."""
    third = len(samples) // 3
    middle, last = samples[third : 2 * third], samples[2 * third :]
    figures: dict[str, Any] = {}
    grown: list[str] = []

    def compare(name: str, before: Sequence[float], after: Sequence[float], tolerance: float) -> None:
        low, high = statistics.median(before), statistics.median(after)
        figures[name] = {"second_third": low, "last_third": high}
        if high > low * (1 + tolerance):
            grown.append(f"{name}: {low:g} -> {high:g}")

    for family in sorted({family for sample in samples for family in sample.memory_bytes}):
        before = [sample.memory_bytes.get(family, 0) for sample in middle]
        compare(f"{family}_memory_bytes", before, [s.memory_bytes.get(family, 0) for s in last], MAX_MEMORY_GROWTH)
    for name in ("num_processes", "shared_memory_files"):
        compare(name, [getattr(s, name) for s in middle], [getattr(s, name) for s in last], 0.0)
    # Connections come and go with the clients.
    for name in ("num_fds", "num_threads"):
        compare(name, [getattr(s, name) for s in middle], [getattr(s, name) for s in last], 0.02)
    return figures, grown


def plot(samples: Sequence[Sample], path: Path) -> None:
    """Draw memory by family, file descriptors and load over time."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 9.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(3, 1, sharex=True)
    minutes = [sample.at_s / 60 for sample in samples]
    for family in sorted({family for sample in samples for family in sample.memory_bytes}):
        axes[0].plot(minutes, [sample.memory_bytes.get(family, 0) / 2**20 for sample in samples], label=family)
    axes[0].set_ylabel("Memory (MB)")
    axes[1].plot(minutes, [sample.num_fds for sample in samples], label="file descriptors")
    axes[1].plot(minutes, [sample.num_threads for sample in samples], label="threads")
    axes[1].plot(minutes, [sample.shared_memory_files for sample in samples], label="files in /dev/shm")
    axes[2].plot(minutes, [100 * sample.kv_usage for sample in samples], label="KV pages held (%)")
    axes[2].plot(minutes, [sample.num_running for sample in samples], label="running")
    axes[2].plot(minutes, [sample.num_waiting for sample in samples], label="waiting")
    axes[2].set_xlabel("Minutes")
    for each in axes:
        each.set_ylim(bottom=0)
        each.grid(alpha=0.3)
        each.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> int:
    """Serve, soak, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=os.path.abspath)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--clients", type=int, default=128)
    parser.add_argument("--kill-every", type=float, default=180.0, metavar="S")
    parser.add_argument("--sample-every", type=float, default=5.0, metavar="S")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="file for the JSON; the plot stands beside it")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        flags = ("--tp", "2", "--max-num-seqs", "32")
        with Server.running(args.model, *flags, folder=Path(folder)) as server:
            soak = Soak(server, args)
            asyncio.run(soak.run())
            until(lambda: server.metric("num_requests_running") == 0, within_s=60, what="idle")
            pages = server.metric("kv_cache_usage_perc")
            rebuilds = server.metric("group_rebuilds_total")
    figures, grown = judge(soak.samples)
    if pages:
        grown.append(f"KV pages held when idle: {pages:g} of all")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    result = {
        "benchmark": "soak",
        "commit": commit.stdout.strip(),
        "device": f"{os.cpu_count()} cores, {platform.machine()}",
        "arguments": {key: value for key, value in vars(args).items() if key not in ("model", "output")},
        "streams": dict(soak.outcomes),
        "tokens": soak.num_tokens,
        "kills": soak.kills,
        "group_rebuilds": rebuilds,
        "faults": soak.faults,
        "grown": grown,
        "held": figures,
        "kv_cache_usage_in_the_end": pages,
        "samples": [asdict(sample) for sample in soak.samples[:: max(1, len(soak.samples) // 60)]],
    }
    if args.output is not None:
        args.output.write_text(json.dumps(result, indent=1) + "\n")
        if importlib.util.find_spec("matplotlib") is not None:
            plot(soak.samples, args.output.with_suffix(".png"))
    print(json.dumps({key: value for key, value in result.items() if key != "samples"}))
    return 1 if soak.faults or grown else 0


if __name__ == "__main__":
    sys.exit(main())

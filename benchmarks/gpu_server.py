"""The real server on GPUs under the load of the peers' table, over HTTP: TPOT, TTFT, ITL and tokens a second.

Regime: `tpserve serve` as a user starts it, random weights, prefix cache off, greedy, ignore_eos; a closed loop of C
requests for each point, lengths from a file of prompt and output lengths, by the client that measured the peer (a
module with `warm`, `static_point` and `run_point`). `static` is C equal requests (256 in, 129 out) together: the step.
Requests of `--fixed-lengths`, 1000/500 say, follow at `--fixed-points`. `--trace STEPS` adds where so many steps of
each point went, by their captured sizes. Floor: weights once through memory, 4.70 TB/s on an H200.
Prints each point and, last, one JSON object; `--append` adds it to the runs of a file.

Run on a host with GPUs: python benchmarks/gpu_server.py --model FOLDER --artifact FOLDER --client CLIENT.py
[--points 1 8 16 32 64] [-- FLAGS OF tpserve serve].
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "tests")]

from benchmarks.gpu_decode import device_name, weight_bytes

from tpserve.proto.manifest import Manifest

READY_WITHIN_S = 240.0
SERVED_NAME = "benchmark"


def load_client(path: Path) -> Any:
    """Return the client's module."""
    spec = importlib.util.spec_from_file_location("load_client", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def free_port() -> int:
    """Return a port that nobody has now."""
    with socket.create_server(("127.0.0.1", 0)) as bound:
        port: int = bound.getsockname()[1]
        return port


METRICS = (
    r"tpserve_(collectives_info|plan_lead_seconds|host_gap_seconds_sum|step_seconds_sum)"
    r"|vllm:spec_decode_num_\w+_total"
)
"""Kept with a run."""


class Server:
    """`tpserve serve` as a process; `ready_s` is what it took to be ready.

    Raises
    ------
    RuntimeError
        If it ends or is not ready in time, with the end of its log.
    """

    def __init__(self, args: argparse.Namespace, manifest: Manifest) -> None:
        self.port = free_port()
        self.command = [sys.executable, "-m", "tpserve.cli", "serve", str(args.model), "--device", args.device]
        self.command += ["--tp", str(manifest.tp_size), "--model-lib", str(args.artifact), "--load-format", "dummy"]
        self.command += [
            "--mode",
            "server",
            "--no-prefix-cache",
            "--port",
            str(self.port),
            "--served-model-name",
            SERVED_NAME,
        ]
        self.command += ["--max-num-seqs", str(manifest.max_num_seqs)]
        self.command += ["--max-num-batched-tokens", str(manifest.max_num_batched_tokens), *args.flags]
        if args.trace:
            self.command += ["--enable-debug"]
        # Open as long as the server runs.
        self._log = args.log.open("w+") if args.log else tempfile.NamedTemporaryFile("w+", suffix=".log")
        started = time.perf_counter()
        self._process = subprocess.Popen(self.command, stdout=self._log, stderr=subprocess.STDOUT)
        while not self._is_ready():
            if self._process.poll() is not None or time.perf_counter() - started > READY_WITHIN_S:
                self._process.kill()
                raise RuntimeError(f"not ready: {Path(self._log.name).read_text()[-4000:]}")
            time.sleep(0.1)
        self.ready_s = time.perf_counter() - started

    def _is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health/ready", timeout=2) as response:
                return bool(response.status == 200)
        except OSError:
            return False

    def metrics(self, pattern: str) -> dict[str, float]:
        """Return samples whose name matches."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=10) as response:
            lines = response.read().decode().splitlines()
        found = (line.rpartition(" ") for line in lines if re.match(pattern, line))
        return {name: float(value) for name, _, value in found}

    def steps(self, num_steps: int) -> dict[str, dict[str, float]]:
        """Return rank 0's next steps by captured size (tokens x sampled rows): how many, and their microseconds."""
        url = f"http://127.0.0.1:{self.port}/debug/trace?steps={num_steps}&timeout=6"
        with urllib.request.urlopen(url, timeout=15) as response:
            events = json.load(response)["traceEvents"]
        steps = [event for event in events if event.get("cat") == "step" and event["args"]["rank"] == 0]
        by_bucket: defaultdict[str, list[tuple[float, int]]] = defaultdict(list)
        for step in steps:
            by_bucket[step["args"]["bucket"]].append((step["dur"], step["args"]["tokens"]))
        return {
            bucket: {
                "steps": len(seen),
                "median_us": statistics.median(us for us, _ in seen),
                "total_us": sum(us for us, _ in seen),
                "mean_tokens": statistics.mean(tokens for _, tokens in seen),
            }
            for bucket, seen in sorted(by_bucket.items(), key=lambda item: int(item[0].partition("x")[0]))
        }

    def close(self) -> None:
        """Stop it as Ctrl-C does, by force after a while."""
        self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._log.close()


async def measure(
    client: Any, server: Server, args: argparse.Namespace, concurrencies: list[int], lengths: dict[str, Any] | None
) -> list[dict[str, Any]]:
    """Return points; of the client's own lengths, unless others are given."""
    where = ("127.0.0.1", server.port, SERVED_NAME)
    await client.warm(*where, concurrencies)
    points = []
    for concurrency in concurrencies:
        point: dict[str, Any] = {}
        if lengths is None:
            point["static"] = await client.static_point(*where, concurrency)
        number = max(args.min_requests, args.requests_per_stream * concurrency)
        traced = None
        if args.trace:
            traced = asyncio.create_task(steps_of(server, args.trace))
        point["run"], _ = await client.run_point(*where, concurrency, args.limit_s, number, lengths)
        if traced is not None:
            point["steps"] = await traced
        points.append(point)
        run = point["run"]
        print(
            f"C={concurrency}: TPOT {run['tpot_mean']} ms (p99 {run['tpot_p99']}), ITL p99 {run['itl_p99']}, TTFT "
            f"{run['ttft_mean']} ms, {run['out_tok_s']} tok/s, step {point.get('static', {}).get('step_mean_ms')} ms",
            flush=True,
        )
    return points


async def steps_of(server: Server, num_steps: int) -> dict[str, dict[str, float]]:
    """Record steps when the requests have been under way for a while."""
    await asyncio.sleep(1.5)
    return await asyncio.to_thread(server.steps, num_steps)


def fixed(text: str) -> dict[str, Any]:
    """Return the lengths of PROMPT/OUTPUT as the client takes them."""
    prompt, output = map(int, text.split("/"))
    return {"prompt_len": [prompt] * 1000, "output_len": [output] * 1000}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder with config.json and a tokenizer")
    parser.add_argument("--artifact", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--client", type=Path, required=True, help="the load client, with its lengths beside it")
    parser.add_argument("--points", type=int, nargs="+", default=[1, 8, 16, 32, 64])
    parser.add_argument("--min-requests", type=int, default=8)
    parser.add_argument("--requests-per-stream", type=int, default=3)
    parser.add_argument("--limit-s", type=float, default=25.0, help="of one point")
    parser.add_argument("--fixed-lengths", help="PROMPT/OUTPUT tokens of every request of further points")
    parser.add_argument("--fixed-points", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--trace", type=int, default=0, metavar="STEPS", help="of each point, that are recorded")
    parser.add_argument("--bandwidth", type=float, default=4.70, help="TB/s that one kernel reaches on this device")
    parser.add_argument("--commit", default="", help="of the tree that is measured")
    parser.add_argument("--append", type=Path, help="file of results; its `runs` get this one")
    parser.add_argument("--log", type=Path, help="file for what the server says, instead of a temporary one")
    parser.add_argument("flags", nargs="*", help="of tpserve serve, after --")
    args = parser.parse_args()
    manifest = Manifest.load(args.artifact)
    fixed_points: list[dict[str, Any]] = []
    server = Server(args, manifest)
    try:
        print(f"ready after {server.ready_s:.1f} s", flush=True)
        client = load_client(args.client)
        points = asyncio.run(measure(client, server, args, args.points, None))
        if args.fixed_lengths:
            lengths = fixed(args.fixed_lengths)
            fixed_points = asyncio.run(measure(client, server, args, args.fixed_points, lengths))
        counted = server.metrics(METRICS)
    finally:
        server.close()
    run = {
        "model": args.model.name,
        "tp": manifest.tp_size,
        "quantization": manifest.quantization,
        "kv_dtype": manifest.kv.dtype,
        "commit": args.commit,
        "device": device_name(),
        "compiler": manifest.compiler,
        "command": " ".join(server.command[2:]),
        "requests": f"max({args.min_requests}, {args.requests_per_stream} C) a point",
        "floor_ms": weight_bytes(manifest) / (args.bandwidth * 1e12) * 1e3,
        "ready_s": server.ready_s,
        "metrics": counted,
        "points": points,
        "fixed_lengths": args.fixed_lengths,
        "fixed_points": fixed_points,
    }
    if args.append:
        runs = json.loads(args.append.read_text())["runs"] if args.append.exists() else []
        args.append.write_text(json.dumps({"benchmark": "gpu_server", "runs": [*runs, run]}, indent=1) + "\n")
    print(json.dumps(run))


if __name__ == "__main__":
    main()

"""What hundreds of streaming clients that come and go leave behind, and what a gateway costs per token.

Regime: the real server on this machine's CPU with random weights of a small model, so that steps are short and the
gateway is what is loaded; or with `--engine stepping` the real gateways on `stepping_engine.py` over real gRPC, where
nothing but them limits the rate. Clients on loopback, a connection for each request, prompts and outputs of mixed
lengths, a share of them hanging up in the middle. Clients share the cores with the server, so tokens per second are a
floor; the gateway's CPU time is counted by the kernel and depends on them little.

A request costs something whatever its length: a second load of long outputs tells the two apart, since the CPU time of
both is `requests * per_request + tokens * per_token`.

It fails (exit code 1) if a stream that nobody left ended in anything but a finish reason and [DONE], or if, once all
are gone, a request, a KV page, a task of a gateway's loop or a file descriptor is left.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

from tpserve.coordinator.process import bind

Lengths = tuple[int, int]
"""Fewest and most output tokens."""

SETTLE_S = 20.0
"""After the last client is gone, everything must be gone within this time."""
HANG_UP_SHARE = 0.25
MAX_PROMPT_WORDS = 60
OUTPUT_TOKENS: Lengths = (4, 64)
ARGUMENTS = ("clients", "seconds", "long_seconds", "engine", "step_ms", "serve_args")
LONG_OUTPUT_TOKENS: Lengths = (200, 300)


@dataclass(slots=True)
class Tally:
    """What the clients saw."""

    num_finished: int = 0
    num_hung_up: int = 0
    num_events: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    ttft_s: list[float] = field(default_factory=list)


async def one_request(port: int, rng: random.Random, lengths: Lengths, tally: Tally) -> None:
    """Stream one answer; hang up in the middle of some."""
    words = [rng.choice(["sea", "cat", "Grüße", "the", "你好", "def"]) for _ in range(rng.randint(1, MAX_PROMPT_WORDS))]
    body = json.dumps(
        {
            "messages": [{"role": "user", "content": " ".join(words)}],
            "max_tokens": rng.randint(*lengths),
            "seed": rng.getrandbits(32),
            "ignore_eos": True,
            "stream": True,
        }
    ).encode()
    hang_up_after = rng.randint(0, 20) if rng.random() < HANG_UP_SHARE else None
    begin = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        num_events = 0
        text = b""
        while b"data: [DONE]" not in text:
            if hang_up_after is not None and num_events >= hang_up_after:
                tally.num_hung_up += 1
                return
            part = await reader.read(65536)
            if not part:
                tally.errors[f"the stream ended early: {text[:120]!r}"] += 1
                return
            if not num_events:
                tally.ttft_s.append(time.perf_counter() - begin)
            num_events += part.count(b"data: {")
            tally.num_events += part.count(b"data: {")
            text = text[-4096:] + part
        # By the event's beginning: a model may write the word itself.
        if b'"finish_reason":"length"' in text and b'data: {"error"' not in text:
            tally.num_finished += 1
        else:
            tally.errors[f"no finish reason: {text[-300:]!r}"] += 1
    except OSError as error:
        tally.errors[repr(error)] += 1
    finally:
        writer.close()


async def client(port: int, seed: int, until: float, lengths: Lengths, tally: Tally) -> None:
    """Send one request after another."""
    rng = random.Random(seed)
    while time.perf_counter() < until:
        await one_request(port, rng, lengths, tally)


async def load(port: int, num_clients: int, seconds: float, lengths: Lengths = OUTPUT_TOKENS) -> Tally:
    """Run all clients; none begins a request after the time."""
    tally = Tally()
    until = time.perf_counter() + seconds
    await asyncio.gather(*[client(port, seed, until, lengths, tally) for seed in range(num_clients)])
    return tally


@dataclass(frozen=True, slots=True)
class Holdings:
    """What the server holds."""

    running: float
    waiting: float
    kv_usage: float
    tasks: dict[int, int]
    """By gateway process."""
    fds: dict[int, int]
    """By process of the server that streams pass through."""


class Server:
    """What is loaded: gateways, and what stands behind them.

    Parameters
    ----------
    process
        Its end ends the rest.
    """

    def __init__(self, process: subprocess.Popen[Any], port: int, log: Path) -> None:
        self.process = process
        self.port = port
        self.log = log
        self.gateways: list[psutil.Process] = []
        self.coordinators: list[psutil.Process] = []
        self.children: list[subprocess.Popen[bytes]] = []
        """Gateways that were started here, each with its exit code."""

    @classmethod
    def real(cls, model: str, num_gateways: int, serve_args: list[str], log: Path) -> Server:
        """Start `tpserve serve`."""
        command = [sys.executable, "-m", "tpserve.cli", "serve", model, "--port", "0", "--enable-debug"]
        command += ["--no-prefix-cache", "--gateway-processes", str(num_gateways), *serve_args]
        with log.open("wb") as out:
            process = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True)
        while "Ready at " not in (text := log.read_text(errors="replace")):
            if process.poll() is not None:
                raise SystemExit(f"the server ended while it started:\n{text[-3000:]}")
            time.sleep(0.1)
        server = cls(process, int(text.split("Ready at http://127.0.0.1:")[1].split()[0]), log)
        for child in psutil.Process(process.pid).children(recursive=True):
            module = child.cmdline()[1:3]
            if module == ["-m", "tpserve.coordinator.gateway"]:
                server.gateways.append(child)
            elif module == ["-m", "tpserve.coordinator"]:
                server.coordinators.append(child)
        return server

    @classmethod
    def stepping(cls, model: str, num_gateways: int, step_ms: float, log: Path) -> Server:
        """Start gateways as `tpserve serve` does, on an engine that only steps."""
        facts = json.loads((Path(model) / "config.json").read_text())
        limits = (str(step_ms), str(facts["vocab_size"]), str(facts["max_position_embeddings"]))
        script = str(Path(__file__).with_name("stepping_engine.py"))
        engine = subprocess.Popen([sys.executable, script, *limits], stdout=subprocess.PIPE, start_new_session=True)
        assert engine.stdout is not None
        with bind("127.0.0.1", 0) as shared, log.open("ab") as out:
            server = cls(engine, shared.getsockname()[1], log)
            server.coordinators.append(psutil.Process(engine.pid))
            config = {
                "engine_address": json.loads(engine.stdout.readline())["address"],
                "model_dir": model,
                "served_model_names": ["model"],
                "listen_fd": shared.fileno(),
                "enable_debug": True,
            }
            command = [sys.executable, "-m", "tpserve.coordinator.gateway", json.dumps(config)]
            for _ in range(num_gateways):
                gateway = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=out, pass_fds=(shared.fileno(),))
                server.children.append(gateway)
                server.gateways.append(psutil.Process(gateway.pid))
            for gateway in server.children:
                assert gateway.stdout is not None
                gateway.stdout.readline()  # it listens
        return server

    def get(self, path: str) -> httpx.Response:
        """Ask over a connection of its own."""
        return httpx.get(f"http://127.0.0.1:{self.port}{path}", timeout=20, trust_env=False)

    def samples(self) -> dict[str, float]:
        """Return the metrics without labels."""
        families = text_string_to_metric_families(self.get("/metrics").text)
        return {sample.name: sample.value for family in families for sample in family.samples}

    def holdings(self) -> Holdings:
        """Return what it holds now."""
        samples = self.samples()
        tasks: dict[int, int] = {}
        for _ in range(100):  # whichever gateway takes the connection answers
            answer = self.get("/debug/tasks").json()
            tasks[answer["pid"]] = answer["count"]
            if len(tasks) == len(self.gateways):
                break
        return Holdings(
            samples["tpserve_num_requests_running"],
            samples["tpserve_num_requests_waiting"],
            samples["tpserve_kv_cache_usage_perc"],
            tasks,
            {process.pid: process.num_fds() for process in (*self.gateways, *self.coordinators)},
        )

    def cpu_s(self) -> list[float]:
        """Return the CPU time of each gateway so far."""
        return [sum(process.cpu_times()[:2]) for process in self.gateways]

    def stop(self) -> int:
        """End it as Ctrl-C does; return its exit code."""
        if not self.children:
            self.process.send_signal(signal.SIGINT)
            return self.process.wait(90)
        for gateway in self.children:
            gateway.terminate()
        codes = [gateway.wait(90) for gateway in self.children]
        self.process.kill()
        self.process.wait(30)
        return max(codes)


def leaks(before: Holdings, after: Holdings) -> list[str]:
    """Say what is there that was not."""
    found = [f"{name} {getattr(after, name):g}" for name in ("running", "waiting", "kv_usage") if getattr(after, name)]
    for what, old, new in (("tasks", before.tasks, after.tasks), ("fds", before.fds, after.fds)):
        found += [f"{what} of pid {pid}: {old[pid]} -> {new[pid]}" for pid in old if new.get(pid, 0) > old[pid]]
    return found


def measure(args: argparse.Namespace, num_gateways: int, log: Path) -> dict[str, Any]:
    """Start a server, load it, and return what was seen."""
    if args.engine == "real":
        server = Server.real(args.model, num_gateways, args.serve_args.split(), log)
    else:
        server = Server.stepping(args.model, num_gateways, args.step_ms, log)
    try:
        asyncio.run(load(server.port, min(args.clients, 32), 2.0))  # imports, pools and caches come now
        before = settled(server, None)
        mixed = Phase.run(server, args.clients, args.seconds, OUTPUT_TOKENS)
        long = None
        if args.long_seconds:
            settled(server, before)
            long = Phase.run(server, args.clients, args.long_seconds, LONG_OUTPUT_TOKENS)
        after = settled(server, before)
    finally:
        code = server.stop()
    send_us = loopback_send_us()
    return {
        "gateway_processes": num_gateways,
        "engine": args.engine,
        "clients": args.clients,
        "leaks": leaks(before, after),
        "exit_code": code,
        "tracebacks": log.read_text(errors="replace").count("Traceback"),
        "loopback_send_us": send_us,
        "mixed": mixed.to_dict(),
        **({} if long is None else {"long": long.to_dict(), **separated(mixed, long)}),
    }


READER = """
import socket, sys
with socket.create_connection(("127.0.0.1", int(sys.argv[1]))) as connection:
    while connection.recv(4096):
        pass
"""


def loopback_send_us() -> float:
    """Return what one small `send` to a process that waits costs this machine; no streamed token is had for less."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        reader = subprocess.Popen([sys.executable, "-c", READER, str(listening.getsockname()[1])])
        out, _ = listening.accept()
    times = []
    with out:
        for _ in range(1000):
            time.sleep(0.0005)  # it waits again
            begin = time.perf_counter()
            out.send(b"x" * 250)
            times.append(time.perf_counter() - begin)
    reader.wait(30)
    return round(1e6 * sorted(times)[len(times) // 2], 1)


@dataclass(frozen=True, slots=True)
class Phase:
    """One load."""

    tally: Tally
    wall_s: float
    num_tokens: float
    spent_s: list[float]
    """CPU time by gateway."""

    @classmethod
    def run(cls, server: Server, num_clients: int, seconds: float, lengths: Lengths) -> Phase:
        """Load the server."""
        tokens, cpu = server.samples()["tpserve_generation_tokens_total"], server.cpu_s()
        begin = time.perf_counter()
        tally = asyncio.run(load(server.port, num_clients, seconds, lengths))
        wall_s = time.perf_counter() - begin
        num_tokens = server.samples()["tpserve_generation_tokens_total"] - tokens
        return cls(tally, wall_s, num_tokens, [new - old for new, old in zip(server.cpu_s(), cpu, strict=True)])

    @property
    def num_requests(self) -> int:
        """Finished or not."""
        return self.tally.num_finished + self.tally.num_hung_up

    def to_dict(self) -> dict[str, Any]:
        """Return what is reported."""
        spent_s = sum(self.spent_s)
        ttft_s = sorted(self.tally.ttft_s)
        return {
            "wall_s": round(self.wall_s, 2),
            "finished": self.tally.num_finished,
            "hung_up": self.tally.num_hung_up,
            "errors": dict(self.tally.errors),
            "tokens": self.num_tokens,
            "tokens_per_request": round(self.num_tokens / max(1, self.num_requests), 1),
            "tokens_per_s": round(self.num_tokens / self.wall_s, 1),
            "gateway_cpu_us_per_token": round(1e6 * spent_s / self.num_tokens, 1),
            "gateway_cpu_load": round(spent_s / self.wall_s, 2),
            "gateway_cpu_share_by_process": [round(value / max(spent_s, 1e-9), 3) for value in self.spent_s],
            "ttft_ms_p50": round(1000 * ttft_s[len(ttft_s) // 2], 1),
        }


def separated(mixed: Phase, long: Phase) -> dict[str, float]:
    """Solve for what a request and what a token costs."""
    (r1, t1, c1), (r2, t2, c2) = [(phase.num_requests, phase.num_tokens, sum(phase.spent_s)) for phase in (mixed, long)]
    determinant = r1 * t2 - r2 * t1
    return {
        "gateway_cpu_us_per_request": round(1e6 * (c1 * t2 - c2 * t1) / determinant, 1),
        "gateway_cpu_us_per_further_token": round(1e6 * (r1 * c2 - r2 * c1) / determinant, 1),
    }


def settled(server: Server, before: Holdings | None) -> Holdings:
    """Return what is held once nothing is left over, or after `SETTLE_S`."""
    deadline = time.perf_counter() + SETTLE_S
    last = server.holdings()
    while time.perf_counter() < deadline:
        time.sleep(0.3)
        now = server.holdings()
        if (now == last and not (now.running or now.waiting)) if before is None else not leaks(before, now):
            return now
        last = now
    return last


def main() -> int:
    """Measure each number of gateway processes; the last line is one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="folder of a small model; its weights are random")
    parser.add_argument("--clients", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--gateway-processes", default="1", help="numbers, by commas")
    parser.add_argument("--long-seconds", type=float, default=15.0, help="of the load of long outputs; 0: none")
    parser.add_argument("--engine", choices=["real", "stepping"], default="real")
    parser.add_argument("--step-ms", type=float, default=10.0, help="of the stepping engine")
    parser.add_argument("--serve-args", default="--load-format dummy --max-num-seqs 64 --max-num-batched-tokens 512")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = [
            measure(args, int(number), Path(folder) / f"server-{number}.log")
            for number in args.gateway_processes.split(",")
        ]
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    result = {
        "commit": git.stdout.strip(),
        "cores": os.cpu_count(),
        "machine": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("fastapi", "grpcio", "starlette", "uvicorn", "uvloop")},
        "arguments": {name: getattr(args, name) for name in ARGUMENTS},
        "runs": runs,
    }
    if args.output is not None:
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    sys.stdout.write(json.dumps(result) + "\n")
    errors = any(run[phase]["errors"] for run in runs for phase in ("mixed", "long") if phase in run)
    return int(errors or any(run["leaks"] or run["exit_code"] or run["tracebacks"] for run in runs))


if __name__ == "__main__":
    sys.exit(main())

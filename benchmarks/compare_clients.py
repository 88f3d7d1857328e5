"""Compares `bench-tp` with an independent client, guidellm, on a running tpserve: they shall measure the same.

Regime: one request after the other, so that the server's own histograms tell how long exactly the measured requests
took. Each client's mean TPOT is divided by the server's over the same requests: other load on the machine moves both,
and the ratio stays. guidellm calls TPOT "inter-token latency". Limit: 2 %.

Run: start `tpserve serve FOLDER --no-prefix-cache --served-model-name demo`, install guidellm in an environment of its
own, then: python benchmarks/compare_clients.py --base-url URL --guidellm PATH --tokenizer FOLDER [--rounds 2]
The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

LIMIT = 0.02
METRICS = {"tpot": "request_time_per_output_token_seconds", "ttft": "time_to_first_token_seconds"}
PROMPT_TOKENS, OUTPUT_TOKENS = 100, 64

Totals = dict[str, tuple[float, float]]
"""Count and sum by metric."""


def totals(url: str) -> Totals:
    """Return what the server has counted."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as reply:
        text = reply.read().decode()
    found = {}
    for key, name in METRICS.items():
        count, total = (
            float(match[1])
            for suffix in ("count", "sum")
            if (match := re.search(rf"^tpserve_{name}_{suffix}{{[^}}]*}} (\S+)", text, re.MULTILINE))
        )
        found[key] = (count, total)
    return found


def watched(url: str, command: list[str], log: Path, environ: dict[str, str]) -> list[Totals]:
    """Run a client; return the server's totals each time they changed."""
    seen = [totals(url)]
    ended = threading.Event()

    def poll() -> None:
        while not ended.wait(0.2):
            now = totals(url)
            if now != seen[-1]:
                seen.append(now)

    poller = threading.Thread(target=poll)
    poller.start()
    try:
        with log.open("wb") as out:
            subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, check=True, timeout=300, env=environ)
        time.sleep(1)
    finally:
        ended.set()
        poller.join()
    return [*seen, totals(url)]


def server_mean_ms(seen: list[Totals], key: str, num_requests: int) -> float:
    """Return the server's mean over the last requests."""
    first = seen[0][key][0]
    sums = {round(now[key][0] - first): now[key][1] for now in seen}
    last = max(sums)
    return (sums[last] - sums[last - num_requests]) / num_requests * 1e3


def row(client: str, tpot_ms: float, ttft_ms: float, seen: list[Totals], num_requests: int) -> dict[str, Any]:
    server_tpot_ms = server_mean_ms(seen, "tpot", num_requests)
    return {
        "client": client,
        "tpot_ms": round(tpot_ms, 3),
        "server_tpot_ms": round(server_tpot_ms, 3),
        "ratio": round(tpot_ms / server_tpot_ms, 5),
        "ttft_ms": round(ttft_ms, 1),
        "server_ttft_ms": round(server_mean_ms(seen, "ttft", num_requests), 1),
    }


def run_bench_tp(url: str, folder: Path, num_requests: int) -> dict[str, Any]:
    """Measure with bench-tp."""
    command = [sys.executable, "-m", "tpserve.coordinator.bench", "--base-url", url, "--model", "demo"]
    command += ["--concurrency", "1", "--num-requests", str(num_requests), "--num-warmups", "1", "--dataset", "fixed"]
    command += ["--input-len", str(PROMPT_TOKENS), "--output-len", str(OUTPUT_TOKENS)]
    command += ["--output-dir", str(folder / "out"), "--no-chart"]
    seen = watched(url, command, folder / "bench-tp.log", dict(os.environ))
    report = (folder / "out/report.txt").read_text()
    tpot, ttft = (re.search(rf"Mean {name} \(ms\):\s+([\d.]+)", report) for name in ("TPOT", "TTFT"))
    assert tpot is not None
    assert ttft is not None
    return row("bench-tp", float(tpot[1]), float(ttft[1]), seen, num_requests)


def run_guidellm(url: str, folder: Path, num_requests: int, binary: Path, tokenizer: Path) -> dict[str, Any]:
    """Measure with guidellm."""
    path = folder / "guidellm.json"
    command = [str(binary), "run", "--profile", "kind=synchronous", "--disable-console-interactive"]
    command += ["--backend", f"kind=openai_http,target={url},model=demo,request_format=/v1/completions"]
    command += ["--constraint", f"kind=max_requests,count={num_requests}", "--output", f"kind=json,path={path}"]
    command += ["--tokenizer", f"kind=huggingface_auto,model={tokenizer}"]
    command += ["--data", f"kind=synthetic_text,prompt_tokens={PROMPT_TOKENS},output_tokens={OUTPUT_TOKENS}"]
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    seen = watched(url, command, folder / "guidellm.log", environ)
    metrics = json.loads(path.read_text())["benchmarks"][0]["metrics"]
    tpot, ttft = (metrics[name]["successful"]["mean"] for name in ("inter_token_latency_ms", "time_to_first_token_ms"))
    return row("guidellm", tpot, ttft, seen, num_requests)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-url", required=True)
    parser.add_argument("--guidellm", type=Path, required=True, help="its command")
    parser.add_argument("--tokenizer", type=Path, required=True, help="Hugging Face folder of the served model")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--num-requests", type=int, default=12)
    args = parser.parse_args()
    rows = []
    for _ in range(args.rounds):
        for client in ("bench-tp", "guidellm"):
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name)
                if client == "bench-tp":
                    rows.append(run_bench_tp(args.base_url, folder, args.num_requests))
                else:
                    rows.append(run_guidellm(args.base_url, folder, args.num_requests, args.guidellm, args.tokenizer))
            print(rows[-1], flush=True)
    worst = max(abs(one["ratio"] - 1) for one in rows)
    print(json.dumps({"benchmark": "compare_clients", "limit": LIMIT, "largest_difference": worst, "rows": rows}))
    return int(worst > LIMIT)


if __name__ == "__main__":
    sys.exit(main())

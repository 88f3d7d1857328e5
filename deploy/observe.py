"""`make observe`: the demo server with two ranks, a Prometheus that watches it, and a load, until Ctrl-C.

Prometheus comes from the machine (apt-get install prometheus). Prints where to look, and every ten seconds what
Prometheus says of the latest half minute.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_RATE = "sum(rate({}[30s]))"
_QUANTILE = "1000 * histogram_quantile({}, sum by (le) (rate({}_bucket[30s])))"
_SHARE = "100 * sum(rate({}[30s])) / sum(rate({}[30s]))"
QUERIES = {
    "running": "sum(tpserve_num_requests_running)",
    "tok/s": _RATE.format("tpserve_generation_tokens_total"),
    "TPOT p50 ms": _QUANTILE.format(0.5, "tpserve_request_time_per_output_token_seconds"),
    "TTFT p99 ms": _QUANTILE.format(0.99, "tpserve_time_to_first_token_seconds"),
    "collectives %": _SHARE.format("tpserve_collective_seconds_total", "tpserve_rank_step_seconds_sum"),
    "host gap %": _SHARE.format("tpserve_host_gap_seconds_sum", "tpserve_step_seconds_sum"),
}
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))
_START_TIMEOUT_S = 600.0


def get(url: str, timeout_s: float = 5) -> Any:
    """Return the JSON at an address."""
    with _OPENER.open(url, timeout=timeout_s) as reply:
        return json.load(reply)


def await_ready(url: str, processes: list[subprocess.Popen[bytes]]) -> None:
    """Wait until an address answers with 200; fail if a process ends before."""
    deadline = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline:
        for process in processes:
            if process.poll() is not None:
                raise SystemExit(f"{process.args!r} ended with status {process.returncode}")
        try:
            with _OPENER.open(url, timeout=2):
                return
        except OSError:
            time.sleep(0.5)
    raise SystemExit(f"{url} was not ready within {_START_TIMEOUT_S:g} s")


def load(url: str, number: int, stop: threading.Event) -> None:
    """Send one request after the other."""
    count = 0
    while not stop.is_set():
        count += 1
        prompt = [(number * 7919 + count * 31 + i) % 40000 + 100 for i in range(60 + 20 * number)]
        body = {"prompt": prompt, "max_tokens": 32 + 16 * (count % 4), "temperature": 0.8, "ignore_eos": True}
        request = urllib.request.Request(
            f"{url}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
        )
        try:
            _OPENER.open(request, timeout=300).read()
        except (urllib.error.HTTPError, OSError):
            stop.wait(1)  # the server says why in its log


def watch(prometheus: str) -> str:
    """Return one line of what Prometheus knows."""
    parts = []
    for name, query in QUERIES.items():
        found = get(f"{prometheus}/api/v1/query?{urllib.parse.urlencode({'query': query})}")["data"]["result"]
        parts.append(f"{name} {float(found[0]['value'][1]):.1f}" if found else f"{name} -")
    return "   ".join(parts)


def main() -> int:
    """Run everything until Ctrl-C, or as long as asked."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="what `tpserve serve` takes")
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--prometheus-port", type=int, default=9090)
    parser.add_argument("--concurrency", type=int, default=4)
    parser.add_argument("--seconds", type=float, help="end after so long (default: at Ctrl-C)")
    args = parser.parse_args()
    binary = shutil.which("prometheus")
    if binary is None:
        raise SystemExit("prometheus is not installed: apt-get install prometheus")
    url, prometheus = f"http://127.0.0.1:{args.port}", f"http://127.0.0.1:{args.prometheus_port}"
    processes: list[subprocess.Popen[bytes]] = []
    stop = threading.Event()
    with tempfile.TemporaryDirectory(prefix="tpserve-observe-") as folder:
        config = (ROOT / "deploy/prometheus/prometheus.yml").read_text()
        config = config.replace("tpserve:8000", f"127.0.0.1:{args.port}")
        config = config.replace("rules.yaml", str(ROOT / "deploy/prometheus/rules.yaml"))
        path = Path(folder) / "prometheus.yml"
        path.write_text(config)
        threads: list[threading.Thread] = []
        try:
            serve = [sys.executable, "-m", "tpserve.cli", "serve", args.model, "--tp", str(args.tp)]
            serve += ["--port", str(args.port), "--max-num-seqs", "8", "--enable-debug"]
            # Sessions of their own: Ctrl-C reaches this process, which ends them in order.
            processes.append(subprocess.Popen(serve, start_new_session=True))
            watcher = [binary, f"--config.file={path}", f"--storage.tsdb.path={folder}/data", "--log.level=warn"]
            watcher.append(f"--web.listen-address=127.0.0.1:{args.prometheus_port}")
            processes.append(subprocess.Popen(watcher, start_new_session=True))
            await_ready(f"{url}/health/ready", processes)
            await_ready(f"{prometheus}/-/ready", processes)
            print(
                f"\nmetrics      {url}/metrics\nPrometheus   {prometheus}\n"
                "boards       deploy/grafana/*.json, to import into Grafana\n"
                f"step trace   curl -o trace.json '{url}/debug/trace?steps=100', then open it at ui.perfetto.dev\n",
                flush=True,
            )
            for number in range(args.concurrency):
                threads.append(threading.Thread(target=load, args=(url, number, stop), daemon=True))
                threads[-1].start()
            end = time.monotonic() + (args.seconds or float("inf"))
            while time.monotonic() < end and all(process.poll() is None for process in processes):
                time.sleep(min(10.0, max(0.0, end - time.monotonic())))
                print(watch(prometheus), flush=True)
        except KeyboardInterrupt:
            pass
        finally:
            stop.set()
            ended = [process for process in processes if process.poll() is not None]
            for process in processes:
                if process not in ended:
                    process.terminate()
            for process in processes:
                process.wait(60)
    return 1 if ended else 0


if __name__ == "__main__":
    sys.exit(main())

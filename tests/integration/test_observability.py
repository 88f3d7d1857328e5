"""What an operator sees of the real server under load: Prometheus, dashboards, rules, spans, JSON logs, step traces."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import yaml

import prometheus
from otlp_receiver import Receiver, Span, grpc_receiver
from scripts import ROOT
from server import MODEL_NAME, Server, command, environment, free_port, until

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT_ID = "00f067aa0ba902b7"
OPERATIONS_PORT = free_port()
MIN_SAMPLES = 6
"""Scrapes before rates are asked for."""


@pytest.fixture(scope="module")
def receiver() -> Iterator[tuple[Receiver, str]]:
    with grpc_receiver() as found:
        yield found


@pytest.fixture(scope="module")
def server(
    tiny_folder: Path, receiver: tuple[Receiver, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    flags = ["--tp", "2", "--load-format", "dummy", "--max-num-seqs", "8", "--log-format", "json", "--enable-debug"]
    flags += ["--metrics-compat", "vllm", "--otlp-traces-endpoint", receiver[1]]
    flags += ["--operations-port", str(OPERATIONS_PORT)]
    flags += ["--draft-model", str(tiny_folder), "--num-speculative-tokens", "2"]
    folder = tmp_path_factory.mktemp("observed")
    with Server.running(tiny_folder, *flags, folder=folder, environ={"OTEL_BSP_SCHEDULE_DELAY": "200"}) as running:
        yield running


@contextlib.contextmanager
def routed(server: Server) -> Iterator[str]:
    """Run a router before the server; give its address."""
    port = free_port()
    flags = ("--backend", server.url, "--port", str(port), "--health-interval", "0.2", "--router-token", "secret")
    router = subprocess.Popen(command("router", *flags), env=environment(server.mark), stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"

    def ready() -> bool:
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"{url}/health/ready", timeout=5).status_code == 200
        return False

    try:
        until(ready, within_s=30, what="the router is ready")
        yield url
        router.terminate()
        assert router.wait(20) == 0
    finally:
        router.kill()
        router.wait(10)


@contextlib.contextmanager
def load(url: str, concurrency: int = 6) -> Iterator[None]:
    """Keep requests in flight, some streamed and some refused."""
    stop = threading.Event()

    def work(number: int) -> None:
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120) as client:
            while not stop.is_set():
                prompt = list(range(10, 60 + number))
                client.completions.create(
                    model=MODEL_NAME, prompt=prompt, max_tokens=32, extra_body={"ignore_eos": True}
                )
                if number == 0:
                    with contextlib.suppress(openai.BadRequestError):
                        client.completions.create(model=MODEL_NAME, prompt=[1], max_tokens=10**6)

    with concurrent.futures.ThreadPoolExecutor(concurrency) as pool:
        futures = [pool.submit(work, number) for number in range(concurrency)]
        try:
            yield
        finally:
            stop.set()
            for future in futures:
                future.result(60)


def panel_expressions() -> dict[str, str]:
    """Return every panel's expressions, with Grafana's variables filled in."""
    return {
        f"{path.stem} / {panel['title']} / {target['refId']}": target["expr"]
        .replace("$model", ".*")
        .replace("$__rate_interval", "10s")
        for path in sorted((ROOT / "deploy/grafana").glob("*.json"))
        for panel in json.loads(path.read_text())["panels"]
        for target in panel["targets"]
    }


@pytest.mark.skipif(prometheus.BINARY is None, reason=prometheus.NEEDS)
def test_every_panel_and_rule_has_data_under_load(server: Server, tmp_path: Path) -> None:
    with routed(server) as url:
        observe(server, url, tmp_path)


def all_positive(observer: prometheus.Prometheus, expression: str) -> bool:
    return all(float(series["value"][1]) > 0 for series in observer.query(expression))


def observe(server: Server, url: str, tmp_path: Path) -> None:
    """Look at everything that is shown of a server behind a router at `url`."""
    target = [{"targets": [f"127.0.0.1:{server.port}"]}]
    router = [{"targets": [url.removeprefix("http://")]}]
    vllm = {"source_labels": ["__name__"], "regex": "vllm:.*"}
    scrapes = [
        {"job_name": "tpserve", "static_configs": target, "metric_relabel_configs": [{**vllm, "action": "drop"}]},
        {"job_name": "compat", "static_configs": target, "metric_relabel_configs": [{**vllm, "action": "keep"}]},
        {"job_name": "router", "static_configs": router},
    ]
    rules = ROOT / "deploy/prometheus/rules.yaml"
    with load(url), prometheus.running_prometheus(tmp_path, scrapes, rules) as observer:
        scraped = 'count_over_time(tpserve_steps_total{job="tpserve"}[1m])'

        def enough() -> bool:
            found = observer.query(scraped)
            return bool(found) and int(found[0]["value"][1]) >= MIN_SAMPLES

        until(enough, within_s=40, what="scrapes")
        until(lambda: observer.query("tpserve:tpot_seconds:p50"), within_s=20, what="recorded rules")
        for name, expression in panel_expressions().items():
            until(partial(observer.query, expression), within_s=30, what=f"data of {name}")
        for rule in observer.rules():
            assert rule["health"] == "ok", rule
            if rule["type"] == "recording":
                assert observer.query(rule["name"]), f"{rule['name']} has no data"
        # The load shows where it should, as numbers.
        values = panel_expressions()
        for name in (
            "tpserve-overview / Output tokens / A",
            "tpserve-latency / Time per output token / A",
            "tpserve-speculation / Step time, with drafts / C",
            "tpserve-collectives / Bandwidth inside collectives / A",
            "tpserve-collectives / Busy / A",
            "tpserve-speculation / Accept rate / A",
            "tpserve-speculation / Accepted by position / A",
            "tpserve-speculation / Time spent on drafting / A",
            "tpserve-router / Replicas that are ready / A",
            "tpserve-router / In flight by replica / A",
        ):
            until(partial(all_positive, observer, values[name]), within_s=30, what=f"more than 0: {name}")
        # vLLM's names arrive with their colon, and with our values.
        for job in ("compat", "tpserve"):
            assert observer.query(f'vllm:generation_tokens_total{{job="{job}"}}'), job
        firing = {rule["name"] for rule in observer.rules() if rule["type"] == "alerting" and rule["state"] == "firing"}
        assert not firing & {"TpserveNotReady", "TpserveStalled", "TpserveGatewayWithoutEngine", "TpserveRankLost"}
        assert not firing & {"TpserveRouterWithoutReplica", "TpserveReplicaNotReady", "TpserveStreamsBroken"}


def test_a_request_is_traced_from_the_client_to_every_rank(server: Server, receiver: tuple[Receiver, str]) -> None:
    reply = httpx.post(
        f"{server.url}/v1/completions",
        headers={"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01", "x-request-id": "traced-1"},
        json={"model": MODEL_NAME, "prompt": [5, 6, 7], "max_tokens": 8, "seed": 3, "ignore_eos": True},
        timeout=60,
    )
    assert reply.status_code == 200, reply.text

    def mine(spans: list[Span]) -> dict[str, list[Span]]:
        found: dict[str, list[Span]] = {}
        for span in spans:
            if span.trace_id == TRACE_ID:
                found.setdefault(span.name.split(" ")[0], []).append(span)
        return found

    def all_there(spans: list[Span]) -> bool:
        found = mine(spans)
        ranks = {span.attributes["tpserve.rank"] for span in found.get("worker.step", ())}
        return {"text_completion", "engine.request"} <= set(found) and ranks == {0, 1}

    spans = mine(receiver[0].wait_for(all_there))
    (gateway,), (engine,) = spans["text_completion"], spans["engine.request"]
    assert gateway.name == f"text_completion {MODEL_NAME}"
    assert gateway.parent_id == PARENT_ID
    assert gateway.kind == 2  # SERVER
    assert (
        gateway.attributes.items()
        >= {
            "gen_ai.operation.name": "text_completion",
            "gen_ai.provider.name": "tpserve",
            "gen_ai.request.model": MODEL_NAME,
            "gen_ai.request.max_tokens": 8,
            "gen_ai.usage.input_tokens": 3,
            "gen_ai.usage.output_tokens": 8,
            "http.response.status_code": 200,
            "tpserve.request_id": "traced-1",
        }.items()
    )
    assert engine.parent_id == gateway.span_id
    assert engine.attributes["tpserve.request_id"] == "traced-1"
    phases = {spans[name][0].span_id for name in ("engine.queue", "engine.prefill", "engine.decode")}
    assert {span.parent_id for span in spans["worker.step"]} <= phases
    assert {span.attributes["tpserve.rank"] for span in spans["worker.step"]} == {0, 1}
    # One clock, as steps lie within the gateway's span: a rank without a core ends late, another clock is years off.
    for span in spans["worker.step"]:
        assert gateway.begin_ns <= span.begin_ns <= span.end_ns <= gateway.end_ns + 5_000_000_000


def test_a_step_trace_loads_in_a_viewer(server: Server) -> None:
    with load(server.url, concurrency=3):
        reply = httpx.get(f"{server.url}/debug/trace", params={"steps": 30, "timeout": 30}, timeout=60)
    assert reply.status_code == 200, reply.text
    assert "attachment" in reply.headers["content-disposition"]
    trace = reply.json()
    assert trace["otherData"]["steps"] == 30
    events = trace["traceEvents"]
    tracks = {event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert tracks == {"coordinator", "rank 0", "rank 1"}
    steps = [event for event in events if event.get("cat") == "step"]
    assert len(steps) == 60
    assert all(event["ph"] == "X" and event["dur"] > 0 and event["args"]["all_reduce"]["us"] > 0 for event in steps)
    assert {event["name"] for event in events if event.get("cat") == "host"} == {
        "schedule",
        "send",
        "update",
        "publish",
    }


@pytest.mark.parametrize(
    ("params", "status", "words"),
    [
        ({"steps": "0"}, 400, "'0'"),
        ({"steps": "many"}, 400, "'many'"),
        ({"steps": "1000000"}, 400, "10000"),
        ({"steps": "5", "timeout": "9999"}, 400, "'9999'"),
        ({"steps": "5", "timeout": "0.3"}, 503, "send requests"),
    ],
)
def test_bad_trace_requests_say_what_to_do(server: Server, params: dict[str, str], status: int, words: str) -> None:
    until(lambda: server.metric("num_requests_running") == 0, within_s=20, what="idle")
    reply = httpx.get(f"{server.url}/debug/trace", params=params, timeout=30)
    assert reply.status_code == status
    assert words in reply.json()["error"]["message"]


def test_the_log_is_json_with_request_and_rank(server: Server) -> None:
    secret = "the words of a prompt"
    reply = httpx.post(
        f"{server.url}/v1/completions",
        headers={"x-request-id": "logged-1"},
        json={"model": MODEL_NAME, "prompt": secret, "max_tokens": 2},
        timeout=60,
    )
    assert reply.status_code == 200

    def lines() -> list[dict[str, Any]]:
        text = [line for line in server.log.splitlines() if line.startswith("{")]
        return [json.loads(line) for line in text]

    until(lambda: any(line.get("request_id") == "logged-1" for line in lines()), within_s=5, what="the line")
    (line,) = (line for line in lines() if line.get("request_id") == "logged-1")
    assert (line["level"], line["process"], line["status"]) == ("INFO", "gateway", 200)
    time.strptime(line["timestamp"][:19], "%Y-%m-%dT%H:%M:%S")
    assert {line["process"] for line in lines()} == {"serve", "coordinator", "gateway"}
    assert {line["rank"] for line in lines() if "rank" in line} == {0, 1}  # what ranks write comes through Ray
    assert secret not in server.log
    others = [line for line in server.log.splitlines() if line and not line.startswith("{")]
    # The curl command at the start belongs to a JSON line; Ray's daemons write in C++ and are not ours to format.
    assert all(" raylet" in line or "ray" in line.lower() for line in others), others


def test_the_compat_names_are_in_the_scrape_and_the_rules_file_is_yaml(server: Server) -> None:
    text = httpx.get(f"{server.url}/metrics", headers={"accept": "application/openmetrics-text"}).text
    assert "\nvllm:num_requests_running{" in text
    assert len(yaml.safe_load((ROOT / "deploy/prometheus/rules.yaml").read_text())["groups"]) == 4


def probes(url: str) -> dict[str, int]:
    """Return the status of every probe."""
    return {name: httpx.get(f"{url}/health/{name}", timeout=10).status_code for name in ("startup", "ready", "live")}


def test_a_stopped_rank_is_told_from_a_busy_and_a_dead_one(server: Server) -> None:
    doors = (server.url, f"http://127.0.0.1:{OPERATIONS_PORT}")
    fine = {"startup": 200, "ready": 200, "live": 200}
    with load(server.url, concurrency=2):
        time.sleep(1)
        assert [probes(door) for door in doors] == [fine, fine], "busy is not ill"
        rank = server.rank_pids()[1]
        os.kill(rank, signal.SIGSTOP)
        try:
            ill = {**fine, "ready": 503}
            until(lambda: [probes(door) for door in doors] == [ill, ill], within_s=20, what="stalled")
            detail = httpx.get(f"{server.url}/health/ready").json()
            assert detail["status"] == "stalled"
            assert "no step has finished" in detail["detail"]
            assert server.metric("engine_state{state=stalled}") == 1
        finally:
            os.kill(rank, signal.SIGCONT)
        until(lambda: [probes(door) for door in doors] == [fine, fine], within_s=20, what="well again")
    assert httpx.get(f"{server.url}/health/other").status_code == 404


def test_the_coordinators_own_door_has_the_engines_metrics_alone(server: Server) -> None:
    text = httpx.get(f"http://127.0.0.1:{OPERATIONS_PORT}/metrics").text
    assert "tpserve_generation_tokens_total{" in text
    assert "tpserve_http_" not in text

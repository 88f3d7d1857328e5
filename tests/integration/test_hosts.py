"""One TP group on two hosts: its answers, a host that is cut off and returns, and a cluster that loses its head."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from tokenizers import Tokenizer

from hosts import DOOR, FIRST, GCS_PORT, RAY_ENVIRON, SECOND, TwoHosts
from patience import patient
from server import MODEL_NAME, REPOSITORY, Outcome, Server, environment, processes_of, run_cli, until

ADDRESS = f"{FIRST}:{GCS_PORT}"
CUT_S = 12.0
"""Longer than ranks wait for each other, and short enough that Ray does not give the host up."""
FLAGS = ("--tp", "2", "--device", "cpu", "--max-num-seqs", "4")
END_TOKEN = 2
GOLDENS = ("capital", "story", "cjk")


@pytest.fixture(scope="module")
def hosts(demo_folder: Path, cache_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoHosts]:
    """Two hosts with Ray, one CPU each; the second has neither the model nor the compiled library."""
    home = tmp_path_factory.mktemp("second-home")
    with TwoHosts.connected(uuid.uuid4().hex, hidden=(demo_folder, cache_home), second_home=home) as hosts:
        hosts.first.start_ray(num_cpus=1)
        hosts.second.start_ray(num_cpus=1)
        yield hosts


@pytest.fixture(scope="module")
def server(
    hosts: TwoHosts, demo_folder: Path, cache_home: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    server = Server(
        demo_folder,
        *FLAGS,
        *("--ray-address", ADDRESS, "--tp-across-nodes", "spread", "--step-timeout", "12", "--replay-timeout", "240"),
        folder=tmp_path_factory.mktemp("server"),
        environ={"TPSERVE_HOME": str(cache_home), **RAY_ENVIRON},
        prefix=hosts.first.inside,
        host=DOOR,
    )
    try:
        server.wait_ready()
        yield server
    finally:
        server.kill_all()


@pytest.fixture(scope="module", autouse=True)
def refused(
    server: Server, hosts: TwoHosts, demo_folder: Path, cache_home: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Future[Outcome]]:
    """A second server that wants all its ranks on one host: it waits half a minute for room, so beside the tests."""
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(
            run_cli,
            *("serve", demo_folder, "--port", "0", "--ray-address", ADDRESS, *FLAGS),
            folder=tmp_path_factory.mktemp("refused"),
            environ={"TPSERVE_HOME": str(cache_home), **RAY_ENVIRON},
            prefix=hosts.first.inside,
            within_s=90,
        )


class Golden:
    """A prompt and the text that transformers gives for it."""

    def __init__(self, folder: Path, name: str) -> None:
        (golden,) = (each for each in json.loads(_goldens()) if each["name"] == name)
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokens = golden["output_token_ids"]
        self.text: str = tokenizer.decode(tokens[: tokens.index(END_TOKEN)] if END_TOKEN in tokens else tokens)
        self._request: dict[str, Any] = {
            "model": MODEL_NAME,
            "prompt": golden["prompt_token_ids"],
            "max_tokens": len(golden["output_token_ids"]),
            "temperature": 0,
            "stream": True,
        }

    def stream(self, client: openai.OpenAI, chunks: list[str]) -> None:
        """Collect the text as it comes."""
        for chunk in client.completions.create(**self._request):
            chunks.append(chunk.choices[0].text)


def _goldens() -> str:
    return json.dumps(json.loads((REPOSITORY / "tests/goldens/smollm2.json").read_text())["prompts"])


def test_answers_are_those_of_one_host(server: Server, hosts: TwoHosts, demo_folder: Path) -> None:
    """The second host was sent what it lacks, runs a rank, and every token is the reference's."""
    assert re.search(r"rank 0: pid \d+ on host-a", server.log)
    assert re.search(r"rank 1: pid \d+ on host-b", server.log)
    for kind in ("model", "library"):
        assert re.search(rf"sent the {kind} to host-b in [\d.]+ s", server.log)
    niceness = min(os.nice(0) + 15, 19)  # Ray adds to its own
    assert f"rank 0 on host-a, rank 1 on host-b run at nice {niceness}: " in server.log
    assert server.metrics()["tpserve_collectives_info{backend=tcp}"] == 1
    with server.client() as client:
        for name in GOLDENS:
            golden, chunks = Golden(demo_folder, name), list[str]()
            golden.stream(client, chunks)
            assert "".join(chunks) == golden.text, name


def test_the_doctor_counts_the_places_of_all_hosts(hosts: TwoHosts, tmp_path: Path) -> None:
    flags = ("--tp", "2", "--device", "cpu", "--ray-address", ADDRESS, "--tp-across-nodes", "pack", "--port", "0")
    draft = ("--draft-model", "d", "--draft-placement", "dedicated")
    outcome = run_cli(
        *("doctor", "--json", *flags, *draft), folder=tmp_path, environ=RAY_ENVIRON, prefix=hosts.first.inside
    )
    found = {finding["check"]: finding for finding in json.loads(outcome.stdout)["checks"]}
    assert found["ray"]["status"] == "ok", outcome.stdout
    ranks = "--tp 2 --draft-placement dedicated --draft-tp 1 takes 3 CPUs on all nodes together"
    assert found["ray-places"]["found"] == f"{ranks}: host-a has 1, host-b has 1"
    assert (outcome.code, found["ray-places"]["status"]) == (1, "fail")


PROBE = """
import json, socket, ssl, sys
host, names = sys.argv[1], {}
for port in map(int, sys.argv[2:]):
    bare = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    bare.check_hostname, bare.verify_mode = False, ssl.CERT_NONE
    with socket.create_connection((host, port), timeout=5) as raw:
        raw.settimeout(2)
        try:
            with bare.wrap_socket(raw) as peer:
                names[port] = [name in peer.getpeercert(True) for name in (b"rank-1.tpserve", b"authority-")]
                try:
                    names[port].append(peer.recv(1).hex())
                except OSError as error:
                    names[port].append(error.reason)
        except OSError:
            pass
print(json.dumps(names))
"""


def test_a_rank_on_another_host_takes_nobody_without_a_certificate(server: Server, hosts: TwoHosts) -> None:
    """Its door for plans is the one port of its process that speaks TLS; Ray's own are Ray's to guard."""
    (pid,) = re.findall(r"rank 1: pid (\d+) on host-b", server.log)[-1:]
    sockets = hosts.second.run("ss", "-ltnpH").splitlines()
    ports = [line.split()[3].rpartition(":")[2] for line in sockets if f"pid={pid}," in line]
    found = json.loads(hosts.first.run(sys.executable, "-c", PROBE, SECOND, *ports))
    ((is_rank_1, is_of_an_authority, heard),) = found.values()
    assert is_rank_1, (found, sockets)
    assert is_of_an_authority
    assert heard in ("", "TLSV13_ALERT_CERTIFICATE_REQUIRED"), "gRPC's first frame, which only members may hear"
    assert "the ranks listen on their nodes' addresses, within mutual TLS" in server.log


def test_a_host_that_is_cut_off_and_returns(server: Server, hosts: TwoHosts, demo_folder: Path) -> None:
    """In mid-stream: the client sees a pause, and then the rest of the very text."""
    golden, chunks, before = Golden(demo_folder, "story"), list[str](), len(server.log)
    with server.client() as client, ThreadPoolExecutor(1) as pool:
        streaming = pool.submit(golden.stream, client, chunks)
        until(lambda: len(chunks) > 5, within_s=20, what="a stream")
        hosts.cut()
        cut_at, seen = time.monotonic(), len(chunks)
        until(lambda: "lost rank" in server.log[before:], within_s=CUT_S, what="the loss of the host")
        assert seen < 60, "the stream was over before the cable was pulled"
        time.sleep(max(0.0, cut_at + CUT_S - time.monotonic()))
        hosts.restore()
        streaming.result(patient(120))
        print(f"the stream went on {time.monotonic() - cut_at:.1f} s after the cut")
    assert "".join(chunks) == golden.text
    lost = re.findall(r"lost rank .*", server.log[before:])[0]  # a slow machine may lose the next group as well
    assert re.match(r"lost rank 1 on host-b: waited for in vain; rank 0 says of step \d+: TimeoutError: rank 0", lost)
    assert len(re.findall("sent the model", server.log)) == 1, "what the host had been sent was there still"
    assert server.health()[0] == 200


def test_what_cannot_be_placed_says_where_there_is_room(refused: Future[Outcome]) -> None:
    """Before a host leaves: one that has joined again has room for a moment."""
    error = refused.result(patient(90)).only_error()
    assert "no Ray node has 2 free CPUs for 2 ranks: " in error
    assert f"host-a ({FIRST}) has 0 of 1 CPUs free" in error
    assert f"host-b ({SECOND}) has 0 of 1 CPUs free" in error
    assert "--tp-across-nodes" in error


def test_a_host_whose_ray_dies_and_is_started_again(server: Server, hosts: TwoHosts, demo_folder: Path) -> None:
    """As a host that is switched off and on: its place is given up, and found again on what has joined."""
    golden, chunks, before = Golden(demo_folder, "explain"), list[str](), len(server.log)
    with server.client() as client, ThreadPoolExecutor(1) as pool:
        streaming = pool.submit(golden.stream, client, chunks)
        until(lambda: len(chunks) > 5, within_s=20, what="a stream")
        hosts.second.kill_all()
        killed_at = time.monotonic()
        hosts.second.start_ray(num_cpus=1)
        streaming.result(patient(120))
        print(f"the stream went on {time.monotonic() - killed_at:.1f} s after the death")
    assert "".join(chunks) == golden.text
    assert re.findall(r"lost rank .*", server.log[before:])[0].startswith("lost rank 1 on host-b: ")


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        (f"{DOOR}:{GCS_PORT}", f"this host is no node of Ray at {DOOR}:{GCS_PORT}, which has .*{FIRST}.*ray start"),
        (f"{DOOR}:1", f"Ray at {DOOR}:1 cannot be joined: .*Connection refused"),
    ],
)
def test_who_cannot_join_is_told_at_once(server: Server, address: str, reason: str) -> None:
    """Left to itself, Ray waits for minutes, or ends the process."""
    code = f"from tpserve.coordinator.ray_nodes import find_own_node; find_own_node({address!r})"
    environ = environment(server.mark, RAY_ENVIRON)
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, timeout=30)
    assert re.match(rf"tpserve.coordinator.errors.ClusterError: {reason}", done.stderr.splitlines()[-1])


def test_a_cluster_that_loses_its_head_ends_the_server(server: Server, hosts: TwoHosts) -> None:
    (head,) = (process for process in processes_of(hosts.mark) if process.name() == "gcs_server")
    before = len(server.log)
    os.kill(head.pid, signal.SIGKILL)
    assert server.process.wait(patient(40)) == 1, server.report("not ended by the loss of Ray's head")
    assert f"Ray has lost its head at {ADDRESS}, which has not answered for 15 s: start the server again" in server.log
    assert "Traceback" not in server.log[before:], server.report("a traceback")
    until(lambda: not processes_of(server.mark), within_s=30, what="the end of all that the server started")

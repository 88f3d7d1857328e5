"""A server behind TLS with keys of their own, started as a user starts it: what it lets in, and what it writes down."""

from __future__ import annotations

import json
import re
import shutil
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import httpx2
import openai
import psutil
import pytest

from certificates import Authority
from patience import patient
from server import MODEL_NAME, Server, environment, processes_of, until
from tpserve.coordinator.engine_door import TOKEN_VARIABLE

PROMPT, ANSWER, KEY, FORCED = "zyxprompt", "zyxanswer", "zyx-key-5e1f", "zyxforced"
ENGINE_TOKEN = "zyx-engine-token"
"""None of them may be found in a log."""
HI = [{"role": "user", "content": f"Hi {PROMPT}"}]


@dataclass(frozen=True, slots=True)
class Door:
    """The server and what belongs to it."""

    server: Server
    authority: Authority
    certfile: Path
    keyfile: Path
    keys: Path

    def context(self) -> ssl.SSLContext:
        context = ssl.create_default_context()
        context.load_verify_locations(self.authority.cert)
        return context

    def http(self, key: str = KEY) -> httpx.Client:
        headers = {"authorization": f"Bearer {key}"}
        return httpx.Client(base_url=self.server.url, headers=headers, verify=self.context(), timeout=60)

    def client(self, key: str = KEY) -> openai.OpenAI:
        return openai.OpenAI(
            base_url=f"{self.server.url}/v1",
            api_key=key,
            max_retries=0,
            http_client=httpx2.Client(verify=self.context(), timeout=60),
        )


@pytest.fixture(scope="module")
def door(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    folder = tmp_path_factory.mktemp("safe")
    authority = Authority.make(folder)
    certfile, keyfile, keys = folder / "tls.crt", folder / "tls.key", folder / "keys"
    for source, target in zip(authority.issue("first"), (certfile, keyfile), strict=True):
        shutil.copy(source, target)
    keys.write_text(f"{KEY} name=alice\nfew name=bob rpm=3 tpm=5000\n")
    flags = ["--load-format", "dummy", "--max-num-seqs", "4", "--max-model-len", "256", "--gateway-processes", "2"]
    flags += ["--log-format", "json", "--enable-debug"]
    flags += ["--ssl-certfile", str(certfile), "--ssl-keyfile", str(keyfile), "--api-key-file", str(keys)]
    # The gateways of this host meet the engine by an address that its certificate does not have.
    engine_cert, engine_key = authority.issue("engine")
    flags += ["--engine-host", "0.0.0.0", "--engine-ssl-certfile", str(engine_cert)]
    flags += ["--engine-ssl-keyfile", str(engine_key), "--engine-ssl-ca-certs", str(authority.cert)]
    server = Server(tiny_folder, *flags, folder=folder, environ={TOKEN_VARIABLE: ENGINE_TOKEN})
    server.url = server.url.replace("http:", "https:")
    try:
        server.wait_ready()
        yield Door(server, authority, certfile, keyfile, keys)
        server.interrupt()
        assert server.process.wait(patient(60)) == 0
        server.footprint.assert_gone(within_s=1)
    finally:
        server.kill_all()


def test_openai_s_client_over_tls_with_a_limit(door: Door) -> None:
    with door.client("few") as client:
        codes, left = [], []
        for _ in range(5):  # each a connection of its own would go to either process: they share the limit
            with door.http("few") as http:
                reply = http.post("/v1/completions", json={"prompt": [5], "max_tokens": 2})
                codes.append(reply.status_code)
                left.append(reply.headers["x-ratelimit-remaining-requests"])
        assert codes == [200, 200, 200, 429, 429]
        assert left == ["2", "1", "0", "0", "0"]
        assert int(reply.headers["retry-after"]) >= 1
        with pytest.raises(openai.RateLimitError, match="3 requests a minute"):
            client.completions.create(model=MODEL_NAME, prompt="a", max_tokens=2)
        assert client.models.list().data[0].id == MODEL_NAME
    with door.http() as http:
        text = http.get("/metrics").text
        assert re.search(r'tpserve_key_requests_total\{key="bob"\} 6\.0', text)
        assert re.search(r'tpserve_key_limited_requests_total\{key="bob",limit="requests"\} 3\.0', text)
        assert re.search(r'tpserve_key_prompt_tokens_total\{key="bob"\} 3\.0', text)


def test_commands_talk_to_it(door: Door, tmp_path: Path) -> None:
    """With a CA of one's own: by a flag, and by the variable that OpenSSL's programs know."""
    environ = environment("nobody", {"SSL_CERT_FILE": str(door.authority.cert)})
    run: dict[str, Any] = {"env": environ, "cwd": tmp_path, "capture_output": True, "text": True, "timeout": 120}
    chat = [*_cli("chat"), "--base-url", door.server.url, "--api-key", KEY, "--set", "max_tokens=3"]
    done = subprocess.run(chat, input=f"Hi {PROMPT}\n", **run)
    assert done.returncode == 0, done.stdout + done.stderr
    bench = [*_cli("bench"), "--base-url", door.server.url, "--api-key", KEY, "--concurrency", "2"]
    bench += ["--dataset", "fixed"]
    bench += [
        "--input-len",
        "8",
        "--output-len",
        "4",
        "--num-requests",
        "4",
        "--no-chart",
        "--output-dir",
        str(tmp_path / "out"),
    ]
    bench += ["--ssl-ca-certs", str(door.authority.cert)]
    done = subprocess.run(bench, **run | {"env": environment("nobody")})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    done = subprocess.run(chat, input="Hi\n", **run | {"env": environment("nobody")})
    assert done.returncode == 1
    assert "CERTIFICATE_VERIFY_FAILED" in done.stderr
    trusting = [*chat, "--ssl-ca-certs", str(door.authority.cert)]
    done = subprocess.run(trusting, input="Hi\n", **run | {"env": environment("nobody")})
    assert done.returncode == 0, done.stdout + done.stderr


def _cli(name: str) -> list[str]:
    return [sys.executable, "-m", "tpserve.cli", name]


def test_new_certificate_and_keys_without_a_restart(door: Door) -> None:
    def subject() -> str:
        raw = socket.create_connection(("127.0.0.1", door.server.port), 10)
        with door.context().wrap_socket(raw, server_hostname="localhost") as tls:
            return str(tls.getpeercert())

    before = [process.pid for process in processes_of(door.server.mark)]
    assert "first" in subject()
    for source, target in zip(door.authority.issue("second"), (door.certfile, door.keyfile), strict=True):
        shutil.copy(source, target)
    door.keys.write_text(f"{KEY} name=alice\nfew name=bob rpm=3 tpm=5000\nadded\n")
    # Each of two processes takes it in by itself.
    until(lambda: all("second" in subject() for _ in range(8)), within_s=20, what="the new certificate")

    def opens() -> bool:
        with door.http("added") as http:
            return http.get("/v1/models").status_code == 200

    until(lambda: all(opens() for _ in range(8)), within_s=20, what="the new key")
    assert [process.pid for process in processes_of(door.server.mark)] == before


SCHEMA = {"type": "object", "properties": {PROMPT: {"const": FORCED}}, "required": [PROMPT]}
CALLS: list[tuple[str, dict[str, Any], set[int]]] = [
    ("/v1/chat/completions", {"messages": HI, "max_tokens": 4}, {200}),
    ("/v1/chat/completions", {"messages": HI, "max_tokens": 4, "stream": True}, {200}),
    ("/v1/chat/completions", {"messages": HI, "max_tokens": 60, "guided_choice": [ANSWER]}, {200}),
    ("/v1/chat/completions", {"messages": HI, "max_tokens": 60, "guided_json": SCHEMA}, {200}),
    ("/v1/chat/completions", {"messages": HI, "guided_regex": f"({PROMPT}"}, {400}),
    ("/v1/chat/completions", {"messages": HI, "guided_grammar": f"root ::= {PROMPT}"}, {400}),
    ("/v1/chat/completions", {"messages": HI, "guided_json": {"type": PROMPT}}, {400}),
    ("/v1/chat/completions", {"messages": HI, "temperature": PROMPT}, {400}),
    ("/v1/chat/completions", {"messages": [{"role": PROMPT, "content": PROMPT}]}, {400}),
    ("/v1/chat/completions", {"messages": HI, "model": PROMPT}, {404}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": PROMPT * 2000}]}, {400}),
    ("/v1/chat/completions", {"messages": HI, "chat_template_kwargs": {"tools": PROMPT}}, {200, 400}),
    ("/v1/chat/completions", {"messages": HI, "stop": PROMPT, "user": PROMPT, "max_tokens": 2}, {200}),
    ("/v1/completions", {"prompt": PROMPT, "max_tokens": 3, "echo": True}, {200}),
    ("/v1/completions", {"prompt": PROMPT, "max_tokens": 30, "guided_choice": [ANSWER], "stream": True}, {200}),
    ("/v1/completions", {"prompt": {PROMPT: 1}}, {400}),
    ("/v1/responses", {"input": PROMPT, "instructions": PROMPT, "max_output_tokens": 4}, {200}),
    ("/v1/responses", {"input": PROMPT, "previous_response_id": PROMPT}, {400}),
    ("/v1/embeddings", {"input": PROMPT}, {200}),
    ("/v1/embeddings", {"input": PROMPT, "dimensions": 3}, {400}),
    ("/tokenize", {"prompt": PROMPT}, {200}),
    ("/tokenize", {"messages": [{"role": "user", "content": PROMPT}]}, {200}),
    ("/detokenize", {"tokens": [10**9], "x": PROMPT}, {200, 400}),
]


def test_no_prompt_answer_or_key_is_written_down(door: Door) -> None:
    answers = ""
    with door.http() as http:
        for path, body, codes in CALLS:
            reply = http.post(path, json=body)
            assert reply.status_code in codes, (path, body, reply.text)
            answers += reply.text
            broken = json.dumps(body)[:-1]
            assert http.post(path, content=broken).status_code == 400
            assert http.post(path, json=body, headers={"authorization": f"Bearer {KEY}x"}).status_code == 401
        assert ANSWER in answers
        assert FORCED in answers
        body = {"messages": HI, "max_tokens": 100, "stream": True}
        with http.stream("POST", "/v1/chat/completions", json=body) as cut:
            next(cut.iter_bytes())  # and leave
        assert http.get("/debug/tasks").status_code == 200
        metrics = http.get("/metrics").text
    log = door.server.log_path.read_text(errors="replace")
    assert "POST /v1/chat/completions 200" in log
    for line in log.splitlines():
        if line.startswith("{"):
            json.loads(line)
    for secret in (PROMPT, ANSWER, KEY, FORCED, ENGINE_TOKEN):
        assert secret not in log
        assert secret not in metrics
    # Nor is it among the arguments of a process, which every user of the host can read.
    seen = 0
    for process in processes_of(door.server.mark):
        try:
            arguments = " ".join(process.cmdline())
        except psutil.Error:
            continue
        seen += 1
        assert KEY not in arguments
        assert ENGINE_TOKEN not in arguments
    assert seen >= 4
    folders = {process.environ().get("PROMETHEUS_MULTIPROC_DIR") for process in processes_of(door.server.mark)}
    for folder in filter(None, folders):
        for file in Path(folder).iterdir():
            content = file.read_bytes()
            assert not any(secret.encode() in content for secret in (PROMPT, ANSWER, KEY, FORCED)), file


def test_nothing_of_it_listens_beyond_loopback(door: Door) -> None:
    listening = {
        (connection.laddr.ip.removeprefix("::ffff:"), " ".join(process.cmdline()[:4]), connection.laddr.port)
        for process in processes_of(door.server.mark)
        for connection in _connections(process)
        if connection.status == psutil.CONN_LISTEN
    }
    assert len(listening) >= 4
    ((_, command, port),) = (found for found in listening if found[0] != "127.0.0.1")
    assert "tpserve.coordinator" in command, "the engine's port, which was to be there"
    bare = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    bare.load_verify_locations(door.authority.cert)
    bare.set_alpn_protocols(["h2"])
    with (
        socket.create_connection(("127.0.0.1", port), 10) as raw,
        bare.wrap_socket(raw, server_hostname="127.0.0.1") as stranger,
    ):
        try:
            heard = stranger.recv(1)
        except ssl.SSLError:
            heard = b""
    assert heard == b"", "gRPC's first frame, which is for those with a certificate"
    commands = [" ".join(process.cmdline()) for process in processes_of(door.server.mark)]
    assert any("log_monitor.py" in command for command in commands), "as Ray's processes are seen here"
    assert not [command for command in commands if "dashboard/dashboard.py" in command or "/monitor.py" in command]


def _connections(process: psutil.Process) -> list[Any]:
    try:
        return list(process.net_connections("inet"))
    except psutil.Error:
        return []

"""The real server, started as a user starts it, watched from outside, and stopped with proof that nothing is left.

Everything that a server starts inherits one environment variable, by which its processes are found whatever became of
their parents.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeVar

import httpx
import openai
import psutil
from prometheus_client.parser import text_string_to_metric_families

from patience import Patience, patient

REPOSITORY = Path(__file__).resolve().parents[1]
MODEL_NAME = "demo"
START_TIMEOUT_S = 240.0
"""The first start in an empty cache compiles kernels and graph."""
_MARK = "TPSERVE_TEST_SERVER"
_POLL_S = 0.05
_LISTEN = "0A"
"""The state of a listening socket in /proc/net/tcp."""

T = TypeVar("T")


def until(probe: Callable[[], T], *, within_s: float, what: str) -> T:
    """Return the first truthy value of `probe`; fail if there is none in time."""
    patience = Patience(within_s)
    while not (value := probe()):
        if patience.is_over():
            raise AssertionError(f"not within {within_s:g} s: {what} (last seen: {value!r})")
        time.sleep(_POLL_S)
    return value


def free_port() -> int:
    """Return a port that nobody listens on, below those that systems give to outgoing connections and to `port 0`.

    One of those may be gone again before a server has started.
    """
    for port in random.SystemRandom().sample(range(20_000, 32_768), 100):
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise AssertionError("none of 100 ports is free")


def environment(mark: str, changes: Mapping[str, str] = {}) -> dict[str, str]:
    """Return the environment of a server: tpserve is found without installation, its processes by `mark`."""
    package = str(REPOSITORY / "deploy/python")
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, _MARK: mark, **changes}


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "tpserve.cli", *map(str, arguments)]


def processes_of(mark: str) -> list[psutil.Process]:
    """Return the living processes that inherited `mark`."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):  # gone meanwhile, or not ours to look at
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(_MARK) == mark:
                found.append(process)
    return found


@dataclass(slots=True)
class Footprint:
    """What a server holds on this machine besides memory."""

    mark: str
    sockets: dict[int, int] = field(default_factory=dict)
    """The port of each listening socket, by the socket's inode: a port alone may be somebody else's a moment later."""
    sessions: set[int] = field(default_factory=set)
    """Of its processes: Ray's agents write their titles over the mark."""
    folders: set[Path] = field(default_factory=set)
    shared_memory: set[Path] = field(default_factory=set)
    ray_folder_was_there: bool = field(default_factory=lambda: Path("/tmp/ray").exists())

    def look(self) -> None:
        """Add what the living processes hold now."""
        for process in processes_of(self.mark):
            with suppress(psutil.Error, OSError):
                self.sessions.add(os.getsid(process.pid))
                text = " ".join([*process.cmdline(), process.environ().get("PROMETHEUS_MULTIPROC_DIR", "")])
                self.folders.update(map(Path, re.findall(r"/tmp/tpserve-[\w-]+", text)))
                self.sockets.update(_listening(process.pid))
                maps = Path(f"/proc/{process.pid}/maps").read_text()
                self.shared_memory.update(map(Path, re.findall(r"/dev/shm/\S+", maps)))

    def processes(self) -> list[psutil.Process]:
        """Return the living processes with the mark, and those of sessions that were seen."""
        others = self.sessions - {os.getsid(0)}
        return list({*processes_of(self.mark), *(each for each in psutil.process_iter() if _session(each) in others)})

    def remains(self) -> list[str]:
        """Say what is still there."""
        found = [f"pid {process.pid}: {' '.join(_cmdline(process))[:200].strip()}" for process in self.processes()]
        found += [str(path) for path in (*self.folders, *self.shared_memory) if path.exists()]
        if not self.ray_folder_was_there and Path("/tmp/ray").exists():
            found.append("/tmp/ray")
        listening = _listening_sockets()
        return found + [f"port {port}" for inode, port in self.sockets.items() if inode in listening]

    def assert_gone(self, within_s: float) -> None:
        patience = Patience(within_s)
        while remains := self.remains():
            assert not patience.is_over(), f"{within_s:g} s after the end there is still: {remains}"
            time.sleep(_POLL_S)


def _session(process: psutil.Process) -> int | None:
    """Return the session of a living process."""
    with suppress(psutil.Error, OSError):
        if process.status() != psutil.STATUS_ZOMBIE:
            return os.getsid(process.pid)
    return None


def _cmdline(process: psutil.Process) -> list[str]:
    with suppress(psutil.Error):
        return process.cmdline()
    return []


def _listening_sockets(pid: int | str = "self") -> dict[int, int]:
    """Return the ports of all listening TCP sockets in the network namespace of a process, by the sockets' inodes."""
    found = {}
    tables = [Path(f"/proc/{pid}/net/{name}") for name in ("tcp", "tcp6")]
    for table in filter(Path.exists, tables):  # a system may be without IPv6
        for line in table.read_text().splitlines()[1:]:
            columns = line.split()  # 1: address and port in hexadecimal, 3: the state, 9: the inode
            if columns[3] == _LISTEN:
                found[int(columns[9])] = int(columns[1].rpartition(":")[2], 16)
    return found


def _listening(pid: int) -> dict[int, int]:
    """Return the ports on which a process itself listens, by its sockets' inodes."""
    held = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            held.add(str(entry.readlink()))
    return {inode: port for inode, port in _listening_sockets(pid).items() if f"socket:[{inode}]" in held}


class Server:
    """One `tpserve serve` process with all that it starts. Its output goes to a file.

    Parameters
    ----------
    flags
        Flags of `tpserve serve`; a free port and the model name `demo` are added.
    prefix
        A command that runs another, to start it by.
    host
        The address that it listens on.
    """

    def __init__(
        self,
        model: str | Path,
        *flags: str,
        folder: Path,
        environ: Mapping[str, str] = {},
        prefix: Sequence[str] = (),
        host: str = "127.0.0.1",
    ) -> None:
        self.mark = uuid.uuid4().hex
        self.footprint = Footprint(self.mark)
        self.port = free_port()
        self.url = f"http://{host}:{self.port}"
        self.api_key = flags[flags.index("--api-key") + 1] if "--api-key" in flags else "none"
        self.log_path = folder / f"server-{self.mark[:8]}.log"
        names = () if "--served-model-name" in flags else ("--served-model-name", MODEL_NAME)
        arguments = command("serve", model, "--host", host, "--port", str(self.port), *names, *flags)
        self.started_at = time.monotonic()
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                [*prefix, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment(self.mark, environ),
                cwd=folder,  # not the repository: nothing may be found by the working directory
                start_new_session=True,
            )

    @classmethod
    @contextmanager
    def running(cls, model: str | Path, *flags: str, folder: Path, environ: Mapping[str, str] = {}) -> Iterator[Self]:
        """Start, wait until healthy, and stop as Ctrl-C does; then nothing may be left."""
        server = cls(model, *flags, folder=folder, environ=environ)
        try:
            server.wait_ready()
            yield server
            assert server.process.poll() is None, server.report("the server ended on its own")
            server.interrupt()
            assert server.process.wait(patient(60)) == 0, server.report("the exit code of a stopped server is not 0")
            server.footprint.assert_gone(within_s=1)
        finally:
            server.kill_all()

    @property
    def log(self) -> str:
        """Everything written so far, without colours."""
        return re.sub(r"\x1b\[[0-9;]*m", "", self.log_path.read_text(errors="replace"))

    def report(self, what: str) -> str:
        return f"{what}; its log:\n{self.log[-6000:]}"

    def wait_ready(self, within_s: float = START_TIMEOUT_S) -> None:
        def ready() -> bool:
            assert self.process.poll() is None, self.report("the server ended while it started")
            return "Ready at" in self.log

        try:
            until(ready, within_s=within_s, what="ready")
        except AssertionError as error:
            raise AssertionError(self.report(str(error))) from None
        self.footprint.look()

    def interrupt(self) -> None:
        """Press Ctrl-C."""
        self.footprint.look()
        os.killpg(self.process.pid, signal.SIGINT)  # a terminal signals the whole foreground group

    def kill_all(self) -> None:
        """End whatever a failed test left, so that it disturbs no other."""
        self.footprint.look()
        for process in self.footprint.processes():
            with suppress(psutil.Error):
                process.kill()
        self.process.wait(patient(30))
        for folder in self.footprint.folders:
            shutil.rmtree(folder, ignore_errors=True)

    # ---- what a client sees

    def client(self) -> openai.OpenAI:
        """Return the official client, which must not retry on its own here."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.api_key, max_retries=0, timeout=patient(120))

    def async_client(self) -> openai.AsyncOpenAI:
        """Like `client`, for many requests at once."""
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key=self.api_key, max_retries=0, timeout=patient(120))

    def health(self) -> tuple[int, dict[str, Any]]:
        reply = httpx.get(f"{self.url}/health", timeout=10)
        body: dict[str, Any] = reply.json()
        return reply.status_code, body

    def metrics(self) -> dict[str, float]:
        """Return every sample by name, labels other than the model's name and the replica's number in braces."""
        text = httpx.get(f"{self.url}/metrics", timeout=10).text
        samples = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                labels = ",".join(
                    f"{key}={value}"
                    for key, value in sorted(sample.labels.items())
                    if key not in ("model_name", "engine")
                )
                samples[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
        return samples

    def metric(self, name: str) -> float:
        return self.metrics()[f"tpserve_{name}"]

    # ---- what its log says

    def rank_pids(self) -> dict[int, int]:
        """Return the pids of the latest group by rank."""
        return {int(rank): int(pid) for rank, pid in re.findall(r"rank (\d+): pid (\d+) on", self.log)}

    def process_pid(self, module: str) -> int:
        """Return the pid of the process that runs a module."""
        (pid,) = (process.pid for process in processes_of(self.mark) if ["-m", module] == _cmdline(process)[1:3])
        return pid


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a command."""

    code: int
    stdout: str
    stderr: str
    duration_s: float

    def only_error(self) -> str:
        """Return the one line that says what is wrong; there must be exactly one and no traceback."""
        assert self.code != 0, f"the command succeeded:\n{self.stdout}{self.stderr}"
        assert "Traceback" not in self.stderr, self.stderr
        # As every command of ours says it; a log may quote another library's "error: ".
        lines = [line for line in self.stderr.splitlines() if re.search(r"tpserve( \w+)?: error: ", line)]
        assert len(lines) == 1, f"{len(lines)} lines with an error:\n{self.stderr}"
        return lines[0]


def run_cli(
    *arguments: str | Path,
    folder: Path,
    environ: Mapping[str, str] = {},
    within_s: float = START_TIMEOUT_S,
    prefix: Sequence[str] = (),
) -> Outcome:
    """Run a command, by the command `prefix`, to its end; nothing of it may be left."""
    mark = uuid.uuid4().hex
    footprint = Footprint(mark)
    started_at = time.monotonic()
    with subprocess.Popen(
        [*prefix, *command(*arguments)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(mark, environ),
        cwd=folder,
        start_new_session=True,
    ) as process:
        try:
            stdout, stderr = _communicate(process, footprint, within_s)
        finally:
            for left in processes_of(mark) if process.poll() is None else []:
                with suppress(psutil.Error):
                    left.kill()
    duration_s = time.monotonic() - started_at
    footprint.assert_gone(within_s=2)
    return Outcome(process.returncode, stdout, stderr, duration_s)


def _communicate(process: subprocess.Popen[str], footprint: Footprint, within_s: float) -> tuple[str, str]:
    patience = Patience(within_s)
    while True:
        try:
            return process.communicate(timeout=0.5)
        except subprocess.TimeoutExpired:
            footprint.look()
            assert not patience.is_over(), f"{process.args!r} did not end in time"


def json_line(text: str) -> dict[str, str]:
    """Return the one line of JSON that a command prints."""
    (line,) = text.splitlines()
    value: dict[str, str] = json.loads(line)
    return value


def chat_text(client: openai.OpenAI, prompt: str, **options: Any) -> str:
    """Return the text of a chat of one message, greedy unless said otherwise."""
    reply = client.chat.completions.create(**chat_request(prompt, **options))
    return reply.choices[0].message.content or ""


def together(*calls: Callable[[], T]) -> list[T]:
    """Return what each call returns, all at once: a batch takes little longer than what is alone in it."""
    with ThreadPoolExecutor(len(calls)) as pool:
        return [call.result() for call in [pool.submit(call) for call in calls]]


def chat_request(prompt: str, **options: Any) -> dict[str, Any]:
    messages: Sequence[Mapping[str, str]] = [{"role": "user", "content": prompt}]
    return {"model": MODEL_NAME, "messages": messages, "temperature": 0, "max_tokens": 24, **options}

"""`tpserve serve MODEL --replicas N`: N replicas on one Ray, each a `tpserve serve` of its own, behind one router.

Starts, watches and replaces processes; knows nothing of requests. A replica that ends is started again, with growing
pauses; so is the router. SIGTERM drains the router and then ends the replicas; SIGHUP, or POST /admin/rolling-restart,
replaces every replica in turn: each only when all others are ready, its streams going on elsewhere if they are not done
within --drain-timeout.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from tpserve.coordinator.children import (
    RAY_ON_LOOPBACK,
    AlreadyTold,
    ServeError,
    first_words,
    last_words,
    ray_environment,
    require_free_port,
)
from tpserve.coordinator.engine_choice import choose_engine
from tpserve.coordinator.errors import ClusterError
from tpserve.coordinator.log import configure
from tpserve.coordinator.model_build import ModelBuild
from tpserve.coordinator.process import bind, end_with_parent, make_ray_temp_dir, remove_folder
from tpserve.coordinator.replica_memory import num_ranks
from tpserve.coordinator.router.arguments import ADMIN_VARIABLE, TOKEN_VARIABLE
from tpserve.coordinator.serve import check_doors, curl, default_names, local_opener
from tpserve.proto.manifest import ManifestError

logger = logging.getLogger(__name__)

_POLL_S = 0.1
_HEALTH_EVERY_S = 0.3
_KILL_AFTER_S = 20.0
"""After its drain time, a replica gets this long to end its ranks."""
_WITHOUT_RAY_S = 2.0
"""Without Ray there are no ranks: replicas have nothing to wait for, and would wait for Ray."""
_FIRST_BACKOFF_S, _MAX_BACKOFF_S = 0.5, 30.0
_MAX_FAILED_STARTS = 5
"""Of one replica, in a row, without having been ready."""


@dataclass(slots=True, eq=False)
class _Child:
    """A process that is kept alive."""

    name: str
    command: list[str]
    environment: Mapping[str, str]
    process: subprocess.Popen[str] | None = None
    was_ready: bool = False
    """Since it was started."""
    is_stopping: bool = False
    """It was asked to end."""
    kill_at: float = 0.0
    """When one that is stopping is killed; the monotonic clock."""
    num_failed_starts: int = 0
    start_at: float = 0.0
    """When one that has ended is started again."""

    @property
    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def start(self) -> None:
        # A session of its own: Ctrl-C reaches this process alone, which then ends the others in order.
        self.process = subprocess.Popen(
            self.command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if self.name == "router" else None,
            text=True,
            env=os.environ | dict(self.environment),
            start_new_session=True,
        )
        self.was_ready = self.is_stopping = False

    def stop(self, within_s: float) -> None:
        if self.is_running and not self.is_stopping:
            assert self.process is not None
            self.is_stopping = True
            self.kill_at = time.monotonic() + within_s
            self.process.terminate()


class Fleet:
    """The replicas, their Ray and their router.

    Parameters
    ----------
    args
        Of `tpserve serve`, with `argv`: the command line that they were read from.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._stopping = False
        self._wants_restart = False
        self._to_replace: deque[_Child] = deque()
        self._replacing: _Child | None = None
        self._ray: subprocess.Popen[str] | None = None
        self._ray_folder: Path | None = None
        self._limits_folder: Path | None = None
        """In which the replicas' gateways keep what each API key has used."""
        self._environment: dict[str, str] = {}
        self._replicas: list[_Child] = []
        self._held_ports: list[socket.socket] = []
        """Bound and never listening: a replica can listen there, and no connection is given one of them meanwhile."""
        self._ports: list[int] = []
        self._router: _Child | None = None
        self._url = ""
        self._is_ready: dict[int, bool] = {}
        """By port, as the router says."""
        self._next_look = 0.0
        self._was_all_ready = False
        self._opener = local_opener()

    def on_signal(self, signum: int, frame: FrameType | None) -> None:
        """Begin to stop; a second signal waits for nothing."""
        if self._stopping:
            for child in self._children:
                if child.is_running:
                    assert child.process is not None
                    child.process.send_signal(signal.SIGINT if child in self._replicas else signal.SIGKILL)
        self._stopping = True

    def on_hangup(self, signum: int, frame: FrameType | None) -> None:
        """Begin to replace every replica."""
        self._wants_restart = True

    @property
    def _children(self) -> list[_Child]:
        return [*self._replicas, *([] if self._router is None else [self._router])]

    # ---- the beginning

    def start(self) -> None:
        """Start Ray, the router and the first replica; the others follow once what they share is compiled.

        Raises
        ------
        ServeError, ClusterError, ManifestError
            If something cannot be started.
        """
        args = self._args
        if args.no_gateway:
            raise ServeError("--replicas needs a gateway for each replica: leave --no-gateway out")
        check_doors(args)
        if args.ssl_client_auth == "required":
            raise ServeError("--ssl-client-auth required: with --replicas it can only be optional or none")
        require_free_port("", args.host, args.port)
        self._look_at_model()
        self._limits_folder = Path(tempfile.mkdtemp(prefix="tpserve-limits-"))
        token = args.router_token or os.urandom(24).hex()
        self._environment = {TOKEN_VARIABLE: token}
        address = args.ray_address or self._start_ray()
        self._held_ports = [bind("127.0.0.1", 0) for _ in range(args.replicas)]
        self._ports = [bound.getsockname()[1] for bound in self._held_ports]
        self._replicas = [self._make_replica(number, address) for number in range(args.replicas)]
        self._router = self._make_router()
        self._start_router()
        self._replicas[0].start()

    def _look_at_model(self) -> None:
        """See that the model can be served, as each replica does, before there is a Ray to start them on."""
        args = argparse.Namespace(**vars(self._args) | {"replica": (0, self._args.replicas)})
        built: list[Path] = []
        try:
            ModelBuild(args, built, lambda: self._stopping).look(choose_engine(args))
        finally:
            for folder in built:
                remove_folder(folder)

    def _start_ray(self) -> str:
        self._ray_folder = make_ray_temp_dir()
        # The replicas, too, must know the secret of this Ray, and that it is on loopback.
        self._environment |= RAY_ON_LOOPBACK | {
            name: value for name, value in ray_environment(None).items() if name.startswith("RAY_AUTH_")
        }
        args = self._args
        config = {
            "num_ranks": args.replicas * num_ranks(args),
            "temp_dir": str(self._ray_folder),
            "log_format": self._args.log_format,
            "drain_timeout_s": self._args.drain_timeout,
            "parent_pid": os.getpid(),
        }
        self._ray = subprocess.Popen(
            [sys.executable, "-m", "tpserve.coordinator.router.ray_head", json.dumps(config)],
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env=os.environ | ray_environment(None) | self._environment,
        )
        return first_words("Ray", self._ray, "address")

    def _make_replica(self, number: int, ray_address: str) -> _Child:
        args = self._args
        command = [sys.executable, "-m", "tpserve.cli", *args.argv]
        # Of a flag that is given twice the last one counts.
        command += ["--replicas", "1", "--replica", f"{number}/{args.replicas}", "--parent-pid", str(os.getpid())]
        command += ["--host", "127.0.0.1", "--port", str(self._ports[number]), "--ray-address", ray_address]
        command += ["--limits-dir", str(self._limits_folder)]
        if args.ray_address is None:
            command.append("--ray-of-replicas")
        if args.operations_port is not None:
            command += ["--operations-port", str(args.operations_port + number)]
        if args.engine_port:
            command += ["--engine-port", str(args.engine_port + number)]
        return _Child(f"replica {number}", command, self._environment)

    def _make_router(self) -> _Child:
        args = self._args
        command = [sys.executable, "-m", "tpserve.cli", "router", "--host", args.host, "--port", str(args.port)]
        for port in self._ports:
            command += ["--backend", f"http://127.0.0.1:{port}"]
        command += ["--policy", args.policy, "--max-queued", str(args.max_queued), "--max-moves", str(args.max_moves)]
        command += ["--max-connections", str(args.max_connections)]
        command += ["--max-inflight-per-backend", str(args.max_inflight_per_backend)]
        command += ["--queue-timeout", str(args.queue_timeout), "--drain-timeout", str(args.drain_timeout)]
        command += ["--log-format", args.log_format, "--merge-metrics", "--parent-pid", str(os.getpid())]
        for name in ("certfile", "keyfile", "keyfile_password_file", "ca_certs", "client_auth"):
            if (value := getattr(args, f"ssl_{name}")) is not None:
                command += [f"--ssl-{name.replace('_', '-')}", str(value)]
        admin = {} if args.admin_token is None else {ADMIN_VARIABLE: args.admin_token}
        return _Child("router", command, self._environment | admin)

    def _start_router(self) -> None:
        assert self._router is not None
        self._router.start()
        assert self._router.process is not None
        self._url = first_words("router", self._router.process, "url")
        # Started again, it takes the same port, whichever that was.
        self._router.command[self._router.command.index("--port") + 1] = self._url.rpartition(":")[2]

    # ---- the middle

    def watch(self) -> int:
        """Keep everything alive until a signal; return the exit code.

        Raises
        ------
        ServeError
            If Ray is lost, or a replica cannot be started again and again.
        """
        while not self._stopping:
            if self._ray is not None and self._ray.poll() is not None:
                assert self._ray.stdout is not None
                raise ServeError(last_words("Ray", self._ray, self._ray.stdout.readline()))
            now = time.monotonic()
            for child in self._children:
                self._care_for(child, now)
            if now >= self._next_look:
                self._look()
                self._next_look = time.monotonic() + _HEALTH_EVERY_S
            self._replace_next()
            time.sleep(_POLL_S)
        return 0

    def _care_for(self, child: _Child, now: float) -> None:
        if child.process is None:
            if child.start_at and now >= child.start_at:
                child.start_at = 0.0
                self._start_router() if child is self._router else child.start()
            return
        if child.is_running:
            if child.is_stopping and now >= child.kill_at:
                logger.warning("%s did not end in time and is killed", child.name)
                child.process.kill()
            return
        status = child.process.returncode
        child.process = None
        if child.is_stopping:
            child.start_at = now
            return
        if child.was_ready:
            child.num_failed_starts = 0
        child.num_failed_starts += 1
        if child in self._replicas and not self._was_all_ready and not child.was_ready:
            logger.error("%s could not be started: its own words are above", child.name)
            raise AlreadyTold(f"{child.name} could not be started")
        if child.num_failed_starts > _MAX_FAILED_STARTS:
            raise ServeError(f"{child.name} ended {_MAX_FAILED_STARTS} times in a row before it was ready")
        pause_s = min(_FIRST_BACKOFF_S * 2 ** (child.num_failed_starts - 1), _MAX_BACKOFF_S)
        child.start_at = now + pause_s
        logger.error("%s ended with status %s; it is started again in %g s", child.name, status, pause_s)

    def _look(self) -> None:
        """Ask the router which replicas are ready."""
        self._is_ready = {}
        try:
            with self._opener.open(f"{self._url}/health", timeout=2) as reply:
                text = reply.read()
        except urllib.error.HTTPError as error:
            text = error.read()
        except OSError:
            return
        for replica in json.loads(text)["replicas"]:
            self._is_ready[int(replica["name"].rpartition(":")[2])] = replica["ready"]
        for port, child in zip(self._ports, self._replicas, strict=True):
            child.was_ready |= self._is_ready.get(port, False) and child.is_running and not child.is_stopping
        if self._router is not None:
            self._router.was_ready = True
        if self._replicas[0].was_ready and not self._was_all_ready:
            for child in self._replicas[1:]:
                if child.process is None and not child.start_at:
                    child.start()
        if not self._was_all_ready and all(child.was_ready for child in self._replicas):
            self._was_all_ready = True
            args = self._args
            names = args.served_model_name or default_names(args.model)
            with_key = bool(args.api_key or args.api_key_file)
            logger.info("Ready at %s\n\n%s\n", self._url, curl(self._url, names[0], with_key))

    def _replace_next(self) -> None:
        """Go on with a rolling replacement: one replica at a time, and only while all others are ready."""
        if self._wants_restart and self._was_all_ready:
            self._wants_restart = False
            if self._to_replace or self._replacing is not None:
                logger.warning("replicas are being replaced already")
            else:
                logger.info("replacing %d replicas, one after the other", len(self._replicas))
                self._to_replace.extend(self._replicas)
        are_ready = [
            child.was_ready and child.is_running and not child.is_stopping and self._is_ready.get(port, False)
            for port, child in zip(self._ports, self._replicas, strict=True)
        ]
        if not all(are_ready):
            return
        if self._replacing is not None:
            logger.info("%s is replaced", self._replacing.name)
            self._replacing = None
            if not self._to_replace:
                logger.info("all replicas are replaced")
        if self._to_replace:
            self._replacing = self._to_replace.popleft()
            self._replacing.stop(self._args.drain_timeout + _KILL_AFTER_S)

    # ---- the end

    def stop(self) -> None:
        """End the router, which drains, then the replicas, then Ray."""
        self._stopping = True
        within_s = self._args.drain_timeout + _KILL_AFTER_S
        has_lost_ray = self._ray is not None and self._ray.poll() is not None
        _end([] if self._router is None else [self._router], within_s)
        _end(self._replicas, within_s, _WITHOUT_RAY_S if has_lost_ray else None)
        if self._ray is not None and self._ray.poll() is None:
            self._ray.terminate()
            try:
                self._ray.wait(_KILL_AFTER_S)
            except subprocess.TimeoutExpired:
                self._ray.kill()
                self._ray.wait()
        for folder in (self._ray_folder, self._limits_folder):
            if folder is not None:
                remove_folder(folder)


def _end(children: Sequence[_Child], within_s: float, patient_s: float | None = None) -> None:
    """Ask processes to end; a second time, after which they wait for nothing, when `patient_s` have passed."""
    for child in children:
        child.stop(within_s)
    deadline = time.monotonic() + within_s
    if patient_s is not None:
        again = time.monotonic() + patient_s
        while any(child.is_running for child in children) and time.monotonic() < again:
            time.sleep(_POLL_S)
        for child in children:
            if child.is_running:
                assert child.process is not None
                child.process.terminate()
    for child in children:
        if child.process is None:
            continue
        try:
            child.process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            logger.warning("%s did not end in time and is killed", child.name)
            child.process.kill()
            child.process.wait()


def main(args: argparse.Namespace) -> int:
    """Serve until a signal or a failure; return the exit code."""
    configure(args.log_format, "serve")
    fleet = Fleet(args)
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, fleet.on_signal)
    signal.signal(signal.SIGHUP, fleet.on_hangup)
    if args.parent_pid is not None:
        end_with_parent(args.parent_pid)
    try:
        fleet.start()
        return fleet.watch()
    except (ServeError, ClusterError, ManifestError) as error:
        if not isinstance(error, AlreadyTold):
            logger.error("tpserve serve: error: %s", error)
        return 1
    finally:
        fleet.stop()

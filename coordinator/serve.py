"""`tpserve serve MODEL`: prepare the model, then run coordinator and gateway as processes and watch over them."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import signal
import socket
import ssl
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path
from types import FrameType
from typing import Any

from tpserve.coordinator.children import (
    AlreadyTold,
    ServeError,
    first_words,
    last_words,
    ray_environment,
    require_free_port,
    spawn_child,
)
from tpserve.coordinator.engine_choice import choose_engine
from tpserve.coordinator.engine_door import EngineDoor, door_fields, own_door
from tpserve.coordinator.errors import ClusterError
from tpserve.coordinator.gateway.config import ConfigError
from tpserve.coordinator.gateway.keys import KeyRing
from tpserve.coordinator.gateway.tls import TlsError, tls_files_of
from tpserve.coordinator.gateway_keeper import GatewayKeeper, GatewayLost, gateways_beside_gpus
from tpserve.coordinator.host_limits import usable_cpus
from tpserve.coordinator.log import configure
from tpserve.coordinator.memory import limit_to_own_draft, plan_memory
from tpserve.coordinator.model_build import ModelBuild
from tpserve.coordinator.process import (
    bind,
    end_with_parent,
    kill_session,
    make_ray_temp_dir,
    remove_folder,
    tell_parent,
)
from tpserve.proto.manifest import ManifestError

logger = logging.getLogger(__name__)

MAX_STALL_AFTER_S = 5.0
"""A step without a result for longer, or for a third of its deadline, makes the engine STALLED."""
_POLL_S = 0.1
_KILL_AFTER_S = 10.0
"""After its drain time a process that is still there is killed."""


def main(args: argparse.Namespace) -> int:
    """Serve until a signal or a failure; return the exit code."""
    if args.replicas > 1:
        from tpserve.coordinator.router.fleet import main as fleet_main  # which starts this module again for each

        return fleet_main(args)
    number, num_replicas = args.replica
    configure(args.log_format, "serve" if num_replicas == 1 else f"replica {number}")
    server = _Server(args)
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, server.on_signal)
    if args.parent_pid is not None:
        end_with_parent(args.parent_pid)
    try:
        server.start()
        return server.watch()
    except (ServeError, ClusterError, ManifestError, TlsError) as error:
        # One clear line; what led to it is in the log above.
        if not isinstance(error, AlreadyTold):
            logger.error("tpserve serve: error: %s", error)
        if args.no_gateway:
            tell_parent(error=str(error))
        return 1
    finally:
        server.stop()


class _Server:
    """The processes of one replica and the order in which they come and go."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._stopping = False
        self._coordinator: subprocess.Popen[str] | None = None
        self._keeper: GatewayKeeper | None = None
        self._engine_door: EngineDoor | None = None
        self._folders: list[Path] = []
        """Removed in the end."""
        self._build = ModelBuild(args, self._folders, lambda: self._stopping)

    @property
    def _gateways(self) -> list[subprocess.Popen[str]]:
        return self._keeper.processes if self._keeper is not None else []

    def on_signal(self, signum: int, frame: FrameType | None) -> None:
        """Begin to stop; a second signal does not wait for running requests."""
        if self._stopping:
            for process in (*self._gateways, self._coordinator):
                if process is not None and process.poll() is None:
                    process.kill()
        self._stopping = True

    def start(self) -> None:
        """Bring everything up to the first healthy answer."""
        args = self._args
        if args.tp_across_nodes is not None and args.ray_address is None:
            raise ServeError("--tp-across-nodes needs --ray-address: a Ray that is started here has one node")
        self._engine_door = own_door(args)
        if not args.no_gateway:
            check_doors(args)
            require_free_port("", args.host, args.port)
        require_free_port("engine-", args.engine_host, args.engine_port)
        if args.operations_port is not None:
            require_free_port("operations-", args.operations_host or args.engine_host, args.operations_port)
        choice, folders = self._build.look(choose_engine(args))
        on_gpu, rank_bytes, speculation = choice.on_gpu, choice.rank_bytes, choice.speculation
        max_num_seqs, max_num_batched_tokens = choice.max_num_seqs, choice.max_num_batched_tokens
        if args.gateway_processes is None:
            args.gateway_processes = gateways_beside_gpus(usable_cpus() // args.replica[1]) if on_gpu else 1
        num_draft_ranks = 0 if speculation is None else speculation.num_draft_ranks
        folders, manifest = self._build.model(choice, folders)
        draft_folders, draft = self._build.draft(choice, folders, manifest)
        has_own_gpus = on_gpu and num_draft_ranks > 0
        memory = plan_memory(
            manifest,
            args.mode,
            max_num_seqs,
            args.gpu_memory_utilization,
            rank_bytes,
            draft=None if has_own_gpus else draft,
            draft_share=1.0 if not num_draft_ranks else num_draft_ranks / args.tp,
        )
        if draft is not None and has_own_gpus:
            memory = limit_to_own_draft(memory, manifest, draft, args.gpu_memory_utilization, rank_bytes)
        logger.info(
            'Under mode "%s", max batch size will be set to %d, max KV cache token capacity will be set to %d, '
            "prefill chunk size will be set to %d.",
            args.mode,
            max_num_seqs,
            memory.num_pages * manifest.kv.page_size,
            max_num_batched_tokens,
        )
        logger.info(
            "Estimated total memory usage of each rank: %.1f MB (Parameters: %.1f MB. KVCache: %.1f MB. "
            "Temporary buffer: %.1f MB)",
            memory.total_bytes / 2**20,
            memory.parameter_bytes / 2**20,
            memory.kv_bytes / 2**20,
            memory.workspace_bytes / 2**20,
        )
        names = args.served_model_name or default_names(args.model)
        sizes: dict[str, Any] = {"num_pages": memory.num_pages, "max_num_seqs": max_num_seqs}
        sizes["max_num_batched_tokens"] = max_num_batched_tokens
        sizes["num_threads"] = max(1, usable_cpus() // ((args.tp + num_draft_ranks) * args.replica[1]))
        if speculation is not None:
            sizes |= speculation.config(draft_folders, args.load_format)
        engine_address = self._start_coordinator(folders, names[0], sizes)
        if self._stopping:
            return
        if args.no_gateway:
            self._await_engine(engine_address)
            if not self._stopping:
                logger.info("The engine is ready at %s", engine_address)
                tell_parent(address=engine_address, model_dir=folders["model_dir"])
            return
        logger.info("The engine listens at %s", engine_address)
        url = self._start_gateways(folders, names, engine_address)
        if args.ssl_client_auth == "required":
            self._await_engine(engine_address)  # the gateway answers nobody without a certificate, also not this
        else:
            self._await_healthy(url)
        if not self._stopping and args.replica[1] > 1:
            logger.info("It is ready, at %s for the router", url)
        elif not self._stopping:
            logger.info("Ready at %s\n\n%s\n", url, curl(url, names[0], bool(args.api_key or args.api_key_file)))

    def watch(self) -> int:
        """Wait for a signal or for a process that ends on its own; return the exit code."""
        while not self._stopping:
            self._raise_if_ended()
            time.sleep(_POLL_S)
        return 0

    def stop(self) -> None:
        """End the gateways, which drain, then the coordinator, which ends the ranks and Ray."""
        self._stopping = True
        if self._keeper is not None:
            self._keeper.close_port()
        for gateway in self._gateways:
            if gateway.poll() is None:
                gateway.terminate()
        for process in (*self._gateways, self._coordinator):
            if process is None or process.poll() is not None:
                continue
            process.terminate()  # a gateway takes this as the signal that it has had already
            try:
                process.wait(self._args.drain_timeout + _KILL_AFTER_S)
            except subprocess.TimeoutExpired:
                logger.warning("pid %d did not end and is killed", process.pid)
                process.kill()
                process.wait()
        if self._coordinator is not None:
            kill_session(self._coordinator.pid)  # if it was killed: ranks and Ray's agents, which notice later
        for folder in self._folders:
            remove_folder(folder)

    def _start_coordinator(self, folders: dict[str, str], model_name: str, sizes: dict[str, Any]) -> str:
        args = self._args
        ray_temp_dir = None
        if args.ray_address is None:
            # The coordinator removes it, unless it is killed.
            self._folders.append(make_ray_temp_dir())
            ray_temp_dir = str(self._folders[-1])
        config = {
            **folders,
            "model_name": model_name,
            **sizes,
            "max_num_queued_requests": args.max_num_queued_reqs,
            "enable_prefix_cache": not args.no_prefix_cache,
            "load_format": args.load_format,
            "collectives": args.collectives,
            "ray_address": args.ray_address,
            "placement": args.tp_across_nodes or "one-node",
            "distribute": args.distribute,
            "ray_temp_dir": ray_temp_dir,
            "drain_timeout_s": args.drain_timeout,
            "metrics_compat": args.metrics_compat,
            "operations_host": args.operations_host,
            "operations_port": args.operations_port,
            **self._observability(),
            "step_timeout_s": args.step_timeout,
            "collective_timeout_s": args.step_timeout * 2 / 3,
            "stall_after_s": min(MAX_STALL_AFTER_S, args.step_timeout / 3),
            "replay_timeout_s": args.replay_timeout,
            "host": args.engine_host,
            "port": args.engine_port,
            **door_fields(args),
            "parent_pid": os.getpid(),
        }
        self._coordinator = spawn_child("tpserve.coordinator", config, ray_environment(args.ray_address))
        return first_words("coordinator", self._coordinator, "address")

    def _observability(self) -> dict[str, Any]:
        """Return what coordinator and gateway are both told."""
        args = self._args
        return {
            "log_format": args.log_format,
            "enable_debug": args.enable_debug,
            "otlp_traces_endpoint": args.otlp_traces_endpoint,
        }

    def _tls(self) -> dict[str, str]:
        """Return the TLS files of the gateways; behind the router of --replicas they need none."""
        names = ("ssl_certfile", "ssl_keyfile", "ssl_keyfile_password_file", "ssl_ca_certs", "ssl_client_auth")
        if self._args.replica[1] > 1:
            return {}
        return {name: str(value) for name in names if (value := getattr(self._args, name)) is not None}

    def _start_gateways(self, folders: dict[str, str], names: list[str], engine_address: str) -> str:
        args = self._args
        config = {
            "engine_address": engine_address,
            **door_fields(args),
            "engine_ssl_server_name": None if self._engine_door is None else self._engine_door.server_name,
            "model_dir": folders["model_dir"],
            "served_model_names": names,
            "host": args.host,
            "port": args.port,
            "api_keys": args.api_key,
            "api_key_file": None if args.api_key_file is None else str(args.api_key_file),
            **self._tls(),
            "allow_origins": args.allow_origins,
            "router_token": args.router_token,
            "max_connections": args.max_connections,
            "drain_timeout_s": args.drain_timeout,
            **self._observability(),
            "parent_pid": os.getpid(),
        }
        environment, metrics_dir = {}, None
        if args.limits_dir is not None:
            config["limits_dir"] = str(args.limits_dir)
        if args.gateway_processes > 1:
            # Each takes connections from one queue when it has time, and adds its counts to files that all show.
            metrics_dir = Path(tempfile.mkdtemp(prefix="tpserve-metrics-"))
            self._folders.append(metrics_dir)
            environment = {"PROMETHEUS_MULTIPROC_DIR": str(metrics_dir)}
            config["limits_dir"] = config.get("limits_dir", str(metrics_dir))

        def spawn(shared: socket.socket) -> subprocess.Popen[str]:
            listening = config | {"listen_fd": shared.fileno()}
            return spawn_child("tpserve.coordinator.gateway", listening, environment, pass_fds=(shared.fileno(),))

        shared = bind(args.host, args.port)
        self._keeper = GatewayKeeper(shared, spawn, args.gateway_processes, metrics_dir)
        # A gateway tries for long to meet its coordinator, which may have ended: its ranks could not start.
        ended = self._raise_if_coordinator_ended
        urls = [first_words("gateway", gateway, "url", ended) for gateway in self._keeper.processes]
        return urls[0]

    def _await_engine(self, address: str) -> None:
        """Wait until the ranks are up; a group that cannot start ends the coordinator, which is seen here."""
        import grpc  # not needed by a server with a gateway, which waits for that

        from tpserve.coordinator.engine_channel import open_blocking_channel
        from tpserve.proto.pb import engine_pb2, engine_pb2_grpc

        with open_blocking_channel(address, self._engine_door, [("grpc.enable_http_proxy", 0)]) as channel:
            stub = engine_pb2_grpc.EngineStub(channel)  # type: ignore[no-untyped-call]  # generated code
            while not self._stopping:
                self._raise_if_ended()
                with contextlib.suppress(grpc.RpcError):
                    info = stub.Describe(engine_pb2.DescribeRequest(), timeout=5)
                    if info.state.status == engine_pb2.EngineState.READY:
                        return
                time.sleep(_POLL_S)

    def _await_healthy(self, url: str) -> None:
        opener = local_opener()
        while not self._stopping:
            self._raise_if_ended()
            try:
                with opener.open(f"{url}/health", timeout=5):
                    return
            except OSError:  # also HTTP errors: not healthy yet
                time.sleep(_POLL_S)

    def _raise_if_ended(self) -> None:
        """Start a gateway again that has ended; without the coordinator, or when gateways end again and again, fail."""
        self._raise_if_coordinator_ended()
        if self._keeper is not None:
            try:
                self._keeper.look()
            except GatewayLost as error:
                raise ServeError(str(error)) from None

    def _raise_if_coordinator_ended(self) -> None:
        coordinator = self._coordinator
        if coordinator is not None and coordinator.poll() is not None:
            assert coordinator.stdout is not None
            raise ServeError(last_words("coordinator", coordinator, coordinator.stdout.readline()))


def check_doors(args: argparse.Namespace) -> None:
    """Fail before anything is built if the keys or the TLS files cannot be used.

    Raises
    ------
    ServeError
        Naming the flag or the file.
    """
    try:
        KeyRing(args.api_key, args.api_key_file)
        tls_files_of(args)
    except (ConfigError, TlsError) as error:
        raise ServeError(str(error)) from None


def local_opener() -> urllib.request.OpenerDirector:
    """Return what asks a child of this process for its health.

    It is never behind a proxy, and need not prove who it is: its certificate may name another host than this address,
    and nothing is sent that is worth a secret.
    """
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context))


def default_names(model: str) -> list[str]:
    """Return the names of a model that was given none: its short one and, of a hub's model, the address as given."""
    short = Path(model.removeprefix("HF://")).name.removesuffix(".gguf")
    return [short, model] if model.startswith("HF://") else [short]


def curl(url: str, model: str, with_key: bool) -> str:
    """Return a first request, for the user to copy."""
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    body = json.dumps({"model": model, "messages": messages, "temperature": 0})
    key = " -H 'Authorization: Bearer YOUR_KEY'" if with_key else ""
    return f"curl {url}/v1/chat/completions -H 'Content-Type: application/json'{key} -d '{body}'"

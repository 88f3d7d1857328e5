"""`python -m tpserve.coordinator CONFIG`: the coordinator process of one replica.

CONFIG is a JSON object with the fields of `CoordinatorConfig`; `-` reads it from standard input. Prints one JSON
line with its address when it listens.
SIGTERM drains and ends with 0; a group that cannot be started or rebuilt ends with 1 and a JSON line with the error.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import sys
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, TextIO

import grpc.aio

from tpserve.coordinator.cluster import Cluster, ClusterConfig, Placement
from tpserve.coordinator.config import SchedulerConfig
from tpserve.coordinator.distribution import Distribute
from tpserve.coordinator.engine import Engine, EngineConfig
from tpserve.coordinator.engine_channel import TokenGuard, server_credentials
from tpserve.coordinator.engine_door import make_door
from tpserve.coordinator.errors import ClusterError
from tpserve.coordinator.gateway.tls import TlsError
from tpserve.coordinator.log import LogFormat, configure, take_over_rank_output
from tpserve.coordinator.metrics import Compat, Metrics
from tpserve.coordinator.operations import OperationsServer
from tpserve.coordinator.process import end_with_parent, keep_stdout_for_parent, tell_parent
from tpserve.coordinator.scheduler import Scheduler
from tpserve.coordinator.service import EngineService
from tpserve.coordinator.tracing import Tracing, TracingUnavailable
from tpserve.proto.garbage import spare_standing_objects
from tpserve.proto.manifest import Manifest
from tpserve.proto.pb import engine_pb2, engine_pb2_grpc
from tpserve.proto.rank import RankConfig
from tpserve.proto.speculation import SPARSE_METHODS, DraftLengthRule, Speculation

logger = logging.getLogger(__name__)

_WITHOUT_RAY_S = 40.0
"""A minute after its head is lost, Ray ends every process that belongs to it."""
_OPTIONS = [("grpc.max_receive_message_length", 64 << 20), ("grpc.so_reuseport", 0)]


@dataclass(frozen=True, slots=True)
class CoordinatorConfig:
    """Arguments of the coordinator process."""

    model_dir: str
    artifact_dir: str
    model_name: str
    """Label of the metrics."""
    num_pages: int
    max_num_seqs: int
    max_num_batched_tokens: int
    num_threads: int
    """Threads of each rank."""
    parent_pid: int
    load_format: Literal["auto", "dummy"] = "auto"
    collectives: Literal["auto", "push", "nccl"] = "auto"
    speculation: dict[str, Any] | None = None
    """Fields of `Speculation`; None: plain decoding."""
    draft_length: DraftLengthRule = "fixed"
    max_num_queued_requests: int = 1024
    enable_prefix_cache: bool = True
    ray_address: str | None = None
    placement: Placement = "one-node"
    distribute: Distribute = "auto"
    """See `ClusterConfig` for these."""
    ray_temp_dir: str | None = None
    """Empty folder for a Ray that is started here; see `ClusterConfig`."""
    host: str = "127.0.0.1"
    port: int = 0
    """0 takes a free one."""
    engine_ssl_certfile: str | None = None
    engine_ssl_keyfile: str | None = None
    engine_ssl_ca_certs: str | None = None
    engine_token: str | None = field(default=None, repr=False)
    """How gateways are met over a network; see `engine_door`. None: without TLS."""
    start_timeout_s: float = 600.0
    step_timeout_s: float = 30.0
    collective_timeout_s: float = 20.0
    stall_after_s: float = 5.0
    replay_timeout_s: float = 45.0
    """See `EngineConfig` for these."""
    drain_timeout_s: float = 30.0
    metrics_compat: Compat = "none"
    otlp_traces_endpoint: str | None = None
    """Where spans are sent; None: nowhere."""
    log_format: LogFormat = "text"
    operations_port: int | None = None
    """Port of the coordinator's own /metrics and /health; None: only gateways have them."""
    operations_host: str | None = None
    """Where they are; None: on `host`."""
    enable_debug: bool = False
    """Whether a gateway may ask for a trace of steps."""


def make_cluster(config: CoordinatorConfig, manifest: Manifest) -> Cluster:
    """Return the cluster for the ranks of `manifest`, not yet connected."""
    rank = RankConfig(
        rank=0,
        tp_size=manifest.tp_size,
        model_dir=Path(config.model_dir),
        artifact_dir=Path(config.artifact_dir),
        load_format=config.load_format,
        num_pages=config.num_pages,
        max_num_seqs=config.max_num_seqs,
        num_threads=config.num_threads,
        group_name="",
        collective_timeout_s=config.collective_timeout_s,
        device=0 if manifest.target["kind"] == "cuda" else None,
        collectives=config.collectives,
        speculation=None if config.speculation is None else Speculation.from_json(config.speculation),
    )
    temp_dir = None if config.ray_temp_dir is None else Path(config.ray_temp_dir)
    return Cluster(
        ClusterConfig(
            rank,
            config.start_timeout_s,
            config.ray_address,
            placement=config.placement,
            distribute=config.distribute,
            temp_dir=temp_dir,
        )
    )


async def run(
    config: CoordinatorConfig, manifest: Manifest, cluster: Cluster, tracing: Tracing | None, parent: TextIO
) -> int:
    """Serve until SIGTERM, and tell `parent` where; return the exit code."""
    metrics = Metrics(config.model_name, cache_dtype=manifest.kv.dtype, compat=config.metrics_compat)
    method, on_device = (config.speculation or {}).get("method"), manifest.target["kind"] == "cuda"
    scheduler = Scheduler(
        SchedulerConfig(
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_model_len=manifest.max_model_len,
            page_size=manifest.kv.page_size,
            num_pages=config.num_pages,
            max_num_queued_requests=config.max_num_queued_requests,
            enable_prefix_cache=config.enable_prefix_cache,
            max_num_draft_tokens=(config.speculation or {}).get("max_num_draft_tokens", 0),
            draft_length=config.draft_length,
            drafts_on_device=on_device,
            drafts_are_sparse=method in SPARSE_METHODS,
            drafts_cost_upkeep=method == "eagle3" and not on_device,
            prefix_lookahead=int(method == "eagle3"),
        )
    )
    engine_config = EngineConfig(
        step_timeout_s=config.step_timeout_s,
        stall_after_s=config.stall_after_s,
        replay_timeout_s=config.replay_timeout_s,
    )
    engine = Engine(engine_config, scheduler, cluster, metrics, tracing)
    stop = asyncio.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signum, stop.set)
    service = EngineService(engine, metrics, _info(config, manifest), enable_debug=config.enable_debug)
    server, address = await _listen(config, service)
    tell_parent(parent, address=address)
    operations = None
    if config.operations_port is not None:
        operations = OperationsServer(engine, metrics, config.operations_host or config.host, config.operations_port)
        operating = asyncio.create_task(operations.serve())
    serving = asyncio.create_task(engine.run())
    stopping = asyncio.create_task(stop.wait())
    losing_ray = asyncio.create_task(cluster.wait_lost())
    try:
        await asyncio.wait([serving, stopping, losing_ray], return_when=asyncio.FIRST_COMPLETED)
        if serving.done():
            serving.result()
        elif losing_ray.done():
            await _end_without_ray(engine, serving, losing_ray.result(), config.drain_timeout_s)
        elif not await engine.drain(config.drain_timeout_s):
            logger.warning("requests still ran after %g s and are cut off", config.drain_timeout_s)
    finally:
        for task in (serving, stopping, losing_ray):
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError, ClusterError):
            await serving
        service.close()
        await server.stop(grace=1)
        if operations is not None:
            operations.should_exit = True
            await operating
    return 0


async def _end_without_ray(engine: Engine, serving: asyncio.Task[None], lost: str, drain_timeout_s: float) -> None:
    """Let running requests finish on ranks that still live, then fail: without Ray no group can be started again."""
    why = f"Ray has lost its {lost}"
    logger.error("%s; running requests may finish, then this replica ends", why)
    draining = asyncio.create_task(engine.drain(min(drain_timeout_s, _WITHOUT_RAY_S), why))
    await asyncio.wait([draining, serving], return_when=asyncio.FIRST_COMPLETED)
    draining.cancel()
    raise ClusterError(f"{why}: start the server again")


def _info(config: CoordinatorConfig, manifest: Manifest) -> engine_pb2.EngineInfo:
    try:
        package_version = version("tpserve")
    except PackageNotFoundError:  # run from a source tree
        package_version = "source"
    return engine_pb2.EngineInfo(
        model_dir=config.model_dir,
        max_model_len=manifest.max_model_len,
        vocab_size=manifest.vocab_size,
        max_num_seqs=config.max_num_seqs,
        kv_capacity_tokens=config.num_pages * manifest.kv.page_size,
        tp_size=manifest.tp_size,
        version=package_version,
    )


async def _listen(config: CoordinatorConfig, service: EngineService) -> tuple[grpc.aio.Server, str]:
    door = make_door(
        config.engine_ssl_certfile, config.engine_ssl_keyfile, config.engine_ssl_ca_certs, config.engine_token
    )
    server = grpc.aio.server(options=_OPTIONS, interceptors=[] if door is None else [TokenGuard(door.token)])
    engine_pb2_grpc.add_EngineServicer_to_server(service, server)  # type: ignore[no-untyped-call]  # generated
    where = f"{config.host}:{config.port}"
    if door is None:
        port = server.add_insecure_port(where)
    else:
        port = server.add_secure_port(where, server_credentials(door))
    await server.start()
    return server, f"{config.host}:{port}"


def main() -> int:
    """Run the coordinator; return the exit code."""
    try:
        config = CoordinatorConfig(**json.loads(sys.stdin.read() if sys.argv[1] == "-" else sys.argv[1]))
    except json.JSONDecodeError as error:  # who starts it was killed while it wrote
        sys.stderr.write(f"error: the configuration of the coordinator is cut off or no JSON: {error}\n")
        return 2
    parent = keep_stdout_for_parent()  # Ray prints what its daemons and ranks say
    configure(config.log_format, "coordinator")
    tracing = None
    manifest = Manifest.load(Path(config.artifact_dir), verify_files=False)
    cluster = make_cluster(config, manifest)
    # Until the event loop handles it: what was started so far is ended by the `finally` below.
    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(128 + signum))
    try:
        end_with_parent(config.parent_pid)
        if config.otlp_traces_endpoint is not None:
            tracing = Tracing(config.otlp_traces_endpoint, "coordinator")
        # Before the event loop: Ray forks its daemons, which must not happen beside running gRPC threads.
        cluster.connect()
        if config.log_format == "json":
            take_over_rank_output()
        spare_standing_objects()
        return asyncio.run(run(config, manifest, cluster, tracing, parent))
    except (ClusterError, TlsError, TracingUnavailable) as error:
        tell_parent(parent, error=str(error))
        return 1
    finally:
        cluster.shutdown()
        if tracing is not None:
            tracing.shutdown()
        if cluster.is_lost:
            # Ray's own work at exit waits seconds for daemons that are gone.
            parent.flush()
            sys.stderr.flush()
            os._exit(1)


if __name__ == "__main__":
    sys.exit(main())

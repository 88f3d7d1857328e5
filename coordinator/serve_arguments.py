"""The flags of `tpserve serve`, which `MLCEngine` takes as options too."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from tpserve.coordinator.engine_door import add_door_arguments
from tpserve.coordinator.gateway.guard import MAX_CONNECTIONS
from tpserve.coordinator.gateway.tls import add_tls_arguments
from tpserve.coordinator.log import LOG_FORMATS
from tpserve.coordinator.memory import MODE_MAX_NUM_SEQS
from tpserve.coordinator.router.arguments import ADMIN_VARIABLE, add_policy_arguments
from tpserve.coordinator.speculation import add_speculation_arguments
from tpserve.proto.manifest import CPU_STEP_TOKENS, GPU_STEP_TOKENS

DEFAULT_REPLAY_TIMEOUT_S = 45.0
"""Several times a rebuild on a busy machine, and less than the 60 s after which proxies cut a silent stream."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `tpserve serve`."""
    parser.add_argument("model", help="Hugging Face folder, GGUF file or HF://org/name")
    parser.add_argument(
        "--model-lib",
        type=Path,
        help="folder made by `tpserve compile`, with its sizes: nothing is compiled here, and MODEL must be a folder",
    )
    parser.add_argument("--tp", "--tensor-parallel-size", type=int, default=1, metavar="1|2|4|8")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument(
        "--mode",
        choices=sorted(MODE_MAX_NUM_SEQS),
        default="local",
        help="local: a few users; interactive: one; server: as many as memory allows",
    )
    parser.add_argument("--quantization", choices=["auto", "q0f32", "q0bf16", "fp8"], default="auto")
    parser.add_argument(
        "--kv-cache-dtype",
        choices=["auto", "bfloat16", "fp8", "fp8_e4m3"],
        default="auto",
        help="auto: bfloat16 on a GPU, float32 on a CPU; fp8 (also fp8_e4m3): half the memory, on GPUs or portable",
    )
    parser.add_argument("--kernels", choices=["tuned", "portable"], default="tuned")
    parser.add_argument(
        "--max-num-seqs", type=_positive, help="sequences that run at once (default: the library's; by mode)"
    )
    parser.add_argument(
        "--max-num-batched-tokens",
        type=_positive,
        help=f"most tokens of a step (default: the library's; {GPU_STEP_TOKENS} on GPUs, {CPU_STEP_TOKENS} on a CPU)",
    )
    parser.add_argument("--max-model-len", type=_positive, help="prompt and output of one sequence, in tokens")
    parser.add_argument("--max-num-queued-reqs", type=_positive, default=1024, help="more are answered with 429")
    parser.add_argument("--gpu-memory-utilization", type=_share, default=0.85, help="share of memory to use (0-1]")
    parser.add_argument("--no-prefix-cache", action="store_true", help="compute every prompt whole")
    parser.add_argument(
        "--no-gateway",
        action="store_true",
        help="the engine alone, without HTTP: prints its address, for `MLCEngine(address=...)`",
    )
    parser.add_argument("--engine-host", default="127.0.0.1", help="where the coordinator listens for gateways")
    parser.add_argument(
        "--engine-insecure", action="store_true", help="let --engine-host be on a network without TLS and token"
    )
    parser.add_argument("--engine-port", type=int, default=0, help="0 takes a free port")
    parser.add_argument(
        "--operations-port",
        type=_positive,
        metavar="PORT",
        help="the coordinator's own /metrics and /health (default: only the gateway has them)",
    )
    parser.add_argument("--operations-host", help="where they are (default: --engine-host)")
    parser.add_argument("--parent-pid", type=_positive, help=argparse.SUPPRESS)  # of a process that this ends with
    parser.add_argument("--replica", type=_replica, default=(0, 1), help=argparse.SUPPRESS)  # of --replicas: I/N
    parser.add_argument("--ray-of-replicas", action="store_true", help=argparse.SUPPRESS)  # theirs alone, of this host
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free port")
    parser.add_argument(
        "--gateway-processes",
        type=_positive,
        metavar="N",
        help="processes that share the port, for many clients (default: beside GPUs one for 8 cores, up to 4; else 1)",
    )
    parser.add_argument(
        "--max-connections",
        type=_positive,
        default=MAX_CONNECTIONS,
        metavar="N",
        help="of clients at one gateway process at once (%(default)s)",
    )
    parser.add_argument("--served-model-name", nargs="+", help="names clients may use (default: the model's)")
    parser.add_argument("--api-key", action="append", default=[], help="may be given several times")
    parser.add_argument(
        "--api-key-file",
        type=Path,
        help="more keys, one a line, which name=, rpm=, tpm= and max_parallel= may follow; read again when it changes",
    )
    parser.add_argument("--limits-dir", type=Path, help=argparse.SUPPRESS)  # of --replicas: what keys have used
    parser.add_argument(
        "--replicas", type=_positive, default=1, metavar="N", help="servers of their own behind one router, on one Ray"
    )
    parser.add_argument(
        "--admin-token",
        default=os.environ.get(ADMIN_VARIABLE),
        metavar="SECRET",
        help=f"opens POST /admin/rolling-restart with --replicas (or ${ADMIN_VARIABLE})",
    )
    add_tls_arguments(parser)
    add_door_arguments(parser)
    add_policy_arguments(parser)
    parser.add_argument("--allow-origins", nargs="*", default=[], help="origins for CORS")
    parser.add_argument("--load-format", choices=["auto", "dummy"], default="auto", help="dummy: random weights")
    parser.add_argument(
        "--collectives",
        choices=["auto", "push", "nccl"],
        default="auto",
        help="between GPUs: over peer memory (push), or NCCL; auto takes push where ranks can map each other's memory",
    )
    parser.add_argument(
        "--ray-address",
        metavar="HOST:PORT",
        help="an existing Ray cluster, of which this host is a node (default: start Ray here)",
    )
    parser.add_argument(
        "--tp-across-nodes",
        choices=["pack", "spread"],
        help="let ranks be on several nodes of --ray-address: on as few as have room, or on as many as there are "
        "(default: all on one)",
    )
    parser.add_argument(
        "--distribute",
        choices=["auto", "never"],
        default="auto",
        help="auto: nodes that lack the model or the library are sent it; never: they are an error",
    )
    parser.add_argument(
        "--drain-timeout", type=float, default=30.0, help="seconds that running requests get at the end"
    )
    parser.add_argument(
        "--step-timeout", type=_seconds, default=30.0, help="seconds after which a step's late rank is lost"
    )
    parser.add_argument(
        "--replay-timeout",
        type=_seconds,
        default=DEFAULT_REPLAY_TIMEOUT_S,
        help="seconds that requests of a lost rank's group wait for a step of a new one; then they end with an error",
    )
    add_speculation_arguments(parser)
    add_observability_arguments(parser)
    policies = ["ON", "OFF", "REDO", "READONLY"]
    parser.add_argument("--jit-policy", choices=policies, default=os.environ.get("TPSERVE_JIT_POLICY", "ON"))
    parser.add_argument(
        "--download-cache-policy", choices=policies, default=os.environ.get("TPSERVE_DOWNLOAD_CACHE_POLICY", "ON")
    )


def add_observability_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags about logs, metrics and traces."""
    parser.add_argument("--log-format", choices=LOG_FORMATS, default="text", help="json: one object per line")
    parser.add_argument(
        "--metrics-compat", choices=["none", "vllm"], default="none", help="vllm: /metrics has vLLM's names besides"
    )
    parser.add_argument("--otlp-traces-endpoint", metavar="URL", help="send OpenTelemetry spans there, over OTLP")
    parser.add_argument("--enable-debug", action="store_true", help="open /debug (traces of steps), take debug_config")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not 1 or more")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds above 0")
    return value


def _replica(text: str) -> tuple[int, int]:
    number, _, count = text.partition("/")
    return int(number), int(count)


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{value} is not in (0, 1]")
    return value

"""`tpserve doctor`: run every check and say what it found, as lines or as JSON; ends with 1 if one failed."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from tpserve.coordinator.doctor.findings import Check, Finding, Wanted
from tpserve.coordinator.doctor.gpus import check_gpus
from tpserve.coordinator.doctor.host import (
    check_cpus,
    check_disks,
    check_limits,
    check_ports,
    check_shared_memory,
)
from tpserve.coordinator.doctor.model import check_model, check_texts
from tpserve.coordinator.doctor.network import check_network
from tpserve.coordinator.doctor.software import check_compiler, check_python, check_ray
from tpserve.coordinator.errors import ClusterError
from tpserve.coordinator.memory import MODE_MAX_NUM_SEQS
from tpserve.coordinator.speculation import add_speculation_arguments, choose_speculation

CHECKS: tuple[Check, ...] = (
    check_python,
    check_compiler,
    check_gpus,
    check_cpus,
    check_shared_memory,
    check_limits,
    check_ports,
    check_disks,
    check_model,
    check_texts,
    check_ray,
    check_network,
)
_STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def main(argv: list[str] | None = None) -> int:
    """Run the command; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="tpserve doctor",
        description="Check this host before it serves: what would keep a server from starting, or make it slow, and "
        "the remedy. Flags are those of `tpserve serve`. Ends with 1 if a check fails.",
    )
    parser.add_argument("model", nargs="?", help="a model whose memory is to be checked against what is free")
    parser.add_argument("--model-lib", type=Path, help="its compiled library: memory is then told exactly")
    parser.add_argument("--tp", "--tensor-parallel-size", type=int, default=1, choices=[1, 2, 4, 8])
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="cuda: no GPU is a failure")
    parser.add_argument("--mode", choices=sorted(MODE_MAX_NUM_SEQS), default="local")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--ray-address", metavar="HOST:PORT", help="a cluster that this host is to be a node of")
    parser.add_argument("--tp-across-nodes", choices=["pack", "spread"], help="its ranks may be on several nodes")
    add_speculation_arguments(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)
    try:
        speculation = choose_speculation(args, on_gpu=args.device == "cuda")
        if speculation is not None and args.device == "cuda":
            speculation.require_gpus(args.tp)
    except ClusterError as error:  # as `tpserve serve` would refuse them
        parser.error(str(error))
    wanted = Wanted(
        device=args.device,
        tp_size=args.tp,
        num_draft_ranks=0 if speculation is None else speculation.num_draft_ranks,
        tp_across_nodes=args.tp_across_nodes,
        host=args.host,
        port=args.port,
        ray_address=args.ray_address,
        model=args.model,
        model_lib=args.model_lib,
        mode=args.mode,
    )
    findings = examine(wanted)
    failed = any(finding.status == "fail" for finding in findings)
    if args.json:
        checks = [dataclasses.asdict(finding) for finding in findings]
        sys.stdout.write(json.dumps({"healthy": not failed, "checks": checks}, indent=1) + "\n")
    else:
        _show(findings, Console())
    return 1 if failed else 0


def examine(wanted: Wanted, checks: Sequence[Check] = CHECKS) -> list[Finding]:
    """Return what every check finds; one that breaks is a failure of its own and stops no other."""
    findings: list[Finding] = []
    for check in checks:
        try:
            findings.extend(check(wanted))
        except Exception as error:  # whatever a broken host makes it raise, the others must be told
            name = check.__name__.removeprefix("check_")
            findings.append(Finding(name, "fail", f"{type(error).__name__}: {error}", "see what this host lacks"))
    return findings


def _show(findings: Sequence[Finding], console: Console) -> None:
    width = max(len(finding.check) for finding in findings)
    for finding in findings:
        line = Text.assemble(
            (f"{finding.status:<5}", _STYLES[finding.status]), f"{finding.check:<{width}}  ", finding.found
        )
        console.print(line, soft_wrap=True)
        if finding.remedy:
            console.print(Text(f"{'':<{width + 5}}  -> {finding.remedy}"), soft_wrap=True)
    counts = {status: sum(finding.status == status for finding in findings) for status in _STYLES}
    console.print(", ".join(f"{count} {status}" for status, count in counts.items()), soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())

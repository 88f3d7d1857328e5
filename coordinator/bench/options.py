"""The command line of `bench-tp`, checked."""

from __future__ import annotations

import argparse
import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpserve.coordinator.bench import workload as workloads
from tpserve.coordinator.bench.client import Api, Load
from tpserve.coordinator.bench.definitions import Slo
from tpserve.coordinator.bench.errors import BenchError
from tpserve.coordinator.bench.results import Configuration
from tpserve.coordinator.bench.workload import Workload
from tpserve.proto.speculation import MAX_DRAFT_TOKENS, METHODS

_NOT_COMPARED = (
    "output_dir",
    "resume",
    "api_key",
    "ssl_ca_certs",
    "tp",
    "concurrency",
    "request_rate",
    "no_chart",
    "floor",
)
"""A run may be resumed with others of these: they decide which points there are, not what one is."""
_NAMED = re.compile(r"([\w.+-]+):\s+(.*)", re.DOTALL)
_DEFAULT_REQUESTS = 8
_REQUESTS_PER_WORKER = 3
_DEFAULT_OPEN_REQUESTS = 100
_RATE_SALTS = 2**20
"""Salts below are concurrencies."""


@dataclass(frozen=True, slots=True)
class Options:
    """What to measure."""

    model: str | None
    """What to serve, or the name that an endpoint knows; None asks the endpoint."""
    configurations: tuple[Configuration, ...]
    concurrencies: tuple[int, ...]
    request_rates: tuple[float, ...]
    workload: Workload
    num_requests: int | None
    num_warmups: int | None
    time_limit_s: float | None
    trace_scale: float
    slo: Slo | None
    api: Api
    api_key: str | None
    ca_certs: Path | None
    """Authorities besides the usual ones, for `base_url`."""
    ignore_eos: bool
    counts_by_chunk: bool
    timeout_s: float
    start_timeout_s: float
    prefix_cache: bool
    output_dir: Path
    resume: bool
    chart: bool
    seed: int
    arguments: dict[str, Any]
    """As given, for the report."""

    @property
    def is_closed_loop(self) -> bool:
        """Whether the load is a concurrency."""
        return self.workload.arrivals_s is None and not self.request_rates

    def loads(self) -> list[tuple[int | None, float | None, Load]]:
        """Return each load: concurrency, request rate (both None for a trace), and how to send."""
        if self.workload.arrivals_s is not None:
            arrivals = self.workload.arrivals_s[: self.num_requests]
            scaled = tuple(time_s * self.trace_scale for time_s in arrivals)
            return [(None, None, self._load(len(scaled), self.num_warmups or 0, arrivals_s=scaled, salt=0))]
        found: list[tuple[int | None, float | None, Load]] = []
        for rate in self.request_rates:
            count = self.num_requests or _DEFAULT_OPEN_REQUESTS
            arrivals = workloads.poisson_arrivals(rate, count, seed=self.seed)
            salt = _RATE_SALTS + int(rate * 1000)
            found.append((None, rate, self._load(count, self.num_warmups or 0, arrivals_s=arrivals, salt=salt)))
        for concurrency in self.concurrencies if self.is_closed_loop else ():
            count = self.num_requests or max(_DEFAULT_REQUESTS, _REQUESTS_PER_WORKER * concurrency)
            warmups = concurrency if self.num_warmups is None else self.num_warmups
            found.append((concurrency, None, self._load(count, warmups, concurrency=concurrency, salt=concurrency)))
        return found

    def _load(self, num_requests: int, num_warmups: int, *, salt: int, **how: Any) -> Load:
        return Load(num_requests, num_warmups=num_warmups, time_limit_s=self.time_limit_s, salt=salt, **how)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `bench-tp`."""
    add = parser.add_argument
    add("model", nargs="?", metavar="MODEL", help="Hugging Face folder, GGUF file or HF://org/name to serve")
    add("--model", dest="model_name", help="the same; with --base-url, the name that the endpoint knows")
    what = parser.add_argument_group("what is measured")
    add = what.add_argument
    add("--tp", type=_ints, default=(1,), metavar="4,8", help="degrees at which the server is started, one by one")
    add("--quantization", type=_names, default=(), metavar="q0f32,..", help="as `tpserve serve` knows them")
    add(
        "--serve-args",
        action="append",
        metavar="='[NAME: ]ARGS'",
        help="more arguments for `tpserve serve`; each further one is a configuration more, '' is the plain server",
    )
    add(
        "--spec",
        type=_draft_lengths,
        default=(),
        metavar="off,3,auto,mlc",
        help="draft lengths to compare, off for plain decoding (default with a proposer: off,auto)",
    )
    add("--draft-model", metavar="MODEL", help="draft or EAGLE-3 head of the configurations that speculate")
    add("--draft-tp", type=_ints, default=(), metavar="1,4", help="degrees of the draft to compare")
    add("--spec-method", choices=METHODS, help="proposer, as `tpserve serve` knows them")
    add("--prefix-cache", action="store_true", help="leave the started server's prefix cache on")
    add("--base-url", help="measure this running OpenAI endpoint and start nothing")
    add("--ssl-ca-certs", type=Path, metavar="PEM", help="authorities of that endpoint, besides the usual ones")
    add("--label", help="name of that endpoint in tables and the chart (default: its address)")
    add("--num-gpus", type=_positive, help="by which throughput is divided (default: the TP degree, or 1)")
    add("--floor", type=_floors, default={}, metavar="TP:MS,..", help="least possible TPOT, to compare with")
    load = parser.add_argument_group("load")
    add = load.add_argument
    add("--concurrency", type=concurrencies, default=None, metavar="1..64", help="closed loop; 1..64 = 1 2 4 .. 64")
    add("--request-rate", type=_rates, default=(), metavar="1,2.5", help="open loop, Poisson, requests per second")
    add("--num-requests", type=_positive, help="measured per point (default: max(8, 3 x concurrency), or 100)")
    add("--num-warmups", type=_natural, help="short requests before each point (default: the concurrency)")
    add("--time-limit", type=float, metavar="S", help="end each point after so long; what is unfinished counts in part")
    add("--timeout", type=float, default=600.0, metavar="S", help="of one request")
    add("--start-timeout", type=float, default=3600.0, metavar="S", help="of the server, compiling included")
    data = parser.add_argument_group("requests")
    add = data.add_argument
    add("--dataset", choices=["lengths", "sharegpt", "fixed", "trace"], default="lengths")
    add("--dataset-path", type=Path, help="ShareGPT's JSON, length pairs (.json, .npz), or a trace (.jsonl, .csv)")
    add("--tokenizer", type=Path, help="tokenizer.json to count ShareGPT's lengths (default: 4 characters a token)")
    add("--input-len", type=_positive, default=100, help="of --dataset fixed")
    add("--output-len", type=_positive, default=500, help="of --dataset fixed")
    add("--trace-scale", type=float, default=1.0, help="stretches a trace's times; below 1 is faster")
    add("--endpoint", choices=["completions", "chat"], default="completions", help="chat takes text prompts only")
    add("--ignore-eos", action=argparse.BooleanOptionalAction, default=True, help="run to the output length")
    add(
        "--usage-by-chunk",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="ask the server to count tokens in every chunk, which makes the first chunk's size known",
    )
    add("--seed", type=_natural, default=0)
    add("--api-key", default=os.environ.get("OPENAI_API_KEY"), help="default: OPENAI_API_KEY")
    out = parser.add_argument_group("results")
    add = out.add_argument
    add("--goodput", type=_slo, metavar="ttft:MS,tpot:MS,e2el:MS", help="limits of a good request")
    add("--output-dir", type=Path, default=Path("bench-tp-results"))
    add("--resume", action="store_true", help="keep the points that are in the folder already")
    add("--no-chart", action="store_true")


def parse(args: argparse.Namespace) -> Options:
    """Check what belongs together.

    Raises
    ------
    BenchError
        If something is missing, or does not fit together, or a file cannot be read.
    """
    model = args.model_name or args.model
    if args.base_url is None and model is None:
        raise BenchError("give a MODEL to serve, or --base-url of a running endpoint")
    proposes = args.draft_model is not None or args.spec_method is not None
    if args.base_url is not None and (args.serve_args or args.quantization or args.spec or proposes):
        raise BenchError(
            "--serve-args, --quantization and the flags of speculation are for a server that is started, "
            "not for --base-url"
        )
    if (args.spec or args.draft_tp) and not proposes:
        raise BenchError("--spec and --draft-tp need a proposer: give --draft-model, or --spec-method ngram or suffix")
    if args.ssl_ca_certs is not None and args.base_url is None:
        raise BenchError("--ssl-ca-certs is for --base-url: a server that is started here is met on loopback")
    if args.request_rate and args.concurrency:
        raise BenchError("give --concurrency or --request-rate, not both")
    if args.dataset == "trace" and (args.request_rate or args.concurrency):
        raise BenchError("a trace says itself when requests are sent: leave out --concurrency and --request-rate")
    workload = _workload(args)
    if args.endpoint == "chat" and workload.texts is None:
        raise BenchError("--endpoint chat takes text: use it with --dataset sharegpt")
    arguments = {
        name: {str(key): item for key, item in value.items()} if isinstance(value, dict) else _plain(value)
        for name, value in vars(args).items()
        if name not in ("api_key", "command")
    }
    return Options(
        model=model,
        configurations=tuple(_configurations(args)),
        concurrencies=args.concurrency or (1,),
        request_rates=args.request_rate,
        workload=workload,
        num_requests=args.num_requests,
        num_warmups=args.num_warmups,
        time_limit_s=args.time_limit,
        trace_scale=args.trace_scale,
        slo=args.goodput,
        api=args.endpoint,
        api_key=args.api_key,
        ca_certs=args.ssl_ca_certs,
        ignore_eos=args.ignore_eos,
        counts_by_chunk=args.usage_by_chunk,
        timeout_s=args.timeout,
        start_timeout_s=args.start_timeout,
        prefix_cache=args.prefix_cache,
        output_dir=args.output_dir,
        resume=args.resume,
        chart=not args.no_chart,
        seed=args.seed,
        arguments=arguments,
    )


def comparable(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments that must be the same for a run to be resumed."""
    return {name: value for name, value in arguments.items() if name not in _NOT_COMPARED}


def _configurations(args: argparse.Namespace) -> list[Configuration]:
    floors: dict[int, float] = args.floor
    if args.base_url is not None:
        tp = args.num_gpus or 1
        return [Configuration(args.label or args.base_url, tp, base_url=args.base_url, floor_tpot_s=floors.get(tp))]
    found = []
    for tp in args.tp:
        for quantization in args.quantization or (None,):
            for text in args.serve_args or ("",):
                name, serve_args = _named(text)
                for draft_name, draft_args in _drafts(args):
                    label = " ".join(filter(None, [f"TP={tp}", quantization, name, draft_name]))
                    num_gpus = args.num_gpus or tp
                    all_args = (*serve_args, *draft_args)
                    floor = floors.get(tp)
                    found.append(Configuration(label, num_gpus, tp, quantization, all_args, floor_tpot_s=floor))
    return found


def _drafts(args: argparse.Namespace) -> list[tuple[str, tuple[str, ...]]]:
    """Return names and arguments of `tpserve serve` for each way to speculate that is compared."""
    if args.draft_model is None and args.spec_method is None:
        return [("", ())]
    proposer: tuple[str, ...] = () if args.spec_method is None else ("--spec-method", args.spec_method)
    if args.draft_model is not None:
        proposer += ("--draft-model", args.draft_model)
    found: list[tuple[str, tuple[str, ...]]] = []
    for length in args.spec or ("off", "auto"):
        if length == "off":
            found.append(("", ()))
            continue
        for draft_tp in args.draft_tp or (None,):
            degree = () if draft_tp is None else ("--draft-tp", str(draft_tp))
            method = args.spec_method if args.draft_model is None else "draft"
            name = f"{method} {length}" if draft_tp is None else f"{method} {length} TP={draft_tp}"
            found.append((name, (*proposer, *degree, "--num-speculative-tokens", length)))
    return found


def _named(text: str) -> tuple[str, tuple[str, ...]]:
    """Split `NAME: ARGS`; without a name, the arguments are the name."""
    found = _NAMED.fullmatch(text.strip())
    name, text = (found[1], found[2]) if found else (text.strip(), text)
    return name, tuple(shlex.split(text))


def _workload(args: argparse.Namespace) -> Workload:
    path, seed = args.dataset_path, args.seed
    if args.dataset == "fixed":
        return workloads.fixed(args.input_len, args.output_len, seed=seed)
    if args.dataset == "lengths":
        return workloads.from_lengths(path or workloads.SHARED_LENGTHS, seed=seed)
    if path is None:
        raise BenchError(f"--dataset {args.dataset} needs --dataset-path")
    if args.dataset == "sharegpt":
        return workloads.from_sharegpt(path, seed=seed, tokenizer=args.tokenizer)
    return workloads.from_trace(path, seed=seed)


def _plain(value: Any) -> Any:
    """Return what JSON can hold and gives back the same."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Slo):
        return {"ttft_s": value.ttft_s, "tpot_s": value.tpot_s, "e2el_s": value.e2el_s}
    return list(value) if isinstance(value, tuple) else value


def concurrencies(text: str) -> tuple[int, ...]:
    """Read `1,3,8..64`: a range doubles from its begin, and ends with its end."""
    found: list[int] = []
    for part in text.split(","):
        first, dots, last = part.partition("..")
        value, end = _positive(first), _positive(last if dots else first)
        if value > end:
            raise argparse.ArgumentTypeError(f"{part!r} is empty")
        while value < end:
            found.append(value)
            value *= 2
        found.append(end)
    return tuple(dict.fromkeys(found))


def _ints(text: str) -> tuple[int, ...]:
    return tuple(dict.fromkeys(_positive(part) for part in text.split(",")))


def _draft_lengths(text: str) -> tuple[str, ...]:
    lengths = _names(text)
    for length in lengths:
        if length not in ("off", "auto", "mlc") and not (length.isdigit() and 1 <= int(length) <= MAX_DRAFT_TOKENS):
            raise argparse.ArgumentTypeError(f"{length!r} is not off, auto, mlc or 1 to {MAX_DRAFT_TOKENS}")
    return lengths


def _names(text: str) -> tuple[str, ...]:
    return tuple(filter(None, text.split(",")))


def _rates(text: str) -> tuple[float, ...]:
    rates = tuple(float(part) for part in text.split(","))
    if not all(0 < rate < float("inf") for rate in rates):
        raise argparse.ArgumentTypeError(f"{text!r}: rates are more than 0 and finite")
    return rates


def _floors(text: str) -> dict[int, float]:
    """Read `TP:MS,..` into seconds by degree."""
    pairs = [part.partition(":") for part in text.split(",")]
    return {_positive(tp): float(ms) / 1e3 for tp, _, ms in pairs}


def _slo(text: str) -> Slo:
    try:
        return Slo.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not 1 or more")
    return value


def _natural(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is negative")
    return value

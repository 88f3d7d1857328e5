"""Whether every finished answer of the real server follows its JSON schema, and what grammar masks cost.

Schemas: those of JSON-Schema-Test-Suite (three drafts, as the source distribution of `jsonschema` carries them),
objects composed of them, and random ones. Each goes to /v1/chat/completions as `json_schema`, at temperature 1 with its
own seed, many at once; what the server refuses with 400 is counted by reason, and every answer that ended by itself
must be JSON that the original schema accepts (checked by the `jsonschema` library).

Cost: `--concurrency` streams of the same length, free and constrained in turn; time per output token of both, and the
time that rank 0 spent on masks as a share of its steps. On a CPU, masks compete with the forward pass for its cores; on
a GPU they are computed beside it.

Run as `PYTHONPATH=tests:deploy/python .venv/bin/python benchmarks/structured_output.py MODEL`; needs no GPU. Prints one
JSON object last.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import random
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jsonschema
import jsonschema.validators
import openai

from json_schemas import Schema, composed_schemas, random_schema, suite_schemas
from server import MODEL_NAME, Server

SUITE_PACKAGE = "jsonschema==4.26.0"
COST_SCHEMA: Schema = {
    "type": "array",
    "minItems": 1000,
    "items": {
        "type": "object",
        "properties": {"name": {"type": "string"}, "score": {"type": "number"}, "kind": {"enum": ["cat", "dog"]}},
        "required": ["name", "score", "kind"],
    },
}
"""Never done within the benchmark's lengths; strings, numbers and fixed parts alternate."""


def fetch_suite(folder: Path) -> Path:
    """Return the `tests` folder of JSON-Schema-Test-Suite, out of a source distribution."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "-q", SUITE_PACKAGE]
    subprocess.run(command, cwd=folder, check=True)
    (archive,) = folder.glob("jsonschema-*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(folder, filter="data")
    (tests,) = folder.glob("jsonschema-*/json/tests")
    return tests


def verdict(schema: Any, finish: str, text: str) -> str:
    """Say what an answer is: valid, cut (unfinished), or what is wrong with it."""
    try:
        value = json.loads(text)
    except ValueError:
        return "cut" if finish == "length" else "NOT JSON"
    kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    try:
        kind(schema).validate(value)
    except jsonschema.ValidationError:
        return "cut" if finish == "length" else "INVALID"
    return "valid" if finish == "stop" else "valid, cut behind its end"


async def ask_all(
    server: Server, schemas: list[Any], concurrency: int, max_tokens: int, wrong: list[Any]
) -> Counter[str]:
    """Send every schema once; return how many answers were what."""
    counts: Counter[str] = Counter()
    gate = asyncio.Semaphore(concurrency)

    async def ask(client: openai.AsyncOpenAI, number: int, schema: Any) -> None:
        prompt = f"Write a short JSON document that follows this schema:\n{json.dumps(schema)[:600]}"
        async with gate:
            try:
                reply = await client.chat.completions.create(
                    model=MODEL_NAME,
                    messages=[{"role": "user", "content": prompt}],
                    temperature=1.0,
                    seed=number,
                    max_tokens=max_tokens,
                    response_format={"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}},
                )
            except openai.BadRequestError as error:
                counts[f"refused: {error.code}"] += 1
                return
        choice = reply.choices[0]
        what = verdict(schema, choice.finish_reason, choice.message.content or "")
        counts[what] += 1
        if what in ("NOT JSON", "INVALID"):
            wrong.append({"schema": schema, "text": choice.message.content, "seed": number})

    async with server.async_client() as client:
        await asyncio.gather(*(ask(client, number, schema) for number, schema in enumerate(schemas)))
    return counts


async def time_streams(
    server: Server, concurrency: int, num_tokens: int, constrained: bool, seed: int
) -> dict[str, float]:
    """Run streams of one length; return milliseconds per output token and what the ranks say of their steps."""
    names = ("step_seconds_sum", "step_seconds_count", "grammar_mask_seconds_total")
    fields: dict[str, Any] = {"extra_body": {"ignore_eos": True}}
    if constrained:
        fields = {"response_format": {"type": "json_schema", "json_schema": {"name": "list", "schema": COST_SCHEMA}}}
    fields["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}

    async def run(client: openai.AsyncOpenAI, number: int) -> float:
        first = last = 0.0
        count = 0
        stream: Any = await client.chat.completions.create(
            model=MODEL_NAME,
            messages=[{"role": "user", "content": f"List animals, {number}."}],
            temperature=1.0,
            seed=seed * 1000 + number,
            max_tokens=num_tokens,
            stream=True,
            **fields,
        )
        async for chunk in stream:
            if chunk.usage is not None and chunk.usage.completion_tokens > count:
                count, last = chunk.usage.completion_tokens, time.perf_counter()
                first = first or last
        assert count == num_tokens, f"{count} tokens came, not {num_tokens}"
        return (last - first) / (count - 1)

    before = [server.metric(name) for name in names]
    async with server.async_client() as client:
        tpots = await asyncio.gather(*(run(client, number) for number in range(concurrency)))
    steps_s, steps, masks_s = (server.metric(name) - old for name, old in zip(names, before, strict=True))
    return {
        "mean_tpot_ms": statistics.mean(tpots) * 1e3,
        "step_ms": steps_s / steps * 1e3,
        "mask_us_per_step": masks_s / steps * 1e6,
    }


def measure_cost(server: Server, concurrency: int, num_tokens: int, rounds: int) -> dict[str, Any]:
    """Alternate free and constrained rounds, after one of each to warm up."""
    runs: dict[bool, list[dict[str, float]]] = {False: [], True: []}
    for round_ in range(rounds + 1):
        for constrained in (False, True):
            result = asyncio.run(time_streams(server, concurrency, num_tokens, constrained, round_))
            if round_:
                runs[constrained].append(result)
                print(f"{'constrained' if constrained else 'free':12}", result, flush=True)
    median = {
        name: {key: statistics.median(run[key] for run in runs[kind]) for key in runs[kind][0]}
        for name, kind in (("free", False), ("constrained", True))
    }
    masked = median["constrained"]
    return {
        **median,
        "mask_us_per_token": masked["mask_us_per_step"] / concurrency,
        "mask_share_of_step": masked["mask_us_per_step"] / 1e3 / masked["step_ms"],
        "tpot_ratio": masked["mean_tpot_ms"] / median["free"]["mean_tpot_ms"],
        "runs": {"free": runs[False], "constrained": runs[True]},
    }


def main() -> int:
    """Run it; the exit code says whether every finished answer was right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--suite", type=Path, help="tests folder of JSON-Schema-Test-Suite; fetched if not given")
    parser.add_argument("--composed", type=int, default=500, help="schemas composed of the suite's")
    parser.add_argument("--random", type=int, default=200, help="random schemas")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--cost-tokens", type=int, default=100)
    parser.add_argument("--cost-rounds", type=int, default=3)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--serve-args", default="", help="further flags of tpserve serve")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    commit = ["git", "rev-parse", "--short", "HEAD"]
    result: dict[str, Any] = {
        "commit": subprocess.run(commit, capture_output=True, text=True, check=False).stdout.strip(),
        "device": args.serve_args if "cuda" in args.serve_args else f"{platform.machine()} CPU",
        "versions": {name: version(name) for name in ("xgrammar", "jsonschema", "apache-tvm")},
        "arguments": {key: str(value) for key, value in vars(args).items() if key not in ("output", "model", "suite")},
        "model": args.model.name,
        "answers": {},
        "wrong": [],
    }

    def save() -> None:
        if args.output is not None:  # after each part: a run that is cut short has not run for nothing
            args.output.write_text(json.dumps(result, indent=1) + "\n")

    with tempfile.TemporaryDirectory() as folder:
        suite = suite_schemas(args.suite or fetch_suite(Path(folder)))
        sets: dict[str, list[Any]] = {
            "composed": composed_schemas(rng, accepted(suite), args.composed),
            "random": [random_schema(rng) for _ in range(args.random)],
            "suite": suite,
        }
        flags = ["--tp", str(args.tp), "--max-num-seqs", str(args.concurrency), *args.serve_args.split()]
        with Server.running(args.model.resolve(), *flags, folder=Path(folder)) as server:
            result["cost"] = measure_cost(server, args.concurrency, args.cost_tokens, args.cost_rounds)
            save()
            for name, schemas in sets.items():
                counts = asyncio.run(ask_all(server, schemas, args.concurrency, args.max_tokens, result["wrong"]))
                result["answers"][name] = {"schemas": len(schemas), **dict(sorted(counts.items()))}
                print(name, result["answers"][name], flush=True)
                save()
    print(json.dumps(result))
    return 1 if result["wrong"] else 0


def accepted(schemas: list[Any]) -> list[Schema]:
    """Return the schemas that the server takes, to compose others of."""
    from tpserve.coordinator.gateway.json_schema import SchemaError, enforceable

    out = []
    for schema in schemas:
        try:
            enforceable(schema)
        except SchemaError:
            continue
        if isinstance(schema, dict):
            out.append(schema)
    return out


if __name__ == "__main__":
    sys.exit(main())

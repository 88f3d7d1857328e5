"""Whether requests of a conversation find what its earlier turns have left: routing by prefix against other policies.

Regime: `tpserve serve --replicas 2` with the demo model on this machine's CPU, once for each policy. Conversations of
several turns, each sending all that was said before; a few system prompts are shared by many conversations. So many
conversations run at once; each waits a random time between its turns, so that the order differs from turn to turn. All
of them together are more than one replica's KV cache holds, and about what both hold. Time to the first token is the
client's; hits are the replicas' own counters, cached prompt tokens over prompt tokens.

Run as `PYTHONPATH=tests:deploy/python .venv/bin/python benchmarks/router_prefix.py MODEL --output FILE`. It fails (exit
code 1) if a request fails. Prints one JSON object last.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import openai

from server import MODEL_NAME, Server

WORDS = "river stone garden winter music letter harbour engine silver market forest window bridge candle summer".split()


def text(rng: random.Random, num_words: int) -> str:
    """Return words that no other conversation has in this order."""
    return " ".join(rng.choice(WORDS) for _ in range(num_words))


async def converse(
    client: openai.AsyncOpenAI, number: int, args: argparse.Namespace, ttfts_s: list[list[float]]
) -> None:
    """Hold one conversation; note each turn's time to the first token."""
    rng = random.Random(number)
    system = text(random.Random(-1 - number % args.systems), args.system_words)
    messages: list[Any] = [{"role": "system", "content": system}]
    for turn in range(args.turns):
        await asyncio.sleep(rng.uniform(0, args.think_s))
        messages.append({"role": "user", "content": text(rng, args.user_words)})
        begin = time.perf_counter()
        first: float | None = None
        answer = ""
        async for chunk in await client.chat.completions.create(
            model=MODEL_NAME,
            messages=messages,
            max_tokens=args.output_tokens,
            seed=number,
            stream=True,
            extra_body={"ignore_eos": True},
        ):
            if chunk.choices and chunk.choices[0].delta.content:
                first = first or time.perf_counter()
                answer += chunk.choices[0].delta.content
        assert first is not None, "an answer without text"
        ttfts_s[turn].append(first - begin)
        messages.append({"role": "assistant", "content": answer})


def summary(values_s: list[float]) -> dict[str, float]:
    """Return mean and 90th percentile in ms."""
    ordered = sorted(values_s)
    return {
        "mean": round(1e3 * statistics.mean(ordered), 1),
        "p50": round(1e3 * statistics.median(ordered), 1),
        "p90": round(1e3 * ordered[len(ordered) * 9 // 10], 1),
    }


async def run(server: Server, args: argparse.Namespace) -> dict[str, Any]:
    """Hold all conversations; return what came of them."""
    ttfts_s: list[list[float]] = [[] for _ in range(args.turns)]
    waiting = list(range(args.conversations))

    async def worker(client: openai.AsyncOpenAI) -> None:
        while waiting:
            await converse(client, waiting.pop(0), args, ttfts_s)

    begin = time.perf_counter()
    async with server.async_client() as client:
        await asyncio.gather(*(worker(client) for _ in range(args.concurrency)))
    wall_s = time.perf_counter() - begin
    metrics = server.metrics()

    def total(name: str) -> list[float]:
        return [metrics[f"tpserve_{name}_total{{replica={replica}}}"] for replica in range(args.replicas)]

    queries, hits = total("prefix_cache_queries"), total("prefix_cache_hits")
    return {
        "requests": sum(map(len, ttfts_s)),
        "wall_s": round(wall_s, 1),
        "prompt_tokens": sum(queries),
        "hit_rate": round(sum(hits) / sum(queries), 3),
        "estimated_by_the_router": round(
            metrics["tpserve_router_matched_blocks_total"] / metrics["tpserve_router_prompt_blocks_total"], 3
        ),
        "prompt_tokens_by_replica": queries,
        "ttft_ms": summary([value for turn in ttfts_s for value in turn]),
        "ttft_ms_of_later_turns": summary([value for turn in ttfts_s[1:] for value in turn]),
    }


def main() -> int:
    """Measure each policy; the last line is one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=os.path.abspath)
    parser.add_argument("--policies", default="round-robin,least-loaded,prefix", help="by commas")
    parser.add_argument("--rounds", type=int, default=2, help="of all policies, one after the other")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--conversations", type=int, default=24)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--concurrency", type=int, default=6, help="conversations at once")
    parser.add_argument("--systems", type=int, default=4, help="shared system prompts")
    parser.add_argument("--system-words", type=int, default=120)
    parser.add_argument("--user-words", type=int, default=50)
    parser.add_argument("--output-tokens", type=int, default=32)
    parser.add_argument("--think-s", type=float, default=1.0, help="before a turn, at most")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    runs = []
    for _ in range(args.rounds):
        for policy in args.policies.split(","):
            flags = ("--replicas", str(args.replicas), "--policy", policy, "--max-num-seqs", "8")
            with tempfile.TemporaryDirectory(prefix="router-prefix-") as folder:
                with Server.running(args.model, *flags, folder=Path(folder)) as server:
                    runs.append({"policy": policy, **asyncio.run(run(server, args))})
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    result = {
        "commit": commit.stdout.strip(),
        "device": f"{os.cpu_count()} cores, {platform.machine()}",
        "arguments": {key: value for key, value in vars(args).items() if key not in ("model", "output")},
        "runs": runs,
    }
    if args.output is not None:
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Measures what a draft's own ranks cost a step in messages: what a step emitted, and the proposals for the next.

Regime: model and draft in two processes of one host, over TCP on loopback, no model in either: the draft answers each
step's tokens with proposals at once, so a round is the two messages and the processes' waking up.

Run: python benchmarks/draft_link.py [--steps N] [--running 1 16 64] [--draft-tokens K]
The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import socket
import statistics
from dataclasses import replace
from pathlib import Path
from time import perf_counter_ns

import numpy as np

from tpserve.collectives.rendezvous import listen
from tpserve.proto.rank import RankConfig
from tpserve.proto.speculation import Speculation
from tpserve.worker.draft_link import DraftEnd, TargetEnd


def measure(num_running: int, num_draft_tokens: int, num_steps: int) -> list[float]:
    """Return the time of each round in microseconds."""
    door = listen("127.0.0.1")
    own = Speculation("draft", num_draft_tokens, draft_placement="dedicated")
    config = RankConfig(0, 1, Path(), Path(), "dummy", 8, num_running, 1, "benchmark", 10.0, speculation=own)
    config = replace(config, draft_door=f"127.0.0.1:{door.getsockname()[1]}")
    context = multiprocessing.get_context("fork")  # with the door
    draft = context.Process(target=_draft, args=(config, door, num_running, num_draft_tokens, num_steps), daemon=True)
    draft.start()
    door.close()
    target = TargetEnd(config)
    slots = np.arange(num_running, dtype=np.int32)
    token_ids = np.full((num_running, num_draft_tokens + 1), 12345, np.int32)
    counts = np.full(num_running, num_draft_tokens + 1, np.int32)
    times = []
    for step in range(num_steps):
        begun = perf_counter_ns()
        target.tell(step, slots, token_ids, counts)
        target.proposals(step + 1, slots, num_draft_tokens)
        times.append((perf_counter_ns() - begun) / 1e3)
    target.close()
    draft.join(10)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--running", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--draft-tokens", type=int, default=4)
    arguments = parser.parse_args()
    rows = []
    for num_running in arguments.running:
        times = sorted(measure(num_running, arguments.draft_tokens, arguments.steps)[100:])
        rows.append(
            {
                "running": num_running,
                "median_us": round(statistics.median(times), 1),
                "p99_us": round(times[int(0.99 * len(times))], 1),
            }
        )
        print(f"{num_running} running: {rows[-1]['median_us']} us a round, p99 {rows[-1]['p99_us']} us")
    print(json.dumps({"benchmark": "draft_link", "arguments": vars(arguments), "rounds": rows}))


def _draft(config: RankConfig, door: socket.socket, num_running: int, num_draft_tokens: int, num_steps: int) -> None:
    draft = DraftEnd(replace(config, rank=1), door)
    slots = np.arange(num_running, dtype=np.int32)
    token_ids = np.full((num_running, num_draft_tokens), 12345, np.int32)
    for step in range(num_steps):
        draft.emitted(step)
        draft.propose(step + 1, slots, token_ids)
    draft.close()


if __name__ == "__main__":
    main()

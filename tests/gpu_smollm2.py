"""Greedy text of SmolLM2 on one GPU against the goldens: python gpu_smollm2.py ARTIFACT MODEL_FOLDER GOLDENS."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

from tpserve.coordinator.config import SchedulerConfig
from tpserve.coordinator.request import Request
from tpserve.coordinator.scheduler import Scheduler
from tpserve.proto.manifest import Manifest
from tpserve.proto.messages import SamplingParams
from tpserve.proto.rank import RankConfig


def main() -> None:
    artifact, model, goldens = map(Path, sys.argv[1:4])
    logging.basicConfig(level=logging.INFO)
    from tpserve.worker.device_runner import DeviceRunner

    manifest = Manifest.load(artifact)
    num_pages = 2048
    config = RankConfig(0, 1, model, artifact, "auto", num_pages, manifest.max_num_seqs, 1, "g", 60.0, device=0)
    started = time.perf_counter()
    runner = DeviceRunner(config, lambda done, total: None)
    print("ready in", time.perf_counter() - started)
    prompts = json.loads(goldens.read_text())["prompts"]

    def make(prefix: bool) -> Scheduler:
        return Scheduler(
            SchedulerConfig(
                max_num_seqs=manifest.max_num_seqs,
                max_num_batched_tokens=manifest.max_num_batched_tokens,
                max_model_len=manifest.max_model_len,
                page_size=16,
                num_pages=num_pages,
                enable_prefix_cache=prefix,
            )
        )

    scheduler = make(True)

    def run(requests: list[Request]) -> dict[int, list[int]]:
        out: dict[int, list[int]] = {request.request_id: [] for request in requests}
        for request in requests:
            scheduler.add_request(request)
        pending: deque[Any] = deque()
        while scheduler.has_unfinished or pending:
            while (plan := scheduler.schedule()) is not None:
                pending.append(runner.submit(plan))
            for event in scheduler.update(pending.popleft().wait()):
                out[event.request_id] += event.token_ids
        return out

    def request(i: int, index: int) -> Request:
        golden = prompts[index]
        return Request(
            i, tuple(golden["prompt_token_ids"]), SamplingParams(temperature=0.0), len(golden["output_token_ids"])
        )

    texts = {}
    for label, batches in (
        ("alone", [[i] for i in range(len(prompts))]),
        ("together", [list(range(len(prompts)))]),
        ("again, from the prefix cache", [list(range(len(prompts)))]),
    ):
        texts[label] = {}
        for batch in batches:
            got = run([request(1000 * len(texts) + i, i) for i in batch])
            for i in batch:
                texts[label][i] = got[1000 * len(texts) + i]
        same = 0
        for i, golden in enumerate(prompts):
            want, have = golden["output_token_ids"], texts[label][i]
            first = next((k for k, (a, b) in enumerate(zip(want, have)) if a != b), None)
            if first is None and len(want) == len(have):
                same += 1
            else:
                print(label, golden["name"], "first difference at", first, "reference gap", golden["gaps"][first or 0])
        print(f"{label}: {same} of {len(prompts)} equal the float32 reference", flush=True)
    print("alone == together:", texts["alone"] == texts["together"])
    print("together == again:", texts["together"] == texts["again, from the prefix cache"])


main()

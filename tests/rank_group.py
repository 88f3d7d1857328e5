"""Real tensor-parallel groups without Ray: each rank is a process with a runner, on CPUs or GPUs, fed over a pipe.

Processes are kept from group to group, since starting one takes longer than a small model's test.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import tempfile
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from time import monotonic
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from shared_cache import as_cache, new_home
from tpserve.collectives.rendezvous import listen
from tpserve.compile.artifact import build_artifact
from tpserve.compile.cache import CachePolicy
from tpserve.compile.config import CompileConfig, ModelConfig
from tpserve.compile.source import stored_quantization
from tpserve.coordinator.request import TokenEvent
from tpserve.coordinator.scheduler import Scheduler
from tpserve.proto.messages import StepPlan, StepResult
from tpserve.proto.rank import RankConfig
from tpserve.proto.speculation import Speculation

Logits = npt.NDArray[np.float32]

DEADLINE_S = 120.0
"""For any answer of a rank; only a hang meets it."""


class RankFailed(RuntimeError):
    """A rank raised, died or did not answer."""


class RankProcesses:
    """Processes that become ranks of one group after another; close it to end them.

    Parameters
    ----------
    device_runner
        What runs a rank on a GPU: called as `DeviceRunner`, found by its name in each process. None: `DeviceRunner`.
    runner
        The same of a CPU.
    """

    def __init__(
        self, device_runner: Callable[..., Any] | None = None, runner: Callable[..., Any] | None = None
    ) -> None:
        self._device_runner = device_runner
        self._runner = runner
        self._ranks: list[tuple[BaseProcess, Connection]] = []

    def close(self) -> None:
        """End every process, by force if need be."""
        for _, pipe in self._ranks:
            pipe.close()  # a rank that waits for work ends
        for process, _ in self._ranks:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join(5)
            process.close()
        self._ranks.clear()

    @contextmanager
    def group(
        self,
        model_dir: Path,
        artifact_dir: Path,
        tp_size: int,
        *,
        num_pages: int = 64,
        max_num_seqs: int = 16,
        num_threads: int = 1,
        load_format: Literal["auto", "dummy"] = "auto",
        devices: Sequence[int] | None = None,
        collectives: Literal["auto", "push", "nccl"] = "auto",
        speculation: Speculation | None = None,
        start_timeout_s: float = DEADLINE_S,
    ) -> Iterator[RankGroup]:
        """Load a model on the first `tp_size` processes; rank r on GPU `devices[r]`, or all on CPUs.

        A draft's own ranks are on the processes behind them. `start_timeout_s` is for loading and capturing.

        Ranks of a group over NCCL have processes of their own, as every rank of the engine does: after collectives over
        peer memory such a group failed, and one over peer memory that came after it met an illegal address.
        """
        if collectives == "nccl":
            self.close()
        context = multiprocessing.get_context("spawn")
        num_draft_ranks = 0 if speculation is None else speculation.num_draft_ranks
        while len(self._ranks) < tp_size + num_draft_ranks:
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, self._device_runner, self._runner), daemon=True)
            process.start()
            theirs.close()
            self._ranks.append((process, ours))
        pipes = [pipe for _, pipe in self._ranks[: tp_size + num_draft_ranks]]
        name = f"tpserve-test-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        try:
            rendezvous, draft_door, target_door, draft_rendezvous = "", "", "", ""
            if num_draft_ranks:
                draft_door = _open_door(pipes[tp_size], "draft")
            if num_draft_ranks > 1 and devices is not None:
                draft_rendezvous = _open_door(pipes[tp_size], "group")
            elif num_draft_ranks > 1:
                target_door = _open_door(pipes[0], "draft")
            if devices is not None and tp_size > 1:
                rendezvous = _open_door(pipes[0], "group")
            for rank, pipe in enumerate(pipes):
                config = RankConfig(
                    rank=rank,
                    tp_size=tp_size,
                    model_dir=model_dir,
                    artifact_dir=artifact_dir,
                    load_format=load_format,
                    num_pages=num_pages,
                    max_num_seqs=max_num_seqs,
                    num_threads=num_threads,
                    group_name=name,
                    collective_timeout_s=60.0,
                    device=None if devices is None else devices[rank],
                    rendezvous=rendezvous if rank < tp_size else draft_rendezvous,
                    collectives=collectives,
                    speculation=speculation,
                    draft_door=draft_door,
                    target_door=target_door,
                )
                pipe.send(("load", config))
            _collect(pipes, start_timeout_s)
            yield RankGroup(pipes, tp_size)
            for pipe in pipes:
                pipe.send(("close", None))
            _collect(pipes)
            if collectives == "nccl":
                self.close()
        except BaseException:
            self.close()  # their state is unknown; the next group starts new ones
            raise


class RankGroup:
    """The ranks of one loaded model. Plans are numbered here, so that each caller may start at any step."""

    def __init__(self, pipes: list[Connection], tp_size: int) -> None:
        self._pipes = pipes
        self._models = pipes[:tp_size]
        self.num_ranks = len(pipes)
        self._next_step = 1
        self._occupied: set[int] = set()
        self._submitted: deque[int] = deque()

    def submit(self, plan: StepPlan) -> None:
        """Queue one step on all ranks, behind those before it."""
        self._send("submit", plan)
        self._submitted.append(plan.step_id)

    def wait(self) -> StepResult:
        """Return rank 0's result of the oldest step that was submitted."""
        for pipe in self._pipes:
            pipe.send(("wait", None))
        result: StepResult = _collect(self._pipes)[0]
        return replace(result, step_id=self._submitted.popleft())

    def execute(self, plan: StepPlan) -> StepResult:
        """Run one step on all ranks; return rank 0's result."""
        self.submit(plan)
        return self.wait()

    def logits(self, plan: StepPlan) -> list[Logits]:
        """Run one step on CPUs; return each rank's (R, padded vocabulary)."""
        self._send("logits", plan)
        return _collect(self._pipes)

    def call(self, method: str, *arguments: object) -> list[Any]:
        """Call a method of the runner of each of the model's ranks between steps, when all results are there."""
        assert not self._submitted, "steps are on their way"
        for pipe in self._models:
            pipe.send(("call", (method, arguments)))
        return _collect(self._models)

    def profile(self) -> None:
        """Begin to record what rank 0's GPU does; needs torch, for its profiler."""
        self._pipes[0].send(("profile", None))
        _collect(self._pipes[:1])

    def profiled(self) -> list[tuple[str, float, float]]:
        """End the recording; return each kernel's and copy's name, start and end in microseconds."""
        self._pipes[0].send(("profiled", None))
        events: list[tuple[str, float, float]] = _collect(self._pipes[:1])[0]
        return events

    def clear(self) -> None:
        """Empty all slots."""
        self.submit(StepPlan(0, removed_slots=tuple(self._occupied)))
        self.wait()

    def _send(self, kind: str, plan: StepPlan) -> None:
        self._occupied -= set(plan.removed_slots)
        self._occupied |= {added.slot for added in plan.added_slots}
        numbered = replace(plan, step_id=self._next_step)
        self._next_step += 1
        for pipe in self._pipes:
            pipe.send((kind, numbered))


def run_scheduler(group: RankGroup, scheduler: Scheduler, *, clear: bool = True) -> list[TokenEvent]:
    """Step until every request has ended, with as many plans ahead of results as the scheduler makes.

    Then the slots are emptied for the next scheduler, unless this one goes on: it removes its sequences itself.
    """
    events: list[TokenEvent] = []
    while scheduler.has_unfinished or scheduler.num_in_flight_steps:
        while (plan := scheduler.schedule()) is not None:
            group.submit(plan)
        events += scheduler.update(group.wait())
    if clear:
        group.clear()
    return events


class Artifacts:
    """Compiled models of one test session, in a cache of its own but for kernels."""

    def __init__(self, home: Path) -> None:
        self.home = new_home(home)

    def build(
        self,
        model_dir: Path,
        tp_size: int,
        *,
        kernels: Literal["tuned", "portable"] = "tuned",
        max_model_len: int = 256,
        max_num_batched_tokens: int = 1024,
        max_num_seqs: int = 16,
        max_num_draft_tokens: int = 0,
        target: Literal["llvm", "cuda"] = "llvm",
        quantization: Literal["q0f32", "q0bf16", "fp8"] | None = None,
        kv_cache_dtype: Literal["auto", "fp8"] = "auto",
    ) -> Path:
        """Return the artifact of a model; weights are as stored, if not said otherwise."""
        config = CompileConfig(
            tp_size=tp_size,
            quantization=quantization or stored_quantization(model_dir),
            kernels=kernels,
            target=target,
            max_model_len=max_model_len,
            max_num_batched_tokens=max_num_batched_tokens,
            max_num_seqs=max_num_seqs,
            max_num_draft_tokens=max_num_draft_tokens,
            kv_cache_dtype=kv_cache_dtype,
        )
        with as_cache(self.home):
            return build_artifact(ModelConfig.from_hf(model_dir), config, CachePolicy.ON)


def _collect(pipes: list[Connection], timeout_s: float = DEADLINE_S) -> list[Any]:
    """Return each rank's answer; the first failure ends the wait, since the others may wait for that rank."""
    answers: dict[Connection, Any] = {}
    deadline = monotonic() + timeout_s
    while len(answers) < len(pipes):
        ready = wait([pipe for pipe in pipes if pipe not in answers], max(0.0, deadline - monotonic()))
        if not ready:
            late = [rank for rank, pipe in enumerate(pipes) if pipe not in answers]
            raise RankFailed(f"ranks {late} did not answer within {timeout_s:.0f} s")
        for pipe in ready:
            assert isinstance(pipe, Connection)
            try:
                error, answer = pipe.recv()
            except (EOFError, ConnectionError):
                raise RankFailed(f"rank {pipes.index(pipe)} died") from None
            if error:
                raise RankFailed(f"rank {pipes.index(pipe)}: {error}")
            answers[pipe] = answer
    return [answers[pipe] for pipe in pipes]


def _open_door(pipe: Connection, door: str) -> str:
    """Let a rank open a door, as `Rank.open_door` does; return its address."""
    pipe.send(("open door", door))
    address: str = _collect([pipe])[0]
    return address


def _serve(
    pipe: Connection, device_runner: Callable[..., Any] | None, cpu_runner: Callable[..., Any] | None = None
) -> None:
    """Run in each process: do what comes over the pipe until it is closed."""
    from tpserve.worker.runner import Runner

    runner: Any = None
    profiler: Any = None
    doors: dict[str, socket.socket] = {}
    pending: deque[Any] = deque()
    try:
        while True:
            kind, what = pipe.recv()
            answer: object = None
            if kind == "submit":
                assert runner is not None, "submit before load"
                pending.append(runner.submit(what))
                continue
            if kind == "open door":
                doors[what] = listen("127.0.0.1")
                answer = f"127.0.0.1:{doors[what].getsockname()[1]}"
            elif kind == "load" and what.device is not None:
                from tpserve.worker.device_draft_runner import DeviceDraftRunner
                from tpserve.worker.device_runner import DeviceRunner

                arguments = (what, lambda done, total: None, doors.get("group"))
                make = partial(device_runner or DeviceRunner, *arguments)
                if what.draft_rank is not None:
                    make = partial(DeviceDraftRunner, *arguments, doors.get("draft"))
                # In a server, too, steps come from another thread than the one that loads: CUDA's current device is a
                # thread's own.
                with ThreadPoolExecutor(1) as loader:
                    runner = loader.submit(make).result()
                doors.clear()
            elif kind == "load" and what.draft_rank is not None:
                from tpserve.worker.draft_runner import DraftRunner

                runner = DraftRunner(what, lambda done, total: None, door=doors.pop("draft", None))
            elif kind == "load":
                runner = (cpu_runner or Runner)(what, lambda done, total: None, drafts_door=doors.pop("draft", None))
            elif runner is None:
                raise AssertionError(f"{kind} before load")
            elif kind == "close":
                runner.close()
                runner = None
            elif kind == "wait":
                answer = pending.popleft().wait()
            elif kind == "call":
                method, arguments = what
                answer = getattr(runner, method)(*arguments)
            elif kind == "profile":
                import torch

                profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
                profiler.start()
            elif kind == "profiled":
                answer = _kernels_of(profiler)
            else:
                arrays, logits = runner.forward(what)
                answer = np.from_dlpack(logits).copy()
                runner.sample(arrays, logits)
            pipe.send((None, answer))
    except EOFError:
        return
    except Exception as error:
        pipe.send((f"{type(error).__name__}: {error}", None))
    finally:
        if runner is not None:
            runner.close()


def _kernels_of(profiler: Any) -> list[tuple[str, float, float]]:
    profiler.stop()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    device = [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    return sorted((event["name"], event["ts"], event["ts"] + event["dur"]) for event in device)

"""gRPC door of one rank: plans in, results out; translates only."""

from __future__ import annotations

import contextlib
import hmac
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
from dataclasses import dataclass
from typing import Any, Protocol

import grpc

from tpserve.proto.messages import StepPlan, StepResult
from tpserve.proto.pb import worker_pb2, worker_pb2_grpc
from tpserve.proto.rank import COORDINATOR_TLS_NAME, LET_IN, TlsIdentity
from tpserve.worker.group_tls import server_credentials

logger = logging.getLogger(__name__)

_GATHER_S = 0.01
"""Many steps of a small model; nothing that a person would see in metrics."""
_OPTIONS = [
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.so_reuseport", 0),
    # Shows within half a minute that the coordinator's host is cut off, which closes no connection.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 20_000),
]


class PendingResult(Protocol):
    """A step that was submitted."""

    def wait(self) -> StepResult:
        """Block until it is done."""


@dataclass(frozen=True, slots=True)
class DoneStep:
    """A step on a CPU is done when it is submitted."""

    result: StepResult

    def wait(self) -> StepResult:
        """Return the result."""
        return self.result


class PlanRunner(Protocol):
    """What executes plans: `runner.Runner` on a CPU, `device_runner.DeviceRunner` on a GPU."""

    def submit(self, plan: StepPlan) -> PendingResult:
        """Run one step behind those before it, now or on the device."""


class WorkerService(worker_pb2_grpc.WorkerServicer):
    """Executes the plans of one stream in order; after an error the rank is of no more use and says so.

    One thread submits plans as they come, another waits for results, so a device always has its next step.

    Parameters
    ----------
    token
        What a caller must show; None takes everybody.
    tls
        The door's, if it has one: then a caller must be the coordinator by its certificate, too.
    on_end
        Called when a stream has ended, however it did.
    """

    def __init__(
        self,
        runner: PlanRunner,
        rank: int,
        token: str | None = None,
        on_end: Callable[[], None] | None = None,
        tls: TlsIdentity | None = None,
    ) -> None:
        self._tls = tls
        self._runner = runner
        self._rank = rank
        self._token = token
        self._on_end = on_end

    def Execute(
        self, request_iterator: Iterator[worker_pb2.StepPlan], context: grpc.ServicerContext
    ) -> Iterator[worker_pb2.StepResults]:
        """Run each plan as it comes."""
        if self._token is not None:
            shown = dict(context.invocation_metadata()).get("authorization", "")
            if not hmac.compare_digest(str(shown).encode(), f"Bearer {self._token}".encode()):
                context.abort(grpc.StatusCode.UNAUTHENTICATED, "this rank takes plans of its own coordinator alone")
        if self._tls is not None:
            peer: Mapping[str, Any] = context.auth_context()  # the stubs have another type than comes
            names: list[bytes] = list(peer.get("x509_subject_alternative_name", ()))
            if names != [COORDINATOR_TLS_NAME.encode()]:
                context.abort(
                    grpc.StatusCode.UNAUTHENTICATED,
                    f"this rank takes plans of its coordinator alone, not of {b', '.join(names).decode()}",
                )
        context.send_initial_metadata(((LET_IN, str(self._rank)),))
        if self._on_end is not None:
            context.add_callback(self._on_end)
        submitted: queue.SimpleQueue[tuple[int, PendingResult | Exception] | None] = queue.SimpleQueue()
        threading.Thread(target=self._submit_all, args=(request_iterator, submitted), daemon=True).start()
        results = self._wait_for(submitted)
        for gathered in ([result] for result in results) if self._rank == 0 else _gather(results):
            yield worker_pb2.StepResults(results=[result.to_pb() for result in gathered])

    def _wait_for(
        self, submitted: queue.SimpleQueue[tuple[int, PendingResult | Exception] | None]
    ) -> Iterator[StepResult]:
        """Give the result of each step when it is there; an error is the last."""
        while (item := submitted.get()) is not None:
            step_id, pending = item
            try:
                if isinstance(pending, Exception):
                    raise pending
                result = pending.wait()
            except Exception as error:
                # Whatever it was, this rank's state is unknown now: report the cause and end the group.
                logger.exception("step %d failed", step_id)
                yield StepResult(step_id, self._rank, error=f"{type(error).__name__}: {error}")
                return
            yield result

    def _submit_all(
        self,
        messages: Iterator[worker_pb2.StepPlan],
        submitted: queue.SimpleQueue[tuple[int, PendingResult | Exception] | None],
    ) -> None:
        try:
            for message in messages:
                try:
                    submitted.put((message.step_id, self._runner.submit(StepPlan.from_pb(message))))
                except Exception as error:
                    submitted.put((message.step_id, error))
                    return
        except grpc.RpcError:
            logger.info("the coordinator has ended the stream")
        finally:
            submitted.put(None)


def _gather(results: Iterator[StepResult]) -> Iterator[list[StepResult]]:
    """Give results some at a time; none waits longer than `_GATHER_S`, and an error that comes first not at all.

    A message costs the coordinator about 0.1 ms, however much is in it, and each rank's would come when a step ends,
    just when the next one is to be planned.
    """
    done: queue.SimpleQueue[StepResult | None] = queue.SimpleQueue()

    def wait_for_all() -> None:
        try:
            for result in results:
                done.put(result)
        finally:
            done.put(None)

    threading.Thread(target=wait_for_all, daemon=True).start()
    while (result := done.get()) is not None:
        gathered = [result]
        if not result.error:
            time.sleep(_GATHER_S)
        with contextlib.suppress(queue.Empty):
            while (result := done.get_nowait()) is not None:
                gathered.append(result)
        yield gathered
        if result is None:
            return


def serve(
    runner: PlanRunner,
    rank: int,
    host: str,
    token: str | None = None,
    on_end: Callable[[], None] | None = None,
    tls: TlsIdentity | None = None,
) -> tuple[grpc.Server, int]:
    """Start the door on a free port; return the server and the port.

    With `tls` it takes members of the group alone. See `WorkerService` for `token` and `on_end`.
    """
    # One stream, one thread: plans run in order, and a second coordinator must wait.
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=1), options=_OPTIONS)
    worker_pb2_grpc.add_WorkerServicer_to_server(  # type: ignore[no-untyped-call]  # generated
        WorkerService(runner, rank, token, on_end, tls), server
    )
    if tls is None:
        port = server.add_insecure_port(f"{host}:0")
    else:
        port = server.add_secure_port(f"{host}:0", server_credentials(tls))
    server.start()
    return server, port

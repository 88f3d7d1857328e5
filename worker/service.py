"""gRPC door of one rank: plans in, results out; translates only."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent import futures
from typing import Protocol

import grpc

from tpserve.proto.messages import StepPlan, StepResult
from tpserve.proto.pb import worker_pb2, worker_pb2_grpc

logger = logging.getLogger(__name__)

_OPTIONS = [("grpc.max_receive_message_length", 64 << 20), ("grpc.so_reuseport", 0)]


class PlanRunner(Protocol):
    """What executes plans: `worker.runner.Runner` in service."""

    def execute(self, plan: StepPlan) -> StepResult:
        """Run one step."""


class WorkerService(worker_pb2_grpc.WorkerServicer):
    """Executes the plans of one stream in order; after an error the rank is of no more use and says so."""

    def __init__(self, runner: PlanRunner, rank: int) -> None:
        self._runner = runner
        self._rank = rank

    def Execute(
        self, request_iterator: Iterator[worker_pb2.StepPlan], context: grpc.ServicerContext
    ) -> Iterator[worker_pb2.StepResult]:
        """Run each plan as it comes."""
        for message in request_iterator:
            try:
                result = self._runner.execute(StepPlan.from_pb(message))
            except Exception as error:
                # Whatever it was, this rank's state is unknown now: report the cause and end the group.
                logger.exception("step %d failed", message.step_id)
                cause = f"{type(error).__name__}: {error}"
                yield StepResult(message.step_id, self._rank, error=cause).to_pb()
                return
            yield result.to_pb()


def serve(runner: PlanRunner, rank: int, host: str) -> tuple[grpc.Server, int]:
    """Start the door on a free port; return the server and the port."""
    # One stream, one thread: plans run in order, and a second coordinator must wait.
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=1), options=_OPTIONS)
    worker_pb2_grpc.add_WorkerServicer_to_server(  # type: ignore[no-untyped-call]  # generated
        WorkerService(runner, rank), server
    )
    port = server.add_insecure_port(f"{host}:0")
    server.start()
    return server, port

"""OpenTelemetry: where spans go, and the spans of one request inside the coordinator.

Off unless an endpoint is given; then the `otel` extra must be installed. Attribute names are those of the GenAI
semantic conventions where these have one. Prompts and answers are in no span.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Sequence
from typing import Any

from tpserve.coordinator.step_log import StepLog
from tpserve.proto.messages import StepResult

logger = logging.getLogger(__name__)

_MAX_STEP_SPANS = 64
"""Steps of one request that get spans; how many were left out is an attribute."""
_STEP_LAG = 128
"""Steps after which a rank that has not reported one is not waited for."""
PROVIDER = "tpserve"
"""Value of gen_ai.provider.name."""


class TracingUnavailable(RuntimeError):
    """Spans cannot be exported; the message holds the remedy."""


class Tracing:
    """Exports the spans of one process over OTLP.

    The protocol is gRPC, or HTTP where OTEL_EXPORTER_OTLP_TRACES_PROTOCOL is `http/protobuf`; other variables of the
    OpenTelemetry SDK (headers, certificates, sampler) work as it documents them.

    Parameters
    ----------
    endpoint
        URL of the receiver.
    process
        `gateway` or `coordinator`, which makes the service's name.

    Raises
    ------
    TracingUnavailable
        If the extra is not installed or the protocol is not known.
    """

    def __init__(self, endpoint: str, process: str) -> None:
        protocol = os.environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "grpc")
        try:
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

            exporter: SpanExporter
            if protocol == "grpc":
                from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcExporter

                exporter = GrpcExporter(endpoint=endpoint, insecure=endpoint.startswith("http://") or None)
            elif protocol == "http/protobuf":
                from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpExporter

                exporter = HttpExporter(endpoint=endpoint)
            else:
                raise TracingUnavailable(
                    f"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL is {protocol!r}: it must be grpc or http/protobuf"
                )
        except ImportError as error:
            raise TracingUnavailable(
                f"--otlp-traces-endpoint needs the package {error.name}: pip install 'tpserve[otel]'"
            ) from None
        name = os.environ.get("OTEL_SERVICE_NAME", "tpserve")
        resource = Resource.create({"service.name": name, "service.instance.id": f"{process}-{os.getpid()}"})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._propagator = TraceContextTextMapPropagator()
        self.tracer = self._provider.get_tracer(f"tpserve.{process}")

    def context_of(self, traceparent: str, tracestate: str = "") -> Any:
        """Return the context that a W3C header names; an invalid one names none."""
        return self._propagator.extract({"traceparent": traceparent, "tracestate": tracestate})

    def traceparent(self) -> str:
        """Return the W3C header of the current span; empty if there is none."""
        carrier: dict[str, str] = {}
        self._propagator.inject(carrier)
        return carrier.get("traceparent", "")

    def shutdown(self, timeout_s: float = 2.0) -> None:
        """Send what is left; what a receiver has not taken by then is lost, and said so."""
        # The SDK's own time limits do not hold while an exporter retries.
        sending = threading.Thread(target=self._provider.shutdown, name="otlp-shutdown", daemon=True)
        sending.start()
        sending.join(timeout_s)
        if sending.is_alive():
            logger.warning("the OTLP receiver did not take the last spans within %g s", timeout_s)


class RequestSpans:
    """The spans of one request from acceptance to its last token: queue, prefill, decode, and steps on the ranks."""

    def __init__(self, tracing: Tracing, traceparent: str, name: str, num_prompt_tokens: int) -> None:
        self._tracer = tracing.tracer
        self._root = self._tracer.start_span(
            "engine.request",
            context=tracing.context_of(traceparent),
            attributes={"tpserve.request_id": name, "gen_ai.usage.input_tokens": num_prompt_tokens},
        )
        self._phase = self._open("engine.queue")
        self._pending: list[int] = []
        self._num_steps = 0

    def started(self) -> None:
        """Note that its first step was planned."""
        self._next_phase("engine.prefill")

    def first_token(self) -> None:
        """Note that it has begun to answer."""
        self._next_phase("engine.decode")

    def step(self, step_id: int, log: StepLog) -> None:
        """Note a step that gave it a token; its spans follow once all ranks have reported it."""
        self._num_steps += 1
        if self._num_steps <= _MAX_STEP_SPANS:
            self._pending.append(step_id)
        self._flush_steps(log, before=step_id - _STEP_LAG)

    def end(self, finish: Sequence[str], num_output_tokens: int) -> None:
        """Close everything but the steps that not all ranks have reported: those follow with `flush`.

        Parameters
        ----------
        finish
            Why each choice ended.
        """
        self._phase.end()
        self._root.set_attributes(
            {
                "gen_ai.usage.output_tokens": num_output_tokens,
                "gen_ai.response.finish_reasons": list(finish),
                "tpserve.num_steps": self._num_steps,
                "tpserve.num_step_spans_omitted": max(0, self._num_steps - _MAX_STEP_SPANS),
            }
        )
        if "failed" in finish:
            from opentelemetry.trace import StatusCode

            self._root.set_attribute("error.type", "engine_failed")
            self._root.set_status(StatusCode.ERROR)
        self._root.end()

    def flush(self, log: StepLog, *, is_last: bool = False) -> bool:
        """Emit the spans of steps that all ranks have reported by now; return whether none is left.

        Parameters
        ----------
        is_last
            Nothing more will be reported: emit what there is.
        """
        self._flush_steps(log, before=None if is_last else 0)
        return not self._pending

    def _open(self, name: str) -> Any:
        return self._tracer.start_span(name, context=_within(self._root))

    def _next_phase(self, name: str) -> None:
        self._phase.end()
        self._phase = self._open(name)

    def _flush_steps(self, log: StepLog, before: int | None) -> None:
        """Emit the spans of steps that are complete, or older than `before`; all that are left if that is None.

        Of a step that the log has forgotten there is nothing to emit.
        """
        left = []
        for step_id in self._pending:
            ranks = log.ranks_of(step_id)
            if ranks and before is not None and step_id >= before and not log.is_complete(step_id):
                left.append(step_id)
                continue
            for result in ranks:
                self._emit(result)
        self._pending = left

    def _emit(self, result: StepResult) -> None:
        begin_ns = result.started_us * 1000
        span = self._tracer.start_span(
            "worker.step",
            context=_within(self._phase),
            start_time=begin_ns,
            attributes={
                "tpserve.rank": result.rank,
                "tpserve.step": result.step_id,
                "tpserve.num_tokens": result.num_tokens,
                "tpserve.collective_us": result.collective_us,
            },
        )
        span.end(min(begin_ns + result.step_us * 1000, time.time_ns()))


def _within(span: Any) -> Any:
    from opentelemetry.trace import set_span_in_context

    return set_span_in_context(span)

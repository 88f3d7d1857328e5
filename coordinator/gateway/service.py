"""What the handlers share: the model, the engine, and the way from a checked request to a response."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import Response

from tpserve.coordinator.gateway.config import GatewayConfig
from tpserve.coordinator.gateway.engine_client import EngineClient
from tpserve.coordinator.gateway.engine_types import EngineRequest
from tpserve.coordinator.gateway.errors import ModelNotFound
from tpserve.coordinator.gateway.generation import Generation, Update, Usage
from tpserve.coordinator.gateway.grammar import GrammarChecker
from tpserve.coordinator.gateway.metering import meter_of
from tpserve.coordinator.gateway.metrics import HttpMetrics
from tpserve.coordinator.gateway.model import ServedModel
from tpserve.coordinator.gateway.stream import ChunkWriter, EventStream, json_response
from tpserve.coordinator.gateway.tracing import TracedCall
from tpserve.coordinator.relay import Progress
from tpserve.coordinator.tracing import Tracing


@dataclass(frozen=True, slots=True)
class AnswerHead:
    """What every part of an answer carries."""

    id: str
    created: int
    """Unix time, seconds."""
    model: str


class Answer(Protocol):
    """Collects a whole answer."""

    def add(self, update: Update) -> None:
        """Take what is new in a choice."""

    def to_dict(self, usage: Usage) -> dict[str, Any]:
        """Return the response body."""


@dataclass(frozen=True, slots=True)
class Service:
    """One gateway's parts."""

    config: GatewayConfig
    model: ServedModel
    engine: EngineClient
    metrics: HttpMetrics
    grammars: GrammarChecker
    tracing: Tracing | None = None
    created: int = field(default_factory=lambda: int(time.time()))
    """When the models appeared, for /v1/models; Unix time, seconds."""

    @classmethod
    def load(cls, config: GatewayConfig) -> Service:
        """Load the model's text side and prepare the engine session.

        Raises
        ------
        ModelFilesError
            If the model folder is not usable.
        TracingUnavailable
            If spans cannot be sent.
        TlsError
            If the files of the engine's port cannot be used.
        """
        tracing = None if config.otlp_traces_endpoint is None else Tracing(config.otlp_traces_endpoint, "gateway")
        engine = EngineClient(
            config.engine_address,
            rpc_timeout_s=config.rpc_timeout_s,
            session_timeout_s=config.session_timeout_s,
            traceparent=tracing.traceparent if tracing is not None else None,
            door=config.engine_door(),
        )
        model = ServedModel.load(Path(config.model_dir))
        return cls(config, model, engine, HttpMetrics(), GrammarChecker(config.model_dir), tracing)

    def start(self) -> None:
        """Begin to connect to the engine, in the background; whoever starts it closes it."""
        self.engine.start()

    async def close(self) -> None:
        """End the session and what else was started for requests."""
        await self.engine.close()
        await self.grammars.close()

    def resolve_model(self, name: str | None) -> str:
        """Return the name that the answer carries.

        Raises
        ------
        ModelNotFound
            If `name` is not served.
        """
        names = self.config.served_model_names
        if name is None:
            return names[0]
        if name not in names:
            shown = name if len(name) <= 100 else name[:97] + "..."
            raise ModelNotFound(
                f"The model {shown!r} does not exist; this server has {', '.join(map(repr, names))}", param="model"
            )
        return name

    async def respond(
        self,
        http: Request,
        requests: list[EngineRequest],
        *,
        progress: Progress | None = None,
        stops: tuple[str, ...],
        visible_tokens: Iterable[str] = (),
        writer: Callable[[Generation], ChunkWriter] | None,
        answer: Callable[[], Answer],
    ) -> Response:
        """Run the engine requests and return their text.

        Parameters
        ----------
        http
            Its body has been read.
        progress
            How far the stream is, if a router asks for marks.
        visible_tokens
            Special tokens that stand in the text by their name.
        writer
            Makes the writer of a streamed answer; None answers in one piece, by `answer`.

        Raises
        ------
        ApiError
            If nothing has been sent yet.
        """
        generation = Generation(
            self.engine,
            self.model.tokenizer,
            requests,
            progress=progress,
            stops=stops,
            visible_tokens=visible_tokens,
            timeout_s=self.config.request_timeout_s,
            meter=meter_of(http.scope["state"]),
        )
        if self.tracing is not None:
            call: TracedCall = http.state.traced_call
            call.begin(requests, self.config.served_model_names[0], generation.usage, is_stream=writer is not None)
        handed_over = False
        try:
            await generation.start(http.receive, self.config.accept_timeout_s)
            if writer is not None:
                handed_over = True
                return EventStream(
                    generation,
                    writer(generation),
                    self.metrics,
                    name=requests[0].name,
                    keep_alive_s=self.config.keep_alive_s,
                )
            whole = answer()
            async for updates in generation.updates():
                for update in updates:
                    whole.add(update)
            return json_response(whole.to_dict(generation.usage))
        finally:
            if not handed_over:
                generation.close()

"""What both Python engines are made of: a running engine, the session with it, and the local door to it."""

from __future__ import annotations

import asyncio
import atexit
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import grpc
import pydantic

from tpserve.coordinator.engine_channel import explain, open_blocking_channel
from tpserve.coordinator.engine_door import DOOR_FIELDS
from tpserve.coordinator.gateway import chat, completions
from tpserve.coordinator.gateway.answers import ChatCompletion, ChatCompletionChunk, Completion
from tpserve.coordinator.gateway.config import GatewayConfig
from tpserve.coordinator.gateway.engine_client import CHANNEL_OPTIONS
from tpserve.coordinator.gateway.engine_types import EngineStatus
from tpserve.coordinator.gateway.metrics import samples_by_name
from tpserve.coordinator.gateway.protocol import ChatCompletionRequest, CompletionRequest
from tpserve.coordinator.gateway.service import Service
from tpserve.coordinator.gateway.tls import TlsError
from tpserve.coordinator.gateway.tokenizer import ModelFilesError
from tpserve.coordinator.python_engine.door import Handler, LocalDoor, to_body
from tpserve.coordinator.python_engine.errors import EngineError
from tpserve.coordinator.python_engine.launcher import Launcher, own_door_fields, serve_arguments
from tpserve.coordinator.python_engine.loop import BackgroundLoop, shared_loop
from tpserve.coordinator.serve import default_names
from tpserve.proto.pb import engine_pb2, engine_pb2_grpc

_POLL_S = 0.02
_WRONG_ADDRESS = "it must be the address that `tpserve serve` logs as 'The engine listens at'"
_CALL_TIMEOUT_S = 30.0
"""Of what needs no tokens: metrics, closing the session."""

Whole = TypeVar("Whole", bound=pydantic.BaseModel)
Chunk = TypeVar("Chunk", bound=pydantic.BaseModel)


@dataclass(frozen=True, slots=True)
class Route(Generic[Whole, Chunk]):
    """One kind of request."""

    handler: Handler
    request: type[pydantic.BaseModel]
    whole: type[Whole]
    chunk: type[Chunk]

    def body(self, fields: dict[str, Any], extra_body: dict[str, Any] | None) -> bytes:
        """Return the request body.

        Raises
        ------
        TypeError
            If a field is unknown; over HTTP it would be ignored, but a keyword may not be.
        """
        if unknown := sorted(set(fields) - set(self.request.model_fields)):
            known = ", ".join(sorted(self.request.model_fields))
            raise TypeError(f"create() has no field {unknown[0]!r}; it has {known}")
        return to_body({**fields, **(extra_body or {})})


CHAT = Route(chat.create_chat_completion, ChatCompletionRequest, ChatCompletion, ChatCompletionChunk)
COMPLETION = Route(completions.create_completion, CompletionRequest, Completion, Completion)


@dataclass(frozen=True, slots=True)
class EngineMetrics:
    """The engine's metrics at one moment; `metrics["tpserve_num_requests_running"]` is a sample by its name."""

    text: str
    """Prometheus text format."""

    @property
    def samples(self) -> dict[str, float]:
        """Every sample by name; labels that tell more than which engine it is follow in braces."""
        return samples_by_name(self.text)

    def __getitem__(self, name: str) -> float:
        return self.samples[name]


class Core:
    """A running engine and this process's session with it.

    Parameters
    ----------
    model
        As for `tpserve serve`; with `address`, a folder with the model's tokenizer, or a name for the model, or None.
    address
        `host:port` of a running engine. None starts one.
    options
        Keyword forms of the flags of `tpserve serve`; with `address`, only those of the engine's port:
        `engine_ssl_certfile`, `engine_ssl_keyfile`, `engine_ssl_ca_certs` and `engine_token`.
    start_timeout_s
        Until the engine takes requests; compiling is in it.
    log_file
        Gets the log of an engine that is started here; None is standard error.

    Raises
    ------
    EngineError
        If the engine cannot be started or reached.
    TypeError, ValueError
        If an option is unknown or its value not one that the flag takes.
    """

    def __init__(
        self,
        model: str | Path | None,
        *,
        address: str | None,
        options: dict[str, Any],
        start_timeout_s: float,
        log_file: str | Path | None,
    ) -> None:
        self.loop: BackgroundLoop = shared_loop()
        self._lock = threading.Lock()
        self._terminated = False
        self._launcher: Launcher | None = None
        self._drain_s = float(options.get("drain_timeout", 30.0))
        if address is None:
            if model is None:
                raise TypeError("give the model to serve, or the address of a running engine")
            token = options.pop("engine_token", None)
            arguments = serve_arguments(str(model), options)
            own_fields = own_door_fields(arguments, token)
            self._launcher = Launcher(arguments, None if log_file is None else Path(log_file), engine_token=token)
            self._launcher.start(self.loop, start_timeout_s)
            config = GatewayConfig(
                self._launcher.facts["address"],
                self._launcher.facts["model_dir"],
                _names(str(model), options.get("served_model_name")),
                **own_fields,
                enable_debug=bool(options.get("enable_debug", False)),
            )
        else:
            door_fields = {name: options.pop(name) for name in DOOR_FIELDS if name in options}
            if options:
                raise TypeError(f"{min(options)!r} is for an engine that is started here, not for one at an address")
            config = self._attach(address, None if model is None else str(model), start_timeout_s, door_fields)
        try:
            self._service = Service.load(config)
            self.door = LocalDoor(self._service)
            self.address = config.engine_address
            self.request_timeout_s = config.request_timeout_s
            self.loop.run(self._open(start_timeout_s), timeout_s=start_timeout_s + _CALL_TIMEOUT_S)
        except ModelFilesError as error:
            self._stop_launcher()
            raise EngineError(str(error)) from None
        except BaseException:
            self._stop_launcher()
            raise
        atexit.register(self.terminate)

    def require_running(self) -> None:
        """Raise EngineError once `terminate` was called."""
        if self._terminated:
            raise EngineError("the engine was terminated")

    async def metrics(self) -> EngineMetrics:
        """Return the engine's metrics; runs in the engine's loop.

        Raises
        ------
        EngineUnavailable
            If the engine does not answer.
        """
        return EngineMetrics(await self._service.engine.metrics())

    def terminate(self) -> None:
        """Abort what runs, close the session, and end the engine if it was started here. May be called again."""
        with self._lock:
            if self._terminated:
                return
            self._terminated = True
        atexit.unregister(self.terminate)
        try:
            self.loop.run(self._service.close(), timeout_s=_CALL_TIMEOUT_S)
        finally:
            self._stop_launcher()

    def _stop_launcher(self) -> None:
        if self._launcher is not None:
            self._launcher.stop(self._drain_s)

    def _attach(self, address: str, model: str | None, timeout_s: float, door_fields: dict[str, Any]) -> GatewayConfig:
        """Ask a running engine what it serves."""
        fields: dict[str, Any] = {name: None if value is None else str(value) for name, value in door_fields.items()}
        try:
            door = GatewayConfig(address, "", _names(model or address, None), **fields).engine_door()
        except TlsError as error:
            raise EngineError(str(error)) from None
        try:
            with open_blocking_channel(address, door, CHANNEL_OPTIONS) as channel:
                stub = engine_pb2_grpc.EngineStub(channel)  # type: ignore[no-untyped-call]  # generated code
                info = stub.Describe(engine_pb2.DescribeRequest(), timeout=timeout_s, wait_for_ready=True)
        except grpc.RpcError as error:
            code = error.code().name if isinstance(error, grpc.Call) else "failed"
            why = self.loop.run(explain(address, door), timeout_s=_CALL_TIMEOUT_S)
            raise EngineError(
                f"no engine answers at {address} within {timeout_s:g} s ({code}): {why or _WRONG_ADDRESS}"
            ) from None
        given = model is not None and (Path(model) / "tokenizer.json").is_file()
        model_dir = Path(model) if model is not None and given else Path(info.model_dir)
        if not model_dir.is_dir():
            raise EngineError(
                f"the engine at {address} has its model in {model_dir}, which is not on this machine: give a folder "
                "with the model's tokenizer as `model`"
            )
        return GatewayConfig(address, str(model_dir), _names(model or str(model_dir), None), **fields)

    async def _open(self, timeout_s: float) -> None:
        """Open the session and wait until the engine takes requests."""
        engine = self._service.engine
        self._service.start()
        deadline = asyncio.get_running_loop().time() + timeout_s
        while (state := engine.state).status is not EngineStatus.READY:
            late = asyncio.get_running_loop().time() > deadline
            ended = self._launcher is not None and self._launcher.has_ended
            if late or ended or state.status is EngineStatus.DEAD:
                await self._service.close()
                what = f"not ready within {timeout_s:g} s" if late else "not ready"
                raise EngineError(f"the engine is {what}: {state.status.value}, {state.detail}")
            await asyncio.sleep(_POLL_S)

    def pump(self, route: Route[Any, Any], body: bytes, request_id: str, put: Callable[[object], None]) -> None:
        """Run a streamed request in the engine's loop.

        `put` gets an empty chunk once the request is accepted, each chunk's JSON, and in the end None or the error.
        """

        async def run() -> None:
            end: Exception | None = None
            try:
                async for event in self.door.stream(route.handler, body, request_id):
                    put(event)
            except Exception as error:  # the reader raises it
                end = error
            put(end)

        self.loop.submit(run())


def _names(model: str, served: str | list[str] | tuple[str, ...] | None) -> tuple[str, ...]:
    """Return the names that requests may give: those asked for, the model's short name, and what it was opened by."""
    asked = [served] if isinstance(served, str) else list(served or ())
    return tuple(dict.fromkeys([*asked, *default_names(model), model]))

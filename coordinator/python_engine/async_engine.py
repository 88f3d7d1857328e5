"""`AsyncMLCEngine`: the engine for asyncio programs. The twin of `engine`, of which it has all but the waiting."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Literal, Self, overload

from tpserve.coordinator.gateway.answers import ChatCompletion, ChatCompletionChunk, Completion
from tpserve.coordinator.python_engine.core import CHAT, COMPLETION, Chunk, Core, EngineMetrics, Route, Whole
from tpserve.coordinator.python_engine.engine import START_TIMEOUT_S
from tpserve.coordinator.python_engine.errors import RequestAborted


class AsyncMLCEngine:
    """A model behind OpenAI's API, in asyncio programs; see `MLCEngine` for parameters and errors.

    The session with the engine has a loop and a thread of its own: an engine may be made before any loop runs, and be
    used from several. Making and terminating one waits for its processes; `async with` does the latter in a thread.

    Examples
    --------
    >>> async with AsyncMLCEngine("HF://HuggingFaceTB/SmolLM2-135M-Instruct") as engine:
    ...     async for response in await engine.chat.completions.create(
    ...         messages=[{"role": "user", "content": "What is the meaning of life?"}], stream=True
    ...     ):
    ...         for choice in response.choices:
    ...             print(choice.delta.content, end="", flush=True)
    """

    def __init__(
        self,
        model: str | Path | None = None,
        device: str | None = None,
        *,
        mode: str | None = None,
        address: str | None = None,
        start_timeout_s: float = START_TIMEOUT_S,
        log_file: str | Path | None = None,
        **options: Any,
    ) -> None:
        given = {name: value for name, value in (("device", device), ("mode", mode)) if value is not None}
        self._core = Core(
            model, address=address, options=given | options, start_timeout_s=start_timeout_s, log_file=log_file
        )
        self.chat = AsyncChat(self._core)
        """`await chat.completions.create(...)`."""
        self.completions = AsyncTextCompletions(self._core, COMPLETION)
        """`await completions.create(...)`."""

    @property
    def address(self) -> str:
        """`host:port` of the engine, where other programs may attach."""
        return self._core.address

    async def abort(self, request_id: str) -> None:
        """End a running request; see `MLCEngine.abort`."""
        self._core.loop.call(self._core.door.abort, request_id)

    async def metrics(self) -> EngineMetrics:
        """Return the engine's metrics.

        Raises
        ------
        EngineUnavailable
            If the engine does not answer.
        """
        self._core.require_running()
        return await asyncio.wrap_future(self._core.loop.submit(self._core.metrics()))

    def terminate(self) -> None:
        """Abort what runs and end the engine, if it was started here; waits for it. May be called again."""
        self._core.terminate()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.terminate)


class AsyncStream(Generic[Chunk]):
    """The chunks of one streamed answer. Leaving it early (`close`, or dropping it) aborts the request."""

    def __init__(self, core: Core, chunk: type[Chunk], request_id: str) -> None:
        self._core = core
        self._chunk = chunk
        self._request_id = request_id
        self._loop = asyncio.get_running_loop()
        self._items: asyncio.Queue[object] = asyncio.Queue()
        self._ended = False

    @classmethod
    async def open(cls, core: Core, route: Route[Any, Chunk], body: bytes, request_id: str) -> AsyncStream[Chunk]:
        """Send the request and wait until it is accepted."""
        stream = cls(core, route.chunk, request_id)
        core.pump(route, body, request_id, stream._put)
        try:
            await stream._take()  # the acceptance, or why there is none
        except asyncio.CancelledError:
            stream.close()
            raise
        return stream

    def __aiter__(self) -> AsyncIterator[Chunk]:
        return self

    async def __anext__(self) -> Chunk:
        item = None if self._ended else await self._take()
        if item is None:
            raise StopAsyncIteration
        return self._chunk.model_validate_json(item)

    def close(self) -> None:
        """Abort the request, unless it has ended."""
        if not self._ended:
            self._ended = True
            self._core.loop.call(self._core.door.abort, self._request_id)

    def _put(self, item: object) -> None:
        """Take an item from the engine's thread."""
        try:
            self._loop.call_soon_threadsafe(self._items.put_nowait, item)
        except RuntimeError:  # the reader's loop is closed: nobody waits any more
            self.close()

    async def _take(self) -> bytes | None:
        """Wait for what comes next; None is the end. The request's own time limit bounds the wait."""
        item = await self._items.get()
        if isinstance(item, bytes):
            return item
        self._ended = True
        if isinstance(item, Exception) and not isinstance(item, RequestAborted):
            raise item
        return None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if not getattr(self, "_ended", True):
            self.close()


class AsyncEndpoint(Generic[Whole, Chunk]):
    """One kind of request to one engine."""

    def __init__(self, core: Core, route: Route[Whole, Chunk]) -> None:
        self._core = core
        self._route = route

    async def send(
        self, stream: bool, request_id: str | None, extra_body: dict[str, Any] | None, fields: dict[str, Any]
    ) -> Whole | AsyncStream[Chunk]:
        """Run one request; cancelling the caller aborts it."""
        self._core.require_running()
        body = self._route.body(fields | ({"stream": True} if stream else {}), extra_body)
        if stream:
            return await AsyncStream.open(self._core, self._route, body, request_id or uuid.uuid4().hex)
        pending = self._core.loop.submit(self._core.door.whole(self._route.handler, body, request_id))
        answer: bytes = await asyncio.wrap_future(pending)
        return self._route.whole.model_validate_json(answer)


class AsyncChatCompletions(AsyncEndpoint[ChatCompletion, ChatCompletionChunk]):
    """`engine.chat.completions`."""

    @overload
    async def create(
        self,
        *,
        messages: Any,
        stream: Literal[False] = False,
        request_id: str | None = None,
        extra_body: dict[str, Any] | None = None,
        **fields: Any,
    ) -> ChatCompletion: ...
    @overload
    async def create(
        self,
        *,
        messages: Any,
        stream: Literal[True],
        request_id: str | None = None,
        extra_body: dict[str, Any] | None = None,
        **fields: Any,
    ) -> AsyncStream[ChatCompletionChunk]: ...
    async def create(
        self,
        *,
        messages: Any,
        stream: bool = False,
        request_id: str | None = None,
        extra_body: dict[str, Any] | None = None,
        **fields: Any,
    ) -> ChatCompletion | AsyncStream[ChatCompletionChunk]:
        """Answer a chat; parameters and errors as of `engine.ChatCompletions.create`."""
        return await self.send(stream, request_id, extra_body, {"messages": messages, **fields})


class AsyncTextCompletions(AsyncEndpoint[Completion, Completion]):
    """`engine.completions`."""

    @overload
    async def create(
        self,
        *,
        prompt: Any,
        stream: Literal[False] = False,
        request_id: str | None = None,
        extra_body: dict[str, Any] | None = None,
        **fields: Any,
    ) -> Completion: ...
    @overload
    async def create(
        self,
        *,
        prompt: Any,
        stream: Literal[True],
        request_id: str | None = None,
        extra_body: dict[str, Any] | None = None,
        **fields: Any,
    ) -> AsyncStream[Completion]: ...
    async def create(
        self,
        *,
        prompt: Any,
        stream: bool = False,
        request_id: str | None = None,
        extra_body: dict[str, Any] | None = None,
        **fields: Any,
    ) -> Completion | AsyncStream[Completion]:
        """Continue raw prompts; parameters and errors as of `engine.ChatCompletions.create`."""
        return await self.send(stream, request_id, extra_body, {"prompt": prompt, **fields})


class AsyncChat:
    """`engine.chat`."""

    def __init__(self, core: Core) -> None:
        self.completions = AsyncChatCompletions(core, CHAT)

"""`MLCEngine`: the engine for programs without asyncio."""

from __future__ import annotations

import queue
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Literal, Self, overload

from tpserve.coordinator.gateway.answers import ChatCompletion, ChatCompletionChunk, Completion
from tpserve.coordinator.python_engine.core import CHAT, COMPLETION, Chunk, Core, EngineMetrics, Route, Whole
from tpserve.coordinator.python_engine.errors import RequestAborted

START_TIMEOUT_S = 1800.0
"""Compiling a large model for the first time takes minutes."""

_SLACK_S = 60.0
"""What a request may take beyond its own time limit, after which something here is broken."""


class MLCEngine:
    """A model behind OpenAI's API, in Python.

    Each method means what its route means over HTTP: fields, rules and errors are those of the same protocol module,
    and refusals raise its `ApiError`. Any number of threads may use one engine; their requests run in one batch.

    Parameters
    ----------
    model
        Hugging Face folder, GGUF file or `HF://org/name`, as for `tpserve serve`.
    device, mode
        As for `tpserve serve`.
    address
        `host:port` of a running engine, as `tpserve serve` logs it: nothing is started here, and `model` may be
        left out, or be the folder with the tokenizer.
    start_timeout_s
        Until the engine takes requests, compiling included.
    log_file
        Gets the log of the engine started here; None is standard error.
    options
        Any other flag of `tpserve serve` that concerns the engine, with underscores: `tp=2`, `max_num_seqs=8`.

    Raises
    ------
    EngineError
        If the engine cannot be started or reached.
    TypeError, ValueError
        If an option is unknown, or its value is not one that the flag takes.

    Examples
    --------
    >>> engine = MLCEngine("HF://HuggingFaceTB/SmolLM2-135M-Instruct")
    >>> for response in engine.chat.completions.create(
    ...     messages=[{"role": "user", "content": "What is the meaning of life?"}], stream=True
    ... ):
    ...     for choice in response.choices:
    ...         print(choice.delta.content, end="", flush=True)
    >>> engine.terminate()
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
        self.chat = Chat(self._core)
        """`chat.completions.create(...)`."""
        self.completions = TextCompletions(self._core, COMPLETION)
        """`completions.create(...)`."""

    @property
    def address(self) -> str:
        """`host:port` of the engine, where other programs may attach."""
        return self._core.address

    def abort(self, request_id: str) -> None:
        """End a running request.

        Parameters
        ----------
        request_id
            What `create` was given as `request_id`, or the `id` that its chunks carry. A stream then ends, a whole
            answer raises `RequestAborted`. A request that has ended already is left alone.
        """
        self._core.loop.call(self._core.door.abort, request_id)

    def metrics(self) -> EngineMetrics:
        """Return the engine's metrics.

        Raises
        ------
        EngineUnavailable
            If the engine does not answer.
        """
        self._core.require_running()
        return self._core.loop.run(self._core.metrics(), timeout_s=_SLACK_S)

    def terminate(self) -> None:
        """Abort what runs and end the engine, if it was started here. May be called again."""
        self._core.terminate()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.terminate()


class Stream(Generic[Chunk]):
    """The chunks of one streamed answer. Leaving it early (`close`, or dropping it) aborts the request."""

    def __init__(self, core: Core, route: Route[Any, Chunk], body: bytes, request_id: str) -> None:
        self._core = core
        self._chunk = route.chunk
        self._request_id = request_id
        self._deadline_s = core.request_timeout_s + _SLACK_S
        self._items: queue.SimpleQueue[object] = queue.SimpleQueue()
        self._ended = False
        core.pump(route, body, request_id, self._items.put)
        self._take()  # the acceptance, or why there is none

    def __iter__(self) -> Iterator[Chunk]:
        return self

    def __next__(self) -> Chunk:
        if self._ended:
            raise StopIteration
        item = self._take()
        if item is None:
            raise StopIteration
        return self._chunk.model_validate_json(item)

    def close(self) -> None:
        """Abort the request, unless it has ended."""
        if not self._ended:
            self._ended = True
            self._core.loop.call(self._core.door.abort, self._request_id)

    def _take(self) -> bytes | None:
        """Wait for what comes next; None is the end."""
        try:
            item = self._items.get(timeout=self._deadline_s)
        except BaseException:  # Ctrl-C
            self.close()
            raise
        if isinstance(item, bytes):
            return item
        self._ended = True
        if isinstance(item, Exception) and not isinstance(item, RequestAborted):
            raise item
        return None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if not getattr(self, "_ended", True):
            self.close()


class Endpoint(Generic[Whole, Chunk]):
    """One kind of request to one engine."""

    def __init__(self, core: Core, route: Route[Whole, Chunk]) -> None:
        self._core = core
        self._route = route

    def send(
        self, stream: bool, request_id: str | None, extra_body: dict[str, Any] | None, fields: dict[str, Any]
    ) -> Whole | Stream[Chunk]:
        """Run one request."""
        self._core.require_running()
        body = self._route.body(fields | ({"stream": True} if stream else {}), extra_body)
        if stream:
            return Stream(self._core, self._route, body, request_id or uuid.uuid4().hex)
        answer = self._core.loop.run(
            self._core.door.whole(self._route.handler, body, request_id),
            timeout_s=self._core.request_timeout_s + _SLACK_S,
        )
        return self._route.whole.model_validate_json(answer)


class ChatCompletions(Endpoint[ChatCompletion, ChatCompletionChunk]):
    """`engine.chat.completions`."""

    @overload
    def create(
        self,
        *,
        messages: Any,
        stream: Literal[False] = False,
        request_id: str | None = None,
        extra_body: dict[str, Any] | None = None,
        **fields: Any,
    ) -> ChatCompletion: ...
    @overload
    def create(
        self,
        *,
        messages: Any,
        stream: Literal[True],
        request_id: str | None = None,
        extra_body: dict[str, Any] | None = None,
        **fields: Any,
    ) -> Stream[ChatCompletionChunk]: ...
    def create(
        self,
        *,
        messages: Any,
        stream: bool = False,
        request_id: str | None = None,
        extra_body: dict[str, Any] | None = None,
        **fields: Any,
    ) -> ChatCompletion | Stream[ChatCompletionChunk]:
        """Answer a chat.

        Parameters
        ----------
        messages
            As in OpenAI's API; messages of earlier answers may stand among them as they are.
        stream
            True returns an iterator of chunks.
        request_id
            A name for `abort` and for logs.
        extra_body
            Fields that are sent without a look at their names.
        fields
            Every other field of `POST /v1/chat/completions`.

        Raises
        ------
        ApiError
            If the request cannot be served.
        TypeError
            If a field is unknown.
        """
        return self.send(stream, request_id, extra_body, {"messages": messages, **fields})


class TextCompletions(Endpoint[Completion, Completion]):
    """`engine.completions`."""

    @overload
    def create(
        self,
        *,
        prompt: Any,
        stream: Literal[False] = False,
        request_id: str | None = None,
        extra_body: dict[str, Any] | None = None,
        **fields: Any,
    ) -> Completion: ...
    @overload
    def create(
        self,
        *,
        prompt: Any,
        stream: Literal[True],
        request_id: str | None = None,
        extra_body: dict[str, Any] | None = None,
        **fields: Any,
    ) -> Stream[Completion]: ...
    def create(
        self,
        *,
        prompt: Any,
        stream: bool = False,
        request_id: str | None = None,
        extra_body: dict[str, Any] | None = None,
        **fields: Any,
    ) -> Completion | Stream[Completion]:
        """Continue raw prompts; parameters and errors as of `ChatCompletions.create`."""
        return self.send(stream, request_id, extra_body, {"prompt": prompt, **fields})


class Chat:
    """`engine.chat`."""

    def __init__(self, core: Core) -> None:
        self.completions = ChatCompletions(core, CHAT)

"""POST /v1/responses: a translation of chat completions, from whose chunks its items and events are made."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message

from tpserve.coordinator.gateway.chat import create_chat_completion
from tpserve.coordinator.gateway.errors import ApiError, InvalidRequest
from tpserve.coordinator.gateway.origin import origin_of
from tpserve.coordinator.gateway.protocol import parse_body
from tpserve.coordinator.gateway.responses_wire import ResponsesRequest
from tpserve.coordinator.gateway.service import Service
from tpserve.coordinator.gateway.stream import EventStream, event_data, json_response
from tpserve.coordinator.relay import Identity

_PARAMS = {"messages": "input", "max_completion_tokens": "max_output_tokens", "max_tokens": "max_output_tokens"}
"""What a chat request calls differently."""


async def create_response(service: Service, http: Request) -> Response:
    """Answer one request, streamed or in one piece.

    Raises
    ------
    ApiError
        If the request cannot be served.
    """
    request = parse_body(ResponsesRequest, await http.body())
    try:
        chat = await create_chat_completion(service, _chat_http(http, request.to_chat()))
    except InvalidRequest as error:
        raise _renamed(error) from None
    assert isinstance(chat, EventStream)
    answer = ResponseWriter(request, service.resolve_model(request.model), origin_of(http).identity)
    if request.stream:
        return ResponseStream(chat, answer)
    async with contextlib.aclosing(chat.events()) as groups:
        async for group in groups:
            for data in event_data(group):
                answer.take(orjson.loads(data))
    answer.end()
    return json_response(answer.to_dict())


class ResponseStream(EventStream):
    """The events of a response, made of a chat's."""

    def __init__(self, chat: EventStream, writer: ResponseWriter) -> None:
        super().__init__(
            chat.generation, chat.writer, chat.metrics, name=chat.name, keep_alive_s=chat.keep_alive_s, end=b""
        )
        self._response = writer

    async def events(self) -> AsyncGenerator[bytes]:
        """See EventStream."""
        response = self._response
        yield response.begin()
        async with contextlib.aclosing(super().events()) as groups:
            async for group in groups:
                if body := b"".join([response.take(orjson.loads(data)) for data in event_data(group)]):
                    yield body
        yield response.end()

    def error_event(self, error: ApiError) -> bytes:
        """See EventStream."""
        return self._response.failed(error)


class ResponseWriter:
    """Makes the output items of a response, and the events that tell of them.

    Items follow each other: reasoning, a message, tool calls, each closed before the next is opened.
    """

    def __init__(self, request: ResponsesRequest, model: str, identity: Identity) -> None:
        self._request = request
        self._model = model
        self._id = f"resp_{identity.key}"
        self._created = identity.created
        self._ids = identity.random("response items")
        self._num_events = 0
        self._items: list[dict[str, Any]] = []
        self._open: dict[str, Any] | None = None
        self._status = "in_progress"
        self._finish: str | None = None
        self._usage: dict[str, Any] | None = None
        self._error: dict[str, Any] | None = None

    def begin(self) -> bytes:
        """Return the first events."""
        return self._event("response.created", response=self.to_dict()) + self._event(
            "response.in_progress", response=self.to_dict()
        )

    def take(self, chunk: dict[str, Any]) -> bytes:
        """Take a chat chunk; return its events."""
        if chunk.get("usage") is not None:
            self._usage = chunk["usage"]
        out = b""
        for choice in chunk["choices"]:
            delta = choice["delta"]
            if delta.get("reasoning_content"):
                out += self._text("reasoning", delta["reasoning_content"])
            if delta.get("content"):
                out += self._text("message", delta["content"])
            for call in delta.get("tool_calls") or ():
                out += self._call(call)
            self._finish = choice["finish_reason"] or self._finish
        return out

    def end(self) -> bytes:
        """Return the last events."""
        self._status = "incomplete" if self._finish == "length" else "completed"
        out = self._close()
        return out + self._event(f"response.{self._status}", response=self.to_dict())

    def failed(self, error: ApiError) -> bytes:
        """Return what ends a stream that fails."""
        self._status = "failed"
        self._error = {"code": error.code or "server_error", "message": error.message}
        return self._event("response.failed", response=self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """Return the response object as it is now."""
        request = self._request
        given = request.model_dump(by_alias=True, exclude_none=True)
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": self._status,
            "background": False,
            "error": self._error,
            "incomplete_details": {"reason": "max_output_tokens"} if self._status == "incomplete" else None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "metadata": request.metadata or {},
            "model": self._model,
            "output": self._items,
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "previous_response_id": None,
            "store": False,
            "temperature": request.temperature,
            "text": given.get("text") or {"format": {"type": "text"}},
            "tool_choice": given.get("tool_choice", "auto"),
            "tools": given.get("tools", []),
            "top_p": request.top_p,
            "truncation": "disabled",
            "usage": None if self._usage is None else _usage(self._usage),
            "user": request.user,
        }

    def _text(self, kind: str, delta: str) -> bytes:
        """Add text to the open item of this kind, which is opened first if need be."""
        out = b""
        part_type = "output_text" if kind == "message" else "reasoning_text"
        if self._open is None or self._open["type"] != kind:
            item: dict[str, Any] = {"id": f"{kind[:3]}_{self._new_id()}", "type": kind, "status": "in_progress"}
            item |= {"content": [], "role": "assistant"} if kind == "message" else {"content": [], "summary": []}
            out = self._close() + self._add(item)
            assert self._open is not None
            part: dict[str, Any] = {"type": part_type, "text": ""}
            if kind == "message":
                part |= {"annotations": [], "logprobs": []}
            self._open["content"].append(part)
            out += self._item_event("response.content_part.added", content_index=0, part=part)
        assert self._open is not None
        self._open["content"][0]["text"] += delta
        extra: dict[str, Any] = {"logprobs": []} if kind == "message" else {}
        return out + self._item_event(f"response.{part_type}.delta", content_index=0, delta=delta, **extra)

    def _call(self, call: dict[str, Any]) -> bytes:
        """Add a part of a tool call; a part with an id begins one."""
        function = call.get("function") or {}
        out = b""
        if call.get("id"):
            out = self._close() + self._add(
                {
                    "id": f"fc_{self._new_id()}",
                    "type": "function_call",
                    "status": "in_progress",
                    "call_id": call["id"],
                    "name": function["name"],
                    "arguments": "",
                }
            )
        assert self._open is not None
        if delta := function.get("arguments"):
            self._open["arguments"] += delta
            out += self._item_event("response.function_call_arguments.delta", delta=delta)
        return out

    def _new_id(self) -> str:
        return f"{self._ids.getrandbits(128):032x}"

    def _add(self, item: dict[str, Any]) -> bytes:
        self._items.append(item)
        self._open = item
        return self._event("response.output_item.added", output_index=len(self._items) - 1, item=item)

    def _close(self) -> bytes:
        """Close the open item, if there is one."""
        item = self._open
        if item is None:
            return b""
        out = b""
        if item["type"] == "function_call":
            out = self._item_event(
                "response.function_call_arguments.done", arguments=item["arguments"], name=item["name"]
            )
        else:
            part = item["content"][0]
            extra: dict[str, Any] = {"logprobs": []} if item["type"] == "message" else {}
            out = self._item_event(f"response.{part['type']}.done", content_index=0, text=part["text"], **extra)
            out += self._item_event("response.content_part.done", content_index=0, part=part)
        item["status"] = "incomplete" if self._status == "incomplete" else "completed"
        out += self._event("response.output_item.done", output_index=len(self._items) - 1, item=item)
        self._open = None
        return out

    def _item_event(self, kind: str, **fields: Any) -> bytes:
        assert self._open is not None
        return self._event(kind, item_id=self._open["id"], output_index=len(self._items) - 1, **fields)

    def _event(self, kind: str, **fields: Any) -> bytes:
        data = {"type": kind, "sequence_number": self._num_events, **fields}
        self._num_events += 1
        return f"event: {kind}\ndata: ".encode() + orjson.dumps(data) + b"\n\n"


def _usage(usage: dict[str, Any]) -> dict[str, Any]:
    details = usage.get("completion_tokens_details") or {}
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": usage["prompt_tokens_details"]["cached_tokens"]},
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": details.get("reasoning_tokens", 0)},
        "total_tokens": usage["total_tokens"],
    }


def _chat_http(http: Request, body: dict[str, Any]) -> Request:
    """Return the same HTTP exchange with another body."""
    parts: list[Message] = [{"type": "http.request", "body": orjson.dumps(body), "more_body": False}]

    async def receive() -> Message:
        return parts.pop() if parts else await http.receive()

    return Request(http.scope, receive)


def _renamed(error: InvalidRequest) -> InvalidRequest:
    """Return the refusal with this route's names of fields."""
    message, param = error.message, error.param
    for theirs, ours in _PARAMS.items():
        if param is not None and param.startswith(theirs):
            param = ours + param.removeprefix(theirs)
            message = message.replace(theirs, ours)
    return type(error)(message, param=param, code=error.code)

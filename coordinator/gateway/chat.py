"""POST /v1/chat/completions: messages in, OpenAI's chat objects out."""

from __future__ import annotations

import asyncio
import json
from typing import Any, Literal

from starlette.requests import Request
from starlette.responses import Response

from tpserve.coordinator.gateway import debug
from tpserve.coordinator.gateway.errors import InvalidRequest
from tpserve.coordinator.gateway.generation import Update, Usage
from tpserve.coordinator.gateway.origin import origin_of
from tpserve.coordinator.gateway.output import Shape, chat_shape
from tpserve.coordinator.gateway.prepare import engine_request, stop_token_ids, tokenise
from tpserve.coordinator.gateway.protocol import ChatCompletionRequest, Message, Tool, parse_body
from tpserve.coordinator.gateway.service import AnswerHead, Service
from tpserve.coordinator.gateway.stream import sse
from tpserve.coordinator.gateway.tokenizer import Tokenizer
from tpserve.coordinator.gateway.tools.parser import CallArguments, CallStart, Content, OutputParser, Part, Reasoning
from tpserve.coordinator.relay import Identity


async def create_chat_completion(service: Service, http: Request) -> Response:
    """Answer one request, streamed or in one piece.

    Raises
    ------
    ApiError
        If the request cannot be served.
    """
    request = parse_body(ChatCompletionRequest, await http.body())
    origin = origin_of(http)
    identity = origin.identity
    head = AnswerHead(f"chatcmpl-{identity.key}", identity.created, service.resolve_model(request.model))
    debug.require_enabled(service, request)
    if request.asks_for_metrics:
        kind: Literal["chat.completion.chunk", "chat.completion"]
        kind = "chat.completion.chunk" if request.stream else "chat.completion"
        return await debug.metrics_answer(service, request, head, kind)
    template = service.model.chat_template
    if template is None:
        raise InvalidRequest("This model has no chat template; use /v1/completions", param="messages")
    info = service.engine.info
    prompt = template.render(
        [template_message(message) for message in request.messages],
        [_template_tool(tool) for tool in request.tools or ()] if request.tool_choice != "none" else None,
        request.chat_template_kwargs,
    )
    stops = stop_token_ids(request, service.model)
    if request.constraints or request.callable_tools:  # schemas take milliseconds to check
        shape = await asyncio.to_thread(chat_shape, request, template, prompt, stops)
    else:
        shape = chat_shape(request, template, prompt, stops)
    if shape.grammar is not None:
        await service.grammars.check(shape.grammar, info.vocab_size, param=shape.param)
    to_engine = engine_request(
        request,
        await tokenise(service.model, prompt, info, add_special_tokens=False),
        service.model,
        info,
        name=http.scope["state"]["request_id"],
        requested=request.output_limit,
        default_limit=None,
        num_logprobs=request.num_logprobs,
        fresh_seed=identity.seed,
        grammar=shape.grammar,
    )
    tokenizer = service.model.tokenizer
    return await service.respond(
        http,
        [to_engine],
        progress=origin.progress,
        stops=request.stops,
        visible_tokens=shape.visible_tokens,
        writer=(
            (lambda generation: ChatChunks(head, tokenizer, request, shape, identity, generation.usage))
            if request.stream
            else None
        ),
        answer=lambda: ChatAnswer(head, tokenizer, request, shape, identity),
    )


class ChatChunks:
    """Writes `chat.completion.chunk` events.

    Parameters
    ----------
    shape
        What the text is split into.
    identity
        Of which the ids of tool calls are made.
    usage
        Counts of the running generation, read when a chunk with usage is written.
    """

    def __init__(
        self,
        head: AnswerHead,
        tokenizer: Tokenizer,
        request: ChatCompletionRequest,
        shape: Shape,
        identity: Identity,
        usage: Usage,
    ) -> None:
        self._tokenizer = tokenizer
        self._parsers = _parsers(shape, request, identity)
        self._logprobs = request.num_logprobs is not None
        self._include_usage = request.include_usage
        self._usage_by_chunk = request.usage_by_chunk
        self._usage = usage
        self._begun: set[int] = set()
        # One dictionary is made once and patched for each chunk.
        self._choice: dict[str, Any] = {"index": 0, "delta": {}, "logprobs": None, "finish_reason": None}
        self._chunk: dict[str, Any] = {
            "id": head.id,
            "object": "chat.completion.chunk",
            "created": head.created,
            "model": head.model,
            "choices": [self._choice],
        }
        if self._include_usage:
            self._chunk["usage"] = None

    def write(self, update: Update) -> bytes:
        """Return the role chunk (once per choice), the text chunk and the finish chunk, as far as there are any."""
        choice, out = self._choice, b""
        choice["index"] = update.index
        if update.index not in self._begun:
            self._begun.add(update.index)
            choice["delta"] = {"role": "assistant", "content": ""}
            out = sse(self._chunk)
        if self._usage_by_chunk:
            self._chunk["usage"] = self._usage.to_dict()
        finish = update.finish
        deltas: list[dict[str, Any]] = [{"content": update.text}] if update.text else []
        if self._parsers is not None:
            parser = self._parsers[update.index]
            deltas = [_delta(part) for part in _parts(parser, update)]
            finish = _finish_reason(parser, finish)
        if not deltas and (self._usage_by_chunk or (self._logprobs and update.token_ids)):
            deltas = [{"content": ""}]
        if self._logprobs and deltas:
            choice["logprobs"] = {"content": chat_logprobs(self._tokenizer, update), "refusal": None}
        for delta in deltas:
            choice["delta"] = delta
            out += sse(self._chunk)
            choice["logprobs"] = None
        if finish is not None:
            choice["delta"] = {}
            choice["finish_reason"] = finish
            out += sse(self._chunk)
            choice["finish_reason"] = None
        return out

    def close(self) -> bytes:
        """Return the usage chunk, if it was asked for."""
        if not self._include_usage:
            return b""
        return sse({**self._chunk, "choices": [], "usage": self._usage.to_dict()})


class ChatAnswer:
    """Collects a `chat.completion` object."""

    def __init__(
        self,
        head: AnswerHead,
        tokenizer: Tokenizer,
        request: ChatCompletionRequest,
        shape: Shape,
        identity: Identity,
    ) -> None:
        self._head = head
        self._tokenizer = tokenizer
        num_choices = request.n or 1
        self._parsers = _parsers(shape, request, identity)
        self._messages = [_Message() for _ in range(num_choices)]
        self._finish: list[str | None] = [None] * num_choices
        self._logprobs: list[list[dict[str, Any]]] | None = None
        if request.num_logprobs is not None:
            self._logprobs = [[] for _ in range(num_choices)]

    def add(self, update: Update) -> None:
        """Take what is new in a choice."""
        message, finish = self._messages[update.index], update.finish
        if self._parsers is None:
            message.content.append(update.text)
        else:
            parser = self._parsers[update.index]
            for part in _parts(parser, update):
                message.add(part)
            finish = _finish_reason(parser, finish)
        self._finish[update.index] = finish
        if self._logprobs is not None:
            self._logprobs[update.index] += chat_logprobs(self._tokenizer, update)

    def to_dict(self, usage: Usage) -> dict[str, Any]:
        """Return the response body."""
        logprobs = self._logprobs
        return {
            "id": self._head.id,
            "object": "chat.completion",
            "created": self._head.created,
            "model": self._head.model,
            "choices": [
                {
                    "index": index,
                    "message": message.to_dict(),
                    "logprobs": None if logprobs is None else {"content": logprobs[index], "refusal": None},
                    "finish_reason": self._finish[index],
                }
                for index, message in enumerate(self._messages)
            ],
            "usage": usage.to_dict(),
        }


class _Message:
    """An assistant message that grows."""

    def __init__(self) -> None:
        self.content: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[tuple[CallStart, list[str]]] = []

    def add(self, part: Part) -> None:
        """Take a part of the output."""
        match part:
            case Content():
                self.content.append(part.text)
            case Reasoning():
                self._reasoning.append(part.text)
            case CallStart():
                self._calls.append((part, []))
            case CallArguments():
                self._calls[part.index][1].append(part.text)

    def to_dict(self) -> dict[str, Any]:
        """Return OpenAI's message object; what is only sometimes there is left out otherwise."""
        content = "".join(self.content)
        out: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if self._calls:
            out["content"] = content or None
            out["tool_calls"] = [
                {
                    "id": start.call_id,
                    "type": "function",
                    "function": {"name": start.name, "arguments": "".join(arguments)},
                }
                for start, arguments in self._calls
            ]
        if self._reasoning:
            out["reasoning_content"] = "".join(self._reasoning)
        return out


def _parsers(shape: Shape, request: ChatCompletionRequest, identity: Identity) -> list[OutputParser] | None:
    """Return a parser for each choice; None if there is nothing to split."""
    if shape.is_plain:
        return None
    ids = identity.random("tool calls")
    return [shape.new_parser(ids) for _ in range(request.n or 1)]


def _parts(parser: OutputParser, update: Update) -> list[Part]:
    parts = parser.push(update.text)
    return parts if update.finish is None else parts + parser.flush()


def _finish_reason(parser: OutputParser, finish: str | None) -> str | None:
    return "tool_calls" if finish == "stop" and parser.has_calls else finish


def _delta(part: Part) -> dict[str, Any]:
    """Return the `delta` object of one part."""
    match part:
        case Content():
            return {"content": part.text}
        case Reasoning():
            return {"reasoning_content": part.text}
        case CallStart():
            function = {"name": part.name, "arguments": ""}
            call = {"index": part.index, "id": part.call_id, "type": "function", "function": function}
            return {"tool_calls": [call]}
        case CallArguments():
            return {"tool_calls": [{"index": part.index, "function": {"arguments": part.text}}]}


def chat_logprobs(tokenizer: Tokenizer, update: Update) -> list[dict[str, Any]]:
    """Return one entry per token with its log-probability and the best alternatives."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        text, raw = tokenizer.shown(token_id)
        return {"token": text, "logprob": logprob, "bytes": list(raw)}

    return [
        {
            **entry(token_id, item.logprob),
            "top_logprobs": [entry(other, value) for other, value in item.top],
        }
        for token_id, item in zip(update.token_ids, update.logprobs, strict=False)
    ]


def template_message(message: Message) -> dict[str, Any]:
    """Return the message as chat templates expect it.

    Raises
    ------
    InvalidRequest
        If a tool call's arguments are not a JSON object.
    """
    # "developer" is OpenAI's newer name for what templates know as "system".
    out: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role, "content": message.text}
    if message.name is not None:
        out["name"] = message.name
    if message.tool_call_id is not None:
        out["tool_call_id"] = message.tool_call_id
    if message.reasoning_content is not None:
        out["reasoning_content"] = message.reasoning_content
    if message.tool_calls:
        out["tool_calls"] = [
            {
                "id": call.id,
                "type": call.type,
                "function": {"name": call.function.name, "arguments": _arguments(call.function.arguments)},
            }
            for call in message.tool_calls
        ]
    return out


def _template_tool(tool: Tool) -> dict[str, Any]:
    """Return the tool as chat templates expect it, without fields that are not given."""
    function = tool.function.model_dump(exclude_none=True, exclude={"strict"})
    function.setdefault("parameters", {"type": "object", "properties": {}})
    return {"type": "function", "function": function}


def _arguments(text: str) -> dict[str, Any]:
    """Templates want the arguments as an object; the wire has them as JSON text."""
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise InvalidRequest("The arguments of a tool call must be a JSON object, as text", param="messages")
    return value

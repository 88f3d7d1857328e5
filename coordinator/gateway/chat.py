"""POST /v1/chat/completions: messages in, OpenAI's chat objects out."""

from __future__ import annotations

import json
import time
import uuid
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from tpserve.coordinator.gateway.errors import InvalidRequest, UnsupportedFeature
from tpserve.coordinator.gateway.generation import Update, Usage
from tpserve.coordinator.gateway.prepare import engine_request, tokenise
from tpserve.coordinator.gateway.protocol import ChatCompletionRequest, Message, parse_body
from tpserve.coordinator.gateway.service import AnswerHead, Service
from tpserve.coordinator.gateway.stream import sse
from tpserve.coordinator.gateway.tokenizer import Tokenizer


async def create_chat_completion(service: Service, http: Request) -> Response:
    """Answer one request, streamed or in one piece.

    Raises
    ------
    ApiError
        If the request cannot be served.
    """
    request = parse_body(ChatCompletionRequest, await http.body())
    if request.callable_tools:
        raise UnsupportedFeature("'tools' are not supported yet; leave them out", param="tools")
    head = AnswerHead(f"chatcmpl-{uuid.uuid4().hex}", int(time.time()), service.resolve_model(request.model))
    template = service.model.chat_template
    if template is None:
        raise InvalidRequest("This model has no chat template; use /v1/completions", param="messages")
    info = service.engine.info
    prompt = template.render([_template_message(message) for message in request.messages])
    to_engine = engine_request(
        request,
        await tokenise(service.model, prompt, info, add_special_tokens=False),
        service.model,
        info,
        name=http.scope["state"]["request_id"],
        requested=request.output_limit,
        default_limit=None,
        num_logprobs=request.num_logprobs,
    )
    tokenizer = service.model.tokenizer
    return await service.respond(
        http,
        [to_engine],
        stops=request.stops,
        writer=(lambda generation: ChatChunks(head, tokenizer, request, generation.usage)) if request.stream else None,
        answer=lambda: ChatAnswer(head, tokenizer, request),
    )


class ChatChunks:
    """Writes `chat.completion.chunk` events.

    Parameters
    ----------
    usage
        Counts of the running generation, read when a chunk with usage is written.
    """

    def __init__(self, head: AnswerHead, tokenizer: Tokenizer, request: ChatCompletionRequest, usage: Usage) -> None:
        self._tokenizer = tokenizer
        self._logprobs = request.num_logprobs is not None
        self._include_usage = request.include_usage
        self._usage_by_chunk = request.usage_by_chunk
        self._usage = usage
        self._begun: set[int] = set()
        # One dictionary is made once and patched for each chunk.
        self._delta: dict[str, Any] = {}
        self._choice: dict[str, Any] = {"index": 0, "delta": self._delta, "logprobs": None, "finish_reason": None}
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
        choice, delta, out = self._choice, self._delta, b""
        choice["index"] = update.index
        if update.index not in self._begun:
            self._begun.add(update.index)
            delta.update(role="assistant", content="")
            out = sse(self._chunk)
            del delta["role"]
        if self._usage_by_chunk:
            self._chunk["usage"] = self._usage.to_dict()
        if update.text or self._usage_by_chunk or (self._logprobs and update.token_ids):
            delta["content"] = update.text
            if self._logprobs:
                choice["logprobs"] = {"content": chat_logprobs(self._tokenizer, update), "refusal": None}
            out += sse(self._chunk)
            choice["logprobs"] = None
        if update.finish is not None:
            delta.clear()
            choice["finish_reason"] = update.finish
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

    def __init__(self, head: AnswerHead, tokenizer: Tokenizer, request: ChatCompletionRequest) -> None:
        self._head = head
        self._tokenizer = tokenizer
        num_choices = request.n or 1
        self._texts: list[list[str]] = [[] for _ in range(num_choices)]
        self._finish: list[str | None] = [None] * num_choices
        self._logprobs: list[list[dict[str, Any]]] | None = None
        if request.num_logprobs is not None:
            self._logprobs = [[] for _ in range(num_choices)]

    def add(self, update: Update) -> None:
        """Take what is new in a choice."""
        self._texts[update.index].append(update.text)
        self._finish[update.index] = update.finish
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
                    "message": {"role": "assistant", "content": "".join(texts), "refusal": None},
                    "logprobs": None if logprobs is None else {"content": logprobs[index], "refusal": None},
                    "finish_reason": self._finish[index],
                }
                for index, texts in enumerate(self._texts)
            ],
            "usage": usage.to_dict(),
        }


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


def _template_message(message: Message) -> dict[str, Any]:
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


def _arguments(text: str) -> dict[str, Any]:
    """Templates want the arguments as an object; the wire has them as JSON text."""
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise InvalidRequest("The arguments of a tool call must be a JSON object, as text", param="messages")
    return value

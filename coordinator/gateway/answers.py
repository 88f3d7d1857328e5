"""The wire format of answers: what every door returns, as objects and as the schemas of the OpenAPI document.

The handlers write plain dictionaries, for speed; tests hold that these models accept exactly what they write.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict


class Answer(BaseModel):
    """Fields that a newer server adds stay readable as attributes."""

    model_config = ConfigDict(extra="allow", frozen=True)


class PromptTokensDetails(Answer):
    """Part of `usage`."""

    cached_tokens: int
    """Prompt tokens found in the prefix cache."""


class Usage(Answer):
    """Token counts of one request."""

    prompt_tokens: int
    completion_tokens: int = 0
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = None
    extra: dict[str, float] | None = None
    """The engine's metrics, where `debug_config` asks for them."""


class TopLogprob(Answer):
    """One of the best tokens at a position."""

    token: str
    logprob: float
    bytes: list[int] | None = None


class TokenLogprob(TopLogprob):
    """The chosen token at a position, and the best ones."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(Answer):
    """`logprobs` of a chat choice."""

    content: list[TokenLogprob] | None
    refusal: None = None


class FunctionCall(Answer):
    """The function of a tool call."""

    name: str | None = None
    """In a stream only in the call's first part."""
    arguments: str = ""


class ToolCall(Answer):
    """A call of a tool by the model."""

    index: int | None = None
    """In a stream, which call this is a part of."""
    id: str | None = None
    type: Literal["function"] | None = "function"
    function: FunctionCall | None = None


class ChatMessage(Answer):
    """The assistant's message."""

    role: Literal["assistant"]
    content: str | None
    reasoning_content: str | None = None
    refusal: str | None = None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(Answer):
    """One of `n` answers."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None
    """`stop`, `length` or `tool_calls`."""


class ChatCompletion(Answer):
    """Answer of POST /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    """Unix time, seconds."""
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ChatDelta(Answer):
    """What is new in a choice."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None


class ChatChunkChoice(Answer):
    """One choice in a chunk."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None


class ChatCompletionChunk(Answer):
    """One event of a streamed chat."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    """Empty in the chunk with `usage` at the end."""
    usage: Usage | None = None


class CompletionLogprobs(Answer):
    """`logprobs` of a text completion: parallel lists."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(Answer):
    """One continuation."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None


class Completion(Answer):
    """Answer of POST /v1/completions, and each event of a streamed one."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class ModelObject(Answer):
    """A name under which the model is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class ModelList(Answer):
    """Answer of GET /v1/models."""

    object: Literal["list"]
    data: list[ModelObject]


class Health(Answer):
    """Answer of GET /health and of its probes."""

    status: str
    """`ready`, or why not: `starting`, `rebuilding`, `draining`, `stalled`, `dead`, `disconnected`, `unresponsive`."""
    detail: str


class Tasks(Answer):
    """Answer of GET /debug/tasks."""

    pid: int
    """Of the gateway process that answers."""
    count: int
    tasks: dict[str, int]
    """How many by the name of their coroutine."""


class Version(Answer):
    """Answer of GET /version."""

    version: str


class ErrorDetails(Answer):
    """What is wrong, by whom, and where."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(Answer):
    """Every refusal."""

    error: ErrorDetails

"""The wire format of /v1/responses: the request, checked, and its translation into a chat request.

What a chat request says already (ranges, tools, schemas) is checked there, once; here is only what is different.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from tpserve.coordinator.gateway.answers import Answer
from tpserve.coordinator.gateway.errors import UnsupportedFeature
from tpserve.coordinator.gateway.protocol import Text, Wire


class InputPart(Wire):
    """One part of an item's content; only text is served."""

    type: Literal["input_text", "output_text", "text", "refusal", "input_image", "input_file", "input_audio"]
    text: Text | None = None
    refusal: Text | None = None


class InputItem(Wire):
    """One item of `input`: a message, a tool call of an earlier answer, or a tool's output."""

    type: Literal["message", "function_call", "function_call_output", "reasoning"] = "message"
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: Text | list[InputPart] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: Text | list[InputPart] | None = None

    @model_validator(mode="after")
    def _has_its_fields(self) -> Self:
        needed = {
            "message": ("role", "content"),
            "function_call": ("call_id", "name", "arguments"),
            "function_call_output": ("call_id", "output"),
            "reasoning": (),
        }[self.type]
        for name in needed:
            if getattr(self, name) is None:
                raise ValueError(f"an item of type '{self.type}' needs the field '{name}'")
        return self


class FunctionTool(Wire):
    """A tool that the model may call."""

    type: Literal["function"]
    name: Annotated[str, Field(min_length=1, max_length=64)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedTool(Wire):
    """`tool_choice` of one tool."""

    type: Literal["function"]
    name: str


class TextFormat(Wire):
    """`text.format`."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class TextOptions(Wire):
    """`text`."""

    format: TextFormat | None = None


class ResponsesRequest(Wire):
    """Body of POST /v1/responses. Nothing is stored: a conversation is carried on by sending its items again."""

    model: str | None = None
    input: Text | Annotated[list[InputItem], Field(min_length=1, max_length=2**16)]
    instructions: Text | None = None
    max_output_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None
    parallel_tool_calls: bool | None = None
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    text: TextOptions | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    truncation: Literal["auto", "disabled"] | None = None
    user: str | None = None
    store: bool | None = None
    """Accepted, and nothing is stored either way; the answer says `store: false`."""
    background: bool | None = None
    previous_response_id: str | None = None
    conversation: str | dict[str, Any] | None = None
    prompt: dict[str, Any] | None = None

    def to_chat(self) -> dict[str, Any]:
        """Return the chat request that means the same.

        Raises
        ------
        UnsupportedFeature
            For what this server does not do.
        """
        self._refuse_unsupported()
        chat = {
            "model": self.model,
            "messages": self._messages(),
            "max_completion_tokens": self.max_output_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "user": self.user,
            "parallel_tool_calls": self.parallel_tool_calls if self.tools else None,
            "tools": [_chat_tool(tool) for tool in self.tools] if self.tools else None,
            "tool_choice": self._tool_choice() if self.tools else None,
            "response_format": self._response_format(),
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        return {name: value for name, value in chat.items() if value is not None}

    def _refuse_unsupported(self) -> None:
        for name in ("previous_response_id", "conversation"):
            if getattr(self, name) is not None:
                raise UnsupportedFeature(
                    f"{name} is not supported, as nothing is stored here: send the earlier items in 'input'", param=name
                )
        if self.prompt is not None:
            raise UnsupportedFeature("prompt is not supported: send its text in 'instructions'", param="prompt")
        if self.background:
            raise UnsupportedFeature("background is not supported: leave it out, and stream", param="background")
        if self.truncation == "auto":
            raise UnsupportedFeature("truncation 'auto' is not supported: shorten 'input'", param="truncation")

    def _messages(self) -> list[dict[str, Any]]:
        out: list[dict[str, Any]] = []
        if self.instructions is not None:
            out.append({"role": "system", "content": self.instructions})
        if isinstance(self.input, str):
            return [*out, {"role": "user", "content": self.input}]
        for item in self.input:
            if item.type == "message":
                out.append({"role": item.role, "content": _text(item.content)})
            elif item.type == "function_call":
                function = {"name": item.name, "arguments": item.arguments}
                if not out or out[-1]["role"] != "assistant":
                    out.append({"role": "assistant", "content": None})
                out[-1].setdefault("tool_calls", []).append(
                    {"id": item.call_id, "type": "function", "function": function}
                )
            elif item.type == "function_call_output":
                out.append({"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output)})
        return out

    def _tool_choice(self) -> object:
        if isinstance(self.tool_choice, NamedTool):
            return {"type": "function", "function": {"name": self.tool_choice.name}}
        return self.tool_choice

    def _response_format(self) -> dict[str, Any] | None:
        wanted = None if self.text is None else self.text.format
        if wanted is None or wanted.type == "text":
            return None
        if wanted.type == "json_object":
            return {"type": "json_object"}
        schema = {"name": wanted.name or "answer", "schema": wanted.schema_, "strict": wanted.strict}
        given = {name: value for name, value in schema.items() if value is not None}
        return {"type": "json_schema", "json_schema": given}


class OutputPart(Answer):
    """Text of a message, or of reasoning."""

    type: Literal["output_text", "reasoning_text"]
    text: str


class OutputItem(Answer):
    """A message, a tool call, or reasoning."""

    id: str
    type: Literal["message", "function_call", "reasoning"]
    status: Literal["in_progress", "completed", "incomplete"]
    role: Literal["assistant"] | None = None
    content: list[OutputPart] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None


class InputTokensDetails(Answer):
    """Part of `usage`."""

    cached_tokens: int


class OutputTokensDetails(Answer):
    """Part of `usage`."""

    reasoning_tokens: int


class ResponsesUsage(Answer):
    """Token counts, by this route's names."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class IncompleteDetails(Answer):
    """Why an answer is not whole."""

    reason: Literal["max_output_tokens"]


class ResponseObject(Answer):
    """Answer of POST /v1/responses."""

    id: str
    object: Literal["response"]
    created_at: int
    """Unix time, seconds."""
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    incomplete_details: IncompleteDetails | None
    model: str
    output: list[OutputItem]
    usage: ResponsesUsage | None


class ResponseEvent(Answer):
    """One event of a streamed answer; which further fields it has depends on its type."""

    type: str
    sequence_number: int
    response: ResponseObject | None = None
    item: OutputItem | None = None
    part: OutputPart | None = None
    output_index: int | None = None
    content_index: int | None = None
    item_id: str | None = None
    delta: str | None = None
    text: str | None = None
    arguments: str | None = None


def _chat_tool(tool: FunctionTool) -> dict[str, Any]:
    function = tool.model_dump(exclude_none=True, exclude={"type"})
    return {"type": "function", "function": function}


def _text(content: str | list[InputPart] | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    for part in content:
        if part.type in ("input_image", "input_file", "input_audio"):
            raise UnsupportedFeature(f"content of type {part.type!r} is not supported by this model", param="input")
    return "".join(part.text or part.refusal or "" for part in content)

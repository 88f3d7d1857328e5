"""The wire format: OpenAI request bodies, checked field by field.

Unknown fields are ignored, as OpenAI's servers do; wrong types and absurd values are refused with the field's name.
Knows nothing of the model: what depends on it (context length, vocabulary) is checked in `prepare`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, TypeVar

import pydantic
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from tpserve.coordinator.gateway.errors import InvalidRequest, UnsupportedFeature

MAX_CHOICES = 128
MAX_STOPS = 16
MAX_PROMPTS = 256
MAX_TOTAL_CHOICES = 256
"""Prompts times n."""

TokenId = Annotated[int, Field(ge=0, lt=2**32)]
Text = Annotated[str, Field(max_length=2**24)]


class _Unsupported(ValueError):
    """Raised by a validator for what OpenAI accepts and this server does not (yet)."""


class Wire(BaseModel):
    """What every request body is: strict types, unknown fields ignored."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="ignore", frozen=True)


class JsonSchema(Wire):
    """`response_format.json_schema`, OpenAI's form."""

    name: str | None = None
    description: str | None = None
    json_schema: dict[str, Any] | bool | None = Field(None, alias="schema")
    strict: bool | None = None
    """Accepted; the output always follows the schema."""


class ResponseFormat(Wire):
    """`response_format`: free text, any JSON object, or JSON of a schema."""

    type: str
    json_schema: JsonSchema | None = None
    """With type `json_schema`."""
    object_schema: str | dict[str, Any] | None = Field(None, alias="schema")
    """With type `json_object`: a schema, as text in MLC's form."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.type not in ("text", "json_object", "json_schema"):
            raise ValueError(f"{self.type!r} is not a response format; text, json_object and json_schema are")
        if self.type == "json_schema" and (self.json_schema is None or self.json_schema.json_schema is None):
            raise ValueError("type 'json_schema' needs the field 'json_schema' with a 'schema'")
        if self.type != "json_schema" and self.json_schema is not None:
            raise ValueError(f"'json_schema' is only allowed with type 'json_schema', not with {self.type!r}")
        if self.type != "json_object" and self.object_schema is not None:
            raise ValueError(f"'schema' is only allowed with type 'json_object', not with {self.type!r}")
        return self


class StreamOptions(Wire):
    """`stream_options`."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    """Extra, as in vLLM: with `include_usage`, each chunk carries the usage so far, and tokens without text get one."""


class DebugConfig(Wire):
    """`debug_config`, MLC's; taken only with `--enable-debug`. What is unknown is refused: it would have no effect."""

    model_config = ConfigDict(extra="forbid")

    special_request: Literal["query_engine_metrics"] | None = None
    """Nothing is generated; the engine's metrics are the answer, in `usage.extra`."""
    ignore_eos: bool | None = None
    """The same as the field of this name beside it."""
    grammar_execution_mode: Literal["constraint", "jump_forward"] | None = None
    """How a grammar is followed; tokens are masked one by one here, which is `constraint`."""

    @model_validator(mode="after")
    def _no_jumps(self) -> Self:
        if self.grammar_execution_mode == "jump_forward":
            raise _Unsupported("'jump_forward' is not supported; 'constraint' gives the same language")
        return self


class ContentPart(Wire):
    """One part of a message's content list; only text is served."""

    type: str
    text: Text | None = None

    @model_validator(mode="after")
    def _only_text(self) -> Self:
        if self.type in ("image_url", "input_audio", "file", "video_url"):
            raise _Unsupported(f"content of type {self.type!r} is not supported by this model; only 'text' is")
        if self.type not in ("text", "refusal"):
            raise ValueError(f"{self.type!r} is not a content type")
        if self.type == "text" and self.text is None:
            raise ValueError("a part of type 'text' needs the field 'text'")
        return self


class FunctionCall(Wire):
    """The function of a tool call in the history."""

    name: str
    arguments: str


class ToolCall(Wire):
    """A tool call in the history."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class FunctionDefinition(Wire):
    """What a function is called and takes."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """A JSON schema of an object; None takes no arguments."""
    strict: bool | None = None
    """Calls that the model makes of its own accord follow `parameters`, as forced ones always do."""


class Tool(Wire):
    """One entry of `tools`."""

    type: Literal["function"]
    function: FunctionDefinition


class FunctionName(Wire):
    """The function of a named tool choice."""

    name: str


class NamedToolChoice(Wire):
    """`tool_choice` that forces one function."""

    type: Literal["function"]
    function: FunctionName


class Message(Wire):
    """One message of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: Text | None = None
    """Of an assistant message in the history; templates decide what to do with it."""

    @model_validator(mode="after")
    def _has_content(self) -> Self:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise ValueError(f"a {self.role} message needs the field 'content'")
        if self.tool_calls and self.role != "assistant":
            raise ValueError("only assistant messages may carry 'tool_calls'")
        return self

    @property
    def text(self) -> str:
        """The content as one string."""
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        return "".join(part.text or "" for part in self.content)


class _Sampling(Wire):
    """What chat and completions share."""

    model: str | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[TokenId, Annotated[float, Field(ge=-100, le=100)]] | None = Field(None, max_length=4096)
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: Annotated[str, Field(min_length=1)] | list[Annotated[str, Field(min_length=1)]] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    """Extra, as in vLLM: only the k best; 0 or null is off."""
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    """Extra: drop tokens below this share of the best one's probability."""
    ignore_eos: bool | None = None
    """Extra, for benchmarks: run to max_tokens."""
    stop_token_ids: list[TokenId] | None = Field(None, max_length=128)
    """Extra: further tokens that end the output."""
    user: str | None = None
    response_format: ResponseFormat | None = None
    guided_json: str | dict[str, Any] | None = None
    """Extra, as in vLLM: the output is JSON of this schema (the schema itself, or its text)."""
    guided_regex: Annotated[str, Field(min_length=1)] | None = None
    """Extra: the whole output matches this regular expression."""
    guided_choice: list[Annotated[str, Field(min_length=1)]] | None = Field(None, min_length=1, max_length=4096)
    """Extra: the output is one of these strings."""
    guided_grammar: Annotated[str, Field(min_length=1)] | None = None
    """Extra: the output is derived from the rule `root` of this EBNF (GBNF) grammar."""
    debug_config: DebugConfig | None = None

    @field_validator("stop")
    @classmethod
    def _not_too_many_stops(cls, value: str | list[str] | None) -> str | list[str] | None:
        if isinstance(value, list) and len(value) > MAX_STOPS:
            raise ValueError(f"{len(value)} stop strings were given; at most {MAX_STOPS} are allowed")
        if value is not None and max(map(len, [value] if isinstance(value, str) else value), default=0) > 1024:
            raise ValueError("a stop string has more than 1024 characters")
        return value

    @model_validator(mode="after")
    def _stream_options_need_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("'stream_options' is only allowed when 'stream' is true")
        return self

    @model_validator(mode="after")
    def _one_constraint(self) -> Self:
        given = self.constraints
        if len(given) > 1:
            raise ValueError(f"{' and '.join(map(repr, given))} were given; at most one may shape the output")
        if given and self.ignores_eos:
            raise ValueError(f"'ignore_eos' cannot be combined with {given[0]!r}, whose output has an end")
        return self

    @model_validator(mode="after")
    def _metrics_are_usage(self) -> Self:
        if self.asks_for_metrics and self.stream and not self.include_usage:
            raise ValueError("'query_engine_metrics' answers in the usage: set stream_options.include_usage")
        return self

    @property
    def ignores_eos(self) -> bool:
        """Whether the output runs to its limit whatever the model says."""
        return bool(self.ignore_eos or (self.debug_config is not None and self.debug_config.ignore_eos))

    @property
    def asks_for_metrics(self) -> bool:
        """Whether the engine's metrics are asked for, and no text."""
        return self.debug_config is not None and self.debug_config.special_request is not None

    @property
    def constraints(self) -> list[str]:
        """Names of the given fields that shape the output."""
        guided = ("guided_json", "guided_regex", "guided_choice", "guided_grammar")
        given = [name for name in guided if getattr(self, name) is not None]
        if self.response_format is not None and self.response_format.type != "text":
            given.append("response_format")
        return given

    @property
    def stops(self) -> tuple[str, ...]:
        """Stop strings as a tuple."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a usage chunk."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def usage_by_chunk(self) -> bool:
        """Whether every chunk of a stream carries the usage so far."""
        return self.include_usage and self.stream_options is not None and self.stream_options.continuous_usage_stats


class ChatCompletionRequest(_Sampling):
    """Body of POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=2**16)
    logprobs: bool | None = None
    """Of each token, in the distribution that it was sampled from: a grammar's mask, penalties and bias are in it."""
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    """Alternatives per token; a grammar that allows fewer gives fewer."""
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    """Newer name of max_tokens; it wins if both are given."""
    tools: list[Tool] | None = Field(None, max_length=128)
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    """None is `auto` where there are tools."""
    parallel_tool_calls: bool | None = None
    """False: at most one call in an answer."""
    functions: list[Any] | None = None
    function_call: Any = None
    chat_template_kwargs: dict[str, Any] | None = None
    """Extra, as in vLLM: further variables of the chat template, such as Qwen3's `enable_thinking`."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("'top_logprobs' is only allowed when 'logprobs' is true")
        if self.functions or self.function_call:
            raise _Unsupported("'functions' and 'function_call' are not supported; use 'tools' and 'tool_choice'")
        names = [tool.function.name for tool in self.tools or ()]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"the tool {min(twice)!r} is defined more than once")
        if not names and self.tool_choice not in (None, "none"):
            raise ValueError("'tool_choice' is only allowed when 'tools' are given")
        if isinstance(self.tool_choice, NamedToolChoice) and self.tool_choice.function.name not in names:
            raise ValueError(f"tool_choice names {self.tool_choice.function.name!r}, which is not among the tools")
        if self.forces_tools and self.constraints:
            raise ValueError(f"a tool_choice that forces a call cannot be combined with {self.constraints[0]!r}")
        if self.forces_tools and self.ignores_eos:
            raise ValueError("'ignore_eos' cannot be combined with a tool_choice that forces a call")
        return self

    @property
    def forces_tools(self) -> bool:
        """Whether the answer must be a tool call."""
        return self.tool_choice == "required" or isinstance(self.tool_choice, NamedToolChoice)

    @property
    def callable_tools(self) -> list[Tool]:
        """The tools that the answer may call."""
        if self.tool_choice == "none":
            return []
        if isinstance(self.tool_choice, NamedToolChoice):
            name = self.tool_choice.function.name
            return [tool for tool in self.tools or () if tool.function.name == name]
        return self.tools or []

    @property
    def output_limit(self) -> int | None:
        """Output tokens per choice that the client asked for."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives per token; None is no log-probabilities at all."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(_Sampling):
    """Body of POST /v1/completions."""

    prompt: Text | list[Text] | list[TokenId] | list[list[TokenId]]
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    suffix: str | None = None

    @field_validator("prompt")
    @classmethod
    def _has_prompts(cls, value: str | list[Any]) -> str | list[Any]:
        if isinstance(value, list):
            if not value or any(item == [] for item in value):
                raise ValueError("a prompt is empty")
            if not isinstance(value[0], int) and len(value) > MAX_PROMPTS:
                raise ValueError(f"{len(value)} prompts were given; at most {MAX_PROMPTS} are allowed in one request")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.suffix:
            raise _Unsupported("'suffix' is not supported by this model")
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise _Unsupported("'best_of' is only supported when it equals 'n'")
        if self.echo and self.logprobs is not None:
            raise _Unsupported("'echo' together with 'logprobs' is not supported: the prompt has no log-probabilities")
        return self

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts as a list, of texts or of token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt


Request = TypeVar("Request", bound=Wire)


def parse_body(model: type[Request], body: bytes) -> Request:
    """Read and check a request body.

    Raises
    ------
    InvalidRequest
        Naming the field and what is wrong with it.
    """
    try:
        return model.model_validate_json(body)
    except pydantic.ValidationError as error:
        # Of a union's failed branches, the one that got furthest is the one that was meant.
        details = max(error.errors(include_url=False), key=lambda item: len(item["loc"]))
        param = _param(details["loc"])
        cause = details.get("ctx", {}).get("error")
        if details["type"] == "json_invalid":
            raise InvalidRequest(
                f"The body is not valid JSON: {details['ctx']['error']}", code="invalid_json"
            ) from None
        message = str(cause) if isinstance(cause, ValueError) else details["msg"]
        if details["type"] != "missing" and isinstance(details["input"], int | float | str):
            message += f" (got {_short(details['input'])})"
        text = f"{param}: {message}" if param else message
        kind = UnsupportedFeature if isinstance(cause, _Unsupported) else InvalidRequest
        raise kind(text, param=param) from None


_BRANCHES = ("str", "int", "float", "bool", "dict", "NamedToolChoice")
"""Names of union branches."""


def _param(loc: tuple[int | str, ...]) -> str | None:
    """Write a location as OpenAI does (`messages[0].content`), without the names of union branches."""
    path = ""
    for item in loc:
        if isinstance(item, int):
            path += f"[{item}]"
        elif item.isidentifier() and item not in _BRANCHES:
            path += f".{item}" if path else item
    return path or None


def _short(value: float | str) -> str:
    """Return a value for a message, cut to a length that fits one line."""
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**30 else "an integer of many digits"
    return text if len(text) <= 80 else text[:77] + "..."

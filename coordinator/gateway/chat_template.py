"""Renders messages to prompt text with the model's own Jinja template, in a sandbox."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox

from tpserve.coordinator.gateway.errors import InvalidRequest
from tpserve.coordinator.gateway.tokenizer import ModelFilesError, optional_json
from tpserve.coordinator.gateway.tools.formats import format_of
from tpserve.coordinator.gateway.tools.parser import THINK
from tpserve.coordinator.gateway.tools.prompt import write_tools

RENDER_TIMEOUT_S = 5.0
"""A prompt of a hundred thousand messages takes a second; nothing else is answered meanwhile."""


class ChatTemplate:
    """A compiled chat template and the special tokens it may write.

    Parameters
    ----------
    source
        Jinja text, as model folders ship it.
    special_tokens
        Variables such as `bos_token` and `eos_token`.
    tool_source
        Used instead of `source` where there are tools, in folders that ship one for each.
    timeout_s
        Of one rendering.

    Attributes
    ----------
    tool_format : ToolFormat
        How this model writes tool calls.
    reasons : bool
        Its answers may begin with `<think>`.

    Raises
    ------
    ModelFilesError
        If the template does not compile.
    """

    def __init__(
        self,
        source: str,
        special_tokens: dict[str, str],
        tool_source: str | None = None,
        *,
        timeout_s: float = RENDER_TIMEOUT_S,
    ) -> None:
        self._timeout_s = timeout_s
        self._environment = environment = _TimedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        tool_source = tool_source or source
        try:
            self._template = environment.from_string(source)
            self._tool_template = environment.from_string(tool_source)
            variables = jinja2.meta.find_undeclared_variables(environment.parse(tool_source))
        except jinja2.TemplateSyntaxError as error:
            where = f"line {error.lineno}: {error.message}"
            raise ModelFilesError(f"the chat template does not compile ({where})") from None
        except (jinja2.TemplateError, SyntaxError, ValueError, RecursionError) as error:
            # Python compiles what Jinja writes, and refuses what Jinja lets pass.
            raise ModelFilesError(f"the chat template does not compile ({error})") from None
        for template in (self._template, self._tool_template):
            # Copied at each rendering: of the chain of maps that it is, in 80 us.
            template.globals = dict(template.globals)
        self._special_tokens = special_tokens
        self._knows_tools = "tools" in variables
        self.tool_format = format_of(tool_source)
        self.reasons = THINK in source

    @classmethod
    def load(cls, model_dir: Path) -> ChatTemplate | None:
        """Load `chat_template.jinja`, or `chat_template` of `tokenizer_config.json`; None if the model has neither.

        Raises
        ------
        ModelFilesError
            If a file is corrupt or the template does not compile; names the file and the remedy.
        """
        path = model_dir / "tokenizer_config.json"
        config = optional_json(path)
        file = model_dir / "chat_template.jinja"
        try:
            if file.is_file():
                path = file
                return cls(file.read_text(encoding="utf-8"), special_tokens(config))
            source, tool_source = _sources(config.get("chat_template"))
            return None if source is None else cls(source, special_tokens(config), tool_source)
        except (OSError, ValueError) as error:
            raise ModelFilesError(f"{path}: {error}: fetch it again, or write another template to {file}") from None

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        variables: dict[str, Any] | None = None,
    ) -> str:
        """Return the prompt that ends where the assistant's answer begins.

        Parameters
        ----------
        messages
            Arguments of tool calls are objects.
        tools
            In OpenAI's form. A template that knows none has them, and the history's calls, written out as text.
        variables
            Further ones, for this template.

        Raises
        ------
        InvalidRequest
            If the template refuses the messages, or takes too long over them.
        """
        if not self._knows_tools:
            messages = write_tools(messages, tools or ())
        elif tools:
            variables = {**(variables or {}), "tools": tools}
        template = self._tool_template if tools else self._template
        given = {**(variables or {}), **self._special_tokens, "messages": messages, "add_generation_prompt": True}
        self._environment.deadline = time.monotonic() + self._timeout_s
        try:
            return template.render(given)
        except _TooLongError:
            raise InvalidRequest(
                f"The model's chat template did not end within {self._timeout_s:g} s: send fewer or shorter messages, "
                "or other chat_template_kwargs",
                param="messages",
            ) from None
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
            # What the template is given comes from the client alone, so its failure is the request's.
            raise InvalidRequest(
                f"The model's chat template refuses these messages: {error}", param="messages"
            ) from None


class _TooLongError(Exception):
    """The deadline has passed."""


class _TimedEnvironment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Ends a rendering at its deadline: all that it reads, calls and writes comes through here, in each turn of a loop.

    A single filter, and a loop within a macro that only writes, run to their end.
    """

    deadline = 0.0

    def _check(self) -> None:
        if time.monotonic() > self.deadline:
            raise _TooLongError

    def getattr(self, obj: Any, attribute: str) -> Any:
        """See jinja2."""
        self._check()
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        """See jinja2."""
        self._check()
        return super().getitem(obj, argument)

    def concat(self, parts: Iterable[str]) -> str:
        """See jinja2."""
        found = []
        for part in parts:
            self._check()
            found.append(part)
        return "".join(found)

    def call(self, context: jinja2.runtime.Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """See jinja2."""
        self._check()
        return super().call(context, obj, *args, **kwargs)


def _sources(value: object) -> tuple[str | None, str | None]:
    """Return the text of the template that tokenizer_config.json gives, and of that for chats with tools."""
    source, tool_source = value, None
    if isinstance(value, list):  # several named templates
        by_name = {str(item.get("name")): item.get("template") for item in value if isinstance(item, dict)}
        source, tool_source = by_name.get("default"), by_name.get("tool_use")
    if source is None:
        return None, None
    if not isinstance(source, str) or not isinstance(tool_source, str | None):
        raise ModelFilesError("chat_template must be a string or a list of named templates")
    return source, tool_source


def special_tokens(tokenizer_config: dict[str, Any]) -> dict[str, str]:
    """Return `bos_token`, `eos_token`, ... of tokenizer_config.json as plain strings."""
    found = {}
    for name in ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"):
        value = tokenizer_config.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            found[name] = value
    return found


class _GenerationBlock(jinja2.ext.Extension):
    """Accepts `{% generation %}`, which marks the assistant's text for training, and renders its body."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """Return the statements up to `{% endgeneration %}`."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(value: object, indent: int | None = None) -> str:
    """Unlike Jinja's own, leaves <, > and non-ASCII text as they are."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format_: str) -> str:
    return datetime.now().strftime(format_)

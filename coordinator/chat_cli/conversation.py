"""A conversation: its messages and settings, and how fast its last answer came. Knows no terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import orjson

from tpserve.coordinator.draft_counts import parse_drafts
from tpserve.coordinator.gateway.answers import ChatCompletionChunk, Usage
from tpserve.coordinator.gateway.errors import ApiError
from tpserve.coordinator.gateway.protocol import ChatCompletionRequest, parse_body

FIELDS: dict[str, type[int] | type[float] | type[str]] = {
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "frequency_penalty": float,
    "presence_penalty": float,
    "seed": int,
    "max_tokens": int,
    "stop": str,
}
"""What `/set` takes; `stop` is a list with commas between."""


class SettingError(ValueError):
    """A setting is unknown or its value cannot be; the message names both and the remedy."""


class Backend(Protocol):
    """Who answers."""

    def stream(self, fields: dict[str, Any]) -> Iterator[ChatCompletionChunk]:
        """Return the chunks of the answer to a chat request; closing the iterator ends the request.

        Raises
        ------
        ApiError
            If it cannot be served.
        """

    def metrics(self) -> str:
        """Return the metrics in Prometheus text format."""

    def close(self) -> None:
        """End what was started."""


@dataclass(frozen=True, slots=True)
class Stats:
    """Speed of one answer, in tokens per second; 0 where there was nothing to measure."""

    prefill: float = 0.0
    """Prompt tokens that were computed, over the time to the first text."""
    decode: float = 0.0
    """Output tokens after the first, over the time from the first text to the end."""

    def __str__(self) -> str:
        return f"prefill: {self.prefill:.1f} tok/s, decode: {self.decode:.1f} tok/s"


class Conversation:
    """What has been said, and how to go on.

    Parameters
    ----------
    model
        Name to send with each request; None leaves it out.
    system
        System prompt; it survives `reset`.
    clock
        Monotonic, in seconds.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        model: str | None = None,
        system: str | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._backend = backend
        self._model = model
        self._clock = clock
        self._system = [] if system is None else [{"role": "system", "content": system}]
        self.messages: list[dict[str, str]] = list(self._system)
        self.settings: dict[str, Any] = {}
        self.stats = Stats()

    def stats_lines(self) -> list[str]:
        """Return how fast the last answer came and, where drafts are verified, how many were accepted so far."""
        lines = [str(self.stats)]
        drafts = parse_drafts(self._backend.metrics())
        if drafts is not None and drafts.num_drafts:
            lines.append(f"accept rate: {100 * drafts.accept_rate:.1f} %, accept length: {drafts.accept_length:.2f}")
        return lines

    def reset(self) -> None:
        """Forget everything said but the system prompt. Settings stay."""
        self.messages = list(self._system)

    def set(self, text: str) -> None:
        """Change settings: `temperature=0.5;stop=a,b`. An empty value brings the default back. All or nothing.

        Raises
        ------
        SettingError
            If a name is unknown or a value cannot be.
        """
        changed = dict(self.settings)
        for item in filter(None, (part.strip() for part in text.split(";"))):
            name, separator, value = (part.strip() for part in item.partition("="))
            if name not in FIELDS or not separator:
                raise SettingError(f"{item!r} is not a setting: write NAME=VALUE with a name of {', '.join(FIELDS)}")
            changed.pop(name, None)
            if value:
                changed[name] = _parse(name, value)
        probe = {"messages": [{"role": "user", "content": ""}], **changed}
        try:
            parse_body(ChatCompletionRequest, orjson.dumps(probe))
        except ApiError as error:
            raise SettingError(error.message) from None
        self.settings = changed

    def send(self, text: str) -> Generator[str]:
        """Say something and yield the answer's text as it comes.

        An answer that is left early (`close`) stays in the conversation as far as it came. After a refusal the
        conversation is as it was.

        Raises
        ------
        ApiError
            If the request cannot be served.
        """
        request = {
            "messages": [*self.messages, {"role": "user", "content": text}],
            **self.settings,
            **({} if self._model is None else {"model": self._model}),
            "stream_options": {"include_usage": True},
        }
        parts: list[str] = []
        usage: Usage | None = None
        begin = self._clock()
        first = last = begin
        try:
            for chunk in self._backend.stream(request):
                usage = chunk.usage or usage
                for choice in chunk.choices:
                    if not parts:
                        first = self._clock()
                    last = self._clock()
                    if choice.delta.content:
                        parts.append(choice.delta.content)
                        yield choice.delta.content
        finally:
            if parts:
                self.messages += [request["messages"][-1], {"role": "assistant", "content": "".join(parts)}]
            if usage is not None:
                self.stats = _stats(usage, first - begin, last - first)

    def metrics(self) -> str:
        """Return the engine's metrics in Prometheus text format."""
        return self._backend.metrics()


def _stats(usage: Usage, prefill_s: float, decode_s: float) -> Stats:
    details = usage.prompt_tokens_details
    num_computed = usage.prompt_tokens - (0 if details is None else details.cached_tokens)
    num_decoded = usage.completion_tokens - 1
    return Stats(
        num_computed / prefill_s if prefill_s > 0 else 0.0,
        num_decoded / decode_s if decode_s > 0 and num_decoded > 0 else 0.0,
    )


def _parse(name: str, value: str) -> object:
    kind = FIELDS[name]
    if kind is str:
        return [part.replace("\\n", "\n") for part in value.split(",") if part]
    try:
        return kind(value)
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        raise SettingError(f"{name} is {value!r}: it must be {what}") from None

"""The conversation behind `tpserve chat`, and what its terminal side prints."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tpserve.coordinator.chat_cli.__main__ import main
from tpserve.coordinator.chat_cli.conversation import Conversation, SettingError, Stats
from tpserve.coordinator.chat_cli.terminal import converse
from tpserve.coordinator.gateway.answers import ChatCompletionChunk
from tpserve.coordinator.gateway.errors import QueueFull

HEAD = {"id": "1", "object": "chat.completion.chunk", "created": 0, "model": "m"}


def chunk(text: str | None = None, finish: str | None = None) -> ChatCompletionChunk:
    choice = {"index": 0, "delta": {} if text is None else {"content": text}, "finish_reason": finish}
    return ChatCompletionChunk.model_validate({**HEAD, "choices": [choice]})


def usage(prompt: int, completion: int, cached: int) -> ChatCompletionChunk:
    counts = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    details = {"prompt_tokens_details": {"cached_tokens": cached}}
    return ChatCompletionChunk.model_validate({**HEAD, "choices": [], "usage": counts | details})


class Echo:
    """Answers each message with itself, word by word."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.num_closed = 0
        self.interrupt = False
        self.refuse = False

    def stream(self, fields: dict[str, Any]) -> Iterator[ChatCompletionChunk]:
        self.requests.append(fields)
        if self.refuse:
            raise QueueFull("come back later")
        words = fields["messages"][-1]["content"].split(" ")
        try:
            for word in words:
                yield chunk(word)
                if self.interrupt:
                    raise KeyboardInterrupt
            yield chunk(finish="stop")
            yield usage(10, len(words), 4)
        finally:
            self.num_closed += 1

    def metrics(self) -> str:
        return "a_metric 1\n"

    def close(self) -> None: ...


class Lines:
    """Gives lines; None is Ctrl-C."""

    def __init__(self, *lines: str | None) -> None:
        self._lines = iter(lines)

    def read(self) -> str:
        try:
            line = next(self._lines)
        except StopIteration:
            raise EOFError from None
        if line is None:
            raise KeyboardInterrupt
        return line


def talk(echo: Echo, *lines: str | None, clock: Iterator[float] | None = None) -> tuple[str, bool]:
    ticks = clock or itertools.count(0.0)
    out = io.StringIO()
    answered = converse(Conversation(echo, system="be brief", clock=lambda: next(ticks)), Lines(*lines), out)
    return out.getvalue(), answered


def test_messages_grow_and_reset_keeps_the_system_prompt() -> None:
    echo = Echo()
    assert talk(echo, "a b", None, "  ", "c", "/reset", "d") == ("ab\nc\nA new conversation begins.\nd\n", True)
    system = {"role": "system", "content": "be brief"}
    assert [request["messages"] for request in echo.requests] == [
        [system, user("a b")],
        [system, user("a b"), {"role": "assistant", "content": "ab"}, user("c")],
        [system, user("d")],
    ]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def test_stats_in_the_slides_form() -> None:
    # Begins at 0; first text at 2 s (6 of 10 prompt tokens computed), two more tokens and the end within 0.5 s.
    clock = iter([0.0, 2.0, 2.0, 2.25, 2.5, 2.5])
    text, _ = talk(Echo(), "/stats", "a b c", "/stats", clock=clock)
    assert text == "prefill: 0.0 tok/s, decode: 0.0 tok/s\nabc\nprefill: 3.0 tok/s, decode: 4.0 tok/s\n"
    assert str(Stats(2.1, 14.04)) == "prefill: 2.1 tok/s, decode: 14.0 tok/s"


def test_stats_tell_of_drafts_where_there_are_any() -> None:
    class Drafting(Echo):
        def metrics(self) -> str:
            counts = {"drafts": 10, "draft_tokens": 30, "accepted_tokens": 15}
            return "".join(f"tpserve_spec_decode_num_{name}_total {count}\n" for name, count in counts.items())

    text, _ = talk(Drafting(), "/stats")
    assert text == "prefill: 0.0 tok/s, decode: 0.0 tok/s\naccept rate: 50.0 %, accept length: 2.50\n"


def test_settings_reach_the_request() -> None:
    echo = Echo()
    text, _ = talk(
        echo,
        "/set temperature=0.5;top_p=0.8;seed=23;max_tokens=100;stop=a,b",
        "x",
        "/set temperature=; stop = \\n\\n",
        "x",
        "/set",
    )
    first, second = ({name: r[name] for name in r if name not in ("messages", "stream_options")} for r in echo.requests)
    assert first == {"temperature": 0.5, "top_p": 0.8, "seed": 23, "max_tokens": 100, "stop": ["a", "b"]}
    assert second == {"top_p": 0.8, "seed": 23, "max_tokens": 100, "stop": ["\n\n"]}
    assert text.endswith("top_p=0.8;seed=23;max_tokens=100;stop=\\n\\n\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("temprature=1", "'temprature=1' is not a setting"),
        ("temperature", "'temperature' is not a setting"),
        ("temperature=hot", "temperature is 'hot': it must be a number"),
        ("max_tokens=1.5", "max_tokens is '1.5': it must be a whole number"),
        ("temperature=9", "temperature: Input should be less than or equal to 2"),
        ("seed=1;top_p=0", "top_p: Input should be greater than 0"),
    ],
)
def test_settings_that_cannot_be(text: str, message: str) -> None:
    conversation = Conversation(Echo())
    with pytest.raises(SettingError, match=message):
        conversation.set(text)
    assert conversation.settings == {}


def test_a_refusal_leaves_the_conversation_as_it_was() -> None:
    echo = Echo()
    echo.refuse = True
    conversation = Conversation(echo)
    out = io.StringIO()
    assert not converse(conversation, Lines("hello", "/nothing"), out)
    assert out.getvalue() == "error: come back later\nerror: /nothing is not a command; /help lists them\n"
    assert conversation.messages == []


def test_ctrl_c_stops_an_answer_and_keeps_what_came() -> None:
    echo = Echo()
    echo.interrupt = True
    conversation = Conversation(echo)
    out = io.StringIO()
    converse(conversation, Lines("a b"), out)
    assert out.getvalue() == "a [stopped]\n"
    assert conversation.messages[-1] == {"role": "assistant", "content": "a"}
    assert echo.num_closed == 1


def test_text_cannot_steer_the_terminal() -> None:
    assert talk(Echo(), "\x1b[2J\rred\tcell")[0] == "\N{REPLACEMENT CHARACTER}[2J\N{REPLACEMENT CHARACTER}red\tcell\n"


def test_help_and_metrics() -> None:
    text, _ = talk(Echo(), "/help", "/metrics", "/exit", "never")
    assert text.endswith("a_metric 1\n")
    for command in ("/help", "/exit", "/stats", "/metrics", "/reset", "/set", "Escape"):
        assert command in text


def test_authorities_are_for_servers_and_must_be_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flags, why in (
        (["m", "--ssl-ca-certs", "ca.pem"], "--ssl-ca-certs is for --base-url"),
        (["--engine", "h:1", "--ssl-ca-certs", "ca.pem"], "an engine is met by --engine-ssl-ca-certs"),
        (["--base-url", "https://h:1", "--ssl-ca-certs", str(tmp_path / "ca.pem")], "ca.pem cannot be used"),
        (["--engine", "h:1", "--tp=2"], "--tp=2 is for an engine that is started here"),
        (["--engine", "h:1", "--engine-ssl-certfile", "x"], "--engine-ssl-certfile needs --engine-ssl-ca-certs"),
    ):
        assert main(flags) == 1
        assert why in capsys.readouterr().err

"""The terminal side of `tpserve chat`: reads lines and commands, shows text as it comes."""

from __future__ import annotations

import contextlib
import re
import sys
from typing import Protocol, TextIO

from prompt_toolkit import PromptSession
from prompt_toolkit.history import InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

from tpserve.coordinator.chat_cli.conversation import Conversation, SettingError
from tpserve.coordinator.gateway.errors import ApiError

HELP = """\
/help                print this
/exit                leave (also Ctrl-D)
/stats               print the speed of the last answer
/metrics             print the engine's metrics
/reset               begin a new conversation; settings stay
/set NAME=VALUE;...  change settings, as in
                     /set temperature=0.5;top_p=0.8;seed=23;max_tokens=100;stop=a,b
                     an empty value brings the default back; /set alone prints what is set
Escape and then Enter begin a new line. Ctrl-C stops an answer.
"""

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""What a model's text may not do to a terminal; newlines and tabs may stay."""


class Reader(Protocol):
    """Where lines come from."""

    def read(self) -> str:
        """Return the next message or command; EOFError is the end, KeyboardInterrupt starts the line over."""


class PromptReader:
    """A prompt with history and several lines."""

    def __init__(self) -> None:
        bindings = KeyBindings()

        @bindings.add("escape", "enter")
        def _(event: KeyPressEvent) -> None:
            event.current_buffer.insert_text("\n")

        self._session: PromptSession[str] = PromptSession(
            ">>> ", key_bindings=bindings, history=InMemoryHistory(), prompt_continuation="... "
        )

    def read(self) -> str:
        """See Reader."""
        return self._session.prompt()


class PipeReader:
    """Standard input that is not a terminal: each line is a message."""

    def read(self) -> str:
        """See Reader."""
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.removesuffix("\n")


def converse(conversation: Conversation, reader: Reader, out: TextIO) -> bool:
    """Talk until the user leaves; return whether every message got its answer."""
    all_answered = True
    while True:
        try:
            line = reader.read()
        except KeyboardInterrupt:
            continue
        except EOFError:
            return all_answered
        if line.strip() == "/exit":
            return all_answered
        try:
            if line.startswith("/"):
                out.write(_command(conversation, line.strip()))
            elif line.strip():
                _answer(conversation, line, out)
        except (ApiError, SettingError) as error:
            all_answered = False
            out.write(f"error: {error}\n")
        out.flush()


def _answer(conversation: Conversation, text: str, out: TextIO) -> None:
    """Show the answer as it comes; Ctrl-C ends it."""
    with contextlib.closing(conversation.send(text)) as parts:
        try:
            for part in parts:
                out.write(_CONTROL.sub("\N{REPLACEMENT CHARACTER}", part))
                out.flush()
        except KeyboardInterrupt:
            out.write(" [stopped]")
    out.write("\n")


def _command(conversation: Conversation, line: str) -> str:
    """Run one command; return what it prints."""
    name, _, rest = line.partition(" ")
    match name:
        case "/help":
            return HELP
        case "/stats":
            return "".join(f"{line}\n" for line in conversation.stats_lines())
        case "/metrics":
            return conversation.metrics()
        case "/reset":
            conversation.reset()
            return "A new conversation begins.\n"
        case "/set":
            conversation.set(rest)
            shown = ";".join(f"{key}={_shown(value)}" for key, value in conversation.settings.items())
            return f"{shown or 'every setting has its default'}\n"
    raise SettingError(f"{name} is not a command; /help lists them")


def _shown(value: object) -> str:
    return ",".join(value).replace("\n", "\\n") if isinstance(value, list) else str(value)

"""`tpserve chat` in a pseudo-terminal with a screen, as a user types and reads."""

from __future__ import annotations

import contextlib
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pexpect
import pyte
import pytest

from patience import Patience, patient
from server import Server, command, environment, processes_of, until

ROWS, COLUMNS = 2000, 120

_MOST_READS = 5
"""At once: a screen that an answer streams to is looked at while it does."""


def _hear_ctrl_c() -> None:
    """As in a shell's foreground, also where the tests run in its background, which ignores the signal."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Terminal:
    """A terminal with a running `tpserve chat`; enough rows that nothing scrolls away."""

    def __init__(self, *arguments: str | Path, mark: str, folder: Path) -> None:
        # It answers no questions for its cursor.
        environ = environment(mark, {"PROMPT_TOOLKIT_NO_CPR": "1", "TERM": "xterm"})
        program, *rest = command("chat", *arguments)
        self.child = pexpect.spawn(
            program,
            rest,
            env=environ,
            cwd=str(folder),
            encoding="utf-8",
            dimensions=(ROWS, COLUMNS),
            preexec_fn=_hear_ctrl_c,
        )
        self._screen = pyte.Screen(COLUMNS, ROWS)
        self._stream = pyte.Stream(self._screen)

    @property
    def lines(self) -> list[str]:
        """The screen down to the cursor."""
        with contextlib.suppress(pexpect.TIMEOUT, pexpect.EOF):
            for _ in range(_MOST_READS):
                self._stream.feed(self.child.read_nonblocking(65536, timeout=0.02))
        rows = [self._screen.buffer[y] for y in range(self._screen.cursor.y + 1)]
        return ["".join(row[x].data for x in range(COLUMNS)).rstrip() for row in rows]

    def wait(self, pattern: str, within_s: float = 30.0) -> str:
        """Wait until the screen's text matches; return the text."""
        patience = Patience(within_s)
        while not re.search(pattern, text := "\n".join(self.lines)):
            assert not patience.is_over(), f"no {pattern!r} within {within_s:g} s on the screen:\n{text}"
        return text

    def prompts(self) -> int:
        return sum(line.startswith(">>>") for line in self.lines)

    def ask(self, line: str, within_s: float = 30.0) -> str:
        """Type a line at the prompt and press enter; return what is printed before the next prompt."""
        self.wait(r"(?m)^>>>$\Z", within_s)
        before, count = len(self.lines), self.prompts()
        self.child.send(line + "\r")
        patience = Patience(within_s)
        while self.prompts() == count or self.lines[-1] != ">>>":
            assert not patience.is_over(), "\n".join(self.lines)
            time.sleep(0.02)
        return "\n".join(self.lines[before:-1])

    def leave(self, keys: str) -> int | None:
        """Type what ends it; return the exit code."""
        self.wait(r"(?m)^>>>$\Z")
        self.child.send(keys)
        self.child.expect(pexpect.EOF, timeout=patient(60))
        self.child.wait()
        return self.child.exitstatus


@pytest.fixture
def chat(server: Server, tmp_path: Path) -> Iterator[Terminal]:
    terminal = Terminal("--base-url", server.url, mark="terminal", folder=tmp_path)
    yield terminal
    terminal.child.close(force=True)


def test_row_24_every_command(chat: Terminal) -> None:
    assert "/reset" in chat.ask("/help")
    assert chat.ask("/stats") == "prefill: 0.0 tok/s, decode: 0.0 tok/s"
    assert chat.ask("/set temperature=0;max_tokens=40;stop=a b,c d") == "temperature=0.0;max_tokens=40;stop=a b,c d"
    assert chat.ask("What is the capital of France?") == "The capital of France is Paris."
    speed = re.fullmatch(r"prefill: (\d+\.\d) tok/s, decode: (\d+\.\d) tok/s", chat.ask("/stats"))
    assert speed is not None
    assert float(speed[1]) > 0
    assert float(speed[2]) > 0
    assert "tpserve_num_requests_running" in chat.ask("/metrics")
    assert chat.ask("/reset") == "A new conversation begins."
    assert chat.ask("/set temperature=hot") == "error: temperature is 'hot': it must be a number"
    assert chat.leave("/exit\r") == 0


def test_several_lines_and_ctrl_c(chat: Terminal, server: Server) -> None:
    chat.ask("/set temperature=0;max_tokens=400")
    chat.child.send("Write a long story\x1b\rabout the sea.\r")  # escape, then enter, is a new line
    chat.wait(r"\n>>> Write a long story\n\.\.\. about the sea\.\n.*\w{3}")  # and the answer streams
    chat.child.sendintr()
    chat.wait(r"\[stopped\]\n>>>\Z")
    assert chat.ask("/set max_tokens=4;temperature=0") == "max_tokens=4;temperature=0.0"
    assert chat.leave("\x04") == 0
    assert server.metric("num_requests_running") == 0


def test_an_engine_of_its_own(tiny_folder: Path, tmp_path: Path) -> None:
    """Started with the chat, gone with it."""
    dummy = ("--load-format", "dummy", "--max-num-seqs", "4", "--max-num-batched-tokens", "64")
    terminal = Terminal(tiny_folder, *dummy, "--set", "max_tokens=4", mark="own-engine", folder=tmp_path)
    try:
        assert terminal.ask("Hello", within_s=240)
        assert terminal.lines[0].startswith("Starting ")
        assert terminal.leave("/exit\r") == 0
        until(lambda: not processes_of("own-engine"), within_s=5, what="nothing of the engine is left")
    finally:
        terminal.child.close(force=True)

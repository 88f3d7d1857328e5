"""`tpserve chat` in a pseudo-terminal, as a user types."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pexpect
import pytest

from server import Server, command, environment, processes_of

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def spawn(*arguments: str | Path, mark: str, folder: Path) -> pexpect.spawn[str]:
    # A terminal that answers no questions for its cursor, as pexpect's does not.
    environ = environment(mark, {"PROMPT_TOOLKIT_NO_CPR": "1", "TERM": "xterm"})
    program, *rest = command("chat", *arguments)
    return pexpect.spawn(
        program, rest, env=environ, cwd=str(folder), encoding="utf-8", timeout=60, dimensions=(40, 120)
    )


@pytest.fixture
def chat(server: Server, tmp_path: Path) -> Iterator[pexpect.spawn[str]]:
    child = spawn("--base-url", server.url, mark="terminal", folder=tmp_path)
    yield child
    child.close(force=True)


def answer(child: pexpect.spawn[str], line: str) -> str:
    """Type a line, press enter, and return what is printed before the next prompt."""
    child.expect_exact(">>> ")
    child.send(line + "\r")
    child.expect_exact(line)
    child.expect(r"\r\n(?s:(.*?))(?=\x1b\[[^>]*>>> |>>> )")
    printed = child.match
    assert isinstance(printed, re.Match)
    return ESCAPES.sub("", printed.group(1)).replace("\r\n", "\n").strip()


def test_every_command(chat: pexpect.spawn[str]) -> None:
    assert "/reset" in answer(chat, "/help")
    assert answer(chat, "/stats") == "prefill: 0.0 tok/s, decode: 0.0 tok/s"
    assert answer(chat, "/set temperature=0;max_tokens=40;stop=a b,c d") == "temperature=0.0;max_tokens=40;stop=a b,c d"
    assert answer(chat, "What is the capital of France?") == "The capital of France is Paris."
    speed = re.fullmatch(r"prefill: (\d+\.\d) tok/s, decode: (\d+\.\d) tok/s", answer(chat, "/stats"))
    assert speed is not None
    assert float(speed[1]) > 0
    assert float(speed[2]) > 0
    assert "tpserve_num_requests_running" in answer(chat, "/metrics")
    assert answer(chat, "/reset") == "A new conversation begins."
    assert answer(chat, "/set temperature=hot").startswith("error: temperature is 'hot'")
    chat.expect_exact(">>> ")
    chat.send("/exit\r")
    chat.expect(pexpect.EOF)
    chat.wait()
    assert chat.exitstatus == 0


def test_several_lines_and_ctrl_c(chat: pexpect.spawn[str], server: Server) -> None:
    answer(chat, "/set temperature=0;max_tokens=400")
    chat.expect_exact(">>> ")
    chat.send("Write a long story\x1b\rabout the sea.\r")  # escape, then enter, is a new line
    chat.expect_exact("... about the sea.")
    chat.expect(r"\w{3}")  # it streams
    chat.sendintr()
    chat.expect_exact("[stopped]")
    assert answer(chat, "/set max_tokens=4;temperature=0") == "max_tokens=4;temperature=0.0"
    chat.expect_exact(">>> ")
    chat.sendeof()
    chat.expect(pexpect.EOF)
    chat.wait()
    assert chat.exitstatus == 0
    assert server.metric("num_requests_running") == 0


def test_an_engine_of_its_own(tiny_folder: Path, tmp_path: Path) -> None:
    """Started with the chat, gone with it."""
    dummy = ("--load-format", "dummy", "--max-num-seqs", "4", "--max-num-batched-tokens", "64")
    child = spawn(tiny_folder, *dummy, "--set", "max_tokens=4", mark="own-engine", folder=tmp_path)
    child.expect_exact("Starting ")
    child.timeout = 240
    assert answer(child, "Hello")
    child.expect_exact(">>> ")
    child.send("/exit\r")
    child.expect(pexpect.EOF)
    child.wait()
    assert child.exitstatus == 0
    assert processes_of("own-engine") == []

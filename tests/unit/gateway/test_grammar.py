"""Grammars are compiled in a process of their own: with a deadline, a limit and a memory."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from text_models import EOS, write_byte_tokenizer
from tpserve.coordinator.gateway.errors import EngineUnavailable, InvalidRequest
from tpserve.coordinator.gateway.grammar import MAX_SOURCE_BYTES, GrammarChecker
from tpserve.proto.messages import Grammar, GrammarKind

SIZE = 300


@pytest.fixture
async def checker(tmp_path: Path) -> AsyncIterator[GrammarChecker]:
    write_byte_tokenizer(tmp_path)
    made = GrammarChecker(str(tmp_path), compile_timeout_s=20)
    yield made
    await made.close()


def regex(source: str) -> Grammar:
    return Grammar(GrammarKind.REGEX, source, (EOS,))


def pid_of(checker: GrammarChecker) -> int:
    assert checker._process is not None
    return checker._process.pid


async def test_good_ones_pass_and_bad_ones_say_where(checker: GrammarChecker) -> None:
    await checker.check(regex("[a-z]+"), SIZE, param="guided_regex")
    with pytest.raises(InvalidRequest, match="guided_regex: Regex parsing error at position 3") as caught:
        await checker.check(regex("(a"), SIZE, param="guided_regex")
    assert caught.value.param == "guided_regex"
    ebnf = Grammar(GrammarKind.EBNF, "root ::= other", (EOS,))
    with pytest.raises(InvalidRequest, match='Rule "other" is not defined'):
        await checker.check(ebnf, SIZE, param="guided_grammar")
    await checker.check(regex("b"), SIZE, param="guided_regex")  # the process has survived it


async def test_what_was_seen_is_not_compiled_again(checker: GrammarChecker) -> None:
    await checker.check(regex("a"), SIZE, param="x")
    with pytest.raises(InvalidRequest):
        await checker.check(regex("("), SIZE, param="x")
    os.kill(pid_of(checker), signal.SIGSTOP)  # nobody would answer
    async with asyncio.timeout(5):
        await checker.check(regex("a"), SIZE, param="x")
        with pytest.raises(InvalidRequest):
            await checker.check(regex("("), SIZE, param="x")


async def test_a_deadline_ends_the_process_and_the_next_gets_a_new_one(
    checker: GrammarChecker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What has had a core for too long is refused, and remembered."""
    await checker.check(regex("a"), SIZE, param="x")
    first = pid_of(checker)
    checker._compile_timeout_s = 0.3
    os.kill(first, signal.SIGSTOP)
    with monkeypatch.context() as patch:
        patch.setattr("tpserve.coordinator.gateway.grammar._cpu_seconds", lambda process: time.monotonic())
        started = time.monotonic()
        with pytest.raises(InvalidRequest, match=r"not compiled within 0\.3 s; make it simpler"):
            await checker.check(regex("b"), SIZE, param="x")
        assert time.monotonic() - started < 15
    checker._compile_timeout_s = 20
    await checker.check(regex("c"), SIZE, param="x")
    assert pid_of(checker) != first
    with pytest.raises(InvalidRequest, match="not compiled within"):
        await checker.check(regex("b"), SIZE, param="x")


async def test_a_busy_host_refuses_no_grammar_for_being_slow(checker: GrammarChecker) -> None:
    """Time that others had the cores for is not the grammar's; who has waited long is told to try again, and may."""
    await checker.check(regex("a"), SIZE, param="x")
    first = pid_of(checker)
    checker._compile_timeout_s = 1
    os.kill(first, signal.SIGSTOP)
    asyncio.get_running_loop().call_later(1.5, os.kill, first, signal.SIGCONT)
    await checker.check(regex("b"), SIZE, param="x")
    assert pid_of(checker) == first
    checker._compile_timeout_s = 0.02
    os.kill(first, signal.SIGSTOP)
    with pytest.raises(EngineUnavailable, match=r"too busy to compile the grammar within 0\.12 s; try again"):
        await checker.check(regex("c"), SIZE, param="x")
    checker._compile_timeout_s = 20
    await checker.check(regex("c"), SIZE, param="x")
    assert pid_of(checker) != first


async def test_a_process_that_dies_over_a_grammar_costs_that_grammar_alone(checker: GrammarChecker) -> None:
    await checker.check(regex("a"), SIZE, param="x")
    os.kill(pid_of(checker), signal.SIGSTOP)
    waiting = asyncio.create_task(checker.check(regex("b"), SIZE, param="x"))
    await asyncio.sleep(0)
    os.kill(pid_of(checker), signal.SIGKILL)
    with pytest.raises(InvalidRequest, match="too large to be compiled"):
        await waiting
    await checker.check(regex("c"), SIZE, param="x")


async def test_one_that_gives_up_does_not_leave_its_answer_to_the_next(checker: GrammarChecker) -> None:
    await checker.check(regex("a"), SIZE, param="x")
    os.kill(pid_of(checker), signal.SIGSTOP)
    waiting = asyncio.create_task(checker.check(regex("("), SIZE, param="x"))
    await asyncio.sleep(0.05)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await checker.check(regex("b"), SIZE, param="x")


async def test_sources_have_a_size_limit(checker: GrammarChecker) -> None:
    with pytest.raises(InvalidRequest, match=f"at most {MAX_SOURCE_BYTES} are allowed"):
        await checker.check(regex("a" * (MAX_SOURCE_BYTES + 1)), SIZE, param="x")
    assert checker._process is None


async def test_without_a_tokenizer_it_says_so(tmp_path: Path) -> None:
    checker = GrammarChecker(str(tmp_path))
    with pytest.raises(
        EngineUnavailable, match=r"Structured output is not available: .*tokenizer\.json cannot be loaded"
    ):
        await checker.check(regex("a"), SIZE, param="x")
    await checker.close()


async def test_nothing_is_left_after_closing(checker: GrammarChecker) -> None:
    await checker.check(regex("a"), SIZE, param="x")
    pid = pid_of(checker)
    await checker.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)

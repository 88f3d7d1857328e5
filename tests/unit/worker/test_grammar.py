"""Matchers by slot: what a mask allows, replay, overrun, failures, and whose token goes where."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from text_models import EOS, write_byte_tokenizer
from tpserve.proto.grammar import GrammarCompiler
from tpserve.proto.messages import Grammar, GrammarKind, SamplingParams, SlotAdd, StepPlan
from tpserve.worker.arrays import Array
from tpserve.worker.grammar import ConstrainedRow, GrammarFollower, MaskBuffer, num_mask_words

NUM_SLOTS = 4
SPECIAL_TOOL = "[TOOL_CALLS]"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("text")
    write_byte_tokenizer(path, added=("yes",), special=("<secret>", SPECIAL_TOOL))
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


class Follower:
    """A follower with its buffer, step by step."""

    def __init__(self, folder: Path, vocab_size: int = 300) -> None:
        self.vocab_size = vocab_size
        self.inner = GrammarFollower(folder, vocab_size, num_threads=1)
        self.buffer = MaskBuffer(
            np.full((NUM_SLOTS, num_mask_words(vocab_size)), -1, np.int32), np.zeros(NUM_SLOTS, np.int32)
        )
        self.rows: list[ConstrainedRow] = []
        self.failures: dict[int, str] = {}

    def add(
        self, slot: int, grammar: Grammar | None, output: tuple[int, ...] = (), removed: tuple[int, ...] = ()
    ) -> None:
        added = SlotAdd(slot, SamplingParams(), (), output, grammar)
        self.inner.apply(StepPlan(1, removed_slots=removed, added_slots=(added,)))

    def masks(self, *slots: int, sampled: list[int] | None = None) -> dict[int, set[int] | None]:
        """Run the masks of one step over `slots`, after `sampled` came of the last; None where all may come."""
        if sampled is not None:
            self.inner.advance(self.rows, np.array(sampled, np.int32))
        self.rows = self.inner.rows(np.array(slots, np.int32))
        self.failures = self.inner.fill(self.rows, self.buffer)
        return {slot: self._allowed(self.buffer.mask_rows[slot]) for slot in slots}

    def _allowed(self, row: int) -> set[int] | None:
        if row < 0:
            return None
        bits = np.unpackbits(self.buffer.masks[row].view(np.uint8), bitorder="little")
        allowed: Array = np.flatnonzero(bits)
        assert (allowed < self.vocab_size).all()
        return set(allowed.tolist())


def test_a_slow_tokenizer_is_not_on_the_grammars_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a rank was replaced, grammars come at once; what it takes to read the tokenizer is part of its start."""

    is_read = threading.Event()

    class SlowCompiler(GrammarCompiler):
        def __init__(self, model_dir: Path, vocab_size: int) -> None:
            assert is_read.wait(20)
            super().__init__(model_dir, vocab_size)

    monkeypatch.setattr("tpserve.worker.grammar.GrammarCompiler", SlowCompiler)
    for warm in (False, True):
        monkeypatch.setattr("tpserve.worker.grammar.COMPILE_TIMEOUT_S", 5.0 if warm else 0.25)
        is_read.clear()
        follower = Follower(folder)
        follower.inner.warm_up()
        if warm:
            threading.Timer(0.5, is_read.set).start()
            follower.inner.wait_warm()
            assert is_read.is_set()
        follower.add(0, regex("yes"))
        follower.masks(0)
        is_read.set()
        assert ("not compiled within" in follower.failures.get(0, "")) is not warm
        follower.inner.close()


def regex(source: str) -> Grammar:
    return Grammar(GrammarKind.REGEX, source, (EOS,))


def ids(tokenizer: tokenizers.Tokenizer, *texts: str) -> set[int]:
    out = set()
    for text in texts:
        (token,) = tokenizer.encode(text, add_special_tokens=False).ids
        out.add(token)
    return out


def test_a_mask_allows_what_may_follow_and_the_end_where_it_may_end(
    folder: Path, tokenizer: tokenizers.Tokenizer
) -> None:
    follower = Follower(folder)
    follower.add(2, regex("yes+|no"))
    (y, n, o, e, s, yes) = (next(iter(ids(tokenizer, text))) for text in ("y", "n", "o", "e", "s", "yes"))
    assert follower.masks(0, 2, 3) == {0: None, 2: {y, n, yes}, 3: None}
    assert follower.masks(0, 2, 3, sampled=[7, yes, 8])[2] == {s, EOS}
    assert follower.masks(2, 0, sampled=[7, s, 8])[2] == {s, EOS}  # rows move, slots stay
    assert follower.failures == {}
    assert {o, e}.isdisjoint(follower.masks(2, sampled=[s, 0])[2] or set())


def test_special_and_unknown_tokens_never_stand_in_constrained_text(
    folder: Path, tokenizer: tokenizers.Tokenizer
) -> None:
    follower = Follower(folder)
    follower.add(0, Grammar(GrammarKind.EBNF, "root ::= [^x]*", (EOS,)))
    allowed = follower.masks(0)[0]
    assert allowed is not None
    known = tokenizer.get_vocab_size(with_added_tokens=True)
    secret = tokenizer.token_to_id("<secret>")
    assert max(allowed) < known < follower.vocab_size
    assert allowed.isdisjoint({0, 1, secret})
    assert EOS in allowed
    assert tokenizer.token_to_id(SPECIAL_TOOL) in allowed  # tool formats ask for it by its text


def test_other_tokens_may_end_the_output(folder: Path, tokenizer: tokenizers.Tokenizer) -> None:
    dot = next(iter(ids(tokenizer, ".")))
    follower = Follower(folder)
    follower.add(0, Grammar(GrammarKind.REGEX, "[a-b]+", (EOS, dot)))
    (a, b) = (next(iter(ids(tokenizer, text))) for text in "ab")
    assert follower.masks(0)[0] == {a, b}
    assert follower.masks(0, sampled=[a])[0] == {a, b, EOS, dot}


def test_replay_goes_on_where_the_output_stood(folder: Path, tokenizer: tokenizers.Tokenizer) -> None:
    output = tuple(tokenizer.encode("12-3", add_special_tokens=False).ids)
    first, second = Follower(folder), Follower(folder)
    first.add(1, regex(r"\d\d-\d\d"))
    first.masks(1)
    for token in output:
        expected = first.masks(1, sampled=[token])[1]
    second.add(3, regex(r"\d\d-\d\d"), output)
    assert second.masks(3)[3] == expected
    assert expected == ids(tokenizer, *"0123456789")


def test_an_overrun_is_free_and_no_failure(folder: Path, tokenizer: tokenizers.Tokenizer) -> None:
    (a,) = ids(tokenizer, "a")
    follower = Follower(folder)
    follower.add(0, regex("a"))
    follower.masks(0)
    assert follower.masks(0, sampled=[a]) == {0: {EOS}}
    assert follower.masks(0, sampled=[EOS]) == {0: None}
    assert follower.masks(0, sampled=[17]) == {0: None}
    assert follower.failures == {}


def test_a_slot_that_changes_hands_does_not_get_its_predecessors_token(
    folder: Path, tokenizer: tokenizers.Tokenizer
) -> None:
    (a, c) = (next(iter(ids(tokenizer, text))) for text in "ac")
    follower = Follower(folder)
    follower.add(0, regex("ab"))
    follower.masks(0)
    follower.add(0, regex("cd"), removed=(0,))  # the plan comes before the last step's tokens are known
    assert follower.masks(0, sampled=[a]) == {0: {c}}
    follower.inner.apply(StepPlan(2, removed_slots=(0,), added_slots=(SlotAdd(0, SamplingParams(), ()),)))
    assert follower.masks(0, sampled=[c]) == {0: None}
    assert follower.failures == {}


@pytest.mark.parametrize(
    ("grammar", "why"),
    [
        (regex("(a"), "does not compile"),
        (Grammar(GrammarKind.EBNF, "root ::= missing", (EOS,)), "does not compile"),
        (Grammar(GrammarKind.JSON_SCHEMA, "{", (EOS,)), "does not compile"),
        (Grammar(GrammarKind.STRUCTURAL_TAG, "[]", (EOS,)), "does not compile"),
    ],
)
def test_what_does_not_compile_fails_its_slot_alone(folder: Path, grammar: Grammar, why: str) -> None:
    follower = Follower(folder)
    follower.add(1, grammar)
    follower.add(2, regex("a"))
    masks = follower.masks(1, 2)
    assert masks[1] is None
    assert masks[2] is not None
    assert list(follower.failures) == [1]
    assert why in follower.failures[1]


def test_a_dead_end_fails_its_slot(folder: Path, tokenizer: tokenizers.Tokenizer) -> None:
    high = max(ids(tokenizer, *"az"))
    follower = Follower(folder, vocab_size=high)  # the model lacks the last letter, which alone may follow
    low, letters = sorted("az", key=lambda text: max(ids(tokenizer, text)))
    follower.add(0, regex(low + letters))
    assert follower.masks(0)[0] == ids(tokenizer, low)
    assert follower.masks(0, sampled=[max(ids(tokenizer, low))]) == {0: None}
    assert "allows no token" in follower.failures[0]


def test_tokens_that_do_not_follow_are_failures(folder: Path, tokenizer: tokenizers.Tokenizer) -> None:
    (b,) = ids(tokenizer, "b")
    follower = Follower(folder)
    follower.add(0, regex("aa"), (b,))
    follower.masks(0)
    assert f"token {b}, emitted before," in follower.failures[0]
    follower.add(1, regex("aa"))
    follower.masks(1)
    follower.masks(1, sampled=[b])
    assert f"token {b} was sampled" in follower.failures[1]


def test_a_folder_without_a_tokenizer_fails_the_slot(tmp_path: Path) -> None:
    follower = Follower(tmp_path)
    follower.add(0, regex("a"))
    assert follower.masks(0) == {0: None}
    assert "tokenizer.json cannot be loaded" in follower.failures[0]

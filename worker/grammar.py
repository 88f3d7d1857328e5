"""What the output of each slot must match: one matcher per constrained slot, and the masks of the next sampling.

Owns matchers from a slot's arrival to its leaving. Grammars are compiled in a thread that starts when a slot is added,
so the prompt's forward pass hides it. Knows nothing of logits. Every rank does the same with the same tokens, so all
ranks hold the same masks.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tpserve.proto.grammar import GrammarCompiler, GrammarError, GrammarUnavailable
from tpserve.proto.messages import Grammar, StepPlan
from tpserve.worker.arrays import Array, as_tensor

logger = logging.getLogger(__name__)

COMPILE_TIMEOUT_S = 10.0
"""The gateway has compiled the grammar before, within its own shorter deadline."""
WARM_UP_TIMEOUT_S = 60.0
"""For a rank to read its tokenizer while it starts; without it, it serves whoever brings no grammar."""


def num_mask_words(vocab_size: int) -> int:
    """Return how many 32-bit words one token mask has."""
    return -(-vocab_size // 32)


class MaskBuffer:
    """Host memory for the masks of one step, filled by `GrammarFollower.fill`.

    Parameters
    ----------
    masks : (M, ceil(vocab_size / 32)) int32
        One row for each constrained row of the step; bit i % 32 of word i / 32 allows token i.
    mask_rows : (S,) int32
        By slot, its row of `masks`; -1 where any token may come.
    """

    __slots__ = ("mask_rows", "masks", "tensor")

    def __init__(self, masks: Array, mask_rows: Array) -> None:
        self.masks = masks
        self.mask_rows = mask_rows
        self.tensor = as_tensor(masks)
        mask_rows.fill(-1)


class SlotGrammar:
    """How far one slot has come in its grammar."""

    __slots__ = ("_compiled", "_grammar", "_output_token_ids", "failure", "matcher", "over", "slot")

    def __init__(
        self,
        slot: int,
        grammar: Grammar,
        output_token_ids: Sequence[int],
        compiled: Future[tuple[GrammarCompiler, Any]],
    ) -> None:
        self.slot = slot
        self._grammar = grammar
        self._output_token_ids = output_token_ids
        self._compiled = compiled
        self.matcher: Any = None
        self.over = False
        """A stop token was sampled: what follows is overrun, which nobody gets."""
        self.failure: str | None = None
        """Why the sequence cannot go on."""

    def prepare(self) -> None:
        """Wait for the compiled grammar when it is first needed, and follow what was emitted before."""
        if self.matcher is not None or self.failure is not None:
            return
        try:
            compiler, compiled = self._compiled.result(COMPILE_TIMEOUT_S)
            self.matcher = compiler.matcher(compiled, self._grammar.stop_token_ids)
        except TimeoutError:
            self.failure = f"the grammar was not compiled within {COMPILE_TIMEOUT_S:g} s"
        except (GrammarError, GrammarUnavailable) as error:
            self.failure = f"the grammar does not compile: {error}"
        else:
            for token in self._output_token_ids:
                if not self.matcher.accept_token(token, False):
                    self.failure = f"token {token}, emitted before, does not follow the grammar"
                    return

    def accepted(self, accepted: bool, token: int) -> None:
        """Take what became of the sampled token."""
        if not accepted:
            self.failure = f"token {token} was sampled, which the grammar does not allow"
        else:
            self.over = bool(self.matcher.is_terminated())


@dataclass(frozen=True, slots=True)
class ConstrainedRow:
    """A row of the step whose slot has a grammar."""

    row: int
    state: SlotGrammar


class GrammarFollower:
    """The constrained slots of one rank.

    Parameters
    ----------
    model_dir
        Folder with the tokenizer.
    num_threads
        That compute masks.
    """

    def __init__(self, model_dir: Path, vocab_size: int, num_threads: int) -> None:
        self._model_dir = model_dir
        self._vocab_size = vocab_size
        self._num_threads = num_threads
        used = (vocab_size - 1) % 32 + 1
        self._last_word = np.uint32((1 << used) - 1).astype(np.int32)
        self._slots: dict[int, SlotGrammar] = {}
        self._compiling = ThreadPoolExecutor(1, "compile-grammars")
        self._warming: Future[GrammarCompiler] | None = None
        self._compiler: GrammarCompiler | None = None
        self._batch: Any = None

    def warm_up(self) -> None:
        """Begin to read the tokenizer, in the background: a large one takes seconds.

        A model without a tokenizer says so when a grammar comes.
        """
        if (self._model_dir / "tokenizer.json").is_file():
            self._warming = self._compiling.submit(self._ready_compiler)

    def wait_warm(self) -> None:
        """Wait for what `warm_up` began: requests that are replayed on a new rank must not spend their deadline on it.

        What fails there fails again, and is told, when a grammar comes.
        """
        if self._warming is not None:
            wait([self._warming], WARM_UP_TIMEOUT_S)

    def apply(self, plan: StepPlan) -> None:
        """Take a plan's removals and additions."""
        if self._slots:
            for slot in plan.removed_slots:
                self._slots.pop(slot, None)
        for added in plan.added_slots:
            if added.grammar is not None:
                compiled = self._compiling.submit(self._compile, added.grammar)
                self._slots[added.slot] = SlotGrammar(added.slot, added.grammar, added.output_token_ids, compiled)

    def rows(self, sample_slots: Array) -> list[ConstrainedRow]:
        """Return the rows of a step that a grammar constrains."""
        if not self._slots:
            return []
        slots = sample_slots.tolist()
        return [ConstrainedRow(row, state) for row, slot in enumerate(slots) if (state := self._slots.get(slot))]

    def advance(self, rows: Sequence[ConstrainedRow], token_ids: Array) -> None:
        """Follow what was sampled in a step.

        Parameters
        ----------
        token_ids : (R,) int32
            Of all rows of that step.
        """
        live = [item for item in rows if item.state.matcher is not None and not _is_done(item.state)]
        if not live:
            return
        tokens = [int(token_ids[item.row]) for item in live]
        accepted = self._batch.batch_accept_token([item.state.matcher for item in live], tokens, False)
        for item, ok, token in zip(live, accepted, tokens, strict=True):
            item.state.accepted(bool(ok), token)

    def fill(self, rows: Sequence[ConstrainedRow], buffer: MaskBuffer) -> dict[int, str]:
        """Compute the masks of a step, which `advance` has brought up to date.

        Returns
        -------
        dict
            By slot, why its sequence cannot go on; its row is left unmasked, and its token is void.
        """
        buffer.mask_rows.fill(-1)
        for item in rows:
            item.state.prepare()
        if self._batch is None and self._compiler is not None:
            self._batch = self._compiler.batch_matcher(self._num_threads)
        live = [item.state for item in rows if not _is_done(item.state)]
        if live:
            count = len(live)
            self._batch.batch_fill_next_token_bitmask(
                [state.matcher for state in live], buffer.tensor, list(range(count)), False
            )
            buffer.masks[:count, -1] &= self._last_word  # its other bits are of no token
            possible = np.any(buffer.masks[:count], axis=1).tolist()
            for index, state in enumerate(live):
                if possible[index]:
                    buffer.mask_rows[state.slot] = index
                else:
                    state.failure = "the grammar allows no token of this model here"
        return {item.state.slot: item.state.failure for item in rows if item.state.failure is not None}

    def close(self) -> None:
        """End the compiling thread."""
        self._compiling.shutdown(wait=False, cancel_futures=True)

    def _compile(self, grammar: Grammar) -> tuple[GrammarCompiler, Any]:
        compiler = self._ready_compiler()
        return compiler, compiler.compile(grammar)

    def _ready_compiler(self) -> GrammarCompiler:
        if self._compiler is None:
            self._compiler = GrammarCompiler(self._model_dir, self._vocab_size)
        return self._compiler


def _is_done(state: SlotGrammar) -> bool:
    return state.over or state.failure is not None

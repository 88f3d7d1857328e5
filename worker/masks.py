"""Grammar masks of one step: computed in a thread while the graph runs, or between two samplings of one step.

Owns the order of it: what was sampled is followed before the next mask. What a mask is, `worker.grammar` knows.
"""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor

from tpserve.worker.arrays import Array
from tpserve.worker.grammar import ConstrainedRow, GrammarFollower, MaskBuffer

Masks = tuple[dict[int, str], int]
"""What came of computing masks: by slot, why its sequence cannot go on; and microseconds."""


class StepMasks:
    """The masks of a rank's steps, one after another.

    Parameters
    ----------
    buffer
        Where the sampler reads them.
    """

    def __init__(self, grammars: GrammarFollower, buffer: MaskBuffer) -> None:
        self._grammars = grammars
        self._buffer = buffer
        self._thread = ThreadPoolExecutor(1, "grammar-masks")
        self._rows: list[ConstrainedRow] = []
        """Rows of the present step; once it is sampled, those that the next step's masks follow."""
        self._sampled: Array | None = None
        self._pending: Future[Masks] | None = None

    def start(self, slots: Array) -> None:
        """Begin to follow the last step's tokens and compute this step's masks.

        Parameters
        ----------
        slots : (N,) int32
            Sampled in this step, each once.
        """
        before, sampled = self._rows, self._sampled
        self._rows = rows = self._grammars.rows(slots)
        self._pending = None
        if before or rows:
            self._pending = self._thread.submit(self._compute, before, sampled, rows)

    def wait(self) -> Masks:
        """Wait for what `start` began."""
        return ({}, 0) if self._pending is None else self._pending.result()

    def took(self, token_ids: Array) -> None:
        """Note the last token that this step sampled for each slot, (N,) int32; the next step's masks follow it."""
        self._sampled = token_ids.copy() if self._rows else None

    def follow(self, alive: Array, token_ids: Array) -> Masks:
        """Follow tokens of this step and compute the masks of those sampled behind them.

        Parameters
        ----------
        alive : (A,) int64
            Rows of `start` that sample once more.
        token_ids : (N,) int32
            By row, the token sampled last.
        """
        if not self._rows:
            return {}, 0
        again = set(alive.tolist())
        rows = [item for item in self._rows if item.row in again]
        return self._compute(rows, token_ids, rows)

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=False)

    def _compute(self, before: list[ConstrainedRow], sampled: Array | None, rows: list[ConstrainedRow]) -> Masks:
        started = time.perf_counter()
        if sampled is not None:
            self._grammars.advance(before, sampled)
        failures = self._grammars.fill(rows, self._buffer)
        return failures, int((time.perf_counter() - started) * 1e6)

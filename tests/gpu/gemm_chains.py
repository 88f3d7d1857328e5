"""Calls of one kind, each with the residual stream of the one before, compared with what they gave at first."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import cupy

from gpu.collective_ranks import Ranks, widen

if TYPE_CHECKING:
    from gpu.gemm_ranks import Call, Outputs


class Chain:
    """So many calls with an output each.

    Parameters
    ----------
    steps
        What the calls write, in their order.
    """

    def __init__(self, ranks: Ranks, call: Call, steps: list[Outputs]) -> None:
        self._ranks, self._call, self.steps = ranks, call, steps

    def queue(self, step: int) -> None:
        self._call.fused(self.steps[step - 1].tensors[0] if step else None, self.steps[step])

    def keep(self) -> None:
        """Remember what the calls gave."""
        self._kept = [(outputs.total.copy(), outputs.out.copy()) for outputs in self.steps]

    def poison(self) -> None:
        for outputs in self.steps:
            outputs.poison()

    def differences(self) -> Any:
        """(steps,): elements of each output that are not those kept, counted on the device."""
        return cupy.stack(
            [(outputs.out != out).sum() for outputs, (_, out) in zip(self.steps, self._kept, strict=True)]
        )

    def describe(self, step: int) -> str:
        """Tell what is wrong with a step, after all has ended: where, and which of its terms the wrong sums lack."""
        own, call = self._ranks.owns(self._call.rows), self._call
        outputs, (total, out) = self.steps[step], self._kept[step]
        rows, columns = cupy.nonzero(outputs.out != out)
        text = f"{call.name} step {step}: {len(rows)} of out, {_range('rows', rows)}, {_range('columns', columns)}; "
        product = cupy.empty_like(total)
        call.product_of_rank(product)
        if not bool((outputs.scratch == outputs.scratch[0, 0]).all()):  # a GEMM has written it
            text += f"{int((outputs.scratch != product).sum())} of the own product in memory; "
        before = self._kept[step - 1][0] if step else call.residual_bits
        is_row, column = cupy.nonzero(outputs.total[own] != total[own])
        row = cupy.arange(call.rows)[own][is_row]
        text += f"{len(row)} of own sums, {_range('rows', row)}, {_range('columns', column)}"
        for r, c in zip(row[:3].tolist(), column[:3].tolist(), strict=True):
            values = (widen(bits[r : r + 1, c : c + 1]).item() for bits in (outputs.total, total, before, product))
            text += "; ({}, {}) is {:.4g}, was {:.4g} with residual {:.4g} and own part {:.4g}".format(r, c, *values)
        return text


def _range(what: str, indices: Any) -> str:
    return f"{what} {int(indices.min())} to {int(indices.max())}" if len(indices) else f"no {what}"


def failures(chains: list[Chain], replay: int, most: int = 2) -> list[str]:
    """Describe the first wrong step of each chain, of `most` chains, or return nothing if all is as it was."""
    texts: list[str] = []
    counts = [chain.differences() for chain in chains]
    for chain, count in zip(chains, counts, strict=True):
        wrong = cupy.nonzero(count)[0].tolist()
        if wrong and len(texts) < most:
            texts.append(f"replay {replay}: {len(wrong)} of {len(count)} steps, first {chain.describe(wrong[0])}")
    return texts

"""A norm that one product begins and the next ends: against float64 and against plain twins, alone and in a chain."""

from __future__ import annotations

from typing import Any

import cupy
import numpy as np
import pytest

from gpu.device import BF16, DeviceArray, poisoned, random_bf16, relative_error
from gpu.gemm_operands import Kernels, pack, padded, rows_of, uniform

pytestmark = pytest.mark.gpu

ALL_M = [1, 2, 7, 8, 9, 16, 17, 31, 32, 33, 64, 65, 128, 129, 200]
MOST_FOLDED = 32
EPS = 1e-3
"""Large enough to be seen."""


class Begun:
    """What `gemm_add_rms_norm` gives, with a guard row behind the last token."""

    def __init__(self, num_m: int, size: int) -> None:
        self._num_m = num_m
        self.scratch = poisoned((num_m, size), BF16)
        self._stream, self._out = poisoned((num_m + 1, size), BF16), poisoned((num_m + 1, size), BF16)
        self.squares = poisoned(((size + 63) // 64, padded(num_m)), np.float32)
        self.stream, self.out = rows_of(self._stream, num_m), rows_of(self._out, num_m)

    @property
    def outputs(self) -> tuple[DeviceArray, ...]:
        return self.scratch, self.stream, self.out, self.squares

    @property
    def guarded(self) -> bool:
        return all(bool((rows.bits[self._num_m] == 0xFFFF).all()) for rows in (self._stream, self._out))


def whole_norm(stream: DeviceArray, weight: DeviceArray) -> Any:
    rows = stream.float64()
    return rows / cupy.sqrt((rows**2).mean(1, keepdims=True) + EPS) * weight.float64()


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize(
    ("size", "num_k"), [(64, 64), (200, 768), (576, 1536), (1024, 3584), (4096, 4096), (4096, 14336), (8192, 2048)]
)
def test_both_ends(kernels: Kernels, size: int, num_k: int, bias: bool) -> None:
    """`size` channels of the residual stream, of which the next products are."""
    num_n = 192
    x, weight = random_bf16((max(ALL_M), num_k), 1.0, 1), random_bf16((size, num_k), num_k**-0.5, 2)
    residual, norm = random_bf16((max(ALL_M), size), 2.0, 3), uniform(size, 4)
    after = random_bf16((num_n, size), size**-0.5, 5)
    packed, packed_after, added, added_after = (
        pack(kernels, weight),
        pack(kernels, after),
        *map(uniform, (size, num_n), (6, 7)),
    )
    suffix = "_bias" if bias else ""
    inputs, inputs_after = ((packed, added), (packed_after, added_after)) if bias else ((packed,), (packed_after,))
    for num_m in ALL_M:
        part, rows = rows_of(x, num_m), rows_of(residual, num_m)
        product, stream, normed = (poisoned((num_m, size), BF16) for _ in range(3))
        kernels(f"gemm{suffix}")(part, *inputs, product)
        kernels("add_rms_norm")(product, rows, norm, EPS, stream, normed)
        exact = whole_norm(stream, norm)
        plain, plain_silu = poisoned((num_m, num_n), np.float32), poisoned((num_m, num_n // 2), BF16)
        kernels(f"gemm{suffix}")(normed, *inputs_after, plain)
        kernels(f"gemm_silu_mul{suffix}")(normed, *inputs_after, plain_silu)
        expected = exact @ after.float64().T + (added_after.float64() if bias else 0.0)
        for _ in range(2):
            begun = Begun(num_m, size)
            kernels(f"gemm_add_rms_norm{suffix}")(part, *inputs, rows, norm, EPS, *begun.outputs)
            case = (num_m, size, num_k)
            assert begun.guarded, case
            assert bool((begun.stream.bits == stream.bits).all()), case
            folded = num_m <= MOST_FOLDED
            assert bool((begun.scratch.bits == 0xFFFF).all()) == folded, case
            if not folded:
                assert bool((begun.out.bits == normed.bits).all()), case
            else:
                found = begun.stream.float64() * norm.float64()
                assert relative_error(begun.out.float64(), found) < 3e-3, case
                squares = begun.squares.float64()[:, :num_m].sum(0)
                sums = (begun.stream.float64() ** 2).sum(1) + EPS * size
                assert relative_error(squares, sums) < 1e-6, case
            wide, silu = poisoned((num_m + 1, num_n), np.float32), poisoned((num_m + 1, num_n // 2), BF16)
            kernels(f"gemm_normed{suffix}")(begun.out, begun.squares, *inputs_after, rows_of(wide, num_m))
            kernels(f"gemm_normed_silu_mul{suffix}")(begun.out, begun.squares, *inputs_after, rows_of(silu, num_m))
            error, plain_error = (
                relative_error(wide.float64()[:num_m], expected),
                relative_error(plain.float64(), expected),
            )
            assert error < 1.3 * plain_error + 1e-4, (*case, error, plain_error)
            assert relative_error(silu.float64()[:num_m], plain_silu.float64()) < 1.5e-2, case
            assert bool(cupy.isnan(wide.float64()[num_m]).all()), case
            assert bool((silu.bits[num_m] == 0xFFFF).all()), case


@pytest.mark.parametrize("num_m", [1, 8, 9, 16, 31, 32])
def test_padding_and_huge_rows(kernels: Kernels, num_m: int) -> None:
    """Rows of zeros, as padding has, and of values whose squares are near the end of float32."""
    size, num_k, num_n = 1024, 256, 128
    x, weight = random_bf16((num_m, num_k), 1.0, 1), random_bf16((size, num_k), num_k**-0.5, 2)
    residual, norm, after = random_bf16((num_m, size), 2.0, 3), uniform(size, 4), random_bf16((num_n, size), 0.03, 5)
    x.bits[0], residual.bits[0] = 0, 0
    if num_m > 1:
        residual.bits[1] = 0x5B00  # 3.6e16
    begun, out = Begun(num_m, size), poisoned((num_m, num_n), np.float32)
    kernels("gemm_add_rms_norm")(x, pack(kernels, weight), residual, norm, EPS, *begun.outputs)
    kernels("gemm_normed")(begun.out, begun.squares, pack(kernels, after), out)
    assert not bool(out.float64()[0].any())
    expected = whole_norm(begun.stream, norm) @ after.float64().T
    if num_m > 1:
        assert relative_error(out.float64()[1:], expected[1:]) < 6e-3


def test_rows_do_not_depend_on_their_neighbours(kernels: Kernels) -> None:
    size, num_k, num_n = 4096, 4096, 512
    x, weight = random_bf16((32, num_k), 1.0, 1), random_bf16((size, num_k), num_k**-0.5, 2)
    residual, norm, after = random_bf16((32, size), 2.0, 3), uniform(size, 4), random_bf16((num_n, size), size**-0.5, 5)
    packed, packed_after = pack(kernels, weight), pack(kernels, after)
    for counts in ((32, 17, 25, 31), (16, 9, 12)):
        whole = None
        for num_m in counts:
            begun, out = Begun(num_m, size), poisoned((num_m, num_n), np.float32)
            kernels("gemm_add_rms_norm")(rows_of(x, num_m), packed, rows_of(residual, num_m), norm, EPS, *begun.outputs)
            kernels("gemm_normed")(begun.out, begun.squares, packed_after, out)
            whole = out.bits if whole is None else whole
            assert bool((out.bits == whole[:num_m]).all()), num_m


@pytest.mark.parametrize("num_m", [1, 8, 16, 32, 64, 80])
def test_captured_layers_follow_each_other(kernels: Kernels, stream: Any, num_m: int) -> None:
    """A chain of gate_up and down in a graph, each beside the next, gives the eager chain's bits, again and again."""
    size, hidden = 3584, 1024
    gate_up, down = random_bf16((2 * size, hidden), hidden**-0.5, 1), random_bf16((hidden, size), size**-0.5, 2)
    packed, packed_down, norm = pack(kernels, gate_up), pack(kernels, down), uniform(hidden, 3)
    first = random_bf16((num_m, hidden), 1.0, 4)
    layers = [Begun(num_m, hidden) for _ in range(8)]
    acts = [poisoned((num_m, size), BF16) for _ in layers]

    def chain() -> None:
        residual = first
        for i, begun in enumerate(layers):
            if i == 0:
                kernels("gemm_silu_mul")(first, packed, acts[0])
            else:
                before = layers[i - 1]
                kernels("gemm_normed_silu_mul")(before.out, before.squares, packed, acts[i])
            kernels("gemm_add_rms_norm")(acts[i], packed_down, residual, norm, EPS, *begun.outputs)
            residual = begun.stream

    chain()
    eager = layers[-1].stream.bits.copy()
    assert bool(cupy.isfinite(layers[-1].stream.float64()).all())
    stream.begin_capture()
    chain()
    graph = stream.end_capture()
    for _ in range(20):
        for begun, act in zip(layers, acts, strict=True):
            for rows in (begun.stream, begun.out, act):
                rows.bits.fill(0xFFFF)
            begun.squares.bits.fill(0xFFFFFFFF)
        graph.launch(stream)
        assert bool((layers[-1].stream.bits == eager).all())


def test_wrong_arguments_are_named(kernels: Kernels) -> None:
    x, packed = random_bf16((2, 64)), pack(kernels, random_bf16((64, 64)))
    with pytest.raises(ValueError, match=r"squares has shape \(2, 8\), expected \(1, 8\)"):
        kernels("gemm_normed")(x, poisoned((2, 8), np.float32), packed, poisoned((2, 64), BF16))
    begun = Begun(2, 64)
    with pytest.raises(ValueError, match=r"residual has shape \(3, 64\), expected \(2, 64\)"):
        kernels("gemm_add_rms_norm")(x, packed, random_bf16((3, 64)), uniform(64, 1), EPS, *begun.outputs)

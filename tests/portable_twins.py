"""Portable operators compiled alone for this CPU, called with numpy arrays."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import tvm
from tvm import relax
from tvm.relax.frontend.nn import Tensor

from tpserve.compile.pipeline import lower
from tpserve.worker.arrays import Array, aligned_empty, as_array, as_tensor

BF16, E4M3 = np.dtype(ml_dtypes.bfloat16), np.dtype(ml_dtypes.float8_e4m3fn)
BF16_ERROR, E4M3_ERROR = 3e-3, 4e-2
"""Relative errors, over all elements, of what is stored in a type and otherwise exact."""

Spec = tuple[tuple[int | str, ...], str]
"""Shape, where a word is a size known when it is called, and type."""


class Twin:
    """A compiled function.

    Parameters
    ----------
    build
        Called with the inputs' tensors; returns the outputs'.
    inputs
        Of each parameter.
    upper_bound
        Of such sizes; memory is planned to it.
    """

    def __init__(self, build: Callable[..., tuple[Tensor, ...]], *inputs: Spec, upper_bound: int = 512) -> None:
        sizes: dict[str, Any] = {}

        def size(given: int | str) -> Any:
            return sizes.setdefault(given, tvm.tirx.Var(given, "int64")) if isinstance(given, str) else given

        params = [
            relax.Var(f"input_{i}", relax.TensorType([size(given) for given in shape], dtype))
            for i, (shape, dtype) in enumerate(inputs)
        ]
        builder = relax.BlockBuilder()
        with builder.function("step", params):
            with builder.dataflow():
                outputs = build(*(Tensor(_expr=param) for param in params))
                result = builder.emit_output(relax.Tuple([output._expr for output in outputs]))
            builder.emit_func_output(result)
        module = builder.get()
        module["step"] = (
            module["step"]
            .with_attr("tir_var_upper_bound", dict.fromkeys(sizes, upper_bound))
            .with_attr("relax.memory_plan_dynamic_func_output", True)
        )
        executable, _ = lower(module, tvm.target.Target({"kind": "llvm"}))
        self._step = relax.VirtualMachine(executable, tvm.cpu())["step"]

    def __call__(self, *arrays: Array) -> list[Array]:
        """Return the outputs; an input that is aligned and contiguous is written in place where the function writes."""
        tensors = [_tensor(array) for array in arrays]
        return [as_array(output).copy() for output in self._step(*tensors)]


def _tensor(array: Array) -> Any:
    if array.size == 0:  # numpy says of it that it is not compact
        return tvm.runtime.empty(array.shape, array.dtype.name)
    return as_tensor(array if array.ctypes.data % 64 == 0 else aligned(array))


def aligned(array: Array) -> Array:
    """Copy to where compiled code may read it."""
    out = aligned_empty(array.shape, array.dtype)
    out[...] = array
    return out


def fresh_rng() -> np.random.Generator:
    """Return a generator of another seed in each run, which is printed; pytest shows it if the test fails."""
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    return np.random.default_rng(seed)


def panels(weight: Array) -> Array:
    """(N, K) -> (N / 16, K, 16)."""
    rows, columns = weight.shape
    return aligned(weight.reshape(rows // 16, 16, columns).transpose(0, 2, 1))


def relative_error(actual: Array, expected: Array) -> float:
    """||actual - expected|| / ||expected||; NaN anywhere gives NaN."""
    difference: npt.NDArray[np.float64] = actual.astype(np.float64) - expected
    return float(np.linalg.norm(difference) / np.linalg.norm(expected))


def random_bf16(rng: np.random.Generator, shape: tuple[int, ...], scale: float = 1.0) -> Array:
    """Return normal values."""
    return (rng.standard_normal(shape, dtype=np.float32) * np.float32(scale)).astype(BF16)


def by_element(scales: Array, columns: int) -> Array:
    """(T, places) -> (T, columns) float64: the scale of each element."""
    return scales.astype(np.float64).repeat(columns // scales.shape[1], axis=1)


def check_quantized(codes: Array, scales: Array, expected: Array, group: int, slack: float = 0.0) -> None:
    """Compare e4m3 rows with what they stand for: scales to float32's last bits, codes to the bit but next to ties.

    `slack`: how far sums in float32 may be off, where a group's largest is 448. Small results of large terms are off by
    more of themselves than the largest is.
    """
    tokens, columns = expected.shape
    groups = expected.reshape(tokens, columns // group, group)
    largest = np.maximum(np.abs(groups).max(-1, keepdims=True, initial=0.0), 1e-12)
    wanted = np.broadcast_to(largest / 448, groups.shape).reshape(expected.shape)
    np.testing.assert_allclose(by_element(scales, columns), wanted, rtol=1e-5)
    exact = (groups * (448 / largest)).reshape(expected.shape)
    # Where float64 is next to a tie, float32 may be on its other side. Codes are signs and magnitudes in order.
    around = np.abs(exact) * 2e-5 + slack
    low, high = (np.clip(np.abs(exact) + each, 0, 448).astype(E4M3).view(np.uint8) for each in (-around, around))
    magnitudes = codes.view(np.uint8) & 0x7F
    assert ((low <= magnitudes) & (magnitudes <= high)).all()
    assert ((codes.view(np.uint8) >= 0x80) == np.signbit(exact))[(magnitudes > 0) & (np.abs(exact) > slack)].all()
    assert relative_error(codes.astype(np.float64) * by_element(scales, columns), expected) < E4M3_ERROR

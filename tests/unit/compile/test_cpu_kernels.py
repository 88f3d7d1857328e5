"""Every CPU kernel against a float64 numpy twin, and the promise that a row's bits do not depend on its batch."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import tvm.runtime

from tpserve.compile import native

Array = npt.NDArray[Any]
Kernels = Callable[[str], Any]

PAGE = 16


def tensor(array: Array) -> Any:
    """A tensor of its own memory, aligned as the worker's are."""
    return tvm.runtime.tensor(np.ascontiguousarray(array))


def panel16(weight: Array) -> Array:
    """(N, K) as a checkpoint has it -> (N / 16, K, 16)."""
    return np.ascontiguousarray(weight.reshape(-1, 16, weight.shape[1]).transpose(0, 2, 1))


def call(function: Any, *args: Any, out: tuple[int, ...]) -> Array:
    """Run a destination-passing kernel with one float32 output."""
    result = tensor(np.full(out, np.nan, np.float32))
    function(*(tensor(arg) if isinstance(arg, np.ndarray) else arg for arg in args), result)
    values: Array = result.numpy()
    return values


def relative_error(actual: Array, expected: Array) -> float:
    return float(np.abs(actual - expected).max() / max(np.abs(expected).max(), 1e-30))


def test_the_library_names_all_its_kernels(kernels: Kernels) -> None:
    export = re.compile(r"^TVM_FFI_DLL_EXPORT_TYPED_FUNC\((\w+),", re.MULTILINE)
    exported = {name for path in native.CPU_KERNEL_SOURCES for name in export.findall(path.read_text())}
    assert {str(name) for name in kernels("kernel_names")()} == exported - {
        "kernel_names",
        "set_num_threads",
        "shm_create",
    }


# --- gemm ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize(("num_k", "num_n"), [(1, 16), (7, 48), (64, 80), (300, 112), (576, 192)])
def test_gemm_is_right_and_independent_of_the_batch(kernels: Kernels, dtype: Any, num_k: int, num_n: int) -> None:
    rng = np.random.default_rng(num_k)
    x = rng.standard_normal((130, num_k)).astype(np.float32)
    weight = rng.standard_normal((num_n, num_k)).astype(dtype)
    bias = rng.standard_normal(num_n).astype(np.float32)
    packed = panel16(weight)
    exact = x.astype(np.float64) @ weight.astype(np.float64).T
    alone = np.concatenate([call(kernels("gemm"), x[m : m + 1], packed, out=(1, num_n)) for m in range(len(x))])
    assert relative_error(alone, exact) < 1e-5
    for num_m in (*range(1, 31), 42, 43, 56, 130):
        rows = call(kernels("gemm"), x[:num_m], packed, out=(num_m, num_n))
        np.testing.assert_array_equal(rows, alone[:num_m])
        biased = call(kernels("gemm_bias"), x[:num_m], packed, bias, out=(num_m, num_n))
        np.testing.assert_array_equal(biased, alone[:num_m] + bias)


def test_gemm_with_threads_gives_the_same_bits(kernels: Kernels) -> None:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((45, 512)).astype(np.float32)
    packed = panel16(rng.standard_normal((16 * 7, 512)).astype(np.float32))
    kernels("set_num_threads")(1)
    single = call(kernels("gemm"), x, packed, out=(45, 112))
    kernels("set_num_threads")(3)
    try:
        np.testing.assert_array_equal(call(kernels("gemm"), x, packed, out=(45, 112)), single)
    finally:
        kernels("set_num_threads")(1)


def test_gemm_of_no_rows_writes_nothing(kernels: Kernels) -> None:
    assert call(kernels("gemm"), np.zeros((0, 8), np.float32), np.zeros((1, 8, 16), np.float32), out=(0, 16)).size == 0


def test_wrong_shapes_and_types_are_named(kernels: Kernels) -> None:
    x, w = np.zeros((2, 8), np.float32), np.zeros((3, 9, 16), np.float32)
    with pytest.raises(ValueError, match=r"w has shape \(3, 9, 16\), expected \(any, 8, 16\)"):
        call(kernels("gemm"), x, w, out=(2, 48))
    with pytest.raises(ValueError, match=r"out has shape \(2, 47\), expected \(2, 48\)"):
        call(kernels("gemm"), x, w, out=(2, 47))
    with pytest.raises(TypeError, match=r"x has dtype code 2 with 64 bits, expected float32"):
        call(kernels("gemm"), x.astype(np.float64), w, out=(2, 48))
    with pytest.raises(IndexError, match=r"ids\[1\] is 5, expected 0 to 4"):
        call(kernels("embed"), np.array([0, 5], np.int32), np.zeros((5, 8), np.float32), out=(2, 8))


# --- rope and attention ----------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Paged:
    """Pages, and the plain history they must be equal to: keys and values by slot and position."""

    pages: Array
    table: Array
    keys: Array  # (num_slots, max_len, num_kv_heads, head_dim)
    values: Array

    @classmethod
    def make(cls, rng: np.random.Generator, num_slots: int, pages_per_slot: int, num_kv_heads: int, dim: int) -> Paged:
        num_pages = num_slots * pages_per_slot + 3
        table = rng.permutation(num_pages)[: num_slots * pages_per_slot].astype(np.int32)
        table = table.reshape(num_slots, pages_per_slot)
        keys, values = rng.standard_normal((2, num_slots, pages_per_slot * PAGE, num_kv_heads, dim)).astype(np.float32)
        pages = np.full((num_pages, num_kv_heads, 2, dim * PAGE), np.nan, np.float32)
        for slot in range(num_slots):
            for i, page in enumerate(table[slot]):
                rows = slice(i * PAGE, (i + 1) * PAGE)
                pages[page, :, 0] = keys[slot, rows].transpose(1, 2, 0).reshape(num_kv_heads, -1)
                pages[page, :, 1] = values[slot, rows].transpose(1, 0, 2).reshape(num_kv_heads, -1)
        return cls(pages, table, keys, values)


def rope_table(max_len: int, dim: int) -> Array:
    angles = np.outer(np.arange(max_len), 1e4 ** (-np.arange(0, dim, 2) / dim))
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def rotate(x: Array, table: Array) -> Array:
    """Hugging Face's rotate_half; x (T, heads, dim), table (T, dim)."""
    half = x.shape[-1] // 2
    cosines, sines = table[:, None, :half], table[:, None, half:]
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cosines - b * sines, b * cosines + a * sines], axis=-1)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "dim"), [(9, 3, 64), (2, 1, 16), (4, 4, 80)])
def test_rope_append(kernels: Kernels, norm: bool, num_heads: int, num_kv_heads: int, dim: int) -> None:
    rng = np.random.default_rng(dim)
    state = Paged.make(rng, 3, 4, num_kv_heads, dim)
    positions = np.array([0, 15, 16, 17, 63, 5], np.int32)
    slots = np.array([0, 0, 0, 1, 2, 1], np.int32)
    num_tokens = len(slots)
    qkv = rng.standard_normal((num_tokens, (num_heads + 2 * num_kv_heads) * dim)).astype(np.float32)
    weights = rng.standard_normal((2, dim)).astype(np.float32)
    table = rope_table(64, dim)
    pages = tensor(state.pages)
    out = tensor(np.zeros((num_tokens, num_heads, dim), np.float32))
    shared = [tensor(a) for a in (positions, slots, state.table, table)]
    if norm:
        arguments = [tensor(weights[0]), tensor(weights[1]), 1e-6]
        kernels("qk_norm_rope_append")(tensor(qkv), *arguments, *shared, pages, out)
    else:
        kernels("rope_append")(tensor(qkv), *shared, pages, out)

    heads = qkv.astype(np.float64).reshape(num_tokens, -1, dim)
    q, k, v = np.split(heads, [num_heads, num_heads + num_kv_heads], axis=1)
    if norm:
        q = q / np.sqrt((q**2).mean(-1, keepdims=True) + 1e-6) * weights[0]
        k = k / np.sqrt((k**2).mean(-1, keepdims=True) + 1e-6) * weights[1]
    q, k = rotate(q, table[positions]), rotate(k, table[positions])
    np.testing.assert_allclose(out.numpy(), q, rtol=1e-5, atol=1e-5)
    expected = state.pages.copy()
    for t in range(num_tokens):
        page, offset = state.table[slots[t], positions[t] // PAGE], positions[t] % PAGE
        expected[page, :, 0].reshape(num_kv_heads, dim, PAGE)[:, :, offset] = k[t]
        expected[page, :, 1].reshape(num_kv_heads, PAGE, dim)[:, offset] = v[t]
    np.testing.assert_allclose(pages.numpy(), expected, rtol=1e-5, atol=1e-5)  # and nothing else was written


def reference_attention(state: Paged, q: Array, positions: Array, slots: Array, scale: float, window: int) -> Array:
    num_tokens, num_heads, dim = q.shape
    group = num_heads // state.keys.shape[2]
    out = np.zeros((num_tokens, num_heads, dim))
    for t in range(num_tokens):
        begin = max(0, positions[t] - window + 1) if window else 0
        rows = slice(begin, positions[t] + 1)
        for h in range(num_heads):
            scores = state.keys[slots[t], rows, h // group].astype(np.float64) @ q[t, h] * scale
            weights = np.exp(scores - scores.max())
            out[t, h] = weights / weights.sum() @ state.values[slots[t], rows, h // group]
    return out.reshape(num_tokens, -1)


@pytest.mark.parametrize("window", [0, 1, 20])
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "dim"),
    [(9, 3, 64), (2, 1, 16), (4, 4, 80), (8, 1, 32), (5, 1, 128), (2, 2, 96)],
)
def test_attention(kernels: Kernels, window: int, num_heads: int, num_kv_heads: int, dim: int) -> None:
    rng = np.random.default_rng(dim)
    state = Paged.make(rng, 3, 5, num_kv_heads, dim)
    # A chunk of one slot, single tokens of others, positions at page borders, and the first token of all.
    positions = np.array([*range(10, 45), 0, 79, 15, 16, 31, 32, 7], np.int32)
    slots = np.array([0] * 35 + [1, 2, 1, 1, 2, 2, 1], np.int32)
    q = rng.standard_normal((len(slots), num_heads, dim)).astype(np.float32)
    scale = dim**-0.5
    pages = tensor(state.pages)

    def run(rows: Array) -> Array:
        out = (len(rows), num_heads * dim)
        attention = kernels("attention")
        return call(attention, q[rows], pages, positions[rows], slots[rows], state.table, scale, window, out=out)

    together = run(np.arange(len(slots)))
    expected = reference_attention(state, q, positions, slots, scale, window)
    np.testing.assert_allclose(together, expected, rtol=2e-5, atol=2e-6)
    alone = np.concatenate([run(np.array([t])) for t in range(len(slots))])
    np.testing.assert_array_equal(alone, together)
    shuffled = rng.permutation(len(slots))
    np.testing.assert_array_equal(run(shuffled), together[shuffled])


def test_attention_never_reads_past_the_position(kernels: Kernels) -> None:
    state = Paged.make(np.random.default_rng(3), 1, 4, 1, 32)
    q = np.ones((1, 2, 32), np.float32)
    arguments = (np.array([20], np.int32), np.zeros(1, np.int32), state.table, 0.2, 0)
    before = call(kernels("attention"), q, state.pages, *arguments, out=(1, 64))
    page = state.table[0, 1]
    state.pages[page, :, 0].reshape(1, 32, PAGE)[:, :, 5:] = np.nan
    state.pages[page, :, 1].reshape(1, PAGE, 32)[:, 5:] = np.nan
    state.pages[state.table[0, 2:]] = np.nan
    state.table[0, 2:] = -1
    np.testing.assert_array_equal(call(kernels("attention"), q, state.pages, *arguments, out=(1, 64)), before)


def test_attention_names_a_bad_page_and_a_bad_position(kernels: Kernels) -> None:
    state = Paged.make(np.random.default_rng(3), 2, 4, 1, 16)
    state.table[1, 2] = 99
    q, slots = np.ones((1, 1, 16), np.float32), np.ones(1, np.int32)
    with pytest.raises(IndexError, match=r"page_table\[1, 2\] is 99, expected 0 to 10"):
        call(kernels("attention"), q, state.pages, np.array([40], np.int32), slots, state.table, 1.0, 0, out=(1, 16))
    with pytest.raises(IndexError, match=r"positions\[0\] is 64, expected 0 to 63"):
        call(kernels("attention"), q, state.pages, np.array([64], np.int32), slots, state.table, 1.0, 0, out=(1, 16))


# --- the rest --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [16, 40, 576])
def test_silu_mul(kernels: Kernels, size: int) -> None:
    x = np.random.default_rng(size).standard_normal((5, 2 * size)).astype(np.float32) * 8
    x[0, :4] = [-200.0, 200.0, -88.0, 0.0]
    gate, up = x[:, :size].astype(np.float64), x[:, size:]
    expected = gate / (1 + np.exp(-gate)) * up
    np.testing.assert_allclose(call(kernels("silu_mul"), x, out=(5, size)), expected, rtol=2e-6, atol=1e-30)


@pytest.mark.parametrize("size", [16, 40, 576])
def test_norms(kernels: Kernels, size: int) -> None:
    rng = np.random.default_rng(size)
    x, residual = rng.standard_normal((2, 6, size)).astype(np.float32)
    weight = rng.standard_normal(size).astype(np.float32)

    def expected(y: Array) -> Array:
        wide = y.astype(np.float64)
        return np.asarray(wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-5) * weight)

    np.testing.assert_allclose(call(kernels("rms_norm"), x, weight, 1e-5, out=x.shape), expected(x), rtol=1e-5)
    total = tensor(np.zeros_like(x))
    normed = call(kernels("add_rms_norm"), x, residual, weight, 1e-5, total, out=x.shape)
    np.testing.assert_array_equal(total.numpy(), x + residual)
    np.testing.assert_allclose(normed, expected(x + residual), rtol=1e-5)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("size", [16, 40])
def test_row_copies(kernels: Kernels, dtype: Any, size: int) -> None:
    table = np.random.default_rng(size).standard_normal((9, size)).astype(dtype)
    ids = np.array([8, 0, 3, 3], np.int32)
    np.testing.assert_array_equal(call(kernels("embed"), ids, table, out=(4, size)), table[ids].astype(np.float32))
    if dtype is np.float32:
        np.testing.assert_array_equal(call(kernels("take_rows"), table, ids, out=(4, size)), table[ids])

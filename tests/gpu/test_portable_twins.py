"""The tuned kernels against their portable twins, which run on the host, on the same random inputs.

The twins themselves are compared with float64 on a CPU (`tests/unit/compile/test_portable_*.py`); the other tests here
compare the kernels with float64 too, over all sizes. What these add: both round at the same places.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tvm.relax", reason="twins are compiled here: needs TVM's compiler", exc_type=ImportError)

from tvm.relax.frontend.nn import Tensor

from gpu.device import BF16, FP8, DeviceArray, poisoned, random_bf16, random_fp8, to_device
from gpu.paged import Batch, NewTokens, Paged, attend
from portable_twins import Spec, Twin, aligned, by_element, panels, relative_error
from tpserve.compile.operators import AttentionShape, BatchInputs, GemmInput, GemmWeight, PagedKV
from tpserve.compile.portable_operators import PortableOperators
from tpserve.proto import packing
from tpserve.worker.arrays import Array

Kernels = Callable[[str], Any]

pytestmark = pytest.mark.gpu

PLAIN, QUANTIZED = PortableOperators("bfloat16"), PortableOperators("bfloat16", quantize=True)
EPS = 1e-5


def fresh_seed() -> int:
    """Return another one in each run, printed."""
    seed = secrets.randbits(31)
    print(f"seed {seed}")
    return seed


def check_codes(found: Array, twins: Array) -> None:
    """Compare e4m3 rows: where one float32 sum is next to a tie, or a division is not rounded, codes are neighbours."""
    one, two = found.view(np.uint8).astype(int), twins.view(np.uint8).astype(int)
    apart = np.abs((one & 0x7F) - (two & 0x7F))
    assert apart.max() <= 1
    assert np.count_nonzero(apart) <= 2e-3 * apart.size
    assert ((one >= 0x80) == (two >= 0x80))[(one & 0x7F) > 1].all()


@pytest.mark.parametrize("rows", [1, 33])
@pytest.mark.parametrize("hidden", [4096, 8192])
def test_norms(kernels: Kernels, rows: int, hidden: int) -> None:
    seed = fresh_seed()
    x = random_bf16((rows, hidden), 3.0, seed)
    weight = np.random.default_rng(seed).uniform(0.5, 1.5, hidden).astype(np.float32)

    def build(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        plain, quantized = (operators.rms_norm(x, weight, EPS) for operators in (PLAIN, QUANTIZED))
        assert quantized.scale is not None
        return plain.values, quantized.values, quantized.scale

    plain, codes, scales = Twin(build, (("T", hidden), "bfloat16"), ((hidden,), "float32"))(x.host(), weight)
    out, values, scale = poisoned((rows, hidden), BF16), poisoned((rows, hidden), FP8), poisoned((rows,), np.float32)
    kernels("rms_norm")(x, to_device(weight), EPS, out)
    kernels("rms_norm_fp8")(x, to_device(weight), EPS, values, scale)
    apart = np.abs(out.host().view(np.int16).astype(int) - plain.view(np.int16).astype(int))
    assert apart.max() <= 1
    assert np.count_nonzero(apart) <= 2e-3 * apart.size
    np.testing.assert_allclose(scale.host(), scales[:, 0], rtol=1e-5)
    check_codes(values.host(), codes)


@pytest.mark.parametrize("rows", [1, 32, 33, 128, 129])
def test_rows_are_quantised_in_the_same_groups(kernels: Kernels, rows: int) -> None:
    size = 1792
    x = random_bf16((rows, size), 2.0, fresh_seed())

    def build(x: Tensor) -> tuple[Tensor, ...]:
        out = QUANTIZED._quantized(x, "grouped")
        assert out.scale is not None
        return out.values, out.scale

    codes, scales = Twin(build, (("T", size), "float32"))(x.host().astype(np.float32))
    padded = -(-rows // 8) * 8
    values, given = poisoned((rows, size), FP8), poisoned((size // 256, 2, padded), np.float32)
    kernels("quantize_fp8_grouped")(x, values, given)
    check_codes(values.host(), codes)
    flat = given.host().reshape(-1)
    found = flat[:rows, None] if rows > 128 else flat.reshape(-1, padded)[:, :rows].T
    np.testing.assert_allclose(by_element(found, size), by_element(scales, size), rtol=1e-5)


@pytest.mark.parametrize("rows", [1, 33])
@pytest.mark.parametrize(("num_n", "num_k"), [(768, 4096), (4096, 512), (4096, 1792)])
def test_products(kernels: Kernels, num_n: int, num_k: int, rows: int) -> None:
    """Of 8B on one rank of eight, with a scale for each row and with groups of 128."""
    seed = fresh_seed()
    rng = np.random.default_rng(seed)
    x, weight = random_fp8((rows, num_k), seed), random_fp8((num_n, num_k), seed + 1)
    packed = poisoned(packing.packed_shape(num_n, num_k, 1), FP8)
    kernels("pack_weight")(weight, packed)
    channels = rng.uniform(0.5, 1.5, num_n).astype(np.float32)
    padded = -(-rows // 8) * 8
    by_group = np.exp(rng.uniform(-2, 2, (num_k // 128, padded))).astype(np.float32)
    for name, scales, given in (
        ("gemm_fp8", by_group[:1, :rows].T, by_group[0, :rows]),
        ("gemm_fp8_grouped", by_group[:, :rows].T, by_group.reshape(num_k // 256, 2, padded)),
    ):

        def build(x: Tensor, scales: Tensor, weight: Tensor, channels: Tensor) -> tuple[Tensor, ...]:
            return (QUANTIZED.gemm(GemmInput(x, scales), GemmWeight(weight, channels), None, num_n),)

        inputs: list[Spec] = [(("T", num_k), "float8_e4m3fn"), (("T", scales.shape[1]), "float32")]
        inputs += [((num_n // 16, num_k, 16), "float8_e4m3fn"), ((num_n,), "float32")]
        (twins,) = Twin(build, *inputs)(x.host(), np.ascontiguousarray(scales), panels(weight.host()), channels)
        out = poisoned((rows, num_n), BF16)
        kernels(name)(x, to_device(given), packed, to_device(channels), out)
        assert relative_error(out.host(), twins.astype(np.float64)) < 4e-3


def twin_pages(state: Paged) -> Array:
    """Return a state's histories in pages as the twin has them: keys (D, page_size), values (page_size, D)."""
    num_slots, max_len, num_kv, dim = state.keys.shape
    table, page = state.table.host(), state.page_size
    pages = np.zeros((state.pages.shape[0], num_kv, 2, page * dim), state.keys.dtype)
    for which, history in enumerate((state.keys.host(), state.values.host())):
        paged = history.reshape(num_slots, max_len // page, page, num_kv, dim)
        ordered = paged.transpose(0, 1, 3, 2, 4) if which else paged.transpose(0, 1, 3, 4, 2)
        pages[table, :, which] = ordered.reshape(num_slots, max_len // page, num_kv, page * dim)
    return aligned(pages)


@pytest.mark.parametrize("kv", [BF16, FP8], ids=["bf16", "fp8"])
@pytest.mark.parametrize("heads", [(4, 1, 128), (9, 3, 64)])
def test_attention(kernels: Kernels, heads: tuple[int, int, int], kv: Any) -> None:
    num_q, num_kv, dim = heads
    runs = [(0, 100, 1), (1, 0, 1), (2, 0, 40), (3, 15, 17), (4, 63, 2), (5, 16, 1)]
    batch = Batch.of(runs)
    state = Paged.make(batch.starts(len(runs)), 128, num_kv, dim, 16, kv)
    tokens = NewTokens.of_history(state, batch, random_bf16((len(batch.slots), num_q, dim), 2.0, fresh_seed()))
    found: DeviceArray = attend(kernels, state, batch, tokens).out

    def build(*given: Tensor) -> tuple[Tensor, ...]:
        qkv, positions, slots, table, rope, pages, kv_scale, empty = given
        inputs = BatchInputs(positions, slots, table, rope, empty, empty)
        shape = AttentionShape(num_q, num_kv, dim, 16, 0)
        return (PLAIN.attention(qkv, None, inputs, PagedKV(pages, kv_scale), shape).values,)

    pages = twin_pages(state)
    specs: list[Spec] = [(("T", (num_q + 2 * num_kv) * dim), "bfloat16"), (("T",), "int32"), (("T",), "int32")]
    specs += [(state.table.shape, "int32"), (tokens.rope.shape, "float32"), (pages.shape, kv.name)]
    twin = Twin(build, *specs, ((2,), "float32"), ((0,), "float32"))
    positions, slots = (np.array(values, np.int32) for values in (batch.positions, batch.slots))
    scales = np.array(state.scales or (1.0, 1.0), np.float32)
    (twins,) = twin(
        tokens.qkv.host(),
        positions,
        slots,
        state.table.host(),
        tokens.rope.host(),
        pages,
        scales,
        np.zeros(0, np.float32),
    )
    assert relative_error(found.host(), twins.astype(np.float64)) < 6e-3

"""The GEMMs against float64 products of the same rounded operands."""

from __future__ import annotations

from typing import Any

import cupy
import numpy as np
import pytest

from gpu.device import BF16, FP8, DeviceArray, poisoned, random_bf16, random_fp8, relative_error, to_device
from gpu.gemm_operands import Kernels, pack, uniform
from tpserve.proto import packing

pytestmark = pytest.mark.gpu


def llama_shapes() -> list[tuple[int, int]]:
    """(N, K) of every product of Llama-3 8B and 70B on one rank of 1, 2, 4 and 8."""
    shapes = set()
    for hidden, heads, ffn in ((4096, 32, 14336), (8192, 64, 28672)):
        for tp in (1, 2, 4, 8):
            shapes |= {
                ((heads + 16) * 128 // tp, hidden),
                (hidden, heads * 128 // tp),
                (2 * ffn // tp, hidden),
                (hidden, ffn // tp),
            }
    return sorted(shapes)


def operands(num_m: int, num_n: int, num_k: int, dtype: Any) -> tuple[DeviceArray, DeviceArray]:
    if dtype == BF16:
        return random_bf16((num_m, num_k), 1.0, num_m), random_bf16((num_n, num_k), num_k**-0.5, num_n)
    return random_fp8((num_m, num_k), num_m), random_fp8((num_n, num_k), num_n)


def check(kernels: Kernels, num_n: int, num_k: int, dtype: Any, all_m: list[int]) -> None:
    most = max(all_m)
    x, weight = operands(most, num_n, num_k, dtype)
    packed = pack(kernels, weight)
    tokens, channels, bias = uniform(most, 1), uniform(num_n, 2), uniform(num_n, 3)
    exact = x.float64() @ weight.float64().T
    if dtype == FP8:
        exact *= tokens.float64()[:, None] * channels.float64()
    for num_m in all_m:
        part = DeviceArray(x.bits[:num_m], dtype)
        for repeat in range(2):
            out = poisoned((num_m + 1, num_n), BF16)  # the last row is a guard
            inside = DeviceArray(out.bits[:num_m], BF16)
            if dtype == FP8:
                kernels("gemm_fp8")(part, DeviceArray(tokens.bits[:num_m], np.float32), packed, channels, inside)
            else:
                kernels("gemm")(part, packed, inside)
            error = relative_error(inside.float64(), exact[:num_m])
            assert error < 4e-3, (num_m, num_n, num_k, dtype, repeat, error)
            assert bool((out.bits[num_m] == 0xFFFF).all())
    num_m = all_m[0]
    part, wide = DeviceArray(x.bits[:num_m], dtype), poisoned((num_m, num_n), np.float32)
    if dtype == FP8:
        kernels("gemm_fp8_bias")(part, DeviceArray(tokens.bits[:num_m], np.float32), packed, channels, bias, wide)
    else:
        kernels("gemm_bias")(part, packed, bias, wide)
    assert relative_error(wide.float64(), exact[:num_m] + bias.float64()) < (5e-4 if num_m <= 128 else 4e-3)


@pytest.mark.parametrize("dtype", [BF16, FP8], ids=["bf16", "fp8"])
@pytest.mark.parametrize(("num_n", "num_k"), llama_shapes())
def test_llama_shapes(kernels: Kernels, num_n: int, num_k: int, dtype: Any) -> None:
    check(
        kernels,
        num_n,
        num_k,
        dtype,
        [1, 8, 11, 32, 64, 72, 96, 97, 100, 128, 144, 160, 200, 224, 256, 288, 300, 320, 384, 448],
    )


@pytest.mark.parametrize("dtype", [BF16, FP8], ids=["bf16", "fp8"])
@pytest.mark.parametrize(
    ("num_n", "num_k"), [(64, 128), (960, 576), (576, 1536), (16032, 512), (1000, 1040), (200, 64)]
)
def test_odd_shapes(kernels: Kernels, num_n: int, num_k: int, dtype: Any) -> None:
    check(
        kernels,
        num_n,
        num_k,
        dtype,
        [1, 2, 7, 9, 16, 17, 31, 33, 63, 65, 128, 129, 192, 193, 257, 384, 512, 1000, 2048],
    )


def grouped_shapes() -> list[tuple[int, int]]:
    """(N, K) of the products of Llama-3 that take what attention and SiLU quantise, and small ones."""
    shapes = {(64, 256), (200, 768), (1000, 1280)}
    for hidden, heads, ffn in ((4096, 32, 14336), (8192, 64, 28672)):
        shapes |= {(hidden, columns // tp) for columns in (heads * 128, ffn) for tp in (1, 2, 4, 8)}
    return sorted(shapes)


@pytest.mark.parametrize(("num_n", "num_k"), grouped_shapes())
def test_grouped_scales(kernels: Kernels, num_n: int, num_k: int) -> None:
    """Scales that differ by two orders of magnitude from group to group and from token to token."""
    all_m = [1, 3, 8, 9, 16, 17, 32, 33, 64, 65, 100, 128, 129, 200, 512]
    x, weight = operands(max(all_m), num_n, num_k, FP8)
    packed, channels, bias = pack(kernels, weight), uniform(num_n, 2), uniform(num_n, 3)
    for num_m in all_m:
        padded = -(-num_m // 8) * 8
        rng = cupy.random.RandomState(num_m)
        given = (10.0 ** rng.uniform(-1, 1, (num_k // 256, 2, padded))).astype(cupy.float32)
        if num_m > 128:  # of rows: nothing else may be read
            by_element = cupy.broadcast_to(given[0, 0, :num_m, None].astype(cupy.float64), (num_m, num_k)).copy()
            given.reshape(-1)[padded:] = cupy.nan
        else:
            by_group = given.reshape(num_k // 128, padded)[:, :num_m].T.astype(cupy.float64)
            by_element = cupy.repeat(by_group, 128, axis=1)
            given[:, :, num_m:] = cupy.nan  # of tokens that are not there
        part, group_scales = DeviceArray(x.bits[:num_m], FP8), DeviceArray(given, np.float32)
        exact = (part.float64() * by_element) @ weight.float64().T * channels.float64()
        for repeat in range(2):
            out = poisoned((num_m + 1, num_n), BF16)  # the last row is a guard
            inside = DeviceArray(out.bits[:num_m], BF16)
            kernels("gemm_fp8_grouped")(part, group_scales, packed, channels, inside)
            error = relative_error(inside.float64(), exact)
            assert error < 4e-3, (num_m, num_n, num_k, repeat, error)
            assert bool((out.bits[num_m] == 0xFFFF).all())
        wide = poisoned((num_m, num_n), np.float32)
        kernels("gemm_fp8_grouped_bias")(part, group_scales, packed, channels, bias, wide)
        assert relative_error(wide.float64(), exact + bias.float64()) < (5e-4 if num_m <= 128 else 4e-3)


@pytest.mark.parametrize("dtype", [BF16, FP8], ids=["bf16", "fp8"])
def test_device_packs_as_the_host(kernels: Kernels, dtype: Any) -> None:
    for rows, columns in ((64, 128), (200, 1040), (960, 576), (1536, 4096)):
        weight = operands(1, rows, columns, dtype)[1]
        packed = packing.pack(weight.host())
        assert (pack(kernels, weight).host().view(np.uint8) == packed.view(np.uint8)).all()
        assert (packing.unpack(packed, rows, columns).view(np.uint8) == weight.host().view(np.uint8)).all()


def test_rows_do_not_depend_on_their_neighbours(kernels: Kernels) -> None:
    x, weight = operands(64, 6144, 4096, BF16)
    packed = pack(kernels, weight)
    whole = poisoned((64, 6144), BF16)
    kernels("gemm")(x, packed, whole)
    for num_m in (33, 50, 63):
        part = poisoned((num_m, 6144), BF16)
        kernels("gemm")(DeviceArray(x.bits[:num_m], BF16), packed, part)
        assert bool((part.bits == whole.bits[:num_m]).all())


def test_captured_products_follow_each_other(kernels: Kernels, stream: Any) -> None:
    """A chain of dependent products in a graph gives the eager chain's bits, replay after replay."""
    rng = np.random.default_rng(0)
    weights = [pack(kernels, to_device((rng.standard_normal((1024, 1024)) / 32).astype(BF16))) for _ in range(4)]
    x = random_bf16((16, 1024))
    buffers = [poisoned((16, 1024), BF16) for _ in range(12)]

    def chain() -> None:
        source = x
        for i, buffer in enumerate(buffers):
            kernels("gemm")(source, weights[i % 4], buffer)
            source = buffer

    chain()
    eager = buffers[-1].host().view(np.uint16).copy()
    stream.begin_capture()
    chain()
    graph = stream.end_capture()
    for _ in range(20):
        buffers[-1].bits.fill(0xFFFF)
        graph.launch(stream)
        assert (buffers[-1].host().view(np.uint16) == eager).all()


def test_products_with_tiles_of_several_sizes_follow_each_other(kernels: Kernels, stream: Any) -> None:
    """Two thousand of a graph, whose partial sums take turns in the same memory, have the bits of each alone."""
    rounds = 250
    calls = []
    for num_n, num_k, dtype in ((16384, 1024, FP8), (1024, 512, BF16)):
        x, weight = operands(66, num_n, num_k, dtype)
        packed, bias, channels = pack(kernels, weight), uniform(num_n, 3), uniform(num_n, 2)
        for num_m in (1, 4, 40, 66):
            part = DeviceArray(x.bits[:num_m], dtype)
            padded = -(-num_m // 8) * 8
            groups = DeviceArray(
                uniform(num_k // 128 * padded, num_m).bits.reshape(num_k // 256, 2, padded), np.float32
            )
            fp8 = dtype == FP8
            name, given = (
                ("gemm_fp8_grouped", (part, groups, packed, channels)) if fp8 else ("gemm_bias", (part, packed, bias))
            )
            alone, outs = poisoned((num_m, num_n), BF16), poisoned((rounds, num_m, num_n), BF16)
            kernels(name)(*given, alone)
            stream.synchronize()
            calls.append((name, given, alone, outs, [DeviceArray(bits, BF16) for bits in outs.bits]))
    stream.begin_capture()
    for i in range(rounds):
        for name, given, _, _, each in calls:
            kernels(name)(*given, each[i])
    graph = stream.end_capture()
    for replay in range(10):
        for _, _, _, outs, _ in calls:
            outs.bits.fill(0xFFFF)
        graph.launch(stream)
        wrong = {(name, *alone.shape): int((outs.bits != alone.bits).sum()) for name, _, alone, outs, _ in calls}
        assert not any(wrong.values()), f"replay {replay}: {wrong}"


def test_wrong_arguments_are_named(kernels: Kernels) -> None:
    x, weight = operands(2, 64, 128, BF16)
    with pytest.raises(ValueError, match=r"weights has shape \(1, 64, 128\), expected \(2, 64, 128\)"):
        kernels("gemm")(x, pack(kernels, weight), poisoned((2, 128), BF16))

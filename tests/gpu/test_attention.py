"""Attention against float64, over shuffled pages full of NaN where nobody wrote: bfloat16 and e4m3.

New tokens come with a rotation that turns nothing, so that queries, keys and values are known to the bit;
test_new_tokens.py has those that turn. Where a step only decodes, `attend` runs both kinds of plan and compares bits.
"""

from __future__ import annotations

from typing import Any

import cupy
import numpy as np
import pytest

from gpu.device import BF16, FP8, DeviceArray, poisoned, random_bf16, relative_error, to_device
from gpu.paged import Attended, Batch, Kernels, NewTokens, Paged, attend, reference, run
from tpserve.compile.kernels.cuda import sizes

pytestmark = pytest.mark.gpu

both = pytest.mark.parametrize("kv", [BF16, FP8], ids=["bf16", "fp8"])
HEADS = [
    (32, 8, 128), (8, 2, 128), (16, 2, 128), (8, 1, 128), (4, 1, 128), (16, 1, 128), (5, 5, 128),
    (9, 3, 64), (14, 2, 64), (4, 4, 64), (8, 2, 64), (8, 1, 64),
]  # fmt: skip


def has_groups(num_heads: int, num_kv_heads: int, dim: int) -> bool:
    """Whether output has grouped scales: 128 values of heads with the same keys."""
    return num_heads // num_kv_heads * dim % 128 == 0 and num_heads * dim % 256 == 0


def rounded_up(batch: Batch) -> int:
    return -(-(max(batch.positions) + 1) // 64) * 64


def attend_history(
    kernels: Kernels, state: Paged, batch: Batch, q: DeviceArray, window: int = 0, *, grouped: bool = False
) -> Attended:
    """Attend to tokens that the histories have; see that the pages hold them afterwards, and nothing else."""
    result = attend(kernels, state, batch, NewTokens.of_history(state, batch, q), window, grouped=grouped)
    before = state.pages.bits.copy()
    for slot, end in enumerate(batch.ends(len(state.table.bits))):
        if end:
            state.fill(slot, end)
    assert bool((state.pages.bits == result.pages).all())
    state.pages.bits[...] = before
    return result


def check(kernels: Kernels, heads: tuple[int, int, int], batch: Batch, num_slots: int, **options: Any) -> None:
    num_heads, num_kv_heads, dim = heads
    window, page_size = options.get("window", 0), options.get("page_size", 16)
    starts = batch.starts(num_slots)
    state = Paged.make(starts, rounded_up(batch), num_kv_heads, dim, page_size, options.get("kv", BF16))
    q = random_bf16((len(batch.slots), num_heads, dim), 2.0, 5)
    out = attend_history(kernels, state, batch, q, window).out.float64()
    expected = reference(state, q.float64(), batch.positions, batch.slots, dim**-0.5, window)
    assert relative_error(out, expected) < 6e-3
    worst = abs(out - expected).reshape(len(batch.slots), -1).max(-1)
    assert float(worst.max()) < 0.05, cupy.asnumpy(worst)


@both
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("page_size", [16, 64])
def test_decode(kernels: Kernels, heads: tuple[int, int, int], page_size: int, kv: Any) -> None:
    starts = [0, 1, 14, 15, 16, 17, 63, 64, 65, 255, 256, 257, 510, 511, 512, 513, 700, 1023, 1024, 1500]
    runs = [(slot, start, 1) for slot, start in enumerate(starts)]
    padded = [(-1, 0, 1), *runs[8:], (-1, 0, 2), *runs[:8], (-1, 0, 3)]
    check(kernels, heads, Batch.of(padded), len(starts), page_size=page_size, kv=kv)


@both
@pytest.mark.parametrize("batch", [1, 8, 64, 250])
@pytest.mark.parametrize("heads", [(16, 2, 128), (32, 8, 128), (8, 2, 64)])
def test_decodes_of_many_slots(kernels: Kernels, heads: tuple[int, int, int], batch: int, kv: Any) -> None:
    """Up to several items for each block, of one and of several chunks."""
    starts = np.random.default_rng(batch).integers(0, 700, batch).tolist()
    check(kernels, heads, Batch.of([(slot, start, 1) for slot, start in enumerate(starts)]), batch, kv=kv)


@both
@pytest.mark.parametrize("heads", HEADS)
def test_mixed(kernels: Kernels, heads: tuple[int, int, int], kv: Any) -> None:
    runs = [(0, 300, 1), (1, 0, 1), (2, 0, 200), (3, 90, 70), (4, 513, 2), (-1, 0, 100), (5, 31, 33), (6, 1000, 1)]
    check(kernels, heads, Batch.of(runs), 7, kv=kv)


@both
@pytest.mark.parametrize("window", [1, 20, 300])
@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize("most", [1, 200])
def test_window(kernels: Kernels, window: int, page_size: int, most: int, kv: Any) -> None:
    runs = [(0, 300, 1), (1, 0, 1), (2, 0, 200), (3, 600, 70), (4, 1513, 2), (5, 512, 1), (6, 2047, 1)]
    batch = Batch.of([(slot, start, min(count, most)) for slot, start, count in runs])
    check(kernels, (8, 2, 128), batch, 7, window=window, page_size=page_size, kv=kv)


@both
@pytest.mark.parametrize("last", [1, 40])
def test_long_contexts(kernels: Kernels, last: int, kv: Any) -> None:
    check(kernels, (8, 2, 128), Batch.of([(0, 8191, 1), (1, 20000, 1), (2, 8192, 1), (3, 9000, last)]), 4, kv=kv)


@both
@pytest.mark.parametrize("window", [0, 300])
@pytest.mark.parametrize("heads", [(8, 1, 128), (16, 2, 128), (32, 8, 128), (16, 1, 128), (9, 3, 64)])
def test_drafts_behind_contexts(kernels: Kernels, heads: tuple[int, int, int], window: int, kv: Any) -> None:
    """Runs of a few tokens, which attend in pieces where a context is long, beside decodes and a prompt."""
    starts = [0, 5, 100, 505, 509, 511, 512, 700, 1022, 1500, 2043, 2047, 2049, 3000, 9000]
    runs = [(slot, start, 2 + slot % 7) for slot, start in enumerate(starts)]
    runs += [(len(starts), 900, 1), (-1, 0, 3), (len(starts) + 1, 800, 100), (len(starts) + 2, 600, 40)]
    check(kernels, heads, Batch.of(runs), len(starts) + 3, window=window, kv=kv)


@both
def test_a_whole_prompt(kernels: Kernels, kv: Any) -> None:
    check(kernels, (8, 2, 128), Batch.of([(0, 0, 2048)]), 1, kv=kv)


@both
def test_only_padding(kernels: Kernels, kv: Any) -> None:
    state = Paged.make([0, 0], 64, 2, 128, 16, kv)
    result = attend_history(kernels, state, Batch([0] * 8, [-1] * 8), random_bf16((8, 8, 128)))
    assert not bool(result.out.bits.any())


@both
def test_an_append_is_seen_by_its_own_token(kernels: Kernels, kv: Any) -> None:
    """The fetch of a page waits for what the same warp wrote there: many times, over pages that held NaN."""
    starts = [0, 5, 63, 64, 100, 511, 512, 900] * 8
    batch = Batch.of([(slot, start, 1) for slot, start in enumerate(starts)])
    state = Paged.make(batch.starts(64), rounded_up(batch), 8, 128, 16, kv)
    tokens = NewTokens.of_history(state, batch, random_bf16((64, 32, 128), 2.0, 5))
    first = run(kernels, state, batch, tokens)
    for _ in range(100):
        assert run(kernels, state, batch, tokens, decode_only=True).same_as(first)


MIXED_STARTS = [
    [700, 64, 63, 600, 900, 1000],
    [64, 1000, 512, 65, 1100, 130],
    [1023, 500, 20, 0, 600, 640],
]


@both
@pytest.mark.parametrize("window", [0, 100])
def test_captured_layers_of_a_mixed_step_take_new_positions_once_they_are_appended(
    kernels: Kernels, stream: Any, window: int, kv: Any
) -> None:
    """They begin to fetch while the kernel that appends still runs; pages hold NaN there, others each time."""
    counts = [1, 70, 1, 33, 6, 150]
    num_slots, num_tokens, heads = len(counts), sum(counts), (32, 8, 128)
    state = Paged.make([0] * num_slots, 1280, 8, 128, 16, kv)
    q = random_bf16((num_tokens, 32, 128), 2.0, 5)
    where = [poisoned((num_tokens,), np.int32) for _ in range(2)]  # positions and slots, of padding at first
    tokens = NewTokens.of_history(state, Batch([0] * num_tokens, [-1] * num_tokens), q)
    plan = poisoned((sizes.attention_plan_size(num_tokens, num_slots, decode_only=False),), np.int32)
    workspace = poisoned((sizes.attention_workspace_size(num_tokens, num_slots, *heads),), np.float32)
    scales = [] if state.scales is None else [to_device(np.array(state.scales, np.float32))]
    layers = [(poisoned(state.pages.shape, kv), poisoned((num_tokens, 4096), BF16)) for _ in range(4)]
    turned = poisoned((num_tokens, 4096), BF16)
    kernel = kernels("attention" if kv == BF16 else "attention_fp8")

    def step() -> None:
        kernels("attention_plan")(*where, num_slots, 32, 8, window, plan)
        for pages, out in layers:
            rest = (plan, 128**-0.5, window, workspace, turned, out)
            kernel(tokens.qkv, *scales, pages, *where, state.table, tokens.rope, *rest)

    step()
    stream.begin_capture()
    step()
    graph = stream.end_capture()
    rng = np.random.default_rng(8)
    for starts in MIXED_STARTS:
        batch = Batch.of([(slot, start, count) for slot, (start, count) in enumerate(zip(starts, counts, strict=True))])
        table = rng.permutation(len(state.pages.bits))[: state.table.bits.size].reshape(num_slots, -1)
        state.table.bits[...] = cupy.asarray(table.astype(np.int32))
        for slot, start in enumerate(starts):
            state.fill(slot, start)
        expected = attend_history(kernels, state, batch, q, window).out
        right = reference(state, q.float64(), batch.positions, batch.slots, 128**-0.5, window)
        assert relative_error(expected.float64(), right) < 6e-3
        tokens.qkv.bits[...] = NewTokens.of_history(state, batch, q).qkv.bits
        for array, values in zip(where, (batch.positions, batch.slots), strict=True):
            array.bits[...] = cupy.asarray(np.array(values, np.int32)).view(array.bits.dtype)
        for _ in range(10):
            for pages, out in layers:
                pages.bits[...] = state.pages.bits
                out.bits.fill(0xFFFF)
            graph.launch(stream)
            for _, out in layers:
                assert bool((out.bits == expected.bits).all())


def widened(result: Attended) -> tuple[Any, Any]:
    """Return what e4m3 output with its scales stands for, in float64, and the scales: of 128 values, or rows."""
    num_tokens, num_groups = len(result.out.bits), result.out.shape[1] // 128
    assert result.scales is not None
    by_group = result.scales.float64().reshape(num_groups, -1)[:, :num_tokens].T
    if num_tokens > 128:
        by_group = by_group[:, :1]
    values = result.out.float64().reshape(num_tokens, num_groups, 128) * by_group[:, :, None]
    return values.reshape(num_tokens, -1), by_group


GROUPED = [
    pytest.param(
        [(-1, 0, 1), *((i, start, 1) for i, start in enumerate([0, 15, 63, 511, 512, 700, 1500]))], id="decode"
    ),
    pytest.param([(slot, 4 * slot, 1) for slot in range(160)], id="decode rows"),
    pytest.param([(0, 300, 1), (1, 0, 1), (2, 40, 60), (-1, 0, 9), (3, 1000, 2), (4, 9000, 1)], id="mixed"),
    pytest.param([(0, 300, 1), (1, 0, 200), (-1, 0, 9)], id="rows"),
]


@both
@pytest.mark.parametrize("heads", [heads for heads in [*HEADS, (32, 8, 64)] if has_groups(*heads)])
@pytest.mark.parametrize("runs", GROUPED)
def test_e4m3_output(kernels: Kernels, heads: tuple[int, int, int], runs: list[tuple[int, int, int]], kv: Any) -> None:
    num_heads, num_kv_heads, dim = heads
    batch = Batch.of(runs)
    num_slots = 1 + max(batch.slots)
    state = Paged.make(batch.starts(num_slots), rounded_up(batch), num_kv_heads, dim, 16, kv)
    q = random_bf16((len(batch.slots), num_heads, dim), 2.0, 5)
    found, scales = widened(attend_history(kernels, state, batch, q, grouped=True))
    expected = reference(state, q.float64(), batch.positions, batch.slots, dim**-0.5, 0)
    assert relative_error(found, expected) < 4e-2
    size = 128 if len(batch.slots) <= 128 else num_heads * dim
    largest = abs(expected).reshape(len(batch.slots), -1, size).max(-1)
    present = cupy.asarray(np.array(batch.slots) >= 0)
    assert float(abs(scales * 448 / largest - 1)[present].max()) < 0.02
    assert not bool(found[~present].any())


@pytest.mark.parametrize("dim", [64, 128])
def test_every_e4m3_code_is_read_exactly(kernels: Kernels, dim: int) -> None:
    """A token that sees itself alone gets its value, which bfloat16 holds."""
    num_slots = 256 // dim
    state = Paged.make([0] * num_slots, 16, 1, dim, 16, FP8, (1.0, 0.5))
    codes = np.arange(256, dtype=np.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0  # NaN
    state.values.bits[:, 0, 0] = cupy.asarray(codes.reshape(num_slots, dim))
    q = random_bf16((num_slots, 4, dim), 2.0, 5)
    result = attend_history(kernels, state, Batch([0] * num_slots, list(range(num_slots))), q)
    expected = codes.view(FP8).astype(np.float64).reshape(num_slots, 1, dim) * 0.5
    found = cupy.asnumpy(result.out.float64()).reshape(num_slots, 4, dim)
    np.testing.assert_array_equal(found, np.broadcast_to(expected, found.shape))


def test_queries_beyond_float16_are_clipped(kernels: Kernels) -> None:
    """With e4m3 pages products are in float16: a query larger than it holds takes its largest score, not NaN."""
    state = Paged.make([39], 64, 1, 128, 16, FP8)
    q = random_bf16((1, 8, 128), 1e6, 5)
    result = attend_history(kernels, state, Batch([39], [0]), q)
    expected = reference(state, q.float64().clip(-65504, 65504), [39], [0], 128**-0.5, 0)
    assert relative_error(result.out.float64(), expected) < 6e-3


@both
@pytest.mark.parametrize("num_kv_heads", [2, 8])
def test_a_token_does_not_depend_on_its_batch(kernels: Kernels, num_kv_heads: int, kv: Any) -> None:
    """Of eight KV heads the batch has two blocks of four warps a multiprocessor, the token alone one of eight."""
    starts = np.random.default_rng(3).integers(0, 1100, 64).tolist()
    state = Paged.make(starts, 1152, num_kv_heads, 128, 16, kv)
    q = random_bf16((64, num_kv_heads * 8, 128), 2.0, 6)
    whole = attend_history(kernels, state, Batch(starts, list(range(64))), q)
    for t in (0, 7, 63):
        alone = attend_history(kernels, state, Batch([starts[t]], [t]), DeviceArray(q.bits[t : t + 1], BF16))
        assert bool((alone.out.bits[0] == whole.out.bits[t]).all())


def test_pages_and_plans_that_do_not_fit_are_refused(kernels: Kernels) -> None:
    workspace = poisoned((sizes.attention_workspace_size(1, 1, 4, 1, 128),), np.float32)
    wide, narrow = (Paged.make([1], 16, 1, 128, 16, kv) for kv in (BF16, FP8))
    scales, one = (to_device(np.ones(count, np.float32)) for count in (2, 1))
    zero, rope = to_device(np.zeros(1, np.int32)), to_device(np.ones((16, 128), np.float32))
    qkv, q, out = random_bf16((1, 768)), poisoned((1, 512), BF16), poisoned((1, 512), BF16)

    def rest(state: Paged, num_words: int) -> tuple[Any, ...]:
        plan = poisoned((num_words,), np.int32)
        return (state.pages, zero, zero, state.table, rope, plan, 0.1, 0, workspace, q, out)

    any_step, decodes = (sizes.attention_plan_size(1, 1, decode_only) for decode_only in (False, True))
    for words in (any_step, decodes):
        with pytest.raises(TypeError, match="kv_layer has dtype code 10 with 8 bits, expected bfloat16"):
            kernels("attention")(qkv, *rest(narrow, words))
        with pytest.raises(TypeError, match="kv_layer has dtype code 4 with 16 bits, expected float8_e4m3fn"):
            kernels("attention_fp8")(qkv, scales, *rest(wide, words))
        with pytest.raises(ValueError, match=r"kv_scale has shape \(1\), expected \(2\)"):
            kernels("attention_fp8")(qkv, one, *rest(narrow, words))
    said = rf"plan has 17 words, expected {any_step} or, of one token a slot, {decodes}: .* 1 tokens of 1 slots"
    with pytest.raises(ValueError, match=said):
        kernels("attention")(qkv, *rest(wide, 17))
    with pytest.raises(ValueError, match=said):
        kernels("attention_plan")(zero, zero, 1, 4, 1, 0, poisoned((17,), np.int32))
    with pytest.raises(ValueError, match="17 query heads over 1 KV heads: expected groups of 1 to 16"):
        kernels("attention_plan")(zero, zero, 1, 17, 1, 0, poisoned((decodes,), np.int32))

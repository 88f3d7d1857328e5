"""The device's sampler draws the reference's tokens for the same logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cupy
import numpy as np
import pytest

from gpu.device import BF16, DeviceArray, poisoned, to_device
from tpserve.proto.messages import SamplingParams
from tpserve.worker.reference_sampler import sample_reference

Kernels = Callable[[str], Any]

pytestmark = pytest.mark.gpu

MAX_TOP = 20


def run(
    kernels: Kernels,
    logits: DeviceArray,
    vocab_size: int,
    rows: list[tuple[int, int]],
    params: list[SamplingParams],
    counts: np.ndarray[Any, Any] | None = None,
    masks: np.ndarray[Any, Any] | None = None,
    mask_rows: list[int] | None = None,
) -> tuple[Any, ...]:
    """Sample rows of (slot, position); parameters by slot, and its row of `masks`, -1 for none."""
    num_slots = len(params)
    max_bias = max(1, *(len(p.logit_bias) for p in params))
    bias_ids, bias_values = np.zeros((num_slots, max_bias), np.int32), np.zeros((num_slots, max_bias), np.float32)
    for slot, p in enumerate(params):
        for i, (token, value) in enumerate(p.logit_bias):
            bias_ids[slot, i], bias_values[slot, i] = token, value

    def column(values: list[Any], dtype: Any) -> DeviceArray:
        return to_device(np.array(values, dtype))

    output_counts = to_device(np.zeros((0, vocab_size), np.int32) if counts is None else counts)
    outputs = [
        poisoned((len(rows),), np.int32),
        poisoned((len(rows),), np.float32),
        poisoned((len(rows), MAX_TOP), np.int32),
        poisoned((len(rows), MAX_TOP), np.float32),
    ]
    arrived = to_device(np.zeros(len(rows), np.int32))
    kernels("sample")(
        logits,
        poisoned((len(rows), 8), np.int64),
        False,
        arrived,
        vocab_size,
        column([slot for slot, _ in rows], np.int32),
        column([position for _, position in rows], np.int32),
        column([p.temperature for p in params], np.float32),
        column([p.top_p for p in params], np.float32),
        column([p.top_k or 0 for p in params], np.int32),
        column([p.min_p for p in params], np.float32),
        column([p.frequency_penalty for p in params], np.float32),
        column([p.presence_penalty for p in params], np.float32),
        to_device(np.array([p.seed for p in params], np.uint64).astype(np.int64)),
        to_device(bias_ids),
        to_device(bias_values),
        column([len(p.logit_bias) for p in params], np.int32),
        output_counts,
        column([-1 if p.num_logprobs is None else p.num_logprobs for p in params], np.int32),
        to_device(np.zeros((1, -(-vocab_size // 32)), np.int32) if masks is None else masks),
        column([-1] * num_slots if mask_rows is None else mask_rows, np.int32),
        poisoned(logits.shape, np.float32),
        *outputs,
    )
    assert not arrived.host().any()
    return (*(output.host() for output in outputs), output_counts.host())


RULES: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.6, "top_p": 0.9},
    {"temperature": 1.3, "top_k": 50},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.02},
    {"temperature": 1.5, "min_p": 0.1},
    {"temperature": 2.0, "top_p": 0.2},
    {"temperature": 0.7, "top_p": 0.8, "frequency_penalty": 0.5, "presence_penalty": 0.3},
    {"temperature": 0.0, "frequency_penalty": 1.5},
    {"temperature": 1.0, "top_k": 3, "logit_bias": ((5, 8.0), (7, -100.0), (5, 1.0))},
]


def random_masks(rng: np.random.Generator, num_slots: int, vocab_size: int) -> tuple[Any, list[int]]:
    """Masks for every second slot, from few tokens to nearly all; bits past the vocabulary too."""
    masked = range(0, num_slots, 2)
    bits = rng.random((len(masked), -(-vocab_size // 32) * 32)) < rng.random((len(masked), 1)) ** 3
    bits[range(len(masked)), rng.integers(0, vocab_size, len(masked))] = True
    masks = np.packbits(bits, axis=1, bitorder="little").view(np.int32)
    return masks, [slot // 2 if slot in masked else -1 for slot in range(num_slots)]


@pytest.mark.parametrize("vocab_size", [1, 33, 1000, 49152, 128256])
@pytest.mark.parametrize("dtype", [np.dtype(np.float32), BF16], ids=["float32", "bf16"])
def test_draws_the_reference_token(kernels: Kernels, vocab_size: int, dtype: Any) -> None:
    rng = np.random.default_rng(vocab_size)
    width = -(-vocab_size // 64) * 64
    rules = [r for r in RULES if vocab_size > 8 or "logit_bias" not in r]
    params = [
        SamplingParams(**rule, seed=int(rng.integers(0, 2**63)) * 2 + 1, num_logprobs=(None, 0, 5, 20)[i % 4])
        for i, rule in enumerate(rules)
    ]
    differing = drawn = 0
    for spread in (1.0, 4.0):
        logits = (rng.standard_normal((len(params) + 1, width)) * spread).astype(np.float32).astype(dtype)
        if spread == 4.0:  # many ties
            logits = (np.round(logits.astype(np.float32) * 2) / 2).astype(dtype)
        logits[:, vocab_size:] = np.nan  # is not read
        counts = rng.integers(0, 3, (len(params), vocab_size)).astype(np.int32)
        order = rng.permutation(len(params))
        rows = [(int(slot), int(rng.integers(1, 4000))) for slot in order]
        rows.insert(3, (-1, 0))
        masks, mask_rows = random_masks(rng, len(params), vocab_size)
        ids, logprobs, top_ids, top_logprobs, after = run(
            kernels, to_device(logits[: len(rows)]), vocab_size, rows, params, counts, masks, mask_rows
        )
        expected_counts = counts.copy()
        for r, (slot, position) in enumerate(rows):
            if slot < 0:
                assert ids[r] == -1  # as it was
                continue
            row = logits[r, :vocab_size].astype(np.float32)
            mask = None if mask_rows[slot] < 0 else masks[mask_rows[slot]]
            expected = sample_reference(row, params[slot], position, counts[slot], mask)
            drawn += 1
            differing += int(ids[r]) != expected.token_id
            assert 0 <= ids[r] < vocab_size
            if params[slot].needs_output_history:
                expected_counts[slot, ids[r]] += 1
            if params[slot].temperature == 0.0:
                assert ids[r] == expected.token_id
            if expected.logprobs is None:
                assert np.isnan(logprobs[r])
                continue
            if ids[r] == expected.token_id:
                assert abs(logprobs[r] - expected.logprobs.logprob) < 1e-4
            top = expected.logprobs.top
            if mask is not None:
                assert mask[ids[r] // 32] >> (ids[r] % 32) & 1
                top = tuple(pair for pair in top if pair[1] > -np.inf)
                assert (top_logprobs[r, len(top) :] == -np.inf).all()
            assert top_ids[r, : len(top)].tolist() == [token for token, _ in top]
            np.testing.assert_allclose(top_logprobs[r, : len(top)], [value for _, value in top], atol=1e-4)
            assert (top_ids[r, len(expected.logprobs.top) :] == -1).all()
        assert (after == expected_counts).all()
    assert differing <= drawn // 20  # only where the uniform number falls on a border


def test_draws_follow_the_weights(kernels: Kernels) -> None:
    logits = np.full((4000, 64), -np.inf, np.float32)
    logits[:, [3, 9, 40]] = np.log([0.5, 0.3, 0.2])
    rows = [(0, position) for position in range(4000)]
    ids = run(kernels, to_device(logits), 64, rows, [SamplingParams(temperature=1.0, seed=7)])[0]
    shares = [(ids == token).mean() for token in (3, 9, 40)]
    np.testing.assert_allclose(shares, [0.5, 0.3, 0.2], atol=0.03)


def test_rows_without_a_maximum_are_marked(kernels: Kernels) -> None:
    logits = np.zeros((3, 100), np.float32)
    logits[0, 50] = np.nan
    logits[1] = -np.inf
    params = [SamplingParams(temperature=1.0, seed=1)] * 3
    ids = run(kernels, to_device(logits), 100, [(0, 1), (1, 1), (2, 1)], params)[0]
    assert ids[:2].tolist() == [-1, -1]
    assert ids[2] >= 0
    assert cupy.cuda.runtime.getDevice() == 0


@pytest.mark.parametrize("num_rows", [1, 3, 16, 17, 33, 40, 66, 70, 200])
@pytest.mark.parametrize("vocab_size", [1, 33, 1000, 49152, 128256])
def test_several_blocks_find_the_best_token_of_a_row(kernels: Kernels, num_rows: int, vocab_size: int) -> None:
    """Greedy rows beside drawn ones, those whose log-probabilities are wanted, padding, and rows that tell no token."""
    rng = np.random.default_rng(num_rows + vocab_size)
    greedy: dict[str, Any] = {"temperature": 0.0}
    others: list[dict[str, Any]] = [
        {"temperature": 0.7},
        greedy | {"num_logprobs": 2},
        greedy | {"presence_penalty": 1.0},
    ]
    rules = [greedy if i % 5 else others[i // 5 % len(others)] for i in range(num_rows)]
    params = [SamplingParams(**rule, seed=i) for i, rule in enumerate(rules)]
    rows = [(-1 if i % 7 == 6 else i, 9) for i in range(num_rows)]
    for _ in range(3):  # what counts the blocks must be ready for the next launch
        logits = rng.standard_normal((num_rows, -(-vocab_size // 64) * 64)).astype(np.float32)
        logits = np.round(logits * 2)  # many ties
        logits[:, vocab_size:] = np.nan  # is not read
        logits[1::11, rng.integers(vocab_size)] = np.nan
        logits[2::11] = -np.inf
        counts = rng.integers(0, 2, (num_rows, vocab_size)).astype(np.int32)
        ids = run(kernels, to_device(logits), vocab_size, rows, params, counts.copy())[0]
        for r, (slot, position) in enumerate(rows):
            if slot < 0 or r % 11 in (1, 2):
                assert ids[r] == -1
            elif params[slot].temperature == 0.0:
                row = logits[r, :vocab_size]
                assert ids[r] == sample_reference(row, params[slot], position, counts[slot], None).token_id

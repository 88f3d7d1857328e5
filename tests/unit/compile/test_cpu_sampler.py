"""The sampling kernel against the rules in plain numpy."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tvm.runtime

from tpserve.proto.messages import SamplingParams
from tpserve.worker.reference_sampler import philox4x32, sample_reference

Array = npt.NDArray[Any]
Kernels = Callable[[str], Any]


@dataclass(slots=True)
class Sampled:
    ids: Array
    logprob: Array
    top_ids: Array
    top_logprobs: Array
    counts: Array


def run(
    kernel: Any,
    logits: Array,
    params: Sequence[SamplingParams],
    positions: Sequence[int],
    *,
    counts: Array | None = None,
    padding: int = 0,
    masks: Array | None = None,
    mask_rows: Sequence[int] | None = None,
) -> Sampled:
    """Sample row r for slot `num_slots - 1 - r`; `padding` columns of large logits follow the vocabulary.

    Row r has the mask `masks[mask_rows[r]]`, or none where that is -1.
    """
    num_rows, vocab = logits.shape
    num_slots = num_rows + 2
    slots = num_slots - 1 - np.arange(num_rows, dtype=np.int32)
    by_slot = [SamplingParams()] * 2 + list(reversed(params))
    max_bias = max(1, *(len(p.logit_bias) for p in by_slot))
    bias_ids, bias_values = np.zeros((num_slots, max_bias), np.int32), np.zeros((num_slots, max_bias), np.float32)
    for slot, p in enumerate(by_slot):
        for i, (token, value) in enumerate(p.logit_bias):
            bias_ids[slot, i], bias_values[slot, i] = token, value
    state_counts = np.zeros((0, vocab), np.int32)
    if counts is not None:
        state_counts = np.concatenate([np.zeros((2, vocab), np.int32), counts[::-1]])

    def floats(field: str) -> Array:
        return np.array([getattr(p, field) for p in by_slot], np.float32)

    padded = np.concatenate([logits, np.full((num_rows, padding), 1e9, np.float32)], axis=1)
    outputs = [
        np.full(num_rows, -7, np.int32),
        np.zeros(num_rows, np.float32),
        np.zeros((num_rows, 20), np.int32),
        np.zeros((num_rows, 20), np.float32),
    ]
    counts_tensor = tvm.runtime.tensor(np.ascontiguousarray(state_counts))
    arguments = [
        slots,
        np.array(positions, np.int32),
        floats("temperature"),
        floats("top_p"),
        np.array([p.top_k or 0 for p in by_slot], np.int32),
        floats("min_p"),
        floats("frequency_penalty"),
        floats("presence_penalty"),
        np.array([p.seed for p in by_slot], np.uint64).view(np.int64),
        bias_ids,
        bias_values,
        np.array([len(p.logit_bias) for p in by_slot], np.int32),
    ]
    if masks is None:
        masks = np.zeros((0, -(-vocab // 32)), np.int32)
    by_row = [-1] * num_rows if mask_rows is None else list(mask_rows)
    wanted = np.array([-1 if p.num_logprobs is None else p.num_logprobs for p in by_slot], np.int32)
    results = [tvm.runtime.tensor(out) for out in outputs]
    kernel(
        tvm.runtime.tensor(padded),
        vocab,
        *map(tvm.runtime.tensor, arguments),
        counts_tensor,
        tvm.runtime.tensor(wanted),
        tvm.runtime.tensor(masks),
        tvm.runtime.tensor(np.array([-1, -1, *reversed(by_row)], np.int32)),
        *results,
    )
    ids, logprob, top_ids, top_logprobs = (result.numpy() for result in results)
    return Sampled(ids, logprob, top_ids, top_logprobs, counts_tensor.numpy()[:1:-1])


def random_params(rng: np.random.Generator, vocab: int) -> SamplingParams:
    def maybe(value: Any, default: Any) -> Any:
        return value if rng.random() < 0.5 else default

    return SamplingParams(
        temperature=float(maybe(rng.uniform(0.05, 3.0), rng.choice([0.0, 1.0]))),
        top_p=float(maybe(rng.uniform(0.0, 1.0), 1.0)),
        top_k=maybe(int(rng.integers(1, 2 * min(vocab, 6000))), None),
        min_p=float(maybe(rng.uniform(0.0, 1.0) ** 3, 0.0)),
        frequency_penalty=float(maybe(rng.uniform(-2, 2), 0.0)),
        presence_penalty=float(maybe(rng.uniform(-2, 2), 0.0)),
        seed=int(rng.integers(0, 2**64, dtype=np.uint64)),
        logit_bias=tuple((int(rng.integers(vocab)), float(rng.uniform(-5, 5))) for _ in range(rng.integers(0, 4))),
        num_logprobs=maybe(int(rng.integers(0, 21)), None),
    )


def random_masks(rng: np.random.Generator, logits: Array) -> tuple[Array, list[int]]:
    """Masks for every second row, from few tokens to nearly all, each with a finite logit; bits past the end too."""
    num_rows, vocab = logits.shape
    masked = list(range(0, num_rows, 2))
    bits = rng.random((len(masked), -(-vocab // 32) * 32)) < rng.random((len(masked), 1)) ** 3
    for index, row in enumerate(masked):
        bits[index, rng.choice(np.flatnonzero(np.isfinite(logits[row])))] = True
    masks = np.packbits(bits, axis=1, bitorder="little").view(np.int32)
    order = rng.permutation(len(masked))  # rows of masks are in no order of rows
    mask_rows = [-1] * num_rows
    for place, index in enumerate(order):
        mask_rows[masked[index]] = place
    return masks[order], mask_rows


@pytest.mark.parametrize(
    ("vocab", "num_rows", "spread"),
    [
        (1, 3, 1.0),
        (5, 60, 1.0),
        (37, 60, 3.0),
        (1000, 60, 2.0),
        (20_000, 24, 0.05),
        (20_000, 24, 3.0),
        (50_000, 12, 1.0),
    ],
)
@pytest.mark.parametrize("tied", [False, True])
def test_equal_to_the_reference(kernels: Kernels, vocab: int, num_rows: int, spread: float, tied: bool) -> None:
    rng = np.random.default_rng([vocab, int(spread * 100), tied])
    logits: Array = (rng.standard_normal((num_rows, vocab)) * spread).astype(np.float32)
    if tied:
        logits = np.round(logits * 2) / 2
    logits[rng.random(logits.shape) < 0.1] = -np.inf
    logits[:, rng.integers(vocab)] = 1.0
    params = [random_params(rng, vocab) for _ in range(num_rows)]
    counts = rng.poisson(0.3, (num_rows, vocab)).astype(np.int32)
    positions = rng.integers(0, 2**31 - 1, num_rows)
    masks, mask_rows = random_masks(rng, logits)
    out = run(
        kernels("sample"),
        logits,
        params,
        positions.tolist(),
        counts=counts,
        padding=11,
        masks=masks,
        mask_rows=mask_rows,
    )
    for row, p in enumerate(params):
        mask = None if mask_rows[row] < 0 else masks[mask_rows[row]]
        expected = sample_reference(logits[row], p, int(positions[row]), counts[row], mask)
        assert out.ids[row] == expected.token_id, p
        counts[row, expected.token_id] += p.needs_output_history
        if expected.logprobs is None:
            assert np.isnan(out.logprob[row])
            continue
        np.testing.assert_allclose(out.logprob[row], expected.logprobs.logprob, rtol=1e-5, atol=1e-5)
        num_top = len(expected.logprobs.top)
        assert out.top_ids[row, :num_top].tolist() == [token for token, _ in expected.logprobs.top]
        values = [value for _, value in expected.logprobs.top]
        np.testing.assert_allclose(out.top_logprobs[row, :num_top], values, rtol=1e-5, atol=1e-5)
        assert (out.top_ids[row, num_top:] == -1).all()
    np.testing.assert_array_equal(out.counts, counts)


def test_a_row_draws_the_same_alone(kernels: Kernels) -> None:
    rng = np.random.default_rng(5)
    logits = rng.standard_normal((8, 3000)).astype(np.float32)
    params = [dataclasses.replace(random_params(rng, 3000), frequency_penalty=0.0, presence_penalty=0.0)] * 8
    positions = list(range(8))
    together = run(kernels("sample"), logits, params, positions)
    alone = [run(kernels("sample"), logits[r : r + 1], params[:1], positions[r : r + 1]).ids[0] for r in range(8)]
    assert together.ids.tolist() == alone


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        (SamplingParams(), [0.4, 0.3, 0.2, 0.1, 0.0]),
        (SamplingParams(temperature=0.5), [16 / 30, 9 / 30, 4 / 30, 1 / 30, 0.0]),
        (SamplingParams(top_k=2), [4 / 7, 3 / 7, 0, 0, 0]),
        (SamplingParams(top_p=0.65), [4 / 7, 3 / 7, 0, 0, 0]),
        (SamplingParams(min_p=0.45), [4 / 9, 3 / 9, 2 / 9, 0, 0]),
        (SamplingParams(top_k=3, top_p=0.75), [4 / 7, 3 / 7, 0, 0, 0]),
        (SamplingParams(logit_bias=((4, 100.0),)), [0, 0, 0, 0, 1.0]),
    ],
)
def test_frequencies_follow_the_distribution(kernels: Kernels, params: SamplingParams, expected: list[float]) -> None:
    num_draws = 20_000
    with np.errstate(divide="ignore"):
        row = np.log(np.array([0.4, 0.3, 0.2, 0.1, 0.0], np.float32))
    if params.logit_bias:
        row[4] = 0.0
    logits = np.tile(row, (num_draws, 1))
    ids = run(kernels("sample"), logits, [params] * num_draws, list(range(num_draws))).ids
    observed = np.bincount(ids, minlength=5)
    mean = np.array(expected) * num_draws
    assert (observed[mean == 0] == 0).all()
    chi_square = (((observed - mean) ** 2)[mean > 0] / mean[mean > 0]).sum()
    assert chi_square < 18.5  # exceeded once in a thousand with 4 degrees of freedom; the draws are fixed


@pytest.mark.parametrize("spread", [0.5, 3.0], ids=["flat", "peaked"])
@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_models_that_nearly_agree_draw_the_same(kernels: Kernels, spread: float, top_p: float) -> None:
    """With a total variation of d, at least (1 - d) / (1 + d) of the draws by the same numbers are the same.

    That is what a draft lives on, since only what the target draws is accepted.
    """
    num_draws, vocab = 4000, 300
    rng = np.random.default_rng(3)
    one = (rng.standard_normal(vocab) * spread).astype(np.float32)
    other = one + (0.2 * rng.standard_normal(vocab)).astype(np.float32)
    params = [SamplingParams(top_p=top_p, seed=1)] * num_draws
    draws = [run(kernels("sample"), np.tile(row, (num_draws, 1)), params, range(num_draws)).ids for row in (one, other)]
    shares = [np.bincount(ids, minlength=vocab) / num_draws for ids in draws]
    distance = np.abs(shares[0] - shares[1]).sum() / 2  # of what was drawn: some more than that of the distributions
    assert 0.01 < distance < 0.25
    agreed = (draws[0] == draws[1]).mean()
    assert agreed > (1 - distance) / (1 + distance) - 0.02


def test_seeds_and_positions_give_different_draws(kernels: Kernels) -> None:
    logits = np.zeros((64, 1000), np.float32)
    by_position = run(kernels("sample"), logits, [SamplingParams(seed=9)] * 64, list(range(64))).ids
    by_seed = run(kernels("sample"), logits, [SamplingParams(seed=s << 40) for s in range(64)], [0] * 64).ids
    assert len(set(by_position.tolist())) > 55
    assert len(set(by_seed.tolist())) > 55


def test_philox_known_answers() -> None:
    """Of Random123's kat_vectors."""
    blocks = np.array([0, 2**64 - 1], np.uint64)
    words = philox4x32(0, 0, blocks[:1]), philox4x32(2**64 - 1, 2**64 - 1, blocks[1:])
    assert np.concatenate(words[0]).tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert np.concatenate(words[1]).tolist() == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_bad_logits_name_the_slot(kernels: Kernels, bad: float) -> None:
    logits = np.zeros((3, 50), np.float32)
    logits[1, 49] = bad
    with pytest.raises(ValueError, match="logits of slot 3 at position 8 have a NaN or no finite maximum"):
        run(kernels("sample"), logits, [SamplingParams()] * 3, [7, 8, 9])


def test_only_the_allowed_are_drawn_and_have_log_probabilities(kernels: Kernels) -> None:
    logits = np.zeros((2, 40), np.float32)
    masks = np.array([[1 << 7, 1 << 3]], np.int32)  # tokens 7 and 35
    params = [SamplingParams(num_logprobs=4, logit_bias=((5, 100.0),), temperature=2.0)] * 2
    out = run(kernels("sample"), logits, params, [1, 2], masks=masks, mask_rows=[0, -1])
    assert out.ids[0] in (7, 35)
    assert out.top_ids[0, :2].tolist() == [7, 35]
    np.testing.assert_allclose(out.logprob[0], np.log(0.5), rtol=1e-6)
    np.testing.assert_allclose(out.top_logprobs[0, :4], [np.log(0.5)] * 2 + [-np.inf] * 2, rtol=1e-6)
    assert out.ids[1] == 5


def test_a_mask_without_a_token_is_no_distribution(kernels: Kernels) -> None:
    masks = np.zeros((1, 2), np.int32)
    with pytest.raises(ValueError, match="logits of slot 2 at position 1 have a NaN or no finite maximum"):
        run(kernels("sample"), np.zeros((1, 40), np.float32), [SamplingParams()], [1], masks=masks, mask_rows=[0])
    with pytest.raises(ValueError, match="mask_rows of slot 2 is 1, expected -1 to 0"):
        run(kernels("sample"), np.zeros((1, 40), np.float32), [SamplingParams()], [1], masks=masks, mask_rows=[1])


def test_bad_parameters_name_the_slot(kernels: Kernels) -> None:
    logits = np.zeros((1, 50), np.float32)
    cases = [
        (SamplingParams(temperature=-1.0), "temperature of slot 2 is -1"),
        (SamplingParams(min_p=2.0), "min_p of slot 2 is 2"),
        (SamplingParams(num_logprobs=21), "slot 2 asks for 21 log-probabilities"),
        (SamplingParams(presence_penalty=1.0), "slot 2 has penalties, but output_counts has no rows"),
        (SamplingParams(logit_bias=((50, 1.0),)), r"bias_ids of a slot\[0\] is 50, expected 0 to 49"),
    ]
    for params, message in cases:
        with pytest.raises((ValueError, IndexError), match=message):
            run(kernels("sample"), logits, [params], [0])

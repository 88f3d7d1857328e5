"""The sampling rules in plain numpy, float64, one row at a time: what the sampling kernels must do.

Owns the rules' meaning. It is the portable twin of sampling, of which TVM's kernels have none: a library of portable
kernels samples with the CPU's tuned one. Tests compare both tuned kernels with it:
`tests/unit/compile/test_cpu_sampler.py` and `tests/gpu/test_sample.py`. Slow on purpose; only tests use it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tpserve.proto.messages import SamplingParams, TokenLogprobs


@dataclass(frozen=True, slots=True)
class ReferenceSample:
    """One drawn token."""

    token_id: int
    logprobs: TokenLogprobs | None
    """None if the parameters ask for none."""


def sample_reference(
    logits: npt.NDArray[np.float32],
    params: SamplingParams,
    position: int,
    output_counts: npt.NDArray[np.int32] | None = None,
    mask: npt.NDArray[np.int32] | None = None,
) -> ReferenceSample:
    """Draw the token at `position`.

    Parameters
    ----------
    logits
        (vocab_size,) float32; not changed.
    params
        Fractions are taken as float32, as kernels hold them.
    position
        Of the token being drawn; the counter of the generator.
    output_counts
        (vocab_size,) how often each token stands in the output so far; needed with penalties.
    mask
        (ceil(vocab_size / 32),) a grammar's mask: bit i % 32 of word i / 32 allows token i; None allows all.

    Raises
    ------
    ValueError
        If the adjusted logits hold a NaN or have no finite maximum, or counts are missing.
    """
    adjusted = _adjust(logits if mask is None else _masked(logits, mask), params, output_counts)
    best = adjusted.max()
    if not np.isfinite(best):
        raise ValueError("logits have a NaN or no finite maximum")
    ranking = np.lexsort((np.arange(len(adjusted)), -adjusted))  # by logit, then by lower id
    token_id = int(ranking[0]) if params.temperature == 0.0 else _draw(adjusted, ranking, params, position)
    if params.num_logprobs is None:
        return ReferenceSample(token_id, None)
    logprobs = adjusted - best - np.log(np.exp(adjusted - best).sum())
    top = tuple((int(i), float(logprobs[i])) for i in ranking[: params.num_logprobs])
    return ReferenceSample(token_id, TokenLogprobs(float(logprobs[token_id]), top))


def exponentials(seed: int, position: int, count: int) -> npt.NDArray[np.float64]:
    """Return the variates of tokens 0 to count - 1, (count,).

    Token i has word i % 32 / 8 of block i / 32 * 8 + i % 8: eight blocks side by side serve 32 tokens in order.
    """
    num_groups = -(-count // 32)
    words = np.stack(philox4x32(seed, position, np.arange(8 * num_groups, dtype=np.uint64)))  # (word, block)
    in_order = words.reshape(4, num_groups, 8).transpose(1, 0, 2).reshape(-1)[:count]
    exponential: npt.NDArray[np.float64] = -np.log1p(-(in_order.astype(np.float64) + 0.5) * 2.0**-32)
    return exponential


def philox4x32(key: int, counter: int, blocks: npt.NDArray[np.uint64]) -> tuple[npt.NDArray[np.uint64], ...]:
    """Return the words of Philox4x32-10 (Salmon et al., SC'11) for a 64-bit key and each counter (counter, block)."""
    mask, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    lower = np.broadcast_to(np.uint64(counter), blocks.shape)
    x = (lower & mask, lower >> half, blocks & mask, blocks >> half)
    low, high = key & 0xFFFFFFFF, key >> 32 & 0xFFFFFFFF
    for _ in range(10):
        a, b = np.uint64(0xD2511F53) * x[0], np.uint64(0xCD9E8D57) * x[2]
        x = ((b >> half) ^ x[1] ^ np.uint64(low), b & mask, (a >> half) ^ x[3] ^ np.uint64(high), a & mask)
        low, high = (low + 0x9E3779B9) & 0xFFFFFFFF, (high + 0xBB67AE85) & 0xFFFFFFFF
    return x


def _masked(logits: npt.NDArray[np.float32], mask: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
    tokens = np.arange(len(logits))
    allowed = mask[tokens // 32] >> (tokens % 32) & 1
    return np.where(allowed == 1, logits, np.float32(-np.inf))


def _adjust(
    logits: npt.NDArray[np.float32], params: SamplingParams, output_counts: npt.NDArray[np.int32] | None
) -> npt.NDArray[np.float64]:
    adjusted = logits.copy()
    for token, value in params.logit_bias:
        adjusted[token] += np.float32(value)
    if params.needs_output_history:
        if output_counts is None:
            raise ValueError("penalties need output_counts")
        frequency, presence = np.float32(params.frequency_penalty), np.float32(params.presence_penalty)
        adjusted -= frequency * output_counts.astype(np.float32) + presence * (output_counts > 0)
    return adjusted.astype(np.float64)


def _draw(adjusted: npt.NDArray[np.float64], ranking: npt.NDArray[np.int64], params: SamplingParams, at: int) -> int:
    weights = np.exp((adjusted - adjusted.max()) / float(np.float32(params.temperature)))
    kept = ranking
    if params.top_k is not None:
        kept = kept[: params.top_k]
    top_p = float(np.float32(params.top_p))
    if top_p < 1.0:
        running = np.cumsum(weights[kept])
        reached = running >= top_p * weights[kept].sum()
        kept = kept[: int(np.argmax(reached)) + 1 if reached.any() else len(kept)]
    kept = np.sort(kept[weights[kept] >= float(np.float32(params.min_p))])
    with np.errstate(divide="ignore"):
        scores = exponentials(params.seed, at, len(weights))[kept] / weights[kept]
    return int(kept[np.argmin(scores)])

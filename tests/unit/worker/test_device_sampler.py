"""What the host keeps of a GPU's sampling, with arrays of numpy; the kernel is tests/gpu/test_sample.py's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from host_cupy import as_cupy
from tpserve.proto.messages import SamplingParams, SlotAdd

VOCAB, BEST = 8, (5, 3, 1)


def sample(*arguments: Any) -> None:
    """Give every row the same tokens."""
    ids, chosen, top_ids, top_values = (np.from_dlpack(tensor) for tensor in arguments[-4:])
    ids[:], chosen[:] = BEST[0], -0.5
    top_ids[:, : len(BEST)] = BEST
    top_values[:, : len(BEST)] = [-0.5, -1.0, -2.0]


@pytest.fixture
def sampler(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    with as_cupy(monkeypatch):
        from tpserve.worker.device_sampler import DeviceSampler

        yield DeviceSampler({"sample": sample}, 2, VOCAB, VOCAB, num_staging=2)


def occupy(sampler: Any, staging: int, num_logprobs: int | None) -> None:
    sampling = SamplingParams(temperature=0.0, num_logprobs=num_logprobs)
    sampler.add([SlotAdd(0, sampling, page_ids=(0,))], staging, None)


def step(sampler: Any, staging: int) -> None:
    """Queue a step of slot 0, and the copies of its results."""
    slots = np.zeros(1, np.int32)
    sampler.queue(np.zeros((1, VOCAB), np.float32), slots, slots)
    sampler.fetch(1, slots, staging, None)


def alternatives(sampler: Any, staging: int) -> list[int] | None:
    slots = np.zeros(1, np.int32)
    token_ids, logprobs = sampler.results(slots, np.zeros(1, np.int32), staging)
    assert token_ids == (BEST[0],)
    return [token for token, _ in logprobs[0][0].top] if 0 in logprobs else None


@pytest.mark.parametrize(("first", "second"), [(2, None), (None, 2), (2, 1), (1, 3)])
def test_a_step_is_told_as_its_own_sequence_wants_it(sampler: Any, first: int | None, second: int | None) -> None:
    """Plans run ahead of results: when a sequence's last step is read, its slot may have another's parameters."""
    occupy(sampler, 0, first)
    step(sampler, 0)
    occupy(sampler, 1, second)
    step(sampler, 1)
    for staging, count in enumerate((first, second)):
        assert alternatives(sampler, staging) == (None if count is None else list(BEST[:count]))

"""What the GPU's kernels find by prompt lookup, slot by slot on the host, against the host's proposer."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest

from tpserve.worker.proposers.ngram import continuation
from unit.compile.test_cuda_speculation import MOST, NUM_SLOTS, WIDTH, Device, build_rows, wrong_library


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return build_rows(tmp_path_factory.mktemp("rows"))


def check_lookups(library: ctypes.CDLL, seed: int) -> None:
    """Compare the draft tokens of slots of every kind, by blocks of any size, with those of the host's proposer."""
    rng = np.random.default_rng(seed)
    device = Device(library)
    found = 0
    for _ in range(60):
        device.tokens[:] = rng.integers(0, rng.integers(1, 5), device.tokens.shape)
        device.num_tokens[:] = rng.integers(0, WIDTH, NUM_SLOTS)
        device.max_len[:] = rng.integers(0, WIDTH, NUM_SLOTS) * (rng.random(NUM_SLOTS) < 0.8)
        device.draft_tokens[:] = -7
        num_drafts, least = int(rng.integers(1, MOST + 1)), int(rng.integers(1, 4))
        most, stride = least + int(rng.integers(0, 3)), int(rng.integers(1, 4))
        slots = rng.permutation(NUM_SLOTS).astype(np.int32)
        slots[rng.random(NUM_SLOTS) < 0.1] = -1
        threads = int(rng.choice([1, 3, 256]))
        device.call("lookup", NUM_SLOTS, num_drafts, least, most, threads, np.repeat(slots, stride), stride)
        for slot in range(NUM_SLOTS):
            if slot not in slots:
                assert (device.draft_tokens[slot] == -7).all()
                continue
            tokens = device.tokens[slot, : device.num_tokens[slot]]
            drafts = device.draft_tokens[slot, :num_drafts].tolist()
            assert (device.draft_tokens[slot, num_drafts:] == -7).all()
            if device.max_len[slot] == 0 or device.num_tokens[slot] >= device.max_len[slot]:
                assert drafts == [-1] * num_drafts
                continue
            expected = continuation(tokens, num_drafts, least, most).tolist()
            assert drafts == expected + [-1] * (num_drafts - len(expected))
            found += bool(expected)
    assert found > 20


@pytest.mark.parametrize("seed", range(6))
def test_lookups_are_those_of_the_host(rows: ctypes.CDLL, seed: int) -> None:
    check_lookups(rows, seed)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("length >= least && found > best", "length >= least"),
        ("length < most && length <= end", "length < most + 1 && length <= end"),
        ("next + index % period", "next + index"),
        ("(end + 1);", "(NEVER - end);"),
        ("fresh(s.max_len + slot) <= 0 || is_full(s, slot)", "is_full(s, slot)"),
    ],
)
def test_a_wrong_lookup_is_noticed(right: str, wrong: str, tmp_path: Path) -> None:
    library = wrong_library(right, wrong.replace("NEVER", str(WIDTH)), tmp_path)
    with pytest.raises((AssertionError, IndexError, ValueError)):
        check_lookups(library, 1)

"""How many KV pages each mode takes, and what is said when not one sequence fits."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from tiny_models import MODELS
from tpserve.coordinator.errors import ClusterError
from tpserve.coordinator.memory import MODE_MAX_NUM_SEQS, limit_to_own_draft, plan_memory
from tpserve.proto.manifest import Manifest
from worker_builders import make_manifest

PLENTY = 2**34


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    """Of a model whose longest sequence has 64 pages."""
    MODELS["llama_9q_3kv_tied"].write(tmp_path)
    made = make_manifest(tmp_path, 2)
    return replace(made, max_model_len=64 * made.kv.page_size, workspace_bytes=10_000)


def test_row_25_engine_modes(manifest: Manifest) -> None:
    """local: few sequences, 8192 tokens; interactive: one sequence; server: what the memory gives."""
    assert MODE_MAX_NUM_SEQS == {"local": 4, "interactive": 1, "server": 64}
    size = manifest.kv.page_size

    def pages(mode: str, num_bytes: int = PLENTY) -> int:
        return plan_memory(manifest, mode, MODE_MAX_NUM_SEQS[mode], 0.85, num_bytes).num_pages

    assert pages("local") == max(64, 8192 // size)
    assert pages("interactive") == 64
    assert pages("server") == 64 * 64
    # Where memory is scarce, as much of it as may be used, and no more.
    scarce = math.ceil((1_000_000 + 300 * manifest.kv.page_bytes) / 0.85)
    plan = plan_memory(manifest, "server", 64, 0.85, scarce)
    assert 64 < plan.num_pages < 64 * 64
    assert scarce * 0.85 - manifest.kv.page_bytes < plan.total_bytes <= scarce * 0.85
    assert plan.total_bytes == plan.parameter_bytes + plan.num_pages * manifest.kv.page_bytes + 10_000
    assert pages("local", scarce) <= pages("server", scarce)


def test_pages_fit_on_the_gpus_of_a_draft_too(manifest: Manifest) -> None:
    plan = plan_memory(manifest, "server", 64, 0.85, PLENTY)
    draft = replace(manifest, kv=replace(manifest.kv, num_layers=2 * manifest.kv.num_layers))
    assert limit_to_own_draft(plan, manifest, draft, 0.85, PLENTY) == plan
    scarce = math.ceil((1_000_000 + 300 * manifest.kv.page_bytes) / 0.85)
    own = plan_memory(draft, "server", 64, 0.85, scarce)
    limited = limit_to_own_draft(plan, manifest, draft, 0.85, scarce)
    assert limited.num_pages == own.num_pages < plan.num_pages
    assert limited.kv_bytes == own.num_pages * manifest.kv.page_bytes
    assert (limited.parameter_bytes, limited.workspace_bytes) == (plan.parameter_bytes, plan.workspace_bytes)
    with pytest.raises(ClusterError, match=r"of the draft's KV cache, .* lower --max-model-len, or .* --draft-tp"):
        limit_to_own_draft(plan, manifest, draft, 0.85, 10_000)


def test_e4m3_pages_are_half_as_large_and_twice_as_many(manifest: Manifest) -> None:
    wide, narrow = (replace(manifest, kv=replace(manifest.kv, dtype=dtype)) for dtype in ("bfloat16", "float8_e4m3fn"))
    assert wide.kv.page_bytes == 2 * narrow.kv.page_bytes
    scarce = math.ceil((1_000_000 + 200 * manifest.kv.page_bytes) / 0.85)
    num_wide, num_narrow = (plan_memory(each, "server", 64, 0.85, scarce).num_pages for each in (wide, narrow))
    assert 2 * num_wide <= num_narrow <= 2 * num_wide + 1 < 64 * 64


@pytest.mark.parametrize("mode", MODE_MAX_NUM_SEQS)
def test_row_25_one_sequence_must_fit(manifest: Manifest, mode: str) -> None:
    with pytest.raises(ClusterError, match=r"one sequence of \d+ tokens needs .* lower --max-model-len"):
        plan_memory(manifest, mode, 1, 0.85, 10_000)

"""The GGUF converter against transformers' own GGUF reader, on the demo model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from tokenizers import Tokenizer

BF16_ROUNDING = 2.0**-8


@pytest.fixture(scope="module")
def converter(demo_golden: dict[str, Any]) -> dict[str, Any]:
    golden: dict[str, Any] = demo_golden["converter"]
    return golden


def test_weights_are_those_that_transformers_reads(demo_folder: Path, converter: dict[str, Any]) -> None:
    with safe_open(demo_folder / "model.safetensors", framework="numpy") as checkpoint:
        names = set(checkpoint.keys())
        assert "lm_head.weight" not in names, "the embeddings are tied"
        for name, golden in converter["tensors"].items():
            tensor = checkpoint.get_tensor(name)
            assert list(tensor.shape) == golden["shape"], name
            rounding = 1e-7 if tensor.ndim == 1 else BF16_ROUNDING  # norms stay in float32
            values = tensor.astype(np.float32).ravel()
            np.testing.assert_allclose(values[golden["indices"]], golden["values"], rtol=rounding, atol=1e-7)
            assert values.mean(dtype=np.float64) == pytest.approx(golden["mean"], abs=2e-3 * golden["std"])
            assert values.std(dtype=np.float64) == pytest.approx(golden["std"], rel=1e-3)
    per_layer = {name.split(".", 3)[3] for name in names if name.startswith("model.layers.")}
    assert per_layer == {name.split(".", 3)[3] for name in converter["tensors"] if name.startswith("model.layers.")}
    assert names == {f"model.layers.{i}.{part}" for i in range(30) for part in per_layer} | {
        "model.embed_tokens.weight",
        "model.norm.weight",
    }


def test_token_ids_are_those_of_transformers(demo_folder: Path, demo_golden: dict[str, Any]) -> None:
    tokenizer = Tokenizer.from_file(str(demo_folder / "tokenizer.json"))
    for text, ids in demo_golden["converter"]["token_ids"].items():
        assert tokenizer.encode(text, add_special_tokens=False).ids == ids, repr(text)
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
    for prompt in demo_golden["prompts"]:
        if "text" in prompt:
            assert tokenizer.encode(prompt["text"]).ids == prompt["prompt_token_ids"], prompt["name"]

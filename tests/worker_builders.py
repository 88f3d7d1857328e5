"""Manifests of models as the compiler writes them, without compiling."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from tpserve.compile.config import CompileConfig, ModelConfig
from tpserve.compile.pipeline import build_graph
from tpserve.proto.host import cpu_features
from tpserve.proto.manifest import KVLayout, Manifest


def make_manifest(
    model_dir: Path,
    tp_size: int,
    *,
    quantization: Literal["q0f32", "q0bf16", "fp8"] = "q0f32",
    kv_cache_dtype: Literal["auto", "fp8"] = "auto",
) -> Manifest:
    """The manifest of a model's graph on a CPU, with no files; of portable kernels if anything is fp8."""
    kernels: Literal["tuned", "portable"] = "portable" if "fp8" in (quantization, kv_cache_dtype) else "tuned"
    config = ModelConfig.from_hf(model_dir)
    compile_config = CompileConfig(
        tp_size=tp_size,
        quantization=quantization,
        kernels=kernels,
        target="llvm",
        max_model_len=128,
        max_num_batched_tokens=64,
        max_num_seqs=4,
        kv_cache_dtype=kv_cache_dtype,
    )
    graph = build_graph(config, compile_config)
    sharding = graph.sharding
    return Manifest(
        model_type=config.model_type,
        model_config_sha256=config.sha256,
        tp_size=tp_size,
        quantization=quantization,
        target={"kind": "llvm", "cpu_features": cpu_features()},
        kernels=kernels,
        vocab_size=config.vocab_size,
        padded_vocab_size=sharding.vocab_size * tp_size,
        hidden_size=config.hidden_size,
        num_layers=config.num_layers,
        num_q_heads=sharding.num_q_heads,
        max_model_len=128,
        max_num_batched_tokens=64,
        max_num_seqs=4,
        max_num_rows=4,
        attention_window=0,
        workspace_bytes=0,
        kv=KVLayout(16, config.num_layers, sharding.num_kv_heads, config.head_dim, compile_config.page_dtype),
        rope_inv_freq=config.rope_inv_freq(),
        splits=sharding.splits,
        params=graph.params,
        externs=graph.externs,
        compiler={},
        input_hash="0",
        files={},
    )

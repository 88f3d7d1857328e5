"""Build one artifact folder: the compiled graph, the tuned kernels and the manifest that describes both."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tpserve.compile import native, native_cuda
from tpserve.compile.cache import CachePolicy, cache_root, cached_folder, kept_folder
from tpserve.compile.config import CompileConfig, ModelConfig
from tpserve.compile.eagle import EagleHeadConfig
from tpserve.compile.kernels.cuda import sizes
from tpserve.compile.progress import progress_bar
from tpserve.compile.sharding import Sharding
from tpserve.proto.host import cpu_features
from tpserve.proto.manifest import HeadFacts, KVLayout, Manifest, sha256_file
from tpserve.proto.speculation import HEAD_PENDING_ROWS, MAX_DRAFT_TOKENS
from tpserve.proto.tvm_import import asked_once

logger = logging.getLogger(__name__)

MODEL_LIBRARY = "model.so"
KERNEL_LIBRARY = "kernels.so"


def build_artifact(
    config: ModelConfig | EagleHeadConfig,
    compile_config: CompileConfig,
    policy: CachePolicy,
    check: Callable[[], None] | None = None,
) -> Path:
    """Return the artifact folder of a model or an EAGLE-3 head, compiled now or taken from the cache.

    Parameters
    ----------
    check
        Called before anything is compiled, and not for what is in the cache; what it raises ends the build.
    """
    key = input_hash(config, compile_config)

    def build(folder: Path) -> None:
        if check is not None:
            check()
        _build(folder, config, compile_config, key, policy)

    return cached_folder("lib", key, policy, build)


def find_artifact(
    config: ModelConfig | EagleHeadConfig,
    compile_config: CompileConfig,
    policy: CachePolicy,
    check: Callable[[], None] | None = None,
) -> Path | None:
    """Return what `build_artifact` takes from the cache; None where it would compile, once `check` has been called."""
    folder = kept_folder("lib", input_hash(config, compile_config), policy)
    if folder is None and check is not None:
        check()
    return folder


def input_hash(config: ModelConfig | EagleHeadConfig, compile_config: CompileConfig) -> str:
    """Hash everything that decides what is built: both configurations, our sources, the toolchain, this CPU."""
    sources = hashlib.sha256()
    package = resources.files("tpserve.compile")
    for path in sorted(Path(str(package)).rglob("*.py")):
        sources.update(path.read_bytes())
    inputs = {
        "model": dataclasses.asdict(config),
        "compile": dataclasses.asdict(compile_config),
        "sources": sources.hexdigest(),
        "kernels": _kernel_facts(compile_config.target),
        "compiler": _versions(compile_config.target),
    }
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def _versions(target: str) -> dict[str, str]:
    versions = {name: version(name) for name in ("apache-tvm", "apache-tvm-ffi")}
    if target == "llvm":
        return versions | {"c++": native.compiler_version()}
    return versions | {"nvcc": native_cuda.nvcc_version()}


def _kernel_facts(target: str) -> list[str]:
    """List what decides a target's kernel library."""
    if target == "llvm":
        return [native.source_hash(native.CPU_KERNEL_SOURCES), cpu_features(), native.compiler_version()]
    return [native_cuda.cuda_source_hash(native_cuda.CUDA_KERNEL_SOURCES)]


def _build(
    folder: Path, given: ModelConfig | EagleHeadConfig, compile_config: CompileConfig, key: str, policy: CachePolicy
) -> None:
    # The compiler takes a second to import and starts threads: only a build pays for it.
    with asked_once():
        from tpserve.compile.pipeline import build_graph, build_head_graph, lower

    head: HeadFacts | None = None
    if isinstance(given, EagleHeadConfig):
        config, model_type = given.layer, "eagle3"
        head = HeadFacts(given.target_vocab_size, given.target_hidden_size, given.has_token_map)
    else:
        config, model_type = given, given.model_type
    logger.info("Compiling %s for TP=%d", model_type, compile_config.tp_size)
    if isinstance(given, EagleHeadConfig):
        graph = build_head_graph(given, compile_config)
    else:
        graph = build_graph(given, compile_config)
    executable, workspace_bytes = lower(graph.module, _tvm_target(compile_config))
    executable.export_library(str(folder / MODEL_LIBRARY))
    _put_kernels(folder, compile_config.target, policy)
    sharding = graph.sharding
    Manifest(
        model_type=model_type,
        model_config_sha256=config.sha256,
        tp_size=compile_config.tp_size,
        quantization=compile_config.quantization,
        target=_target_facts(compile_config),
        kernels=compile_config.kernels,
        vocab_size=config.vocab_size,
        padded_vocab_size=sharding.vocab_size * sharding.tp_size,
        hidden_size=config.hidden_size,
        num_layers=config.num_layers,
        num_q_heads=sharding.num_q_heads,
        max_model_len=compile_config.max_model_len,
        max_num_batched_tokens=compile_config.max_num_batched_tokens,
        max_num_seqs=compile_config.max_num_seqs,
        max_num_rows=compile_config.max_num_rows,
        attention_window=config.sliding_window or 0,
        workspace_bytes=workspace_bytes
        + buffer_bytes(config, compile_config, sharding)
        + (pending_bytes(given, compile_config) if isinstance(given, EagleHeadConfig) else 0),
        kv=KVLayout(
            page_size=compile_config.page_size,
            num_layers=config.num_layers,
            num_kv_heads=sharding.num_kv_heads,
            head_dim=config.head_dim,
            dtype=compile_config.page_dtype,
        ),
        rope_inv_freq=config.rope_inv_freq(),
        splits=sharding.splits,
        params=graph.params,
        externs=graph.externs,
        compiler=_versions(compile_config.target),
        input_hash=key,
        files={name: sha256_file(folder / name) for name in (MODEL_LIBRARY, KERNEL_LIBRARY)},
        aux_layers=compile_config.aux_layers,
        head=head,
    ).save(folder)


def pending_bytes(head: EagleHeadConfig, compile_config: CompileConfig) -> int:
    """Return about what a head's rank keeps besides.

    Rows that are left aside, the input of one step, and on a GPU logits among the target's tokens.
    """
    slots, tokens = compile_config.max_num_seqs, compile_config.max_num_batched_tokens
    if compile_config.target == "cuda":
        return 2 * (2 * slots + tokens) * head.layer.hidden_size + 4 * slots * head.target_vocab_size
    rows = slots * (HEAD_PENDING_ROWS + 1 + MAX_DRAFT_TOKENS)
    return 4 * (rows + tokens) * head.num_row_values


def buffer_bytes(config: ModelConfig, compile_config: CompileConfig, sharding: Sharding) -> int:
    """Return what a rank on a GPU keeps besides parameters, pages and activations."""
    if compile_config.target == "llvm":
        return 0
    tokens, slots = compile_config.max_num_batched_tokens, compile_config.max_num_seqs
    heads = (sharding.num_q_heads, sharding.num_kv_heads, config.head_dim)
    padded_vocab = sharding.vocab_size * sharding.tp_size
    total = 4 * sizes.attention_plan_size(tokens, slots, decode_only=False)
    total += 4 * sizes.attention_workspace_size(tokens, slots, *heads)
    total += sizes.sampler_bytes(slots, compile_config.max_num_rows, config.vocab_size, padded_vocab)
    if sharding.tp_size > 1:
        total += sizes.push_workspace_bytes(sharding.tp_size, config.hidden_size)
    return total


def _tvm_target(compile_config: CompileConfig) -> Any:
    import tvm

    if compile_config.target == "llvm":
        return tvm.target.Target({"kind": "llvm"})
    limits = {"max_num_threads": 1024, "max_shared_memory_per_block": 49152}
    return tvm.target.Target({"kind": "cuda", "arch": native_cuda.ARCH, **limits}, host="llvm")


def _target_facts(compile_config: CompileConfig) -> dict[str, str]:
    """Return what a worker compares with its host."""
    if compile_config.target == "llvm":
        return {"kind": "llvm", "cpu_features": cpu_features()}
    return {"kind": "cuda", "arch": native_cuda.ARCH}


def _put_kernels(folder: Path, target: str, policy: CachePolicy) -> None:
    """Put a target's kernels into an artifact.

    REDO and OFF mean the model's own library: kernels of unchanged sources would come out the same.
    """
    if policy is not CachePolicy.OFF:
        kernels = kernel_library(target, CachePolicy.ON)
    elif (cache_root() / "kernels" / _kernel_key(target)).is_dir():
        kernels = kernel_library(target, CachePolicy.READONLY)
    else:
        _build_kernels(target, folder)
        return
    shutil.copyfile(kernels, folder / KERNEL_LIBRARY)


def kernel_library(target: str, policy: CachePolicy) -> Path:
    """Return the kernels of a target in the cache, built once and shared by all models."""
    folder = cached_folder("kernels", _kernel_key(target), policy, lambda folder: _build_kernels(target, folder))
    return folder / KERNEL_LIBRARY


def _kernel_key(target: str) -> str:
    return hashlib.sha256(json.dumps(_kernel_facts(target)).encode()).hexdigest()


def _build_kernels(target: str, folder: Path) -> None:
    with progress_bar("Compiling kernels, once for all models") as progress:
        if target == "llvm":
            native.build_library(native.CPU_KERNEL_SOURCES, folder / KERNEL_LIBRARY, progress=progress)
        else:
            native_cuda.build_cuda_library(native_cuda.CUDA_KERNEL_SOURCES, folder / KERNEL_LIBRARY, progress=progress)

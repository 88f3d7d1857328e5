"""Commands `tpserve convert`, `inspect` and `compile`; `tpserve serve` runs the latter two as processes."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from functools import partial
from pathlib import Path
from typing import Literal

from tpserve.compile.artifact import build_artifact, find_artifact
from tpserve.compile.cache import CachePolicy, told_if_full
from tpserve.compile.config import CompileConfig, ModelConfig
from tpserve.compile.eagle import EagleHeadConfig, is_eagle_head
from tpserve.compile.errors import CompileError
from tpserve.compile.source import convert_to, require_tokenizer, require_weights, resolve_model, stored_quantization
from tpserve.proto.manifest import CPU_STEP_TOKENS, GPU_STEP_TOKENS

_POLICIES = [policy.value for policy in CachePolicy]
_TARGETS: dict[str, Literal["llvm", "cuda"]] = {"cpu": "llvm", "cuda": "cuda", "cuda:sm_90a": "cuda"}
KV_CACHE_DTYPES = ("auto", "bfloat16", "fp8", "fp8_e4m3")
DEFAULT_MAX_MODEL_LEN = 8192


def add_cache_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the cache policies, whose defaults come from the environment."""
    parser.add_argument(
        "--jit-policy",
        choices=_POLICIES,
        default=os.environ.get("TPSERVE_JIT_POLICY", "ON"),
        help="cache of converted models and compiled libraries (TPSERVE_JIT_POLICY)",
    )
    parser.add_argument(
        "--download-cache-policy",
        choices=_POLICIES,
        default=os.environ.get("TPSERVE_DOWNLOAD_CACHE_POLICY", "ON"),
        help="cache of downloads from the hub (TPSERVE_DOWNLOAD_CACHE_POLICY)",
    )


def add_compile_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what decides the compiled library."""
    parser.add_argument("model", help="Hugging Face folder, GGUF file or HF://org/name")
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel degree: 1, 2, 4 or 8")
    parser.add_argument("--device", choices=sorted(_TARGETS), default="cpu", help="cuda:sm_90a builds without a GPU")
    parser.add_argument("--quantization", choices=["auto", "q0f32", "q0bf16", "fp8"], default="auto")
    parser.add_argument(
        "--kv-cache-dtype",
        choices=KV_CACHE_DTYPES,
        default="auto",
        help="auto: bfloat16 on a GPU, float32 on a CPU; fp8 (also fp8_e4m3): half the memory, on GPUs or portable",
    )
    parser.add_argument(
        "--kernels",
        choices=["tuned", "portable"],
        default="tuned",
        help="portable: TVM's, slow, for a CPU; with q0bf16 and fp8 they compute what a GPU does, KV pages included",
    )
    parser.add_argument("--max-model-len", type=int, help="longest sequence, prompt and output, in tokens")
    parser.add_argument(
        "--cut-model-len", action="store_true", help="where --max-model-len is more than the model's positions: those"
    )
    parser.add_argument(
        "--max-num-batched-tokens",
        type=int,
        help=f"most tokens in one step (default: {GPU_STEP_TOKENS} on GPUs, {CPU_STEP_TOKENS} on a CPU)",
    )
    parser.add_argument("--max-num-seqs", type=int, default=4, help="most sequences that run at once")
    parser.add_argument(
        "--max-num-draft-tokens", type=int, default=0, help="most draft tokens that one step verifies for a sequence"
    )
    parser.add_argument(
        "--draft-model", metavar="MODEL", help="of an EAGLE-3 head: the library then gives the hidden rows it reads"
    )
    parser.add_argument("--target-model", metavar="MODEL", help="that an EAGLE-3 head drafts for; others need none")
    parser.add_argument("--load-format", choices=["auto", "dummy"], default="auto", help="dummy: random weights")
    parser.add_argument(
        "--require-tokenizer", action="store_true", help="compile nothing for a model whose tokenizer cannot be loaded"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="fetch and check the model, look for a cached library, compile nothing"
    )
    add_cache_arguments(parser)


def _resolve(model: str, args: argparse.Namespace) -> Path:
    """Return a model's folder, by the cache policies."""
    download_policy = CachePolicy(args.download_cache_policy)
    return resolve_model(model, model_policy=CachePolicy(args.jit_policy), download_policy=download_policy)


def inspect_model(args: argparse.Namespace) -> dict[str, str]:
    """Resolve what a user calls a draft; return its folder, and by which method it drafts."""
    model_dir = _resolve(args.model, args)
    return {"model_dir": str(model_dir), "method": "eagle3" if is_eagle_head(model_dir) else "draft"}


def _read_model(model_dir: Path, args: argparse.Namespace) -> tuple[ModelConfig, EagleHeadConfig | None]:
    """Return the shape of a model, and the head that is to draft for it; of a head that of its layer, and itself.

    Raises
    ------
    CompileError
        If a head is to be compiled without its target, or does not fit it.
    """
    has_weights = args.load_format == "auto"
    if is_eagle_head(model_dir):
        if args.target_model is None:
            raise CompileError(f"{model_dir} is an EAGLE-3 head, which goes with one model: give it as --target-model")
        target = ModelConfig.from_hf(_resolve(args.target_model, args))
        head = EagleHeadConfig.from_hf(model_dir, target, has_weights=has_weights)
        return head.layer, head
    config = ModelConfig.from_hf(model_dir)
    if args.draft_model is not None:
        draft_dir = _resolve(args.draft_model, args)
        if is_eagle_head(draft_dir):
            return config, EagleHeadConfig.from_hf(draft_dir, config, has_weights=has_weights)
    return config, None


def compile_model(args: argparse.Namespace) -> dict[str, str]:
    """Resolve the model and build its artifact; return both folders, in a dry run without an artifact the model's."""
    policy = CachePolicy(args.jit_policy)
    model_dir = _resolve(args.model, args)
    config, head = _read_model(model_dir, args)
    if args.load_format == "auto":
        require_weights(model_dir)
    max_model_len = args.max_model_len or min(config.max_position_embeddings, DEFAULT_MAX_MODEL_LEN)
    if args.cut_model_len:
        max_model_len = min(max_model_len, config.max_position_embeddings)
    if max_model_len > config.max_position_embeddings:
        raise CompileError(
            f"--max-model-len {max_model_len} is longer than the model's {config.max_position_embeddings} positions"
        )
    step_tokens = args.max_num_batched_tokens
    if step_tokens is None:
        step_tokens = GPU_STEP_TOKENS if _TARGETS[args.device] == "cuda" else CPU_STEP_TOKENS
    if step_tokens < args.max_num_seqs:
        raise CompileError(
            f"--max-num-batched-tokens {step_tokens} is less than --max-num-seqs {args.max_num_seqs}: "
            "each running sequence needs a token in each step"
        )
    quantization = args.quantization
    if quantization == "auto":
        if config.stored_fp8:
            quantization = "fp8"
        elif _TARGETS[args.device] == "cuda":
            quantization = "q0bf16"
        elif head is not None and config is head.layer:  # it takes the target's embedding as that is stored
            quantization = stored_quantization(_resolve(args.target_model, args))
        else:
            quantization = stored_quantization(model_dir)
    compile_config = CompileConfig(
        tp_size=args.tp,
        quantization=quantization,
        kernels=args.kernels,
        target=_TARGETS[args.device],
        max_model_len=max_model_len,
        max_num_batched_tokens=step_tokens,
        max_num_seqs=args.max_num_seqs,
        max_num_draft_tokens=args.max_num_draft_tokens,
        kv_cache_dtype="fp8" if args.kv_cache_dtype.startswith("fp8") else "auto",
        aux_layers=() if head is None else head.aux_layers,
    )
    if args.kv_cache_dtype == "bfloat16" and compile_config.page_dtype != "bfloat16":
        raise CompileError(
            f"--kv-cache-dtype bfloat16: KV pages of {args.kernels} kernels for {quantization} on a CPU are "
            f"{compile_config.page_dtype}; use auto, --device cuda, or --kernels portable --quantization q0bf16"
        )
    artifact_of = find_artifact if args.dry_run else build_artifact
    if head is not None and config is head.layer:
        artifact = artifact_of(head, compile_config, policy)
    else:
        compile_config.check_model(config)
        check = partial(require_tokenizer, model_dir) if args.require_tokenizer else None
        artifact = artifact_of(config, compile_config, policy, check)
    folders = {"model_dir": str(model_dir)}
    return folders if artifact is None else folders | {"artifact_dir": str(artifact)}


def main(argv: list[str] | None = None) -> int:
    """Run `convert` or `compile`; print the folders as one JSON line."""
    parser = argparse.ArgumentParser(prog="tpserve", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    add_compile_arguments(commands.add_parser("compile", help="build the library of a model for one TP degree"))
    inspect = commands.add_parser("inspect", help="fetch a draft, and say whether it is a model or an EAGLE-3 head")
    inspect.add_argument("model", help="Hugging Face folder, GGUF file or HF://org/name")
    add_cache_arguments(inspect)
    convert = commands.add_parser("convert", help="write the Hugging Face form of a GGUF file")
    convert.add_argument("model", type=Path)
    convert.add_argument("--output", type=Path, required=True, help="folder to fill; must be empty or absent")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stderr)
    try:
        if args.command == "convert":
            if args.output.exists() and (not args.output.is_dir() or any(args.output.iterdir())):
                raise CompileError(f"--output {args.output} is not an empty folder")
            args.output.mkdir(parents=True, exist_ok=True)
            with told_if_full(args.output):
                convert_to(args.model, args.output)
            folders = {"model_dir": str(args.output)}
        elif args.command == "inspect":
            folders = inspect_model(args)
        else:
            folders = compile_model(args)
    except (CompileError, OSError) as error:
        print(f"tpserve {args.command}: error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(folders))
    return 0


if __name__ == "__main__":
    sys.exit(main())

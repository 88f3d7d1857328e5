"""Weights from safetensors to GPUs: GB/s of each rank, from the page cache.

Writes a checkpoint of a Llama's shapes with random bfloat16 values, then loads it on all ranks at once, as a server
does: memory-mapped, each rank its own shard, quantised on the device where the library wants e4m3. The first of the
rounds may find pages that are still being written. Floor: one core's copy from the page cache to pinned memory, which
is measured beside it; PCIe takes what it gives. Prints one JSON object.

Run on a host with GPUs: python benchmarks/gpu_load.py --artifact FOLDER --model FOLDER --scratch FOLDER.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.gpu_decode import circumstances

from tpserve.proto.manifest import Manifest
from tpserve.proto.rank import RankConfig
from tpserve.worker.checkpoint import Checkpoint

BLOCK_BYTES = 64 << 20
DEADLINE_S = 240


def llama_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the tensors of a Llama checkpoint without biases, by name."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head_dim = config.get("head_dim") or hidden // config["num_attention_heads"]
    q, kv = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        for part, shape in {
            "input_layernorm": (hidden,),
            "self_attn.q_proj": (q, hidden),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, q),
            "post_attention_layernorm": (hidden,),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }.items():
            shapes[f"{name}.{part}.weight"] = shape
    shapes["model.norm.weight"] = (hidden,)
    if not config.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    return shapes


def write_checkpoint(folder: Path, shapes: dict[str, tuple[int, ...]]) -> int:
    """Write `model.safetensors` with bfloat16 values in (-2, 2); return its bytes of tensors."""
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    codes = np.random.default_rng(0).integers(0, 1 << 16, BLOCK_BYTES // 2, np.uint16)
    block = (codes & 0xBFFF).tobytes()  # without the exponent's first bit: finite and small
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for start in range(0, end, BLOCK_BYTES):
            file.write(block[: min(BLOCK_BYTES, end - start)])
    return end


def host_copy_gb_s(model_dir: Path) -> float:
    """Return GB/s of one core that copies the largest tensor from the page cache to ordinary memory, piece by piece."""
    checkpoint = Checkpoint(model_dir)
    name = max(llama_shapes(json.loads((model_dir / "config.json").read_text())).items(), key=lambda s: math.prod(s[1]))
    values = checkpoint.tensor(name[0]).reshape(-1).view(np.uint16)
    target = np.ones(min(len(values), 16 << 20), np.uint16)
    started = time.perf_counter()
    for first in range(0, len(values), len(target)):
        piece = values[first : first + len(target)]
        target[: len(piece)] = piece
    return values.nbytes / 1e9 / (time.perf_counter() - started)


def load(artifact: Path, model_dir: Path, rank: int, tp_size: int, rounds: int) -> list[tuple[int, float]]:
    """Load one rank's parameters on GPU `rank`; return (bytes of parameters, seconds) of each round."""
    import cupy
    import tvm
    import tvm_ffi

    from tpserve.worker.device_weights import load_device_parameters
    from tpserve.worker.library import load_cuda_runtime, load_kernels

    manifest = Manifest.load(artifact)
    config = RankConfig(
        rank=rank,
        tp_size=tp_size,
        model_dir=model_dir,
        artifact_dir=artifact,
        load_format="auto",
        num_pages=1,
        max_num_seqs=1,
        num_threads=1,
        group_name="gpu-load",
        collective_timeout_s=DEADLINE_S,
        device=rank,
    )
    cupy.cuda.Device(rank).use()
    load_cuda_runtime()
    kernels = load_kernels(artifact)
    kernels["init_device"](rank)
    stream = cupy.cuda.Stream(non_blocking=True)
    out = []
    with tvm_ffi.use_raw_stream(tvm.cuda(rank), stream.ptr), stream:
        for _ in range(rounds):
            started = time.perf_counter()
            params = load_device_parameters(manifest, config, kernels, stream, lambda done, total: None)
            out.append((sum(_num_bytes(param) for param in params), time.perf_counter() - started))
            del params
    return out


def _num_bytes(param: Any) -> int:
    itemsize = {"bfloat16": 2, "float32": 4}.get(str(param.dtype), 1)
    return itemsize * math.prod(int(size) for size in param.shape)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--artifact", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True, help="folder with a Llama's config.json")
    parser.add_argument("--scratch", type=Path, required=True, help="an empty folder with room for the checkpoint")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--commit", default="", help="of the tree that is measured")
    parser.add_argument("--output", type=Path)
    parser.set_defaults(load_format="auto")  # as the server reads a checkpoint; `circumstances` tells it
    args = parser.parse_args()
    manifest = Manifest.load(args.artifact)
    args.scratch.mkdir(parents=True, exist_ok=True)
    shutil.copy(args.model / "config.json", args.scratch)
    started = time.perf_counter()
    num_bytes = write_checkpoint(args.scratch, llama_shapes(json.loads((args.model / "config.json").read_text())))
    print(f"wrote {num_bytes / 1e9:.1f} GB in {time.perf_counter() - started:.1f} s", file=sys.stderr)
    host_copy_gb_s(args.scratch)
    copy = host_copy_gb_s(args.scratch)
    with multiprocessing.get_context("spawn").Pool(manifest.tp_size) as pool:
        jobs = [
            pool.apply_async(load, (args.artifact, args.scratch, rank, manifest.tp_size, args.rounds))
            for rank in range(manifest.tp_size)
        ]
        rounds = [job.get(DEADLINE_S) for job in jobs]
    # Ranks read bfloat16 whatever they hold: all of them together what the file has, norms and the embedding on each.
    read = num_bytes / manifest.tp_size
    result = circumstances("gpu_load", args, manifest) | {
        "weights": "random, from safetensors",
        "checkpoint_gb": num_bytes / 1e9,
        "host_copy_gb_s": copy,
        "ranks": [
            [{"held_gb": held / 1e9, "seconds": seconds, "read_gb_s": read / 1e9 / seconds} for held, seconds in rank]
            for rank in rounds
        ],
    }
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()

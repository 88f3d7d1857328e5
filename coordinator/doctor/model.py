"""Whether a model fits in the memory that is free, by its library exactly, by its folder roughly; and its texts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tpserve.coordinator.doctor.findings import Finding, Wanted
from tpserve.coordinator.doctor.nvml import NvmlError, read_gpus
from tpserve.coordinator.errors import ClusterError
from tpserve.coordinator.memory import MODE_MAX_NUM_SEQS, available_host_bytes, plan_memory
from tpserve.proto.manifest import Manifest, ManifestError

_MIB = 1 << 20
_UTILIZATION = 0.85
"""The default of --gpu-memory-utilization."""


def check_model(wanted: Wanted, available: Callable[[Wanted], int] | None = None) -> Iterator[Finding]:
    """See that weights, and the KV cache of at least one sequence of full length, fit on each rank."""
    if wanted.model is None and wanted.model_lib is None:
        return
    free = (available or _available)(wanted)
    if wanted.model_lib is not None:
        yield _by_library(wanted, wanted.model_lib, free)
    elif (Path(wanted.model or "") / "config.json").is_file():
        yield _by_folder(wanted, Path(wanted.model or ""), free)
    elif (wanted.model or "").startswith("HF://"):
        yield Finding("model", "ok", f"{wanted.model} is not here yet: its size is told once it is downloaded")
    elif (path := Path(wanted.model or "")).is_file():
        found = f"{path.name} has {path.stat().st_size // _MIB} MiB packed, {free // _MIB} MiB are free for each rank"
        yield Finding("model", "ok", found)
    else:
        remedy = "give a Hugging Face folder, a GGUF file or HF://org/name"
        yield Finding("model", "fail", f"{wanted.model} is no model folder and no file", remedy)


def check_texts(wanted: Wanted) -> Iterator[Finding]:
    """See that tokenizer, chat template, stop tokens and sampling defaults of a model folder are usable."""
    folder = Path(wanted.model or "")
    if wanted.model is None or not (folder / "config.json").is_file():
        return
    # Imported here: without a model neither Jinja nor the tokenizers' library is needed.
    from tpserve.coordinator.gateway.model import ServedModel
    from tpserve.coordinator.gateway.tokenizer import ModelFilesError

    try:
        served = ServedModel.load(folder)
    except ModelFilesError as error:
        yield _failed("texts", error)
        return
    chats = "no chat template: it answers completions only" if served.chat_template is None else "a chat template"
    stops = ", ".join(map(str, served.stop_token_ids)) or "none"
    yield Finding("texts", "ok", f"a tokenizer, {chats}; stop tokens: {stops}")


def _failed(check: str, error: Exception) -> Finding:
    """Split a message into what was found and, behind its last colon, the remedy."""
    found, _, remedy = str(error).rpartition(": ")
    return Finding(check, "fail", found, remedy)


def _by_library(wanted: Wanted, folder: Path, free: int) -> Finding:
    try:
        manifest = Manifest.load(folder)
        manifest.require(tp_size=wanted.tp_size)
        plan = plan_memory(manifest, wanted.mode, MODE_MAX_NUM_SEQS[wanted.mode], _UTILIZATION, free)
    except (ManifestError, ClusterError) as error:
        return _failed("model", error)
    tokens = plan.num_pages * manifest.kv.page_size
    return Finding(
        "model",
        "ok",
        f"{plan.total_bytes // _MIB} MiB for each rank of {free // _MIB} free: {plan.parameter_bytes // _MIB} of "
        f"parameters, {plan.kv_bytes // _MIB} of KV cache ({tokens} tokens)",
    )


def _by_folder(wanted: Wanted, folder: Path, free: int) -> Finding:
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        heads = config["num_attention_heads"]
        head_dim = config.get("head_dim") or config["hidden_size"] // heads
        kv_heads = -(-config.get("num_key_value_heads", heads) // wanted.tp_size)  # of one rank, replicated if fewer
        item_bytes = 4 if wanted.device == "cpu" else 2
        kv = config["num_hidden_layers"] * kv_heads * 2 * head_dim * config["max_position_embeddings"] * item_bytes
    except (OSError, ValueError, KeyError, TypeError) as error:
        return Finding("model", "fail", f"{folder}/config.json: {type(error).__name__}: {error}", "download it again")
    weights = sum(path.stat().st_size for path in folder.glob("*.safetensors")) // wanted.tp_size
    budget = int(free * _UTILIZATION)
    found = (
        f"about {weights // _MIB} MiB of weights and {kv // _MIB} MiB of KV cache for one sequence of "
        f"{config['max_position_embeddings']} tokens on each rank, {budget // _MIB} MiB may be used"
    )
    if weights + kv <= budget:
        return Finding("model", "ok", found)
    if weights < budget:
        return Finding("model", "warn", found, "lower --max-model-len, or raise --tp")
    return Finding("model", "fail", found, "raise --tp, take --quantization fp8, or free memory")


def _available(wanted: Wanted) -> int:
    """Return what one rank may count on, in bytes; on CPUs a draft's own ranks have their share, too."""
    if wanted.device != "cpu":
        try:
            found = read_gpus()
        except NvmlError:
            found = None  # told by the check of GPUs
        if found is not None and len(found.gpus) >= wanted.tp_size:
            return min(gpu.total_bytes - gpu.used_bytes for gpu in found.gpus[: wanted.tp_size])
    return available_host_bytes() // wanted.num_ranks

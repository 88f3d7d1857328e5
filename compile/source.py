"""What the user calls MODEL, brought to a Hugging Face folder on this machine."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Literal

from tpserve.compile.cache import CachePolicy, cache_root, cached_folder
from tpserve.compile.errors import CacheError, CheckpointError
from tpserve.compile.progress import progress_bar
from tpserve.proto.manifest import sha256_file

HUB_PREFIX = "HF://"


def resolve_model(model: str, *, model_policy: CachePolicy, download_policy: CachePolicy) -> Path:
    """Return the Hugging Face folder of a folder, a GGUF file or `HF://org/name`.

    Raises
    ------
    CheckpointError
        If there is no such model, the hub cannot be reached, or the file cannot be converted.
    CacheError
        If the policy forbids a download or a conversion that is needed.
    """
    if model.startswith(HUB_PREFIX):
        return _from_hub(model, download_policy)
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise CheckpointError(f"{path} has no config.json: give a Hugging Face model folder or a GGUF file")
        return path.resolve()
    if path.is_file():
        if path.suffix != ".gguf":
            raise CheckpointError(f"{path} is a file but not .gguf: give a Hugging Face model folder or a GGUF file")
        return _from_gguf(path, model_policy)
    raise CheckpointError(f"model {model!r} does not exist: give a folder, a GGUF file or {HUB_PREFIX}org/name")


def _from_hub(model: str, policy: CachePolicy) -> Path:
    # Imported here: a local model must not pay for the hub client.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    name = model.removeprefix(HUB_PREFIX).strip("/")
    cache = cache_root() / "hub"
    files = ["*.json", "*.safetensors", "*.jinja"]
    try:
        return Path(
            snapshot_download(
                name,
                cache_dir=cache,
                allow_patterns=files,
                local_files_only=policy is CachePolicy.READONLY,
                force_download=policy in (CachePolicy.REDO, CachePolicy.OFF),
            )
        )
    except HFValidationError as error:
        raise CheckpointError(f"{model!r} is no hub name ({error}): write {HUB_PREFIX}org/name") from None
    except RepositoryNotFoundError:
        raise CheckpointError(f"the hub has no public model {name!r}: check the name, or set HF_TOKEN") from None
    except LocalEntryNotFoundError as error:
        if policy is CachePolicy.READONLY:
            raise CacheError(f"{name} is not in {cache} and the download policy is READONLY") from None
        raise CheckpointError(
            f"cannot download {name}: the hub is not reachable ({error.__cause__ or error})"
        ) from None
    except (HfHubHTTPError, OSError) as error:
        raise CheckpointError(f"cannot download {name}: {error}") from None


def convert_to(source: Path, folder: Path) -> None:
    """Convert a GGUF file into `folder`, with a progress bar."""
    # The GGUF reader is not needed to serve a folder.
    from tpserve.compile.gguf import convert_gguf

    with progress_bar(f"Converting {source.name}") as progress:
        convert_gguf(source, folder, progress)


def _from_gguf(path: Path, policy: CachePolicy) -> Path:
    converter = Path(__file__).with_name("gguf.py")
    key = hashlib.sha256(f"{sha256_file(path)} {sha256_file(converter)}".encode()).hexdigest()
    return cached_folder("model", key, policy, lambda folder: convert_to(path, folder))


def stored_quantization(model_dir: Path) -> Literal["q0f32", "q0bf16"]:
    """Return the weight storage that keeps the checkpoint's values exact: bfloat16 only if it is in bfloat16."""
    raw = json.loads((model_dir / "config.json").read_text())
    dtype = raw.get("dtype", raw.get("torch_dtype"))
    return "q0bf16" if dtype == "bfloat16" else "q0f32"


def require_weights(model_dir: Path) -> None:
    """Check that the folder holds safetensors that can be opened.

    Raises
    ------
    CheckpointError
        Naming the file that is missing or corrupt.
    """
    from safetensors import SafetensorError, safe_open

    index = model_dir / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{index} is corrupt: {error}") from None
    else:
        names = ["model.safetensors"]
    for name in names:
        path = model_dir / name
        if not os.access(path, os.R_OK):
            raise CheckpointError(f"{path} is missing or not readable: weights are read from safetensors")
        try:
            with safe_open(path, framework="numpy"):
                pass
        except SafetensorError as error:
            raise CheckpointError(f"{path} is corrupt ({error}): fetch it again") from None


def require_tokenizer(model_dir: Path) -> None:
    """Check that the folder holds a tokenizer that can be loaded, which takes a quarter of a second.

    Raises
    ------
    CheckpointError
        Naming the file that is missing or cannot be loaded.
    """
    from tokenizers import Tokenizer

    path = model_dir / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: put the model's tokenizer beside its config.json")
    try:
        Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"{path} cannot be loaded ({error}): put the model's tokenizer there") from None

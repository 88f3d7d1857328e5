"""What can be known of the CUDA kernel library without nvcc or a GPU."""

from __future__ import annotations

import importlib
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tiny_models import MODELS
from tpserve.compile import native_cuda
from tpserve.compile.artifact import buffer_bytes
from tpserve.compile.config import CompileConfig, ModelConfig
from tpserve.compile.kernels.cuda import sizes
from tpserve.compile.sharding import shard
from tpserve.proto.nvcc import find_nvcc


def test_the_library_names_all_its_kernels() -> None:
    text = {path.name: path.read_text() for path in native_cuda.CUDA_KERNEL_SOURCES}
    export = re.compile(r"^TVM_FFI_DLL_EXPORT_TYPED_FUNC\((\w+),", re.MULTILINE)
    exported = {name for source in text.values() for name in export.findall(source)}
    listed = set(re.findall(r'"(\w+)"', text["library.cu"].partition("kernel_names() {")[2].partition("}")[0]))
    for_the_worker = {"kernel_names", "init_device", "pack_weight", "attention_plan_size", "attention_plans"}
    for_the_worker |= {"attention_workspace_size"}
    for_the_worker |= {"load_last_tokens", "store_last_tokens", "scatter_pages", "device_address", "join_columns"}
    for_the_worker |= {"push_clear", "push_create", "push_workspace_bytes"}
    for_the_worker |= {"link_bytes", "link_clear", "link_create"}
    for_the_worker |= {"speculation_load", "speculation_accept", "note_time"}
    for_the_worker |= {
        "draft_begin",
        "draft_later",
        "draft_lookup",
        "draft_prompts",
        "draft_store",
        "draft_suffix",
        "keep_suffix",
    }
    for_the_worker |= {"head_begin", "head_pairs", "head_keep", "spread_logits"}
    assert listed == exported - for_the_worker


def test_buffers_grow_with_the_batch() -> None:
    assert sizes.attention_plan_size(1, 64, decode_only=False) == 16 + 12 * 33
    assert sizes.attention_plan_size(1, 64, decode_only=True) == 16 + 12 * 32
    assert sizes.attention_plan_size(3, 2, decode_only=True) == 16 + 12 * (2 * 32 + 1)
    assert sizes.attention_workspace_size(64, 64, 16, 2, 128) == 64 * 8 * 32 * 2 * 132
    # A slot never has more rows of decoding than one tile, however many tokens the step has.
    most = sizes.attention_workspace_size(4096, 64, 16, 2, 128)
    assert most == sizes.attention_workspace_size(8192, 64, 16, 2, 128)


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(
        native_cuda.CudaBuildError, match=r"nvcc was not found in .*CUDA_HOME.*pip install .tpserve\[nvcc\]"
    ):
        native_cuda.build_cuda_library(native_cuda.CUDA_KERNEL_SOURCES, tmp_path / "kernels.so")


def test_the_compiler_of_pips_packages_is_the_last_that_is_taken(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert find_nvcc() is None
    packaged = {version: tmp_path / "site" / "nvidia" / version / "bin" / "nvcc" for version in ("cu12", "cu13")}
    for nvcc in (*packaged.values(), tmp_path / "bin" / "nvcc"):
        nvcc.parent.mkdir(parents=True)
    for nvcc in packaged.values():
        nvcc.touch(0o755)
    importlib.invalidate_caches()
    monkeypatch.delitem(sys.modules, "nvidia", raising=False)
    assert find_nvcc() == packaged["cu13"]
    (tmp_path / "bin" / "nvcc").touch(0o755)
    assert find_nvcc() == tmp_path / "bin" / "nvcc"


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_a_library_is_machine_code_alone(tmp_path: Path) -> None:
    """Nothing is compiled when it is loaded, on the GPU's host: there is no PTX in it, and no compiler is asked for."""
    source, library = tmp_path / "small.cu", tmp_path / "kernels.so"
    source.write_text("__global__ void add(float* x) { x[threadIdx.x] += 1.0f; }\n")
    native_cuda.build_cuda_library([source], library)
    kinds = list(_fat_binary_kinds(library.read_bytes()))
    assert kinds
    assert set(kinds) == {_MACHINE_CODE}
    needed = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, timeout=60, check=True).stdout
    assert "nvrtc" not in needed


_MAGIC = struct.pack("<I", 0xBA55ED50)
_MACHINE_CODE = 2
"""1 is PTX."""


def _fat_binary_kinds(data: bytes) -> Iterator[int]:
    """Yield the kind of every entry of every fat binary: header of 16 bytes, then entries with headers of their own."""
    begin = 0
    while (begin := data.find(_MAGIC, begin)) >= 0:
        _, _, header, size = struct.unpack_from("<IHHQ", data, begin)
        at, end = begin + header, begin + header + size
        while at < end:
            kind, _, entry_header, entry_size = struct.unpack_from("<HHIQ", data, at)
            yield kind
            at += entry_header + entry_size
        begin += len(_MAGIC)


def test_a_gpu_rank_counts_what_it_keeps_besides_activations(tmp_path: Path) -> None:
    MODELS["llama_9q_3kv_tied"].write(tmp_path)
    model = ModelConfig.from_hf(tmp_path)

    def kept(**changes: Any) -> int:
        fields = {"tp_size": 1, "quantization": "q0bf16", "kernels": "tuned", "target": "cuda", "max_model_len": 64}
        config = CompileConfig(**{**fields, "max_num_batched_tokens": 32, "max_num_seqs": 4, **changes})
        return buffer_bytes(model, config, shard(model, config.tp_size))

    rows = 4 * 4 * (-(-model.vocab_size // 16) * 16)  # logits of four sequences
    assert kept() > 4 * sizes.attention_workspace_size(32, 4, 9, 3, model.head_dim) + rows
    assert kept(max_num_draft_tokens=3) == kept() + 3 * rows
    assert kept(tp_size=2) > kept() / 2 + sizes.push_workspace_bytes(2, model.hidden_size)
    assert kept(target="llvm", quantization="q0f32") == 0

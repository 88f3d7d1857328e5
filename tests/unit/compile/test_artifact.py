"""Artifacts: what the folder holds, and what makes it another one."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from rank_group import Artifacts
from tiny_models import MODELS
from tpserve.compile import artifact, native
from tpserve.compile.artifact import build_artifact, find_artifact, input_hash, kernel_library
from tpserve.compile.cache import CachePolicy
from tpserve.compile.config import CompileConfig, ModelConfig
from tpserve.compile.errors import CacheError, CheckpointError
from tpserve.proto.host import cpu_features
from tpserve.proto.manifest import Manifest

CONFIG = CompileConfig(
    tp_size=2,
    quantization="q0f32",
    kernels="portable",
    target="llvm",
    max_model_len=64,
    max_num_batched_tokens=32,
    max_num_seqs=4,
)


@pytest.fixture
def model(tmp_path: Path) -> ModelConfig:
    MODELS["llama_9q_3kv_tied"].write(tmp_path / "model")
    return ModelConfig.from_hf(tmp_path / "model")


def test_the_folder_holds_what_the_manifest_says(
    artifacts: Artifacts, model: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TPSERVE_HOME", str(artifacts.home))
    folder = build_artifact(model, CONFIG, CachePolicy.ON)
    assert sorted(path.name for path in folder.iterdir()) == ["kernels.so", "manifest.json", "model.so"]
    manifest = Manifest.load(folder)
    assert (manifest.tp_size, manifest.num_q_heads, manifest.kv.num_kv_heads) == (2, 6, 2)
    assert (manifest.vocab_size, manifest.padded_vocab_size) == (200, 224)
    assert manifest.model_config_sha256 == model.sha256
    assert manifest.input_hash == folder.name == input_hash(model, CONFIG)
    assert manifest.target == {"kind": "llvm", "cpu_features": cpu_features()}
    assert set(manifest.externs) == {"tpserve.all_gather", "tpserve.all_reduce"}
    assert manifest.workspace_bytes > 32 * model.hidden_size * 4
    assert manifest.params[0].sources[0].name == "model.embed_tokens.weight"
    assert build_artifact(model, CONFIG, CachePolicy.READONLY) == folder
    with pytest.raises(CacheError, match="READONLY"):
        build_artifact(model, replace(CONFIG, tp_size=1), CachePolicy.READONLY)
    # The same library again, with the kernels that were there.
    before, kernels = (folder / "kernels.so").read_bytes(), set((artifacts.home / "kernels").glob("[!.]*"))
    assert build_artifact(model, CONFIG, CachePolicy.REDO) == folder
    assert Manifest.load(folder) == replace(manifest, files=Manifest.load(folder).files)
    assert (folder / "kernels.so").read_bytes() == before
    assert set((artifacts.home / "kernels").glob("[!.]*")) == kernels  # what is being built there has a dot before it


def test_policy_off_leaves_the_artifact_and_nothing_else(
    model: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, scratch = tmp_path / "home", tmp_path / "scratch"
    scratch.mkdir()
    source = tmp_path / "kernel.cc"  # a short one: what kernels are is nothing to where they are built
    source.write_text('extern "C" int answer() { return 42; }\n')
    monkeypatch.setenv("TPSERVE_HOME", str(home))
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    monkeypatch.setattr(native, "CPU_KERNEL_SOURCES", (source,))
    folder = build_artifact(model, CONFIG, CachePolicy.OFF)
    assert sorted(path.name for path in folder.iterdir()) == ["kernels.so", "manifest.json", "model.so"]
    assert Manifest.load(folder).tp_size == 2
    assert list(scratch.iterdir()) == [folder]
    assert not home.exists()
    # Kernels that are there need not be built again, and stay.
    kernels = kernel_library("llvm", CachePolicy.ON)
    kernels.write_bytes(kernels.read_bytes() + b"those of the cache")
    again = build_artifact(model, CONFIG, CachePolicy.OFF)
    assert (again / "kernels.so").read_bytes() == kernels.read_bytes()
    assert sorted(scratch.iterdir()) == sorted([folder, again])
    assert [path for path in home.rglob("*") if path.is_file()] == [kernels]


def test_what_must_hold_is_looked_at_before_a_build_and_only_then(
    artifacts: Artifacts, model: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails() -> None:
        raise CheckpointError("no tokenizer")

    monkeypatch.setenv("TPSERVE_HOME", str(artifacts.home))
    folder = build_artifact(model, CONFIG, CachePolicy.ON)
    assert build_artifact(model, CONFIG, CachePolicy.ON, fails) == folder, "a library that is there needs no check"
    monkeypatch.setattr(artifact, "_build", lambda *arguments: pytest.fail("it was built"))
    for config, policy in ((replace(CONFIG, tp_size=1), CachePolicy.ON), (CONFIG, CachePolicy.REDO)):
        with pytest.raises(CheckpointError, match="no tokenizer"):
            build_artifact(model, config, policy, fails)
        with pytest.raises(CheckpointError, match="no tokenizer"):
            find_artifact(model, config, policy, fails)
        assert find_artifact(model, config, policy) is None
    assert find_artifact(model, CONFIG, CachePolicy.READONLY, fails) == folder
    assert folder.is_dir()


@pytest.mark.parametrize(
    "change",
    [
        lambda model, config: (replace(model, sha256="other"), config),
        lambda model, config: (replace(model, rope_theta=5e5), config),
        lambda model, config: (model, replace(config, tp_size=4)),
        lambda model, config: (model, replace(config, quantization="q0bf16")),
        lambda model, config: (model, replace(config, kernels="tuned")),
        lambda model, config: (model, replace(config, max_num_batched_tokens=33)),
    ],
)
def test_whatever_changes_the_library_changes_its_hash(
    model: ModelConfig, change: Callable[[ModelConfig, CompileConfig], tuple[ModelConfig, CompileConfig]]
) -> None:
    assert input_hash(model, CONFIG) == input_hash(model, CONFIG)
    assert input_hash(*change(model, CONFIG)) != input_hash(model, CONFIG)


def test_the_hash_covers_the_machine_the_kernels_and_the_toolchain(
    model: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashes = {input_hash(model, CONFIG)}
    for where, name, value in (
        (artifact, "cpu_features", lambda: "z80"),
        (artifact, "version", lambda package: "0.0"),
        (native, "compiler_version", lambda: "g++ 1"),
        (native, "source_hash", lambda sources: "0"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, value)
            hashes.add(input_hash(model, CONFIG))
    assert len(hashes) == 5

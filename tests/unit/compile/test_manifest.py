"""The manifest: what is written is read, and what does not fit is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tiny_models import MODELS
from tpserve.proto.manifest import FORMAT_VERSION, MANIFEST_NAME, Manifest, ManifestError, sha256_file
from worker_builders import make_manifest

Change = Callable[[dict[str, Any]], object]


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    """Saved in tmp_path/lib, with one file."""
    MODELS["llama_9q_3kv_tied"].write(tmp_path / "model")
    folder = tmp_path / "lib"
    folder.mkdir()
    (folder / "model.so").write_bytes(b"code")
    made = make_manifest(tmp_path / "model", 8)
    params = tuple(replace(spec, interleave=8 * (".gate_up_proj" in spec.name)) for spec in made.params)
    files = {"model.so": sha256_file(folder / "model.so")}
    manifest = replace(made, files=files, params=params, compiler={"c": "1"})
    manifest.save(folder)
    return manifest


def test_what_is_written_is_read(tmp_path: Path, manifest: Manifest) -> None:
    assert Manifest.load(tmp_path / "lib") == manifest
    assert any(None in rank for rank in manifest.splits["q_heads"].ranks), "blocks of zeros make the trip too"
    assert {spec.interleave for spec in manifest.params} == {0, 8}
    assert manifest.kv.page_bytes == 2 * 1 * 2 * 16 * 16 * 4


def test_a_missing_manifest_or_file_is_named(tmp_path: Path, manifest: Manifest) -> None:
    with pytest.raises(ManifestError, match=r"manifest\.json is missing: compile the model again"):
        Manifest.load(tmp_path)
    (tmp_path / "lib/model.so").unlink()
    with pytest.raises(ManifestError, match=r"model\.so is missing: compile again"):
        Manifest.load(tmp_path / "lib")
    assert Manifest.load(tmp_path / "lib", verify_files=False) == manifest


def test_a_changed_file_is_named_with_both_hashes(tmp_path: Path, manifest: Manifest) -> None:
    (tmp_path / "lib/model.so").write_bytes(b"c0de")
    expected = manifest.files["model.so"]
    with pytest.raises(ManifestError, match=rf"model\.so has sha256 \w+, the manifest says {expected}: compile again"):
        Manifest.load(tmp_path / "lib")


@pytest.mark.parametrize("text", ["", "{", '{"format_version": 1', "\x00"])
def test_broken_json_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST_NAME).write_text(text)
    with pytest.raises(ManifestError, match=r"manifest\.json is not valid JSON .*: compile again"):
        Manifest.load(tmp_path)


@pytest.mark.parametrize("text", ["[]", "3", "{}", '{"format_version": 99}', '{"format_version": "1"}'])
def test_another_format_version_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST_NAME).write_text(text)
    with pytest.raises(ManifestError, match=rf"format version \S+, this worker reads {FORMAT_VERSION}: compile again"):
        Manifest.load(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda raw: raw.pop("kv"),
        lambda raw: raw.pop("tp_size"),
        lambda raw: raw.update(extra=1),
        lambda raw: raw.update(kv={"page_size": 16}),
        lambda raw: raw.update(splits=[]),
        lambda raw: raw["splits"]["ffn"].pop("size"),
        lambda raw: raw.update(params=[{"name": "x"}]),
        lambda raw: raw.update(rope_inv_freq=None),
        lambda raw: raw.update(files=["model.so"]),
    ],
)
def test_malformed_fields_are_refused(tmp_path: Path, manifest: Manifest, change: Change) -> None:
    path = tmp_path / "lib" / MANIFEST_NAME
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))
    with pytest.raises(ManifestError, match=r"manifest\.json is malformed \(.*\): compile again"):
        Manifest.load(tmp_path / "lib")


def test_kv_pages_of_another_type_than_asked_for_are_named(manifest: Manifest) -> None:
    manifest.require_kv_dtype("float32")
    with pytest.raises(ManifestError, match=r"asks for KV pages of float8_e4m3fn, the library has float32: compile it"):
        manifest.require_kv_dtype("float8_e4m3fn")


def test_every_difference_is_named_with_both_values(manifest: Manifest) -> None:
    manifest.require(tp_size=8, model_type="llama")
    with pytest.raises(ManifestError) as caught:
        manifest.require(tp_size=2, model_config_sha256="other", model_type="llama")
    message = str(caught.value)
    assert "tp_size is 8 in the library and 2 in the configuration" in message
    assert "model_config_sha256 is" in message
    assert "model_type" not in message
    assert message.endswith("compile again for this configuration")

"""A server that cannot start says why in one line, ends with a non-zero exit code and leaves nothing behind."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from patience import patient
from server import REPOSITORY, Outcome, json_line, run_cli

QUICK_S = 60
"""No failure may take longer, on a busy machine."""


def serve(folder: Path, *arguments: str | Path, **environ: str) -> Outcome:
    return run_cli("serve", *arguments, "--port", "0", folder=folder, environ=environ, within_s=QUICK_S)


def linked(source: Path, target: Path, *names: str) -> Path:
    """Make a model folder with some files of another."""
    target.mkdir()
    for name in names:
        (target / name).symlink_to(source / name)
    return target


TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


def test_missing_model(tmp_path: Path) -> None:
    error = serve(tmp_path, "nowhere/model.gguf").only_error()
    assert "'nowhere/model.gguf' does not exist" in error


def test_fewer_gpus_than_ranks(tmp_path: Path, tiny_folder: Path) -> None:
    tool = tmp_path / "bin" / "nvidia-smi"  # its answer is all that is read of it
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\necho 81000\n")
    tool.chmod(0o755)
    path = f"{tool.parent}:{os.environ['PATH']}"
    error = serve(tmp_path, tiny_folder, "--tp", "2", PATH=path).only_error()
    assert "--tp 2: this host has 1 GPUs; lower --tp or use --device cpu" in error
    draft = ("--draft-model", tiny_folder, "--draft-placement", "dedicated", "--draft-tp", "2")
    error = serve(tmp_path, tiny_folder, *draft, "--device", "cuda", PATH=path).only_error()
    assert (
        "--device cuda --tp 1 --draft-placement dedicated --draft-tp 2: this host has 1 GPUs; lower --tp, give" in error
    )
    assert "--draft-placement colocated, or use --device cpu" in error


def test_corrupt_gguf(tmp_path: Path, demo_model: Path) -> None:
    data = demo_model.read_bytes()
    for name, content in {
        "noise": bytes(range(256)) * 64,
        "empty": b"",
        "header": data[:1000],
        "cut": data[: len(data) // 2],
    }.items():
        path = tmp_path / f"{name}.gguf"
        path.write_bytes(content)
        assert path.name in serve(tmp_path, path).only_error()


def test_corrupt_safetensors(tmp_path: Path, tiny_folder: Path) -> None:
    folder = linked(tiny_folder, tmp_path / "model", "config.json", *TEXT_FILES)
    assert "model.safetensors is missing" in serve(tmp_path, folder).only_error()
    (folder / "model.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00not a header at all")
    assert "model.safetensors is corrupt" in serve(tmp_path, folder).only_error()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"model_type": "lla', "not valid JSON"),
        ("[]", "expected an object"),
        ('{"model_type": "mamba"}', "'mamba' is not one of llama, mistral, qwen2, qwen3"),
        ('{"model_type": "llama"}', "has no 'num_attention_heads'"),
    ],
)
def test_config_that_cannot_be_served(tmp_path: Path, tiny_folder: Path, content: str, reason: str) -> None:
    folder = linked(tiny_folder, tmp_path / "model", *TEXT_FILES)
    (folder / "config.json").write_text(content)
    assert reason in serve(tmp_path, folder, "--load-format", "dummy").only_error()


def test_folder_without_a_model(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "has no config.json" in serve(tmp_path, tmp_path / "empty").only_error()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "tokenizer.json is missing: put the model's tokenizer beside its config.json"),
        ('{"model": {}}', "tokenizer.json cannot be loaded"),
    ],
)
@pytest.mark.parametrize("command", ["serve", "chat"])
def test_folder_without_a_usable_tokenizer(
    tmp_path: Path, tiny_folder: Path, command: str, content: str | None, reason: str
) -> None:
    folder = linked(tiny_folder, tmp_path / "model", "config.json")
    if content is not None:
        (folder / "tokenizer.json").write_text(content)
    assert reason in told_before_a_build(command, folder, tmp_path)


@pytest.mark.parametrize(
    ("command", "name", "content"),
    [
        ("serve", "chat_template.jinja", "{% if %}"),
        ("serve", "tokenizer_config.json", '{"chat_template": "{% if %}"}'),
        ("chat", "chat_template.jinja", "{% if %}"),
    ],
)
def test_folder_with_a_broken_chat_template(
    tmp_path: Path, tiny_folder: Path, command: str, name: str, content: str
) -> None:
    folder = linked(tiny_folder, tmp_path / "model", "config.json", "tokenizer.json")
    (folder / name).write_text(content)
    reason = (
        f"{name}: the chat template does not compile (line 1: Expected an expression, got 'end of statement block')"
    )
    error = told_before_a_build(command, folder, tmp_path)
    assert reason in error
    assert f": fetch it again, or write another template to {folder / 'chat_template.jinja'}" in error


def test_folder_with_unusable_defaults_of_sampling(tmp_path: Path, tiny_folder: Path) -> None:
    folder = linked(tiny_folder, tmp_path / "model", "config.json", "tokenizer.json")
    (folder / "generation_config.json").write_text('{"top_p": 7}')
    error = told_before_a_build("serve", folder, tmp_path)
    assert f"{folder / 'generation_config.json'}: top_p is 7: it must lie in [0, 1]" in error


def told_before_a_build(command: str, folder: Path, tmp_path: Path) -> str:
    """Return the error of a server, or of a chat that would start one, for which nothing may be compiled."""
    home, log = tmp_path / "home", tmp_path / "engine.log"
    flags = ("--port", "0") if command == "serve" else ("--log-file", log)
    outcome = run_cli(
        command,
        folder,
        *("--load-format", "dummy", *flags),
        folder=tmp_path,
        environ={"TPSERVE_HOME": str(home)},
        within_s=QUICK_S,
    )
    assert "Compiling" not in outcome.stderr + (log.read_text() if log.exists() else "")
    assert not list(home.glob("lib/[!.]*")), "told before anything is compiled"
    return outcome.only_error()


def test_folder_without_usable_texts_beside_its_library(tmp_path: Path, tiny_folder: Path) -> None:
    sizes = ("--load-format", "dummy", "--max-num-seqs", "4", "--max-num-batched-tokens", "256")
    library = json_line(run_cli("compile", tiny_folder, *sizes, folder=tmp_path).stdout)["artifact_dir"]
    folder = linked(tiny_folder, tmp_path / "model", "config.json")
    outcome = serve(tmp_path, folder, *sizes, "--model-lib", library)
    assert "tokenizer.json is missing: put the model's tokenizer beside its config.json" in outcome.only_error()
    assert "Estimated total memory" not in outcome.stderr, "told before anything is planned or started"
    (folder / "tokenizer.json").symlink_to(tiny_folder / "tokenizer.json")
    (folder / "chat_template.jinja").write_text("{% if %}")
    for flags in (("--model-lib", library), ()):  # and with the same library out of the cache
        outcome = serve(tmp_path, folder, *sizes, *flags)
        assert "chat_template.jinja: the chat template does not compile" in outcome.only_error()
        assert "Estimated total memory" not in outcome.stderr


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (("--tp", "3"), "3"),
        (("--max-model-len", "513"), "--max-model-len 513 is longer than the model's 512 positions"),
        (("--max-num-seqs", "16", "--max-num-batched-tokens", "8"), "--max-num-batched-tokens 8 is less"),
        (("--gpu-memory-utilization", "0.00001"), "raise --gpu-memory-utilization"),
        (("--gpu-memory-utilization", "0"), "0.0 is not in (0, 1]"),
        (("--max-num-seqs", "0"), "0 is not 1 or more"),
        (("--port", "70000"), "--port 70000 is not in 0..65535"),
        (("--host", "203.0.113.7"), "cannot listen on 203.0.113.7:0"),
        (("--host", "no.such.host.invalid"), "cannot listen on no.such.host.invalid:0"),
        (("--device", "cuda"), "--device cuda"),
    ],
)
def test_flags_that_cannot_work(tmp_path: Path, tiny_folder: Path, flags: tuple[str, ...], reason: str) -> None:
    outcome = run_cli("serve", tiny_folder, "--load-format", "dummy", "--port", "0", *flags, folder=tmp_path)
    assert reason in outcome.only_error()


def test_busy_port(tmp_path: Path, tiny_folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        outcome = run_cli("serve", tiny_folder, "--load-format", "dummy", "--port", str(port), folder=tmp_path)
    assert f"cannot listen on 127.0.0.1:{port}" in outcome.only_error()
    assert "Compiling" not in outcome.stderr
    assert "cached lib" not in outcome.stderr, "a busy port is seen before anything is built"


def test_tampered_artifact(tmp_path: Path, tiny_folder: Path) -> None:
    home = tmp_path / "home"
    (home / "lib").mkdir(parents=True)
    flags = (tiny_folder, "--load-format", "dummy", "--max-num-batched-tokens", "512")
    compiled = run_cli("compile", *flags, folder=tmp_path)
    original = Path(json_line(compiled.stdout)["artifact_dir"])
    artifact = home / "lib" / original.name
    manifest = json.loads((original / "manifest.json").read_text())

    def outcome() -> str:
        return serve(tmp_path, *flags, TPSERVE_HOME=str(home)).only_error()

    shutil.copytree(original, artifact)
    (artifact / "model.so").write_bytes((original / "model.so").read_bytes() + b"\0")
    assert "model.so has sha256" in outcome()
    shutil.copyfile(original / "model.so", artifact / "model.so")
    (artifact / "manifest.json").write_text(json.dumps(manifest | {"tp_size": 2}))
    error = outcome()
    assert "tp_size is 2 in the library and 1 in the configuration" in error
    (artifact / "manifest.json").write_text(json.dumps(manifest | {"format_version": 999}))
    assert "format version 999" in outcome()
    (artifact / "manifest.json").write_text("{")
    assert "manifest.json is not valid JSON" in outcome()
    (artifact / "kernels.so").unlink()
    (artifact / "manifest.json").write_text(json.dumps(manifest))
    assert "kernels.so is missing" in outcome()


def test_kv_pages_of_fp8_on_a_cpu(tmp_path: Path, tiny_folder: Path) -> None:
    flags = ("--load-format", "dummy", "--device", "cpu", "--kv-cache-dtype", "fp8")
    error = serve(tmp_path, tiny_folder, *flags).only_error()
    assert "KV pages of a CPU's tuned kernels are float32, not fp8: use --device cuda, --kernels portable" in error
    sizes = ("--max-num-seqs", "4", "--max-num-batched-tokens", "256")
    compiled = run_cli("compile", tiny_folder, "--load-format", "dummy", *sizes, folder=tmp_path)
    library = json_line(compiled.stdout)["artifact_dir"]
    error = serve(tmp_path, tiny_folder, *flags, *sizes, "--model-lib", library).only_error()
    assert "--kv-cache-dtype asks for KV pages of float8_e4m3fn, the library has float32: compile it again" in error


@pytest.fixture(scope="module")
def unshare() -> tuple[str, ...]:
    """Return the command that runs another where it may mount file systems that nobody else sees."""
    found: tuple[str, ...] = ("unshare", "--mount") if os.geteuid() == 0 else ("unshare", "--map-root-user", "--mount")
    if shutil.which("unshare") is None or subprocess.run([*found, "true"], check=False).returncode != 0:
        pytest.skip("no mount namespaces here: the disk cannot be made small")
    return found


@pytest.mark.parametrize("what", ["model", "library"])
def test_full_disk_under_the_cache(
    tmp_path: Path, tiny_folder: Path, demo_model: Path, unshare: tuple[str, ...], what: str
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    small = (*unshare, "sh", "-c", 'mount -t tmpfs -o size=64k tmpfs "$0" && exec "$@"', str(home))
    model = (demo_model,) if what == "model" else (tiny_folder, "--load-format", "dummy")
    environ = {"TPSERVE_HOME": str(home)}
    outcome = run_cli("serve", *model, "--port", "0", folder=tmp_path, environ=environ, within_s=QUICK_S, prefix=small)
    error = outcome.only_error()
    assert f"no space left on the disk of {home}" in error
    assert "set TPSERVE_HOME" in error


def test_full_disk_under_ray(tmp_path: Path, tiny_folder: Path, cache_home: Path, unshare: tuple[str, ...]) -> None:
    flags = ("--load-format", "dummy", "--max-num-batched-tokens", "512")
    model = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    assert run_cli("compile", model, *flags, folder=tmp_path).code == 0
    # Ray's folder is in /tmp, and so may be this checkout and this test's folder: those are seen there all the same.
    needed = (REPOSITORY, Path(sys.executable), tmp_path, cache_home)
    kept = sorted({path.parts[2] for path in needed if path.is_relative_to("/tmp")})
    binds = "".join(f" && mkdir /tmp/{name} && mount --rbind /mnt/{name} /tmp/{name}" for name in kept)
    script = f'mount --rbind /tmp /mnt && mount -t tmpfs -o size=16k tmpfs /tmp{binds} && cd / && exec "$@"'
    outcome = run_cli(
        "serve",
        model,
        *flags,
        "--port",
        "0",
        folder=tmp_path,
        environ={"TPSERVE_HOME": str(cache_home)},
        within_s=QUICK_S,
        prefix=(*unshare, "sh", "-c", script, "sh"),
    )
    assert "Ray cannot be started: the disk of /tmp has 16 KiB left; free 16 MiB or more" in outcome.only_error()
    assert outcome.duration_s < patient(40)


def test_worker_that_cannot_start(tmp_path: Path, tiny_folder: Path) -> None:
    folder = linked(tiny_folder, tmp_path / "model", "config.json", *TEXT_FILES)
    weights = {"model.embed_tokens.weight": np.zeros((49152, 64), np.float32)}
    save_file(weights, folder / "model.safetensors")
    error = serve(tmp_path, folder, "--tp", "2").only_error()
    assert "cannot start" in error
    assert "the checkpoint has no tensor" in error
    weights["model.embed_tokens.weight"] = np.zeros((49152, 32), np.float32)
    save_file(weights, folder / "model.safetensors")
    outcome = serve(tmp_path, folder)
    assert "the checkpoint gives" in outcome.only_error()
    assert outcome.duration_s < patient(45), "the gateway's patience with a coordinator that has ended is nobody else's"


def test_an_engine_that_would_be_open_to_a_network(tmp_path: Path, tiny_folder: Path) -> None:
    error = serve(tmp_path, tiny_folder, "--load-format", "dummy", "--engine-host", "0.0.0.0").only_error()
    assert "--engine-host 0.0.0.0 is on a network" in error
    assert "--engine-ssl-certfile" in error

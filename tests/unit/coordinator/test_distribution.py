"""Which nodes are sent the model and the library, and what is said of one that may not or cannot be."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tpserve.coordinator import distribution
from tpserve.coordinator.distribution import Distribute, Distributor, Folders, Receiver
from tpserve.coordinator.errors import ClusterError
from tpserve.proto.manifest import Manifest
from tpserve.proto.rank import FileFacts
from tpserve.worker.reception import has_files

Answer = Callable[..., Any]


class Method:
    """An actor's method, as far as it is called here."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer

    def remote(self, *arguments: Any) -> Awaitable[Any]:
        async def answer() -> Any:
            await asyncio.sleep(0)
            return self._answer(*arguments)

        return answer()


def node(**answers: Answer) -> Receiver:
    return Receiver("host-b", SimpleNamespace(**{name: Method(answer) for name, answer in answers.items()}))


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    model, artifact = tmp_path / "model", tmp_path / "artifact"
    model.mkdir()
    for name in ("config.json", "tokenizer.json", "model.safetensors", "pytorch_model.bin"):
        (model / name).write_text(name)
    artifact.mkdir()
    for name in ("model.so", "kernels.so", "manifest.json"):
        (artifact / name).write_text(name)
    return Folders(model, artifact)


def make(
    folders: Folders, monkeypatch: pytest.MonkeyPatch, distribute: Distribute = "auto", *, with_weights: bool = True
) -> Distributor:
    manifest = SimpleNamespace(files={"model.so": "", "kernels.so": ""})
    monkeypatch.setattr(Manifest, "load", lambda folder, verify_files: manifest)
    return Distributor(folders, distribute, with_weights=with_weights)


@pytest.mark.parametrize("with_weights", [True, False])
async def test_a_node_that_shares_the_folders_is_sent_nothing(
    folders: Folders, monkeypatch: pytest.MonkeyPatch, with_weights: bool
) -> None:
    """Asked for what a rank reads, and no file more."""
    asked: list[str] = []

    def answer(folder: Path, files: Sequence[FileFacts]) -> bool:
        asked.extend(file.name for file in files)
        return has_files(folder, files)

    distributor = make(folders, monkeypatch, with_weights=with_weights)
    assert await distributor.ensure({"b": node(has_files=answer)}) == {"b": folders}
    weights = ["model.safetensors"] if with_weights else []
    assert asked == ["config.json", *weights, "tokenizer.json", "kernels.so", "manifest.json", "model.so"]


async def test_a_node_that_was_sent_them_before_is_sent_nothing(
    folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = node(has_files=lambda *_: False, find_received=lambda key: Path("/kept") / key)
    found = (await make(folders, monkeypatch).ensure({"b": kept}))["b"]
    assert found.model_dir.parent == found.artifact_dir.parent == Path("/kept")
    assert found.model_dir != found.artifact_dir
    (folders.model_dir / "model.safetensors").write_text("other weights")
    other = (await make(folders, monkeypatch).ensure({"b": kept}))["b"]
    assert other.model_dir != found.model_dir, "the key is that of the content"
    assert other.artifact_dir == found.artifact_dir


async def test_never_names_the_node_and_the_folder(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    lacking = node(has_files=lambda *_: False)
    with pytest.raises(ClusterError, match=rf"^host-b has no {folders.model_dir}, .* --distribute auto"):
        await make(folders, monkeypatch, "never").ensure({"b": lacking})


async def test_a_node_without_room_is_named(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    def begin(key: str, num_bytes: int) -> None:
        assert num_bytes == sum(len(name) for name in ("config.json", "tokenizer.json", "model.safetensors"))
        raise OSError("no room")

    full = node(has_files=lambda *_: False, find_received=lambda _: None, begin=begin)
    with pytest.raises(ClusterError, match=r"^host-b cannot take the model: OSError: no room"):
        await make(folders, monkeypatch).ensure({"b": full})


async def test_a_node_that_does_not_answer_is_named(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distribution, "_STALL_S", 0.05)
    silent = Receiver("host-b", SimpleNamespace(has_files=SimpleNamespace(remote=lambda *_: asyncio.sleep(9))))
    with pytest.raises(ClusterError, match=r"^host-b did not answer for 0\.05 s while the model was sent"):
        await make(folders, monkeypatch).ensure({"b": silent})

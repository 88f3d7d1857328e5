"""Which nodes are sent the model and the library, and what is said of one that may not or cannot be."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest

from tpserve.coordinator import distribution
from tpserve.coordinator.distribution import Distributor, Receiver, with_folders
from tpserve.coordinator.errors import ClusterError
from tpserve.proto.manifest import Manifest
from tpserve.proto.rank import FileFacts, RankConfig
from tpserve.proto.speculation import Speculation
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
def rank(tmp_path: Path) -> RankConfig:
    """A rank whose draft is its own model."""
    model, artifact = tmp_path / "model", tmp_path / "artifact"
    model.mkdir()
    for name in ("config.json", "tokenizer.json", "model.safetensors", "pytorch_model.bin"):
        (model / name).write_text(name)
    artifact.mkdir()
    for name in ("model.so", "kernels.so", "manifest.json"):
        (artifact / name).write_text(name)
    return RankConfig(
        rank=0,
        tp_size=2,
        model_dir=model,
        artifact_dir=artifact,
        load_format="auto",
        num_pages=1,
        max_num_seqs=1,
        num_threads=1,
        group_name="",
        collective_timeout_s=1.0,
    )


@pytest.fixture(autouse=True)
def manifest(monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = SimpleNamespace(files={"model.so": "", "kernels.so": ""})
    monkeypatch.setattr(Manifest, "load", lambda folder, verify_files: manifest)


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
async def test_a_node_that_shares_the_folders_is_sent_nothing(
    rank: RankConfig, load_format: Literal["auto", "dummy"]
) -> None:
    """Asked for what a rank reads, and no file more."""
    asked: list[str] = []

    def answer(folder: Path, files: Sequence[FileFacts]) -> bool:
        asked.extend(file.name for file in files)
        return has_files(folder, files)

    distributor = Distributor(replace(rank, load_format=load_format), "auto")
    found = await distributor.ensure({"b": node(has_files=answer)})
    assert with_folders(rank, found["b"]) == rank
    weights = ["model.safetensors"] if load_format == "auto" else []
    assert asked == ["config.json", *weights, "tokenizer.json", "kernels.so", "manifest.json", "model.so"]


async def test_a_draft_is_brought_as_the_target_is(rank: RankConfig) -> None:
    speculation = Speculation("draft", 3, draft_model_dir=rank.model_dir, draft_artifact_dir=rank.artifact_dir)
    speculating = replace(rank, speculation=speculation)
    kept = node(has_files=lambda *_: False, find_received=lambda key: Path("/kept") / key)
    found = (await Distributor(speculating, "auto").ensure({"b": kept}))["b"]
    away = with_folders(speculating, found)
    assert away.speculation is not None
    assert away.speculation.draft_model_dir == away.model_dir == found["model"]
    assert away.speculation.draft_artifact_dir == away.artifact_dir == found["library"]


async def test_a_node_that_was_sent_them_before_is_sent_nothing(rank: RankConfig) -> None:
    kept = node(has_files=lambda *_: False, find_received=lambda key: Path("/kept") / key)
    found = (await Distributor(rank, "auto").ensure({"b": kept}))["b"]
    assert found["model"].parent == found["library"].parent == Path("/kept")
    assert found["model"] != found["library"]
    (rank.model_dir / "model.safetensors").write_text("other weights")
    other = (await Distributor(rank, "auto").ensure({"b": kept}))["b"]
    assert other["model"] != found["model"], "the key is that of the content"
    assert other["library"] == found["library"]


async def test_never_names_the_node_and_the_folder(rank: RankConfig) -> None:
    lacking = node(has_files=lambda *_: False)
    with pytest.raises(ClusterError, match=rf"^host-b has no {rank.model_dir}, .* --distribute auto"):
        await Distributor(rank, "never").ensure({"b": lacking})


async def test_a_node_without_room_is_named(rank: RankConfig) -> None:
    def begin(key: str, num_bytes: int) -> None:
        assert num_bytes == sum(len(name) for name in ("config.json", "tokenizer.json", "model.safetensors"))
        raise OSError("no room")

    full = node(has_files=lambda *_: False, find_received=lambda _: None, begin=begin)
    with pytest.raises(ClusterError, match=r"^host-b cannot take the model: OSError: no room"):
        await Distributor(rank, "auto").ensure({"b": full})


async def test_a_node_that_does_not_answer_is_named(rank: RankConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distribution, "_STALL_S", 0.05)
    silent = Receiver("host-b", SimpleNamespace(has_files=SimpleNamespace(remote=lambda *_: asyncio.sleep(9))))
    with pytest.raises(ClusterError, match=r"^host-b did not answer for 0\.05 s while the model was sent"):
        await Distributor(rank, "auto").ensure({"b": silent})

"""Brings the model and the compiled library to nodes that do not have them, from the coordinator's, through Ray.

Folders go in chunks through Ray's object store, few at a time, so that the smallest store holds them.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import ray

from tpserve.coordinator.errors import ClusterError
from tpserve.proto.manifest import MANIFEST_NAME, Manifest, sha256_file
from tpserve.proto.rank import FileFacts, RankConfig, fingerprint_of

if TYPE_CHECKING:
    import numpy as np

logger = logging.getLogger(__name__)

_CHUNK_BYTES = 8 << 20
_CHUNKS_ON_THE_WAY = 2
_STALL_S = 60.0
"""A node that takes no chunk for longer is given up."""
_LOG_EVERY_S = 5.0
_MODEL_FILES = ("*.json", "*.jinja", "*.model", "*.txt")
"""What a rank may read of a model besides its weights."""

Distribute = Literal["auto", "never"]


def rank_folders(config: RankConfig) -> dict[str, Path]:
    """Return what a rank loads, by what it is called in messages."""
    folders = {"model": config.model_dir, "library": config.artifact_dir}
    draft = config.speculation
    if draft is not None and draft.draft_model_dir is not None and draft.draft_artifact_dir is not None:
        folders |= {"draft model": draft.draft_model_dir, "draft library": draft.draft_artifact_dir}
    return folders


def with_folders(config: RankConfig, folders: Mapping[str, Path]) -> RankConfig:
    """Return the configuration of a rank whose node has what it loads in these folders."""
    draft = config.speculation
    if draft is not None and "draft model" in folders:
        draft = replace(draft, draft_model_dir=folders["draft model"], draft_artifact_dir=folders["draft library"])
    return replace(config, model_dir=folders["model"], artifact_dir=folders["library"], speculation=draft)


@dataclass(frozen=True, slots=True)
class Receiver:
    """A node that ranks were given places on."""

    name: str
    """Its host's."""
    actor: Any
    """A rank there."""


class Distributor:
    """Sees that nodes have what ranks load, as `rank` has it on this one."""

    def __init__(self, rank: RankConfig, distribute: Distribute) -> None:
        self._folders = rank_folders(rank)
        self._distribute = distribute
        draft_format = "auto" if rank.speculation is None else rank.speculation.draft_load_format
        self._with_weights = {"model": rank.load_format != "dummy", "draft model": draft_format != "dummy"}
        self._digests: dict[str, dict[str, str]] = {}
        """sha256 of every file by kind, once it was needed."""

    async def ensure(self, nodes: Mapping[str, Receiver]) -> dict[str, dict[str, Path]]:
        """Return where each node has the folders, by kind, after sending what is missing.

        Parameters
        ----------
        nodes
            By Ray's id.

        Raises
        ------
        ClusterError
            Naming the node that lacks something and may or can not be sent it.
        """
        found: dict[str, dict[str, Path]] = {node: {} for node in nodes}
        for kind, folder in self._folders.items():
            for node, at in (await self._at(kind, folder, self._files(kind, folder), nodes)).items():
                found[node][kind] = at
        return found

    def _files(self, kind: str, folder: Path) -> list[Path]:
        """Return the files of a folder that a rank may read."""
        if kind not in self._with_weights:
            return [folder / name for name in sorted((*Manifest.load(folder, verify_files=False).files, MANIFEST_NAME))]
        patterns = (*_MODEL_FILES, "*.safetensors") if self._with_weights[kind] else _MODEL_FILES
        return sorted({path for pattern in patterns for path in folder.glob(pattern)})

    async def _at(self, kind: str, folder: Path, files: list[Path], nodes: Mapping[str, Receiver]) -> dict[str, Path]:
        facts = await asyncio.to_thread(
            lambda: [FileFacts(path.name, path.stat().st_size, fingerprint_of(path)) for path in files]
        )
        found = await _ask_all(kind, nodes, lambda actor: actor.has_files.remote(folder, facts))
        at = {node: folder for node, has in found.items() if has}
        lacking = {node: receiver for node, receiver in nodes.items() if node not in at}
        if not lacking:
            return at
        if self._distribute == "never":
            raise ClusterError(
                f"{_names(lacking)} has no {folder}, or one with other files: bring the {kind} there, or serve with "
                "--distribute auto"
            )
        if kind not in self._digests:
            self._digests[kind] = await asyncio.to_thread(lambda: {path.name: sha256_file(path) for path in files})
        digests = self._digests[kind]
        key = hashlib.sha256("".join(f"{name}\0{digests[name]}\0" for name in sorted(digests)).encode()).hexdigest()[
            :32
        ]
        kept = await _ask_all(kind, lacking, lambda actor: actor.find_received.remote(key))
        at |= {node: path for node, path in kept.items() if path is not None}
        lacking = {node: receiver for node, receiver in lacking.items() if node not in at}
        if lacking:
            num_bytes = sum(fact.num_bytes for fact in facts)
            await _ask_all(kind, lacking, lambda actor: actor.begin.remote(key, num_bytes))
            await _send(kind, files, num_bytes, lacking)
            at |= await _ask_all(kind, lacking, lambda actor: actor.finish.remote(digests))
        return at


async def _send(kind: str, files: list[Path], num_bytes: int, nodes: Mapping[str, Receiver]) -> None:
    where = _names(nodes)
    logger.info("sending the %s, %.1f MB, to %s", kind, num_bytes / 1e6, where)
    begun = told = time.monotonic()
    sent = 0
    on_the_way: deque[asyncio.Future[Any]] = deque()
    try:
        for name, chunk in _chunks(files):
            if len(on_the_way) == _CHUNKS_ON_THE_WAY:
                await on_the_way.popleft()
            ref = await asyncio.to_thread(ray.put, chunk)
            asked = {node: receiver.actor.take.remote(name, ref) for node, receiver in nodes.items()}
            on_the_way.append(asyncio.ensure_future(_answers(kind, nodes, asked)))
            sent += len(chunk)
            if time.monotonic() - told > _LOG_EVERY_S:
                told = time.monotonic()
                logger.info("sending the %s to %s: %.0f of %.0f MB", kind, where, sent / 1e6, num_bytes / 1e6)
        while on_the_way:
            await on_the_way.popleft()
    finally:
        for taken in on_the_way:
            taken.cancel()
        await asyncio.gather(*on_the_way, return_exceptions=True)
    logger.info("sent the %s to %s in %.1f s", kind, where, time.monotonic() - begun)


def _chunks(files: list[Path]) -> Iterator[tuple[str, np.ndarray[Any, np.dtype[np.uint8]]]]:
    """Yield every file's name with its bytes in order; an empty file gives one empty chunk."""
    import numpy as np  # here: few coordinators send anything, and none needs it for anything else

    for path in files:
        with path.open("rb") as file:
            chunk = file.read(_CHUNK_BYTES)
            while True:
                # An array crosses Ray without being copied, bytes do not.
                yield path.name, np.frombuffer(chunk, np.uint8)
                chunk = file.read(_CHUNK_BYTES)
                if not chunk:
                    break


async def _ask_all(kind: str, nodes: Mapping[str, Receiver], ask: Callable[[Any], Any]) -> dict[str, Any]:
    return await _answers(kind, nodes, {node: ask(receiver.actor) for node, receiver in nodes.items()})


async def _answers(kind: str, nodes: Mapping[str, Receiver], asked: Mapping[str, Any]) -> dict[str, Any]:
    """Await one answer of each node.

    Raises
    ------
    ClusterError
        Naming the node that fails or does not answer.
    """

    async def one(name: str, ref: Any) -> Any:
        try:
            return await asyncio.wait_for(_answer(ref), _STALL_S)
        except TimeoutError:
            raise ClusterError(f"{name} did not answer for {_STALL_S:g} s while the {kind} was sent to it") from None
        except Exception as error:  # whatever the actor raised, Ray wraps it
            raise ClusterError(f"{name} cannot take the {kind}: {root_cause(error)}") from None

    answers = await asyncio.gather(*(one(nodes[node].name, ref) for node, ref in asked.items()))
    return dict(zip(asked, answers, strict=True))


def _names(nodes: Mapping[str, Receiver]) -> str:
    return ", ".join(receiver.name for receiver in nodes.values())


async def _answer(ref: Any) -> Any:
    return await ref


def root_cause(error: BaseException | None) -> str:
    """Return the remote exception's own words, without Ray's trace."""
    if isinstance(error, ray.exceptions.RayActorError):  # tells of an actor's end in many lines, the cause last
        return str(error).strip().splitlines()[-1].strip()
    cause = getattr(error, "cause", None) or error
    return f"{type(cause).__name__}: {cause}"

"""What a node is sent: whole and verified before it is used, kept once, refused where it has no room."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tpserve.proto.rank import FileFacts, fingerprint_of
from tpserve.worker.errors import ReceptionError
from tpserve.worker.reception import Reception, find_received, has_files

KEY = "0123abcd"
FILES = {"config.json": b"{}", "model.safetensors": bytes(range(256)) * 100, "empty.json": b""}
DIGESTS = {name: hashlib.sha256(data).hexdigest() for name, data in FILES.items()}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TPSERVE_HOME", str(tmp_path))
    return tmp_path


def send(reception: Reception, files: dict[str, bytes] = FILES) -> None:
    for name, data in files.items():
        for at in range(0, max(1, len(data)), 1000):
            reception.take(name, np.frombuffer(data[at : at + 1000], np.uint8))


def folders(home: Path) -> Iterator[str]:
    return (path.name for path in (home / "received").iterdir())


def test_a_folder_arrives_as_it_was_sent(home: Path) -> None:
    assert find_received(KEY) is None
    reception = Reception(KEY, 30_000)
    send(reception)
    assert find_received(KEY) is None, "not before it is whole"
    folder = reception.finish(DIGESTS)
    assert folder == find_received(KEY)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == FILES
    assert list(folders(home)) == [KEY]


@pytest.mark.parametrize(
    ("sent", "wrong"),
    [
        (FILES | {"config.json": b"[]"}, "config.json"),
        ({name: data for name, data in FILES.items() if name != "empty.json"}, "empty.json"),
        (FILES | {"more.json": b"{}"}, "more.json"),
    ],
)
def test_what_differs_is_named_and_not_kept(home: Path, sent: dict[str, bytes], wrong: str) -> None:
    reception = Reception(KEY, 30_000)
    send(reception, sent)
    with pytest.raises(ReceptionError, match=rf"^{wrong} did not arrive as sent"):
        reception.finish(DIGESTS)
    assert not list(folders(home))


def test_two_ranks_may_receive_the_same(home: Path) -> None:
    first, second = Reception(KEY, 30_000), None
    send(first)
    folder = first.finish(DIGESTS)
    second = Reception(KEY, 30_000)
    send(second)
    assert second.finish(DIGESTS) == folder
    assert list(folders(home)) == [KEY]


def test_a_full_disk_is_told_before_anything_is_sent(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100 << 20))
    Reception(KEY, 36 << 20)
    with pytest.raises(ReceptionError, match=r"received has 100 MiB free, 101 MiB are needed: .*TPSERVE_HOME"):
        Reception(KEY, 37 << 20)


def test_a_name_leads_nowhere_else() -> None:
    reception = Reception(KEY, 1)
    for name in ("../evil", "/etc/evil", ".."):
        with pytest.raises(ReceptionError, match="is no plain file name"):
            reception.take(name, np.zeros(1, np.uint8))


def test_what_a_killed_rank_left_is_removed(home: Path) -> None:
    left = home / "received" / f".{KEY}.{2**22 + 1}"  # more than any pid
    left.mkdir(parents=True)
    Reception("another", 1)
    assert not left.exists()


def test_files_are_known_by_size_beginning_and_end(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    data = bytearray(5 << 20)
    path.write_bytes(data)
    facts = [FileFacts(path.name, len(data), fingerprint_of(path))]
    assert has_files(tmp_path, facts)
    assert not has_files(tmp_path / "elsewhere", facts)
    for at in (0, len(data) - 1):
        changed = bytearray(data)
        changed[at] = 1
        path.write_bytes(changed)
        assert not has_files(tmp_path, facts)
    path.write_bytes(data[:-1])
    assert not has_files(tmp_path, facts)

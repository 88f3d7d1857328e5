"""The cache of built folders under each policy, with builds that fail, are killed or meet."""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from tpserve.compile.cache import CachePolicy, cache_root, cached_folder
from tpserve.compile.errors import CacheError

KEY = "0123456789abcdef0123456789abcdef"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "home"
    monkeypatch.setenv("TPSERVE_HOME", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return folder


class Builder:
    """Writes two files, and counts."""

    def __init__(self, text: str = "built") -> None:
        self.text = text
        self.calls = 0

    def __call__(self, folder: Path) -> None:
        assert not any(folder.iterdir())
        self.calls += 1
        (folder / "a").write_text(self.text)
        (folder / "b").write_text(self.text)


def names(home: Path) -> list[str]:
    parent = home / "lib"
    return sorted(path.name for path in parent.iterdir()) if parent.is_dir() else []


def test_on_builds_once_and_keeps(home: Path) -> None:
    build = Builder()
    first = cached_folder("lib", KEY, CachePolicy.ON, build)
    assert cached_folder("lib", KEY, CachePolicy.ON, build) == first == home / "lib" / KEY
    assert build.calls == 1
    assert (first / "b").read_text() == "built"
    cached_folder("lib", "other", CachePolicy.ON, build)
    cached_folder("model", KEY, CachePolicy.ON, build)
    assert build.calls == 3


def test_off_builds_every_time_and_keeps_nothing(home: Path) -> None:
    build = Builder()
    one, two = (cached_folder("lib", KEY, CachePolicy.OFF, build) for _ in range(2))
    assert build.calls == 2
    assert one != two
    assert (one / "a").is_file()
    assert not home.exists()


def test_redo_replaces_what_is_there(home: Path) -> None:
    cached_folder("lib", KEY, CachePolicy.ON, Builder("old"))
    folder = cached_folder("lib", KEY, CachePolicy.REDO, Builder("new"))
    assert (folder / "a").read_text() == "new"
    assert names(home) == [KEY]
    assert (cached_folder("lib", "first", CachePolicy.REDO, Builder()) / "a").is_file()


def test_readonly_takes_what_is_there_and_builds_nothing(home: Path) -> None:
    build = Builder()
    with pytest.raises(CacheError, match=rf"{KEY} is not in the cache and the cache policy is READONLY: use ON"):
        cached_folder("lib", KEY, CachePolicy.READONLY, build)
    assert not home.exists()
    folder = cached_folder("lib", KEY, CachePolicy.ON, build)
    assert cached_folder("lib", KEY, CachePolicy.READONLY, build) == folder
    assert build.calls == 1


@pytest.mark.parametrize("policy", [CachePolicy.ON, CachePolicy.OFF, CachePolicy.REDO])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_build_that_fails_leaves_what_was_there(
    home: Path, tmp_path: Path, policy: CachePolicy, error: type[BaseException]
) -> None:
    cached_folder("lib", KEY, CachePolicy.ON, Builder("old"))
    before = sorted(tmp_path.iterdir())

    def fail(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise error("no")

    with pytest.raises(error):
        cached_folder("lib", KEY if policy is CachePolicy.REDO else "fresh", policy, fail)
    assert sorted(tmp_path.iterdir()) == before
    assert names(home) == [KEY]
    assert (home / "lib" / KEY / "a").read_text() == "old"


def build_until_killed(home: str, pipe: Connection) -> None:
    os.environ["TPSERVE_HOME"] = home

    def build(folder: Path) -> None:
        (folder / "a").write_text("half")
        pipe.send("building")
        pipe.recv()

    cached_folder("lib", KEY, CachePolicy.ON, build)


def test_a_build_that_is_killed_is_as_if_it_had_not_been(home: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=build_until_killed, args=(str(home), theirs), daemon=True)
    process.start()
    assert ours.poll(60)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join(10)
    ours.close()
    theirs.close()
    process.close()
    with pytest.raises(CacheError):
        cached_folder("lib", KEY, CachePolicy.READONLY, Builder())
    build = Builder()
    folder = cached_folder("lib", KEY, CachePolicy.ON, build)
    assert build.calls == 1
    assert sorted(path.name for path in folder.iterdir()) == ["a", "b"]


@pytest.mark.parametrize("policy", [CachePolicy.ON, CachePolicy.REDO])
@pytest.mark.parametrize("existing", [False, True])
def test_builds_that_meet_leave_one_whole_folder(home: Path, policy: CachePolicy, existing: bool) -> None:
    if existing:
        cached_folder("lib", KEY, CachePolicy.REDO, Builder("old"))
    num_builds = 4
    together = threading.Barrier(num_builds, timeout=30)

    def build(folder: Path) -> None:
        (folder / "a").write_text("new")
        together.wait()
        (folder / "b").write_text("new")

    with ThreadPoolExecutor(num_builds) as pool:
        runs = [pool.submit(cached_folder, "lib", KEY, policy, build) for _ in range(num_builds)]
        if existing and policy is CachePolicy.ON:
            together.abort()  # nobody builds
        assert {run.result() for run in runs} == {home / "lib" / KEY}
    assert names(home) == [KEY]
    expected = "old" if existing and policy is CachePolicy.ON else "new"
    assert {path.name: path.read_text() for path in (home / "lib" / KEY).iterdir()} == {"a": expected, "b": expected}


def test_a_folder_moved_aside_while_another_is_put_there(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two build it again: one finds the other's folder in its way, and then gone."""
    rename = Path.rename
    moved = home / "moved"

    def in_the_way(self: Path, target: Path) -> Path:
        if target == home / "lib" / KEY and not moved.exists():
            target.mkdir()
            (target / "a").write_text("the other's")
            try:
                return rename(self, target)
            finally:
                rename(target, moved)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", in_the_way)
    folder = cached_folder("lib", KEY, CachePolicy.REDO, Builder("new"))
    assert moved.is_dir(), "it was in the way"
    assert (folder / "a").read_text() == "new"


def test_replacing_never_shows_a_half_removed_folder(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed at any moment of a REDO, the folder is whole or absent."""
    folder = cached_folder("lib", KEY, CachePolicy.ON, Builder("old"))
    seen: list[list[str]] = []
    unlink = os.unlink

    def watched(*args: object, **kwargs: object) -> None:
        seen.append(sorted(path.name for path in folder.iterdir()) if folder.is_dir() else [])
        unlink(*args, **kwargs)  # type: ignore[arg-type]  # passed through

    monkeypatch.setattr(os, "unlink", watched)
    cached_folder("lib", KEY, CachePolicy.REDO, Builder("new"))
    assert len(seen) == 2, "the old folder's two files are removed"
    assert all(files in ([], ["a", "b"]) for files in seen)


def test_the_root_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_root() == tmp_path / "home"
    monkeypatch.delenv("TPSERVE_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_root() == tmp_path / "tpserve"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root() == tmp_path / ".cache/tpserve"

"""API keys: the file, its errors and its changes, and who is let in meanwhile."""

from __future__ import annotations

import asyncio
import hmac
import logging
from pathlib import Path

import pytest

from tpserve.coordinator.gateway import keys
from tpserve.coordinator.gateway.config import ConfigError
from tpserve.coordinator.gateway.keys import UNNAMED, Account, KeyRing, parse_keys
from unit.gateway.conftest import StackFactory
from unit.gateway.test_protocol import USER

CHAT = "/v1/chat/completions"


def names(ring: KeyRing, *given: str) -> list[str | None]:
    return [None if (found := ring.find(key.encode())) is None else found.name for key in given]


def test_keys_of_the_file_are_added_to_those_given(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("one\n\n# who is who\n  two==  \nthree name=alice rpm=60 tpm=1000 max_parallel=8\nfour name=alice ")
    path.write_text(path.read_text() + "max_parallel=8 tpm=1000 rpm=60\n")
    ring = KeyRing(("zero",), path)
    assert names(ring, "zero", "one", "two==", "three", "four") == [UNNAMED] * 3 + ["alice"] * 2
    assert names(ring, "five", "", "#", "name=alice", "on", "one ") == [None] * 6
    alice = Account("name alice", "alice", 60, 1000, 8)
    assert ring.find(b"three") == ring.find(b"four") == alice
    assert ring.find(b"one") != ring.find(b"zero"), "keys without a name share nothing"
    assert not ring.is_open
    assert KeyRing(()).is_open


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "has no key"),
        ("\n \n# nothing\n", "has no key"),
        ("good\nsecret word\n", "line 2: after the key stands something else"),
        ("secret rpm\n", "line 1"),
        ("secret rps=3\n", "line 1"),
        ("secret rpm=0\n", "rpm is 0"),
        ("secret rpm=-1\n", "rpm must be"),
        ("secret rpm=²\n", "rpm must be"),
        ("secret tpm=1e9\n", "tpm must be"),
        ("secret tpm=9999999999999\n", "tpm is 9999999999999"),
        ("secret tpm=5 tpm=6\n", "tpm must be given once"),
        ("secret max_parallel=\n", "max_parallel must be"),
        ("secret name=\n", "name must be"),
        ('secret name=a"b\n', "name must be"),
        ("secret name=unnamed\n", "name must be"),
        ("secret\nsecret name=a\n", "line 2: this key was given before"),
        ("secret name=a rpm=1\nother name=a rpm=2\n", "line 2: name 'a' was given before"),
    ],
)
def test_what_is_wrong_in_a_file_is_named_and_no_key_is_shown(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        KeyRing((), path)
    assert words in str(caught.value)
    assert "secret" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        KeyRing((), path)
    path.write_bytes(b"\xff\xfe\n")
    with pytest.raises(ConfigError, match="not UTF-8"):
        KeyRing((), path)
    path.write_bytes(b"x" * 2**21)
    with pytest.raises(ConfigError, match="more than"):
        KeyRing((), path)
    with pytest.raises(ConfigError, match="cannot be read"):
        KeyRing((), tmp_path)


def test_every_key_is_compared_whichever_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ring = KeyRing([f"key-{number}" for number in range(50)])
    compared = []
    plain = hmac.compare_digest

    def noted(a: bytes, b: bytes) -> bool:
        compared.append(len(b))
        return plain(a, b)

    monkeypatch.setattr(hmac, "compare_digest", noted)
    for given in ("key-0", "key-49", "wrong"):
        compared.clear()
        ring.find(given.encode())
        assert compared == [32] * 50


def test_a_changed_file_is_taken_as_a_mounted_secret_changes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A kubelet writes a new folder and swaps a link to it."""
    for version, text in (("v1", "old name=a\n"), ("v2", "new name=a\n"), ("bad", "leaked key\n"), ("empty", "")):
        (tmp_path / version).mkdir()
        (tmp_path / version / "keys").write_text(text)
    current, path = tmp_path / "current", tmp_path / "current" / "keys"

    def swap(version: str) -> None:
        (tmp_path / "next").symlink_to(version)
        (tmp_path / "next").rename(current)

    swap("v1")
    ring = KeyRing(("given",), path)
    assert not ring.reload()
    swap("v2")
    assert ring.reload()
    assert names(ring, "old", "new", "given") == [None, "a", UNNAMED]
    with caplog.at_level(logging.ERROR):
        for version in ("bad", "bad", "empty", "nowhere"):
            swap(version)
            assert not ring.reload()
            assert not ring.reload()
            assert names(ring, "old", "new", "given") == [None, "a", UNNAMED], "the last good keys stay"
    assert "leaked" not in caplog.text
    assert len([r for r in caplog.records if "something else" in r.message]) == 1, "what is wrong is told once"
    swap("v1")
    assert ring.reload()
    assert names(ring, "old", "new") == ["a", None]


async def test_a_running_stream_outlives_its_key(
    make_stack: StackFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(KeyRing.watch, "__defaults__", (0.01,))
    path = tmp_path / "keys"
    path.write_text("first\n")
    body = {"messages": [USER], "max_tokens": 20, "stream": True}

    def headers(key: str) -> dict[str, str]:
        return {"authorization": f"Bearer {key}"}

    async with make_stack(api_key_file=str(path)) as stack:
        stack.engine.gate.clear()
        async with stack.http.stream("POST", CHAT, json=body, headers=headers("first")) as reply:
            lines = reply.aiter_lines()
            await anext(lines)
            path.write_text("second\n")
            async with asyncio.timeout(20):
                while (await stack.http.get("/v1/models", headers=headers("second"))).status_code != 200:
                    pass
            assert (await stack.http.get("/v1/models", headers=headers("first"))).status_code == 401
            stack.engine.gate.set()
            assert [line async for line in lines if line][-1] == "data: [DONE]"


def test_parse_keys_takes_what_it_documents() -> None:
    document = keys.__doc__ or ""
    block = "\n".join(line for line in document.splitlines() if line.startswith("    sk-"))
    found = parse_keys(block, "the docstring")
    assert sorted(account.name for account in found.values()) == ["alice", UNNAMED]

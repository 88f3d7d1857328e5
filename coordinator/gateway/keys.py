"""Who may come in: API keys, what each of them may use, and the file that they are read from and read again.

A key file has one key a line, which its name and limits may follow; lines that begin with # are comments:

    sk-first
    sk-alice   name=alice rpm=60 tpm=100000 max_parallel=8

Knows nothing of HTTP, and writes no key anywhere: errors name lines.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tpserve.coordinator.gateway.config import ConfigError

logger = logging.getLogger(__name__)

UNNAMED = "unnamed"
"""The label of keys that were given no name: nothing of a key may be seen in metrics."""
RELOAD_S = 2.0
"""A mounted secret is replaced by a change of links, which file events miss: its content is looked at this often."""
_LIMITS = {"rpm": "requests_per_minute", "tpm": "tokens_per_minute", "max_parallel": "max_parallel"}
_NAME = re.compile(r"[A-Za-z0-9._@-]{1,64}")
_MAX_LIMIT = 10**12
_MAX_FILE_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class Account:
    """Whose requests are counted and limited together: all keys of one name, or one key without a name."""

    id: str
    name: str
    """For metrics."""
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    """Of prompts and outputs together."""
    max_parallel: int | None = None
    """Requests at once."""

    @property
    def is_limited(self) -> bool:
        """Whether it has any limit."""
        return (self.requests_per_minute, self.tokens_per_minute, self.max_parallel) != (None, None, None)


def parse_keys(text: str, source: str) -> dict[bytes, Account]:
    """Read a key file; return the account of each key, by the key's digest.

    Parameters
    ----------
    source
        What errors call the text.

    Raises
    ------
    ConfigError
        Naming the line and the field, never the key.
    """
    accounts: dict[bytes, Account] = {}
    by_name: dict[str, Account] = {}
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        where = f"{source}, line {number}"
        digest = _digest(words[0].encode())
        account = _account(digest, words[1:], where)
        if digest in accounts:
            raise ConfigError(f"{where}: this key was given before; leave one of the two lines out")
        if account.name != UNNAMED and by_name.setdefault(account.name, account) != account:
            raise ConfigError(
                f"{where}: name {account.name!r} was given before with other limits; keys of one name share them, so "
                "write the same on each line"
            )
        accounts[digest] = account
    return accounts


def _account(digest: bytes, words: Iterable[str], where: str) -> Account:
    limits: dict[str, int] = {}
    name = UNNAMED
    for word in words:
        field, equals, value = word.partition("=")
        if not equals or field not in (*_LIMITS, "name"):
            # The word itself may be a part of a key with a space in it.
            raise ConfigError(
                f"{where}: after the key stands something else than name=, rpm=, tpm= or max_parallel= with a value"
            )
        if field == "name":
            if name != UNNAMED or value == UNNAMED or not _NAME.fullmatch(value):
                raise ConfigError(
                    f"{where}: name must be given once, have 1 to 64 letters, digits and . _ @ - and not be {UNNAMED!r}"
                )
            name = value
            continue
        if _LIMITS[field] in limits or not value.isascii() or not value.isdigit() or len(value) > 13:
            raise ConfigError(f"{where}: {field} must be given once, as a whole number")
        if not 1 <= int(value) <= _MAX_LIMIT:
            raise ConfigError(f"{where}: {field} is {value}: it must lie in [1, {_MAX_LIMIT}]")
        limits[_LIMITS[field]] = int(value)
    return Account(digest.hex() if name == UNNAMED else f"name {name}", name, **limits)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


class KeyRing:
    """The keys that open the door.

    Parameters
    ----------
    keys
        Given by flags, without names and limits.
    path
        A key file; read now, and again by `watch`.

    Raises
    ------
    ConfigError
        If the file cannot be read, is malformed, or has no key: it would leave the door open.
    """

    def __init__(self, keys: Iterable[str], path: Path | None = None) -> None:
        digests = [_digest(key.encode()) for key in keys]
        self._given = {digest: Account(digest.hex(), UNNAMED) for digest in digests}
        self._path = path
        self._seen = b""
        """Digest of the file's content when it was last looked at."""
        self._accounts = dict(self._given)
        if path is not None:
            self._take(self._read(path))

    @property
    def is_open(self) -> bool:
        """Whether no key is needed."""
        return not self._accounts

    def find(self, key: bytes) -> Account | None:
        """Return whose key it is.

        Digests are compared, each of them in full, so that the time taken tells nothing of any key.
        """
        digest = _digest(key)
        found = None
        for known, account in self._accounts.items():
            if hmac.compare_digest(digest, known):
                found = account
        return found

    def reload(self) -> bool:
        """Read the file again if it has changed; return whether the keys are new.

        Requests that run are not touched. What cannot be used is told in the log, and the keys stay as they were.
        """
        if self._path is None:
            return False
        try:
            content = self._read(self._path)
            if _digest(content) == self._seen:
                return False
            self._take(content)
        except ConfigError as error:
            logger.error("the API keys stay as they were: %s", error)
            return False
        logger.info("%s has changed: %d API keys", self._path, len(self._accounts))
        return True

    async def watch(self, every_s: float = RELOAD_S) -> None:
        """Call `reload` again and again, until cancelled."""
        while self._path is not None:
            await asyncio.sleep(every_s)
            await asyncio.to_thread(self.reload)

    def _read(self, path: Path) -> bytes:
        try:
            with path.open("rb") as file:
                content = file.read(_MAX_FILE_BYTES + 1)
        except OSError as error:
            self._seen = b""
            raise ConfigError(f"api_key_file {path} cannot be read: {error.strerror}") from None
        if len(content) > _MAX_FILE_BYTES:
            raise ConfigError(f"api_key_file {path} has more than {_MAX_FILE_BYTES} bytes")
        return content

    def _take(self, content: bytes) -> None:
        self._seen = _digest(content)  # what is wrong with it is told once
        try:
            accounts = parse_keys(content.decode(), f"api_key_file {self._path}")
        except UnicodeDecodeError:
            raise ConfigError(f"api_key_file {self._path} cannot be read: it is not UTF-8") from None
        if not accounts:
            raise ConfigError(f"api_key_file {self._path} has no key: write one a line, or leave it out")
        self._accounts = self._given | accounts

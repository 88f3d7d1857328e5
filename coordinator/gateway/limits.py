"""How much each account has used of its limits, shared by all gateways of one host through one small file.

A limit by the minute is a bucket that holds a minute's worth and fills evenly, as OpenAI's do. Output tokens are taken
as they come, beyond the bottom if need be: what runs is never cut off, the next request waits until the debt is gone.
SQLite keeps the buckets, so that several gateway processes see the same ones and one that is killed corrupts nothing;
a lone gateway keeps them in memory. Knows nothing of HTTP.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tpserve.coordinator.gateway.errors import RateLimited
from tpserve.coordinator.gateway.keys import Account

logger = logging.getLogger(__name__)

FILE_NAME = "limits.sqlite"
FLUSH_S = 0.25
"""Output tokens are put down this often, not one by one."""
_BUSY_S = 0.2
"""Longer than any write takes; a gateway that is stopped in the middle of one must not stop the others."""
_SCHEMA = """
CREATE TABLE IF NOT EXISTS bucket (account TEXT PRIMARY KEY, requests REAL, tokens REAL, at REAL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS running (
  account TEXT, pid INTEGER, num INTEGER, PRIMARY KEY (account, pid)
) WITHOUT ROWID;
"""

RATE_HEADERS = tuple(
    f"x-ratelimit-{what}-{kind}" for what in ("limit", "remaining", "reset") for kind in ("requests", "tokens")
)

Limit = Literal["requests", "tokens", "parallel"]


@dataclass(frozen=True, slots=True)
class Level:
    """What is left of an account's minute."""

    requests: float
    tokens: float
    """Below zero: a debt."""
    at: float
    """When it was so; seconds."""


class Ledger:
    """The buckets.

    Parameters
    ----------
    folder
        Where other gateways of this host keep theirs; None: there are no others.
    clock
        Seconds, the same for all processes of this host.
    """

    def __init__(self, folder: Path | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        path = ":memory:" if folder is None else str(folder / FILE_NAME)
        self._db = sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None)
        if folder is not None:
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=OFF")  # buckets need not outlive the host
        self._db.executescript(_SCHEMA)
        self._db.execute("DELETE FROM running WHERE pid = ?", (os.getpid(),))  # of one that died with this number

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def admit(self, account: Account) -> Level:
        """Take one request off the account, which `leave` gives back among those that run.

        Raises
        ------
        RateLimited
            If one of its limits is reached.
        """
        with self._changing():
            level = self._level(account)
            if account.max_parallel is not None and self._num_running(account) >= account.max_parallel:
                raise refusal(account, level, "parallel")
            if account.requests_per_minute is not None and level.requests < 1:
                raise refusal(account, level, "requests")
            if account.tokens_per_minute is not None and level.tokens < 1:
                raise refusal(account, level, "tokens")
            level = Level(level.requests - 1, level.tokens, level.at)
            self._put(account, level)
            self._run(account, 1)
            return level

    def rejoin(self, account: Account) -> Level:
        """Count a request among those that run, without a limit: it was admitted elsewhere, and goes on here."""
        with self._changing():
            self._run(account, 1)
            return self._level(account)

    def take(self, account: Account, num_tokens: int, *, at_most: bool) -> Level:
        """Take tokens off the account.

        Parameters
        ----------
        at_most
            Refuse to take more than there are, as for a prompt; else go below zero.

        Raises
        ------
        RateLimited
            If `at_most` and there are not enough.
        """
        with self._changing():
            level = self._level(account)
            if at_most and account.tokens_per_minute is not None and num_tokens > level.tokens:
                raise refusal(account, level, "tokens", num_tokens)
            level = Level(level.requests, level.tokens - num_tokens, level.at)
            self._put(account, level)
            return level

    def leave(self, account: Account, num_tokens: int) -> None:
        """Note that a request has ended, and take its last output tokens off."""
        with self._changing():
            level = self._level(account)
            self._put(account, Level(level.requests, level.tokens - num_tokens, level.at))
            self._run(account, -1)

    def _changing(self) -> _Transaction:
        return _Transaction(self._db)

    def _level(self, account: Account) -> Level:
        """Return what is there now; of a limit that there is not, nothing is ever taken."""
        row = self._db.execute("SELECT requests, tokens, at FROM bucket WHERE account = ?", (account.id,)).fetchone()
        now = self.clock()
        requests = float(account.requests_per_minute or 0)
        tokens = float(account.tokens_per_minute or 0)
        if row is None:
            return Level(requests, tokens, now)
        minutes = max(0.0, now - row[2]) / 60
        return Level(min(requests, row[0] + requests * minutes), min(tokens, row[1] + tokens * minutes), now)

    def _put(self, account: Account, level: Level) -> None:
        requests = 0.0 if account.requests_per_minute is None else level.requests
        tokens = 0.0 if account.tokens_per_minute is None else level.tokens
        self._db.execute("REPLACE INTO bucket VALUES (?, ?, ?, ?)", (account.id, requests, tokens, level.at))

    def _run(self, account: Account, change: int) -> None:
        self._db.execute(
            "INSERT INTO running VALUES (?, ?, ?) ON CONFLICT (account, pid) DO UPDATE SET num = num + excluded.num",
            (account.id, os.getpid(), change),
        )

    def _num_running(self, account: Account) -> int:
        """Return how many requests run; those of gateways that were killed do not count."""
        rows = self._db.execute("SELECT pid, num FROM running WHERE account = ? AND num > 0", (account.id,)).fetchall()
        living = 0
        for pid, num in rows:
            if _is_alive(pid):
                living += num
            else:
                self._db.execute("DELETE FROM running WHERE pid = ?", (pid,))
        return living


class _Transaction:
    """All or nothing, and nobody else meanwhile."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def __enter__(self) -> None:
        self._db.execute("BEGIN IMMEDIATE")

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._db.execute("COMMIT" if kind is None else "ROLLBACK")


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def refusal(account: Account, level: Level, limit: Limit, num_tokens: int = 1) -> RateLimited:
    """Return the 429 that says which limit it is, and when to come back."""
    headers = rate_headers(account, level)
    if limit == "parallel":
        return RateLimited(
            f"This key has {account.max_parallel} requests running, which is its limit (max_parallel): wait for one "
            "to end",
            limit=limit,
            rate_headers=headers,
            retry_after_s=1,
        )
    if limit == "requests":
        assert account.requests_per_minute is not None
        wait_s = (1 - level.requests) * 60 / account.requests_per_minute
        return RateLimited(
            f"This key has reached its limit of {account.requests_per_minute} requests a minute (rpm): come back in "
            f"{_duration(wait_s)}",
            limit=limit,
            rate_headers=headers,
            retry_after_s=_ceil(wait_s),
        )
    assert account.tokens_per_minute is not None
    per_minute = account.tokens_per_minute
    if num_tokens > per_minute:
        # No wait would help.
        return RateLimited(
            f"The prompt has {num_tokens} tokens and this key may use {per_minute} a minute (tpm): shorten the prompt",
            limit=limit,
            rate_headers=headers,
        )
    wait_s = (num_tokens - level.tokens) * 60 / per_minute
    return RateLimited(
        f"This key has reached its limit of {per_minute} tokens a minute (tpm): {max(0, int(level.tokens))} are left "
        f"and {num_tokens} are needed, come back in {_duration(wait_s)}",
        limit=limit,
        rate_headers=headers,
        retry_after_s=_ceil(wait_s),
    )


def rate_headers(account: Account, level: Level) -> dict[str, str]:
    """Return OpenAI's headers for the limits that the account has; `reset` is the time until nothing is used up."""
    headers = {}
    for kind, per_minute, left in (
        ("requests", account.requests_per_minute, level.requests),
        ("tokens", account.tokens_per_minute, level.tokens),
    ):
        if per_minute is not None:
            headers[f"x-ratelimit-limit-{kind}"] = str(per_minute)
            headers[f"x-ratelimit-remaining-{kind}"] = str(max(0, int(left)))
            headers[f"x-ratelimit-reset-{kind}"] = _duration((per_minute - left) * 60 / per_minute)
    return headers


def _duration(seconds: float) -> str:
    """Write a time as OpenAI does: 120ms, 1s, 6m0s."""
    if seconds < 1:
        return f"{max(0, round(1000 * seconds))}ms"
    minutes, rest = divmod(_ceil(seconds), 60)
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"


def _ceil(seconds: float) -> int:
    return max(1, -int(-seconds // 1))

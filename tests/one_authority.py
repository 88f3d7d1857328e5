"""Who tests believe over TLS, if they do not say: one of the usual authorities instead of all.

Each HTTP client reads them when it is made, even one of addresses without TLS, and they are so many that it takes 50 ms
of a processor. Tests make thousands of clients, and none of a public server.
"""

from __future__ import annotations

import os
from pathlib import Path

import certifi

_VARIABLE = "SSL_CERT_FILE"
_FILE = Path(__file__).resolve().parents[1] / ".cache/tests/authority.pem"
_END = "-----END CERTIFICATE-----\n"
_BEFORE = os.environ.get(_VARIABLE)


def believe_one() -> None:
    """Set it for this process and those that it starts."""
    first = Path(certifi.where()).read_text().partition(_END)[0] + _END
    _FILE.parent.mkdir(parents=True, exist_ok=True)
    fresh = _FILE.with_suffix(f".{os.getpid()}")  # other sessions start beside this one
    fresh.write_text(first)
    fresh.replace(_FILE)
    os.environ[_VARIABLE] = str(_FILE)


def usual_environment() -> dict[str, str]:
    """Return the environment of a program that meets public servers."""
    return {
        **{name: value for name, value in os.environ.items() if name != _VARIABLE},
        **({} if _BEFORE is None else {_VARIABLE: _BEFORE}),
    }

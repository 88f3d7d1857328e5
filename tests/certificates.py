"""Certificates for tests: an authority of one's own, and what it signs. Made by the openssl command."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Authority:
    """Signs certificates."""

    folder: Path
    name: str

    @classmethod
    def make(cls, folder: Path, name: str = "authority") -> Authority:
        made = cls(folder, name)
        made._openssl(
            *("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"),
            *("-keyout", made.key, "-out", made.cert, "-subj", f"/CN={name}"),
        )
        return made

    @property
    def cert(self) -> Path:
        return self.folder / f"{self.name}.pem"

    @property
    def key(self) -> Path:
        return self.folder / f"{self.name}.key"

    def issue(self, name: str, *, password: str | None = None) -> tuple[Path, Path]:
        """Return certificate and key for 127.0.0.1 and localhost, whose subject is `name`."""
        cert, key, request = (self.folder / f"{name}{suffix}" for suffix in (".pem", ".key", ".csr"))
        extensions = self.folder / f"{name}.ext"
        extensions.write_text("subjectAltName=IP:127.0.0.1,DNS:localhost\nbasicConstraints=CA:FALSE\n")
        cipher = ("-nodes",) if password is None else ("-passout", f"pass:{password}")
        self._openssl(
            *("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", *cipher),
            *("-keyout", key, "-out", request, "-subj", f"/CN={name}"),
        )
        self._openssl(
            *("x509", "-req", "-in", request, "-CA", self.cert, "-CAkey", self.key, "-CAcreateserial", "-days", "2"),
            *("-extfile", extensions, "-out", cert),
        )
        return cert, key

    @staticmethod
    def _openssl(*arguments: str | Path) -> None:
        done = subprocess.run(["openssl", *map(str, arguments)], capture_output=True, text=True, timeout=30)
        assert done.returncode == 0, done.stderr

"""TLS: the files, what is made of them, and a server that takes new ones without a pause.

Every change of the files makes a whole new context, with its own certificate and its own authorities, which handshakes
are handed over to as they begin. The listener stays, so no connection is refused, and open ones go on.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import logging
import socket
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import uvicorn

logger = logging.getLogger(__name__)

RELOAD_S = 2.0
"""As for key files: mounted secrets are replaced by a change of links."""
ClientAuth = Literal["none", "optional", "required"]


class TlsError(ValueError):
    """The files cannot be used; the message names the one."""


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """What `--ssl-*` name."""

    certfile: Path
    """The server's certificate and those between it and the root, PEM."""
    keyfile: Path | None = None
    """Its private key, PEM; None: it is in `certfile`."""
    keyfile_password_file: Path | None = None
    ca_certs: Path | None = None
    """Whose client certificates are taken, PEM."""
    client_auth: ClientAuth = "none"
    """Whether clients must show a certificate."""
    flags: str = "--ssl-"
    """How the flags begin that named them, for messages."""

    def context(self) -> ssl.SSLContext:
        """Return what new connections are made with.

        Raises
        ------
        TlsError
            If a file is missing, malformed, or does not fit the others.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["http/1.1"])
        password = ""
        if self.keyfile_password_file is not None:
            try:
                password = self.keyfile_password_file.read_text().rstrip("\r\n")
            except (OSError, UnicodeDecodeError) as error:
                raise TlsError(f"{self.flags}keyfile-password-file {self.keyfile_password_file}: {error}") from None
        try:
            # Without a password OpenSSL would ask the terminal.
            context.load_cert_chain(self.certfile, self.keyfile, lambda: password)
        except (OSError, ValueError) as error:  # an SSLError is an OSError
            raise TlsError(
                f"{self.flags}certfile {self.certfile} with {self.flags}keyfile {self.keyfile or self.certfile} cannot "
                f"be used: {error}"
            ) from None
        if self.ca_certs is not None:
            try:
                context.load_verify_locations(self.ca_certs)
            except OSError as error:
                raise TlsError(f"{self.flags}ca-certs {self.ca_certs} cannot be used: {error}") from None
        context.verify_mode = {
            "none": ssl.CERT_NONE,
            "optional": ssl.CERT_OPTIONAL,
            "required": ssl.CERT_REQUIRED,
        }[self.client_auth]
        return context

    def digest(self) -> bytes:
        """Return a digest of all their contents; a file that cannot be read counts as empty."""
        digest = hashlib.sha256()
        for path in (self.certfile, self.keyfile, self.keyfile_password_file, self.ca_certs):
            content = b""
            if path is not None:
                with contextlib.suppress(OSError):
                    content = path.read_bytes()
            digest.update(hashlib.sha256(content).digest())
        return digest.digest()


def tls_files(
    certfile: str | Path | None,
    keyfile: str | Path | None,
    keyfile_password_file: str | Path | None,
    ca_certs: str | Path | None,
    client_auth: str,
) -> TlsFiles | None:
    """Return the files; None if there are none.

    Raises
    ------
    TlsError
        If what is given does not go together, or the files cannot be used.
    """
    if certfile is None:
        for flag, value in (
            ("--ssl-keyfile", keyfile),
            ("--ssl-keyfile-password-file", keyfile_password_file),
            ("--ssl-ca-certs", ca_certs),
        ):
            if value is not None:
                raise TlsError(f"{flag} needs --ssl-certfile, the server's certificate")
        if client_auth != "none":
            raise TlsError(f"--ssl-client-auth {client_auth} needs --ssl-certfile, the server's certificate")
        return None
    if client_auth not in ("none", "optional", "required"):
        raise TlsError(f"--ssl-client-auth is {client_auth!r}: it must be none, optional or required")
    if (client_auth == "none") != (ca_certs is None):
        raise TlsError(
            "--ssl-ca-certs and --ssl-client-auth need each other: the first names the authorities whose client "
            "certificates the second asks for"
        )
    files = TlsFiles(
        Path(certfile), _path(keyfile), _path(keyfile_password_file), _path(ca_certs), cast(ClientAuth, client_auth)
    )
    files.context()
    return files


def _path(given: str | Path | None) -> Path | None:
    return None if given is None else Path(given)


def add_tls_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a server with TLS, by uvicorn's and vLLM's names."""
    group = parser.add_argument_group("TLS", "files are read again when they change, for new connections")
    group.add_argument("--ssl-certfile", type=Path, metavar="PEM", help="serve HTTPS with this certificate chain")
    group.add_argument("--ssl-keyfile", type=Path, metavar="PEM", help="its private key (default: in --ssl-certfile)")
    group.add_argument("--ssl-keyfile-password-file", type=Path, metavar="FILE", help="holds the key's password")
    group.add_argument("--ssl-ca-certs", type=Path, metavar="PEM", help="authorities of client certificates")
    group.add_argument(
        "--ssl-client-auth",
        choices=["none", "optional", "required"],
        default="none",
        help="whether clients must show a certificate of --ssl-ca-certs (%(default)s)",
    )


def tls_files_of(args: argparse.Namespace) -> TlsFiles | None:
    """Return the files that the flags name.

    Raises
    ------
    TlsError
        As `tls_files`.
    """
    return tls_files(
        args.ssl_certfile,
        args.ssl_keyfile,
        args.ssl_keyfile_password_file,
        args.ssl_ca_certs,
        args.ssl_client_auth,
    )


def url_of(bound: socket.socket, tls: TlsFiles | None) -> str:
    """Return the address of a server that listens on a socket."""
    host, port = bound.getsockname()[:2]
    scheme = "http" if tls is None else "https"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


class TlsServer(uvicorn.Server):
    """A server on sockets that are given; with TLS files, one that follows their changes.

    Parameters
    ----------
    tls
        None: plain HTTP.
    """

    def __init__(self, config: uvicorn.Config, tls: TlsFiles | None, reload_s: float = RELOAD_S) -> None:
        self._ending = asyncio.Event()
        super().__init__(config)
        self.tls = tls
        self._reload_s = reload_s
        self._watching: asyncio.Task[None] | None = None
        if tls is not None:
            self._seen = tls.digest()
            self._newest = tls.context()
            config.ssl_context_factory = lambda *_: self._first_context(tls)

    @property
    def should_exit(self) -> bool:
        """Whether it has been told to end; set by who tells it, in its own thread."""
        return self._ending.is_set()

    @should_exit.setter
    def should_exit(self, value: bool) -> None:
        (self._ending.set if value else self._ending.clear)()

    async def main_loop(self) -> None:
        """Run until it is told to end: at once then, where uvicorn looks ten times a second."""
        looking, ending = asyncio.create_task(super().main_loop()), asyncio.create_task(self._ending.wait())
        try:
            await asyncio.wait([looking, ending], return_when=asyncio.FIRST_COMPLETED)
            if looking.done():
                looking.result()
        finally:
            looking.cancel()
            ending.cancel()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to listen."""
        await super().startup(sockets)
        if self.tls is not None:
            self._watching = asyncio.create_task(self._watch(self.tls))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop to listen, and wait for what runs."""
        if self._watching is not None:
            self._watching.cancel()
        await super().shutdown(sockets)

    def _first_context(self, tls: TlsFiles) -> ssl.SSLContext:
        """Return the context that the listener keeps, which hands each connection over to the newest one."""
        context = tls.context()

        def hand_over(connection: ssl.SSLSocket | ssl.SSLObject, _: str | None, __: ssl.SSLContext) -> None:
            connection.context = self._newest

        context.sni_callback = hand_over  # called for each handshake, also for clients that name no server
        # Sessions belong to the first context: resumed, they would know nothing of new authorities.
        context.num_tickets = 0
        context.options |= ssl.OP_NO_TICKET
        return context

    async def _watch(self, tls: TlsFiles) -> None:
        while True:
            await asyncio.sleep(self._reload_s)
            digest = await asyncio.to_thread(tls.digest)
            if digest == self._seen:
                continue
            self._seen = digest
            try:
                self._newest = await asyncio.to_thread(tls.context)
            except TlsError as error:
                # As when the certificate has been replaced and its key has not been yet.
                logger.error("the TLS certificate stays as it was: %s", error)
            else:
                logger.info("new connections get the certificate that is now in %s", tls.certfile)

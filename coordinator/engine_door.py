"""What the two ends of the engine's port show each other: nothing on loopback, certificates and a token on a network.

`engine_channel` is the same in gRPC.
"""

from __future__ import annotations

import argparse
import contextlib
import ipaddress
import os
import ssl
from dataclasses import dataclass, field, replace
from pathlib import Path

from tpserve.coordinator.gateway.tls import TlsError, TlsFiles

TOKEN_VARIABLE = "TPSERVE_ENGINE_TOKEN"
DOOR_FIELDS = ("engine_ssl_certfile", "engine_ssl_keyfile", "engine_ssl_ca_certs", "engine_token")
"""Of configurations, flags and options."""
FLAGS = "--engine-ssl-"


@dataclass(frozen=True, slots=True)
class EngineDoor:
    """What an end of the port shows, and what it wants to be shown."""

    files: TlsFiles
    """Certificate and key of this end, good for a server and a client; and the authorities of the other end's."""
    token: str = field(repr=False)
    """Shared by both ends."""
    server_name: str | None = None
    """Name in the engine's certificate, if it is not the host of its address."""

    @property
    def own_name(self) -> str:
        """The first name in this end's certificate.

        Raises
        ------
        TlsError
            If it has none.
        """
        from cryptography import x509  # for a gateway beside an engine on a network alone

        certificate = x509.load_pem_x509_certificate(self.files.certfile.read_bytes())
        with contextlib.suppress(x509.ExtensionNotFound):
            for name in certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value:
                if isinstance(name, x509.DNSName | x509.IPAddress):
                    return str(name.value)
        raise TlsError(f"{FLAGS}certfile {self.files.certfile} has no subjectAltName, by which gateways know an engine")

    def client_context(self) -> ssl.SSLContext:
        """Return what a gateway's connection is tried with."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(self.files.ca_certs)
        context.load_cert_chain(self.files.certfile, self.files.keyfile)
        return context

    def read(self) -> tuple[bytes, bytes, bytes]:
        """Return certificate, key and authorities, PEM, as they are now."""
        assert self.files.ca_certs is not None
        keyfile = self.files.keyfile or self.files.certfile
        return self.files.certfile.read_bytes(), keyfile.read_bytes(), self.files.ca_certs.read_bytes()


def make_door(
    certfile: str | Path | None,
    keyfile: str | Path | None,
    ca_certs: str | Path | None,
    token: str | None,
    server_name: str | None = None,
) -> EngineDoor | None:
    """Return the door; None is a plain one.

    Raises
    ------
    TlsError
        If what is given does not go together, or a file cannot be used.
    """
    given = {"certfile": certfile, "keyfile": keyfile, "ca-certs": ca_certs}
    if certfile is None:
        for name, value in given.items():
            if value is not None:
                raise TlsError(f"{FLAGS}{name} needs {FLAGS}certfile, the certificate of this end")
        if token is not None:
            raise TlsError(
                f"--engine-token (or ${TOKEN_VARIABLE}) needs {FLAGS}certfile: without TLS it is there to be read"
            )
        return None
    if ca_certs is None:
        raise TlsError(f"{FLAGS}certfile needs {FLAGS}ca-certs, the authorities of the other end's certificate")
    if not token:
        raise TlsError(f"{FLAGS}certfile needs --engine-token (or ${TOKEN_VARIABLE}), which both ends share")
    key = None if keyfile is None else Path(keyfile)
    files = TlsFiles(Path(certfile), key, ca_certs=Path(ca_certs), client_auth="required", flags=FLAGS)
    files.context()
    return EngineDoor(files, token, server_name)


def add_door_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of either end."""
    group = parser.add_argument_group(
        "the engine's port", "mutual TLS with a token, where gateways and engine meet over a network"
    )
    group.add_argument(
        "--engine-ssl-certfile", type=Path, metavar="PEM", help="certificate of this end, for a server and a client"
    )
    group.add_argument("--engine-ssl-keyfile", type=Path, metavar="PEM", help="its key (default: in the certfile)")
    group.add_argument("--engine-ssl-ca-certs", type=Path, metavar="PEM", help="authorities of the other end's")
    group.add_argument(
        "--engine-token",
        default=os.environ.get(TOKEN_VARIABLE),
        metavar="SECRET",
        help=f"shared by both ends (or ${TOKEN_VARIABLE})",
    )


def own_door(args: argparse.Namespace) -> EngineDoor | None:
    """Return how processes beside the engine meet it, by the flags of `tpserve serve`.

    Raises
    ------
    TlsError
        If they do not go together, or would open the port to a network.
    """
    door = make_door(args.engine_ssl_certfile, args.engine_ssl_keyfile, args.engine_ssl_ca_certs, args.engine_token)
    require_safe(args.engine_host, door, insecure=args.engine_insecure)
    # They come by the address that it listens on, which need not be one that its certificate has.
    return None if door is None else replace(door, server_name=door.own_name)


def door_fields(args: argparse.Namespace) -> dict[str, str | None]:
    """Return the same as fields of the configurations of coordinator and gateway."""
    return {name: None if (value := getattr(args, name)) is None else str(value) for name in DOOR_FIELDS}


def require_safe(host: str, door: EngineDoor | None, *, insecure: bool) -> None:
    """See that the port is on loopback, or guarded, or wanted as it is.

    Raises
    ------
    TlsError
        Naming the host and what to give.
    """
    if door is None and not insecure and not is_loopback(host):
        raise TlsError(
            f"--engine-host {host} is on a network, where whoever reaches the port would use the engine: give "
            f"{FLAGS}certfile, {FLAGS}ca-certs and --engine-token, or --engine-insecure if only gateways reach it"
        )


def is_loopback(host: str) -> bool:
    """Tell whether an address is of this host alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False

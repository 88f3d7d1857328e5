"""Mutual TLS between the ranks of one group, where they reach each other over a network.

Every rank has a certificate of the group's own authority, in its name. Who connects is sure of the rank that owns the
door, and who owns the door of the rank that came.
"""

from __future__ import annotations

import os
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


class StrangerError(ConnectionError):
    """Who came is not of this group; the message says what is wrong with it."""


@dataclass(frozen=True, slots=True)
class GroupTls:
    """What one rank makes its connections with.

    Parameters
    ----------
    server, client
        For those that come to this rank's door, and for the doors that it goes to. Both show its certificate, and take
        certificates of the group's authority alone.
    name
        Returns the name in the certificate of a rank.
    """

    server: ssl.SSLContext
    client: ssl.SSLContext
    name: Callable[[int], str]

    @classmethod
    def load(cls, certificate: bytes, key: bytes, authority: bytes, name: Callable[[int], str]) -> GroupTls:
        """Make it of this rank's certificate and key and of the authority's certificate, all PEM.

        Raises
        ------
        ssl.SSLError
            If they are malformed, or the key is another certificate's.
        """
        server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        # Python reads a key from files alone: this one is in memory, and goes with its descriptor.
        descriptor = os.memfd_create("tpserve-key", os.MFD_CLOEXEC)
        try:
            with os.fdopen(descriptor, "wb", closefd=False) as file:
                file.write(certificate + key)
            for context in (server, client):
                context.minimum_version = ssl.TLSVersion.TLSv1_3
                context.verify_mode = ssl.CERT_REQUIRED
                context.load_verify_locations(cadata=authority.decode())
                context.load_cert_chain(f"/proc/self/fd/{descriptor}")
        finally:
            os.close(descriptor)
        server.num_tickets = 0  # no connection is resumed, and a ticket would wake a reader for nothing
        return cls(server, client, name)

    def accept(self, peer: socket.socket) -> ssl.SSLSocket:
        """Make a connection that came one of TLS; its timeout holds. On error the socket is closed.

        Raises
        ------
        StrangerError
            If it does not speak TLS, or has no certificate of the group.
        """
        try:
            return self.server.wrap_socket(peer, server_side=True)
        except OSError as error:
            peer.close()
            raise StrangerError(describe(error)) from None

    def require(self, peer: ssl.SSLSocket, rank: int) -> None:
        """Check that a connection that came is this rank's.

        Raises
        ------
        StrangerError
            If its certificate has another name.
        """
        shown: Any = peer.getpeercert() or {}  # the stubs leave open what has which shape
        names = [value for kind, value in shown.get("subjectAltName", ()) if kind == "DNS"]
        if names != [self.name(rank)]:
            theirs = ", ".join(names) or "nameless"
            raise StrangerError(f"it says that it is rank {rank}, its certificate is {theirs}'s")

    def connect(self, peer: socket.socket, rank: int) -> ssl.SSLSocket:
        """Make a connection to the door of `rank` one of TLS; its timeout holds. On error the socket is closed.

        Raises
        ------
        OSError
            If the door is not that rank's; an `ssl.SSLError` among others.
        """
        try:
            return self.client.wrap_socket(peer, server_hostname=self.name(rank))
        except OSError:
            peer.close()
            raise


def describe(error: OSError) -> str:
    """Say in words what a handshake failed of."""
    reason = getattr(error, "reason", None)
    if reason in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST"):
        return "it speaks no TLS, and this door takes nothing else"
    if reason == "PEER_DID_NOT_RETURN_A_CERTIFICATE":
        return "it shows no certificate"
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not of this group ({error.verify_message})"
    if isinstance(error, TimeoutError):
        return "it did not end the TLS handshake in time"
    return f"it went away, or TLS failed: {error.strerror or error}"

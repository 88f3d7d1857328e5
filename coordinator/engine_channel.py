"""The engine's port in gRPC: plain on loopback, or within mutual TLS with a token. For both ends.

Files are read again when they change: by the engine for the next handshake, by a gateway for its next session.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import ssl
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import grpc
import grpc.aio

from tpserve.coordinator.engine_door import FLAGS, EngineDoor
from tpserve.coordinator.gateway.tls import TlsError

logger = logging.getLogger(__name__)

_PROBE_S = 2.0
Options = Sequence[tuple[str, Any]]


def server_credentials(door: EngineDoor) -> grpc.ServerCredentials:
    """Return those of the engine, which follow the files."""
    fetch: Any = _Reloader(door).fetch  # the stubs do not know that None keeps what there is
    return grpc.dynamic_ssl_server_credentials(_configuration(door), fetch, require_client_authentication=True)


def _channel_credentials(door: EngineDoor) -> grpc.ChannelCredentials:
    """Return those of a gateway, as the files are now; each call shows the token."""
    certificate, key, authority = door.read()
    return grpc.composite_channel_credentials(
        grpc.ssl_channel_credentials(authority, key, certificate), grpc.access_token_call_credentials(door.token)
    )


def _configuration(door: EngineDoor) -> grpc.ServerCertificateConfiguration:
    certificate, key, authority = door.read()
    return grpc.ssl_server_certificate_configuration([(key, certificate)], root_certificates=authority)


class _Reloader:
    """Gives gRPC the files' content when it is new, and can be used."""

    def __init__(self, door: EngineDoor) -> None:
        self._door = door
        self._seen = door.files.digest()

    def fetch(self) -> grpc.ServerCertificateConfiguration | None:
        """Return a new configuration, or None to keep the old one. Called for each handshake."""
        if (digest := self._door.files.digest()) == self._seen:
            return None
        self._seen = digest
        try:
            self._door.files.context()
            made = _configuration(self._door)
        except (TlsError, OSError) as error:  # as when the certificate has been replaced and its key has not been yet
            logger.error("the certificate of the engine's port stays as it was: %s", error)
            return None
        logger.info("gateways are shown the certificate that is now in %s", self._door.files.certfile)
        return made


def open_channel(address: str, door: EngineDoor | None, options: Options) -> grpc.aio.Channel:
    """Return a gateway's channel to the engine."""
    if door is None:
        return grpc.aio.insecure_channel(address, options=options)
    return grpc.aio.secure_channel(address, _channel_credentials(door), options=_named(door, options))


def open_blocking_channel(address: str, door: EngineDoor | None, options: Options) -> grpc.Channel:
    """Return the same, for calls that block."""
    if door is None:
        return grpc.insecure_channel(address, options=options)
    return grpc.secure_channel(address, _channel_credentials(door), options=_named(door, options))


def _named(door: EngineDoor, options: Options) -> Options:
    return options if door.server_name is None else [*options, ("grpc.ssl_target_name_override", door.server_name)]


class TokenGuard(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in the stubs alone
    """Answers nobody who does not show the token."""

    def __init__(self, token: str) -> None:
        self._wanted = f"Bearer {token}".encode()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Let a call through, or end it before anything of it is read."""
        shown = dict(handler_call_details.invocation_metadata or ()).get("authorization", "")
        if hmac.compare_digest(str(shown).encode(), self._wanted):
            return await continuation(handler_call_details)
        return grpc.stream_stream_rpc_method_handler(_refuse)


async def _refuse(requests: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
    await context.abort(grpc.StatusCode.UNAUTHENTICATED, "the engine's token is not that of --engine-token")


async def explain(address: str, door: EngineDoor | None) -> str:
    """Try the port by hand, as gRPC does not tell why it cannot connect; return what is wrong with TLS, or nothing."""
    host, _, port = address.rpartition(":")
    if door is None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        name = None
    else:
        try:
            context = door.client_context()
        except OSError as error:
            return f"the files of {FLAGS}* cannot be used: {error}"
        name = door.server_name or host
    context.set_alpn_protocols(["h2"])  # as gRPC wants
    try:
        async with asyncio.timeout(_PROBE_S):
            reader, writer = await asyncio.open_connection(
                host.strip("[]"), int(port), ssl=context, server_hostname=name
            )
            try:
                heard = await reader.read(1)  # what the engine says of the certificate comes after the handshake
            finally:
                writer.transport.abort()
    except ssl.SSLCertVerificationError as error:
        return f"the engine's certificate is not one of {FLAGS}ca-certs for {name}: {error.verify_message}"
    except ssl.SSLError as error:
        if error.reason in ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE"):
            return "" if door is None else f"the engine's port speaks no TLS, and {FLAGS}certfile was given"
        heard = b""
    except (OSError, TimeoutError):
        return ""  # nobody is there, which is no matter of TLS
    if door is None:
        return f"the engine's port speaks TLS: give {FLAGS}certfile, {FLAGS}ca-certs and --engine-token"
    return "" if heard else f"the engine does not take the certificate of {FLAGS}certfile"

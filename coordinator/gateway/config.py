"""What one gateway process is started with."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from dataclasses import dataclass
from typing import Any, Self

from tpserve.coordinator.engine_door import TOKEN_VARIABLE, EngineDoor, make_door
from tpserve.coordinator.gateway.guard import MAX_CONNECTIONS
from tpserve.coordinator.gateway.tls import TlsFiles, tls_files
from tpserve.coordinator.log import LOG_FORMATS


class ConfigError(ValueError):
    """The configuration is malformed; the message names the field and the remedy."""


@dataclass(frozen=True, slots=True)
class GatewayConfig:
    """Arguments of one gateway process, given as one JSON object."""

    engine_address: str
    """`host:port` of the coordinator's gRPC server."""
    model_dir: str
    """Folder with tokenizer.json, tokenizer_config.json and the Hugging Face configs."""
    served_model_names: tuple[str, ...]
    """Names that clients may use; the first is the one answers carry when the client named none."""
    host: str = "127.0.0.1"
    port: int = 8000
    """0 takes a free port; the log says which."""
    listen_fd: int | None = None
    """A bound socket of the parent, which several gateways share; it wins over host and port."""
    engine_ssl_certfile: str | None = None
    """By which the coordinator knows this gateway, on a network; see `engine_door` for this and the next."""
    engine_ssl_keyfile: str | None = None
    engine_ssl_ca_certs: str | None = None
    """Authorities of the coordinator's certificate."""
    engine_ssl_server_name: str | None = None
    """Name in it, if it is not the host of `engine_address`."""
    engine_token: str | None = None
    """Shared with the coordinator; None takes it from the environment."""
    api_keys: tuple[str, ...] = ()
    """Any of them opens /v1; empty leaves it open."""
    api_key_file: str | None = None
    """More keys, one a line with its limits (see `keys`); read again when it changes."""
    limits_dir: str | None = None
    """A folder in which all gateways of this host keep what keys have used; None: this one stands alone."""
    ssl_certfile: str | None = None
    """Serve HTTPS with this certificate chain; this and the next are read again when they change (see `tls`)."""
    ssl_keyfile: str | None = None
    ssl_keyfile_password_file: str | None = None
    ssl_ca_certs: str | None = None
    """Authorities of client certificates."""
    ssl_client_auth: str = "none"
    """none, optional or required."""
    allow_origins: tuple[str, ...] = ()
    """Origins for CORS; `*` is any; empty turns CORS off."""
    max_body_bytes: int = 16 * 2**20
    max_connections: int = MAX_CONNECTIONS
    """Held at once, or as many as there are files for; then idle ones are closed, and without any, new ones refused."""
    header_timeout_s: float = 30.0
    """A connection must send a request's headers within this time; one that waits between requests may stay longer."""
    body_timeout_s: float = 30.0
    """A body must come within this time, and a second more for each 16 KiB of it."""
    write_timeout_s: float = 60.0
    """A client that reads nothing for so long, while its answer waits, is cut off."""
    request_timeout_s: float = 3600.0
    """From the last byte of the body to the last token."""
    accept_timeout_s: float = 30.0
    """The coordinator must accept or reject a request within this time."""
    rpc_timeout_s: float = 5.0
    """Deadline of unary calls to the coordinator, and period after which silence makes the gateway unhealthy."""
    session_timeout_s: float = 30.0
    """Silence of the coordinator after which the session is given up and its requests fail."""
    keep_alive_s: float = 15.0
    """A stream with nothing to say sends a comment this often, so that proxies keep it open."""
    drain_timeout_s: float = 30.0
    """After SIGTERM, running requests get this long."""
    log_level: str = "info"
    log_format: str = "text"
    """text or json."""
    enable_debug: bool = False
    """Opens /debug."""
    otlp_traces_endpoint: str | None = None
    """Where spans are sent; None: nowhere."""
    router_token: str | None = None
    """Secret shared with a router, which may then move streams between gateways; None: there is none."""
    parent_pid: int | None = None
    """The process that started this one; the gateway ends with it. None: it stands alone."""

    def __post_init__(self) -> None:
        if not self.served_model_names:
            raise ConfigError("served_model_names is empty: give at least one name")
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port is {self.port}: it must lie in [0, 65535]")
        if ":" not in self.engine_address:
            raise ConfigError(f"engine_address is {self.engine_address!r}: it must be host:port")
        if any(not key for key in self.api_keys):
            raise ConfigError("api_keys holds an empty key: leave the list empty to serve without keys")
        if self.router_token == "":
            raise ConfigError("router_token is empty: leave it out to serve without a router")
        for name in (
            "max_body_bytes",
            "max_connections",
            *(f.name for f in dataclasses.fields(self) if f.name.endswith("_s")),
        ):
            value = getattr(self, name)
            if not 0 <= value < math.inf or (value == 0 and name != "drain_timeout_s"):
                raise ConfigError(f"{name} is {value}: it must be positive and finite")
        if self.log_level not in ("debug", "info", "warning", "error"):
            raise ConfigError(f"log_level is {self.log_level!r}: it must be debug, info, warning or error")
        if self.log_format not in LOG_FORMATS:
            raise ConfigError(f"log_format is {self.log_format!r}: it must be text or json")

    def tls_files(self) -> TlsFiles | None:
        """Return the files of HTTPS; None is HTTP.

        Raises
        ------
        TlsError
            If they cannot be used.
        """
        return tls_files(
            self.ssl_certfile,
            self.ssl_keyfile,
            self.ssl_keyfile_password_file,
            self.ssl_ca_certs,
            self.ssl_client_auth,
        )

    def engine_door(self) -> EngineDoor | None:
        """Return how the coordinator is met; None is without TLS.

        Raises
        ------
        TlsError
            If the files cannot be used, or something is missing.
        """
        return make_door(
            self.engine_ssl_certfile,
            self.engine_ssl_keyfile,
            self.engine_ssl_ca_certs,
            self.engine_token or os.environ.get(TOKEN_VARIABLE),
            self.engine_ssl_server_name,
        )

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read the JSON object; lists become tuples.

        Raises
        ------
        ConfigError
            If it is not an object, or a field is unknown, missing or of the wrong type.
        """
        try:
            raw = json.loads(text)
        except ValueError as error:
            raise ConfigError(f"the configuration is not valid JSON: {error}") from None
        if not isinstance(raw, dict):
            raise ConfigError("the configuration must be one JSON object")
        fields = {field.name: field for field in dataclasses.fields(cls)}
        if unknown := sorted(set(raw) - set(fields)):
            raise ConfigError(f"unknown fields: {', '.join(unknown)}; known are {', '.join(fields)}")
        missing = [name for name, field in fields.items() if field.default is dataclasses.MISSING and name not in raw]
        if missing:
            raise ConfigError(f"missing fields: {', '.join(missing)}")
        values: dict[str, Any] = {name: _convert(name, str(fields[name].type), value) for name, value in raw.items()}
        return cls(**values)


def _convert(name: str, annotation: str, value: Any) -> object:
    """Check one JSON value against the field's annotation."""
    if annotation == "tuple[str, ...]":
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return tuple(value)
    elif annotation in ("str", "str | None"):
        if isinstance(value, str):
            return value
        if value is None and annotation == "str | None":
            return None
    elif annotation == "bool":
        if isinstance(value, bool):
            return value
    elif isinstance(value, bool):
        pass
    elif annotation in ("int", "int | None") and isinstance(value, int):
        return value
    elif annotation == "float" and isinstance(value, int | float):
        return float(value)
    raise ConfigError(f"{name} is {value!r}: it must be {annotation}")

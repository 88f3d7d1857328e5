"""The engine's port on a network: who has a certificate and the token is served, others are told what is wrong."""

from __future__ import annotations

import asyncio
import logging
import shutil
from argparse import ArgumentParser
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from builders import make_config
from certificates import Authority
from tpserve.coordinator.__main__ import CoordinatorConfig, _listen
from tpserve.coordinator.cluster import Cluster, ClusterConfig
from tpserve.coordinator.engine import Engine, EngineConfig
from tpserve.coordinator.engine_channel import explain, open_blocking_channel
from tpserve.coordinator.engine_door import (
    TOKEN_VARIABLE,
    EngineDoor,
    is_loopback,
    make_door,
    own_door,
)
from tpserve.coordinator.gateway.config import GatewayConfig
from tpserve.coordinator.gateway.engine_client import EngineClient
from tpserve.coordinator.gateway.errors import EngineUnavailable
from tpserve.coordinator.gateway.tls import TlsError
from tpserve.coordinator.metrics import Metrics
from tpserve.coordinator.scheduler import Scheduler
from tpserve.coordinator.serve_arguments import add_arguments
from tpserve.coordinator.service import EngineService
from tpserve.proto.pb import engine_pb2, engine_pb2_grpc
from tpserve.proto.rank import RankConfig

TOKEN = "a-token-of-this-test"


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority.make(tmp_path)


@pytest.fixture
def doors(authority: Authority) -> tuple[EngineDoor, EngineDoor]:
    """The engine's and a gateway's."""
    made = [make_door(*authority.issue(name), authority.cert, TOKEN) for name in ("engine", "gateway")]
    engine, gateway = made
    assert engine is not None
    assert gateway is not None
    return engine, gateway


@asynccontextmanager
async def listening(door: EngineDoor | None) -> AsyncIterator[str]:
    """Open the coordinator's own port, on an engine without ranks; give its address."""
    rank = RankConfig(0, 1, Path(), Path(), "auto", 8, 4, 1, "", 1.0)
    metrics = Metrics("m")
    engine = Engine(EngineConfig(), Scheduler(make_config()), Cluster(ClusterConfig(rank, 1.0)), metrics)
    info = engine_pb2.EngineInfo(max_model_len=64, vocab_size=100, version="v")
    config = CoordinatorConfig("", "", "m", 1, 1, 1, 1, 0)
    if door is not None:
        files = door.files
        config = replace(
            config,
            engine_ssl_certfile=str(files.certfile),
            engine_ssl_keyfile=str(files.keyfile),
            engine_ssl_ca_certs=str(files.ca_certs),
            engine_token=door.token,
        )
    server, address = await _listen(config, EngineService(engine, metrics, info))
    try:
        yield address
    finally:
        await server.stop(None)


async def said_of(
    address: str, door: EngineDoor | None, caplog: pytest.LogCaptureFixture, *, is_answered: bool = False
) -> str:
    """Return what a gateway logs first of the session that it cannot open.

    Where no answer comes it waits for one as long as it is told to, and only then asks why.
    """
    caplog.clear()
    client = EngineClient(address, rpc_timeout_s=3.0 if is_answered else 0.3, session_timeout_s=5.0, door=door)
    with caplog.at_level(logging.WARNING):
        client.start()
        async with asyncio.timeout(60):
            while not (found := [text for text in caplog.messages if "no session" in text]):  # noqa: ASYNC110  # a log
                await asyncio.sleep(0.02)
    with pytest.raises(EngineUnavailable):
        await client.metrics()
    await client.close()
    return found[0]


async def test_a_gateway_with_both_is_served(doors: tuple[EngineDoor, EngineDoor]) -> None:
    engine, gateway = doors
    async with listening(engine) as address:
        client = EngineClient(address, rpc_timeout_s=5.0, session_timeout_s=5.0, door=gateway)
        client.start()
        await client.wait_connected(10)
        assert client.info.max_model_len == 64
        assert "tpserve_" in await client.metrics()
        assert await explain(address, gateway) == ""
        assert await explain("127.0.0.1:1", gateway) == "", "where nobody is, TLS is not what is wrong"
        await client.close()


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("plain", "the engine's port speaks TLS: give --engine-ssl-certfile, --engine-ssl-ca-certs and --engine-token"),
        ("of another authority", "the engine does not take the certificate of --engine-ssl-certfile"),
        ("that trusts another", "the engine's certificate is not one of --engine-ssl-ca-certs for 127.0.0.1"),
        ("for another name", "the engine's certificate is not one of --engine-ssl-ca-certs for elsewhere"),
        ("with the wrong token", "UNAUTHENTICATED: the engine's token is not that of --engine-token"),
    ],
)
async def test_another_gateway_is_not_and_its_log_says_why(
    name: str,
    why: str,
    doors: tuple[EngineDoor, EngineDoor],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine, gateway = doors
    other = Authority.make(tmp_path, "other")
    certfile, keyfile = other.issue("stranger")
    door = {
        "plain": None,
        "of another authority": replace(gateway, files=replace(gateway.files, certfile=certfile, keyfile=keyfile)),
        "that trusts another": replace(gateway, files=replace(gateway.files, ca_certs=other.cert)),
        "for another name": replace(gateway, server_name="elsewhere"),
        "with the wrong token": replace(gateway, token="guess"),
    }[name]
    async with listening(engine) as address:
        assert why in await said_of(address, door, caplog, is_answered=name == "with the wrong token")


async def test_tls_at_a_plain_port_is_told(
    doors: tuple[EngineDoor, EngineDoor], caplog: pytest.LogCaptureFixture
) -> None:
    async with listening(None) as address:
        said = await said_of(address, doors[1], caplog)
    assert "the engine's port speaks no TLS, and --engine-ssl-certfile was given" in said


async def test_without_a_certificate_the_token_opens_nothing(
    doors: tuple[EngineDoor, EngineDoor], authority: Authority
) -> None:
    engine, _ = doors
    async with listening(engine) as address:
        credentials = grpc.composite_channel_credentials(
            grpc.ssl_channel_credentials(authority.cert.read_bytes()), grpc.access_token_call_credentials(TOKEN)
        )
        async with grpc.aio.secure_channel(address, credentials) as channel:
            stub = engine_pb2_grpc.EngineStub(channel)  # type: ignore[no-untyped-call]  # generated code
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await stub.Describe(engine_pb2.DescribeRequest(), timeout=5)
        assert raised.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_every_call_wants_the_token(doors: tuple[EngineDoor, EngineDoor]) -> None:
    engine, gateway = doors
    async with listening(engine) as address:

        def call() -> list[grpc.StatusCode]:
            codes: list[grpc.StatusCode] = []
            with open_blocking_channel(address, replace(gateway, token="guess"), []) as channel:
                stub = engine_pb2_grpc.EngineStub(channel)  # type: ignore[no-untyped-call]  # generated code
                calls: list[Any] = [
                    lambda: stub.Describe(engine_pb2.DescribeRequest(), timeout=5),
                    lambda: stub.Metrics(engine_pb2.MetricsRequest(), timeout=5),
                    lambda: stub.Trace(engine_pb2.TraceRequest(num_steps=1), timeout=5),
                    lambda: list(stub.Session(iter([]), timeout=5)),
                ]
                for one in calls:
                    with pytest.raises(grpc.RpcError) as raised:
                        one()
                    assert isinstance(raised.value, grpc.Call)
                    codes.append(raised.value.code())
            return codes

        assert await asyncio.to_thread(call) == [grpc.StatusCode.UNAUTHENTICATED] * 4


async def test_a_gateway_waits_for_files_that_are_being_replaced(
    doors: tuple[EngineDoor, EngineDoor], caplog: pytest.LogCaptureFixture
) -> None:
    engine, gateway = doors
    kept = gateway.files.certfile.with_suffix(".kept")
    gateway.files.certfile.rename(kept)
    async with listening(engine) as address:
        client = EngineClient(address, rpc_timeout_s=1.0, session_timeout_s=5.0, door=gateway)
        with caplog.at_level(logging.WARNING):
            client.start()
            async with asyncio.timeout(15):
                while "the files of --engine-ssl-* cannot be read" not in caplog.text:  # noqa: ASYNC110  # a log
                    await asyncio.sleep(0.02)
        kept.rename(gateway.files.certfile)
        await client.wait_connected(10)
        assert client.info.max_model_len == 64
        await client.close()


async def test_new_files_are_taken_and_broken_ones_are_not(
    doors: tuple[EngineDoor, EngineDoor], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An authority that is replaced shuts out who has the old one's certificates."""
    engine, gateway = doors

    async def is_served(door: EngineDoor, address: str) -> bool:
        def call() -> bool:
            with open_blocking_channel(address, door, [("grpc.use_local_subchannel_pool", 1)]) as channel:
                stub = engine_pb2_grpc.EngineStub(channel)  # type: ignore[no-untyped-call]  # generated code
                try:
                    stub.Describe(engine_pb2.DescribeRequest(), timeout=5)
                except grpc.RpcError:
                    return False
                return True

        return await asyncio.to_thread(call)

    renewed = Authority.make(tmp_path, "renewed")
    new_gateway = make_door(*renewed.issue("new-gateway"), renewed.cert, TOKEN)
    new_cert, new_key = renewed.issue("new-engine")
    files = engine.files
    assert new_gateway is not None
    assert files.keyfile is not None
    assert files.ca_certs is not None
    async with listening(engine) as address:
        assert await is_served(gateway, address)
        shutil.copy(new_cert, files.certfile)  # its key is still the old one
        assert await is_served(gateway, address)
        assert "the certificate of the engine's port stays as it was" in caplog.text
        shutil.copy(new_key, files.keyfile)
        shutil.copy(renewed.cert, files.ca_certs)
        assert not await is_served(replace(gateway, files=replace(gateway.files, ca_certs=renewed.cert)), address)
        assert await is_served(new_gateway, address)


def test_what_does_not_go_together_is_refused(authority: Authority, tmp_path: Path) -> None:
    cert, key = authority.issue("engine")
    _, other_key = authority.issue("other")
    assert make_door(None, None, None, None) is None
    for given, why in (
        ((None, key, None, None), "--engine-ssl-keyfile needs --engine-ssl-certfile"),
        ((None, None, cert, None), "--engine-ssl-ca-certs needs --engine-ssl-certfile"),
        ((None, None, None, "secret"), rf"--engine-token \(or \${TOKEN_VARIABLE}\) needs --engine-ssl-certfile"),
        ((cert, key, None, "secret"), "--engine-ssl-certfile needs --engine-ssl-ca-certs"),
        ((cert, key, cert, None), "--engine-ssl-certfile needs --engine-token"),
        ((cert, key, cert, ""), "--engine-ssl-certfile needs --engine-token"),
        ((cert, other_key, cert, "secret"), "--engine-ssl-certfile .* with --engine-ssl-keyfile .* cannot be used"),
        ((cert, key, tmp_path / "none", "secret"), "--engine-ssl-ca-certs .*none cannot be used"),
    ):
        with pytest.raises(TlsError, match=why):
            make_door(*given)


def flags(*arguments: object) -> Any:
    parser = ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(["model", *map(str, arguments)])


def test_a_port_on_a_network_is_guarded_or_wanted_as_it_is(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    for host in ("127.0.0.1", "127.1.2.3", "localhost", "::1"):
        assert is_loopback(host)
        assert own_door(flags("--engine-host", host)) is None
    for host in ("0.0.0.0", "::", "10.0.0.1", "engine.example"):
        with pytest.raises(TlsError, match=f"--engine-host {host} is on a network.*--engine-insecure"):
            own_door(flags("--engine-host", host))
        assert own_door(flags("--engine-host", host, "--engine-insecure")) is None
    cert, key = authority.issue("engine")
    files = ("--engine-ssl-certfile", cert, "--engine-ssl-keyfile", key, "--engine-ssl-ca-certs", authority.cert)
    door = own_door(flags("--engine-host", "0.0.0.0", *files, "--engine-token", TOKEN))
    assert door is not None
    assert door.server_name == "127.0.0.1", "the certificate's first name"
    assert TOKEN not in repr(door)
    nameless = authority.folder / "authority.pem"
    with pytest.raises(TlsError, match=r"authority\.pem has no subjectAltName"):
        own_door(
            flags(
                *("--engine-ssl-certfile", nameless, "--engine-ssl-keyfile", authority.key),
                *("--engine-ssl-ca-certs", nameless, "--engine-token", TOKEN),
            )
        )


def test_the_token_may_come_from_the_environment(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    cert, key = authority.issue("gateway")
    config = GatewayConfig(
        "h:1",
        "/m",
        ("m",),
        engine_ssl_certfile=str(cert),
        engine_ssl_keyfile=str(key),
        engine_ssl_ca_certs=str(authority.cert),
    )
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    with pytest.raises(TlsError, match="needs --engine-token"):
        config.engine_door()
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    door = config.engine_door()
    assert door is not None
    assert door.token == TOKEN
    assert flags().engine_token == TOKEN

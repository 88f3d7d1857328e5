"""TLS at the gateway's door: certificates that change, clients that must show one, and files that cannot be used."""

from __future__ import annotations

import asyncio
import logging
import shutil
import ssl
from pathlib import Path

import httpx
import pytest

from certificates import Authority
from tpserve.coordinator.gateway.tls import TlsError, TlsFiles, TlsServer, tls_files
from unit.gateway.conftest import StackFactory
from unit.gateway.test_protocol import USER

BODY = {"messages": [USER], "max_tokens": 30, "stream": True}


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.make(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.make(tmp_path_factory.mktemp("stranger"), "stranger")


@pytest.fixture
def server_files(authority: Authority, tmp_path: Path) -> tuple[Path, Path]:
    """Copies that a test may replace."""
    for source, name in zip(authority.issue("first"), ("tls.crt", "tls.key"), strict=True):
        shutil.copy(source, tmp_path / name)
    return tmp_path / "tls.crt", tmp_path / "tls.key"


def trusting(*authorities: Authority, shows: tuple[Path, Path] | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context()
    for authority in authorities:
        context.load_verify_locations(authority.cert)
    if shows is not None:
        context.load_cert_chain(*shows)
    return context


async def subject(url: str, context: ssl.SSLContext) -> str:
    """Return the name in the certificate that a new connection gets."""
    host, port = url.removeprefix("https://").split(":")
    _, writer = await asyncio.open_connection(host, int(port), ssl=context)
    name = dict(pair for part in writer.get_extra_info("peercert")["subject"] for pair in part)["commonName"]
    writer.close()
    return str(name)


async def test_https_and_a_certificate_that_changes(
    make_stack: StackFactory,
    authority: Authority,
    server_files: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(TlsServer.__init__, "__defaults__", (0.02,))
    certfile, keyfile = server_files
    context = trusting(authority)
    async with make_stack(ssl_certfile=str(certfile), ssl_keyfile=str(keyfile), verify=context) as stack:
        assert stack.url.startswith("https://")
        assert await subject(stack.url, context) == "first"
        stack.engine.gate.clear()
        async with stack.http.stream("POST", "/v1/chat/completions", json=BODY) as reply:
            lines = reply.aiter_lines()
            await anext(lines)
            new_cert, new_key = authority.issue("second")
            with caplog.at_level(logging.ERROR):
                shutil.copy(new_cert, certfile)  # which does not fit the old key
                async with asyncio.timeout(20):
                    while "stays as it was" not in caplog.text:
                        assert await subject(stack.url, context) == "first"
            assert await subject(stack.url, context) == "first"
            shutil.copy(new_key, keyfile)
            async with asyncio.timeout(20):
                while await subject(stack.url, context) != "second":
                    pass
            # Under load, with changes all the time, nobody is refused.
            changing = asyncio.create_task(_change(authority, certfile, keyfile))
            for _ in range(100):
                assert await subject(stack.url, context) in ("second", "third", "fourth")
            await changing
            stack.engine.gate.set()
            assert [line async for line in lines if line][-1] == "data: [DONE]", "an open connection goes on"


async def _change(authority: Authority, certfile: Path, keyfile: Path) -> None:
    pairs = [await asyncio.to_thread(authority.issue, name) for name in ("third", "fourth")]
    for cert, key in pairs * 3:
        shutil.copy(cert, certfile)
        shutil.copy(key, keyfile)
        await asyncio.sleep(0.03)


async def test_clients_must_show_a_certificate(
    make_stack: StackFactory, authority: Authority, stranger: Authority, server_files: tuple[Path, Path]
) -> None:
    certfile, keyfile = server_files
    good = trusting(authority, shows=authority.issue("client"))
    files = {"ssl_certfile": str(certfile), "ssl_keyfile": str(keyfile), "ssl_ca_certs": str(authority.cert)}
    async with make_stack(**files, ssl_client_auth="required", verify=good) as stack:
        assert (await stack.http.get("/version")).status_code == 200
        for bad in (trusting(authority), trusting(authority, shows=stranger.issue("nobody"))):
            async with httpx.AsyncClient(base_url=stack.url, verify=bad, timeout=20) as http:
                with pytest.raises(httpx.TransportError):
                    await http.get("/version")
    async with make_stack(**files, ssl_client_auth="optional", verify=trusting(authority)) as stack:
        assert (await stack.http.get("/version")).status_code == 200


async def test_plain_http_and_an_unknown_authority_get_nothing(
    make_stack: StackFactory, authority: Authority, stranger: Authority, server_files: tuple[Path, Path]
) -> None:
    certfile, keyfile = server_files
    async with make_stack(ssl_certfile=str(certfile), ssl_keyfile=str(keyfile), verify=trusting(authority)) as stack:
        async with httpx.AsyncClient(verify=trusting(stranger)) as http:
            with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
                await http.get(stack.url)
            with pytest.raises(httpx.TransportError):
                await http.get(stack.url.replace("https", "http"))
        assert (await stack.http.get("/version")).status_code == 200


async def test_an_authority_that_is_taken_away_opens_no_more(
    make_stack: StackFactory,
    authority: Authority,
    stranger: Authority,
    server_files: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(TlsServer.__init__, "__defaults__", (0.02,))
    authorities = tmp_path / "ca.pem"
    shutil.copy(authority.cert, authorities)
    good, other = (trusting(authority, shows=who.issue("client")) for who in (authority, stranger))
    files = {"ssl_certfile": str(server_files[0]), "ssl_keyfile": str(server_files[1])}

    async def opens(url: str, context: ssl.SSLContext) -> bool:
        async with httpx.AsyncClient(base_url=url, verify=context, timeout=20) as http:
            try:
                return (await http.get("/version")).status_code == 200
            except httpx.TransportError:
                return False

    async with make_stack(**files, ssl_ca_certs=str(authorities), ssl_client_auth="required", verify=good) as stack:
        assert await opens(stack.url, good)
        assert not await opens(stack.url, other)
        shutil.copy(stranger.cert, authorities)
        async with asyncio.timeout(20):
            while not await opens(stack.url, other):
                pass
        assert not await opens(stack.url, good)


def test_a_key_with_a_password(authority: Authority, tmp_path: Path) -> None:
    certfile, keyfile = authority.issue("locked", password="open sesame")
    password = tmp_path / "password"
    password.write_text("open sesame\n")
    TlsFiles(certfile, keyfile, password).context()
    password.write_text("wrong")
    for files in (TlsFiles(certfile, keyfile, password), TlsFiles(certfile, keyfile)):
        with pytest.raises(TlsError, match="--ssl-keyfile") as caught:
            files.context()
        assert "sesame" not in str(caught.value)


def test_what_does_not_go_together_is_named(authority: Authority, tmp_path: Path) -> None:
    cert, key = authority.issue("good")
    _, other_key = authority.issue("other")
    missing, nonsense = tmp_path / "missing.pem", tmp_path / "nonsense.pem"
    nonsense.write_text("nonsense")
    for arguments, words in (
        ((None, key, None, None, "none"), "--ssl-keyfile needs --ssl-certfile"),
        ((None, None, None, key, "none"), "--ssl-ca-certs needs --ssl-certfile"),
        ((None, None, None, None, "required"), "--ssl-client-auth required needs --ssl-certfile"),
        ((cert, key, None, None, "required"), "need each other"),
        ((cert, key, None, authority.cert, "none"), "need each other"),
        ((cert, key, None, authority.cert, "maybe"), "'maybe'"),
        ((cert, key, missing, None, "none"), "--ssl-keyfile-password-file"),
        ((cert, other_key, None, None, "none"), "cannot be used"),
        ((cert, None, None, None, "none"), "cannot be used"),
        ((missing, key, None, None, "none"), "missing.pem"),
        ((nonsense, key, None, None, "none"), "nonsense.pem"),
        ((cert, key, None, nonsense, "required"), "--ssl-ca-certs"),
        ((cert, key, None, missing, "required"), "--ssl-ca-certs"),
    ):
        with pytest.raises(TlsError) as caught:
            tls_files(*arguments)
        assert words in str(caught.value)
    assert tls_files(None, None, None, None, "none") is None

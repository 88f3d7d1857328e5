"""Who answers in `tpserve chat`: an engine of this process, or a server over HTTP."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from tpserve.coordinator.gateway.answers import ChatCompletionChunk
from tpserve.coordinator.gateway.errors import ApiError
from tpserve.coordinator.python_engine.engine import MLCEngine

_TIMEOUT = httpx.Timeout(30.0, read=3600.0)
"""Reading waits as long as a server may work on a request."""


class EngineBackend:
    """An engine of this process.

    Parameters
    ----------
    temporary
        Folder to remove in the end.
    """

    def __init__(self, engine: MLCEngine, temporary: Path | None = None) -> None:
        self._engine = engine
        self._temporary = temporary

    def stream(self, fields: dict[str, Any]) -> Iterator[ChatCompletionChunk]:
        """See Backend."""
        with self._engine.chat.completions.create(**fields, stream=True) as chunks:
            yield from chunks

    def metrics(self) -> str:
        """See Backend."""
        return self._engine.metrics().text

    def close(self) -> None:
        """See Backend."""
        self._engine.terminate()
        if self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)


class ServerError(ApiError):
    """What a server answered instead of text, or that none answers."""


class ServerBackend:
    """A server with OpenAI's API.

    Parameters
    ----------
    base_url
        With or without `/v1`.
    ca_certs
        PEM of authorities that are believed besides the usual ones.

    Raises
    ------
    ServerError
        If `ca_certs` cannot be used.
    """

    def __init__(self, base_url: str, api_key: str | None, ca_certs: Path | None = None) -> None:
        self._base_url = base_url.rstrip("/").removesuffix("/v1")
        headers = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
        verify = httpx.create_ssl_context()
        if ca_certs is not None:
            try:
                verify.load_verify_locations(ca_certs)
            except OSError as error:
                raise ServerError(f"--ssl-ca-certs {ca_certs} cannot be used: {error}") from None
        self._client = httpx.Client(base_url=self._base_url, headers=headers, timeout=_TIMEOUT, verify=verify)

    def default_model(self) -> str:
        """Return the first name the server serves.

        Raises
        ------
        ServerError
            If it has none, or does not answer.
        """
        with self._told():
            reply = self._client.get("/v1/models")
            self._check(reply)
            names = [str(model["id"]) for model in reply.json()["data"]]
        if not names:
            raise ServerError(f"the server at {self._base_url} serves no model")
        return names[0]

    def stream(self, fields: dict[str, Any]) -> Iterator[ChatCompletionChunk]:
        """See Backend."""
        body = {**fields, "stream": True}
        with self._told(), self._client.stream("POST", "/v1/chat/completions", json=body) as reply:
            if reply.status_code != 200:
                reply.read()
            self._check(reply)
            for line in reply.iter_lines():
                data = line.removeprefix("data: ")
                if data == line or data == "[DONE]":
                    continue
                event = json.loads(data)
                if "error" in event:
                    raise ServerError(event["error"]["message"])
                yield ChatCompletionChunk.model_validate(event)

    def metrics(self) -> str:
        """See Backend."""
        with self._told():
            reply = self._client.get("/metrics")
            self._check(reply)
            return reply.text

    def close(self) -> None:
        """See Backend."""
        self._client.close()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Say what is wrong in one line."""
        try:
            yield
        except httpx.HTTPError as error:
            raise ServerError(f"no answer from {self._base_url}: {error or type(error).__name__}") from None
        except (ValueError, KeyError, TypeError) as error:
            raise ServerError(f"{self._base_url} does not speak OpenAI's API: {error!r}") from None

    @staticmethod
    def _check(reply: httpx.Response) -> None:
        if reply.status_code == 200:
            return
        try:
            message = reply.json()["error"]["message"]
        except (ValueError, KeyError, TypeError):
            message = reply.text[:200]
        raise ServerError(f"{message} (HTTP {reply.status_code})")

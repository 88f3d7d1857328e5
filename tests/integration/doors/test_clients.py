"""Other clients than Python's: the official npm package in Node, and `fetch` in a browser on another origin."""

from __future__ import annotations

import functools
import hashlib
import http.server
import json
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from integration.doors.browser import needs_browser, open_browser
from integration.doors.conftest import ALIAS, ORIGIN
from integration.doors.shapes import FORCED_CALL, PERSON, TOOL, check_call, check_person
from one_authority import usual_environment
from server import MODEL_NAME, REPOSITORY, Server, chat_request, chat_text, together, until

CLIENTS = REPOSITORY / "tests/clients"
QUESTION = "What is the capital of France?"
SHAPES: dict[str, dict[str, Any]] = {
    "call": {**FORCED_CALL, "max_tokens": 160},
    "schema": {"response_format": PERSON, "max_tokens": 96},
    "responsesCall": {
        "tools": [{"type": "function", **TOOL["function"]}],
        "tool_choice": {"type": "function", "name": "get_weather"},
        "max_output_tokens": 160,
    },
}


@pytest.fixture(scope="session")
def node_folder() -> Path:
    """A folder with the scenarios and the packages of the lock file, installed once for all runs."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("no node and npm on this machine")
    lock = (CLIENTS / "package-lock.json").read_bytes()
    folder = REPOSITORY / ".cache/clients" / hashlib.sha256(lock).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    for path in CLIENTS.iterdir():
        shutil.copy(path, folder)
    if not (folder / "node_modules/openai").is_dir():
        done = subprocess.run(
            ["npm", "ci", "--silent", "--no-audit", "--no-fund", "--ignore-scripts"],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=120,
            env=usual_environment(),
        )
        if done.returncode:
            pytest.skip(f"npm cannot install the clients here: {done.stderr[-300:]}")
    return folder


def test_row_38_the_official_npm_package(node_folder: Path, server: Server, client: openai.OpenAI) -> None:
    """It gets what the Python package gets."""
    done = subprocess.run(
        ["node", "scenarios.mjs", f"{server.url}/v1", MODEL_NAME, json.dumps(SHAPES)],
        cwd=node_folder,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    got = json.loads(done.stdout)
    calls: list[Callable[[], Any]] = [
        lambda: chat_text(client, QUESTION),
        lambda: client.chat.completions.create(**chat_request(QUESTION, n=2, seed=1, temperature=1)),
        lambda: client.completions.create(model=MODEL_NAME, prompt="Once upon a time", temperature=0, max_tokens=8),
        lambda: client.chat.completions.create(**chat_request(QUESTION, **SHAPES["call"])).choices[0],
        lambda: chat_text(client, QUESTION, **SHAPES["schema"]),
    ]
    text, two, more, call, person = together(*calls)
    assert got["models"] == [MODEL_NAME, ALIAS]
    assert got["whole"] == got["streamed"]["text"] == got["responses"]["text"] == text
    assert (got["streamed"]["finish"], got["streamed"]["tokens"]) == ("stop", 8)
    assert got["stopped"]["text"] == text[: text.index("Paris")]
    assert got["stopped"]["finish"] == "stop"
    assert got["choices"] == [choice.message.content for choice in two.choices]
    assert got["completion"] == more.choices[0].text
    assert (got["responses"]["first"], got["responses"]["last"]) == ("response.created", "response.completed")
    refused = {"kind": "BadRequestError", "status": 400, "code": None, "param": "temperature"}
    assert got["badValue"] == refused
    assert got["badModel"] == {"kind": "NotFoundError", "status": 404, "code": "model_not_found", "param": "model"}
    assert got["aborted"] == 5
    (made,) = call.message.tool_calls
    assert got["call"] == {**made.function.model_dump(), "finish": "tool_calls"}
    assert got["streamedCall"] == got["call"]
    assert got["responsesCall"] == {**made.function.model_dump(), "type": "function_call"}
    check_call(got["call"], got["call"]["finish"])
    check_person(got["schema"]["text"], got["schema"]["finish"])
    assert got["schema"]["text"] == person
    until(lambda: server.metric("num_requests_running") == 0, within_s=20, what="the abandoned request ends")


FETCH = """
const [url, request, abortAfter, done] = arguments;
(async () => {
  const controller = new AbortController();
  const reply = await fetch(`${url}/v1/chat/completions`, {
    method: "POST",
    headers: {"content-type": "application/json", "authorization": "Bearer none"},
    body: JSON.stringify(request),
    signal: controller.signal,
  });
  const id = reply.headers.get("x-request-id");
  if (!reply.ok) return {status: reply.status, id, error: (await reply.json()).error};
  if (!request.stream) return {status: reply.status, id, text: (await reply.json()).choices[0].message.content};
  let text = "", open = "", parts = 0, ended = false;
  try {
    for await (const part of reply.body.pipeThrough(new TextDecoderStream())) {
      const events = (open + part).split("\\n\\n");
      open = events.pop();
      for (const event of events) {
        const data = event.slice("data: ".length);
        if (data === "[DONE]") ended = true;
        else text += JSON.parse(data).choices[0]?.delta?.content ?? "";
      }
      if (++parts === abortAfter) controller.abort();
    }
  } catch (error) {
    return {status: reply.status, id, text, ended, aborted: error.name};
  }
  return {status: reply.status, id, text, ended};
})().then(done, (error) => done({failed: String(error)}));
"""


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """A web server with one page, for any host name; its port."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "index.html").write_text("<!doctype html><title>an application</title>")
    handler = functools.partial(QuietHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as site:
        threading.Thread(target=site.serve_forever, daemon=True).start()
        yield site.server_address[1]
        site.shutdown()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # its base's name
        pass


@needs_browser
def test_row_38_fetch_in_a_browser_on_another_origin(
    sites: int, server: Server, client: openai.OpenAI, tmp_path: Path
) -> None:
    request = chat_request(QUESTION)
    text = chat_text(client, QUESTION)
    with open_browser(tmp_path, f"--host-resolver-rules=MAP *.example 127.0.0.1:{sites}") as driver:

        def fetch(body: dict[str, Any], abort_after: int = 0) -> dict[str, Any]:
            answer: dict[str, Any] = driver.execute_async_script(FETCH, server.url, body, abort_after)
            return answer

        driver.set_script_timeout(60)
        driver.get(ORIGIN)
        assert driver.title == "an application"
        whole = fetch(request)
        assert (whole["status"], whole["text"]) == (200, text)
        assert len(whole["id"]) == 32  # exposed to scripts
        assert fetch(request | {"stream": True}) | {"id": ""} == {"status": 200, "id": "", "text": text, "ended": True}
        stopped = fetch(request | {"stream": True, "stop": ["Paris"]})
        assert stopped["text"] == text[: text.index("Paris")]
        refused = fetch(request | {"temperature": 9})
        assert (refused["status"], refused["error"]["param"]) == (400, "temperature")
        aborted = fetch(request | {"stream": True, "max_tokens": 1500, "ignore_eos": True}, abort_after=3)
        assert aborted["aborted"] == "AbortError"
        until(lambda: server.metric("num_requests_running") == 0, within_s=20, what="the abandoned request ends")

        driver.get("http://other.example")
        assert "Failed to fetch" in fetch(request)["failed"]

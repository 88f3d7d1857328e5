"""POST /tokenize and /detokenize."""

from __future__ import annotations

import pytest

from tpserve.coordinator.gateway.tokenizer import Tokenizer
from unit.gateway.conftest import StackFactory
from unit.gateway.test_app import error_of
from unit.gateway.test_chat import HI

TEXT = "Grüße aus Köln, 你好 👩‍👩‍👧"


async def test_there_and_back(make_stack: StackFactory, tokenizer: Tokenizer) -> None:
    async with make_stack() as stack:
        body = {"prompt": TEXT, "return_token_strs": True}
        tokens = (await stack.http.post("/tokenize", json=body)).json()
        text = (await stack.http.post("/detokenize", json={"tokens": tokens["tokens"]})).json()
        await stack.client.chat.completions.create(model="tiny", messages=HI, max_tokens=1)
        chat = (await stack.http.post("/tokenize", json={"model": "gpt-4", "messages": HI})).json()
        assert (await stack.http.post("/detokenize", json={"tokens": []})).json() == {"prompt": ""}
    assert text == {"prompt": TEXT}
    assert tokens["count"] == len(tokens["tokens"]) == len(tokens["token_strs"])
    assert tokens["max_model_len"] == 512
    assert chat["tokens"] == list(stack.engine.submits[0].prompt_token_ids)
    assert chat["token_strs"] is None


@pytest.mark.parametrize(
    ("route", "body", "status", "message"),
    [
        ("/tokenize", {}, 400, "either 'prompt' or 'messages'"),
        ("/tokenize", {"prompt": "a", "messages": HI}, 400, "either 'prompt' or 'messages'"),
        ("/tokenize", {"prompt": "a", "model": "other"}, 404, "'other'"),
        ("/tokenize", {"messages": [{"role": "user", "content": "x", "name": "nobody"}]}, 400, "chat template"),
        ("/detokenize", {"tokens": [10**6]}, 400, "1000000"),
        ("/detokenize", {"tokens": ["a"]}, 400, "tokens[0]"),
    ],
)
async def test_refusals(make_stack: StackFactory, route: str, body: object, status: int, message: str) -> None:
    async with make_stack() as stack:
        reply = await stack.http.post(route, json=body)
    assert reply.status_code == status
    assert message in error_of(reply)["message"]


async def test_keys_open_them(make_stack: StackFactory) -> None:
    async with make_stack(api_keys=("k",)) as stack:
        for route in ("/tokenize", "/detokenize"):
            assert (await stack.http.post(route, json={})).status_code == 401

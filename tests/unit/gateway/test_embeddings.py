"""POST /v1/embeddings with the official client."""

from __future__ import annotations

import base64
import math
import struct
from typing import Any

import openai
import pytest

from tpserve.coordinator.gateway.embeddings import EmbeddingsAnswer
from tpserve.coordinator.gateway.tokenizer import Tokenizer
from unit.gateway.conftest import StackFactory

TEXTS = ["the quick brown fox", "Grüße", "the"]


def unit(*row: float) -> list[Any]:
    norm = math.hypot(*row)
    return [pytest.approx(value / norm, abs=1e-6) for value in row]


async def test_one_row_of_length_1_for_each_input(make_stack: StackFactory, tokenizer: Tokenizer) -> None:
    ids = [tokenizer.encode(text, add_special_tokens=True) for text in TEXTS]
    rows = [unit(len(item), item[0], item[-1], 1.0) for item in ids]
    async with make_stack() as stack:
        create = stack.client.embeddings.create
        texts = await create(model="tiny", input=TEXTS, encoding_format="float")
        tokens = await create(model="tiny", input=ids, encoding_format="float")
        single = await create(model="tiny", input=TEXTS[0], encoding_format="float")
        one = await create(model="tiny", input=ids[0], dimensions=4)  # this client asks for base64
        raw = await stack.http.post("/v1/embeddings", json={"input": "the", "encoding_format": "base64"})
        assert stack.service.engine.num_live_requests == 0
        assert {(submit.max_tokens, submit.n) for submit in stack.engine.submits} == {(1, 1)}
    assert [item.embedding for item in texts.data] == rows
    assert [item.embedding for item in tokens.data] == rows
    assert [item.index for item in texts.data] == [0, 1, 2]
    assert single.data[0].embedding == one.data[0].embedding == rows[0]
    assert texts.usage.prompt_tokens == texts.usage.total_tokens == sum(map(len, ids))
    answer = EmbeddingsAnswer.model_validate_json(raw.content)
    assert isinstance(answer.data[0].embedding, str)
    assert list(struct.unpack("<4f", base64.b64decode(answer.data[0].embedding))) == rows[2]


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"dimensions": 2}, "dimensions", "unsupported_feature"),
        ({"input": []}, "input", None),
        ({"input": ""}, "input", None),
        ({"input": [[]]}, "input[0]", None),
        ({"input": [10**6]}, "input", None),
        ({"input": "the " * 3000}, None, "context_length_exceeded"),
        ({"input": [1] * 512}, None, "context_length_exceeded"),
        ({"encoding_format": "int8"}, "encoding_format", None),
        ({"model": "other"}, "model", "model_not_found"),
    ],
)
async def test_refusals(make_stack: StackFactory, fields: dict[str, Any], param: str | None, code: str | None) -> None:
    async with make_stack() as stack:
        with pytest.raises(openai.APIStatusError) as caught:
            await stack.client.embeddings.create(**{"model": "tiny", "input": "the", **fields})
        assert stack.service.engine.num_live_requests == 0
    assert (caught.value.param, caught.value.code) == (param, code)

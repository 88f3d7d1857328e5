"""Embeddings of the real model are the rows from which it samples, whatever else runs beside them."""

from __future__ import annotations

import asyncio
from pathlib import Path

import ml_dtypes  # noqa: F401  # makes bfloat16 known to numpy
import numpy as np
import openai
import pytest
from safetensors import safe_open

from server import MODEL_NAME, Server, chat_request

PROMPTS = ["The capital of France is", "def add(a, b):\n    return", "Once upon a time", "Warum ist der Himmel"]


@pytest.fixture(scope="module")
def vocabulary(demo_folder: Path) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    """The output matrix, (vocabulary, hidden size): this model's is its input embedding."""
    with safe_open(demo_folder / "model.safetensors", "numpy") as tensors:
        return np.asarray(tensors.get_tensor("model.embed_tokens.weight")).astype(np.float32)


async def test_the_next_token_is_nearest_to_the_row(
    server: Server, vocabulary: np.ndarray[tuple[int, int], np.dtype[np.float32]]
) -> None:
    async with server.async_client() as client:

        async def embed(prompt: str | list[str]) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
            reply = await client.embeddings.create(model=MODEL_NAME, input=prompt)
            return np.array([item.embedding for item in reply.data])

        async def greedy(prompt: str) -> int:
            reply = await client.completions.create(model=MODEL_NAME, prompt=prompt, max_tokens=1, temperature=0)
            tokens = await client.post("../tokenize", body={"prompt": reply.choices[0].text}, cast_to=object)
            assert isinstance(tokens, dict)
            return int(tokens["tokens"][0])

        rows = await embed(PROMPTS)
        assert rows.shape == (len(PROMPTS), vocabulary.shape[1])
        assert np.linalg.norm(rows, axis=1) == pytest.approx(np.ones(len(PROMPTS)), abs=1e-5)
        nearest = (rows @ vocabulary.T).argmax(axis=1).tolist()
        assert nearest == [await greedy(prompt) for prompt in PROMPTS]
        # Alone, from the prefix cache, and beside chats: the same bits.
        chats = [client.chat.completions.create(**chat_request(prompt)) for prompt in PROMPTS]
        crowd = await asyncio.gather(*[embed(prompt) for prompt in PROMPTS], *chats)
        assert np.array_equal(np.concatenate(crowd[: len(PROMPTS)]), rows)


def test_an_input_too_long_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="context length"):
        client.embeddings.create(model=MODEL_NAME, input="the " * 20_000)

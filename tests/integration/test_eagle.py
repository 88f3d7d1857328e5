"""A server with an EAGLE-3 head answers as one without, token for token, and counts what was accepted."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from eagle_models import MarkovHead, MarkovTarget, TinyHead, deep
from patience import Patience
from server import MODEL_NAME, Server, run_cli
from text_models import write_byte_tokenizer
from tiny_models import MODELS

FLAGS = ("--tp", "2", "--max-num-seqs", "8")
STEM = "abcdefghijklmnopqrstuvwxyz, and again: "
REQUESTS: list[dict[str, Any]] = [
    {"prompt": STEM * 3, "temperature": 0, "max_tokens": 60},
    {"prompt": STEM * 3 + "x", "temperature": 0, "max_tokens": 40},
    {"prompt": "q", "temperature": 0.8, "seed": 3, "max_tokens": 60},
    {"prompt": STEM, "temperature": 1.0, "top_p": 0.8, "seed": 4, "max_tokens": 60},
    {"prompt": STEM, "temperature": 0.7, "seed": 5, "frequency_penalty": 0.8, "presence_penalty": 0.3},
    {"prompt": STEM, "temperature": 1.2, "seed": 6, "n": 3, "max_tokens": 30},
    {"prompt": "z" * 120, "temperature": 0.9, "seed": 7, "logprobs": 2, "max_tokens": 30},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("eagle")
    return path


@pytest.fixture(scope="module")
def head(folder: Path) -> MarkovHead:
    """A head that is often right, beside its target, both written."""
    target_dir = folder / "target"
    target_dir.mkdir()
    vocab_size = write_byte_tokenizer(target_dir)
    config = deep(MODELS["llama_4q_2kv"]).config | {"num_key_value_heads": 4, "vocab_size": vocab_size}
    made = MarkovHead(MarkovTarget("markov", config), draft_vocab_size=vocab_size - 20)
    made.target.write(target_dir)
    made.write(folder / "head")
    return made


@pytest.fixture(scope="module")
def expected(folder: Path, head: MarkovHead) -> list[Any]:
    """What a server without speculation answers."""
    with Server.running(folder / "target", *FLAGS, folder=folder) as server:
        return asyncio.run(answers(server))


async def answers(server: Server) -> list[Any]:
    """Send every request at once; return what counts of each answer."""
    async with server.async_client() as client:
        replies = await asyncio.gather(*(client.completions.create(model=MODEL_NAME, **body) for body in REQUESTS))
    out = []
    for reply in replies:
        for choice in reply.choices:
            tokens = (choice.logprobs.tokens or []) if choice.logprobs is not None else []
            out.append((choice.text, choice.finish_reason, tokens))
    return out


@pytest.fixture(scope="module", params=["3", "auto"])
def server(request: pytest.FixtureRequest, folder: Path, head: MarkovHead) -> Iterator[Server]:
    flags = ["--draft-model", str(folder / "head"), "--num-speculative-tokens", request.param]
    with Server.running(folder / "target", *FLAGS, *flags, folder=folder) as running:
        yield running


def test_answers_are_those_of_plain_decoding(server: Server, expected: list[Any]) -> None:
    assert asyncio.run(answers(server)) == expected
    assert asyncio.run(answers(server)) == expected  # with prompts from the prefix cache
    metrics = server.metrics()
    drafted = metrics["tpserve_spec_decode_num_draft_tokens_total"]
    accepted = metrics["tpserve_spec_decode_num_accepted_tokens_total"]
    assert drafted >= accepted > 0.3 * drafted  # by the metrics, also those behind a rejected one are drafted
    assert metrics["tpserve_step_seconds_count{kind=verify}"] > 0
    assert metrics["tpserve_prefix_cache_hits_total"] > 0


def test_sequences_are_given_up_where_a_head_only_guesses(
    folder: Path, head: MarkovHead, expected: list[Any], tmp_path: Path
) -> None:
    TinyHead(head.target).write(tmp_path / "head")
    flags = ["--draft-model", str(tmp_path / "head"), "--num-speculative-tokens", "auto"]
    with Server.running(folder / "target", *FLAGS, *flags, folder=tmp_path) as server:
        patience = Patience(60)
        while not server.metric("spec_decode_given_up_total") and not patience.is_over():
            assert asyncio.run(answers(server)) == expected
        assert server.metric("spec_decode_given_up_total") > 0
        assert asyncio.run(answers(server)) == expected


def test_a_head_that_is_of_no_use_here_is_refused(folder: Path, head: MarkovHead, tmp_path: Path) -> None:
    small = TinyHead(MODELS["llama_4q_2kv"])
    other = replace(small, target=deep(MODELS["llama_9q_3kv_tied"]))
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text(json.dumps(head.config))
    (bare / "pytorch_model.bin").write_bytes(b"")
    other.write(tmp_path / "other")
    for flags, words in (
        (["--draft-model", str(folder / "head"), "--draft-tp", "1"], "leave --draft-tp 1 away, or give that of the"),
        (["--draft-model", str(folder / "head"), "--draft-placement", "dedicated"], "leave --draft-placement"),
        (["--draft-model", str(tmp_path / "other")], "the head is for a model with vocab_size 200, this one has"),
        (["--draft-model", str(bare)], "pytorch_model.bin, load that with torch and write it with safetensors"),
    ):
        error = run_cli("serve", folder / "target", *FLAGS, *flags, folder=folder).only_error()
        assert words in error

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models

from tpserve.coordinator.gateway.model import ServedModel
from tpserve.coordinator.gateway.tokenizer import ModelFilesError, Tokenizer
from unit.gateway.conftest import make_backend

BYTE_LEVEL = make_backend()
BYTE_LEVEL_TOKENIZER = Tokenizer(BYTE_LEVEL)

TEXTS = st.text() | st.text(alphabet="aé你👩\u200d\u0301 ☃größe<tool>\n", max_size=30)


def make_byte_fallback() -> tokenizers.Tokenizer:
    """A vocabulary of the kind that llama 2 and mistral use."""
    words = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "▁▁",
        "▁the",
        "é",
        "a",
        "▁a",
        "b",
    ]
    backend = tokenizers.Tokenizer(
        models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True)
    )
    backend.add_special_tokens(["<s>", "</s>"])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return backend


BYTE_FALLBACK = make_byte_fallback()
BYTE_FALLBACK_TOKENIZER = Tokenizer(BYTE_FALLBACK)


def stream(tokenizer: Tokenizer, ids: Sequence[int], cuts: Sequence[int]) -> list[str]:
    detokenizer = tokenizer.detokenizer()
    borders = [0, *sorted(cut % (len(ids) + 1) for cut in cuts), len(ids)]
    parts = [detokenizer.push(ids[a:b]) for a, b in itertools.pairwise(borders)]
    return [*parts, detokenizer.flush()]


@given(TEXTS, st.lists(st.integers(0, 100)))
def test_text_comes_back_in_whole_characters(text: str, cuts: list[int]) -> None:
    ids = BYTE_LEVEL_TOKENIZER.encode(text, add_special_tokens=True)
    parts = stream(BYTE_LEVEL_TOKENIZER, ids, cuts)
    assert "".join(parts) == text
    assert all("\ufffd" not in part for part in parts) or "\ufffd" in text


@given(st.lists(st.integers(0, BYTE_LEVEL.get_vocab_size() + 5), max_size=30), st.lists(st.integers(0, 100)))
def test_any_tokens_stream_as_the_library_decodes_them(ids: list[int], cuts: list[int]) -> None:
    assert "".join(stream(BYTE_LEVEL_TOKENIZER, ids, cuts)) == BYTE_LEVEL.decode(ids)


@given(st.lists(st.integers(0, BYTE_FALLBACK.get_vocab_size() + 5), max_size=30), st.lists(st.integers(0, 100)))
def test_byte_fallback_streams_as_the_library_decodes(ids: list[int], cuts: list[int]) -> None:
    assert "".join(stream(BYTE_FALLBACK_TOKENIZER, ids, cuts)) == BYTE_FALLBACK.decode(ids)


@given(TEXTS, st.lists(st.integers(0, 100)))
def test_byte_fallback_spells_rare_characters(text: str, cuts: list[int]) -> None:
    ids = [3 + byte for byte in text.encode()]
    assert "".join(stream(BYTE_FALLBACK_TOKENIZER, ids, cuts)) == BYTE_FALLBACK.decode(ids)


def test_shown_names_bytes_and_special_tokens() -> None:
    half = BYTE_LEVEL_TOKENIZER.encode("👩", add_special_tokens=False)[0]
    assert BYTE_LEVEL_TOKENIZER.shown(2) == ("<|im_end|>", b"<|im_end|>")
    text, raw = BYTE_LEVEL_TOKENIZER.shown(half)
    assert "👩".encode().startswith(raw)
    assert text == "\ufffd"
    assert BYTE_FALLBACK_TOKENIZER.shown(3 + 0xE4) == ("\ufffd", b"\xe4")


@given(TEXTS)
def test_lower_bound_of_tokens(text: str) -> None:
    num_tokens = len(BYTE_LEVEL_TOKENIZER.encode(text, add_special_tokens=False))
    assert BYTE_LEVEL_TOKENIZER.min_num_tokens(text) <= num_tokens
    assert BYTE_LEVEL_TOKENIZER.min_num_tokens(text * 100) > 0 or not text


def test_special_text_in_a_prompt_is_one_token(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("<|im_start|>", add_special_tokens=False) == [1]


def test_another_decoder_is_refused() -> None:
    backend = make_backend()
    backend.decoder = decoders.WordPiece()
    with pytest.raises(ModelFilesError, match="WordPiece"):
        Tokenizer(backend)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"generation_config.json": {"eos_token_id": [5, 6]}, "config.json": {"eos_token_id": 7}}, (5, 6)),
        ({"generation_config.json": {}, "config.json": {"eos_token_id": 7}}, (7,)),
        ({"tokenizer_config.json": {"eos_token": {"content": "<|im_end|>"}}}, (2,)),
        ({}, ()),
    ],
)
def test_stop_tokens(tmp_path: Path, files: dict[str, object], expected: tuple[int, ...]) -> None:
    BYTE_LEVEL.save(str(tmp_path / "tokenizer.json"))
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert ServedModel.load(tmp_path).stop_token_ids == expected


def test_sampling_defaults_come_from_the_model(tmp_path: Path) -> None:
    BYTE_LEVEL.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "top_k": 20}))
    defaults = ServedModel.load(tmp_path).defaults
    assert (defaults.temperature, defaults.top_p, defaults.top_k) == (0.6, 1.0, 20)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{", "tokenizer.json cannot be loaded"),
        ("tokenizer_config.json", "[]", "must hold a JSON object"),
        ("config.json", "{", "cannot be read as JSON"),
        ("generation_config.json", '{"temperature": -1}', "temperature is -1"),
        ("generation_config.json", '{"eos_token_id": "x"}', "eos_token_id is 'x'"),
        ("tokenizer_config.json", '{"chat_template": "{% if %}"}', "does not compile"),
        ("chat_template.jinja", "{% if %}", "does not compile"),
    ],
)
def test_broken_model_files(tmp_path: Path, name: str, content: str, message: str) -> None:
    BYTE_LEVEL.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / name).write_text(content)
    with pytest.raises(ModelFilesError, match=message):
        ServedModel.load(tmp_path)


def test_missing_model_files(tmp_path: Path) -> None:
    with pytest.raises(ModelFilesError, match=r"tokenizer\.json is missing"):
        ServedModel.load(tmp_path)
    with pytest.raises(ModelFilesError, match="not a folder"):
        ServedModel.load(tmp_path / "nowhere")

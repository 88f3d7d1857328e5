"""What the compiler of grammars is told of a tokenizer is what it would find in the whole of it."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from tpserve.proto.grammar import _parts, load_bindings

BYTE_FALLBACK = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
PREPENDED = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
SPLIT = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=True)]


@pytest.mark.parametrize(
    ("parts", "vocab_type", "adds_space"),
    [
        ({}, 0, False),
        (
            {"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=False), "decoder": decoders.ByteLevel()},
            2,
            False,
        ),
        (
            {"pre_tokenizer": pre_tokenizers.Sequence(SPLIT), "decoder": decoders.Sequence([decoders.ByteLevel()])},
            2,
            False,
        ),
        ({"pre_tokenizer": pre_tokenizers.Metaspace(prepend_scheme="first"), "decoder": decoders.Metaspace()}, 0, True),
        ({"normalizer": normalizers.Sequence(PREPENDED), "decoder": decoders.Sequence(BYTE_FALLBACK)}, 1, True),
    ],
    ids=["bare", "bytes", "bytes in a sequence", "metaspace", "byte fallback"],
)
def test_kinds(parts: dict[str, object], vocab_type: int, adds_space: bool) -> None:
    tokenizer = Tokenizer(models.BPE())
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    found = load_bindings().TokenizerInfo._detect_metadata_from_hf
    assert found(_parts(tokenizer)) == found(tokenizer.to_str())
    space = str(adds_space).lower()
    assert found(_parts(tokenizer)) == f'{{"vocab_type":{vocab_type},"add_prefix_space":{space}}}'

"""Small text sides of models: tokenizers written by hand, no downloads."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

EOS = 2
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def byte_tokenizer(added: tuple[str, ...] = (), special: tuple[str, ...] = ()) -> tokenizers.Tokenizer:
    """Every byte is a token (ids 3 to 258), behind three special ones; then `special` and `added` tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*SPECIAL, *alphabet])}
    backend = tokenizers.Tokenizer(models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([*SPECIAL, *special])
    backend.add_tokens([tokenizers.AddedToken(token, special=False) for token in added])
    return backend


def write_byte_tokenizer(folder: Path, *, added: tuple[str, ...] = (), special: tuple[str, ...] = ()) -> int:
    """Write tokenizer.json and its config; return the size of the vocabulary."""
    backend = byte_tokenizer(added, special)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": SPECIAL[EOS]}))
    return backend.get_vocab_size(with_added_tokens=True)

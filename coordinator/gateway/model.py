"""What the gateway needs of a model folder: tokenizer, chat template, stop tokens, default sampling."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

from tpserve.coordinator.gateway.chat_template import ChatTemplate, special_tokens
from tpserve.coordinator.gateway.tokenizer import ModelFilesError, Tokenizer, optional_json, tokenizer_file

INLINE_ENCODE_CHARS = 4096
"""Longer prompts are tokenised in a thread, so that other streams do not wait (about 0.2 us per character)."""


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """Values for fields that the client left out, from generation_config.json."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    min_p: float = 0.0


@dataclass(frozen=True, slots=True)
class ServedModel:
    """The text side of one model."""

    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    """None: the model knows no chats."""
    stop_token_ids: tuple[int, ...]
    """End-of-sequence tokens."""
    defaults: SamplingDefaults

    @classmethod
    def load(cls, model_dir: Path) -> ServedModel:
        """Read the files of a Hugging Face model folder.

        Raises
        ------
        ModelFilesError
            If a file is missing, corrupt or of an unknown kind.
        """
        if not model_dir.is_dir():
            raise ModelFilesError(f"{model_dir} is not a folder")
        tokenizer = Tokenizer.load(model_dir)
        stop_token_ids = _told_stop_token_ids(model_dir)
        if stop_token_ids is None:
            eos = special_tokens(optional_json(model_dir / "tokenizer_config.json")).get("eos_token")
            token_id = None if eos is None else tokenizer.token_to_id(eos)
            stop_token_ids = () if token_id is None else (token_id,)
        return cls(tokenizer, ChatTemplate.load(model_dir), stop_token_ids, _defaults(model_dir))

    async def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Return the token ids of `text`; long texts do not block the event loop."""
        if len(text) <= INLINE_ENCODE_CHARS:
            return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return await asyncio.to_thread(self.tokenizer.encode, text, add_special_tokens=add_special_tokens)


def check_texts(model_dir: Path) -> None:
    """Check what `ServedModel.load` reads; of the tokenizer, which takes longer, only that it is there.

    Raises
    ------
    ModelFilesError
        As there.
    """
    tokenizer_file(model_dir)
    ChatTemplate.load(model_dir)
    _told_stop_token_ids(model_dir)
    _defaults(model_dir)


def _told_stop_token_ids(model_dir: Path) -> tuple[int, ...] | None:
    """Take `eos_token_id` from the first file that has it."""
    for name in ("generation_config.json", "config.json"):
        value = optional_json(model_dir / name).get("eos_token_id")
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        if not all(isinstance(item, int) and item >= 0 for item in ids):
            raise ModelFilesError(
                f"{model_dir / name}: eos_token_id is {value!r}: it must be a token id or a list of them"
            )
        return tuple(ids)
    return None


def _defaults(model_dir: Path) -> SamplingDefaults:
    path = model_dir / "generation_config.json"
    generation = optional_json(path)
    values = {}
    for name, top in (("temperature", 2.0), ("top_p", 1.0), ("top_k", 2**31), ("min_p", 1.0)):
        value = generation.get(name)
        if value is None:
            continue
        if not isinstance(value, int | float) or not 0 <= value <= top:
            raise ModelFilesError(f"{path}: {name} is {value!r}: it must lie in [0, {top:g}]")
        values[name] = value
    top_k = int(values.get("top_k", 0))
    return SamplingDefaults(
        temperature=float(values.get("temperature", 1.0)),
        top_p=float(values.get("top_p", 1.0)) or 1.0,
        top_k=top_k or None,
        min_p=float(values.get("min_p", 0.0)),
    )

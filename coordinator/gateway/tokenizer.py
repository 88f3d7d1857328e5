"""Text to token ids and back. Knows nothing of requests.

Decoding goes through bytes: each token stands for a fixed byte string, so a stream of tokens is a stream of bytes, and
text is cut only where a character is complete. That is exact (the pieces add up to what a full decode gives) and costs
one dictionary lookup per token.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers


class ModelFilesError(ValueError):
    """A file of the model folder is missing, corrupt or of an unknown kind; the message names it."""


def optional_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of the model folder; return an empty one if the file is not there.

    Raises
    ------
    ModelFilesError
        If it is not a JSON object.
    """
    try:
        raw = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ModelFilesError(f"{path} cannot be read as JSON ({error}): fetch it again") from None
    if not isinstance(raw, dict):
        raise ModelFilesError(f"{path} must hold a JSON object: fetch it again")
    return raw


def tokenizer_file(model_dir: Path) -> Path:
    """Return the path of the model's tokenizer.

    Raises
    ------
    ModelFilesError
        If it is not there.
    """
    path = model_dir / "tokenizer.json"
    if not path.is_file():
        raise ModelFilesError(f"{path} is missing: put the model's tokenizer beside its config.json")
    return path


class Tokenizer:
    """The tokenizer of one model folder.

    Parameters
    ----------
    backend
        A `tokenizers.Tokenizer`; truncation and padding are switched off.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        spec = json.loads(backend.to_str())
        self._added = {item["id"]: item["content"] for item in spec["added_tokens"]}
        self._special = {item["id"] for item in spec["added_tokens"] if item["special"]}
        self._decoder = _decoder_kind(spec.get("decoder"))
        self._pieces: dict[int, bytes] = {}
        self._max_token_bytes = self._longest_token(spec)

    @classmethod
    def load(cls, model_dir: Path) -> Tokenizer:
        """Load `tokenizer.json`.

        Raises
        ------
        ModelFilesError
            If it is missing, corrupt, or decodes in a way that cannot be streamed exactly.
        """
        path = tokenizer_file(model_dir)
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ModelFilesError(f"{path} cannot be loaded ({error}): fetch it again") from None
        return cls(backend)

    @property
    def vocab_size(self) -> int:
        """Number of ids the tokenizer knows, added tokens included."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def token_to_id(self, token: str) -> int | None:
        """Return the id of a token's exact string, if it is in the vocabulary."""
        return self._backend.token_to_id(token)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Return the token ids of `text`.

        Parameters
        ----------
        add_special_tokens
            True for raw prompts (a begin-of-sequence token, where the model wants one). False for rendered chat
            templates, which write their special tokens themselves.
        """
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def min_num_tokens(self, text: str) -> int:
        """Return a lower bound of the tokens in `text`, without the work of tokenising; 0 if none can be told."""
        if self._max_token_bytes is None:
            return 0
        return -(-len(text.encode()) // self._max_token_bytes)

    def piece(self, token_id: int) -> bytes:
        """Return the bytes a token adds to the text; special and unknown tokens add none."""
        piece = self._pieces.get(token_id)
        if piece is None:
            token = None if token_id in self._special else self._token(token_id)
            piece = b"" if token is None else self._decoder.to_bytes(token)
            self._pieces[token_id] = piece
        return piece

    def shown(self, token_id: int) -> tuple[str, bytes]:
        """Return how log-probabilities name a token: its text and its bytes; special tokens by their name."""
        if token_id in self._special:
            name = self._added[token_id]
            return name, name.encode()
        piece = self.piece(token_id).removeprefix(_BYTE_MARK)
        return piece.decode(errors="replace"), piece

    def special_texts(self, tokens: Iterable[str]) -> dict[int, bytes]:
        """Return the bytes of those of `tokens` that are special, by id, for `detokenizer` to show."""
        ids = {self.token_to_id(token): token.encode() for token in tokens}
        return {token_id: text for token_id, text in ids.items() if token_id is not None and token_id in self._special}

    def detokenizer(self, shown: Mapping[int, bytes] | None = None) -> Detokenizer:
        """Return a fresh detokenizer for one stream of tokens.

        Parameters
        ----------
        shown
            Special tokens that are to stand in the text, from `special_texts`.
        """
        piece = self.piece
        if shown:

            def piece(token_id: int) -> bytes:
                text = shown.get(token_id)
                return self.piece(token_id) if text is None else text

        if isinstance(self._decoder, _ByteLevel):
            return ByteLevelDetokenizer(piece)
        return ByteFallbackDetokenizer(piece, strip_left=self._decoder.strip_left)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of `token_ids`, special tokens left out."""
        stream = self.detokenizer()
        return stream.push(token_ids) + stream.flush()

    def _longest_token(self, spec: dict[str, Any]) -> int | None:
        """Return how many bytes of input one token can stand for; None if the tokenizer may drop input."""
        normalizer = spec.get("normalizer")
        drops_spaces = any(item["lstrip"] or item["rstrip"] for item in spec["added_tokens"])
        if not isinstance(self._decoder, _ByteLevel) or drops_spaces:
            return None
        if normalizer is not None and normalizer["type"] != "NFC":
            return None
        longest = max(len(token.encode()) for token in self._backend.get_vocab(with_added_tokens=True))
        return longest if normalizer is None else 3 * longest  # NFC makes one Hangul syllable of three letters

    def _token(self, token_id: int) -> str | None:
        added = self._added.get(token_id)
        return self._backend.id_to_token(token_id) if added is None else added


class Detokenizer:
    """Turns one stream of tokens into text, a piece at a time."""

    __slots__ = ()

    def push(self, token_ids: Sequence[int]) -> str:
        """Take tokens; return the text that is certain now, which may be empty."""
        raise NotImplementedError

    def flush(self) -> str:
        """Return the rest, once no more tokens can come."""
        raise NotImplementedError


class ByteLevelDetokenizer(Detokenizer):
    """For byte-level BPE (llama 3, qwen, smollm): tokens are bytes, invalid sequences become U+FFFD."""

    __slots__ = ("_piece", "_utf8")

    def __init__(self, piece: Callable[[int], bytes]) -> None:
        self._piece = piece
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_ids: Sequence[int]) -> str:
        """Take tokens; return the characters completed."""
        piece = self._piece
        return self._utf8.decode(b"".join([piece(token) for token in token_ids]))

    def flush(self) -> str:
        """Return U+FFFD for a character that was never completed."""
        return self._utf8.decode(b"", final=True)


class ByteFallbackDetokenizer(Detokenizer):
    """For SentencePiece-like BPE (llama 2, mistral): tokens are text, or single bytes for rare characters.

    A run of byte tokens is text if all of it is valid UTF-8 and one U+FFFD per byte otherwise, so it is decided when
    the run ends.
    """

    __slots__ = ("_piece", "_run", "_strip_left")

    def __init__(self, piece: Callable[[int], bytes], *, strip_left: int) -> None:
        self._piece = piece
        self._strip_left = strip_left
        self._run = b""

    def push(self, token_ids: Sequence[int]) -> str:
        """Take tokens; return the text up to an open run of byte tokens."""
        parts = []
        for token in token_ids:
            piece = self._piece(token)
            if piece.startswith(_BYTE_MARK):
                self._run += piece[len(_BYTE_MARK) :]
            elif piece:
                parts += [self._close_run(), piece.decode()]
        return self._strip("".join(parts))

    def flush(self) -> str:
        """Close the last run of bytes."""
        return self._strip(self._close_run())

    def _close_run(self) -> str:
        run, self._run = self._run, b""
        try:
            return run.decode()
        except UnicodeDecodeError:
            return "\N{REPLACEMENT CHARACTER}" * len(run)

    def _strip(self, text: str) -> str:
        """Drop the spaces that the encoder put before the first word."""
        while self._strip_left and text:
            if text[0] != " ":
                self._strip_left = 0
                break
            text = text[1:]
            self._strip_left -= 1
        return text


_BYTE_MARK = b"\xff"
"""Never in UTF-8, so it tells a byte token from a text token in the piece table."""


class _ByteLevel:
    """GPT-2's printable alphabet for the 256 bytes."""

    def __init__(self) -> None:
        printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        others = [byte for byte in range(256) if byte not in printable]
        self._bytes = {chr(byte): byte for byte in printable}
        self._bytes |= {chr(256 + index): byte for index, byte in enumerate(others)}

    def to_bytes(self, token: str) -> bytes:
        """Return the token's bytes; a token outside the alphabet (an added one) stands for itself."""
        try:
            return bytes([self._bytes[char] for char in token])
        except KeyError:
            return token.encode()


class _ByteFallback:
    """Text tokens with a mark for spaces, and `<0x0A>`-like tokens for bytes."""

    def __init__(self, replacements: list[tuple[str, str]], *, strip_left: int) -> None:
        self._replacements = replacements
        self.strip_left = strip_left

    def to_bytes(self, token: str) -> bytes:
        """Return the token's text in UTF-8, or the byte mark and one byte."""
        for pattern, content in self._replacements:
            token = token.replace(pattern, content)
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            try:
                return _BYTE_MARK + bytes([int(token[3:5], 16)])
            except ValueError:
                return token.encode()
        return token.encode()


def _decoder_kind(spec: dict[str, Any] | None) -> _ByteLevel | _ByteFallback:
    """Read the `decoder` entry of tokenizer.json.

    Raises
    ------
    ModelFilesError
        If its steps are not one of the two pipelines that can be streamed exactly.
    """
    steps = [] if spec is None else spec["decoders"] if spec["type"] == "Sequence" else [spec]
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return _ByteLevel()
    replaces = [step for step in steps if step["type"] == "Replace"]
    strips = [step for step in steps if step["type"] == "Strip"]
    if kinds == ["Replace"] * len(replaces) + ["ByteFallback", "Fuse"] + ["Strip"] * len(strips) and len(strips) <= 1:
        simple = all(strip["content"] == " " and strip["stop"] == 0 for strip in strips)
        if simple and all("String" in step["pattern"] for step in replaces):
            return _ByteFallback(
                [(step["pattern"]["String"], step["content"]) for step in replaces],
                strip_left=strips[0]["start"] if strips else 0,
            )
    raise ModelFilesError(
        f"tokenizer.json has decoder {kinds or None}: only ByteLevel and Replace/ByteFallback/Fuse/Strip are served"
    )

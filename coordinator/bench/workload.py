"""What is asked of the server: prompts, output lengths and, for a trace, when.

Everything follows from the seed. Length pairs come with random token ids, which no tokenizer has to make; each point
salts them, so that no prompt is ever in a prefix cache.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from tpserve.coordinator.bench.errors import BenchError

SHARED_LENGTHS = Path(__file__).with_name("lengths.json")
"""1024 pairs drawn once from clipped log-normals of ShareGPT's shape: the same work for every engine and every run."""
FIRST_TOKEN_ID = 1000
"""Special tokens of common vocabularies lie below."""
MAX_PROMPT_TOKENS = 1024
MAX_TOTAL_TOKENS = 2048
MIN_TOKENS = 4
"""The usual filter of ShareGPT: at least MIN_TOKENS each, at most MAX_PROMPT_TOKENS in and MAX_TOTAL_TOKENS in all."""
CHARS_PER_TOKEN = 4.0
"""Used for the length of ShareGPT's answers, in the absence of a tokenizer; reports count by the server's usage."""


@dataclass(frozen=True, slots=True)
class Item:
    """One request to make."""

    index: int
    prompt: str | tuple[int, ...]
    num_output_tokens: int

    @property
    def num_prompt_tokens(self) -> int | None:
        """None for text."""
        return None if isinstance(self.prompt, str) else len(self.prompt)


@dataclass(frozen=True, slots=True)
class Workload:
    """An endless row of requests; past its end it begins again.

    Exactly one of `prompt_lengths` and `texts` is given.
    """

    name: str
    output_lengths: tuple[int, ...]
    prompt_lengths: tuple[int, ...] | None = None
    texts: tuple[str, ...] | None = None
    arrivals_s: tuple[float, ...] | None = None
    """Of a trace: seconds after its begin, ascending."""
    seed: int = 0
    end_token_id: int = 32000
    """Random ids are below; every common vocabulary is larger."""

    def __len__(self) -> int:
        return len(self.output_lengths)

    def item(self, index: int, salt: int) -> Item:
        """Return request `index` of a point; the same for the same arguments, and another prompt for another salt."""
        place = index % len(self)
        num_output_tokens = self.output_lengths[place]
        if self.texts is not None:
            return Item(index, self.texts[place], num_output_tokens)
        assert self.prompt_lengths is not None
        generator = np.random.default_rng([self.seed, salt, index])
        ids = generator.integers(FIRST_TOKEN_ID, self.end_token_id, self.prompt_lengths[place])
        return Item(index, tuple(ids.tolist()), num_output_tokens)


def fixed(prompt_length: int, output_length: int, *, seed: int = 0) -> Workload:
    """Return a workload of equal requests."""
    return Workload(f"fixed {prompt_length}/{output_length}", (output_length,), (prompt_length,), seed=seed)


def from_lengths(path: Path, *, seed: int = 0) -> Workload:
    """Read length pairs.

    JSON with `prompt_len` and `output_len`, taken in order; or .npz with (n, 2) arrays of (prompt, output), of which
    `first_turn_all` or else the first is taken in an order drawn from the seed.

    Raises
    ------
    BenchError
        If the file is missing or has no such pairs.
    """
    try:
        if path.suffix == ".npz":
            with np.load(path) as arrays:
                name = "first_turn_all" if "first_turn_all" in arrays else arrays.files[0]
                pairs = np.asarray(arrays[name], dtype=np.int64)  # (num_pairs, 2)
            prompts, outputs = np.random.default_rng(seed).permutation(pairs).T.tolist()
        else:
            parsed = json.loads(path.read_text())
            prompts, outputs = parsed["prompt_len"], parsed["output_len"]
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise BenchError(f"{path}: no length pairs: {type(error).__name__}: {error}") from None
    return Workload(f"lengths {path.name}", _lengths(path, outputs), _lengths(path, prompts), seed=seed)


def from_sharegpt(path: Path, *, seed: int = 0, tokenizer: Path | None = None) -> Workload:
    """Read ShareGPT's JSON: the first human turn is the prompt, the answer gives the output length.

    Parameters
    ----------
    tokenizer
        A tokenizer.json by which lengths are counted; without one they are estimated by CHARS_PER_TOKEN.

    Raises
    ------
    BenchError
        If a file is missing or malformed, or nothing is left after the usual filter.
    """
    count = _counter(tokenizer)
    texts, outputs = [], []
    try:
        for conversation in json.loads(path.read_text()):
            turns = conversation.get("conversations") or []
            if len(turns) < 2 or turns[0].get("from") not in ("human", "user"):
                continue
            prompt, num_output = turns[0]["value"], count(turns[1]["value"])
            num_prompt = count(prompt)
            if min(num_prompt, num_output) < MIN_TOKENS or num_prompt > MAX_PROMPT_TOKENS:
                continue
            if num_prompt + num_output <= MAX_TOTAL_TOKENS:
                texts.append(prompt)
                outputs.append(num_output)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BenchError(f"{path}: not a ShareGPT file: {type(error).__name__}: {error}") from None
    if not texts:
        raise BenchError(f"{path}: no conversation is left after the filter")
    order = np.random.default_rng(seed).permutation(len(texts)).tolist()
    return Workload(
        f"sharegpt {path.name}",
        tuple(outputs[place] for place in order),
        texts=tuple(texts[place] for place in order),
        seed=seed,
    )


def from_trace(path: Path, *, seed: int = 0) -> Workload:
    """Read when requests came and how long they were.

    JSON lines with `timestamp` (ms), `input_length` and `output_length`; or CSV with `TIMESTAMP` (ISO 8601 or seconds),
    `ContextTokens` and `GeneratedTokens`.

    Raises
    ------
    BenchError
        If the file is missing or malformed.
    """
    try:
        with path.open(newline="") as file:
            if path.suffix == ".csv":
                rows = [
                    (_seconds(row["TIMESTAMP"]), int(row["ContextTokens"]), int(row["GeneratedTokens"]))
                    for row in csv.DictReader(file)
                ]
            else:
                parsed = [json.loads(line) for line in file if line.strip()]
                rows = [
                    (float(row["timestamp"]) / 1e3, int(row["input_length"]), int(row["output_length"]))
                    for row in parsed
                ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BenchError(f"{path}: not a trace: {type(error).__name__}: {error}") from None
    rows.sort()
    return Workload(
        f"trace {path.name}",
        _lengths(path, [output for _, _, output in rows]),
        _lengths(path, [prompt for _, prompt, _ in rows]),
        arrivals_s=tuple(time_s - rows[0][0] for time_s, _, _ in rows),
        seed=seed,
    )


def poisson_arrivals(rate: float, count: int, *, seed: int) -> tuple[float, ...]:
    """Return when `count` requests are sent, in seconds: a Poisson process of `rate` per second, the first at 0."""
    gaps = np.random.default_rng([seed, count]).exponential(1 / rate, max(0, count - 1))
    return (0.0, *np.cumsum(gaps).tolist())[:count]


def _lengths(path: Path, values: Sequence[int]) -> tuple[int, ...]:
    if not values or min(values) < 1:
        raise BenchError(f"{path}: lengths must be there and be 1 or more")
    return tuple(map(int, values))


def _seconds(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return datetime.fromisoformat(text[:26]).timestamp()  # finer than a microsecond is not understood


def _counter(tokenizer: Path | None) -> Any:
    if tokenizer is None:
        return lambda text: int(len(text) / CHARS_PER_TOKEN)
    from tokenizers import Tokenizer

    try:
        loaded = Tokenizer.from_file(str(tokenizer))
    except Exception as error:  # the package raises nothing finer
        raise BenchError(f"{tokenizer}: not a tokenizer.json: {error}") from None
    return lambda text: len(loaded.encode(text, add_special_tokens=False))

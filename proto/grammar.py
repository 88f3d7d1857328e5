"""How a grammar becomes a matcher, done the same way by who checks it (gateway) and who follows it (worker).

Owns the use of xgrammar. Its package's own `__init__` imports PyTorch and transformers, which nothing here needs: the
bindings are loaded through a bare module in the package's place.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
import threading
import types
from pathlib import Path
from typing import Any

import tokenizers

from tpserve.proto.messages import Grammar, GrammarKind

TOOL_MARKERS = ("[TOOL_CALLS]", "[ARGS]", "<|python_tag|>", "<tool_call>", "</tool_call>", "<think>", "</think>")
"""Special tokens that a grammar may ask for by their text; all others never stand in constrained output."""

MAX_WHITESPACE = 16
"""Spaces and line ends in a row between the parts of a JSON text; without a bound, small models indent for ever."""

_CACHE_BYTES = 256 << 20
_MAX_THREADS = 8


class GrammarError(ValueError):
    """The source is no grammar that can be followed; the message says where."""


class GrammarUnavailable(RuntimeError):
    """Grammars cannot be compiled here at all; the message names the remedy."""


class GrammarCompiler:
    """Compiles grammars for one tokenizer; what was compiled once is found again. Threads may share it.

    Parameters
    ----------
    model_dir
        Folder with `tokenizer.json`.
    vocab_size
        Of the model; ids that the tokenizer does not know are never allowed.

    Raises
    ------
    GrammarUnavailable
        If xgrammar is not installed or the tokenizer cannot be read.
    """

    def __init__(self, model_dir: Path, vocab_size: int) -> None:
        self._core = load_bindings()
        path = model_dir / "tokenizer.json"
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise GrammarUnavailable(f"{path} cannot be loaded: {error}") from None
        self.vocab_size = vocab_size
        encoded = [""] * vocab_size
        for token, token_id in backend.get_vocab(with_added_tokens=True).items():
            if token_id < vocab_size:
                encoded[token_id] = token
        for token_id, added in backend.get_added_tokens_decoder().items():
            if added.special and added.content not in TOOL_MARKERS and token_id < vocab_size:
                encoded[token_id] = ""  # no text, hence never allowed
        info = self._core.TokenizerInfo
        metadata = json.loads(info._detect_metadata_from_hf(_parts(backend)))
        # Which tokens end the output is said with each grammar.
        self._info = info(encoded, metadata["vocab_type"], vocab_size, [], metadata["add_prefix_space"])
        threads = max(1, min(_MAX_THREADS, (os.cpu_count() or 1) // 2))
        self._compiler = self._core.GrammarCompiler(self._info, threads, True, _CACHE_BYTES)

    def compile(self, grammar: Grammar) -> Any:
        """Return the compiled grammar, for `matcher`.

        Raises
        ------
        GrammarError
            If the source is malformed or asks for what cannot be followed.
        """
        compiler, source = self._compiler, grammar.source
        try:
            match grammar.kind:
                case GrammarKind.JSON_SCHEMA:
                    return compiler.compile_json_schema(source, True, None, None, True, MAX_WHITESPACE, False)
                case GrammarKind.REGEX:
                    return compiler.compile_regex(source)
                case GrammarKind.EBNF:
                    return compiler.compile_grammar_from_strings(source, "root")
                case GrammarKind.STRUCTURAL_TAG:
                    return compiler.compile_structural_tag(source)
        except (RuntimeError, ValueError, TypeError) as error:
            raise GrammarError(_cause(error)) from None

    def matcher(self, compiled: Any, stop_token_ids: tuple[int, ...]) -> Any:
        """Return an xgrammar matcher at the beginning of the output."""
        return self._core.GrammarMatcher(compiled, list(stop_token_ids), False, -1, None)

    def batch_matcher(self, max_threads: int) -> Any:
        """Return xgrammar's functions for many matchers at once."""
        return self._core.BatchGrammarMatcher(max_threads)


def _parts(backend: tokenizers.Tokenizer) -> str:
    """Return a tokenizer as JSON without its vocabulary, of which nobody asks here: to write and read that takes 70 ms.

    Each part gives its JSON as what is pickled of it.
    """
    parts = {name: getattr(backend, name) for name in ("normalizer", "pre_tokenizer", "decoder")}
    return json.dumps({name: None if part is None else json.loads(part.__getstate__()) for name, part in parts.items()})


_import_lock = threading.Lock()


def load_bindings() -> Any:
    """Return xgrammar's bindings, imported without the rest of its package.

    Raises
    ------
    GrammarUnavailable
        If xgrammar is not installed.
    """
    name = "xgrammar"
    with _import_lock:
        if name not in sys.modules:
            spec = importlib.util.find_spec(name)
            if spec is None or spec.submodule_search_locations is None:
                raise GrammarUnavailable(
                    "xgrammar is not installed: pip install --no-deps xgrammar==0.2.8 (PyTorch, which it asks for, is "
                    "not needed)"
                )
            bare = types.ModuleType(name)
            bare.__path__ = list(spec.submodule_search_locations)
            sys.modules[name] = bare
        importlib.import_module(f"{name}.load_binding")
        return importlib.import_module(f"{name}.base")._core


def _cause(error: Exception) -> str:
    """Return an error of xgrammar without its place in the library's own sources."""
    text = str(error).strip()
    if text.startswith("[") and ".cc:" in text:
        text = text.partition(".cc:")[2].partition(": ")[2]
    text = text.removeprefix("Check failed: ")
    return text if len(text) <= 300 else text[:297] + "..."

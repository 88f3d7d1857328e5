"""Model files that are cut off, damaged or made to harm: our loaders say what is wrong, in their own error types."""

from __future__ import annotations

import contextlib
import copy
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from fuzzing import VALUES, fuzz, mutated_bytes, mutated_json
from tpserve.compile.errors import CompileError
from tpserve.compile.gguf import convert_gguf
from tpserve.coordinator.gateway.chat_template import ChatTemplate
from tpserve.coordinator.gateway.errors import InvalidRequest
from tpserve.coordinator.gateway.model import ServedModel
from tpserve.coordinator.gateway.tokenizer import ModelFilesError
from tpserve.worker.checkpoint import Checkpoint
from tpserve.worker.errors import WeightsError
from unit.compile.test_gguf import tensors, write
from unit.gateway.conftest import TEMPLATE


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # damaged numbers, which nobody can tell
@pytest.mark.filterwarnings("ignore::hypothesis.errors.HypothesisWarning")  # a failing file is long to show
def test_gguf(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole.gguf", tensors()).read_bytes()
    head = 12_000  # fields and the list of tensors; what follows is numbers

    @fuzz(80)
    @given(st.one_of(mutated_bytes(whole[:head]), mutated_bytes(whole[:400]).map(lambda part: part + whole[400:head])))
    def check(part: bytes) -> None:
        with folder() as to:
            source = to / "model.gguf"
            source.write_bytes(part + whole[head:])
            with contextlib.suppress(CompileError):
                convert_gguf(source, to, lambda done, total: None)

    check()
    for length in range(0, len(whole), len(whole) // 50):
        source = tmp_path / "cut.gguf"
        source.write_bytes(whole[:length])
        with pytest.raises(CompileError):
            convert_gguf(source, tmp_path, lambda done, total: None)


def test_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": np.ones((4, 8), np.float32), "b": np.zeros(3, np.int64)}, path)
    whole = path.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    header, data = json.loads(whole[8 : 8 + size]), whole[8 + size :]

    def with_header(value: Any) -> bytes:
        text = json.dumps(value).encode()
        return len(text).to_bytes(8, "little") + text + data

    @fuzz(200)
    @given(st.one_of(mutated_bytes(whole), mutated_json(header).map(with_header), VALUES.map(with_header)))
    def check(content: bytes) -> None:
        with folder() as model:
            (model / "model.safetensors").write_bytes(content)
            with contextlib.suppress(WeightsError):
                checkpoint = Checkpoint(model)
                for name in ("a", "b"):
                    checkpoint.tensor(name).sum()

    @fuzz(50)
    @given(st.one_of(VALUES, mutated_json({"weight_map": {"a": "model.safetensors"}})))
    def check_index(index: Any) -> None:
        with folder() as model:
            (model / "model.safetensors").write_bytes(whole)
            (model / "model.safetensors.index.json").write_text(json.dumps(index))
            with contextlib.suppress(WeightsError):
                Checkpoint(model).tensor("a")

    check()
    check_index()


FILES = {
    "tokenizer_config.json": {"chat_template": "{{ messages }}", "eos_token": "<|im_end|>"},
    "config.json": {"eos_token_id": [2]},
    "generation_config.json": {"eos_token_id": 2, "temperature": 0.5, "top_p": 0.9, "top_k": 40},
}


def test_tokenizer_and_configurations(model_dir: Path) -> None:
    text = (model_dir / "tokenizer.json").read_bytes()
    spec = json.loads(text)
    # Most of it is vocabulary: of that a part, so that mutations meet the rest.
    small = copy.deepcopy(spec)
    small["model"]["vocab"] = dict(list(spec["model"]["vocab"].items())[:40])
    small["model"]["merges"] = []
    small["added_tokens"] = spec["added_tokens"][:2]

    @fuzz(200)
    @given(
        st.one_of(
            mutated_json(small).map(lambda value: json.dumps(value).encode()),
            mutated_bytes(text),
            VALUES.map(lambda value: json.dumps(value).encode()),
        )
    )
    def check(content: bytes) -> None:
        with folder() as model:
            (model / "tokenizer.json").write_bytes(content)
            with contextlib.suppress(ModelFilesError):
                tokenizer = ServedModel.load(model).tokenizer
                ids = tokenizer.encode("Hello <|im_end|> \u00fc", add_special_tokens=True)
                detokenizer = tokenizer.detokenizer({})
                detokenizer.push(ids)
                detokenizer.flush()

    @fuzz(100)
    @given(st.data())
    def check_configurations(data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(FILES)))
        with folder() as model:
            (model / "tokenizer.json").write_bytes(text)
            for other, value in FILES.items():
                changed = data.draw(st.one_of(mutated_json(value), VALUES)) if other == name else value
                (model / other).write_text(json.dumps(changed))
            with contextlib.suppress(ModelFilesError):
                ServedModel.load(model)

    check()
    check_configurations()


TEMPLATES = [
    TEMPLATE,
    "{% for m in messages if m.role == 'user' %}{{ m['content'] | tojson }}{% else %}{{ bos_token }}{% endfor %}",
    "{% macro f(a) %}{{ a.b.c }}{% endmacro %}{{ f(messages) }}{% set ns = namespace(x=0) %}{{ ns.x + 1 }}",
]


def test_templates() -> None:
    @fuzz(200)
    @given(st.sampled_from(TEMPLATES).flatmap(lambda text: mutated_bytes(text.encode())), VALUES)
    def check(source: bytes, content: Any) -> None:
        with contextlib.suppress(ModelFilesError, InvalidRequest):
            template = ChatTemplate(source.decode(errors="replace"), {"bos_token": "<s>"})
            template.render([{"role": "user", "content": content}], None, {"messages": content, "x": content})

    check()

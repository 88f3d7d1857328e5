from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tpserve.coordinator.gateway.chat_template import ChatTemplate
from tpserve.coordinator.gateway.errors import InvalidRequest
from tpserve.coordinator.gateway.tokenizer import ModelFilesError

MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "<b>\u4f60 & 'you'"},
]


def test_blocks_leave_no_blank_lines_and_nothing_is_escaped() -> None:
    source = """{{ bos_token }}
    {% for message in messages %}
        {% if message.role == 'system' %}
            {% continue %}
        {% endif %}
[{{ message.role }}]{{ message.content }}
    {% endfor %}
{% if add_generation_prompt %}[assistant]{% endif %}"""
    template = ChatTemplate(source, {"bos_token": "<s>"})
    assert template.render(MESSAGES) == "<s>\n[user]<b>\u4f60 & 'you'\n[assistant]"


def test_tojson_is_plain_json() -> None:
    template = ChatTemplate("{{ messages[1] | tojson }}|{{ {'a': 1} | tojson(indent=2) }}", {})
    assert template.render(MESSAGES) == '{"role": "user", "content": "<b>\u4f60 & \'you\'"}|{\n  "a": 1\n}'


def test_generation_blocks_and_dates_render() -> None:
    template = ChatTemplate("{% generation %}x{% endgeneration %} {{ strftime_now('%Y') | length }}", {})
    assert template.render([]) == "x 4"


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[0].content + 1 }}",
        "{{ messages[0].nothing.more }}",
        "{{ ''.__class__.__mro__ }}{{ ''.__class__.mro() }}",
        "{{ messages.append(1) }}",
    ],
)
def test_failures_are_the_requests(source: str) -> None:
    with pytest.raises(InvalidRequest, match="chat template") as caught:
        ChatTemplate(source, {}).render(MESSAGES)
    assert caught.value.param == "messages"


def test_the_jinja_file_wins_and_named_templates_are_found(tmp_path: Path) -> None:
    assert ChatTemplate.load(tmp_path) is None
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "named {{ eos_token }}"}]
    config = {"chat_template": named, "eos_token": {"content": "</s>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    template = ChatTemplate.load(tmp_path)
    assert template is not None
    assert template.render([]) == "named </s>"
    (tmp_path / "chat_template.jinja").write_text("file {{ eos_token }}")
    template = ChatTemplate.load(tmp_path)
    assert template is not None
    assert template.render([]) == "file </s>"


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        (
            "chat_template.jinja",
            "a\n{% if %}",
            "the chat template does not compile (line 2: Expected an expression, got",
        ),
        ("chat_template.jinja", "{% break %}", "the chat template does not compile ('break' outside loop"),
        ("chat_template.jinja", f"{{{{ {'-' * 3000}1 }}}}", "the chat template does not compile (maximum recursion"),
        ("chat_template.jinja", b"\xff", "'utf-8' codec can't decode byte 0xff"),
        (
            "tokenizer_config.json",
            {"chat_template": "{{ x"},
            "the chat template does not compile (line 1: unexpected end",
        ),
        (
            "tokenizer_config.json",
            {"chat_template": [{"name": "default", "template": ""}, {"name": "tool_use", "template": "{{ x | y }}"}]},
            "the chat template does not compile (line 1: No filter named 'y'.)",
        ),
        ("tokenizer_config.json", {"chat_template": 1}, "chat_template must be a string or a list of named templates"),
        (
            "tokenizer_config.json",
            {"chat_template": [{"name": "default", "template": ""}, {"name": "tool_use", "template": 1}]},
            "chat_template must be a string or a list of named templates",
        ),
    ],
)
def test_a_template_that_cannot_be_used_is_named_with_the_remedy(
    tmp_path: Path, name: str, content: str | bytes | dict[str, object], reason: str
) -> None:
    data = json.dumps(content) if isinstance(content, dict) else content
    (tmp_path / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    with pytest.raises(ModelFilesError) as caught:
        ChatTemplate.load(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / name}: {reason}")
    remedy = f": fetch it again, or write another template to {tmp_path / 'chat_template.jinja'}"
    assert str(caught.value).endswith(remedy)
    (tmp_path / "chat_template.jinja").write_text("another")
    template = ChatTemplate.load(tmp_path)
    assert template is not None
    assert template.render([]) == "another"


@pytest.mark.parametrize("value", [None, [], [{"name": []}], [{"name": "rag", "template": "x"}], ["x"]])
def test_a_model_may_have_no_template(tmp_path: Path, value: object) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": value}))
    assert ChatTemplate.load(tmp_path) is None


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in messages %}{% for b in messages %}{{ b.role }}{% endfor %}{% endfor %}",
        "{% for a in messages %}{% for b in messages %}x{% endfor %}{% endfor %}",
        "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}",
        "{% for a in messages %}{% for b in messages %}{% if b.role == 'x' %}y{% endif %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% for a in messages %}{{ a['role'] }}{% endfor %}{% endmacro %}"
        "{% for a in messages %}{{ f(a) }}{% endfor %}",
    ],
    ids=["reads", "writes", "calls", "reads and is silent", "macro"],
)
def test_a_rendering_that_does_not_end_is_given_up(source: str) -> None:
    template = ChatTemplate(source, {}, timeout_s=0.2)
    begun = time.monotonic()
    with pytest.raises(InvalidRequest, match=r"did not end within 0\.2 s: send fewer or shorter messages") as raised:
        template.render([MESSAGES[1]] * 20_000)
    assert raised.value.param == "messages"
    assert time.monotonic() - begun < 30
    short = "{% for message in messages %}{{ message.role }}{% endfor %}"
    assert ChatTemplate(short, {}, timeout_s=0.2).render(MESSAGES) == "systemuser"


def test_each_rendering_has_the_whole_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    clock = SimpleNamespace(monotonic=lambda: now)
    monkeypatch.setattr("tpserve.coordinator.gateway.chat_template.time", clock)
    template = ChatTemplate("{% for message in messages %}{{ message.role }}{% endfor %}", {}, timeout_s=0.2)
    for now in (0.0, 0.15, 0.3):  # noqa: B007  # what the clock shows
        assert template.render(MESSAGES) == "systemuser"

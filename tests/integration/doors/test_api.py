"""Every field of the API, with the official client against two tensor-parallel ranks of a real model."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from prometheus_client.parser import text_string_to_metric_families

from integration.doors.conftest import ALIAS
from server import MODEL_NAME, Server, chat_request, chat_text, together, until

PROMPTS = [
    "What is the capital of France?",
    "Write a Python function that adds two numbers.",
    "Warum ist der Himmel blau? Grüße aus Köln!",
    "List three colours, one on each line.",
    "你好,请介绍一下你自己。",
    "Explain what a prime number is in one sentence.",
    "Repeat after me: one two three one two three one two three",
    "Tell me a very short story about a cat 🐈.",
]


def crowd_requests() -> list[dict[str, Any]]:
    """32 different requests, every second one greedy, of different lengths."""
    return [
        chat_request(
            PROMPTS[number % len(PROMPTS)],
            max_tokens=6 + number % 7,
            temperature=0 if number % 2 == 0 else 1,
            seed=number,
            user=f"user-{number}",
        )
        for number in range(32)
    ]


@pytest.fixture(scope="module")
def alone(client: openai.OpenAI) -> list[str]:
    """What each of the crowd's requests gets when nothing else runs."""
    return [text_of(client.chat.completions.create(**request)) for request in crowd_requests()]


def text_of(reply: ChatCompletion) -> str:
    return reply.choices[0].message.content or ""


def collect(chunks: list[ChatCompletionChunk]) -> dict[int, str]:
    texts: dict[int, str] = {}
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
    return texts


def complete(client: openai.OpenAI, **options: Any) -> str:
    """Return the greedy continuation of a raw prompt."""
    request: dict[str, Any] = {"model": MODEL_NAME, "temperature": 0, **options}
    reply: Completion = client.completions.create(**request)
    return reply.choices[0].text


# ---- answers in one piece and in many


def test_the_printed_curl_works_as_pasted(server: Server) -> None:
    (line,) = re.findall(r"^curl .*$", server.log, re.MULTILINE)
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60, check=True)
    assert "Paris" in json.loads(done.stdout)["choices"][0]["message"]["content"]


def test_chat_answer_is_complete(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(**chat_request(PROMPTS[0], max_tokens=64))
    assert reply.object == "chat.completion"
    assert reply.model == MODEL_NAME
    assert reply.id.startswith("chatcmpl-")
    (choice,) = reply.choices
    assert (choice.index, choice.finish_reason, choice.message.role) == (0, "stop", "assistant")
    assert choice.message.content == "The capital of France is Paris."
    assert reply.usage is not None
    assert reply.usage.prompt_tokens > 10
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens


@pytest.mark.parametrize("prompt", PROMPTS)
def test_streamed_text_is_the_text(client: openai.OpenAI, prompt: str) -> None:
    request = chat_request(prompt, max_tokens=20)
    with ThreadPoolExecutor(1) as pool:
        beside = pool.submit(lambda: client.chat.completions.create(**request))
        chunks = list(client.chat.completions.create(**request, stream=True))
        whole = beside.result()
    assert collect(chunks) == {0: text_of(whole)}
    assert chunks[0].choices[0].delta.role == "assistant"
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
    reasons = [chunk.choices[0].finish_reason for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + [whole.choices[0].finish_reason]
    assert all(chunk.usage is None for chunk in chunks)


def test_stream_ends_with_usage_when_asked(client: openai.OpenAI) -> None:
    request = chat_request(PROMPTS[1], max_tokens=9)
    whole = client.chat.completions.create(**request)
    chunks = list(client.chat.completions.create(**request, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 9
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens


def test_completions_take_text_lists_and_tokens(client: openai.OpenAI) -> None:
    def create(prompt: Any, **options: Any) -> Any:
        return client.completions.create(model=MODEL_NAME, prompt=prompt, temperature=0, max_tokens=8, **options)

    prompts = ["The first president of the United States was", "def add(a, b):\n"]
    singles = [create(prompt).choices[0].text for prompt in prompts]
    together = create(prompts)
    assert [choice.text for choice in together.choices] == singles
    assert [choice.index for choice in together.choices] == [0, 1]
    assert create(prompts[0], echo=True).choices[0].text == prompts[0] + singles[0]
    streamed = "".join(chunk.choices[0].text for chunk in create(prompts[0], stream=True))
    assert streamed == singles[0]
    logprobs = create(prompts[0], logprobs=3).choices[0].logprobs
    assert "".join(logprobs.tokens) == singles[0]
    assert logprobs.text_offset == [sum(map(len, logprobs.tokens[:end])) for end in range(8)]
    assert all(3 <= len(top) <= 4 for top in logprobs.top_logprobs)
    assert create([1, 2, 3]).usage.prompt_tokens == 3


def test_conversation_with_system_and_parts(client: openai.OpenAI) -> None:
    messages: list[Any] = [
        {"role": "system", "content": "You are a helpful assistant. Answer shortly."},
        {"role": "user", "content": "My name is Alice."},
        {"role": "assistant", "content": "Hello Alice!"},
        {"role": "user", "content": [{"type": "text", "text": "What is "}, {"type": "text", "text": "my name?"}]},
    ]
    reply = client.chat.completions.create(model=MODEL_NAME, messages=messages, temperature=0, max_tokens=16)
    assert "Alice" in text_of(reply)
    messages[-1] = {"role": "user", "content": "What is my name?"}
    again = client.chat.completions.create(model=MODEL_NAME, messages=messages, temperature=0, max_tokens=16)
    assert text_of(again) == text_of(reply)


# ---- limits and stops


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_token_limits_are_exact(client: openai.OpenAI, name: str) -> None:
    request = chat_request(PROMPTS[1]) | {"max_tokens": None, name: 5}
    reply = client.chat.completions.create(**request)
    assert reply.choices[0].finish_reason == "length"
    assert reply.usage is not None
    assert reply.usage.completion_tokens == 5


def test_newer_name_of_the_limit_wins(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(**chat_request(PROMPTS[1], max_tokens=9, max_completion_tokens=4))
    assert reply.usage is not None
    assert reply.usage.completion_tokens == 4


@pytest.mark.parametrize("stream", [False, True])
def test_stop_string_across_token_borders(client: openai.OpenAI, stream: bool) -> None:
    request = chat_request(PROMPTS[1], max_tokens=24)
    whole = client.chat.completions.create(**request, logprobs=True)
    text = text_of(whole)
    content = whole.choices[0].logprobs and whole.choices[0].logprobs.content
    assert content
    # The end of one token and the start of the next; neither token holds it.
    stop, end = "", 0
    for left, right in itertools.pairwise(content):
        end += len(left.token)
        stop = left.token[-2:] + right.token[:2]
        if end > 10 and len(stop) == 4 and text.find(stop) == end - 2:
            break
    else:
        pytest.fail(f"no border in {text!r} is good for the test")
    assert not any(stop in token.token for token in content)
    if stream:
        chunks = list(client.chat.completions.create(**request, stop=["not there", stop], stream=True))
        assert collect(chunks)[0] == text[: end - 2]
        assert chunks[-1].choices[0].finish_reason == "stop"
    else:
        reply = client.chat.completions.create(**request, stop=stop)
        assert text_of(reply) == text[: end - 2]
        assert reply.choices[0].finish_reason == "stop"


# ---- sampling


def test_choices_differ_and_repeat_with_their_seed(client: openai.OpenAI) -> None:
    request = chat_request(PROMPTS[7], max_tokens=12, temperature=1, n=4, seed=7)
    first = [choice.message.content for choice in client.chat.completions.create(**request).choices]
    assert len(set(first)) == 4
    again = [choice.message.content for choice in client.chat.completions.create(**request).choices]
    assert again == first
    streamed = collect(list(client.chat.completions.create(**request, stream=True)))
    assert [streamed[index] for index in range(4)] == first
    other = client.chat.completions.create(**request | {"seed": 8})
    assert [choice.message.content for choice in other.choices] != first


def test_without_a_seed_texts_differ(client: openai.OpenAI) -> None:
    request = chat_request(PROMPTS[7], max_tokens=16, temperature=1.5)
    assert len({text_of(client.chat.completions.create(**request)) for _ in range(3)}) > 1


def test_a_tiny_top_p_is_greedy(client: openai.OpenAI) -> None:
    greedy, cut, free = together(
        lambda: chat_text(client, PROMPTS[3]),
        lambda: chat_text(client, PROMPTS[3], temperature=1, top_p=1e-6, seed=3),
        lambda: chat_text(client, PROMPTS[3], temperature=2, top_p=1, seed=3),
    )
    assert cut == greedy
    assert free != greedy


def test_logprobs_are_those_of_a_distribution(client: openai.OpenAI) -> None:
    request = chat_request(PROMPTS[4], max_tokens=12, logprobs=True, top_logprobs=20)
    reply = client.chat.completions.create(**request)
    logprobs = reply.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert b"".join(bytes(item.bytes or []) for item in logprobs.content).decode(errors="ignore") in text_of(reply)
    for item in logprobs.content:
        values = [top.logprob for top in item.top_logprobs]
        assert len(values) == 20
        assert values == sorted(values, reverse=True)
        assert 0.1 < sum(map(math.exp, values)) <= 1 + 1e-4
        best = item.top_logprobs[0]
        assert (best.token, best.logprob) == (item.token, item.logprob)  # greedy
    streamed = [
        item
        for chunk in client.chat.completions.create(**request, stream=True)
        for choice in chunk.choices
        if choice.logprobs is not None
        for item in choice.logprobs.content or []
    ]
    assert streamed == logprobs.content


def test_logit_bias_forces_and_forbids(client: openai.OpenAI) -> None:
    def text(**options: Any) -> str:
        return complete(client, prompt="One two three", max_tokens=6, **options)

    plain, one, other = text(), text(logit_bias={"1000": 100}), text(logit_bias={"1001": 100})
    assert one == one[: len(one) // 6] * 6
    assert len({plain, one, other}) == 3
    assert text(logit_bias={"1000": 100, "1001": -100}) == one
    assert text(logit_bias={"1000": -100, "1001": 100}) == other


def test_penalties_break_repetition(client: openai.OpenAI) -> None:
    def words(**options: float) -> list[str]:
        prompt = "the cat the cat the cat the cat the cat the cat"
        return complete(client, prompt=prompt, max_tokens=16, **options).split()

    plain, less_frequent, less_present, more_frequent = together(
        words,
        lambda: words(frequency_penalty=2.0),
        lambda: words(presence_penalty=2.0),
        lambda: words(frequency_penalty=-2.0),
    )
    assert len(set(plain)) <= 3
    assert len(set(less_frequent)) > len(set(plain))
    assert len(set(less_present)) > len(set(plain))
    assert more_frequent == plain


# ---- many at once


async def test_32_clients_get_what_each_gets_alone(server: Server, alone: list[str]) -> None:
    async with server.async_client() as client:
        for stream in (False, True):
            if stream:

                async def ask(request: dict[str, Any]) -> str:
                    chunks = [chunk async for chunk in await client.chat.completions.create(**request, stream=True)]
                    return collect(chunks)[0]
            else:

                async def ask(request: dict[str, Any]) -> str:
                    return text_of(await client.chat.completions.create(**request))

            assert await asyncio.gather(*map(ask, crowd_requests())) == alone
    assert len(set(alone)) > 20


async def test_seed_repeats_in_a_crowd(server: Server) -> None:
    request = chat_request(PROMPTS[7], max_tokens=12, temperature=1, n=3, seed=11)
    async with server.async_client() as client:
        lonely = await client.chat.completions.create(**request)
        replies = await asyncio.gather(
            client.chat.completions.create(**request),
            *(client.chat.completions.create(**other) for other in crowd_requests()[:12]),
            client.chat.completions.create(**request),
        )
    expected = [choice.message.content for choice in lonely.choices]
    for reply in (replies[0], replies[-1]):
        assert [choice.message.content for choice in reply.choices] == expected


# ---- what is told about the server


def test_models_are_listed(client: openai.OpenAI) -> None:
    models = client.models.list().data
    assert [model.id for model in models] == [MODEL_NAME, ALIAS]
    assert {(model.object, model.owned_by) for model in models} == {("model", "tpserve")}
    assert client.models.retrieve(MODEL_NAME).id == MODEL_NAME
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")


def test_health_says_ready(server: Server) -> None:
    assert server.health() == (200, {"status": "ready", "detail": ""})


def test_row_25_the_mode_and_what_it_means_are_told(server: Server) -> None:
    """In the talk's words; local is the default, and --max-num-seqs wins over its batch size."""
    mode = re.search(
        r'Under mode "local", max batch size will be set to 8, max KV cache token capacity will be set to (\d+), '
        r"prefill chunk size will be set to (\d+)\.",
        server.log,
    )
    assert mode is not None, server.log
    assert int(mode[1]) >= 8192
    assert re.search(
        r"Estimated total memory usage of each rank: [\d.]+ MB "
        r"\(Parameters: [\d.]+ MB\. KVCache: [\d.]+ MB\. Temporary buffer: [\d.]+ MB\)",
        server.log,
    )


def test_a_repeated_prompt_hits_the_prefix_cache(server: Server, client: openai.OpenAI) -> None:
    prompt = "Please count the words of this text. " * 12
    before = server.metrics()
    first = client.chat.completions.create(**chat_request(prompt))
    second = client.chat.completions.create(**chat_request(prompt))
    assert text_of(first) == text_of(second)
    assert first.usage is not None
    assert second.usage is not None
    assert second.usage.prompt_tokens_details is not None
    cached = second.usage.prompt_tokens_details.cached_tokens
    assert cached is not None
    assert second.usage.prompt_tokens - 32 <= cached < second.usage.prompt_tokens
    moved = changes(before, server.metrics())
    assert moved["tpserve_prefix_cache_hits_total"] >= cached
    assert moved["tpserve_prefix_cache_queries_total"] == 2 * first.usage.prompt_tokens


def changes(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    return {name: value - before.get(name, 0) for name, value in after.items()}


def test_metrics_count_what_happened(server: Server, client: openai.OpenAI) -> None:
    before = server.metrics()
    request = chat_request(PROMPTS[5], max_tokens=6)
    replies = [client.chat.completions.create(**request) for _ in range(3)]
    stopped = client.chat.completions.create(**chat_request(PROMPTS[0], max_tokens=64))
    moved = changes(before, server.metrics())
    usages = [reply.usage for reply in (*replies, stopped) if reply.usage is not None]
    assert moved["tpserve_prompt_tokens_total"] == sum(usage.prompt_tokens for usage in usages)
    assert moved["tpserve_generation_tokens_total"] == sum(usage.completion_tokens for usage in usages)
    assert moved["tpserve_request_success_total{finished_reason=length}"] == 3
    assert moved["tpserve_request_success_total{finished_reason=stop}"] == 1
    for name in ("time_to_first_token", "request_time_per_output_token", "e2e_request_latency"):
        assert moved[f"tpserve_{name}_seconds_count"] == 4
        assert moved[f"tpserve_{name}_seconds_sum"] > 0
    assert moved["tpserve_http_requests_total{code=200,route=/v1/chat/completions}"] == 4
    after = server.metrics()
    assert after["tpserve_num_requests_running"] == after["tpserve_num_requests_waiting"] == 0
    assert after["tpserve_kv_cache_usage_perc"] == 0
    assert after["tpserve_engine_state{state=ready}"] == 1
    until(lambda: len(set(last_steps(server))) == 1, within_s=5, what="both ranks have ended the same step")
    assert min(last_steps(server)) > 0


def last_steps(server: Server) -> list[float]:
    metrics = server.metrics()
    return [metrics[f"tpserve_rank_last_step{{rank={rank}}}"] for rank in (0, 1)]


def test_metrics_are_valid_prometheus_text(server: Server) -> None:
    reply = httpx.get(f"{server.url}/metrics")
    assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
    families = list(text_string_to_metric_families(reply.text))
    names = [family.name for family in families]
    assert len(names) == len(set(names))
    assert all(family.documentation for family in families)
    for family in families:
        if family.type == "histogram":
            check_histogram(family.samples)
    tpot = {
        float(sample.labels["le"])
        for family in families
        for sample in family.samples
        if sample.name == "tpserve_request_time_per_output_token_seconds_bucket"
    }
    assert sum(0.001 <= bound <= 0.020 for bound in tpot) >= 12
    if promtool := shutil.which("promtool"):
        subprocess.run([promtool, "check", "metrics"], input=reply.content, check=True, timeout=30)


def check_histogram(samples: list[Any]) -> None:
    """Buckets of one series must grow, up to the count."""
    series: dict[str, list[float]] = {}
    counts: dict[str, float] = {}
    for sample in samples:
        key = str(sorted((name, value) for name, value in sample.labels.items() if name != "le"))
        if sample.name.endswith("_bucket"):
            series.setdefault(key, []).append(sample.value)
        elif sample.name.endswith("_count"):
            counts[key] = sample.value
    for key, values in series.items():
        assert values == sorted(values)
        assert values[-1] == counts[key]

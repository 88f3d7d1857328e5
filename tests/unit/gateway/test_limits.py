"""Limits of keys: what is let in and when, what clients are told, and what several gateways agree on."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpserve.coordinator.gateway.errors import RateLimited
from tpserve.coordinator.gateway.keys import Account
from tpserve.coordinator.gateway.limits import Ledger
from tpserve.coordinator.gateway.metrics import samples_by_name
from unit.gateway.conftest import Stack, StackFactory
from unit.gateway.test_app import error_of
from unit.gateway.test_protocol import USER
from unit.gateway.test_relay import CASES, SECRET, ask, groups_of

CHAT = "/v1/chat/completions"


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def ledger(clock: Clock) -> Iterator[Ledger]:
    opened = Ledger(clock=clock)
    yield opened
    opened.close()


def refused(ledger: Ledger, account: Account) -> RateLimited:
    with pytest.raises(RateLimited) as caught:
        ledger.admit(account)
    return caught.value


def test_requests_fill_up_evenly(ledger: Ledger, clock: Clock) -> None:
    account = Account("a", "a", requests_per_minute=6)
    left = [int(ledger.admit(account).requests) for _ in range(6)]
    assert left == [5, 4, 3, 2, 1, 0]
    error = refused(ledger, account)
    assert error.limit == "requests"
    assert error.headers["retry-after"] == "10"
    assert error.headers["x-ratelimit-limit-requests"] == "6"
    assert error.headers["x-ratelimit-remaining-requests"] == "0"
    assert error.headers["x-ratelimit-reset-requests"] == "1m0s"
    assert "x-ratelimit-limit-tokens" not in error.headers
    assert "6 requests a minute" in error.message
    clock.now += 9.99
    refused(ledger, account)
    clock.now += 0.02
    ledger.admit(account)
    refused(ledger, account)
    clock.now += 3600
    assert [ledger.admit(account) and 1 for _ in range(6)] == [1] * 6, "no more than a minute's worth is kept"
    refused(ledger, account)


def test_output_goes_into_debt_and_a_prompt_does_not(ledger: Ledger, clock: Clock) -> None:
    account = Account("a", "a", tokens_per_minute=600)
    ledger.admit(account)
    assert ledger.take(account, 500, at_most=True).tokens == 100
    with pytest.raises(RateLimited, match="100 are left and 101 are needed") as caught:
        ledger.take(account, 101, at_most=True)
    assert caught.value.retry_after_s == 1
    assert ledger.take(account, 400, at_most=False).tokens == -300
    error = refused(ledger, account)
    assert (error.limit, error.headers["retry-after"]) == ("tokens", "31")
    assert error.headers["x-ratelimit-remaining-tokens"] == "0"
    assert error.headers["x-ratelimit-reset-tokens"] == "1m30s"
    clock.now += 30.2
    ledger.admit(account)
    ledger.leave(account, 1000)
    refused(ledger, account)


def test_a_prompt_over_the_whole_limit_is_told_to_shrink(ledger: Ledger) -> None:
    account = Account("a", "a", tokens_per_minute=600)
    with pytest.raises(RateLimited, match="601 tokens and this key may use 600 a minute") as caught:
        ledger.take(account, 601, at_most=True)
    assert "retry-after" not in caught.value.headers


def test_parallel_requests(ledger: Ledger) -> None:
    account = Account("a", "a", max_parallel=2)
    ledger.admit(account)
    ledger.admit(account)
    assert refused(ledger, account).limit == "parallel"
    ledger.admit(Account("b", "b", max_parallel=1))
    ledger.leave(account, 0)
    ledger.admit(account)
    ledger.rejoin(account)  # what moves here is never refused
    ledger.leave(account, 0)
    assert refused(ledger, account).limit == "parallel"


def test_limits_that_change_keep_what_was_used(ledger: Ledger) -> None:
    ledger.admit(Account("a", "a", requests_per_minute=100))
    small = Account("a", "a", requests_per_minute=2)
    assert ledger.admit(small).requests == 1
    ledger.admit(small)
    refused(ledger, small)


@given(st.lists(st.tuples(st.floats(0, 30), st.integers(1, 80), st.booleans()), max_size=60))
def test_never_more_than_a_burst_and_the_rate(steps: list[tuple[float, int, bool]]) -> None:
    """Whatever comes when: prompts that were let in are within the limit, and a debt is waited out."""
    clock = Clock()
    ledger = Ledger(clock=clock)
    account = Account("a", "a", requests_per_minute=10, tokens_per_minute=100)
    begin, admitted, taken, waits = clock.now, 0, 0, list[int]()
    for pause_s, num_tokens, is_prompt in steps:
        clock.now += pause_s
        minutes = (clock.now - begin) / 60
        try:
            ledger.admit(account)
            admitted += 1
            assert admitted <= 10 + 10 * minutes + 1e-6
            assert taken <= 100 + 100 * minutes - 1 + 1e-6
            ledger.take(account, num_tokens, at_most=is_prompt)
            taken += num_tokens
            assert not is_prompt or taken <= 100 + 100 * minutes + 1e-6
        except RateLimited as error:
            waits.append(error.retry_after_s or 0)
    assert all(0 < wait_s <= 61 + 60 * 80 / 100 for wait_s in waits)
    ledger.close()


def test_several_gateways_of_a_host_share_their_limits(tmp_path: Path) -> None:
    account = Account("a", "a", requests_per_minute=3, max_parallel=2)
    one, two = Ledger(tmp_path), Ledger(tmp_path)
    one.admit(account)
    other = subprocess.run(
        [
            *(sys.executable, "-c"),
            "import sys; from pathlib import Path\n"
            "from tpserve.coordinator.gateway.limits import Ledger\n"
            "from tpserve.coordinator.gateway.keys import Account\n"
            "Ledger(Path(sys.argv[1])).admit(Account('a', 'a', requests_per_minute=3, max_parallel=2))\n"
            "import os; os._exit(0)\n",
            str(tmp_path),
        ],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        timeout=60,
        check=False,
    )
    assert other.returncode == 0
    two.admit(account)  # the request of a process that is gone runs no more
    assert refused(two, account).limit == "parallel"
    one.leave(account, 0)
    assert refused(one, account).limit == "requests"
    one.close()
    two.close()


# ---- at the door


async def post(stack: Stack, key: str, **fields: Any) -> httpx.Response:
    body = {"messages": [USER], "max_tokens": 4, **fields}
    return await stack.http.post(CHAT, json=body, headers={"authorization": f"Bearer {key}"})


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text(
        "few name=alice rpm=2\nshort name=bob tpm=40\nnarrow name=carol max_parallel=1\nfree name=dora\nplain\n"
    )
    return path


async def test_over_the_limit_is_429_as_openai_writes_it(make_stack: StackFactory, key_file: Path) -> None:
    async with make_stack(api_key_file=str(key_file)) as stack:
        good = await post(stack, "few")
        assert good.status_code == 200
        assert good.headers["x-ratelimit-limit-requests"] == "2"
        assert good.headers["x-ratelimit-remaining-requests"] == "1"
        assert re.fullmatch(r"\d+s|\d+m\d+s|\d+ms", good.headers["x-ratelimit-reset-requests"])
        bad = await post(stack, "few", temperature=-1)
        assert bad.status_code == 400, "a bad request is one, too"
        assert bad.headers["x-ratelimit-remaining-requests"] == "0"
        over = await post(stack, "few")
        assert over.status_code == 429
        error = error_of(over)
        assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
        assert 1 <= int(over.headers["retry-after"]) <= 30
        assert over.headers["x-ratelimit-remaining-requests"] == "0"
        client = stack.client.with_options(api_key="few")
        with pytest.raises(openai.RateLimitError):
            await client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x"}])
        assert [model.id async for model in await client.models.list()], "looking is free"
        for key in ("free", "plain"):
            other = await post(stack, key)
            assert other.status_code == 200
            assert not [name for name in other.headers if name.startswith("x-ratelimit")]
        found = samples_by_name((await stack.http.get("/metrics")).text)
        assert found["tpserve_key_requests_total{key=alice}"] == 4
        assert found["tpserve_key_limited_requests_total{key=alice,limit=requests}"] == 2
        assert found["tpserve_key_generation_tokens_total{key=dora}"] == 4
        assert found["tpserve_key_requests_total{key=unnamed}"] == 1
        usage = good.json()["usage"]
        assert found["tpserve_key_prompt_tokens_total{key=alice}"] == usage["prompt_tokens"]
        assert found["tpserve_key_generation_tokens_total{key=alice}"] == usage["completion_tokens"]


async def test_tokens_a_stream_is_never_cut_and_the_next_request_waits(
    make_stack: StackFactory, key_file: Path
) -> None:
    async with make_stack(api_key_file=str(key_file)) as stack:
        first = await post(stack, "short", max_tokens=300, ignore_eos=True)
        assert first.status_code == 200
        assert first.json()["usage"]["completion_tokens"] == 300
        prompt_tokens = first.json()["usage"]["prompt_tokens"]
        assert first.headers["x-ratelimit-remaining-tokens"] == str(40 - prompt_tokens)
        over = await post(stack, "short")
        assert over.status_code == 429
        assert "tokens a minute" in error_of(over)["message"]
        assert int(over.headers["retry-after"]) > 60
        large = await post(stack, "free", messages=[{"role": "user", "content": "the " * 100}])
        assert large.status_code == 200


async def test_a_large_prompt_is_not_computed(make_stack: StackFactory, key_file: Path) -> None:
    async with make_stack(api_key_file=str(key_file)) as stack:
        over = await post(stack, "short", messages=[{"role": "user", "content": "the " * 100}])
        assert (over.status_code, stack.engine.submits) == (429, [])
        for path, body in (
            ("/v1/completions", {"prompt": [5] * 41}),
            ("/v1/embeddings", {"input": [5] * 41}),
            ("/v1/responses", {"input": "the " * 100}),
        ):
            reply = await stack.http.post(path, json=body, headers={"authorization": "Bearer short"})
            assert (reply.status_code, error_of(reply)["code"]) == (429, "rate_limit_exceeded"), path
        assert (await post(stack, "short")).status_code == 200, "what was refused has cost no tokens"


async def test_parallel_streams(make_stack: StackFactory, key_file: Path) -> None:
    async with make_stack(api_key_file=str(key_file)) as stack:
        stack.engine.gate.clear()
        headers = {"authorization": "Bearer narrow"}
        body = {"messages": [USER], "max_tokens": 4, "stream": True}
        async with stack.http.stream("POST", CHAT, json=body, headers=headers) as running:
            assert running.status_code == 200
            over = await post(stack, "narrow")
            assert (over.status_code, over.headers["retry-after"]) == (429, "1")
        # The client has left: its place is free, as soon as that is seen.
        stack.engine.gate.set()
        async with asyncio.timeout(20):
            while (await post(stack, "narrow")).status_code == 429:
                pass


async def test_a_stream_that_moves_here_is_neither_refused_nor_charged_twice(
    make_stack: StackFactory, tmp_path: Path
) -> None:
    path = tmp_path / "keys"
    path.write_text("one name=alice rpm=1 tpm=100 max_parallel=1\n")
    case = CASES["chat"]
    async with make_stack(api_key_file=str(path), router_token=SECRET, limits_dir=str(tmp_path)) as stack:
        stack.http.headers["authorization"] = "Bearer one"
        _, cuts = groups_of((await ask(stack, case)).content)
        before = samples_by_name((await stack.http.get("/metrics")).text)
        assert (await post(stack, "one")).status_code == 429
        again = await ask(stack, case, cuts[5][1])
        assert (again.status_code, again.content[-8:]) == (200, b"[DONE]\n\n")
        found = samples_by_name((await stack.http.get("/metrics")).text)
        name = "tpserve_key_prompt_tokens_total{key=alice}"
        assert found[name] == before[name]
        name = "tpserve_key_generation_tokens_total{key=alice}"
        assert before[name] == 20
        assert 20 < found[name] < 40

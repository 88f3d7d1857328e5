"""Which replica a request goes to."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from tpserve.coordinator.router.choice import MAX_IMBALANCE, REQUEST_BLOCKS, Chooser, Load, Policy, PrefixIndex
from tpserve.coordinator.router.prompt import BLOCK_CHARS, MAX_BLOCKS, read_prompt

LONG = "x" * 50 * BLOCK_CHARS


def loads(*in_flight: int) -> list[Load]:
    return [Load(PrefixIndex(1000), num_in_flight=number) for number in in_flight]


def chat(*texts: str, **fields: object) -> tuple[int, ...]:
    messages = [{"role": ["user", "assistant"][turn % 2], "content": text} for turn, text in enumerate(texts)]
    return read_prompt("/v1/chat/completions", json.dumps({"messages": messages, **fields}).encode()).blocks


def test_a_conversation_stays_where_it_began() -> None:
    replicas, chooser = loads(0, 0, 0), Chooser(Policy.PREFIX)
    homes: dict[int, int] = {}
    for user in range(6):
        texts = [f"user {user} says: " + chr(97 + user) * 2000]
        for _ in range(4):
            blocks = chat(*texts)
            number, num_matched = chooser.choose(replicas, blocks)
            replicas[number].prefix.add(blocks)
            if user in homes:
                assert num_matched >= 15
            assert homes.setdefault(user, number) == number
            texts += ["an answer " * 30, "and then? " * 30]
    assert sorted(homes.values()) == [0, 0, 1, 1, 2, 2]


def test_a_busy_replica_loses_a_request_whose_cached_part_is_worth_less_than_the_wait() -> None:
    chooser, blocks = Chooser(Policy.PREFIX), chat("y" * 10 * BLOCK_CHARS)
    worth = len(blocks) // REQUEST_BLOCKS
    for difference, expected in ((worth, 0), (worth + 1, 1)):
        replicas = loads(3 + difference, 3)
        replicas[0].prefix.add(blocks)
        assert chooser.choose(replicas, blocks)[0] == expected
    replicas = loads(0, 0)
    replicas[0].prefix.add(blocks)
    replicas[0].num_pending_blocks = len(blocks) + 1
    assert chooser.choose(replicas, blocks) == (1, 0)


def test_whatever_is_cached_nobody_is_overrun() -> None:
    blocks = chat(LONG)
    for in_flight, expected in ((MAX_IMBALANCE, 0), (MAX_IMBALANCE + 1, 1)):
        replicas = loads(in_flight, 0)
        replicas[0].prefix.add(blocks * 2)
        replicas[0].prefix.add(blocks)
        chosen = Chooser(Policy.PREFIX).choose(replicas, blocks + tuple(range(200)))[0]
        assert chosen == (expected if in_flight * REQUEST_BLOCKS < len(blocks) or expected else 1)


def test_the_simple_policies() -> None:
    replicas, chooser = loads(5, 0, 3), Chooser(Policy.ROUND_ROBIN)
    assert [chooser.choose(replicas, ())[0] for _ in range(6)] == [0, 1, 2, 0, 1, 2]
    assert [chooser.choose(replicas[1:], ())[0] for _ in range(3)] == [0, 1, 0]
    assert Chooser(Policy.LEAST_LOADED).choose(loads(5, 1, 3), ())[0] == 1
    replicas, chooser = loads(0, 0), Chooser(Policy.LEAST_LOADED)
    assert [chooser.choose(replicas, ())[0] for _ in range(4)] == [0, 1, 0, 1]


@given(st.lists(st.lists(st.integers(0, 6), max_size=8), max_size=30), st.integers(1, 12))
def test_the_index_knows_prefixes_and_forgets_tails_first(prompts: list[list[int]], capacity: int) -> None:
    index = PrefixIndex(capacity)
    for prompt in prompts:
        chain = tuple(hash(tuple(prompt[: end + 1])) for end in range(len(prompt)))
        index.add(chain)
        assert len(index) <= capacity
        assert index.num_matched(chain) == min(len(chain), capacity)
        other = (*chain[:2], 12345, *chain[2:])
        assert index.num_matched(other) == min(len(chain[:2]), capacity)
    index.clear()
    assert index.num_matched((1,)) == 0


def test_blocks_are_the_texts_beginning_and_nothing_else() -> None:
    system = "s" * 1000
    first, second = chat(system, "answer", "one"), chat(system, "answer", "two")
    assert len(first) == len(second) == 9
    assert first[:7] == second[:7]
    assert first[8] != second[8]
    assert chat("a", "b") != chat("ab"), "roles stand between"
    assert chat("a", model="m") != chat("a", model="n")
    assert chat("a", tools=[{"x": 1}]) != chat("a")
    assert chat("a", temperature=0) == chat("a", temperature=1, stream=True)
    parts = [{"type": "text", "text": "a"}]
    assert chat(parts) == chat("a")  # type: ignore[arg-type]


def test_other_bodies() -> None:
    def blocks(path: str, **fields: object) -> tuple[int, ...]:
        return read_prompt(path, json.dumps(fields).encode()).blocks

    for path in ("/v1/completions", "/v1/embeddings"):
        key = "prompt" if path == "/v1/completions" else "input"
        for value in ("text", ["text", "more"], [1, 2, 3], [[1, 2], [3]]):
            assert blocks(path, **{key: value})
            assert blocks(path, **{key: value}) == blocks(path, **{key: value})
    assert blocks("/v1/responses", input="hi", instructions="be brief") != blocks("/v1/responses", input="hi")
    parts = [[{"role": "user", "content": [{"type": "input_text", "text": text}]}] for text in "ab"]
    assert blocks("/v1/responses", input=parts[0]) != blocks("/v1/responses", input=parts[1])
    assert len(blocks("/v1/completions", prompt="a" * BLOCK_CHARS * (MAX_BLOCKS + 10))) == MAX_BLOCKS
    for body in (b"", b"[1]", b"{", b'{"messages": 5, "prompt": {"a": 1}}', b'{"messages": [5, {"content": [7]}]}'):
        for path in ("/v1/chat/completions", "/tokenize", "/v1/completions"):
            assert not read_prompt(path, body).is_stream
    assert read_prompt("/v1/completions", b'{"prompt": "a", "stream": true}').is_stream
    assert not read_prompt("/v1/completions", b'{"prompt": "a", "stream": 1}').is_stream

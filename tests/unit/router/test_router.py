"""A real router before real gateways, whose engines are scripted and fail on cue."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pytest

from tpserve.coordinator.gateway.tokenizer import Tokenizer
from tpserve.coordinator.metrics_catalogue import ROUTER_CATALOGUE
from tpserve.coordinator.relay import SECRET_HEADER, STREAM_HEADER, Identity
from tpserve.coordinator.router.marks import MarkedStream
from tpserve.proto.pb import engine_pb2
from unit.gateway.conftest import Stack, StackFactory
from unit.gateway.test_chat import HI
from unit.router.conftest import SECRET, STATES_STAY, make_engine, routed, soon, until

CHAT = "/v1/chat/completions"
READY = engine_pb2.EngineState.READY
LONG = [{"role": "user", "content": "the quick brown fox " * 40}]
USAGE = {"include_usage": True}


async def text_of(stream: AsyncIterator[Any]) -> str:
    return "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])


def busy(*stacks: Stack) -> Stack:
    """Return the one that was asked for tokens."""
    (found,) = [stack for stack in stacks if stack.engine.submits]
    return found


async def lose(stack: Stack) -> None:
    """Take a gateway away as a kill does: nobody listens, and every connection breaks."""
    for bound in stack.server.servers:
        bound.close()
    for connection in list(stack.server.server_state.connections):
        connection.transport.abort()
    stack.engine.gate.set()


async def test_everything_passes_through(two: tuple[Stack, Stack]) -> None:
    async with routed(*(stack.url for stack in two)) as routing:
        reply = await routing.client.chat.completions.create(model="tiny", messages=HI, seed=4, max_tokens=5)
        direct = await two[0].client.chat.completions.create(model="tiny", messages=HI, seed=4, max_tokens=5)
        assert reply.choices == direct.choices
        assert (await routing.client.models.list()).data[0].id == "tiny"
        for path in ("/version", "/openapi.json", "/"):
            assert (await routing.http.get(path)).content == (await two[0].http.get(path)).content
        refused = await routing.http.post(
            CHAT, json={"messages": HI, "temperature": 9}, headers={"x-request-id": "r-1"}
        )
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "temperature")
        assert refused.headers["x-request-id"] == "r-1"
        assert (await routing.http.get("/nowhere?a=b")).status_code == 404
        assert (await routing.http.post("/tokenize", json={"prompt": "a b"})).json()["count"] == 3
        raw = await routing.http.post(CHAT, json={"messages": HI, "max_tokens": 3, "stream": True})
        assert raw.headers["content-type"].startswith("text/event-stream")
        assert raw.text.endswith("data: [DONE]\n\n")
        assert ": tpserve" not in raw.text
        # Nobody from outside plays the router.
        outside = await routing.http.post(
            CHAT, json={"messages": HI, "max_tokens": 2}, headers={"x-tpserve-router": "x", "x-tpserve-stream": "{}"}
        )
        assert outside.status_code == 200


@pytest.mark.parametrize("route", ["chat", "completions", "responses"])
async def test_a_stream_goes_on_when_its_replica_dies(two: tuple[Stack, Stack], route: str) -> None:
    """And no client can tell, by a byte."""
    bodies: dict[str, tuple[str, dict[str, Any]]] = {
        "chat": (CHAT, {"messages": HI, "max_tokens": 30, "n": 2, "stream_options": USAGE}),
        "completions": ("/v1/completions", {"prompt": "the", "max_tokens": 30, "temperature": 1, "logprobs": 1}),
        "responses": ("/v1/responses", {"input": "the", "max_output_tokens": 30}),
    }
    path, fields = bodies[route]
    async with routed(*(stack.url for stack in two)) as routing:
        for stack in two:
            stack.engine.gate.clear()
        lines: list[str] = []
        async with routing.http.stream("POST", path, json={**fields, "model": "tiny", "stream": True}) as reply:
            assert reply.status_code == 200
            events = lines_of(reply)
            for _ in range({"chat": 3, "completions": 1, "responses": 8}[route]):
                lines.append(await anext(events))
            first = busy(*two)
            second = two[1] if first is two[0] else two[0]
            await lose(first)
            second.engine.gate.set()
            lines += [line async for line in events]
        (began,), (went_on,) = first.engine.submits, second.engine.submits
        assert went_on.sampling.seed == began.sampling.seed
        assert all(1 <= len(emitted.token_ids) < 30 for emitted in went_on.emitted)
        # The same request again, where nothing is lost: the same events, but for ids and time.
        identity = Identity("0" * 32, 0, went_on.sampling.seed)
        headers = {SECRET_HEADER: SECRET, STREAM_HEADER: identity.to_header().decode()}
        direct = await second.http.post(path, json={**fields, "model": "tiny", "stream": True}, headers=headers)
        stream = MarkedStream()
        undisturbed = stream.feed(direct.content) + stream.finish()
        assert normal("\n".join(lines)) == normal(undisturbed.decode())
        assert (await metrics(routing.http))['tpserve_router_moves_total{outcome="moved"}'] == 1
        assert len({line.split('"id":"')[1][:30] for line in lines if '"id":"chatcmpl' in line}) <= 1


async def lines_of(reply: httpx.Response) -> AsyncIterator[str]:
    """Yield the lines as servers of events mean them; httpx's end at U+0085 and the like, too, which text may hold."""
    rest = ""
    async for text in reply.aiter_text():
        *lines, rest = (rest + text).split("\n")
        for line in lines:
            yield line
    if rest:
        yield rest


def normal(text: str) -> list[Any]:
    """Return the events without what is new each time."""

    def strip(value: Any) -> Any:
        if isinstance(value, dict):
            new = ("id", "item_id", "created", "created_at")
            return {key: strip(item) for key, item in value.items() if key not in new}
        return [strip(item) for item in value] if isinstance(value, list) else value

    data = [line[6:] for line in text.split("\n") if line.startswith("data: ")]
    return [strip(json.loads(item)) for item in data if item != "[DONE]"]


async def metrics(http: httpx.AsyncClient) -> dict[str, float]:
    lines = (await http.get("/metrics")).text.splitlines()
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}


async def test_a_stream_outlives_its_engine(make_stack: StackFactory, tokenizer: Tokenizer) -> None:
    """The gateway lives and says that it cannot go on: that is not the client's affair either."""
    failing, good = make_engine(tokenizer, fail_after=6), make_engine(tokenizer)
    async with make_stack(failing, **STATES_STAY) as one, make_stack(good, **STATES_STAY) as other:
        async with routed(one.url, other.url, policy="round-robin") as routing:
            texts = []
            for _ in range(2):
                stream = await routing.client.chat.completions.create(
                    model="tiny",
                    messages=HI,
                    stream=True,
                    seed=8,
                    max_tokens=20,
                )
                texts.append(await text_of(stream))
            assert len(failing.submits) == len(good.submits) == 2
            direct = await other.client.chat.completions.create(model="tiny", messages=HI, seed=8, max_tokens=20)
            assert texts == [direct.choices[0].message.content] * 2


async def test_a_stream_that_fails_before_its_first_token_begins_elsewhere(
    make_stack: StackFactory, tokenizer: Tokenizer
) -> None:
    failing, good = make_engine(tokenizer, fail_after=0), make_engine(tokenizer)
    async with make_stack(failing, **STATES_STAY) as one, make_stack(good, **STATES_STAY) as other:
        async with routed(one.url, other.url, policy="round-robin") as routing:
            stream = await routing.client.chat.completions.create(model="tiny", messages=HI, stream=True, max_tokens=9)
            assert await text_of(stream)
            assert (len(failing.submits), len(good.submits)) == (1, 1)
            assert not good.submits[0].emitted


async def test_a_refusal_of_a_draining_replica_is_not_the_clients_affair(
    make_stack: StackFactory, tokenizer: Tokenizer
) -> None:
    """Its 503 is known before its health is asked the next time: the request waits for the one that comes back."""
    away = engine_pb2.Rejected(code=engine_pb2.Rejected.UNAVAILABLE, message="the engine is draining", retry_after_s=1)
    engine = make_engine(tokenizer)
    async with make_stack(engine, **STATES_STAY) as stack:
        async with routed(stack.url, health_interval_s=60.0) as routing:
            outbox = await soon(stack.engine.sessions.get())
            engine.rejection = away
            state = engine_pb2.EngineState(status=engine_pb2.EngineState.DRAINING, detail="shutting down")
            outbox.put_nowait(engine_pb2.EngineMessage(state=state))
            await stack.until_state("draining")
            asking = asyncio.create_task(routing.http.post(CHAT, json={"messages": HI, "max_tokens": 1}))
            await routing.until_queued(1)
            assert len(engine.submits) == 1
            engine.rejection = None
            outbox.put_nowait(engine_pb2.EngineMessage(state=engine_pb2.EngineState(status=READY)))
            await stack.until_state("ready")
            await routing.router.replicas.look(routing.router.replicas.backends[0])
            assert (await asking).status_code == 200


async def test_nobody_can_go_on(make_stack: StackFactory, tokenizer: Tokenizer) -> None:
    """A request that every replica fails at ends with an error, before it has them all three times over."""
    engines = [make_engine(tokenizer, fail_after=4), make_engine(tokenizer, fail_after=4)]
    async with make_stack(engines[0], **STATES_STAY) as one, make_stack(engines[1], **STATES_STAY) as other:
        async with routed(one.url, other.url, max_moves=3) as routing:
            for path, said in ((CHAT, "data: {"), ("/v1/responses", "event: error\ndata: {")):
                body = {"messages": HI, "input": "hello", "stream": True, "model": "tiny", "seed": 2}
                reply = await routing.http.post(path, json=body)
                assert reply.status_code == 200
                last = reply.text.rstrip("\n").split("\n\n")[-1]
                assert last.startswith(said)
                assert "rank 1 was lost" in last
                assert "[DONE]" not in reply.text
            assert sum(len(engine.submits) for engine in engines) == 8
            # In one piece, the replicas' own answer is the client's.
            reply = await routing.http.post(CHAT, json={"messages": HI, "seed": 2})
            assert (reply.status_code, reply.json()["error"]["code"]) == (503, "engine_unavailable")
            assert reply.headers["retry-after"] == "1"


async def test_without_a_secret_a_stream_that_breaks_ends_with_an_error(two: tuple[Stack, Stack]) -> None:
    async with routed(*(stack.url for stack in two), router_token=None) as routing:
        for stack in two:
            stack.engine.gate.clear()
        stream = await routing.client.chat.completions.create(model="tiny", messages=HI, stream=True)
        await anext(stream)
        await lose(busy(*two))
        with pytest.raises(openai.APIError, match="The replica that served the request was lost"):
            async for _ in stream:
                pass


async def test_an_answer_in_one_piece_is_asked_for_again(two: tuple[Stack, Stack]) -> None:
    async with routed(*(stack.url for stack in two)) as routing:
        for stack in two:
            stack.engine.gate.clear()
        asking = asyncio.create_task(routing.http.post(CHAT, json={"messages": HI, "max_tokens": 9, "seed": 1}))
        arrivals = [asyncio.create_task(stack.engine.arrivals.get()) for stack in two]
        await soon(asyncio.wait(arrivals, return_when=asyncio.FIRST_COMPLETED))
        first = busy(*two)
        second = two[1] if first is two[0] else two[0]
        second.engine.gate.set()
        await lose(first)
        assert (await asking).json()["usage"]["completion_tokens"] == 9
        for task in arrivals:
            task.cancel()


async def test_a_replica_that_drains_gets_nothing_new_and_keeps_what_it_has(two: tuple[Stack, Stack]) -> None:
    async with routed(*(stack.url for stack in two)) as routing:
        for stack in two:
            stack.engine.gate.clear()
        stream = await routing.client.chat.completions.create(model="tiny", messages=HI, stream=True, max_tokens=9)
        await anext(stream)
        first = busy(*two)
        second = two[1] if first is two[0] else two[0]
        second.engine.gate.set()
        outbox = await soon(first.engine.sessions.get())
        state = engine_pb2.EngineState(status=engine_pb2.EngineState.DRAINING, detail="shutting down")
        outbox.put_nowait(engine_pb2.EngineMessage(state=state))
        await routing.until_ready(1)
        for _ in range(4):
            assert (await routing.http.post(CHAT, json={"messages": HI, "max_tokens": 1})).status_code == 200
        assert len(first.engine.submits) == 1
        first.engine.gate.set()
        assert await text_of(stream)
        assert len(second.engine.submits) == 4
        health = (await routing.http.get("/health")).json()
        assert "draining: shutting down" in [replica["detail"] for replica in health["replicas"]]


async def test_more_than_there_is_room_for(two: tuple[Stack, Stack]) -> None:
    async with routed(*(stack.url for stack in two), max_in_flight_per_backend=1, max_queued=2) as routing:
        for stack in two:
            stack.engine.gate.clear()
        body = {"messages": HI, "max_tokens": 2}
        running = [asyncio.create_task(routing.http.post(CHAT, json=body)) for _ in range(2)]
        for stack in two:
            await soon(stack.engine.arrivals.get())
        waiting = [asyncio.create_task(routing.http.post(CHAT, json=body)) for _ in range(2)]
        await routing.until_queued(2)
        full = await routing.http.post(CHAT, json=body)
        assert (full.status_code, full.json()["error"]["type"]) == (429, "rate_limit_error")
        assert full.headers["retry-after"] == "1"
        for stack in two:
            stack.engine.gate.set()
        assert [(await task).status_code for task in (*running, *waiting)] == [200] * 4
        assert routing.router.replicas.num_in_flight == 0
        assert (await metrics(routing.http))['tpserve_router_rejections_total{reason="queue_full"}'] == 1


async def test_who_waits_too_long_for_room(two: tuple[Stack, Stack]) -> None:
    async with routed(two[0].url, max_in_flight_per_backend=1, queue_timeout_s=0.3) as routing:
        two[0].engine.gate.clear()
        body = {"messages": HI, "max_tokens": 2}
        running = asyncio.create_task(routing.http.post(CHAT, json=body))
        await soon(two[0].engine.arrivals.get())
        for late in await asyncio.gather(*(routing.http.post(CHAT, json=body) for _ in range(2))):
            assert late.status_code == 429
            assert "within 0.3 s" in late.json()["error"]["message"]
        two[0].engine.gate.set()
        assert (await running).status_code == 200
        assert routing.router.replicas.num_in_flight == 0
        assert (await metrics(routing.http))['tpserve_router_rejections_total{reason="queue_timeout"}'] == 2


async def test_no_replica_at_all(two: tuple[Stack, Stack]) -> None:
    async with routed(*(stack.url for stack in two), queue_timeout_s=0.2) as routing:
        assert (await routing.http.get("/health/startup")).status_code == 200
        for stack in two:
            await lose(stack)
        await routing.until_ready(0)
        reply = await routing.http.post(CHAT, json={"messages": HI})
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "engine_unavailable")
        assert reply.headers["retry-after"] == "1"
        assert "no connection" in reply.json()["error"]["message"]
        assert [(await routing.http.get(f"/health/{probe}")).status_code for probe in ("ready", "live", "startup")] == [
            503,
            200,
            200,
        ]
        assert (await routing.http.get("/health/other")).status_code == 404


async def test_a_refusal_goes_elsewhere_and_is_told_if_all_refuse(
    make_stack: StackFactory, tokenizer: Tokenizer
) -> None:
    full = engine_pb2.Rejected(code=engine_pb2.Rejected.QUEUE_FULL, message="7 requests wait", retry_after_s=3)
    engines = [make_engine(tokenizer, rejection=full), make_engine(tokenizer)]
    async with make_stack(engines[0], **STATES_STAY) as one, make_stack(engines[1], **STATES_STAY) as other:
        async with routed(one.url, other.url, policy="round-robin") as routing:
            for stream in (False, True):
                for _ in range(2):
                    body = {"messages": HI, "max_tokens": 2, "stream": stream}
                    assert (await routing.http.post(CHAT, json=body)).status_code == 200
            engines[1].rejection = full
            reply = await routing.http.post(CHAT, json={"messages": HI, "stream": True})
            assert (reply.status_code, reply.headers["retry-after"]) == (429, "3")
            assert reply.json()["error"]["message"] == "7 requests wait"


async def test_a_client_that_leaves_frees_its_place(two: tuple[Stack, Stack]) -> None:
    async with routed(*(stack.url for stack in two), max_in_flight_per_backend=1) as routing:
        for stack in two:
            stack.engine.gate.clear()
        streams = [
            await routing.client.chat.completions.create(model="tiny", messages=HI, stream=True) for _ in range(2)
        ]
        asking = asyncio.create_task(routing.http.post(CHAT, json={"messages": HI}))
        await routing.until_queued(1)
        asking.cancel()
        await routing.until_queued(0)
        for stream in streams:
            await stream.close()
        for stack in two:
            await soon(stack.engine.aborts.get())
        await until(lambda: routing.router.replicas.num_in_flight == 0)
        left = [value for name, value in (await metrics(routing.http)).items() if 'outcome="left"' in name]
        assert sum(left) == 2


async def test_who_is_still_there_when_the_router_ends_is_told(two: tuple[Stack, Stack]) -> None:
    async with routed(two[0].url, max_in_flight_per_backend=1) as routing:
        two[0].engine.gate.clear()
        stream = await routing.client.chat.completions.create(model="tiny", messages=HI, stream=True)
        await anext(stream)
        asking = asyncio.create_task(routing.http.post(CHAT, json={"messages": HI}))
        await routing.until_queued(1)
        routing.router.give_up_all()
        with pytest.raises(openai.APIError, match="shutting down"):
            async for _ in stream:
                pass
        reply = await asking
        assert (reply.status_code, reply.headers["retry-after"]) == (503, "1")
        await soon(two[0].engine.aborts.get())
        assert routing.router.replicas.num_in_flight == 0


async def test_a_conversation_finds_its_prefix_again(two: tuple[Stack, Stack]) -> None:
    async with routed(*(stack.url for stack in two)) as routing:
        for user in range(4):
            messages = [{"role": "user", "content": f"{user} " + LONG[0]["content"]}]
            for _ in range(3):
                reply = await routing.http.post(CHAT, json={"messages": messages, "max_tokens": 3})
                messages += [reply.json()["choices"][0]["message"], {"role": "user", "content": "and then?"}]
        assert sorted(len(stack.engine.submits) for stack in two) == [6, 6]
        found = await metrics(routing.http)
        assert found["tpserve_router_matched_blocks_total"] > found["tpserve_router_prompt_blocks_total"] / 2


async def test_the_scrape_holds_what_the_catalogue_says(two: tuple[Stack, Stack]) -> None:
    async with routed(*(stack.url for stack in two), merge_metrics=True) as routing:
        await routing.http.post(CHAT, json={"messages": HI, "max_tokens": 2})
        text = (await routing.http.get("/metrics")).text
        families = [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")]
        assert len(families) == len(set(families))
        own = {spec.full_name + ("_total" if spec.kind == "counter" else "") for spec in ROUTER_CATALOGUE}
        assert {name for name in families if "router" in name} == own
        for replica in "01":
            assert f'tpserve_num_requests_running{{replica="{replica}"}} 0' in text
            assert f'tpserve_gateway_engine_up{{replica="{replica}"}} 1.0' in text


async def test_a_body_that_is_too_large(two: tuple[Stack, Stack]) -> None:
    async with routed(two[0].url, max_body_bytes=1000) as routing:
        reply = await routing.http.post(CHAT, content=b"x" * 1001)
        assert (reply.status_code, reply.json()["error"]["code"]) == (413, "request_too_large")

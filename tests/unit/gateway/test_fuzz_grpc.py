"""Messages that no gateway and no coordinator sends: the doors between our processes refuse them, and go on."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import grpc.aio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuzzing import fuzz, mutated_bytes
from tpserve.coordinator.metrics import Metrics
from tpserve.coordinator.service import EngineService, Session
from tpserve.proto.messages import StepPlan, StepResult
from tpserve.proto.pb import common_pb2, engine_pb2, engine_pb2_grpc, worker_pb2
from tpserve.worker.batch import Batch
from tpserve.worker.errors import PlanError
from tpserve.worker.service import DoneStep, serve
from unit.coordinator.test_service import make_engine

UINT32 = st.one_of(st.sampled_from([0, 1, 2, 3, 7, 8, 2**31 - 1, 2**31, 2**32 - 1]), st.integers(0, 2**32 - 1))
SMALL = st.integers(0, 12)
FLOATS = st.floats(width=32)
TOKENS = st.lists(st.one_of(SMALL, UINT32), max_size=6)


@st.composite
def submits(draw: st.DrawFn) -> engine_pb2.Submit:
    """A good request of which some fields are anything."""

    def some(good: Any, anything: st.SearchStrategy[Any]) -> Any:
        return draw(anything) if draw(st.integers(0, 3)) == 0 else good

    sampling = common_pb2.SamplingParams(
        temperature=some(1.0, FLOATS),
        top_p=some(1.0, FLOATS),
        top_k=some(0, UINT32),
        min_p=some(0.0, FLOATS),
        frequency_penalty=some(0.0, FLOATS),
        presence_penalty=some(0.0, FLOATS),
        seed=some(1, st.integers(0, 2**64 - 1)),
        bias_token_ids=some([], TOKENS),
        bias_values=some([], st.lists(FLOATS, max_size=6)),
        wants_hidden=some(False, st.booleans()),
    )
    if draw(st.booleans()):
        sampling.num_logprobs = some(1, UINT32)
    submit = engine_pb2.Submit(
        request_id=some(1, st.integers(0, 2**64 - 1)),
        prompt_token_ids=some([1, 2, 3], TOKENS),
        n=some(1, UINT32),
        sampling=sampling,
        max_tokens=some(4, UINT32),
        stop_token_ids=some([], TOKENS),
        name=some("a", st.text(max_size=5)),
        traceparent=some("", st.text(max_size=60)),
        emitted=some([], st.lists(st.builds(lambda ids: engine_pb2.Emitted(token_ids=ids), TOKENS), max_size=3)),
    )
    if draw(st.integers(0, 3)) == 0:
        grammar = common_pb2.Grammar(source=draw(st.text(max_size=20)), stop_token_ids=draw(TOKENS))
        grammar.kind = draw(st.integers(0, 9))  # type: ignore[assignment]  # protobuf takes any number
        submit.grammar.CopyFrom(grammar)
    return submit


async def stream(messages: list[engine_pb2.GatewayMessage]) -> AsyncIterator[engine_pb2.GatewayMessage]:
    for message in messages:
        yield message


GATEWAY_MESSAGES = st.one_of(
    st.builds(lambda submit: engine_pb2.GatewayMessage(submit=submit), submits()),
    st.builds(
        lambda request, choice: engine_pb2.GatewayMessage(abort=engine_pb2.Abort(request_id=request, choice=choice)),
        st.one_of(SMALL, UINT32),
        st.one_of(st.none(), SMALL, UINT32),
    ),
    st.just(engine_pb2.GatewayMessage()),
)


@fuzz(200)
@given(st.lists(GATEWAY_MESSAGES, min_size=1, max_size=6))
def test_a_session_outlives_any_message(messages: list[engine_pb2.GatewayMessage]) -> None:
    """A message that ended the session would end the requests of everybody at that gateway."""

    async def run() -> None:
        engine, scheduler = make_engine()
        session = Session(engine)
        await session.read(stream(messages))
        assert scheduler.num_waiting < 10_000
        session.close()
        assert not scheduler.has_unfinished

    asyncio.run(run())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"n": 2**32 - 1}, "n is 4294967295"),
        ({"sampling": common_pb2.SamplingParams(top_p=math.nan)}, "top_p is nan"),
        ({"sampling": common_pb2.SamplingParams(temperature=-1)}, "temperature is -1"),
        ({"sampling": common_pb2.SamplingParams(bias_token_ids=[1])}, "1 tokens and 0 values"),
        ({"sampling": common_pb2.SamplingParams(bias_token_ids=[1], bias_values=[math.inf])}, "not finite"),
        ({"sampling": common_pb2.SamplingParams(bias_token_ids=[100], bias_values=[1])}, "has token 100"),
        ({"sampling": common_pb2.SamplingParams(num_logprobs=2**31)}, "num_logprobs is 2147483648"),
        ({"prompt_token_ids": [100]}, "has token 100; the vocabulary has 100"),
        ({"grammar": common_pb2.Grammar(source="a")}, "kind is 0"),
        ({"request_id": 7}, "request id 7 is in use"),
    ],
)
async def test_what_is_refused_is_named(change: dict[str, Any], words: str) -> None:
    engine, scheduler = make_engine()
    session = Session(engine, vocab_size=100)
    good: dict[str, Any] = {"request_id": 7, "prompt_token_ids": [1, 2, 3], "n": 1, "max_tokens": 4}
    first = engine_pb2.Submit(**good)
    bad = engine_pb2.Submit(**{**good, "request_id": 8, **change})
    await session.read(stream([engine_pb2.GatewayMessage(submit=submit) for submit in (first, bad)]))
    accepted, rejected = session.outbox.get_nowait(), session.outbox.get_nowait()
    assert accepted is not None
    assert rejected is not None
    assert accepted.HasField("accepted")
    assert rejected.rejected.code == engine_pb2.Rejected.INVALID
    assert words in rejected.rejected.message
    assert scheduler.num_waiting == 1


@contextlib.asynccontextmanager
async def engine_door() -> AsyncIterator[str]:
    engine, _ = make_engine()
    server = grpc.aio.server()
    engine_pb2_grpc.add_EngineServicer_to_server(  # type: ignore[no-untyped-call]  # generated
        EngineService(engine, Metrics("m"), engine_pb2.EngineInfo(version="1")), server
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


def whole_submit() -> bytes:
    submit = engine_pb2.Submit(request_id=1, prompt_token_ids=[1, 2, 3], n=1, max_tokens=4)
    return bytes(engine_pb2.GatewayMessage(submit=submit).SerializeToString())


async def test_the_engine_s_door_takes_any_bytes() -> None:
    found: list[bytes] = []

    @fuzz(60)
    @given(st.one_of(mutated_bytes(whole_submit()), st.binary(max_size=100)))
    def collect(sent: bytes) -> None:
        found.append(sent)

    collect()
    async with engine_door() as address, grpc.aio.insecure_channel(address) as channel:
        for method in ("Session", "Describe", "Metrics", "Trace", "Nothing"):
            untyped: Any = channel
            for sent in found:
                call = untyped.stream_stream(f"/tpserve.Engine/{method}")(iter([sent]), timeout=60)
                with contextlib.suppress(grpc.aio.AioRpcError):
                    async for _ in call:
                        pass
                code = await call.code()
                assert code is not grpc.StatusCode.DEADLINE_EXCEEDED, (method, sent)
        stub = engine_pb2_grpc.EngineStub(channel)  # type: ignore[no-untyped-call]  # generated
        assert (await stub.Describe(engine_pb2.DescribeRequest(), timeout=60)).version == "1"


# ---- ranks


class BatchRunner:
    """Takes plans as a rank's batch does, and computes nothing."""

    def __init__(self) -> None:
        self.batch = Batch(max_num_seqs=4, max_num_tokens=12, max_pages_per_seq=3, page_size=4)

    def submit(self, plan: StepPlan) -> DoneStep:
        self.batch.apply(plan)
        self.batch.prepare(plan)
        return DoneStep(StepResult(plan.step_id, 0))


@st.composite
def plans(draw: st.DrawFn) -> worker_pb2.StepPlan:
    plan = worker_pb2.StepPlan(step_id=draw(SMALL))
    slot = st.one_of(st.integers(0, 4), UINT32)
    plan.removed_slots.extend(draw(st.lists(slot, max_size=2)))
    for _ in range(draw(st.integers(0, 2))):
        plan.added_slots.add(
            slot=draw(slot),
            page_ids=draw(TOKENS),
            output_token_ids=draw(TOKENS),
            prefix_token_ids=draw(TOKENS),
            max_len=draw(st.one_of(SMALL, UINT32)),
        )
    plan.append_slots.extend(draw(st.lists(slot, max_size=2)))
    plan.append_pages.extend(draw(TOKENS))
    for _ in range(draw(st.integers(0, 2))):
        plan.chunks.add(slot=draw(slot), start=draw(st.one_of(SMALL, UINT32)), token_ids=draw(TOKENS), sample=True)
    return plan


@fuzz(200)
@given(st.lists(plans(), min_size=1, max_size=4))
def test_a_batch_refuses_what_it_cannot_hold(messages: list[worker_pb2.StepPlan]) -> None:
    runner = BatchRunner()
    for message in messages:
        try:
            plan = StepPlan.from_pb(message)
        except ValueError:  # lists that belong together have different lengths
            return
        try:
            runner.submit(plan)
        except PlanError:
            return


@pytest.mark.parametrize(
    ("added", "token", "words"),
    [
        ({"max_len": 2**31}, 1, "does not fit 31 bits"),
        ({"prefix_token_ids": [2**32 - 1]}, 1, "does not fit 31 bits"),
        ({"prefix_token_ids": [1] * 14}, 1, "14 tokens of a prefix; it holds 13"),
        ({"page_ids": [2**31]}, 1, "page 2147483648"),
        ({"page_ids": [1]}, 2**31, "a token that does not fit"),
    ],
)
def test_numbers_that_no_array_holds(added: dict[str, Any], token: int, words: str) -> None:
    plan = worker_pb2.StepPlan(step_id=1)
    plan.added_slots.add(slot=0, **added)
    plan.chunks.add(slot=0, start=0, token_ids=[token], sample=True)
    with pytest.raises(PlanError, match=words):
        BatchRunner().submit(StepPlan.from_pb(plan))


def test_a_rank_s_door_takes_any_bytes() -> None:
    server, port = serve(BatchRunner(), 0, "127.0.0.1", "secret")
    whole = bytes(worker_pb2.StepPlan(step_id=1, removed_slots=[1]).SerializeToString())
    try:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            untyped: Any = channel

            def send(sent: bytes) -> grpc.StatusCode:
                metadata = (("authorization", "Bearer secret"),)
                call = untyped.stream_stream("/tpserve.Worker/Execute")(_one(sent), metadata=metadata, timeout=60)
                with contextlib.suppress(grpc.RpcError):
                    for _ in call:
                        pass
                code: grpc.StatusCode = call.code()
                return code

            @fuzz(60)
            @given(st.one_of(mutated_bytes(whole), st.binary(max_size=100)))
            def check(sent: bytes) -> None:
                assert send(sent) is not grpc.StatusCode.DEADLINE_EXCEEDED

            check()
            assert send(bytes(worker_pb2.StepPlan(step_id=1).SerializeToString())) is grpc.StatusCode.OK
    finally:
        server.stop(1.0)  # without waiting: gRPC's own count of open calls is off after a message that it cannot read


def _one(sent: bytes) -> Iterator[bytes]:
    yield sent

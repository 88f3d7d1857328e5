"""MLCEngine and AsyncMLCEngine on a scripted engine: objects, errors, aborts, early leavers, threads."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pydantic
import pytest

import tpserve
from tpserve.coordinator.gateway.answers import ChatCompletion
from tpserve.coordinator.gateway.errors import ContextLengthExceeded, EngineUnavailable, InvalidRequest, ModelNotFound
from tpserve.coordinator.gateway.tokenizer import Tokenizer
from tpserve.coordinator.python_engine.async_engine import AsyncMLCEngine
from tpserve.coordinator.python_engine.engine import MLCEngine
from tpserve.coordinator.python_engine.errors import EngineError, RequestAborted
from tpserve.coordinator.python_engine.launcher import serve_arguments
from tpserve.coordinator.python_engine.loop import shared_loop
from unit.gateway.conftest import make_backend, write_model
from unit.gateway.scripted_engine import ScriptedEngine, seeded_script

HI = [{"role": "user", "content": "Hello there"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def scripted() -> ScriptedEngine:
    vocab_size = Tokenizer(make_backend()).vocab_size
    return ScriptedEngine(seeded_script(vocab_size), vocab_size)


@pytest.fixture
def engine(scripted: ScriptedEngine, folder: Path) -> Iterator[MLCEngine]:
    loop = shared_loop()
    server, address = loop.run(scripted.start(), timeout_s=10)
    with MLCEngine(folder, address=address, start_timeout_s=10) as opened:
        yield opened
    loop.run(server.stop(None), timeout_s=10)


def arrived(scripted: ScriptedEngine) -> None:
    shared_loop().run(scripted.arrivals.get(), timeout_s=10)


def test_importing_the_package_is_light() -> None:
    code = "import sys, tpserve; assert tpserve.__all__; print(sorted({'ray', 'grpc', 'pydantic'} & set(sys.modules)))"
    path = str(Path(tpserve.__path__[0]).parent)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": path})
    assert done.stdout == "[]\n", done.stderr


def test_public_names_are_there() -> None:
    assert all(getattr(tpserve, name) for name in tpserve.__all__)
    with pytest.raises(AttributeError, match="Engine2"):
        tpserve.Engine2  # noqa: B018


def test_whole_and_streamed_answers_agree(engine: MLCEngine) -> None:
    whole = engine.chat.completions.create(messages=HI, seed=5, max_tokens=20, n=2)
    texts = ["", ""]
    for response in engine.chat.completions.create(messages=HI, seed=5, max_tokens=20, n=2, stream=True):
        for choice in response.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [choice.message.content for choice in whole.choices]
    assert texts[0] != texts[1]
    assert whole.usage.completion_tokens == 40
    assert whole.model == engine.chat.completions.create(messages=HI, max_tokens=1).model

    text = engine.completions.create(prompt="Hello there", seed=5, max_tokens=20)
    parts = engine.completions.create(prompt="Hello there", seed=5, max_tokens=20, stream=True)
    assert "".join(part.choices[0].text for part in parts) == text.choices[0].text


def test_answers_are_read_whole(engine: MLCEngine) -> None:
    """No field that the handlers write is missing in the answers' models."""
    whole = engine.chat.completions.create(messages=HI, max_tokens=3, logprobs=True, top_logprobs=2)
    assert [len(token.top_logprobs) for token in whole.choices[0].logprobs.content] == [2, 2, 2]  # type: ignore[union-attr]
    assert unknown_fields(whole) == []
    text = engine.completions.create(prompt="a", max_tokens=3, logprobs=2)
    assert unknown_fields(text) == []
    for chunk in engine.chat.completions.create(
        messages=HI, max_tokens=3, logprobs=True, stream=True, stream_options={"include_usage": True}
    ):
        assert unknown_fields(chunk) == []


def unknown_fields(answer: object) -> list[str]:
    if isinstance(answer, list):
        return [name for item in answer for name in unknown_fields(item)]
    if not isinstance(answer, pydantic.BaseModel):
        return []
    return [*(answer.model_extra or {}), *unknown_fields([*vars(answer).values()])]


def test_an_answer_may_be_the_next_requests_history(engine: MLCEngine, scripted: ScriptedEngine) -> None:
    reply = engine.chat.completions.create(messages=HI, max_tokens=4, seed=1)
    engine.chat.completions.create(messages=[*HI, reply.choices[0].message, *HI], max_tokens=1)
    assert len(scripted.submits[1].prompt_token_ids) > 2 * len(scripted.submits[0].prompt_token_ids)


def test_refusals_are_the_apis(engine: MLCEngine) -> None:
    create = engine.chat.completions.create
    with pytest.raises(InvalidRequest, match="temperature") as caught:
        create(messages=HI, temperature=-1)
    assert (caught.value.param, caught.value.status) == ("temperature", 400)
    with pytest.raises(ContextLengthExceeded):
        create(messages=HI, max_tokens=512, stream=True)  # at once, not when it is read
    with pytest.raises(ModelNotFound, match="'other'"):
        create(messages=HI, model="other")
    with pytest.raises(TypeError, match="no field 'temprature'"):
        create(messages=HI, temprature=1)
    with pytest.raises(InvalidRequest, match="no JSON form"):
        create(messages=HI, stop=object())


def test_names_that_a_request_may_give(engine: MLCEngine, folder: Path) -> None:
    for name in (None, str(folder), folder.name):
        assert engine.chat.completions.create(messages=HI, model=name, max_tokens=1).model == (name or folder.name)


def test_failure_while_streaming(engine: MLCEngine, scripted: ScriptedEngine) -> None:
    scripted.fail_after = 3
    chunks: list[object] = []
    with pytest.raises(EngineUnavailable, match="rank 1 was lost"):
        chunks.extend(engine.chat.completions.create(messages=HI, stream=True))
    assert engine.metrics().text == scripted.metrics_text
    assert engine.metrics()["tpserve_num_requests_running"] == 0


@pytest.mark.parametrize("by", ["request_id", "answer_id"])
def test_abort_ends_a_stream(engine: MLCEngine, scripted: ScriptedEngine, by: str) -> None:
    scripted.gate.clear()
    stream = engine.chat.completions.create(messages=HI, stream=True, request_id="mine")
    first = next(stream)
    engine.abort("mine" if by == "request_id" else first.id)
    rest = list(stream)
    assert all(chunk.choices[0].finish_reason is None for chunk in rest)
    assert shared_loop().run(scripted.aborts.get(), timeout_s=10).request_id == 1
    engine.abort("mine")  # it has ended: nothing happens
    engine.abort("never")


def test_abort_of_a_whole_answer_says_so(engine: MLCEngine, scripted: ScriptedEngine) -> None:
    scripted.gate.clear()

    def abort() -> None:
        arrived(scripted)
        engine.abort("mine")

    helper = threading.Thread(target=abort)
    helper.start()
    with pytest.raises(RequestAborted, match="mine"):
        engine.chat.completions.create(messages=HI, request_id="mine")
    helper.join()


def test_a_request_id_belongs_to_one_running_request(engine: MLCEngine, scripted: ScriptedEngine) -> None:
    scripted.gate.clear()
    with engine.chat.completions.create(messages=HI, stream=True, request_id="mine"):
        with pytest.raises(InvalidRequest, match="'mine' belongs to a request that is still running"):
            engine.chat.completions.create(messages=HI, request_id="mine")


@pytest.mark.parametrize("how", ["close", "drop", "with"])
def test_leaving_a_stream_early_aborts(engine: MLCEngine, scripted: ScriptedEngine, how: str) -> None:
    scripted.gate.clear()
    stream = engine.chat.completions.create(messages=HI, stream=True)
    next(stream)
    if how == "close":
        stream.close()
        assert list(stream) == []
    elif how == "with":
        with stream:
            pass
    else:
        del stream
    assert shared_loop().run(scripted.aborts.get(), timeout_s=10).request_id == 1


def test_threads_share_an_engine(engine: MLCEngine) -> None:
    answers: dict[int, ChatCompletion] = {}

    def ask(seed: int) -> None:
        answers[seed] = engine.chat.completions.create(messages=HI, seed=seed, max_tokens=8)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len({answer.choices[0].message.content for answer in answers.values()}) == 8
    assert len({answer.id for answer in answers.values()}) == 8


def test_a_terminated_engine_says_so(engine: MLCEngine) -> None:
    engine.terminate()
    engine.terminate()
    with pytest.raises(EngineError, match="terminated"):
        engine.chat.completions.create(messages=HI)
    with pytest.raises(EngineError, match="terminated"):
        engine.metrics()


async def test_async_engine(scripted: ScriptedEngine, folder: Path) -> None:
    loop = shared_loop()
    server, address = await asyncio.to_thread(loop.run, scripted.start(), 10)
    async with AsyncMLCEngine(folder, address=address, start_timeout_s=10) as engine:
        create = engine.chat.completions.create
        answers = await asyncio.gather(*[create(messages=HI, seed=seed, max_tokens=8) for seed in range(8)])
        assert len({answer.choices[0].message.content for answer in answers}) == 8
        text = ""
        async for response in await create(messages=HI, seed=3, max_tokens=8, stream=True):
            text += response.choices[0].delta.content or ""
        assert text == answers[3].choices[0].message.content
        assert (await engine.completions.create(prompt="a", max_tokens=2)).choices[0].finish_reason == "length"
        assert (await engine.metrics())["tpserve_num_requests_running"] == 0
        with pytest.raises(ContextLengthExceeded):
            await create(messages=HI, max_tokens=512, stream=True)
        scripted.gate.clear()
        stream = await create(messages=HI, stream=True)
        first = await anext(stream)
        await engine.abort(first.id)
        assert [chunk async for chunk in stream if chunk.choices[0].finish_reason] == []
        waiting = asyncio.create_task(create(messages=HI, request_id="cancelled"))
        for _ in range(12):
            await asyncio.to_thread(arrived, scripted)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        ids = {(await asyncio.to_thread(loop.run, scripted.aborts.get(), 10)).request_id for _ in range(2)}
        assert len(ids) == 2
    with pytest.raises(EngineError, match="terminated"):
        await engine.chat.completions.create(messages=HI)
    await asyncio.to_thread(loop.run, server.stop(None), 10)


def test_nobody_answers_at_the_address(folder: Path) -> None:
    with pytest.raises(EngineError, match=r"no engine answers at 127.0.0.1:1 .*The engine listens at"):
        MLCEngine(folder, address="127.0.0.1:1", start_timeout_s=0.3)


def test_options_become_flags() -> None:
    options = {"tp": 2, "max_num_seqs": 8, "no_prefix_cache": True, "device": None, "served_model_name": ["a", "b"]}
    flags = ["m", "--tp", "2", "--max-num-seqs", "8", "--no-prefix-cache", "--served-model-name", "a", "b"]
    assert serve_arguments("m", options) == flags


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"tensor_parallel": 2}, TypeError, "'tensor_parallel' is not an option"),
        ({"port": 9}, TypeError, "'port' is an option of the HTTP server"),
        ({"mode": "fast"}, ValueError, "'fast'"),
        ({"max_num_seqs": 0}, ValueError, "0 is not 1 or more"),
    ],
)
def test_options_that_are_none(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        MLCEngine("model", **options)


def test_what_to_serve_must_be_said() -> None:
    with pytest.raises(TypeError, match="give the model"):
        MLCEngine()
    with pytest.raises(TypeError, match="'tp' is for an engine that is started here"):
        MLCEngine(address="127.0.0.1:1", tp=2)

"""Streams of every kind against a server whose processes are killed or replaced: what each client must get, and got.

A stream is complete if each choice has the text, the finish reason and the number of tokens that it had when nothing
was killed. A request may be refused (429, 503); once it was accepted it must be complete.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

import openai

from patience import Patience
from server import Server, chat_request

Request = dict[str, Any]
REBUILT_WITHIN_S = 60.0
"""On a machine that does other things besides."""

_SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 8, "maxLength": 60},
        "scores": {"type": "array", "items": {"type": "integer"}, "minItems": 4, "maxItems": 8},
        "kind": {"enum": ["cat", "dog", "bird"]},
    },
    "required": ["name", "scores", "kind"],
    "additionalProperties": False,
}
_FORMAT = {"type": "json_schema", "json_schema": {"name": "animal", "schema": _SCHEMA}}


def mixed_requests(max_tokens: int) -> list[Request]:
    """Return greedy, sampled, constrained and forked requests; each alone determines its text."""
    kinds: list[tuple[str, Request]] = [
        ("Write a long story about a dragon.", {}),
        ("Explain how bread is made, step by step.", {"temperature": 1.0, "seed": 1}),
        ("Describe an animal.", {"response_format": _FORMAT}),
        ("Describe your favourite animal.", {"response_format": _FORMAT, "temperature": 1.0, "seed": 2}),
        ("Tell me about the history of Rome.", {"n": 2, "temperature": 0.8, "seed": 3}),
        ("Invent two animals.", {"n": 2, "response_format": _FORMAT, "temperature": 1.0, "seed": 4}),
        ("What are the rules of chess?", {"temperature": 0.7, "top_p": 0.9, "seed": 5, "frequency_penalty": 0.5}),
        ("How does a bicycle stay upright?", {"stop": ["zzzz"], "logprobs": True, "top_logprobs": 2}),
    ]
    return [
        chat_request(prompt, max_tokens=max_tokens, stream=True, stream_options={"include_usage": True}, **options)
        for prompt, options in kinds
    ]


@dataclass(slots=True)
class Answer:
    """What one client saw of one request."""

    texts: dict[int, str] = field(default_factory=dict)
    finishes: dict[int, str] = field(default_factory=dict)
    logprobs: list[float] = field(default_factory=list)
    num_tokens: int | None = None
    """By the server's usage, which comes last."""
    error: openai.APIError | None = None
    longest_gap_s: float = 0.0
    """Between two chunks, or before the first."""

    @property
    def what(self) -> tuple[dict[int, str], dict[int, str], int | None, list[float]]:
        """Everything that must be the same each time."""
        return self.texts, self.finishes, self.num_tokens, self.logprobs

    @property
    def num_chars(self) -> int:
        return sum(map(len, self.texts.values()))


async def stream(client: openai.AsyncOpenAI, request: Request, answer: Answer) -> None:
    """Fill `answer` as it comes."""
    last = time.monotonic()
    try:
        chunks: Any = await client.chat.completions.create(**request)
        async for chunk in chunks:
            now = time.monotonic()
            answer.longest_gap_s = max(answer.longest_gap_s, now - last)
            last = now
            for choice in chunk.choices:
                index = choice.index
                answer.texts[index] = answer.texts.get(index, "") + (choice.delta.content or "")
                if choice.finish_reason is not None:
                    answer.finishes[index] = choice.finish_reason
                if choice.logprobs is not None:
                    answer.logprobs += [token.logprob for token in choice.logprobs.content or ()]
            if chunk.usage is not None:
                answer.num_tokens = chunk.usage.completion_tokens
    except openai.APIError as error:
        answer.error = error


class ComparedLoad:
    """Clients that ask one thing after another, each compared with what came undisturbed."""

    def __init__(self, client: openai.AsyncOpenAI, requests: Sequence[Request], seed: int) -> None:
        self._client = client
        self._requests = requests
        self._rng = random.Random(seed)
        self._expected: list[Answer] = []
        self.outcomes: Counter[str] = Counter()
        self.faults: list[str] = []
        """What went wrong, in words; empty if no answer was lost."""
        self.pauses_s: list[float] = []
        """The longest gap of each stream that lived through a kill."""
        self.num_kills = 0
        """So far; whoever kills counts."""

    async def learn(self) -> None:
        """Ask everything once, undisturbed."""
        self._expected = [Answer() for _ in self._requests]
        await asyncio.gather(
            *(
                stream(self._client, request, answer)
                for request, answer in zip(self._requests, self._expected, strict=True)
            )
        )
        for request, answer in zip(self._requests, self._expected, strict=True):
            assert answer.error is None, f"without any kill, {request['messages']}: {answer.error}"
            assert len(answer.finishes) == request.get("n", 1)

    async def run_while(self, disturbance: Coroutine[Any, Any, None], num_clients: int) -> None:
        """Keep so many clients asking for as long as the disturbance lasts, and let them come to their end."""
        stop = asyncio.Event()
        clients = [asyncio.create_task(self._ask_on(stop)) for _ in range(num_clients)]
        try:
            await disturbance
        finally:
            stop.set()
            await asyncio.gather(*clients)

    async def _ask_on(self, stop: asyncio.Event) -> None:
        while not stop.is_set():
            number = self._rng.randrange(len(self._requests))
            answer, kills_before = Answer(), self.num_kills
            await stream(self._client, self._requests[number], answer)
            outcome = self._judge(number, answer)
            self.outcomes[outcome] += 1
            if self.num_kills > kills_before and outcome == "complete":
                self.outcomes["complete, over a kill"] += 1
                self.pauses_s.append(answer.longest_gap_s)
            if outcome == "refused":
                await asyncio.sleep(0.2)

    def _judge(self, number: int, answer: Answer) -> str:
        expected, prompt = self._expected[number], self._requests[number]["messages"][0]["content"]
        if answer.error is not None:
            status = getattr(answer.error, "status_code", None)
            if status in (429, 503) and not answer.texts:
                return "refused"
            self.faults.append(f"{prompt!r} ended with {answer.error!r} after {answer.num_chars} characters")
            return "lost"
        if answer.what != expected.what:
            self.faults.append(f"{prompt!r} is {answer.what!r} and not {expected.what!r}")
            return "wrong"
        return "complete"


class KillLoad(ComparedLoad):
    """Such clients of a server whose ranks are killed."""

    def __init__(self, server: Server, client: openai.AsyncOpenAI, requests: Sequence[Request], seed: int) -> None:
        super().__init__(client, requests, seed)
        self._server = server
        self.rebuilds_s: list[float] = []
        """From a kill to READY."""

    async def run(self, num_kills: int, num_clients: int, max_pause_s: float) -> None:
        """Kill a random rank `num_kills` times, each a random time after the group is ready, under `num_clients`."""
        await self.run_while(self._kill(num_kills, max_pause_s), num_clients)

    async def _kill(self, num_kills: int, max_pause_s: float) -> None:
        for _ in range(num_kills):
            await asyncio.sleep(self._rng.uniform(0.1, max_pause_s))
            await self._kill_one()

    async def _kill_one(self) -> None:
        """Kill a rank and wait for the new group."""
        old = await asyncio.to_thread(self._server.rank_pids)
        rank = self._rng.choice(sorted(old))
        self.num_kills += 1
        os.kill(old[rank], signal.SIGKILL)
        begun, patience = time.monotonic(), Patience(REBUILT_WITHIN_S)
        while True:
            await asyncio.sleep(0.05)
            pids = await asyncio.to_thread(self._server.rank_pids)
            if all(pids[each] != old[each] for each in old):
                status, _ = await asyncio.to_thread(self._server.health)
                if status == 200:
                    break
            if patience.is_over():
                raise AssertionError(self._server.report(f"no new group {REBUILT_WITHIN_S:g} s after a kill"))
        self.rebuilds_s.append(time.monotonic() - begun)

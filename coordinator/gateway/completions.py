"""POST /v1/completions: raw prompts in, OpenAI's text completions out."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from tpserve.coordinator.gateway import debug
from tpserve.coordinator.gateway.engine_types import EngineRequest
from tpserve.coordinator.gateway.errors import InvalidRequest
from tpserve.coordinator.gateway.generation import Update, Usage
from tpserve.coordinator.gateway.origin import origin_of
from tpserve.coordinator.gateway.output import Shape, completion_shape
from tpserve.coordinator.gateway.prepare import SEED_MASK, engine_request, stop_token_ids, tokenise
from tpserve.coordinator.gateway.protocol import MAX_TOTAL_CHOICES, CompletionRequest, parse_body
from tpserve.coordinator.gateway.service import AnswerHead, Service
from tpserve.coordinator.gateway.stream import sse
from tpserve.coordinator.gateway.tokenizer import Tokenizer

DEFAULT_MAX_TOKENS = 16
"""OpenAI's default for this route."""


async def create_completion(service: Service, http: Request) -> Response:
    """Answer one request, streamed or in one piece.

    Raises
    ------
    ApiError
        If the request cannot be served.
    """
    request = parse_body(CompletionRequest, await http.body())
    origin = origin_of(http)
    identity = origin.identity
    head = AnswerHead(f"cmpl-{identity.key}", identity.created, service.resolve_model(request.model))
    debug.require_enabled(service, request)
    if request.asks_for_metrics:
        return await debug.metrics_answer(service, request, head, "text_completion")
    info = service.engine.info
    model = service.model
    n = request.n or 1
    if n * len(request.prompts) > MAX_TOTAL_CHOICES:
        raise InvalidRequest(
            f"{len(request.prompts)} prompts with n = {n} make {n * len(request.prompts)} choices; "
            f"at most {MAX_TOTAL_CHOICES} are allowed in one request",
            param="n",
        )
    shape = Shape()
    if request.constraints:  # schemas take milliseconds to check
        shape = await asyncio.to_thread(completion_shape, request, stop_token_ids(request, model))
    if shape.grammar is not None:
        await service.grammars.check(shape.grammar, info.vocab_size, param=shape.param)
    to_engine: list[EngineRequest] = []
    echoes: list[str] = []
    for prompt in request.prompts:
        if isinstance(prompt, str):
            token_ids = await tokenise(model, prompt, info, add_special_tokens=True)
        else:
            token_ids = prompt
        if max(token_ids, default=0) >= info.vocab_size:
            raise InvalidRequest(
                f"The prompt has token {max(token_ids)}, but the vocabulary has {info.vocab_size} tokens",
                param="prompt",
            )
        to_engine.append(
            engine_request(
                request,
                token_ids,
                model,
                info,
                name=http.scope["state"]["request_id"],
                requested=request.max_tokens,
                default_limit=DEFAULT_MAX_TOKENS,
                num_logprobs=request.logprobs,
                fresh_seed=identity.seed + len(to_engine) & SEED_MASK,
                grammar=shape.grammar,
            )
        )
        if request.echo:
            echoes += [prompt if isinstance(prompt, str) else model.tokenizer.decode(prompt)] * n
        else:
            echoes += [""] * n
    return await service.respond(
        http,
        to_engine,
        progress=origin.progress,
        stops=request.stops,
        writer=(
            (lambda generation: CompletionChunks(head, model.tokenizer, request, echoes, generation.usage))
            if request.stream
            else None
        ),
        answer=lambda: CompletionAnswer(head, model.tokenizer, request, echoes),
    )


class CompletionChunks:
    """Writes streamed `text_completion` events.

    Parameters
    ----------
    echoes
        By choice, what goes before its text.
    usage
        Counts of the running generation, read when a chunk with usage is written.
    """

    def __init__(
        self, head: AnswerHead, tokenizer: Tokenizer, request: CompletionRequest, echoes: list[str], usage: Usage
    ) -> None:
        self._tokenizer = tokenizer
        self._logprobs = request.logprobs is not None
        self._include_usage = request.include_usage
        self._usage_by_chunk = request.usage_by_chunk
        self._usage = usage
        self._echoes = list(echoes)
        self._choice: dict[str, Any] = {"index": 0, "text": "", "logprobs": None, "finish_reason": None}
        self._chunk: dict[str, Any] = {**_head(head), "choices": [self._choice]}
        if self._include_usage:
            self._chunk["usage"] = None

    def write(self, update: Update) -> bytes:
        """Return the chunk, if there is anything to say."""
        choice = self._choice
        text = update.text
        if echo := self._echoes[update.index]:
            text = echo + text
            self._echoes[update.index] = ""
        shows_tokens = self._usage_by_chunk or (self._logprobs and update.token_ids)
        if not text and update.finish is None and not shows_tokens:
            return b""
        choice["index"] = update.index
        choice["text"] = text
        choice["finish_reason"] = update.finish
        if self._logprobs:
            choice["logprobs"] = completion_logprobs(self._tokenizer, update)
        if self._usage_by_chunk:
            self._chunk["usage"] = self._usage.to_dict()
        return sse(self._chunk)

    def close(self) -> bytes:
        """Return the usage chunk, if it was asked for."""
        if not self._include_usage:
            return b""
        return sse({**self._chunk, "choices": [], "usage": self._usage.to_dict()})


class CompletionAnswer:
    """Collects a `text_completion` object."""

    def __init__(self, head: AnswerHead, tokenizer: Tokenizer, request: CompletionRequest, echoes: list[str]) -> None:
        self._head = head
        self._tokenizer = tokenizer
        self._texts = [[echo] for echo in echoes]
        self._finish: list[str | None] = [None] * len(echoes)
        self._logprobs: list[dict[str, list[Any]]] | None = None
        if request.logprobs is not None:
            self._logprobs = [
                {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []} for _ in echoes
            ]

    def add(self, update: Update) -> None:
        """Take what is new in a choice."""
        self._texts[update.index].append(update.text)
        self._finish[update.index] = update.finish
        if self._logprobs is not None:
            whole = self._logprobs[update.index]
            for name, values in completion_logprobs(self._tokenizer, update).items():
                whole[name] += values

    def to_dict(self, usage: Usage) -> dict[str, Any]:
        """Return the response body."""
        logprobs = self._logprobs
        return {
            **_head(self._head),
            "choices": [
                {
                    "index": index,
                    "text": "".join(texts),
                    "logprobs": None if logprobs is None else logprobs[index],
                    "finish_reason": self._finish[index],
                }
                for index, texts in enumerate(self._texts)
            ],
            "usage": usage.to_dict(),
        }


def completion_logprobs(tokenizer: Tokenizer, update: Update) -> dict[str, list[Any]]:
    """Return the parallel lists of this route's older format."""
    shown = list(zip(update.token_ids, update.logprobs, update.offsets, strict=False))
    return {
        "tokens": [tokenizer.shown(token)[0] for token, _, _ in shown],
        "token_logprobs": [item.logprob for _, item, _ in shown],
        "top_logprobs": [
            # The chosen token is always there, as in OpenAI's.
            {tokenizer.shown(other)[0]: value for other, value in (*item.top, (token, item.logprob))}
            for token, item, _ in shown
        ],
        "text_offset": [offset for _, _, offset in shown],
    }


def _head(head: AnswerHead) -> dict[str, Any]:
    return {"id": head.id, "object": "text_completion", "created": head.created, "model": head.model}

"""POST /v1/embeddings: the model's final hidden row of each input's last token, of length 1."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from tpserve.coordinator.gateway.answers import Answer
from tpserve.coordinator.gateway.engine_types import EngineRequest
from tpserve.coordinator.gateway.errors import InternalError, InvalidRequest, UnsupportedFeature
from tpserve.coordinator.gateway.generation import Generation
from tpserve.coordinator.gateway.metering import meter_of
from tpserve.coordinator.gateway.prepare import output_limit, tokenise
from tpserve.coordinator.gateway.protocol import MAX_PROMPTS, Text, TokenId, Wire, parse_body
from tpserve.coordinator.gateway.service import Service
from tpserve.coordinator.gateway.stream import json_response
from tpserve.proto.messages import SamplingParams

if TYPE_CHECKING:
    import numpy as np

_ONE_TEXT = Annotated[str, Field(max_length=2**24)]
_TOKENS = Annotated[list[TokenId], Field(min_length=1)]


class EmbeddingsRequest(Wire):
    """Body of POST /v1/embeddings."""

    model: str | None = None
    input: (
        _ONE_TEXT
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS)]
        | _TOKENS
        | Annotated[list[_TOKENS], Field(min_length=1, max_length=MAX_PROMPTS)]
    )
    """A text, token ids, or a list of either."""
    encoding_format: Literal["float", "base64"] | None = None
    """base64 is of little-endian float32."""
    dimensions: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    """Only the model's own number: no model served here was trained to be cut."""
    user: str | None = None

    @property
    def inputs(self) -> list[str] | list[list[int]]:
        """The inputs as a list, of texts or of token ids."""
        if isinstance(self.input, str):
            return [self.input]
        if isinstance(self.input[0], int):
            return [self.input]  # then all of them are
        return self.input


class Embedding(Answer):
    """Of one input."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str
    """Numbers, or their base64."""


class EmbeddingsUsage(Answer):
    """Token counts."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingsAnswer(Answer):
    """Answer of POST /v1/embeddings."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingsUsage


async def create_embeddings(service: Service, http: Request) -> Response:
    """Answer one request.

    Raises
    ------
    ApiError
        If the request cannot be served.
    """
    request = parse_body(EmbeddingsRequest, await http.body())
    name = service.resolve_model(request.model)
    requests = [await _engine_request(service, http, item) for item in request.inputs]
    generation = Generation(
        service.engine, service.model.tokenizer, requests, stops=(), timeout_s=service.config.request_timeout_s
    )
    if (meter := meter_of(http.scope["state"])) is not None:
        meter.take_prompt(generation.usage.num_prompt_tokens)  # the token that is asked for is nothing to the client
    rows: dict[int, bytes] = {}
    try:
        await generation.start(http.receive, service.config.accept_timeout_s)
        async for updates in generation.updates():
            for update in updates:
                rows[update.index] = update.logprobs[0].hidden
    finally:
        generation.close()
    vectors = [_unit(rows[index]) for index in range(len(requests))]
    width = len(vectors[0])
    if request.dimensions not in (None, width):
        raise UnsupportedFeature(
            f"dimensions is {request.dimensions}, but this model's embeddings have {width} and cannot be cut: "
            "leave it out",
            param="dimensions",
        )
    num_tokens = generation.usage.num_prompt_tokens
    return json_response(
        {
            "object": "list",
            "data": [
                {"object": "embedding", "index": index, "embedding": _encoded(vector, request.encoding_format)}
                for index, vector in enumerate(vectors)
            ],
            "model": name,
            "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
        }
    )


async def _engine_request(service: Service, http: Request, item: str | list[int]) -> EngineRequest:
    """Ask for one token, with the hidden row that it is sampled from."""
    info = service.engine.info
    if isinstance(item, str):
        token_ids = await tokenise(service.model, item, info, add_special_tokens=True)
    else:
        token_ids = item
        if max(item) >= info.vocab_size:
            raise InvalidRequest(
                f"input has token {max(item)}, but the vocabulary has {info.vocab_size} tokens", param="input"
            )
    if not token_ids:
        raise InvalidRequest("an input has no tokens", param="input")
    output_limit(len(token_ids), 1, info, None)
    return EngineRequest(
        name=http.scope["state"]["request_id"],
        prompt_token_ids=token_ids,
        n=1,
        sampling=SamplingParams(temperature=0.0, num_logprobs=0, wants_hidden=True),
        max_tokens=1,
        stop_token_ids=(),
    )


def _unit(row: bytes) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    """Return the row at length 1."""
    import numpy as np  # here: every gateway would start a tenth later for it

    vector = np.frombuffer(row, "<f4").astype(np.float32)
    norm = float(np.linalg.norm(vector))
    if not norm or not np.isfinite(norm):
        raise InternalError("The model gave no usable hidden row for this input")
    return vector / np.float32(norm)


def _encoded(vector: np.ndarray[Any, np.dtype[np.float32]], encoding: str | None) -> list[float] | str:
    if encoding == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return [float(value) for value in vector]

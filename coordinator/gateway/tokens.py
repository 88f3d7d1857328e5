"""POST /tokenize and /detokenize: what the model's tokenizer makes of a text, without running the model."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator
from starlette.requests import Request
from starlette.responses import Response

from tpserve.coordinator.gateway.answers import Answer
from tpserve.coordinator.gateway.chat import template_message
from tpserve.coordinator.gateway.errors import InvalidRequest
from tpserve.coordinator.gateway.protocol import Message, Text, TokenId, Wire, parse_body
from tpserve.coordinator.gateway.service import Service
from tpserve.coordinator.gateway.stream import json_response


class TokenizeRequest(Wire):
    """Body of POST /tokenize: a prompt as of /v1/completions, or messages as of /v1/chat/completions."""

    model: str | None = None
    prompt: Text | None = None
    messages: list[Message] | None = Field(None, min_length=1, max_length=2**16)
    add_special_tokens: bool = True
    """For `prompt`: a begin-of-sequence token where the model wants one. Chat templates write their own."""
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either 'prompt' or 'messages'")
        return self


class TokenizeAnswer(Answer):
    """Answer of POST /tokenize."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None
    """The tokens' texts, if asked for; bytes that are no text alone show as U+FFFD."""


class DetokenizeRequest(Wire):
    """Body of POST /detokenize."""

    model: str | None = None
    tokens: list[TokenId] = Field(max_length=2**20)


class DetokenizeAnswer(Answer):
    """Answer of POST /detokenize."""

    prompt: str
    """The text, special tokens left out."""


async def tokenize(service: Service, http: Request) -> Response:
    """Answer /tokenize.

    Raises
    ------
    ApiError
        If the body or the messages cannot be used.
    """
    request = parse_body(TokenizeRequest, await http.body())
    service.resolve_model(request.model)
    model = service.model
    if request.messages is not None:
        if model.chat_template is None:
            raise InvalidRequest("This model has no chat template; give 'prompt'", param="messages")
        text = model.chat_template.render([template_message(message) for message in request.messages])
        tokens = await model.encode(text, add_special_tokens=False)
    else:
        assert request.prompt is not None
        tokens = await model.encode(request.prompt, add_special_tokens=request.add_special_tokens)
    texts = [model.tokenizer.shown(token)[0] for token in tokens] if request.return_token_strs else None
    limit = service.engine.info.max_model_len
    return json_response({"count": len(tokens), "max_model_len": limit, "tokens": tokens, "token_strs": texts})


async def detokenize(service: Service, http: Request) -> Response:
    """Answer /detokenize.

    Raises
    ------
    ApiError
        If the body cannot be used, or a token is outside the vocabulary.
    """
    request = parse_body(DetokenizeRequest, await http.body())
    service.resolve_model(request.model)
    vocab_size = service.engine.info.vocab_size
    if (largest := max(request.tokens, default=0)) >= vocab_size:
        raise InvalidRequest(f"tokens holds {largest}, but the vocabulary has {vocab_size} tokens", param="tokens")
    return json_response({"prompt": service.model.tokenizer.decode(request.tokens)})

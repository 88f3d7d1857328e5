"""From a checked request to what the coordinator is asked: tokens, limits of the model, sampling parameters."""

from __future__ import annotations

from collections.abc import Sequence

from tpserve.coordinator.gateway.engine_types import EngineInfo, EngineRequest
from tpserve.coordinator.gateway.errors import ContextLengthExceeded, InvalidRequest
from tpserve.coordinator.gateway.model import SamplingDefaults, ServedModel
from tpserve.coordinator.gateway.protocol import ChatCompletionRequest, CompletionRequest
from tpserve.proto.messages import Grammar, SamplingParams

SEED_MASK = 2**64 - 1


async def tokenise(model: ServedModel, text: str, info: EngineInfo, *, add_special_tokens: bool) -> list[int]:
    """Return the token ids of a prompt; one that cannot fit costs no time.

    Raises
    ------
    ContextLengthExceeded
        If `text` is so long that it must have more tokens than the context.
    """
    at_least = model.tokenizer.min_num_tokens(text)
    if at_least >= info.max_model_len:
        raise _too_long(f"at least {at_least}", info)
    return await model.encode(text, add_special_tokens=add_special_tokens)


def output_limit(num_prompt_tokens: int, requested: int | None, info: EngineInfo, default: int | None) -> int:
    """Return how many tokens each choice may have.

    Parameters
    ----------
    requested
        What the client asked for; None takes `default`, cut to what is left of the context.
    default
        None is all that is left.

    Raises
    ------
    InvalidRequest
        If the prompt is empty.
    ContextLengthExceeded
        If the prompt, or the prompt and what was asked for, do not fit.
    """
    left = info.max_model_len - num_prompt_tokens
    if num_prompt_tokens == 0:
        raise InvalidRequest("The prompt has no tokens", param="prompt")
    if left < 1:
        raise _too_long(str(num_prompt_tokens), info)
    if requested is None:
        return left if default is None else min(default, left)
    if requested > left:
        raise ContextLengthExceeded(
            f"The model's context length is {info.max_model_len} tokens, but {num_prompt_tokens + requested} were "
            f"asked for ({num_prompt_tokens} in the prompt and {requested} of output): lower max_tokens to {left} "
            "or less, or shorten the prompt",
            param="max_tokens",
        )
    return requested


def sampling_params(
    request: ChatCompletionRequest | CompletionRequest,
    defaults: SamplingDefaults,
    info: EngineInfo,
    num_logprobs: int | None,
    fresh_seed: int,
) -> SamplingParams:
    """Return how the request's tokens are drawn; without a seed, by the fresh one.

    Raises
    ------
    InvalidRequest
        If `logit_bias` names a token outside the vocabulary.
    """
    bias = request.logit_bias or {}
    if outside := [token for token in bias if token >= info.vocab_size]:
        raise InvalidRequest(
            f"logit_bias names token {outside[0]}, but the vocabulary has {info.vocab_size} tokens", param="logit_bias"
        )
    return SamplingParams(
        temperature=_given(request.temperature, defaults.temperature),
        top_p=_given(request.top_p, defaults.top_p),
        top_k=defaults.top_k if request.top_k is None else request.top_k or None,
        min_p=_given(request.min_p, defaults.min_p),
        frequency_penalty=_given(request.frequency_penalty, 0.0),
        presence_penalty=_given(request.presence_penalty, 0.0),
        seed=fresh_seed if request.seed is None else request.seed & SEED_MASK,
        logit_bias=tuple(bias.items()),
        num_logprobs=num_logprobs,
    )


def engine_request(
    request: ChatCompletionRequest | CompletionRequest,
    prompt_token_ids: Sequence[int],
    model: ServedModel,
    info: EngineInfo,
    *,
    name: str,
    requested: int | None,
    default_limit: int | None,
    num_logprobs: int | None,
    fresh_seed: int,
    grammar: Grammar | None = None,
) -> EngineRequest:
    """Return what the coordinator is asked for one prompt.

    Raises
    ------
    InvalidRequest
        If a limit of the model is exceeded.
    """
    return EngineRequest(
        name=name,
        prompt_token_ids=prompt_token_ids,
        n=request.n or 1,
        sampling=sampling_params(request, model.defaults, info, num_logprobs, fresh_seed),
        max_tokens=output_limit(len(prompt_token_ids), requested, info, default_limit),
        stop_token_ids=stop_token_ids(request, model),
        grammar=grammar,
    )


def stop_token_ids(request: ChatCompletionRequest | CompletionRequest, model: ServedModel) -> list[int]:
    """Return the tokens that end the output."""
    return [] if request.ignores_eos else sorted({*model.stop_token_ids, *(request.stop_token_ids or ())})


def _too_long(num_tokens: str, info: EngineInfo) -> ContextLengthExceeded:
    return ContextLengthExceeded(
        f"The prompt has {num_tokens} tokens and the model's context length is {info.max_model_len} tokens, "
        "which must hold the output too: shorten the prompt"
    )


def _given(value: float | None, default: float) -> float:
    return default if value is None else value

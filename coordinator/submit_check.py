"""What a gateway may ask for, checked at the coordinator's own door.

Gateways check requests in the client's words. This is for a gateway of another version, or something else that has
found the port: a message that ended the session would end the requests of everybody at that gateway, and a number out
of range would cost the group a rank.
"""

from __future__ import annotations

import math

from tpserve.coordinator.request import RequestInvalid
from tpserve.proto.messages import GrammarKind
from tpserve.proto.pb import common_pb2, engine_pb2

MAX_CHOICES = 256
MAX_LOGPROBS = 100
_KINDS = frozenset(kind.value for kind in GrammarKind)


def check_submit(submit: engine_pb2.Submit, vocab_size: int) -> None:
    """See that a message makes a request; the scheduler then says whether it can run.

    Parameters
    ----------
    vocab_size
        0: unknown, and token ids are not checked.

    Raises
    ------
    RequestInvalid
        Naming the field and its value.
    """
    if submit.n > MAX_CHOICES:
        raise RequestInvalid(f"n is {submit.n}; it must be at most {MAX_CHOICES}")
    if submit.HasField("grammar") and submit.grammar.kind not in _KINDS:
        raise RequestInvalid(f"the grammar's kind is {submit.grammar.kind}, which is not known here")
    sampling = submit.sampling
    _check_sampling(sampling)
    if vocab_size:
        for name, token_ids in (
            ("prompt_token_ids", submit.prompt_token_ids),
            ("bias_token_ids", sampling.bias_token_ids),
            *(("emitted", choice.token_ids) for choice in submit.emitted),
        ):
            if (largest := max(token_ids, default=0)) >= vocab_size:
                raise RequestInvalid(f"{name} has token {largest}; the vocabulary has {vocab_size} tokens")


def _check_sampling(sampling: common_pb2.SamplingParams) -> None:
    # A comparison with NaN is false, so each of these refuses it.
    for name, low, high in (
        ("temperature", 0.0, 1e6),
        ("top_p", 0.0, 1.0),
        ("min_p", 0.0, 1.0),
        ("frequency_penalty", -1e6, 1e6),
        ("presence_penalty", -1e6, 1e6),
    ):
        value = getattr(sampling, name)
        if not low <= value <= high:
            raise RequestInvalid(f"{name} is {value}; it must lie in [{low:g}, {high:g}]")
    if len(sampling.bias_token_ids) != len(sampling.bias_values):
        raise RequestInvalid(
            f"logit_bias has {len(sampling.bias_token_ids)} tokens and {len(sampling.bias_values)} values"
        )
    if not all(map(math.isfinite, sampling.bias_values)):
        raise RequestInvalid("logit_bias has a value that is not finite")
    if sampling.HasField("num_logprobs") and sampling.num_logprobs > MAX_LOGPROBS:
        raise RequestInvalid(f"num_logprobs is {sampling.num_logprobs}; it must be at most {MAX_LOGPROBS}")
    if sampling.top_k >= 2**31:
        raise RequestInvalid(f"top_k is {sampling.top_k}; it must be below 2^31")

"""A request whose first tokens another replica has given goes on as if this one had given them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders import Loop, make_config, make_request
from simulated_worker import expected_output
from tpserve.coordinator.request import RequestInvalid


@given(st.data())
def test_what_follows_is_what_would_have_followed(data: st.DataObject) -> None:
    """Beside other requests that share its prefix, with pages cached or not, after any number of tokens."""
    config = make_config(num_pages=data.draw(st.integers(16, 64)), max_num_batched_tokens=data.draw(st.integers(8, 32)))
    loop = Loop(config)
    prompt = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=20))
    loop.add(make_request(9, prompt, 6))
    for _ in range(data.draw(st.integers(0, 12))):
        loop.step()
    max_tokens, n = data.draw(st.integers(1, 30)), data.draw(st.integers(1, 3))
    request = make_request(1, prompt, max_tokens, n=n, seed=5, stop=[3], frequency_penalty=0.5)
    whole = [expected_output(request, choice, config.max_model_len) for choice in range(request.n)]
    cuts = [data.draw(st.integers(0, len(tokens) - 1)) for tokens, _ in whole]
    emitted = tuple(tuple(tokens[:cut]) for (tokens, _), cut in zip(whole, cuts, strict=True))
    loop.add(replace(request, emitted=emitted))
    if data.draw(st.booleans()):
        for _ in range(data.draw(st.integers(0, 6))):
            loop.step()
        loop.lose_group()
    loop.run()
    for choice, (tokens, finish) in enumerate(whole):
        output = loop.output(1, choice)
        assert (output.tokens, output.finish) == (tokens[cuts[choice] :], finish)
        assert output.num_cached_tokens <= len(prompt)
    stats = loop.scheduler.stats()
    assert stats.num_prefix_hit_tokens <= stats.num_prefix_query_tokens


@pytest.mark.parametrize(
    ("emitted", "says"),
    [(((1,),), "for 1 choices; there are 2"), (((1, 2, 3, 4), ()), "4 tokens of a choice were emitted already")],
)
def test_more_than_there_can_be(emitted: tuple[tuple[int, ...], ...], says: str) -> None:
    with pytest.raises(RequestInvalid, match=says):
        Loop(make_config()).add(replace(make_request(1, 5, 4, n=2), emitted=emitted))

"""An EAGLE-3 head beside its target: its draft logits are a float64 reference's, whatever happened before."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from eagle_models import MarkovHead, MarkovTarget, TinyHead, deep
from eagle_pairs import MOST, NUM_PAGES, NUM_SLOTS, build_pair, check_proposals, head_of, reference_of, watched_runner
from rank_group import Artifacts, RankProcesses
from speculating import GREEDY, VOCAB, Driver, Executor, PlainDecoding, Text, assert_same, varied_texts
from tiny_models import MODELS, TinyModel
from tpserve.proto.messages import SamplingParams
from tpserve.proto.rank import RankConfig
from tpserve.proto.speculation import HEAD_PENDING_ROWS

HEAD = TinyHead(deep(MODELS["llama_4q_2kv"]))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, artifacts: Artifacts) -> RankConfig:
    return build_pair(tmp_path_factory.mktemp("eagle"), artifacts, HEAD)


@pytest.fixture
def runner(config: RankConfig) -> Iterator[Any]:
    made = watched_runner(config, lambda done, total: None)
    yield made
    made.close()


def long_run(runner: Executor, seed: int, rounds: int) -> Driver:
    """Many sequences with shared beginnings come in chunks, draft, do not, and leave."""
    rng = random.Random(seed)
    driver = Driver(runner, num_slots=NUM_SLOTS, num_pages=NUM_PAGES, caches=True, lookahead=1)
    stems = [[rng.randrange(VOCAB) for _ in range(rng.choice([20, 40, 70]))] for _ in range(3)]
    texts: list[Text] = []
    num_draft_tokens = MOST
    for _ in range(rounds):
        coming: list[Text] = []
        leaving: list[Text] = []
        if len(driver.running) < NUM_SLOTS - 1 and rng.random() < 0.4:
            stem = rng.choice([*stems, *(text.tokens for text in texts[-4:] if text.over)])
            prompt = [*stem[:100], *(rng.randrange(VOCAB) for _ in range(rng.randrange(1, 12)))]
            (text,) = varied_texts(rng.randrange(1 << 30), 1)
            changes = {"start_step": 0, "grammar": None, "max_tokens": rng.randrange(2, 60)}
            coming.append(text.again(prompt=prompt, chunk=rng.choice([7, 16, 33, 1000]), **changes))
            texts += coming
        elif driver.running and rng.random() < 0.03:
            leaving.append(rng.choice(driver.running))
        if rng.random() < 0.06:
            num_draft_tokens = rng.choice([0, 0, 0, 1, 3, MOST, MOST])
        chunks = sum(len(text.prompt) for text in coming)
        driver.step(coming if chunks < 90 else [], num_draft_tokens, leaving)
    return driver


@pytest.mark.parametrize("seed", [0, 1])
def test_draft_logits_are_the_references(runner: Any, seed: int) -> None:
    driver = long_run(runner, seed, 260)
    made, silent = runner.take_proposals()
    assert len(made) > 150
    assert silent == 0
    assert not head_of(runner)._is_lost.any()
    check_proposals(random.Random(seed).sample(made, 150), reference_of(HEAD))
    # It was not always easy: rejected tokens, and several in a round.
    assert sum(len(proposal.drafted) for proposal in made) > 400
    assert any(count > 1 for result in driver.results for count in result.counts)


@pytest.mark.parametrize("tp_size", [2, 4])
def test_ranks_share_the_work(tmp_path: Path, artifacts: Artifacts, tp_size: int) -> None:
    """With TP=4 the hidden size, 144, is no multiple of 16 times the ranks, and KV heads are padded."""
    head = HEAD if tp_size == 2 else TinyHead(replace(deep(MODELS["llama_6q_3kv_llama3_rope"]), config=_plain_rope()))
    config = build_pair(tmp_path, artifacts, head, tp_size=tp_size)
    ranks = RankProcesses(runner=watched_runner)
    try:
        with ranks.group(
            config.model_dir,
            config.artifact_dir,
            tp_size,
            num_pages=NUM_PAGES,
            max_num_seqs=NUM_SLOTS,
            speculation=config.speculation,
        ) as group:
            long_run(group, 5, 60)
            first, *others = group.call("take_proposals")
    finally:
        ranks.close()
    made, silent = first
    assert len(made) > 20
    assert silent == 0
    check_proposals(made, reference_of(head))
    for also_made, _ in others:
        assert [proposal.drafted for proposal in also_made] == [proposal.drafted for proposal in made]


def _plain_rope() -> dict[str, Any]:
    config = dict(deep(MODELS["llama_6q_3kv_llama3_rope"]).config)
    del config["rope_scaling"]
    return config


@pytest.mark.parametrize(
    "head",
    [
        replace(HEAD, changes={"norm_before_residual": True}, layer_name="layers.0", has_embedding=True),
        replace(HEAD, changes={"eagle_aux_hidden_state_layer_ids": [1, 3, 6]}, draft_vocab_size=VOCAB),
        replace(HEAD, changes={"eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 2, 5]}}),
    ],
    ids=["speculators", "own layers, whole vocabulary", "eagle_config"],
)
def test_the_forms_of_checkpoints(tmp_path: Path, artifacts: Artifacts, head: TinyHead) -> None:
    kernels: Literal["tuned", "portable"] = "portable" if "eagle_config" in head.changes else "tuned"
    config = build_pair(tmp_path, artifacts, head, kernels=kernels)
    runner: Any = watched_runner(config, lambda done, total: None)
    prompt = [5, 9, 77, 4, 130, 9] * 6
    Driver(runner, num_slots=NUM_SLOTS).run([Text(prompt, max_tokens=40, chunk=30)], MOST)
    runner.close()
    layers = (2, 4, 5) if "norm_before_residual" in head.changes else (1, 3, 6)
    check_proposals(runner.take_proposals()[0], reference_of(head, layers))


def test_text_and_logprobs_are_those_of_plain_decoding(config: RankConfig, runner: Any) -> None:
    texts = varied_texts(20, 20)
    rng = random.Random(3)
    driver = Driver(runner, num_slots=NUM_SLOTS, caches=True, lookahead=1)
    driver.run(texts, lambda step: MOST if step < 20 else rng.randrange(MOST + 1))
    again = [text.again(start_step=0) for text in texts]  # finds pages in the prefix cache
    driver.run(again, 3)
    plain: Any = _plain(config)
    expected = PlainDecoding(Driver(plain, num_slots=NUM_SLOTS, speculates=False)).of(texts)
    plain.close()
    assert sum(map(sum, (text.drafted for text in texts))) > 100
    assert_same(texts, expected)
    assert_same(again, expected)


def _plain(config: RankConfig) -> Any:
    from tpserve.worker.runner import Runner

    return Runner(replace(config, speculation=None), lambda done, total: None)


def _markov() -> MarkovHead:
    base = MODELS["llama_4q_2kv"]
    config = deep(base).config | {"num_key_value_heads": 4}
    return MarkovHead(MarkovTarget("markov", config), draft_vocab_size=190)


@pytest.mark.parametrize("sampling", [GREEDY, SamplingParams(temperature=0.7)], ids=["greedy", "sampled"])
def test_a_head_that_agrees_is_accepted(tmp_path: Path, artifacts: Artifacts, sampling: SamplingParams) -> None:
    config = build_pair(tmp_path, artifacts, _markov())
    prompts = [[seed, 3 * seed + 1, 50 + seed] for seed in range(NUM_SLOTS)]
    texts = [Text(prompt, replace(sampling, seed=seed), max_tokens=80) for seed, prompt in enumerate(prompts)]
    runner: Any = watched_runner(config, lambda done, total: None)
    Driver(runner, num_slots=NUM_SLOTS).run(texts, MOST)
    runner.close()
    plain: Any = _plain(config)
    assert_same(texts, PlainDecoding(Driver(plain, num_slots=NUM_SLOTS, speculates=False)).of(texts))
    plain.close()
    drafted = accepted = 0
    for text in texts:
        for count, num_drafted in zip(text.counts, text.drafted, strict=True):
            drafted += min(num_drafted, count)  # those behind a rejected one were not looked at
            accepted += max(0, count - 1)
    assert drafted > 100
    assert accepted > 0.85 * drafted  # a twentieth of the tokens is none of the head's


def test_a_plain_step_costs_no_pass_of_the_head(runner: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    head = head_of(runner)
    sizes: list[int] = []
    project = head._head.project

    def counted(rows: Any) -> Any:
        sizes.append(len(rows))
        return project(rows)

    monkeypatch.setattr(head._head, "project", counted)
    num_plain = 5 * HEAD_PENDING_ROWS
    text = Text([1, 2, 3], max_tokens=num_plain + 8)
    Driver(runner, num_slots=NUM_SLOTS).run([text], lambda step: 0 if step < num_plain else MOST)
    # Three rows of the prompt and one a step: each pass leaves one aside. Then the rest, and the rounds' own.
    plain = [size for size in sizes if size == HEAD_PENDING_ROWS]
    assert len(plain) == 5
    assert sizes[:5] == plain
    assert sum(sizes[:6]) == len(text.prompt) + num_plain - 1


def test_a_slot_without_rows_proposes_nothing(
    tmp_path: Path, artifacts: Artifacts, runner: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pages without the head's KV, and more tokens than it has positions."""
    head = head_of(runner)
    driver = Driver(runner, num_slots=NUM_SLOTS, caches=True, lookahead=1)
    stem = list(range(40))
    driver.run([Text(stem, max_tokens=2)])
    head._valid[:] = False
    lost = Text([*stem, 7], max_tokens=12)
    driver.run([lost], MOST)
    assert (sum(lost.drafted), runner.take_proposals()) == (0, ([], 10))
    found = Text([*stem[:10], *stem], max_tokens=12)  # the slot's next sequence has all its rows
    driver.run([found], MOST)
    assert sum(found.drafted) > 0
    runner.take_proposals()

    short: Any = watched_runner(build_pair(tmp_path, artifacts, HEAD, head_len=64), lambda done, total: None)
    text, beyond = Text([1, 2, 3, 4, 5], max_tokens=70), Text(list(range(100)), max_tokens=6)
    Driver(short, num_slots=NUM_SLOTS).run([text, beyond], MOST)
    made, silent = short.take_proposals()
    short.close()
    # The pair of position 63 is the last: it follows 65 tokens, and drafts one more.
    assert max(len(proposal.tokens) + len(proposal.drafted) for proposal in made) == 66
    assert silent > 4
    check_proposals(made, reference_of(HEAD))


def test_token_ids_are_the_targets() -> None:
    from tpserve.worker.errors import WeightsError
    from tpserve.worker.head_facts import target_token_ids

    assert target_token_ids(np.array([0, 3, 3]), 3, 6).tolist() == [0, 4, 5]
    for offsets, words in (
        ([0, 3, 4], "d2t makes token 6 of the head's token 2, the model has 6"),
        ([-1, 0, 0], "d2t makes token -1 of the head's token 0"),
        ([1, 0, 0], "d2t makes the same token of two"),
        ([0, 0], r"d2t is \(2,\) int64, expected \(3,\) of integers"),
    ):
        with pytest.raises(WeightsError, match=words):
            target_token_ids(np.array(offsets), 3, 6)


def test_a_target_and_a_head_that_do_not_fit_are_refused(
    tmp_path: Path, artifacts: Artifacts, config: RankConfig
) -> None:
    from tpserve.worker.errors import WorkerError
    from tpserve.worker.runner import Runner

    wanted = config.speculation
    assert wanted is not None
    plain = artifacts.build(
        config.model_dir, 1, max_num_batched_tokens=128, max_num_seqs=NUM_SLOTS, max_num_draft_tokens=MOST
    )
    other = build_pair(tmp_path, artifacts, replace(HEAD, changes={"eagle_aux_hidden_state_layer_ids": [1, 3, 6]}))
    wrong: list[tuple[RankConfig, str]] = [
        (replace(config, artifact_dir=plain), "gives no hidden rows, .* compile the model again"),
        (replace(config, speculation=other.speculation), r"compiled for layers of \(1, 3, 6\), .* has \(2, 4, 5\)"),
        (replace(config, speculation=replace(wanted, draft_model_dir=None)), "needs a head and its library"),
    ]
    model: TinyModel = HEAD.target
    alone = replace(wanted, draft_model_dir=config.model_dir, draft_artifact_dir=config.artifact_dir)
    assert model.config["num_hidden_layers"] == 8
    wrong.append((replace(config, speculation=alone), "is that of a model, not of an EAGLE-3 head"))
    rounded = build_pair(tmp_path / "bfloat16", artifacts, HEAD, head_quantization="q0bf16")
    wrong.append((rounded, r"embed_tokens.weight as \(200, 64\) bfloat16, which the model does not have"))
    for changed, words in wrong:
        with pytest.raises(WorkerError, match=words):
            Runner(changed, lambda done, total: None)

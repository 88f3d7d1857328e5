"""What the flags about speculation mean together, and that a draft must have the model's tokens."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import pytest

from tiny_models import MODELS
from tpserve.coordinator.engine_choice import choose_engine
from tpserve.coordinator.errors import ClusterError
from tpserve.coordinator.memory import plan_memory
from tpserve.coordinator.model_build import ModelBuild
from tpserve.coordinator.serve_arguments import add_arguments
from tpserve.coordinator.speculation import (
    add_speculation_arguments,
    check_draft,
    check_draft_tokens,
    choose_speculation,
    draft_step_tokens,
)
from tpserve.proto.manifest import HeadFacts, Manifest
from tpserve.proto.speculation import Speculation
from worker_builders import make_manifest


def parse(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tp", type=int, default=1)
    add_speculation_arguments(parser)
    return parser.parse_args(flags)


def test_without_flags_nothing_is_drafted() -> None:
    assert choose_speculation(parse()) is None


@pytest.mark.parametrize(
    ("flags", "method", "most", "rule"),
    [
        ("--draft-model d", "draft", 5, "auto"),
        ("--draft-model d --num-speculative-tokens 3", "draft", 3, "fixed"),
        ("--spec-method ngram --num-speculative-tokens mlc", "ngram", 4, "mlc"),
        ("--spec-method suffix --num-speculative-tokens auto", "suffix", 5, "auto"),
        ("--tp 4 --draft-model d --draft-tp 2 --spec-method draft", "draft", 5, "auto"),
        ("--draft-model d --draft-tp 2 --draft-placement dedicated", "draft", 5, "auto"),
    ],
)
def test_flags_choose_a_proposer_and_a_length(flags: str, method: str, most: int, rule: str) -> None:
    choice = choose_speculation(parse(*flags.split()))
    assert choice is not None
    assert (choice.method, choice.max_num_draft_tokens, choice.draft_length) == (method, most, rule)
    folders = {"model_dir": "/m", "artifact_dir": "/a"} if choice.draft_model else None
    config = json.loads(json.dumps(choice.config(folders, "dummy")))
    assert config["draft_length"] == rule
    speculation = Speculation.from_json(config["speculation"])
    assert (speculation.method, speculation.max_num_draft_tokens) == (method, most)
    if folders is not None:
        assert (speculation.draft_model_dir, speculation.draft_artifact_dir) == (Path("/m"), Path("/a"))
        assert (speculation.draft_tp_size, speculation.draft_load_format) == (choice.draft_tp, "dummy")
        own = 2 if "dedicated" in flags else 0
        assert (speculation.num_draft_ranks, choice.num_draft_ranks) == (own, own)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--num-speculative-tokens 3", "--num-speculative-tokens 3 without a proposer: give --draft-model"),
        ("--draft-tp 2", "--draft-tp 2 without a proposer"),
        ("--spec-method draft", "give --draft-model"),
        ("--spec-method ngram --draft-model d", "leave --draft-model and --draft-tp away"),
        ("--tp 4 --draft-model d --draft-tp 3", "--draft-tp 3 does not divide --tp 4"),
        ("--draft-model d --draft-tp 2", "--draft-tp 2 does not divide --tp 1"),
        ("--spec-method ngram --draft-placement dedicated", "has no model to place"),
        ("--draft-placement dedicated", "--draft-placement dedicated without a proposer"),
        ("--draft-model d --draft-tp 3 --draft-placement dedicated", "--draft-tp 3 is not one of 1, 2, 4, 8"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(flags: str, words: str) -> None:
    with pytest.raises(ClusterError, match=words):
        choose_speculation(parse(*flags.split()))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            "--tp 4 --draft-model d --draft-tp 2",
            "--draft-tp 2 beside --tp 4: .* give --draft-tp 1 or 4, or --draft-placement dedicated",
        ),
    ],
)
def test_what_is_not_built_on_gpus_is_refused_there(flags: str, words: str) -> None:
    args = parse(*flags.split())
    choice = choose_speculation(args)
    assert choice is not None
    with pytest.raises(ClusterError, match=words):
        choice.require_gpus(args.tp)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            "--tp 4 --draft-model d --draft-tp 2",
            "d is an EAGLE-3 head.*: leave --draft-tp 2 away, or give .*, 4",
        ),
        ("--tp 2 --draft-model d --draft-tp 1", "leave --draft-tp 1 away, or give that of the model, 2"),
        ("--draft-model d --draft-placement dedicated", "leave --draft-placement dedicated away"),
    ],
)
def test_a_head_is_on_the_models_ranks(flags: str, words: str) -> None:
    args = parse(*flags.split())
    choice = choose_speculation(args)
    assert choice is not None
    with pytest.raises(ClusterError, match=words):
        choice.of_head(args.tp, args.draft_tp)


@pytest.mark.parametrize("flags", ["--tp 4 --draft-model d", "--tp 4 --draft-model d --draft-tp 4"])
def test_a_head_is_split_as_the_model(flags: str) -> None:
    args = parse(*flags.split())
    choice = choose_speculation(args)
    assert choice is not None
    head = choice.of_head(args.tp, args.draft_tp)
    assert (head.method, head.draft_tp, head.num_draft_ranks) == ("eagle3", 4, 0)
    speculation = Speculation.from_json(head.config({"model_dir": "/m", "artifact_dir": "/a"}, "auto")["speculation"])
    assert (speculation.method, speculation.draft_tp_size) == ("eagle3", 4)
    head.require_gpus(4)


@pytest.mark.parametrize(
    "flags",
    [
        "--draft-model d",
        "--tp 4 --draft-model d",
        "--tp 4 --draft-model d --draft-tp 4",
        "--tp 2 --spec-method ngram",
        "--tp 4 --draft-model d --draft-tp 2 --draft-placement dedicated",
        "--tp 1 --draft-model d --draft-tp 2 --draft-placement dedicated",
        "--tp 2 --spec-method suffix",
    ],
)
def test_on_gpus_a_draft_is_whole_or_split_as_the_model_or_has_its_own(flags: str) -> None:
    args = parse(*flags.split())
    choice = choose_speculation(args)
    assert choice is not None
    choice.require_gpus(args.tp)


@pytest.mark.parametrize(
    ("flags", "on_cpu", "on_gpu"),
    [
        ("--tp 4 --draft-model d", 1, 4),
        ("--tp 4 --draft-model d --draft-tp 1", 1, 1),
        ("--tp 4 --draft-model d --draft-placement dedicated", 1, 1),
    ],
)
def test_a_draft_is_split_as_the_model_where_that_is_faster(flags: str, on_cpu: int, on_gpu: int) -> None:
    args = parse(*flags.split())
    found = [choose_speculation(args, on_gpu=device) for device in (False, True)]
    assert [None if choice is None else choice.draft_tp for choice in found] == [on_cpu, on_gpu]


def test_a_draft_is_compiled_for_the_windows_of_a_gpus_rounds() -> None:
    assert draft_step_tokens(512, 64, on_gpu=True) == 512
    assert draft_step_tokens(512, 256, on_gpu=True) == 1024
    assert draft_step_tokens(512, 256, on_gpu=False) == 512


@pytest.mark.parametrize("value", ["0", "9", "some", "-1"])
def test_a_length_out_of_range_is_refused(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(f"--num-speculative-tokens={value}")
    assert f"'{value}' is neither 1 to 8 nor auto nor mlc" in capsys.readouterr().err


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    folder: Path = tmp_path_factory.mktemp("model")
    MODELS["llama_4q_2kv"].write(folder)
    return make_manifest(folder, 1)


def write_tokenizer(folder: Path, vocabulary: object, added: list[dict[str, object]]) -> Path:
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}, "added_tokens": added}))
    return folder


def test_a_draft_with_other_tokens_is_refused(manifest: Manifest, tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match="the draft has 100 tokens, the model 200"):
        check_draft(manifest, replace(manifest, vocab_size=100))
    check_draft(manifest, manifest)
    check_draft_tokens(tmp_path, tmp_path)  # neither has a tokenizer
    added: list[dict[str, object]] = [{"content": "<s>", "id": 2}]
    ours = write_tokenizer(tmp_path / "ours", {"a": 0, "b": 1}, added)
    same = write_tokenizer(tmp_path / "same", [["a", -1.0], ["b", -2.0]], added)
    other = write_tokenizer(tmp_path / "other", {"a": 1, "b": 0}, added)
    more = write_tokenizer(tmp_path / "more", {"a": 0, "b": 1}, [{"content": "<end>", "id": 2}])
    check_draft_tokens(ours, same)
    for wrong in (other, more):
        with pytest.raises(ClusterError, match="gives other ids"):
            check_draft_tokens(ours, wrong)


@pytest.mark.parametrize("content", ["{", "[]", '{"model": 1}', '{"model": {"vocab": 1}}', '{"added_tokens": [1]}'])
def test_a_drafts_tokenizer_that_cannot_be_read_is_named(tmp_path: Path, content: str) -> None:
    ours = write_tokenizer(tmp_path / "ours", {"a": 0}, [])
    (tmp_path / "draft").mkdir()
    (tmp_path / "draft/tokenizer.json").write_text(content)
    with pytest.raises(ClusterError, match=r"draft/tokenizer\.json cannot be read .*: fetch it again"):
        check_draft_tokens(ours, tmp_path / "draft")


def test_a_drafts_tokens_are_compared_before_anything_is_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = write_tokenizer(tmp_path / "ours", {"a": 0, "b": 1}, [])
    other = write_tokenizer(tmp_path / "other", {"a": 1, "b": 0}, [])
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    args = parser.parse_args([str(ours), "--device", "cpu", "--draft-model", str(other)])

    def run(command: str, model: str, flags: list[str]) -> dict[str, str]:
        assert command == "inspect" or "--dry-run" in flags, "it was compiled"
        return {"model_dir": model, "method": "draft"}

    build = ModelBuild(args, [], lambda: False)
    monkeypatch.setattr(build, "_run", run)
    with pytest.raises(ClusterError, match="gives other ids"):
        build.look(choose_engine(args))


def test_a_head_reads_what_the_models_library_gives(manifest: Manifest) -> None:
    head = replace(manifest, vocab_size=150, aux_layers=(2, 4, 5), head=HeadFacts(200, 64, has_token_map=True))
    check_draft(replace(manifest, aux_layers=(2, 4, 5)), head)
    for layers, words in (((), "none"), ((1, 4, 6), "1, 4, 6")):
        with pytest.raises(ClusterError, match=f"layers 2, 4, 5 of the model, whose library gives those of {words}"):
            check_draft(replace(manifest, aux_layers=layers), head)


def test_what_a_draft_shares_is_counted_once(manifest: Manifest) -> None:
    shared = tuple(replace(param, layout="shared") if param.layout == "plain" else param for param in manifest.params)
    alone = plan_memory(manifest, "server", 64, 0.5, 40_000_000)
    both = plan_memory(manifest, "server", 64, 0.5, 40_000_000, draft=replace(manifest, params=shared))
    embedding = 4 * manifest.vocab_size * manifest.hidden_size
    assert alone.parameter_bytes < both.parameter_bytes <= 2 * alone.parameter_bytes - embedding


def test_a_draft_has_its_share_of_memory(manifest: Manifest) -> None:
    alone = plan_memory(manifest, "server", 64, 0.5, 40_000_000)
    both = plan_memory(manifest, "server", 64, 0.5, 40_000_000, draft=manifest)
    assert both.parameter_bytes == 2 * alone.parameter_bytes
    assert both.kv_bytes == both.num_pages * 2 * manifest.kv.page_bytes
    assert both.num_pages <= alone.num_pages
    assert both.total_bytes <= 20_000_000
    apart = plan_memory(manifest, "server", 64, 0.5, 40_000_000, draft=manifest, draft_share=2.0)
    assert apart.parameter_bytes == 3 * alone.parameter_bytes, "two ranks of the draft for each of the model"
    assert apart.kv_bytes == apart.num_pages * 3 * manifest.kv.page_bytes
    assert apart.total_bytes <= 20_000_000
    with pytest.raises(ClusterError, match="lower --max-model-len"):
        plan_memory(manifest, "server", 64, 0.5, int(2.5 * alone.parameter_bytes), draft=manifest)

"""A head's rounds on a GPU, run on the host: the CPU's graphs, the kernels' rows compiled for it, and arrays of numpy.

What no host has is left out: captured graphs, bfloat16 and several ranks, for which there is tests/gpu/test_eagle.py.
So the draft logits must be those of the float64 reference, as near as on a CPU.
"""

from __future__ import annotations

import ctypes
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eagle_models import TinyHead, deep
from eagle_pairs import MOST, NUM_PAGES, NUM_SLOTS, Proposal, build_pair, check_proposals, reference_of
from host_cupy import as_cupy
from rank_group import Artifacts
from speculating import VOCAB, Driver, Text
from tiny_models import MODELS
from tpserve.proto.messages import StepPlan, StepResult
from tpserve.proto.rank import RankConfig
from unit.compile.test_cuda_head import build
from unit.compile.test_cuda_speculation import SlotState

HEAD = TinyHead(deep(MODELS["llama_4q_2kv"]))
NUM_TOKENS = 128


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return build(tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, artifacts: Artifacts) -> RankConfig:
    return build_pair(tmp_path_factory.mktemp("eagle"), artifacts, HEAD, head_tokens=NUM_TOKENS)


@pytest.fixture
def make_rank(rows: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[RankConfig], HostRank]]:
    made: list[HostRank] = []

    def make(config: RankConfig) -> HostRank:
        made.append(HostRank(config, rows, monkeypatch))
        return made[-1]

    with as_cupy(monkeypatch):
        yield make
        for rank in made:
            rank.close()


class Kernels:
    """The CPU's kernels, and those of a speculating replica on a GPU, of the same signatures."""

    def __init__(self, real: Any, rows: ctypes.CDLL) -> None:
        self._real = real
        self._rows = rows
        self._own: dict[str, Callable[..., Any]] = {
            "attention_plan_size": lambda *_: 1,
            "attention_workspace_size": lambda *_: 1,
            "attention_plan": lambda *_: None,
            "attention_plans": lambda *_: None,
            "take_rows": self._take_rows,
            "spread_logits": self._spread_logits,
            "head_pairs": self._head_pairs,
            "head_keep": self._head_keep,
            "head_begin": self._head_begin,
            "draft_later": self._draft_later,
            "draft_store": self._draft_store,
            "note_time": lambda times, which: np.put(np.from_dlpack(times), which, time.monotonic_ns()),
            "speculation_load": self._load,
            "speculation_accept": self._accept,
        }

    def __getitem__(self, name: str) -> Any:
        return self._own.get(name) or self._real[name]

    def _call(self, name: str, state: tuple[Any, ...], *arguments: Any) -> None:
        arrays = [np.from_dlpack(tensor) for tensor in state]
        fields = [array.ctypes.data for array in arrays]
        sizes = (arrays[0].shape[1], arrays[3].shape[1]) if state else (0, 0)
        given = [
            ctypes.c_int(argument)
            if isinstance(argument, int)
            else ctypes.c_void_p(np.from_dlpack(argument).ctypes.data)
            for argument in arguments
        ]
        getattr(self._rows, name)(ctypes.byref(SlotState(*fields, *sizes)), *given)

    @staticmethod
    def _take_rows(x: Any, index: Any, out: Any) -> None:
        places = np.from_dlpack(index)
        taken = np.from_dlpack(x)[np.maximum(places, 0)]
        np.from_dlpack(out)[...] = np.where((places >= 0)[:, None], taken, 0)

    @staticmethod
    def _spread_logits(logits: Any, token_ids: Any, out: Any) -> None:
        ids = np.from_dlpack(token_ids)
        np.from_dlpack(out)[:, ids] = np.from_dlpack(logits)[:, : len(ids)]

    def _head_pairs(
        self, positions: Any, slots: Any, kept_at: Any, max_len: int, rows: Any, kept: Any, *out: Any
    ) -> None:
        pair_positions, pair_slots, pair_rows = out
        sources = np.zeros(positions.shape[0], np.int32)
        where = (positions, slots, kept_at, max_len, pair_positions, pair_slots, sources)
        assert len(positions.shape) == 1
        given = [
            ctypes.c_int(item) if isinstance(item, int) else ctypes.c_void_p(np.from_dlpack(item).ctypes.data)
            for item in where
        ]
        self._rows.pairs(None, ctypes.c_int(len(sources)), *given)
        of_slots = np.from_dlpack(pair_slots)
        of_step = np.from_dlpack(rows)[np.maximum(sources, 0)]
        held = np.from_dlpack(kept)[np.maximum(of_slots, 0)]
        np.from_dlpack(pair_rows)[...] = np.where((sources >= 0)[:, None], of_step, held)

    def _head_keep(self, positions: Any, slots: Any, num_tokens: Any, rows: Any, kept: Any, kept_at: Any) -> None:
        count = positions.shape[0]
        flags = np.zeros(count, np.int32)
        state = SlotState(0, np.from_dlpack(num_tokens).ctypes.data, 0, 0, 0, 0)
        places, owners = np.from_dlpack(positions), np.from_dlpack(slots)
        pointers = [ctypes.c_void_p(array.ctypes.data) for array in (places, owners, flags)]
        self._rows.keep(ctypes.byref(state), ctypes.c_int(count), *pointers)
        for t in np.flatnonzero(flags):
            np.from_dlpack(kept)[owners[t]] = np.from_dlpack(rows)[t]
            np.from_dlpack(kept_at)[owners[t]] = places[t]

    def _head_begin(self, *arguments: Any) -> None:
        state, (kept_at, at, stride, max_len, *out) = arguments[:4], arguments[4:]
        self._call("first", state, at.shape[0] // stride, max_len, kept_at, at, stride, *out)

    def _draft_later(self, *arguments: Any) -> None:
        state, (first_slots, behind, max_len, *out) = arguments[:4], arguments[4:]
        self._call("later", state, first_slots.shape[0], *out[0].shape, behind, max_len, first_slots, *out)

    def _draft_store(self, *arguments: Any) -> None:
        state, (at, stride, index, *tokens) = arguments[:4], arguments[4:]
        self._call("store", state, at.shape[0] // stride, index, at, stride, *tokens)

    def _load(self, *arguments: Any) -> None:
        state, (num_drafts, ids, positions, slots, rows, *sampling) = arguments[:4], arguments[4:]
        self._call("load", state, ids.shape[0], num_drafts, ids, positions, slots, rows.shape[0], rows, *sampling)

    def _accept(self, *arguments: Any) -> None:
        state, (num_decodes, num_drafts, sampled, *rest) = arguments[:4], arguments[4:]
        self._call("accept", state, rest[2].shape[0], num_decodes, num_drafts, sampled, *rest)


class Sampler:
    """Samples the best of each row, of the target's often the draft token; keeps what it saw of drafts."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, Any, Any, Any]] = []
        self._rng = np.random.default_rng(1)

    def sample(self, logits: Any, num_drafts: int) -> Any:
        """(R, V) -> (R,) int32."""
        ids = logits.argmax(1).astype(np.int32)
        for index, (*_, drafted) in enumerate(self.seen):
            accepted = (self._rng.random(len(drafted)) < 0.6) & (drafted >= 0)
            ids[index :: 1 + num_drafts][accepted] = drafted[accepted]
        return aligned_copy(ids)

    def queue_draft(self, logits: Any, slots: Any, positions: Any, *, by_rank: bool) -> Any:
        from tpserve.worker.arrays import as_tensor

        values, owners = np.from_dlpack(logits).copy(), np.from_dlpack(slots).copy()
        ids = np.where(owners >= 0, values.argmax(1), -7).astype(np.int32)
        self.seen.append((values, owners, np.from_dlpack(positions).copy(), ids))
        return as_tensor(ids)


class HostRank:
    """Executes plans as `DeviceRunner` does: the same calls of the same speculation and head."""

    def __init__(self, config: RankConfig, rows: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
        from tpserve.worker import device_head as module
        from tpserve.worker.arrays import aligned_zeros, as_tensor
        from tpserve.worker.batch import Batch
        from tpserve.worker.device_draft import draft_rank_config
        from tpserve.worker.device_speculation import DeviceSpeculation
        from tpserve.worker.kv_cache import KVCache
        from tpserve.worker.library import check_manifest, load_kernels
        from tpserve.worker.model import Model, ModelRank
        from tpserve.worker.weights import load_parameters, shared_parameter

        speculation = config.speculation
        assert speculation is not None
        manifest = check_manifest(config.artifact_dir, config.model_dir, 1, config.max_num_seqs)
        where = (manifest, config.artifact_dir, config.model_dir)
        model = ModelRank(*where, 0, 1, "unused", "auto", config.num_pages, num_threads=1, collective_timeout_s=10.0)
        self._model = Model(model, lambda done, total: None)

        def parameters(head: Any, head_config: Any, *_: Any) -> list[Any]:
            arrays = load_parameters(head, head_config.model_dir, 0)
            own = (manifest, self._model._params)
            return [
                shared_parameter(spec, own) if spec.layout == "shared" else as_tensor(next(arrays))
                for spec in head.params
            ]

        monkeypatch.setattr(module, "load_device_parameters", parameters)
        monkeypatch.setattr(module, "device_pages", lambda kv, num_pages: KVCache(kv, num_pages).layers)
        monkeypatch.setattr(module, "attention_workspace", lambda _: as_tensor(aligned_zeros((1,), np.float32)))
        monkeypatch.setattr(module, "_rows", lambda *shape: as_tensor(aligned_zeros(shape, np.float32)))
        self._kernels: Any = Kernels(load_kernels(config.artifact_dir), rows)
        head_config = draft_rank_config(config, speculation)
        head_manifest = check_manifest(head_config.artifact_dir, head_config.model_dir, 1, config.max_num_seqs)
        self.head = module.DeviceHead(
            head_config,
            head_manifest,
            self._kernels,
            None,
            None,
            lambda done, total: None,
            target=manifest,
            target_params=self._model._params,
        )
        self.head._step = without_padding(self.head._step, (0, 1, 2, 4, 7), 4)
        self.head._append = without_padding(self.head._append, (0, 1, 2, 4), None)
        sizes = (config.max_num_seqs, manifest.max_model_len + 1, 1)
        self.speculation = DeviceSpeculation(speculation, self.head, self._kernels, *sizes)
        pages = -(-manifest.max_model_len // 16)
        self._batch = Batch(config.max_num_seqs, NUM_TOKENS, pages, 16, tokens_on_device=True)
        self.sampler: Any = Sampler()
        self.made: list[Proposal] = []
        self.num_silent = 0

    def close(self) -> None:
        self._model.close()

    def execute(self, plan: StepPlan) -> StepResult:
        from tpserve.worker.arrays import as_tensor
        from tpserve.worker.device_speculation import Round
        from tpserve.worker.verify_layout import lay_out_verify, read_groups

        drafts = 0 if plan.chunks else plan.num_draft_tokens
        added = tuple(replace(each, max_len=0, prefix_token_ids=()) for each in plan.added_slots)
        self._batch.apply(replace(plan, added_slots=added))
        running = self._batch.running()
        arrays = lay_out_verify(running, drafts) if drafts else self._batch.prepare(plan)
        slots = arrays.sample_slots[:: 1 + drafts].copy()
        self.speculation.add(plan.added_slots, None)
        if not len(arrays.token_ids):
            return StepResult(plan.step_id, 0)
        inputs = (
            arrays.token_ids,
            arrays.positions,
            arrays.token_slots,
            arrays.sample_rows,
            arrays.sample_slots,
            arrays.sample_positions,
        )
        own = [aligned_copy(array) for array in inputs]
        tensors = [as_tensor(array) for array in own]
        table = as_tensor(self._batch.page_table)
        if drafts:
            run = Round(tensors[2], len(running), drafts, table)
            self.speculation.catch_up(run)
            self.speculation.draft(run, self.sampler)
        self.speculation.load(drafts, tensors)
        logits, aux = self._run_target(own)
        rows = self.head.extend(tensors, as_tensor(aux), table)
        sampled = as_tensor(self.sampler.sample(logits, drafts))
        self._take_proposals(running)
        self.speculation.accept(len(running) if drafts else 0, drafts, sampled, *tensors[4:])
        self.head.keep(self.speculation.num_tokens, tensors, rows)
        if not drafts:
            self.speculation.note_step(slots, has_prompts=bool(plan.chunks))
            self._batch.commit(arrays, None)
        counts = np.from_dlpack(self.speculation._group_tensors[0])[: len(slots)].copy()
        drafted = np.from_dlpack(self.speculation._group_tensors[1])[: len(slots)].copy()
        emitted = read_groups(slots, drafts, counts, drafted)
        ids = np.from_dlpack(sampled)[emitted.rows].tolist()
        return StepResult(plan.step_id, 0, token_ids=tuple(ids), **emitted.fields)

    def _run_target(self, inputs: list[Any]) -> tuple[Any, Any]:
        """Run what is no padding; return logits of all sampled rows, and hidden rows of all tokens."""
        ids, positions, slots, rows, sample_slots, _ = inputs
        real, wanted = np.flatnonzero(slots >= 0), np.flatnonzero(sample_slots >= 0)
        place = np.zeros(len(ids), np.int32)
        place[real] = np.arange(len(real))
        ids, positions, slots = (aligned_copy(array[real]) for array in (ids, positions, slots))
        wanted_places = aligned_copy(place[rows[wanted]])
        found, _, aux = self._model.step(ids, positions, slots, self._batch.page_table, wanted_places)
        logits = np.zeros((len(rows), found.shape[1]), np.float32)
        logits[wanted] = np.from_dlpack(found)
        logits = logits[:, :VOCAB]
        all_rows = aligned_copy(np.zeros((len(place), aux.shape[1]), np.float32))
        all_rows[real] = np.from_dlpack(aux)
        return logits, all_rows

    def _take_proposals(self, running: Any) -> None:
        seen, self.sampler.seen = self.sampler.seen, []
        if not seen:
            return
        tokens, max_len = self.speculation._tokens, self.speculation._max_len
        num_tokens = self.speculation._num_tokens
        for row, slot in enumerate(running.tolist()):
            drafted = [(values[row, :VOCAB], int(ids[row])) for values, slots, _, ids in seen if slots[row] == slot]
            if not drafted:
                self.num_silent += bool(0 < num_tokens[slot] < max_len[slot])
                continue
            count = int(seen[0][2][row])
            assert count == num_tokens[slot]
            logits, ids = zip(*drafted, strict=True)
            self.made.append(Proposal(tuple(tokens[slot, :count].tolist()), ids, logits))


def aligned_copy(array: Any) -> Any:
    from tpserve.worker.arrays import aligned_empty

    out = aligned_empty(array.shape, array.dtype)
    out[...] = array
    return out


def without_padding(function: Callable[..., Any], by_token: tuple[int, ...], by_row: int | None) -> Callable[..., Any]:
    """Call a graph's function with tokens of slots alone, which a CPU's graph wants; the third argument has the slots.

    Of its results, the row of each token goes where that stands.
    """
    from tpserve.worker.arrays import as_tensor

    def call(*arguments: Any) -> Any:
        slots = np.from_dlpack(arguments[2])
        real = np.flatnonzero(slots >= 0)
        given = list(arguments)
        for index in by_token:
            given[index] = as_tensor(aligned_copy(np.from_dlpack(arguments[index])[real]))
        if by_row is None:
            return function(*given) if len(real) else None
        assert (np.from_dlpack(arguments[by_row]) == np.arange(len(slots))).all(), "each row is sampled"
        given[by_row] = as_tensor(aligned_copy(np.arange(len(real), dtype=np.int32)))
        outputs = []
        for index, found in enumerate(function(*given)):
            out = aligned_copy(np.full((len(slots), found.shape[1]), np.nan, np.float32))
            out[real] = np.from_dlpack(found)
            outputs.append(as_tensor(out))
            assert index < 2
        return outputs

    return call


@pytest.mark.parametrize("seed", [0, 1])
def test_draft_logits_are_the_references(
    config: RankConfig, make_rank: Callable[[RankConfig], HostRank], seed: int
) -> None:
    """After chunks, prefixes from the cache, plain steps, rejections, and other sequences in the slot's place."""
    rank = make_rank(config)
    rng = random.Random(seed)
    driver = Driver(rank, num_slots=NUM_SLOTS, num_pages=NUM_PAGES, caches=True, lookahead=1)
    stems = [[rng.randrange(VOCAB) for _ in range(rng.choice([20, 40, 70]))] for _ in range(3)]
    texts: list[Text] = []
    num_draft_tokens = MOST
    for _ in range(90):
        coming: list[Text] = []
        leaving: list[Text] = []
        prompts = any(text.num_computed < len(text.prompt) for text in driver.running)
        if not prompts and len(driver.running) < NUM_SLOTS - 1 and rng.random() < 0.4:
            stem = rng.choice([*stems, *(text.tokens for text in texts[-4:] if text.over)])
            prompt = [*stem[:100], *(rng.randrange(VOCAB) for _ in range(rng.randrange(1, 12)))]
            chunk = rng.choice([7, 16, 33, 1000])
            coming.append(Text(prompt, max_tokens=rng.randrange(2, 60), speculates=rng.random() < 0.8, chunk=chunk))
            texts += coming
        elif driver.running and rng.random() < 0.03:
            leaving.append(rng.choice(driver.running))
        if rng.random() < 0.06:
            num_draft_tokens = rng.choice([0, 0, 1, 3, MOST, MOST])
        driver.step(coming, num_draft_tokens, leaving)
    assert len(rank.made) > 60
    assert rank.num_silent == 0
    check_proposals(random.Random(seed).sample(rank.made, 30), reference_of(HEAD))
    assert sum(len(proposal.drafted) for proposal in rank.made) > 100
    verified = [
        (count, drafted)
        for result in driver.results
        for count, drafted in zip(result.counts, result.drafted, strict=True)
    ]
    assert any(1 < count for count, _ in verified)
    assert any(count <= drafted for count, drafted in verified)


def test_a_head_of_fewer_positions_ends_early(
    tmp_path: Path, artifacts: Artifacts, make_rank: Callable[[RankConfig], HostRank]
) -> None:
    """Its table of angles has no row behind them, nor may it be asked for one."""
    rank = make_rank(build_pair(tmp_path, artifacts, HEAD, head_tokens=NUM_TOKENS, head_len=40))
    driver = Driver(rank, num_slots=NUM_SLOTS, num_pages=NUM_PAGES)
    text = Text([1, 2, 3], max_tokens=70)
    driver.run([text], MOST)
    lengths = [len(proposal.tokens) + len(proposal.drafted) for proposal in rank.made]
    assert 38 <= max(lengths) <= 41
    assert rank.num_silent > 0
    assert len(text.output) == 70
    check_proposals(rank.made[-3:], reference_of(HEAD))

"""Targets with drafts whose acceptance a knob sets, compiled once for all places of it; see `tiny_models.knob_pair`."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rank_group import Artifacts
from speculating import VOCAB
from text_models import write_byte_tokenizer
from tiny_models import TinyModel, knob_pair
from tpserve.collectives.rendezvous import listen
from tpserve.proto.messages import StepPlan, StepResult
from tpserve.proto.rank import RankConfig
from tpserve.proto.speculation import DraftPlacement, Speculation

if TYPE_CHECKING:
    from tpserve.worker.draft_runner import DraftRunner
    from tpserve.worker.runner import Runner

NUM_SLOTS = 6
NUM_PAGES = 64
MOST = 4
DRAFT_TOKENS = 24
"""Of a step of the draft's library: catching up with a prompt takes several."""


class Pairs:
    """Target and draft for each place of the knob, compiled once."""

    def __init__(self, folder: Path, artifacts: Artifacts) -> None:
        self._folder = folder
        self._artifacts = artifacts

    def config(
        self,
        later: float,
        *,
        vocab_size: int = VOCAB,
        tp_size: int = 1,
        draft_tp_size: int = 1,
        num_slots: int = NUM_SLOTS,
        draft_tokens: int = DRAFT_TOKENS,
        placement: DraftPlacement = "colocated",
    ) -> RankConfig:
        """The target's first rank, with the draft."""
        target, draft = knob_pair(later, vocab_size=vocab_size)
        small = self.alone(draft, f"draft-{vocab_size}", draft_tokens, tp_size=draft_tp_size, num_slots=num_slots)
        large = self.alone(
            target, f"target-{later}-{vocab_size}", max(128, 5 * num_slots), MOST, tp_size=tp_size, num_slots=num_slots
        )
        speculation = Speculation(
            "draft",
            MOST,
            draft_model_dir=small.model_dir,
            draft_artifact_dir=small.artifact_dir,
            draft_tp_size=draft_tp_size,
            draft_placement=placement,
        )
        return replace(large, speculation=speculation)

    def alone(
        self,
        model: TinyModel,
        name: str,
        num_tokens: int,
        num_draft_tokens: int = 0,
        *,
        tp_size: int = 1,
        num_slots: int = NUM_SLOTS,
    ) -> RankConfig:
        """One model that never speculates."""
        folder = self.write(model, name)
        artifact = self._artifacts.build(
            folder,
            tp_size,
            max_num_batched_tokens=num_tokens,
            max_num_seqs=num_slots,
            max_num_draft_tokens=num_draft_tokens,
        )
        return RankConfig(0, tp_size, folder, artifact, "auto", NUM_PAGES, num_slots, 1, "unused", 10.0)

    def write(self, model: TinyModel, name: str) -> Path:
        folder = self._folder / name
        if not folder.exists():
            model.write(folder)
            write_byte_tokenizer(folder)
        return folder


class DedicatedPair:
    """A model and its draft, one rank each, in two threads of this process; both take every plan."""

    def __init__(self, config: RankConfig, **draft_changes: Any) -> None:
        from tpserve.worker.draft_runner import DraftRunner
        from tpserve.worker.runner import Runner

        door = listen("127.0.0.1")
        config = replace(config, draft_door=f"127.0.0.1:{door.getsockname()[1]}", group_name=f"pair-{door.fileno()}")
        self._thread = ThreadPoolExecutor(1)
        starting = self._thread.submit(
            DraftRunner, replace(config, rank=config.tp_size, **draft_changes), lambda done, total: None, door
        )
        self.target: Runner = Runner(config, lambda done, total: None)
        self.draft: DraftRunner = starting.result(60)

    def execute(self, plan: StepPlan) -> StepResult:
        """Run one step on both; return the model's result."""
        following = self._thread.submit(self.draft.execute, plan)
        result = self.target.execute(plan)
        followed = following.result(60)
        assert (followed.step_id, followed.num_tokens > 0) == (plan.step_id, result.num_tokens > 0)
        assert not followed.slots
        return result

    def close(self) -> None:
        self.target.close()
        self.draft.close()
        self._thread.shutdown()


def start(config: RankConfig) -> Runner | DedicatedPair:
    """A rank in this process, with the draft's rank if it has one of its own."""
    from tpserve.worker.runner import Runner  # which chooses TVM's runtime: not before the compiler is imported

    if config.speculation is not None and config.speculation.num_draft_ranks:
        return DedicatedPair(config)
    return Runner(config, lambda done, total: None)


@contextmanager
def started(config: RankConfig) -> Iterator[Runner]:
    """A rank in this process."""
    runner = start(config)
    yield cast("Runner", runner)
    runner.close()

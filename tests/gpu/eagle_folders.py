"""Tiny targets with EAGLE-3 heads for GPUs, compiled here or before; without CuPy, so that it runs anywhere.

    python -m gpu.eagle_folders FOLDER

builds all libraries, where there is nvcc; `TPSERVE_EAGLE_PAIRS=FOLDER` then lets test_eagle.py take them from there.
Its `kernels.so` will do as `TPSERVE_CUDA_KERNELS`, too.
"""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path

from eagle_models import MarkovHead, MarkovTarget, TinyHead, deep, wide
from eagle_pairs import MOST, build_pair
from rank_group import Artifacts
from text_models import write_byte_tokenizer
from tiny_models import MODELS
from tpserve.proto.rank import RankConfig
from tpserve.proto.speculation import Speculation

FOLDER_VARIABLE = "TPSERVE_EAGLE_PAIRS"
NUM_SLOTS, NUM_PAGES, NUM_TOKENS = 32, 384, 256
"""With all slots' draft tokens a step has 160 tokens: reductions of more than 128 leave rows where they belong."""
BASE = wide(deep(MODELS["llama_4q_2kv"]))
HEADS: dict[str, TinyHead] = {
    "random": TinyHead(BASE),
    # Norm before the residual, and an embedding of its own.
    "normed": TinyHead(BASE, changes={"norm_before_residual": True}, layer_name="layers.0", has_embedding=True, seed=2),
    "markov": MarkovHead(MarkovTarget("markov", BASE.config | {"num_key_value_heads": 4}), draft_vocab_size=190),
}
CASES = [("random", 1), ("random", 2), ("random", 4), ("normed", 1), ("markov", 1), ("markov", 2)]


def pair(folder: Path, name: str, tp_size: int) -> RankConfig:
    """Return the first rank's configuration of a target and its head; what is not in `folder` is made there."""
    models, libraries, head = folder / name, folder / f"{name}-tp{tp_size}", HEADS[name]
    if not models.exists():  # the same on any machine
        head.target.write(models / "target")
        write_byte_tokenizer(models / "target")
        head.write(models / "head")
    if not libraries.exists():
        _build(folder, libraries, head, tp_size)
    speculation = Speculation(
        "eagle3",
        MOST,
        draft_model_dir=models / "head",
        draft_artifact_dir=libraries / "head",
        draft_tp_size=tp_size,
    )
    sizes = (NUM_PAGES, NUM_SLOTS, 1)
    return RankConfig(
        0, tp_size, models / "target", libraries / "target", "auto", *sizes, "unused", 60.0, speculation=speculation
    )


def given_folder() -> Path | None:
    """Return where pairs were built before, if the environment says so."""
    given = os.environ.get(FOLDER_VARIABLE)
    return None if given is None else Path(given)


def _build(folder: Path, libraries: Path, head: TinyHead, tp_size: int) -> None:
    scratch = folder / f".{libraries.name}"
    built = build_pair(
        scratch / "models",
        Artifacts(folder / ".artifacts"),
        head,
        tp_size=tp_size,
        head_tokens=NUM_TOKENS,
        num_tokens=NUM_TOKENS,
        num_slots=NUM_SLOTS,
        target="cuda",
        quantization="q0bf16",
        head_quantization="q0bf16",
    )
    assert built.speculation is not None
    assert built.speculation.draft_artifact_dir is not None
    for name, library in (("target", built.artifact_dir), ("head", built.speculation.draft_artifact_dir)):
        copy = scratch / name
        shutil.copytree(library, copy)
        # The kernels are the same everywhere, and large.
        kernels = folder / "kernels.so"
        if not kernels.exists():
            shutil.copyfile(copy / "kernels.so", kernels)
        (copy / "kernels.so").unlink()
        (copy / "kernels.so").symlink_to(Path("../../kernels.so"))
    shutil.rmtree(scratch / "models")
    scratch.rename(libraries)


def main() -> None:
    """Build all that the tests take."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for name, tp_size in CASES:
        pair(folder, name, tp_size)
    for name in (".artifacts", *HEADS):  # the models are made again where they are wanted
        shutil.rmtree(folder / name)


if __name__ == "__main__":
    main()

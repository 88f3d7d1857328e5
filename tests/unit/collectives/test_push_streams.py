"""Reductions over peer memory, as push_rows.cuh has them, run on the host by ranks whose threads take turns at random.

Kernels overlap as programmatic launch allows, and what they store is seen late and word by word.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

from scripts import ROOT

KERNELS = ROOT / "collectives/kernels"
UNIT = Path(__file__).parents[1]
HEADERS = ["peer.cuh", "push_places.cuh", "push_stage.cuh", "peer_tile.cuh", "push_tile.cuh", "push_rows.cuh"]
Changes = dict[str, tuple[str, str]]


def part(text: str, begin: str, end: str) -> str:
    assert text.count(begin) == text.count(end) == 1
    return text[text.index(begin) : text.index(end)]


COMMAND = ["c++", "-std=c++20", "-O1", "-Wall", "-Werror", "-Wno-unknown-pragmas", "-fno-strict-aliasing"]
COMMAND += ["-Wno-unused-function", "-pthread", "-fPIC"]


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of streams_on_host.h, read once for all: it includes much of the standard library."""
    folder: Path = tmp_path_factory.mktemp("host")
    for path in (Path(__file__).with_name("streams_on_host.h"), UNIT / "compile/cuda_on_host.h"):
        shutil.copy(path, folder)
    (folder / "host.h").write_text('#include "streams_on_host.h"\n')
    subprocess.run([*COMMAND, "-x", "c++-header", str(folder / "host.h")], check=True, timeout=120)
    return folder


def build(folder: Path, host: Path, num_ranks: int, changes: Changes | None = None) -> ctypes.CDLL:
    """Compile the kernels for the host and so many ranks, with some texts replaced."""
    texts = {name: (KERNELS / name).read_text() for name in HEADERS}
    texts["push_streams.cpp"] = Path(__file__).with_name("push_streams.cpp").read_text()
    # What only a GPU has: loads and stores, and its clock.
    peer = texts["peer.cuh"]
    loads = part(peer, "__device__ __forceinline__ uint4 load_peer", "// Per word")
    texts["peer.cuh"] = peer.replace(loads, "").replace(
        'asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));', "now = 1;"
    )
    load = part(texts["push_tile.cuh"], '    asm volatile("ld.relaxed', "    return epoch;")
    texts["push_tile.cuh"] = texts["push_tile.cuh"].replace(load, "    epoch = *target.epoch;\n")
    for name, (right, wrong) in (changes or {}).items():
        assert texts[name].count(right) == 1
        texts[name] = texts[name].replace(right, wrong)
    for name, text in texts.items():
        assert "asm volatile" not in text
        (folder / name).write_text(text)
    for name in ("common.cuh", "hopper.cuh"):
        (folder / name).write_text('#include "streams_on_host.h"\n')
    (folder / "cuda_fp16.h").write_text("")
    (folder / "row_cluster.cuh").write_text("#pragma once\n")  # the harness has its own
    command = [*COMMAND, f"-DNUM_RANKS={num_ranks}", f"-I{folder}", f"-I{host}", "-include", "host.h"]
    command += ["-shared", str(folder / "push_streams.cpp")]
    subprocess.run([*command, "-o", str(folder / "streams.so")], check=True, timeout=120)
    return ctypes.CDLL(str(folder / "streams.so"))


def simulate(library: ctypes.CDLL, seed: int, calls: int) -> str:
    wrong = ctypes.create_string_buffer(200)
    is_wrong = library.simulate_streams(seed, calls, wrong, len(wrong))
    assert bool(is_wrong) == bool(wrong.value)
    return wrong.value.decode()


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_calls_of_any_kind_follow_each_other(num_ranks: int, host: Path, tmp_path: Path) -> None:
    library = build(tmp_path, host, num_ranks)
    for seed in range(4 // num_ranks):
        assert simulate(library, seed, 200) == ""


LATE = (
    "const unsigned before = (epoch + 2) % kBuffers;\n  free_one_shot",
    "const unsigned before = (epoch + 1) % kBuffers;\n  free_one_shot",
)
READ = "      const unsigned epoch = PushEpoch::read(target);\n"
GIVE, LAUNCH = "      epochs[block].hand_over(epoch);\n", "      pdl_launch();\n"
END = "one_shot<kRanks, kMode, kPushed>(p);\n"
WAIT = "  if constexpr (kPushed) pdl_wait();\n"


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        pytest.param("push_rows.cuh", *LATE, id="freed one call too late"),
        pytest.param("push_places.cuh", "kBuffers = 3", "kBuffers = 2", id="two buffers"),
        pytest.param("push_streams.cpp", READ + GIVE + LAUNCH, LAUNCH + READ + GIVE, id="epoch read behind the launch"),
        pytest.param("push_rows.cuh", END + WAIT, END, id="ends before its GEMM"),
    ],
)
def test_a_wrong_rule_is_noticed(name: str, right: str, wrong: str, host: Path, tmp_path: Path) -> None:
    library = build(tmp_path, host, 2, {name: (right, wrong)})
    assert any(simulate(library, seed, 200) for seed in range(4))

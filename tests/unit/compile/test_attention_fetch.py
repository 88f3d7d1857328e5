"""The warp that fetches for attention, and how the others take queries, run on the host.

In a step that only decodes it appends keys and values and copies pages, through modelled barriers, bulk copies and
proxies; the others turn queries. What they give is compared with float64, and bit for bit with the kernel that appends
any tokens. Behind that kernel it copies pages alone: those that it writes may come only when it has been waited for.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from scripts import ROOT

KERNELS = ROOT / "compile/kernels/cuda"
HEADERS = ["attention_fetch.cuh", "attention_params.cuh", "attention_queries.cuh", "attention_fragments.cuh"]
HEADERS += [
    "attention_items.cuh",
    "attention_plan.cuh",
    "kv.cuh",
    "kv_layout.cuh",
    "rope.cuh",
    "rope.cu",
    "grouped_scales.cuh",
]
BF16, FP8 = np.dtype(ml_dtypes.bfloat16), np.dtype(ml_dtypes.float8_e4m3fn)
SCALES = np.array([0.037, 0.021], np.float32)
STARTS = [0, 1, 15, 16, 17, 63, 64, 127, 128, 255, 256, 257, 510, 511, 512, 513, 700, 1023, 1024, 1100]
MAX_LEN = 1152
Array = npt.NDArray[Any]


class Case(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int) for name in ("num_tokens", "num_heads", "num_kv_heads", "page_size", "num_slots")),
        *((name, ctypes.c_int) for name in ("pages_per_slot", "window")),
        *((name, ctypes.c_void_p) for name in ("positions", "slots", "table", "qkv", "rope", "q_weight", "k_weight")),
        *((name, ctypes.c_void_p) for name in ("scales", "pages", "q", "times")),
        ("num_blocks", ctypes.c_int),
        ("early_bytes", ctypes.c_int64),
    ]


COMMAND = ["c++", "-std=c++20", "-O1", "-Wall", "-Werror", "-ffp-contract=off", "-Wno-unknown-pragmas"]
COMMAND += ["-Wno-sign-compare", "-Wno-unused-function", "-pthread", "-fPIC"]


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of cuda_on_host.h, read once for all: it includes much of the standard library."""
    folder: Path = tmp_path_factory.mktemp("host")
    shutil.copy(Path(__file__).with_name("cuda_on_host.h"), folder)
    (folder / "host.h").write_text('#include "cuda_on_host.h"\n')
    subprocess.run([*COMMAND, "-x", "c++-header", str(folder / "host.h")], check=True, timeout=120)
    return folder


def build(folder: Path, host: Path, changes: dict[str, tuple[str, str]] | None = None) -> ctypes.CDLL:
    """Compile the kernels' headers for the host, some of them with a text replaced: then for one kind of page alone."""
    for name in HEADERS:
        text = (KERNELS / name).read_text()
        if changes and name in changes:
            right, wrong = changes[name]
            assert text.count(right) == 1
            text = text.replace(right, wrong)
        (folder / name).write_text(text)
    for name in ("common.cuh", "hopper.cuh", "cuda_fp16.h"):
        (folder / name).write_text('#include "cuda_on_host.h"\n')
    shutil.copy(Path(__file__).with_name("attention_fetch.cpp"), folder)
    command = [*COMMAND, *(["-DBF16_128_ALONE"] if changes else []), f"-I{folder}", f"-I{host}"]
    command += ["-include", "host.h", "-shared", str(folder / "attention_fetch.cpp")]
    subprocess.run([*command, "-o", str(folder / "fetch.so")], check=True, timeout=120)
    return ctypes.CDLL(str(folder / "fetch.so"))


@pytest.fixture(scope="module")
def warp(tmp_path_factory: pytest.TempPathFactory, host: Path) -> ctypes.CDLL:
    return build(tmp_path_factory.mktemp("fetch"), host)


def aligned(array: Array) -> Array:
    """Copy to an address that is a multiple of 16."""
    raw = np.empty(array.nbytes + 16, np.uint8)
    begin = -raw.ctypes.data % 16
    copy: Array = raw[begin : begin + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def page_offsets(page_size: int, dim: int, kv: Any, *, is_value: bool) -> Array:
    """Return (page_size, dim): place of each element in the keys or values of a page and head, see kv_layout.cuh."""
    row, d = np.mgrid[:page_size, :dim]
    if kv == BF16:
        places: Array = (d // 64 * page_size + row) * 64 + ((d // 8 % 8) ^ (row % 8)) * 8 + d % 8
        return places
    swizzle = row % 8 if dim == 128 else row // 2 % 4
    i = d % 16
    byte = i % 8 * 2 + i // 8 if is_value else i % 8 // 2 * 4 + i // 8 * 2 + i % 2
    places = row * dim + (d // 16 ^ swizzle) * 16 + byte
    return places


Runs = list[tuple[int, int, int]]


class Step:
    """A step of `runs` (slot, position, tokens) or of decodes: random projections over pages of random bits and NaN."""

    def __init__(
        self,
        heads: tuple[int, int, int],
        kv: Any,
        *,
        norm: bool = False,
        page_size: int = 16,
        window: int = 0,
        runs: Runs | None = None,
    ) -> None:
        self.num_heads, self.num_kv_heads, self.dim = heads
        self.kv, self.page_size, self.window = kv, page_size, window
        random = np.random.default_rng(sum(heads))
        slots = random.permutation(len(STARTS)).tolist()
        self.runs = runs or [(-1, 0, 1), *((slot, STARTS[slot], 1) for slot in slots), (-1, 0, 2)]
        tokens = [(slot, start + i if slot >= 0 else 0) for slot, start, count in self.runs for i in range(count)]
        self.slots, self.positions = (aligned(np.array(each, np.int32)) for each in zip(*tokens, strict=True))
        pages_per_slot = MAX_LEN // page_size
        table = random.permutation(len(STARTS) * pages_per_slot).reshape(len(STARTS), -1)
        self.table = aligned(table.astype(np.int32))
        num_tokens, width = len(self.slots), self.num_heads + 2 * self.num_kv_heads
        self.qkv = aligned(random.standard_normal((num_tokens, width, self.dim)).astype(BF16))
        turns = np.outer(np.arange(MAX_LEN), 1e4 ** (-np.arange(0, self.dim, 2) / self.dim))
        self.rope = aligned(np.concatenate([np.cos(turns), np.sin(turns)], axis=1).astype(np.float32))
        self.weights = aligned(random.uniform(0.5, 1.5, (2, self.dim)).astype(np.float32)) if norm else None
        shape = (table.size, self.num_kv_heads, 2, page_size * self.dim * kv.itemsize)
        self.before = random.integers(0, 256, shape, np.uint8)

    def run(
        self, library: Any, *, fused: bool = True, appends_alone: bool = False, num_blocks: int = 3
    ) -> tuple[Array, Array]:
        """Return queries and the bytes of pages, turned and appended by the fetching warp or a kernel before it."""
        pages = aligned(self.before)
        q = aligned(np.full((len(self.slots), self.num_heads, self.dim), 0xFFFF, np.uint16))
        times = np.zeros((len(self.slots), self.num_kv_heads), np.int32)
        weights = [0, 0] if self.weights is None else [row.ctypes.data for row in self.weights]
        sizes = (len(self.slots), self.num_heads, self.num_kv_heads, self.page_size, *self.table.shape, self.window)
        arrays = [array.ctypes.data for array in (self.positions, self.slots, self.table, self.qkv, self.rope)]
        arrays += [*weights, *(array.ctypes.data for array in (SCALES, pages, q, times))]
        case = Case(*sizes, *arrays, num_blocks)
        if appends_alone:
            library.append_step(ctypes.byref(case), self.dim)
        else:
            assert library.fetch_step(ctypes.byref(case), self.dim, int(self.kv == FP8), int(fused)) == 0
            assert (times == np.concatenate([self.times(*run) for run in self.runs])[:, None]).all()
        self.early_bytes = case.early_bytes
        return q.view(BF16), pages

    def times(self, slot: int, start: int, count: int) -> Array:
        """Return how many items begin with each token of a run."""
        group, times = self.num_heads // self.num_kv_heads, np.zeros(count, np.int32)
        rows, per_piece = count * group, 16 // group
        if slot < 0:
            return times
        if rows > 16 and (count > 4 * per_piece or start + count <= 512):
            times[:: 128 // group] = 1
            return times
        for begin in range(0, count, per_piece):
            last = min(start + count, start + begin + per_piece) - 1
            times[begin] = self.num_chunks(start + begin, last, 256 if rows > 16 else 512)
        return times

    def num_chunks(self, position: int, last: int, chunk: int) -> int:
        first = max(0, position - self.window + 1) if self.window else 0
        chunk = 256 if 512 < last + 1 <= 2048 else chunk
        return last // chunk - first // chunk + 1

    def check(self, q: Array, pages: Array) -> None:
        """Compare with float64."""
        values = self.qkv.astype(np.float64)
        parts = np.split(values, [self.num_heads, self.num_heads + self.num_kv_heads], axis=1)
        if self.weights is not None:
            for part, weight in zip(parts, self.weights, strict=False):
                part *= weight / np.sqrt((part**2).mean(-1, keepdims=True) + 1e-6)
        cosines, sines = np.split(self.rope[self.positions][:, None].astype(np.float64), 2, axis=-1)
        for part in parts[:2]:
            a, b = np.split(part.copy(), 2, axis=-1)
            part[...] = np.concatenate([a * cosines - b * sines, b * cosines + a * sines], axis=-1)
        present = self.slots >= 0
        np.testing.assert_allclose(q[present].astype(np.float64), parts[0][present], rtol=2**-8, atol=1e-4)
        after = self.before.view(self.kv).copy()
        found = pages.view(self.kv)
        for t in np.flatnonzero(present):
            position = self.positions[t]
            page, row = self.table[self.slots[t], position // self.page_size], position % self.page_size
            for which in (0, 1):
                places = page_offsets(self.page_size, self.dim, self.kv, is_value=which == 1)[row]
                stored, expected = found[page, :, which][:, places], parts[1 + which][t]
                rtol, atol = 2**-8, 1e-4
                if self.kv == FP8:
                    expected = expected / np.float64(SCALES[which])
                    rtol, atol = 2**-4 * 1.01, 2**-10 * 1.01
                np.testing.assert_allclose(stored.astype(np.float64), expected, rtol=rtol, atol=atol)
                after[page, :, which, places] = found[page, :, which, places]
        np.testing.assert_array_equal(after.view(np.uint8), pages)  # nothing else was written


HEADS = [(8, 1, 128), (16, 1, 128), (8, 2, 128), (3, 3, 128), (16, 1, 64), (8, 1, 64), (14, 2, 64), (2, 2, 64)]


@pytest.mark.parametrize("kv", [BF16, FP8], ids=["bf16", "fp8"])
@pytest.mark.parametrize("heads", HEADS)
def test_a_decodes_token_is_turned_and_appended(warp: ctypes.CDLL, heads: tuple[int, int, int], kv: Any) -> None:
    norm = heads[0] in (16, 3, 14)
    step = Step(heads, kv, norm=norm, page_size=64 if heads[1] == 2 else 16)
    q, pages = step.run(warp)
    step.check(q, pages)
    plain_q, plain_pages = step.run(warp, fused=False)
    present = step.slots >= 0
    assert (plain_pages == pages).all()
    assert (plain_q[present].view(np.uint16) == q[present].view(np.uint16)).all()


@pytest.mark.parametrize("kv", [BF16, FP8], ids=["bf16", "fp8"])
@pytest.mark.parametrize("window", [1, 20, 64, 600])
def test_a_window_leaves_stages_out(warp: ctypes.CDLL, window: int, kv: Any) -> None:
    step = Step((8, 2, 128), kv, window=window)
    step.check(*step.run(warp))


@pytest.mark.parametrize("num_blocks", [1, 100])
def test_any_number_of_blocks_shares_the_items(warp: ctypes.CDLL, num_blocks: int) -> None:
    step = Step((4, 1, 128), BF16)
    step.check(*step.run(warp, num_blocks=num_blocks))


MIXED: Runs = [(-1, 0, 3), (0, 700, 1), (1, 120, 40), (2, 0, 70), (3, 603, 5), (4, 1000, 2), (5, 63, 1), (6, 64, 33)]
MIXED += [(-1, 0, 2), (7, 1090, 50), (8, 1, 1), (9, 767, 3)]


@pytest.mark.parametrize("kv", [BF16, FP8], ids=["bf16", "fp8"])
@pytest.mark.parametrize("window", [0, 20, 600])
@pytest.mark.parametrize("heads", [(8, 1, 128), (16, 1, 128), (8, 2, 64)])
def test_new_positions_of_any_step_come_once_they_are_appended(
    warp: ctypes.CDLL, heads: tuple[int, int, int], window: int, kv: Any
) -> None:
    step = Step(heads, kv, window=window, page_size=64 if heads[2] == 64 else 16, runs=MIXED)
    for num_blocks in (3, 100):
        step.check(*step.run(warp, fused=False, num_blocks=num_blocks))
    assert step.early_bytes > 0


@pytest.mark.parametrize("num_blocks", [1, 3])
def test_each_blocks_older_positions_come_before(warp: ctypes.CDLL, num_blocks: int) -> None:
    """Those before the run, not before the tile that a block has; of so many as the ring has places for, three."""
    stage = 64 * 2 * 128 * BF16.itemsize
    for start, stages in ((140, 2), (120, 1), (63, 0), (1000, 3)):
        step = Step((8, 1, 128), BF16, runs=[(3, start, 48)])
        step.check(*step.run(warp, fused=False, num_blocks=num_blocks))
        assert step.early_bytes == num_blocks * stages * stage, start


def test_an_append_without_a_plan_waits_first(warp: ctypes.CDLL) -> None:
    step = Step((8, 1, 128), BF16, norm=True, runs=MIXED)
    step.check(*step.run(warp, appends_alone=True))


def decode_items(warp: Any, runs: list[tuple[int, int, int]], num_slots: int, *, decode_only: bool) -> Array:
    """Return (items, 4) of runs (slot, position, tokens): token, split, splits, positions."""
    tokens = [(slot, position + i) for slot, position, count in runs for i in range(count)]
    slots, positions = (np.array(each, np.int32) for each in zip(*tokens, strict=True))
    out = np.full((len(tokens) * 32, 4), -1, np.int32)
    pointers = [array.ctypes.data_as(ctypes.c_void_p) for array in (positions, slots)]
    arguments = (len(tokens), num_slots, 8, 2, 0, int(decode_only), out.ctypes.data_as(ctypes.c_void_p))
    return out[: warp.decode_items(*pointers, *arguments)]


@pytest.mark.parametrize("decode_only", [True, False])
def test_the_longest_items_stand_first_and_those_of_a_run_in_order(warp: ctypes.CDLL, decode_only: bool) -> None:
    starts = np.random.default_rng(3).integers(0, 1500, 61).tolist()
    runs = [*((slot, start, 1) for slot, start in enumerate(starts)), (-1, 0, 1), (61, 4000, 1), (62, 70_000, 1)]
    found = decode_items(warp, runs, 63, decode_only=decode_only).tolist()
    stages = [min(-(-positions // 64), 32) for *_, positions in found if positions]
    assert stages == sorted(stages, reverse=True)
    by_token: dict[int, list[list[int]]] = {}
    for token, *rest in found:
        by_token.setdefault(token, []).append(rest)
    assert len(by_token) == len(runs) - (not decode_only)  # padding is a wide item there
    for token, items in by_token.items():
        slot, start, _ = runs[token]
        if slot < 0:
            continue
        assert [split for split, *_ in items] == list(range(items[0][1]))
        assert sum(positions for *_, positions in items) == start + 1


@pytest.mark.parametrize("decode_only", [True, False])
def test_a_batch_with_more_runs_than_slots_decodes_nothing(warp: ctypes.CDLL, decode_only: bool) -> None:
    """Its items would overrun the plan."""
    runs = [(0, 3000, 1), (1, 900, 1), (0, 2000, 1)]
    assert len(decode_items(warp, runs, 2, decode_only=decode_only)) == 0
    assert len(decode_items(warp, runs[:2], 2, decode_only=decode_only)) > 2


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("attention_fetch.cuh", "async_proxy_fence();", ""),
        ("attention_fetch.cuh", "fetch.end - (appends ? 1 : 0)", "fetch.end"),
        ("attention_fetch.cuh", "part = {};\n    if (present())", "part = {};\n    if (kind() == HeadKind::kKey)"),
        ("rope.cuh", "__fmaf_rn(y, cosine, __fmul_rn", "__fmaf_rn(y, cosine, -__fmul_rn"),
        ("attention_queries.cuh", "(weight + kHeadDim / 2)", "(weight)"),
        ("attention_queries.cuh", "p.added.qkv + (token + head * p.group", "p.added.qkv + (token + head"),
        ("attention_fetch.cuh", "kConsumerWarps * warp_bytes + S::kStageBytes - 1", "kConsumerWarps * warp_bytes - 1"),
    ],
)
def test_a_wrong_rule_is_noticed(name: str, right: str, wrong: str, host: Path, tmp_path: Path) -> None:
    step = Step((16, 2, 128), BF16, norm=True)
    library = build(tmp_path, host, {name: (right, wrong)})
    with pytest.raises(AssertionError):
        step.check(*step.run(library))


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("attention_items.cuh", "stage = item.run_position / kStageRows", "stage = item.position / kStageRows"),
        ("attention_items.cuh", "stage = item.run_position / kStageRows", "stage = item.run_position / kStageRows + 1"),
        ("attention_items.cuh", "stage < first_stage() ? first_stage() : ", ""),
        ("attention_items.cuh", ", item.run_position = run.position;", ";"),
        ("attention_plan.cuh", "position, 0, 1, 0, 0, 0, position, {}});", "position, 0, 1, 0, 0, 0, 0, {}});"),
        ("attention_fetch.cuh", "        pdl_wait();\n", ""),
        ("rope.cu", "  }\n  pdl_wait();\n", "  }\n"),
        ("rope.cu", "  if (!p.is_planned) pdl_wait();\n", ""),
    ],
)
def test_a_wrong_rule_of_any_step_is_noticed(name: str, right: str, wrong: str, host: Path, tmp_path: Path) -> None:
    step = Step((8, 1, 128), BF16, window=70, runs=MIXED)
    library = build(tmp_path, host, {name: (right, wrong)})
    with pytest.raises(AssertionError):  # noqa: PT012, for either of the two notices it
        step.check(*step.run(library, fused=False, num_blocks=100))
        step.check(*step.run(library, appends_alone=True))

"""How a step's attention is cut into items, on the host: sizes of plans, who reads and who appends which positions."""

from __future__ import annotations

import ctypes
import subprocess
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from scripts import ROOT
from tpserve.compile.kernels.cuda import sizes

MAX_SPLITS, STAGE, SLICE = 32, 64, 16
Ints = npt.NDArray[np.int32]


def build(folder: Path, header: str | None = None) -> Any:
    """Compile the header, or another text in its place."""
    source = folder / "attention_items.cpp"
    source.write_text(Path(__file__).with_name("attention_items.cpp").read_text())
    if header is not None:
        (folder / "attention_items.cuh").write_text(header)
    command = ["c++", "-std=c++20", "-O1", "-Wall", "-Werror", "-shared", "-fPIC", f"-I{folder}"]
    command += [f"-I{ROOT / 'compile/kernels/cuda'}", str(source), "-o", str(folder / "items.so")]
    subprocess.run(command, check=True, timeout=60)
    library = ctypes.CDLL(str(folder / "items.so"))
    library.plan_size.restype = library.partial_rows.restype = ctypes.c_long
    return library


@pytest.fixture(scope="module")
def items(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return build(tmp_path_factory.mktemp("items"))


def items_of(library: Any, count: int, position: int, window: int, num_kv_heads: int = 2) -> Ints:
    """Return (num_splits, 8): split, chunk, begin, end, first and last stage, if it has the newest, first new stage."""
    out = np.full((MAX_SPLITS + 1, 8), -7, np.int32)
    number = library.items_of(count, position, window, num_kv_heads, ctypes.c_void_p(out.ctypes.data))
    assert 1 <= number <= MAX_SPLITS
    assert (out[number:] == -7).all()
    return out[:number]


def test_sizes_are_those_of_the_kernels_and_tell_the_plans_apart(items: Any) -> None:
    for slots in (1, 2, 7, 8, 64, 256):
        for tokens in (1, 2, 7, 8, 9, 31, 32, 33, 64, 65, 248, 256, 1024, 8192, 32768):
            for decode_only in (False, True):
                size = sizes.attention_plan_size(tokens, slots, decode_only)
                assert size == items.plan_size(tokens, slots, int(decode_only)), (tokens, slots, decode_only)
            other = sizes.attention_plan_size(tokens, slots, decode_only=False)
            assert size < other, "a buffer for any step of so many tokens has room for one that only decodes"


def test_a_plan_of_decodes_has_room_for_all_that_a_step_can_have(items: Any) -> None:
    for slots in (1, 3, 8, 64):
        for tokens in (1, 3, 8, 9, 64, 100):
            room = items.decode_room(tokens, slots, 1)
            most = max(real * MAX_SPLITS + tokens - real for real in range(min(tokens, slots) + 1))
            assert room == most
            for group in (1, 3, 4, 8, 16):
                assert items.partial_rows(tokens, slots, group) >= min(tokens, slots) * group


@pytest.mark.parametrize("num_blocks", [1, 5, 7, 64])
def test_every_item_is_somebodys_turn_once(items: Any, num_blocks: int) -> None:
    turns = [[items.turn(turn, block, num_blocks) for turn in range(4)] for block in range(num_blocks)]
    assert sorted(chain.from_iterable(turns)) == list(range(4 * num_blocks))
    assert all(mine == sorted(mine) for mine in turns)


def check_heads(library: Any) -> None:
    for group in range(1, 17):
        for num_kv_heads in (1, 2, 3, 8):
            queries, keys, values = np.split(
                np.arange((group + 2) * num_kv_heads), [group * num_kv_heads, (group + 1) * num_kv_heads]
            )
            for head in range(num_kv_heads):
                found = [library.head_of(place, head, group, num_kv_heads) for place in range(group + 2)]
                assert found == [*queries.reshape(-1, group)[head].tolist(), keys[head], values[head]]


def test_a_kv_heads_queries_key_and_value_are_found_in_the_projections(items: Any) -> None:
    check_heads(items)


def check_run(library: Any, count: int, position: int, window: int, num_kv_heads: int) -> None:
    found = items_of(library, count, position, window, num_kv_heads)
    first = max(0, position - window + 1) if window else 0
    splits, chunks, begins, ends, first_stages, last_stages, newest, new_stages = found.T.tolist()
    assert splits == list(range(splits[0], splits[0] + len(found)))
    # Each position that any of the tokens sees is read by one item.
    assert [begins[0], ends[-1]] == [first, position + count]
    assert begins[1:] == ends[:-1]
    # Items that follow each other share no stage: what one appends, no other reads.
    assert all(before < after for before, after in zip(last_stages, first_stages[1:], strict=False))
    assert newest == [0] * (len(found) - 1) + [1]
    for begin, end, first_stage, last_stage in zip(begins, ends, first_stages, last_stages, strict=True):
        assert begin < end
        assert (first_stage, last_stage) == (begin // STAGE, (end - 1) // STAGE)
    stages = zip(first_stages, last_stages, new_stages, strict=True)
    assert all(new == min(max(position // STAGE, first), last + 1) for first, last, new in stages)
    assert len(set(chunks)) == 1
    assert chunks[0] % STAGE == 0


def check_runs(library: Any, positions: list[int], counts: list[int], windows: list[int]) -> None:
    for window in windows:
        for position in positions:
            for count in counts:
                for num_kv_heads in (2, 8):
                    check_run(library, count, position, window, num_kv_heads)


def check_all(library: Any) -> None:
    check_runs(library, EDGES[:-1], [1], [0, 300])
    check_heads(library)


EDGES = [0, 1, 15, 16, 17, 63, 64, 65, 510, 511, 512, 513, 1023, 1024, 1025, 16383, 16384, 16385, 32767, 32768, 131071]


def test_many_kv_heads_have_longer_chunks(items: Any) -> None:
    for length, few, many in (
        (512, 512, 512),
        (513, 256, 512),
        (2048, 256, 512),
        (2049, 512, 512),
        (20_000, 1024, 1024),
    ):
        chunks = [items_of(items, 1, length - 1, 0, num_kv_heads)[0, 1] for num_kv_heads in (1, 7, 8, 32)]
        assert chunks == [few, few, many, many], length


@pytest.mark.parametrize("window", [0, 1, 20, 64, 300, 512, 4096])
def test_items_of_a_run_read_each_position_once_and_the_last_appends(items: Any, window: int) -> None:
    random = np.random.default_rng(window).integers(0, 200_000, 300).tolist()
    check_runs(items, [*EDGES, *random], [1, 2, 5, 16], [window])


def check_pieces(library: Any, count: int, position: int, group: int, window: int) -> bool:
    """Check a run of drafted tokens; return whether it attends in pieces."""
    out = np.full((MAX_SPLITS + 1, 7), -7, np.int32)
    number = library.piece_items_of(count, position, group, window, 2, ctypes.c_void_p(out.ctypes.data))
    per_piece = 16 // group
    assert (number > 0) == (per_piece < count <= 4 * per_piece and position + count > 512)
    assert number <= MAX_SPLITS, "the room that a run has"
    assert (out[number:] == -7).all()
    seen: list[list[int]] = [[] for _ in range(count)]
    taken: list[int] = []
    for token, tokens in dict.fromkeys((token, tokens) for token, tokens, *_ in out[:number].tolist()):
        assert 1 <= tokens <= per_piece
        assert token + tokens <= count
        own = [row for row in out[:number].tolist() if row[0] == token]
        assert len({(first, end) for *_, first, end, _ in own}) == 1
        for _, _, begin, end, *_, new in own:  # earlier pieces are of this step, too
            assert new == min(max(position // STAGE, begin // STAGE), (end - 1) // STAGE + 1)
        taken += range(own[0][4], own[0][5])
        assert own[0][5] - own[0][4] == len(own)
        first = max(0, position + token - window + 1) if window else 0
        assert (own[0][2], own[-1][3]) == (first, position + token + tokens)
        assert all(before[3] == after[2] for before, after in pairwise(own))
        for each in range(token, token + tokens):
            seen[each].append(token)
    if number:
        assert all(len(pieces) == 1 for pieces in seen)
        assert len(set(taken)) == len(taken)
        assert max(taken) < MAX_SPLITS
    return bool(number > 0)


def check_all_pieces(library: Any, rng: np.random.Generator, number: int) -> None:
    hits = 0
    for position in [*EDGES, *rng.integers(0, 200_000, number).tolist()]:
        for group in (1, 3, 4, 5, 7, 8, 9, 16):
            for count in (1, 2, 3, 4, 6, 8, 9, 17, 64, 65):
                hits += check_pieces(library, count, position, group, int(rng.choice([0, 20, 300, 4096])))
    assert hits > 100


def test_a_draft_behind_a_long_context_attends_in_pieces(items: Any) -> None:
    seed = int(np.random.default_rng().integers(1 << 30))
    print("seed", seed)
    check_all_pieces(items, np.random.default_rng(seed), 50)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("item.first_place = piece * most", "item.first_place = piece"),
        (", item.run_position = run.position;", ";"),
        ("stage < first_stage() ? first_stage() : ", ""),
        ("run.position + offset, window, num_kv_heads)", "run.position, window, num_kv_heads)"),
        ("left < per_piece ? left : per_piece", "left > 0 ? per_piece : left"),
        ("pieces <= kMaxPieces", "pieces <= kMaxPieces + 1"),
        ("most = kMaxSplits / pieces", "most = kMaxSplits"),
    ],
)
def test_a_wrong_rule_of_pieces_is_noticed(right: str, wrong: str, tmp_path: Path) -> None:
    header = (ROOT / "compile/kernels/cuda/attention_items.cuh").read_text()
    assert header.count(right) == 1
    library = build(tmp_path, header.replace(right, wrong))
    with pytest.raises(AssertionError):
        check_all_pieces(library, np.random.default_rng(0), 10)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("return end == item.position + item.count", "return end <= item.position + item.count"),
        ("constexpr int kChunk = 512", "constexpr int kChunk = 520"),
        ("stage <= last_stage() ? stage : last_stage() + 1", "stage"),
        ("item.num_splits = (length - 1) / item.chunk", "item.num_splits = length / item.chunk"),
        (
            "item.split = begin / item.chunk;\n  item.num_splits = (length",
            "item.split = begin / item.chunk / 2;\n  item.num_splits = (length",
        ),
        ("kv_head * group + place", "kv_head * num_kv_heads + place"),
        ("place * num_kv_heads + kv_head", "place * group + kv_head"),
    ],
)
def test_a_wrong_rule_is_noticed(right: str, wrong: str, tmp_path: Path) -> None:
    header = (ROOT / "compile/kernels/cuda/attention_items.cuh").read_text()
    assert header.count(right) == 1
    library = build(tmp_path, header.replace(right, wrong))
    with pytest.raises(AssertionError):
        check_all(library)

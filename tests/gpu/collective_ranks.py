"""One rank of a group of collectives, run as a process of its own: checks against sums in rank order, and prints JSON.

Every rank makes all ranks' inputs from one seed, so each knows what the sums must be: in float32, rank by rank.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import cupy
import numpy as np
import numpy.typing as npt
import tvm_ffi

from tpserve.collectives.names import (
    ALL_GATHER,
    ALL_REDUCE,
    GEMM_ALL_REDUCE_ADD_RMS_NORM,
    WHOLE_ROWS,
)
from tpserve.collectives.nccl import NcclCommunicator
from tpserve.collectives.push import PushCommunicator
from tpserve.collectives.rendezvous import Rendezvous, listen
from tpserve.proto.packing import packed_shape
from tpserve.worker.library import tvm  # whose tensors have views

EPS = 1e-5
Check = Callable[["Ranks", argparse.Namespace], dict[str, Any]]
BANK = 4096 + 64 * 31  # rows of random values that all cases draw from


def tensor(bits: Any, dtype: str) -> Any:
    return tvm.runtime.from_dlpack(bits)._create_view(bits.shape, dtype=dtype)


def widen(bits: Any) -> Any:
    """bfloat16 bits to float32."""
    return (bits.astype(cupy.uint32) << 16).view(cupy.float32)


def narrow(values: Any) -> Any:
    """float32 to bfloat16 bits, to nearest even."""
    word = values.view(cupy.uint32)
    return ((word + 0x7FFF + ((word >> 16) & 1)) >> 16).astype(cupy.uint16)


class Case:
    """Inputs of one call on all ranks, and what must come out."""

    def __init__(self, ranks: Ranks, rows: int, offset: int, hidden: int | None = None) -> None:
        place = (slice(offset, offset + rows), slice(hidden))
        self.inputs = [ranks.bank[r][place] for r in range(ranks.world_size)]
        self.residual = ranks.bank[-1][place]
        self.weight = ranks.weight[:hidden]
        total = widen(self.inputs[0])
        for part in self.inputs[1:]:
            total = total + widen(part)
        self.sum = narrow(total)
        self.total = narrow(total + widen(self.residual))
        wide = widen(self.total).astype(cupy.float64)
        factor = 1 / cupy.sqrt((wide**2).mean(axis=1, keepdims=True) + EPS)
        self.normed = wide * factor * self.weight.astype(cupy.float64)


class Ranks:
    """This rank with its communicator and random values."""

    def __init__(self, args: argparse.Namespace, kernels: Any) -> None:
        self.rank, self.world_size, self.hidden = args.rank, args.world_size, args.hidden
        door = listen("127.0.0.1", args.port) if self.rank == 0 else None
        self.rendezvous = Rendezvous(
            self.rank, self.world_size, f"127.0.0.1:{args.port}", "secret", timeout_s=120, door=door
        )
        self.is_push = args.backend == "push"
        make: Any = PushCommunicator if self.is_push else NcclCommunicator
        extra = {"max_hidden_size": self.hidden, "timeout_s": args.timeout} if self.is_push else {}
        self.group = make(kernels, self.rendezvous, rank=self.rank, world_size=self.world_size, **extra)
        rng = cupy.random.RandomState(11)
        values = rng.standard_normal((self.world_size + 1, BANK, self.hidden), dtype=cupy.float32)
        self.bank = narrow(values)
        self.bank[:, ::7, ::5] = 0x8000  # minus zero
        self.weight = rng.standard_normal(self.hidden, dtype=cupy.float32)
        self.kernels = kernels
        kernels["init_device"](args.device)
        self._identities: dict[tuple[int, ...], tuple[Any, Any]] = {}

    def call(self, name: str, *arrays: Any) -> None:
        self.group.function(name)(*arrays)

    def add_rms_norm(self, suffix: str, x: Any, *arrays: Any) -> None:
        """Sum x over the ranks, add and norm: by NCCL after a GEMM that changes nothing, for it has no call without."""
        if self.is_push:
            self.call(f"all_reduce_add_rms_norm{suffix}", x, *arrays)
            return
        hidden = x.shape[1]
        if tuple(x.shape) not in self._identities:
            one = cupy.eye(hidden, dtype=cupy.uint16) * 0x3F80
            packed, part = cupy.zeros(packed_shape(hidden, hidden, 2), cupy.uint16), cupy.zeros(x.shape, cupy.uint16)
            self._identities[tuple(x.shape)] = (tensor(packed, "bfloat16"), tensor(part, "bfloat16"))
            self.kernels["pack_weight"](tensor(one, "bfloat16"), self._identities[tuple(x.shape)][0])
            cupy.cuda.get_current_stream().synchronize()
        weights, part = self._identities[tuple(x.shape)]
        residual, norm_weight, eps, *outputs = arrays
        self.call(
            f"{GEMM_ALL_REDUCE_ADD_RMS_NORM}{suffix}", "gemm", x, weights, residual, norm_weight, eps, part, *outputs
        )

    def reduce(self, case: Case) -> tuple[Any, ...]:
        """Run all three fused and plain sums on poisoned outputs; return bits: sum, total, normed, total8, q, scale."""
        rows, hidden = case.residual.shape
        shape = (rows, hidden)
        plain, total, normed, total8 = (cupy.full(shape, 0xFFFF, cupy.uint16) for _ in range(4))
        codes, scale = cupy.full(shape, 0xFF, cupy.uint8), cupy.full(rows, cupy.nan, cupy.float32)
        x = tensor(cupy.ascontiguousarray(case.inputs[self.rank]), "bfloat16")
        residual = tensor(cupy.ascontiguousarray(case.residual), "bfloat16")
        weight = tvm_ffi.from_dlpack(case.weight)
        self.call(ALL_REDUCE, x, tensor(plain, "bfloat16"))
        norm = (x, residual, weight, EPS)
        self.add_rms_norm("", *norm, tensor(total, "bfloat16"), tensor(normed, "bfloat16"))
        outputs = (tensor(total8, "bfloat16"), tensor(codes, "float8_e4m3fn"), tvm_ffi.from_dlpack(scale))
        self.add_rms_norm("_fp8", *norm, *outputs)
        return plain, total, normed, total8, codes, scale

    def owns(self, rows: int) -> Any:
        """Rows in which this rank's residual stream must be whole: at least every world_size-th."""
        return slice(self.rank, rows, self.world_size)

    def check(self, case: Case, *, exact: bool) -> None:
        plain, total, normed, total8, codes, scale = self.reduce(case)
        rows = plain.shape[0]
        own = self.owns(rows)
        if exact:
            assert bool((plain == case.sum).all()), f"{rows} rows: sums differ"
            assert bool((total[own] == case.total[own]).all()), f"{rows} rows: residual differs"
            assert bool((total8[own] == case.total[own]).all()), f"{rows} rows: residual of fp8 differs"
        error = relative(widen(plain), widen(case.sum))
        assert error < 4e-3, f"{rows} rows: sum off by {error}"
        error = relative(widen(normed), case.normed)
        assert error < 6e-3, f"{rows} rows: norm off by {error}"
        error = relative(decode(codes) * scale[:, None].astype(cupy.float64), case.normed)
        assert error < 4e-2, f"{rows} rows: fp8 off by {error}"

    def late_rank(self) -> int:
        """Whom a wait has given up on, or -1."""
        cupy.cuda.get_current_stream().synchronize()
        late = self.group.late_rank()
        return -1 if late is None else late

    def same_everywhere(self, arrays: tuple[Any, ...]) -> None:
        digest = b"".join(np.uint64(hash_of(array)).tobytes() for array in arrays)
        assert len(set(self.rendezvous.exchange(digest))) == 1, "ranks have other bits"


def hash_of(array: Any) -> int:
    words = array.reshape(-1).view(cupy.uint8).astype(cupy.uint64)
    return int((words * (cupy.arange(words.size, dtype=cupy.uint64) * 2654435761 + 12345)).sum().get())


def relative(actual: Any, expected: Any) -> float:
    actual, expected = actual.astype(cupy.float64), expected.astype(cupy.float64)
    return float(cupy.linalg.norm(actual - expected) / cupy.linalg.norm(expected))


def decode(codes: Any) -> Any:
    import ml_dtypes

    table = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    return cupy.asarray(table)[codes]


def check_sizes(ranks: Ranks, args: argparse.Namespace) -> dict[str, Any]:
    exact = args.backend == "push"
    for i, rows in enumerate(args.rows):
        case = Case(ranks, rows, i * 31)
        ranks.check(case, exact=exact)
        plain, _, normed, _, codes, scale = ranks.reduce(case)
        ranks.same_everywhere((plain, normed, codes, scale))
    return {}


def check_gather(ranks: Ranks, args: argparse.Namespace) -> dict[str, Any]:
    for rows, columns in ((1, 64), (1, 64128), (7, 24592), (64, 64128), (3, 16)):
        rng = cupy.random.RandomState(rows)
        parts = rng.standard_normal((ranks.world_size, rows, columns), dtype=cupy.float32)
        out = cupy.full((rows, ranks.world_size * columns), cupy.nan, cupy.float32)
        mine = cupy.ascontiguousarray(parts[ranks.rank])
        for _ in range(3):
            ranks.call(ALL_GATHER, tvm_ffi.from_dlpack(mine), tvm_ffi.from_dlpack(out))
        assert bool((out == parts.transpose(1, 0, 2).reshape(rows, -1)).all()), f"{rows} x {columns} differs"
        halves = narrow(parts)
        # A copy: a view of one rank's part need not be aligned.
        mine, out = halves[ranks.rank].copy(), cupy.full(out.shape, 0xFFFF, cupy.uint16)
        ranks.call(ALL_GATHER, tensor(mine, "bfloat16"), tensor(out, "bfloat16"))
        joined = halves.transpose(1, 0, 2).reshape(rows, -1)
        assert bool((out == joined).all()), f"{rows} x {columns} of bfloat16 differs"
    return {}


def check_whole(ranks: Ranks, args: argparse.Namespace) -> dict[str, Any]:
    """What a fused sum leaves whole in some rows becomes whole in all; calls of both kinds take turns."""
    for i, rows in enumerate(args.rows):
        case = Case(ranks, rows, i * 31)
        shape = case.residual.shape
        x = tensor(cupy.ascontiguousarray(case.inputs[ranks.rank]), "bfloat16")
        residual = tensor(cupy.ascontiguousarray(case.residual), "bfloat16")
        weight = tvm_ffi.from_dlpack(case.weight)
        for _ in range(4):
            total, normed, whole = (cupy.full(shape, 0xFFFF, cupy.uint16) for _ in range(3))
            ranks.add_rms_norm("", x, residual, weight, EPS, tensor(total, "bfloat16"), tensor(normed, "bfloat16"))
            ranks.call(WHOLE_ROWS, tensor(total, "bfloat16"), tensor(whole, "bfloat16"))
            if args.backend == "push":
                # Sums with zeros make a zero of minus zero.
                assert bool((widen(whole) == widen(case.total)).all()), f"{rows} rows differ"
            error = relative(widen(whole), widen(case.total))
            assert error < 4e-3, f"{rows} rows: off by {error}"
            ranks.same_everywhere((whole,))
    return {}


def check_soak(ranks: Ranks, args: argparse.Namespace) -> dict[str, Any]:
    """Thousands of calls of changing size with ranks out of step, checked on the device, hashes compared at the end.

    Rows of several hidden sizes, if there are, take turns.
    """
    rng = np.random.default_rng(5)  # the same on all ranks
    delays = np.random.default_rng(ranks.rank)
    wrong = cupy.zeros(1, cupy.int64)
    sizes = [1, 2, 3, 4, 8, 16, 33, 64, 100, 130]
    hidden = [None, *args.also_hidden]
    cases = {rows: [Case(ranks, rows, 40 * k, hidden[k % len(hidden)]) for k in range(12)] for rows in sizes}
    digest = cupy.zeros(1, cupy.uint64)
    for _ in range(args.iterations):
        rows = sizes[rng.integers(len(sizes))]
        case = cases[rows][rng.integers(12)]
        if delays.random() < 0.02:
            time.sleep(delays.random() * 2e-3)
        plain, total, normed, _, codes, _ = ranks.reduce(case)
        own = ranks.owns(rows)
        wrong += (plain != case.sum).sum() + (total[own] != case.total[own]).sum()
        digest = digest * cupy.uint64(31) + normed.sum(dtype=cupy.uint64) + codes.sum(dtype=cupy.uint64)
    assert int(wrong[0]) == 0, f"{int(wrong[0])} elements differ"
    assert len(set(ranks.rendezvous.exchange(bytes(digest.get().tobytes())))) == 1, "ranks have other bits"
    return {"calls": 3 * args.iterations}


def check_graph(ranks: Ranks, args: argparse.Namespace) -> dict[str, Any]:
    """Seven calls in a graph, an odd number against three buffers, replayed with eager calls between."""
    case = Case(ranks, 5, 0)
    weight = tvm_ffi.from_dlpack(ranks.weight)
    x = tensor(cupy.ascontiguousarray(case.inputs[ranks.rank]), "bfloat16")
    residual_bits = cupy.ascontiguousarray(case.residual)
    residual, outs = tensor(residual_bits, "bfloat16"), []
    for _ in range(7):
        outs.append((cupy.zeros_like(residual_bits), cupy.zeros_like(residual_bits)))
    tensors = [(tensor(total, "bfloat16"), tensor(normed, "bfloat16")) for total, normed in outs]
    stream = cupy.cuda.get_current_stream()

    def run() -> None:
        for total, normed in tensors:
            ranks.add_rms_norm("", x, residual, weight, EPS, total, normed)

    run()
    stream.synchronize()
    stream.begin_capture(cupy.cuda.runtime.streamCaptureModeRelaxed)
    run()
    graph = stream.end_capture()
    own = ranks.owns(5)
    for i in range(args.iterations):
        for total, _ in outs:
            total.fill(0xFFFF)
        graph.launch(stream)
        if i % 3 == 0:
            ranks.check(case, exact=args.backend == "push")
        if args.backend == "push":
            for total, _ in outs:
                assert bool((total[own] == case.total[own]).all()), f"replay {i} differs"
    return {}


class ModelStep:
    """Five sums and an all-gather, as a step of a model of that hidden size queues them; outputs stay in place."""

    def __init__(self, ranks: Ranks, offset: int, rows: int, hidden: int, columns: int) -> None:
        self._ranks = ranks
        self.case = case = Case(ranks, rows, offset, hidden)
        self._inputs = [cupy.ascontiguousarray(bits) for bits in (case.inputs[ranks.rank], case.residual)]
        self._outs = [cupy.zeros((2, rows, hidden), cupy.uint16) for _ in range(5)]
        rng = cupy.random.RandomState(offset)
        self._parts = rng.standard_normal((ranks.world_size, rows, columns), dtype=cupy.float32)
        self._part = cupy.ascontiguousarray(self._parts[ranks.rank])
        self._logits = cupy.zeros((rows, ranks.world_size * columns), cupy.float32)
        # Made once: an exchange by DLPack makes streams wait for each other, which a capture forbids.
        self._norm = (*(tensor(bits, "bfloat16") for bits in self._inputs), tvm_ffi.from_dlpack(case.weight), EPS)
        self._pairs = [tuple(tensor(bits, "bfloat16") for bits in pair) for pair in self._outs]
        self._gather = (tvm_ffi.from_dlpack(self._part), tvm_ffi.from_dlpack(self._logits))

    def poison(self) -> None:
        self._logits.fill(cupy.nan)
        for pair in self._outs:
            pair.fill(0xFFFF)

    def run(self) -> None:
        for pair in self._pairs:
            self._ranks.add_rms_norm("", *self._norm, *pair)
        self._ranks.call(ALL_GATHER, *self._gather)

    def check(self, when: str, *, exact: bool) -> None:
        rows = len(self._logits)
        own = self._ranks.owns(rows)
        for total, normed in self._outs:
            if exact:
                assert bool((total[own] == self.case.total[own]).all()), f"{when}, {rows} rows: residual differs"
            error = relative(widen(normed), self.case.normed)
            assert error < 6e-3, f"{when}, {rows} rows: norm off by {error}"
        assert bool((self._logits == self._parts.transpose(1, 0, 2).reshape(rows, -1)).all()), f"{when}: logits differ"


def check_logits(ranks: Ranks, args: argparse.Namespace) -> dict[str, Any]:
    """Logits by rank: rows that are wanted whole come whole, of greedy ones the best token, of padding nothing."""
    rng = np.random.default_rng(5)  # the same on all ranks
    kinds = ["padding", "best", "temperature", "frequency", "presence", "bias", "logprobs", "mask"]
    seen: dict[str, int] = dict.fromkeys(kinds, 0)
    sizes = [(1, 32064), (3, 64), (8, 4), (16, 4008), (64, 1000), (150, 36), *[(5, 100_000), (64, 96)] * 4]
    for rows, columns in sizes:
        vocab_size = ranks.world_size * columns - min(37, columns - 1)
        logits = rng.choice([-0.0, 0.0, 1.5, -2.25, 7.0], (rows, ranks.world_size * columns)).astype(np.float32)
        logits[:, vocab_size:] = 100.0  # means nothing
        logits[rng.random(rows) < 0.1, rng.integers(vocab_size)] = np.nan
        logits[rng.random(rows) < 0.1] = -np.inf
        of_row = rng.choice(kinds, rows, p=[0.1, 0.4, *[0.5 / 6] * 6])
        slots = rng.permutation(rows + 3)[:rows].astype(np.int32)
        state: dict[str, npt.NDArray[Any]] = {}
        state |= {kind: np.zeros(rows + 3, np.float32) for kind in ("temperature", "frequency", "presence")}
        state |= {kind: np.zeros(rows + 3, np.int32) - (kind != "bias") for kind in ("bias", "logprobs", "mask")}
        for row, kind in enumerate(of_row):
            seen[kind] += 1
            if kind in state:
                state[kind][slots[row]] += 1
        slots[of_row == "padding"] = -1
        begin = ranks.rank * columns
        mine = cupy.asarray(np.ascontiguousarray(logits[:, begin : begin + columns]))
        out = cupy.full(logits.shape, 55.0, cupy.float32)
        best = cupy.full((rows, 8), 77, cupy.int64)
        given = [tvm_ffi.from_dlpack(cupy.asarray(array)) for array in (slots, *state.values())]
        outputs = (tvm_ffi.from_dlpack(out), tvm_ffi.from_dlpack(best))
        used = ranks.group.gather_logits(tvm_ffi.from_dlpack(mine), vocab_size, given[0], given[1:], *outputs)
        assert used == ranks.is_push
        found, places = cupy.asnumpy(out), cupy.asnumpy(best).view(np.uint64)
        for row, kind in enumerate(of_row):
            what = f"{rows} x {columns}, row {row}, {kind}"
            if not used or kind not in ("padding", "best"):
                np.testing.assert_array_equal(found[row].view(np.uint32), logits[row].view(np.uint32), what)
                assert not used or not places[row].any(), what
                continue
            assert (found[row] == 55.0).all(), what
            if kind == "padding":
                assert (places[row] == 77).all(), what
                continue
            values = logits[row, :vocab_size]
            top = int(places[row].max())
            if np.isnan(values).any():
                assert top == 2**64 - 1, what
            else:
                assert 2**32 - 1 - top % 2**32 == values.argmax(), what
    assert all(seen.values()), seen
    return {}


def check_models(ranks: Ranks, args: argparse.Namespace) -> dict[str, Any]:
    """A draft and its target in one graph, replayed: steps of other rows and hidden sizes, each with its logits."""
    draft = ModelStep(ranks, 0, 3, args.also_hidden[0], 320)
    target = ModelStep(ranks, 100, 20, ranks.hidden, 512)

    def run() -> None:
        for step in (draft, draft, draft, target):
            step.run()

    stream = cupy.cuda.get_current_stream()
    run()
    stream.synchronize()
    stream.begin_capture(cupy.cuda.runtime.streamCaptureModeRelaxed)
    run()
    graph = stream.end_capture()
    delays = np.random.default_rng(ranks.rank)
    for i in range(args.iterations):
        draft.poison()
        target.poison()
        if delays.random() < 0.2:
            time.sleep(delays.random() * 2e-3)
        graph.launch(stream)
        for step in (draft, target):
            step.check(f"replay {i}", exact=args.backend == "push")
    return {}


def check_late_word(ranks: Ranks, call: Callable[[], object]) -> dict[str, Any]:
    """All but the last rank make a call; return whom a rank waited for in vain, if it did, and how long."""
    late = ranks.world_size - 1
    started = time.monotonic()
    if ranks.rank != late:
        call()
        cupy.cuda.get_current_stream().synchronize()
    waited = time.monotonic() - started
    late_rank = ranks.late_rank()
    ranks.rendezvous.exchange(b"seen")
    return {"late": late_rank, "waited_s": waited}


def check_late(ranks: Ranks, args: argparse.Namespace) -> dict[str, Any]:
    """The last rank stays away from one call: the others give up by themselves and know whom they waited for."""
    case = Case(ranks, 4, 0)
    return check_late_word(ranks, lambda: ranks.reduce(case))


CHECKS: dict[str, Check] = {
    "sizes": check_sizes,
    "gather": check_gather,
    "whole": check_whole,
    "soak": check_soak,
    "graph": check_graph,
    "logits": check_logits,
    "models": check_models,
    "late": check_late,
}


def run(checks: dict[str, Check], parser: argparse.ArgumentParser) -> None:
    """Be one rank, as the command line says, and print what the checks return."""
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--world-size", type=int, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--device", type=int, required=True)
    parser.add_argument("--kernels", required=True)
    parser.add_argument("--backend", choices=["push", "nccl"], required=True)
    parser.add_argument("--hidden", type=int, required=True)
    parser.add_argument(
        "--also-hidden", type=int, nargs="+", default=[], help="smaller sizes of rows on the same group"
    )
    parser.add_argument("--checks", nargs="+", choices=sorted(checks), required=True)
    parser.add_argument("--rows", type=int, nargs="+", default=[1])
    parser.add_argument("--iterations", type=int, default=100)
    parser.add_argument("--timeout", type=float, default=60.0)
    args = parser.parse_args()
    cupy.cuda.Device(args.device).use()
    cupy.zeros(1)
    module = tvm_ffi.load_module(args.kernels)
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream, tvm_ffi.use_raw_stream(tvm_ffi.device("cuda", args.device), stream.ptr):
        ranks = Ranks(args, module)
        result: dict[str, Any] = {}
        for check in args.checks:
            result |= checks[check](ranks, args)
            stream.synchronize()
        if "late" not in args.checks:
            ranks.group.close()
        ranks.rendezvous.close()
    print(json.dumps(result))


if __name__ == "__main__":
    try:
        run(CHECKS, argparse.ArgumentParser())
    except OSError as error:
        sys.exit(f"{type(error).__name__}: {error}")

from __future__ import annotations

from tpserve.coordinator.bench.advice import advice
from unit.bench.builders import make_point


def sweep(label: str, tp: int, tpots_ms: dict[int, float], **options: tuple[str, ...]) -> list[object]:
    return [
        make_point(
            label, concurrency, ms / 1e3, tp=tp, throughput=concurrency * 1e3 / ms, serve_args=options.get("args", ())
        )
        for concurrency, ms in tpots_ms.items()
    ]


TP4 = {1: 8.0, 8: 9.5, 32: 14.0, 64: 19.0}
TP8 = {1: 6.0, 8: 8.0, 32: 13.0, 64: 18.9}


def lines_of(*sweeps: list[object]) -> list[str]:
    return advice([point for points in sweeps for point in points])  # type: ignore[misc]  # of builders


def test_which_degree_up_to_which_concurrency() -> None:
    lines = lines_of(sweep("TP=4", 4, TP4), sweep("TP=8", 8, TP8))
    assert lines == [
        "For 50 tok/s per user (TPOT at most 20.0 ms): TP=4 up to concurrency 64 (842 tok/s per GPU); "
        "TP=8 up to concurrency 64 (423 tok/s per GPU).",
        "For 70 tok/s per user (TPOT at most 14.3 ms): TP=4 up to concurrency 32 (571 tok/s per GPU); "
        "TP=8 up to concurrency 32 (308 tok/s per GPU).",
        "For 100 tok/s per user (TPOT at most 10.0 ms): TP=4 up to concurrency 8 (211 tok/s per GPU); "
        "TP=8 up to concurrency 8 (125 tok/s per GPU).",
        # At 64 both are equal but for noise: the one with fewer GPUs.
        "Least time per output token: TP=8 at concurrency 1 to 32, TP=4 at concurrency 64.",
        "Most tokens per second and GPU: TP=4 at concurrency 1 to 64.",
    ]


def test_where_speculation_stops_paying() -> None:
    spec = sweep("TP=8 spec", 8, {1: 4.0, 8: 7.0, 32: 13.0, 64: 21.0}, args=("--spec", "x"))
    lines = lines_of(sweep("TP=8", 8, TP8), spec)
    assert lines[-1] == (
        "TP=8 spec pays up to concurrency 8 (TPOT 1.50 x shorter at 1, 1.14 x at 8); from 32 on it does not."
    )
    never = sweep("TP=8 slow", 8, {1: 7.0, 8: 9.0}, args=("--slow",))
    assert lines_of(sweep("TP=8", 8, TP8), never)[-1] == "TP=8 slow pays at no measured concurrency."


def test_a_speed_that_is_reached_again_by_chance_does_not_count() -> None:
    (line,) = lines_of(sweep("TP=4", 4, {1: 19.0, 2: 21.0, 4: 19.5}))
    assert line == "For 50 tok/s per user (TPOT at most 20.0 ms): TP=4 up to concurrency 1 (13 tok/s per GPU)."


def test_points_that_failed_or_were_cut_short_or_are_of_an_open_loop_say_nothing() -> None:
    points = [make_point(failed=1), make_point(complete=False), make_point(concurrency=None, request_rate=1.0)]
    assert advice(points) == []

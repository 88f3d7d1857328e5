"""The search for arrivals that overtake loads, on instructions as cuobjdump lists them."""

from __future__ import annotations

from machine_code import ARRIVAL, overtaken_loads

NONE = 7
LOAD, LOAD_MATRIX = "LDS.64 R38, [R38+0x1b800]", "@!P2 LDSM.16.M88.4 R32, [R50]"
ARRIVE = f"@!P0 {ARRIVAL} RZ, [UR8], RZ"


def listing(*instructions: tuple[str, int, int]) -> list[str]:
    """Of (text, counter of what it writes, counters that it waits for as bits)."""
    lines = ["\t\tFunction : f"]
    for place, (text, written, waited) in enumerate(instructions):
        lines.append(f"        /*{place * 16:04x}*/                   {text} ;   /* 0x{0:016x} */")
        lines.append(f"{' ' * 60}/* 0x{(written << 5 | NONE << 8 | waited << 11) << 41:016x} */")
    return lines


def test_an_arrival_before_the_use_of_a_load_is_named() -> None:
    found = list(overtaken_loads(listing((LOAD, 1, 0), (ARRIVE, NONE, 0), ("FFMA R1, R2, R38, R1", NONE, 0b10))))
    assert found == [f"f at 0010: {ARRIVE} before 0000: {LOAD}"]


def test_a_wait_for_all_counters_makes_it_safe() -> None:
    loads = [(LOAD, 1, 0), (LOAD_MATRIX, 4, 0)]
    wait = ("ISETP.NE.AND P0, PT, R38, R2, PT", NONE, 0b10010)
    assert not list(overtaken_loads(listing(*loads, wait, (ARRIVE, NONE, 0))))
    assert not list(overtaken_loads(listing(*loads, (ARRIVE, NONE, 0b10010))))
    one = ("ISETP.NE.AND P0, PT, R38, R2, PT", NONE, 0b00010)
    assert len(list(overtaken_loads(listing(*loads, one, (ARRIVE, NONE, 0))))) == 1


def test_what_is_not_from_shared_memory_or_after_the_arrival_does_not_count() -> None:
    other = [("LDG.E.128 R20, desc[UR20][R44.64]", 1, 0), ("LDC R1, c[0x0][0x28]", 2, 0)]
    assert not list(overtaken_loads(listing(*other, (ARRIVE, NONE, 0), (LOAD, 3, 0))))


def test_functions_are_apart() -> None:
    assert not list(overtaken_loads([*listing((LOAD, 1, 0)), *listing((ARRIVE, NONE, 0))]))

"""What stands is spared by the collector, and what comes after is collected."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from tpserve.proto.garbage import spare_standing_objects


class Cycle:
    def __init__(self) -> None:
        self.itself = self


@pytest.fixture
def collector() -> Iterator[None]:
    thresholds = gc.get_threshold()
    yield
    gc.unfreeze()
    gc.set_threshold(*thresholds)


@pytest.mark.usefixtures("collector")
def test_what_stands_is_spared_and_what_comes_later_is_not() -> None:
    standing, garbage = Cycle(), weakref.ref(Cycle())
    spare_standing_objects()
    assert garbage() is None  # what had died already is not kept for ever
    assert not any(each is standing for each in gc.get_objects())
    assert gc.get_freeze_count() > 1000
    later = weakref.ref(Cycle())
    gc.collect()
    assert later() is None

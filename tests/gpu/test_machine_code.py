"""No kernel gives shared memory back before it has what it read there."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from machine_code import ARRIVAL, overtaken_loads

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]


def test_no_arrival_overtakes_a_load(kernel_library: Path) -> None:
    if (cuobjdump := shutil.which("cuobjdump")) is None:
        pytest.skip("there is no cuobjdump, which comes with CUDA's toolkit")
    command = [cuobjdump, "-sass", str(kernel_library)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert sum(ARRIVAL in line for line in listing) > 100
    assert not list(overtaken_loads(listing))

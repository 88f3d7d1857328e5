from __future__ import annotations

import pytest
import tvm  # noqa: F401  # whole, before a test of the worker loads the runtime alone

from rank_group import Artifacts


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    """Compiles into the cache that all tests of this session share, so that kernels are built once."""
    return Artifacts(tmp_path_factory.getbasetemp() / "artifacts")

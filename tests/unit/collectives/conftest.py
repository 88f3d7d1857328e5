from __future__ import annotations

import pytest

from shared_cache import as_cache, new_home
from tpserve.compile.artifact import kernel_library
from tpserve.compile.cache import CachePolicy


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The kernel library, which has the collectives in shared memory."""
    with as_cache(new_home(tmp_path_factory.mktemp("home"))):
        return str(kernel_library("llvm", CachePolicy.ON))

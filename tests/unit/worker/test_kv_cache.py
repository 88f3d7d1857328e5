"""Pages of one rank."""

from __future__ import annotations

import numpy as np

from tpserve.proto.manifest import KVLayout
from tpserve.worker.kv_cache import KVCache


def test_layers_are_zeroed_aligned_and_of_the_stated_size() -> None:
    layout = KVLayout(page_size=16, num_layers=3, num_kv_heads=2, head_dim=16, dtype="float32")
    for num_pages in (5, 4000):
        layers = [np.from_dlpack(layer) for layer in KVCache(layout, num_pages).layers]
        assert [layer.shape for layer in layers] == [(num_pages, 2, 2, 256)] * 3
        assert all(layer.ctypes.data % 64 == 0 for layer in layers)
        assert sum(layer.nbytes for layer in layers) == num_pages * layout.page_bytes
        assert not any(layer.any() for layer in layers)

"""KV pages of one rank."""

from __future__ import annotations

from typing import Any

import numpy as np

from tpserve.proto.manifest import KVLayout
from tpserve.worker.arrays import aligned_zeros, as_tensor


class KVCache:
    """Pages by layer, as the graph takes them; which page holds what is the coordinator's business.

    Attributes
    ----------
    layers : list of tensor (num_pages, num_kv_heads, 2, head_dim * page_size)
    """

    def __init__(self, layout: KVLayout, num_pages: int) -> None:
        shape = (layout.num_layers, num_pages, layout.num_kv_heads, 2, layout.head_dim * layout.page_size)
        self._pages = aligned_zeros(shape, np.dtype(layout.dtype))
        self.layers: list[Any] = [as_tensor(layer) for layer in self._pages]

"""KV pages of one rank on its GPU, and what attention to them needs besides."""

from __future__ import annotations

from typing import Any

import cupy
import tvm_ffi

from tpserve.proto.manifest import KVLayout
from tpserve.worker.device_weights import BITS, as_device_tensor


def device_pages(layout: KVLayout, num_pages: int) -> list[Any]:
    """Return zeroed pages by layer on the current device: (num_pages, num_kv_heads, 2, head_dim * page_size) each."""
    shape = layout.layer_shape(num_pages)
    return [as_device_tensor(cupy.zeros(shape, BITS[layout.dtype]), layout.dtype) for _ in range(layout.num_layers)]


def attention_workspace(num_floats: int) -> Any:
    """Return (num_floats,) float32 for attention's partial sums, whose places are empty at first: all bits are set."""
    return tvm_ffi.from_dlpack(cupy.full(max(1, num_floats), 0xFFFFFFFF, cupy.uint32).view(cupy.float32))

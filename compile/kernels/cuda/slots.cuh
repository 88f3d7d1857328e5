// Places in memory where one block leaves 16 bytes of sums for another: they are their own flags. An empty place holds the
// word 0xffffffff, a NaN that no arithmetic makes, and whoever takes what has come empties the place again. So nobody
// fences or counts, and the wait is one trip through the L2 cache.
//
// Whoever waits must know that the others run, or will run without it.
#pragma once

#include "common.cuh"

namespace tpserve::cuda {

__device__ __forceinline__ uint4 load_slot(const float4* p) {
  uint4 v;
  asm volatile("ld.relaxed.gpu.global.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p)
               : "memory");
  return v;
}

__device__ __forceinline__ void store_slot(float4* p, uint4 v) {
  asm volatile("st.relaxed.gpu.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}

__device__ __forceinline__ void store_slot(float4* p, float x, float y, float z, float w) {
  store_slot(p, make_uint4(__float_as_uint(x), __float_as_uint(y), __float_as_uint(z), __float_as_uint(w)));
}

__device__ __forceinline__ void empty_slot(float4* p) { store_slot(p, make_uint4(~0u, ~0u, ~0u, ~0u)); }

__device__ __forceinline__ bool is_empty(uint4 v) { return v.x == ~0u || v.y == ~0u || v.z == ~0u || v.w == ~0u; }

}  // namespace tpserve::cuda

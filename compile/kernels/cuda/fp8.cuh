// e4m3 codes of floats and back; plain functions, so that the host's tests run them too.
#pragma once

#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>

namespace tpserve::cuda {

constexpr float kFp8Max = 448.0f;

/// Rounded to nearest even, clipped to +-448; NaN stays NaN. The first is in the low byte.
__host__ __device__ __forceinline__ uint32_t pack2_fp8(float a, float b) {
  return __nv_cvt_float2_to_fp8x2(make_float2(a, b), __NV_SATFINITE, __NV_E4M3);
}

__host__ __device__ __forceinline__ uint32_t pack4_fp8(float a, float b, float c, float d) {
  return pack2_fp8(a, b) | pack2_fp8(c, d) << 16;
}

/// Two codes, the first in the low byte, as float16: exact; NaN stays NaN.
__host__ __device__ __forceinline__ uint32_t widen2(uint32_t codes) {
  const __half2_raw h = __nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(codes), __NV_E4M3);
  return h.x | static_cast<uint32_t>(h.y) << 16;
}

}  // namespace tpserve::cuda

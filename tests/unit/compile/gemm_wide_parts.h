// Stands in for gemm_parts.cuh in gemm_wide.cpp: what gemm_silu_parts.h has, and slots of partial sums.
#pragma once

#include <mutex>
#include <thread>

#define GemmParams NarrowParams  // that and the scales are other ones here
#define ChannelScales NarrowScales
#include "gemm_silu_parts.h"
#undef GemmParams
#undef ChannelScales

#include "gemm_plan.cuh"

struct uint2 {
  uint32_t x, y;
};
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
struct uint4 {
  uint32_t x, y, z, w;
};
using float4 = uint4;
inline float __uint_as_float(uint32_t bits) { return float_of(bits); }
inline float __ldcg(const float* p) { return *p; }

inline float __shfl_sync(unsigned, float x, int lane) {
  return float_of(exchanged(bits_of(x), [&](uint32_t(&words)[32]) { return words[lane]; }));
}
inline uint32_t __shfl_sync(unsigned, uint32_t x, int lane) {
  return exchanged(x, [&](uint32_t(&words)[32]) { return words[lane]; });
}

namespace tpserve::cuda {

struct GemmParams : NarrowParams {
  WidePlan plan;
  bool out_float32;
};

template <bool kByChannel, bool kByToken>
struct ChannelScales {
  float scale[2] = {1.0f, 1.0f}, bias[2] = {0.0f, 0.0f};
  ChannelScales(const GemmParams& p, int channel) {
    for (int h = 0; h < 2; ++h) {
      const int at = channel + threadIdx.x % 32 / 4 + h * 8;
      if (at >= p.N) continue;
      if (kByChannel) scale[h] = p.channel_scale[at];
      if (p.bias != nullptr) bias[h] = p.bias[at];
    }
  }
  void apply(const float* sums, float2 of_tokens, float (&values)[4]) const {
    for (int j = 0; j < 4; ++j) {
      values[j] = std::fma(sums[j], scale[j / 2] * (j % 2 ? of_tokens.y : of_tokens.x), bias[j / 2]);
    }
  }
};

inline std::mutex slots_mutex;  // 16 bytes come and go at once
inline uint4 load_slot(const float4* p) {
  std::lock_guard lock(slots_mutex);
  return *p;
}
inline void store_slot(float4* p, float x, float y, float z, float w) {
  std::lock_guard lock(slots_mutex);
  *p = {bits_of(x), bits_of(y), bits_of(z), bits_of(w)};
}
inline void empty_slot(float4* p) {
  std::lock_guard lock(slots_mutex);
  *p = {~0u, ~0u, ~0u, ~0u};
}
inline bool is_empty(uint4 v) { return v.x == ~0u || v.y == ~0u || v.z == ~0u || v.w == ~0u; }

template <int kRegisters>
void add_partial(float (&sums)[kRegisters], int b, uint4 v, float4* place) {
  while (is_empty(v)) std::this_thread::yield(), v = load_slot(place);
  empty_slot(place);
  const uint32_t words[] = {v.x, v.y, v.z, v.w};
  for (int i = 0; i < 4; ++i) sums[b * 4 + i] += float_of(words[i]);
}

}  // namespace tpserve::cuda

#include "token_scales.cuh"

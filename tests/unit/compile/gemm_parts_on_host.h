// Stands in for gemm_parts.cuh and slots.cuh on the host: a thread for each of the warp group's, warps that exchange
// through memory.
#pragma once

#include <algorithm>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <thread>

#include "gemm_plan.cuh"

#define __device__
#define __forceinline__ inline
#define __shared__ static

struct float2 {
  float x, y;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
struct uint2 {
  uint32_t x, y;
};
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
struct uint4 {
  uint32_t x, y, z, w;
};
using float4 = uint4;
inline float __ldg(const float* p) { return *p; }
template <typename T>
T __ldcg(const T* p) {
  return *p;
}
inline float __fdividef(float x, float y) { return x / y; }

struct Thread {
  int x;
};
inline thread_local Thread threadIdx;
inline std::barrier<> warp_barriers[4]{std::barrier<>(32), std::barrier<>(32), std::barrier<>(32), std::barrier<>(32)};
inline std::barrier<> group_barrier(128);
inline uint32_t exchange[4][32];

inline void warp_meets() { warp_barriers[threadIdx.x / 32].arrive_and_wait(); }

/// Gives this lane's word to its warp and calls `take` with all of them.
template <typename Take>
auto exchanged(uint32_t word, Take take) {
  uint32_t(&words)[32] = exchange[threadIdx.x / 32];
  words[threadIdx.x % 32] = word;
  warp_meets();
  const auto result = take(words);
  warp_meets();
  return result;
}

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline float __shfl_xor_sync(unsigned, float x, int mask) {
  return float_of(exchanged(bits_of(x), [&](uint32_t(&words)[32]) { return words[threadIdx.x % 32 ^ mask]; }));
}

inline float __uint_as_float(uint32_t bits) { return float_of(bits); }

inline float __shfl_sync(unsigned, float x, int lane) {
  return float_of(exchanged(bits_of(x), [&](uint32_t(&words)[32]) { return words[lane]; }));
}
inline uint32_t __shfl_sync(unsigned, uint32_t x, int lane) {
  return exchanged(x, [&](uint32_t(&words)[32]) { return words[lane]; });
}

namespace tpserve::cuda {

using std::fabs;
inline float fabsf(float x) { return std::fabs(x); }
inline float fast_exp2(float x) { return std::exp2(x); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float fmaxf(float a, float b) { return std::fmax(a, b); }

using bf16 = uint16_t;
struct fp8 {
  uint8_t code;
};
constexpr float kFp8Max = 448.0f;

/// Kernels that send tiles to peers; their stage is tested with them.
using std::max, std::min;
inline uint4 sendable(uint4 v) { return v; }
inline void store_peer(uint4* p, uint4 v) { *p = v; }
template <int kThreads>
void meet_at(int) {
  static_assert(kThreads == 128);
  group_barrier.arrive_and_wait();
}
struct PushEpoch {
  unsigned wait() { return 0; }
};

}  // namespace tpserve::cuda

#include "peer_tile.cuh"

namespace tpserve::cuda {

struct GemmParams {
  const float *channel_scale, *token_scale, *bias;
  void* out;
  float* out_scale;
  int M, N, padded_tokens;
  WidePlan plan;
  bool out_float32;
  PushTarget push;
};

/// As the device: element 2 (lane % 4) + i of row lane / 4 goes to row 2 (lane % 4) + i.
inline uint32_t transpose_8x8(uint32_t v) {
  return exchanged(v, [](uint32_t(&words)[32]) {
    const int row = threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
    const auto element = [&](int r, int c) { return words[r * 4 + c / 2] >> c % 2 * 16 & 0xFFFF; };
    return element(column, row) | element(column + 1, row) << 16;
  });
}

template <int kBarrier, int kThreads>
void meet() {
  static_assert(kBarrier > 2 && kThreads == 128);
  group_barrier.arrive_and_wait();
}

inline uint32_t bf16_bits(float x) {
  const uint32_t bits = bits_of(x);
  if (std::isnan(x)) return 0x7FFF;
  return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}
inline uint32_t pack2(float a, float b) { return bf16_bits(a) | bf16_bits(b) << 16; }
inline float low_half(uint32_t w) { return float_of(w << 16); }
inline float high_half(uint32_t w) { return float_of(w & 0xFFFF0000u); }

inline uint32_t fp8_code(float x) {
  if (std::isnan(x)) return 0x7F;
  const uint32_t sign = std::signbit(x) ? 0x80 : 0;
  const float size = std::min(std::fabs(x), kFp8Max);
  if (size < 0x1p-6f) return sign | static_cast<uint32_t>(std::nearbyint(size * 0x1p9f));
  int exponent;
  std::frexp(size, &exponent);  // size = f * 2^exponent, f in [0.5, 1)
  const float steps = std::nearbyint(std::ldexp(size, 4 - exponent));  // 8 to 16
  return sign | static_cast<uint32_t>((exponent + 5) * 8 + static_cast<int>(steps));
}
inline uint32_t pack2_fp8(float a, float b) { return fp8_code(a) | fp8_code(b) << 8; }
inline uint32_t pack4_fp8(float a, float b, float c, float d) { return pack2_fp8(a, b) | pack2_fp8(c, d) << 16; }

inline std::mutex slots_mutex;  // 16 bytes come and go at once
inline bool is_empty(uint4 v) { return v.x == ~0u || v.y == ~0u || v.z == ~0u || v.w == ~0u; }
inline uint4 load_slot(const float4* p) {
  std::unique_lock lock(slots_mutex);
  const uint4 v = *p;
  lock.unlock();
  if (is_empty(v)) std::this_thread::yield();
  return v;
}
inline void store_slot(float4* p, float x, float y, float z, float w) {
  std::lock_guard lock(slots_mutex);
  *p = {bits_of(x), bits_of(y), bits_of(z), bits_of(w)};
}
inline void empty_slot(float4* p) {
  std::lock_guard lock(slots_mutex);
  *p = {~0u, ~0u, ~0u, ~0u};
}

}  // namespace tpserve::cuda

#include "gemm_tile.cuh"

// Stands in for gemm_parts.cuh on the host: a thread for each of the warp group's, warps that exchange through memory.
#pragma once

#include <algorithm>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>

#define __device__
#define __forceinline__ inline
#define __shared__ static

struct float2 {
  float x, y;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float __expf(float x) { return std::exp(x); }

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

namespace tpserve::cuda {

using std::fabs;
inline float fabsf(float x) { return std::fabs(x); }
inline float fmaxf(float a, float b) { return std::fmax(a, b); }

using bf16 = uint16_t;
struct fp8 {
  uint8_t code;
};
constexpr float kFp8Max = 448.0f;

struct GemmParams {
  const float *channel_scale, *token_scale, *bias;
  void* out;
  float* out_scale;
  int M, N, padded_tokens;
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

template <bool kByChannel, bool kByToken>
struct ChannelScales {
  int channel;
  ChannelScales(const GemmParams&, int first) : channel(first + threadIdx.x % 32 / 4) {}
  void apply(const GemmParams& p, const float* sums, int m, float (&values)[4]) const {
    for (int j = 0; j < 4; ++j) {
      const int n = channel + j / 2 * 8;
      float factor = kByChannel ? p.channel_scale[n] : 1.0f;
      if (kByToken) factor *= m + j % 2 < p.M ? p.token_scale[m + j % 2] : 0.0f;
      values[j] = std::fma(sums[j], factor, p.bias == nullptr ? 0.0f : p.bias[n]);
    }
  }
};

}  // namespace tpserve::cuda

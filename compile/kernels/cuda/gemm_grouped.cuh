// A stage of the GEMM with grouped scales: 256 e4m3 of K in groups, each with a scale for every token.
#pragma once

#include "hopper.cuh"
#include "wgmma.cuh"

namespace tpserve::cuda {

/// `kGroup`: elements of K that share a scale, 128, 64 or 32.
template <int kTokens, int kGroup>
struct GroupedStage {
  static_assert(kGroup == 128 || kGroup == 64 || kGroup == 32);
  static constexpr int kRegisters = kTokens / 2, kVectors = kTokens / 8;
  static constexpr int kGroups = 256 / kGroup, kProducts = kGroup / 32;  // of a stage, of a group
  // The second group's products run while the first one's are scaled, where that takes long enough to matter.
  static constexpr bool kOverlap = kTokens == 128;
  static_assert(!kOverlap || kGroups == 2);
  // Groups whose products run at once, each with sums of its own. More of them would take registers that the kernel after
  // this one needs to start beside it; memory is slower than the products by far.
  static constexpr int kFitting = kRegisters <= 8 ? 64 / kRegisters : 2;
  static constexpr int kAtOnce = kFitting < kGroups ? kFitting : kGroups;
  static_assert(kGroups % kAtOnce == 0);

  /// sums += the product of each group x its scales, group after group; then gives the stage back.
  ///
  /// `a`, `b`: descriptors of 64 channels and kTokens tokens, two tiles of 128 bytes of K. `scales`: (kGroups, padded) in
  /// shared memory, padded <= kTokens; what a thread reads behind them is of tokens that are not there.
  static __device__ __forceinline__ void add(float (&sums)[kRegisters], uint64_t a, uint64_t b, const float* scales,
                                             int padded, uint64_t* empty) {
    const float2* const mine = reinterpret_cast<const float2*>(scales) + threadIdx.x % 4;  // tokens 2 (lane % 4) and the next
    float fresh[kAtOnce][kRegisters];
    if constexpr (kOverlap) {
      wgmma_fence();
      multiply(fresh[0], a, b, 0);
      wgmma_commit();
      multiply(fresh[1], a, b, 1);
      wgmma_commit();
      wgmma_wait<1>();
      add_scaled(sums, fresh[0], mine);
      wgmma_wait<0>();
      give_back(empty, add_scaled(sums, fresh[1], mine + padded / 2));
    } else {  // the scales are asked for before the products, whose own reads would hold them up
#pragma unroll 1  // unrolled, addresses of all rounds would take registers
      for (int first = 0; first < kGroups; first += kAtOnce) {
        float2 scale[kAtOnce][kVectors];
#pragma unroll
        for (int g = 0; g < kAtOnce; ++g) {
#pragma unroll
          for (int i = 0; i < kVectors; ++i) scale[g][i] = mine[(first + g) * padded / 2 + i * 4];
        }
        wgmma_fence();
#pragma unroll
        for (int g = 0; g < kAtOnce; ++g) multiply(fresh[g], a, b, first + g);
        wgmma_commit();
        wgmma_wait<0>();
#pragma unroll
        for (int g = 0; g < kAtOnce; ++g) keep(fresh[g]);
        if (first + kAtOnce == kGroups) give_back(empty, words_of(scale));
#pragma unroll
        for (int g = 0; g < kAtOnce; ++g) {
#pragma unroll
          for (int i = 0; i < kRegisters; ++i) {
            sums[i] = fmaf(fresh[g][i], i % 2 == 0 ? scale[g][i / 4].x : scale[g][i / 4].y, sums[i]);
          }
        }
      }
    }
  }

 private:
  /// fresh = product of a group.
  static __device__ __forceinline__ void multiply(float (&fresh)[kRegisters], uint64_t a, uint64_t b, int group) {
#pragma unroll
    for (int k = 0; k < kProducts; ++k) {
      const int at = group * kProducts + k, tile = at / 4, step = at % 4 * 2;
      Wgmma<fp8, kTokens>::run(fresh, a + tile * (8192 / 16) + step, b + tile * (kTokens * 8) + step, k != 0);
    }
  }

  /// Products are in these registers only from here on.
  static __device__ __forceinline__ void keep(float (&fresh)[kRegisters]) {
#pragma unroll
    for (int i = 0; i < kRegisters; ++i) asm volatile("" : "+f"(fresh[i])::"memory");
  }

  /// Returns the words of all scales together.
  static __device__ __forceinline__ uint32_t add_scaled(float (&sums)[kRegisters], float (&fresh)[kRegisters],
                                                        const float2* mine) {
    keep(fresh);
    uint32_t words = 0;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const float2 scale = mine[i * 4];
      words |= __float_as_uint(scale.x);
#pragma unroll
      for (int j = 0; j < 4; ++j) sums[i * 4 + j] = fmaf(fresh[i * 4 + j], j % 2 == 0 ? scale.x : scale.y, sums[i * 4 + j]);
    }
    return words;
  }

  /// One word of each load, together.
  static __device__ __forceinline__ uint32_t words_of(const float2 (&scale)[kAtOnce][kVectors]) {
    uint32_t words = 0;
#pragma unroll
    for (int g = 0; g < kAtOnce; ++g) {
#pragma unroll
      for (int i = 0; i < kVectors; ++i) words |= __float_as_uint(scale[g][i].x);
    }
    return words;
  }

  /// One arrival a warp, after all of its lanes have read their scales, which `words` are of.
  static __device__ __forceinline__ void give_back(uint64_t* empty, uint32_t words) {
    await_loaded(words);
    __syncwarp();
    if (threadIdx.x % 32 == 0) barrier_arrive(empty);
  }
};

}  // namespace tpserve::cuda

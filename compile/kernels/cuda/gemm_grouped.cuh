// A stage of the GEMM with grouped scales: two groups of 128 e4m3 of K, each with a scale for every token.
#pragma once

#include "wgmma.cuh"

namespace tpserve::cuda {

template <int kTokens>
struct GroupedStage {
  static constexpr int kRegisters = kTokens / 2, kVectors = kTokens / 8;
  static constexpr int kScaleBytes = 2 * kTokens * sizeof(float);
  // The second group's products run while the first one's are scaled, where that takes long enough to matter.
  static constexpr bool kOverlap = kTokens == 128;

  /// sums += product of group 0 x its scales + product of group 1 x its scales; then gives the stage back.
  ///
  /// `a`, `b`: descriptors of 64 channels and kTokens tokens, a tile of 128 bytes of K for each group. `scales`: (2, padded)
  /// in shared memory, padded <= kTokens; what a thread reads behind them is of tokens that are not there.
  static __device__ __forceinline__ void add(float (&sums)[kRegisters], uint64_t a, uint64_t b, const float* scales,
                                             int padded, uint64_t* empty) {
    const float2* const mine = reinterpret_cast<const float2*>(scales) + threadIdx.x % 4;  // tokens 2 (lane % 4) and the next
    float fresh[2][kRegisters];
    wgmma_fence();
#pragma unroll
    for (int g = 0; g < 2; ++g) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        Wgmma<fp8, kTokens>::run(fresh[g], a + g * (8192 / 16) + k * 2, b + g * (kTokens * 8) + k * 2, k != 0);
      }
      if (kOverlap || g == 1) wgmma_commit();
    }
    if constexpr (kOverlap) {
      wgmma_wait<1>();
      add_scaled(sums, fresh[0], mine);
      wgmma_wait<0>();
      add_scaled(sums, fresh[1], mine + padded / 2);
      give_back(empty);
    } else {  // the scales are read while the products run, and the stage is free once these end
      float2 scale[2][kVectors];
#pragma unroll
      for (int g = 0; g < 2; ++g) {
#pragma unroll
        for (int i = 0; i < kVectors; ++i) scale[g][i] = mine[g * padded / 2 + i * 4];
      }
      wgmma_wait<0>();
      keep(fresh[0]), keep(fresh[1]);
      give_back(empty);
#pragma unroll
      for (int i = 0; i < kRegisters; ++i) {
        sums[i] = fmaf(fresh[0][i], i % 2 == 0 ? scale[0][i / 4].x : scale[0][i / 4].y, sums[i]);
        sums[i] = fmaf(fresh[1][i], i % 2 == 0 ? scale[1][i / 4].x : scale[1][i / 4].y, sums[i]);
      }
    }
  }

 private:
  /// Products are in these registers only from here on.
  static __device__ __forceinline__ void keep(float (&fresh)[kRegisters]) {
#pragma unroll
    for (int i = 0; i < kRegisters; ++i) asm volatile("" : "+f"(fresh[i])::"memory");
  }

  static __device__ __forceinline__ void add_scaled(float (&sums)[kRegisters], float (&fresh)[kRegisters],
                                                    const float2* mine) {
    keep(fresh);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const float2 scale = mine[i * 4];
#pragma unroll
      for (int j = 0; j < 4; ++j) sums[i * 4 + j] = fmaf(fresh[i * 4 + j], j % 2 == 0 ? scale.x : scale.y, sums[i * 4 + j]);
    }
  }

  /// One arrival a warp, after all of its lanes have read their scales.
  static __device__ __forceinline__ void give_back(uint64_t* empty) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) barrier_arrive(empty);
  }
};

}  // namespace tpserve::cuda

// What the kernel of a whole MLP takes (mlp_kernel.cuh).
#pragma once

#include "gemm_cursor.cuh"
#include "gemm_parts.cuh"

namespace tpserve::cuda {

struct MlpParams {
  PackedWeights gate_up, down;
  const float *gate_up_scale, *down_scale;  // of channels
  const float* norms;                       // scales (K / 64, 8), then squares (K / 64, 8)
  const bf16* residual;
  const float* norm_weight;
  float eps;
  bf16* stream;
  fp8* out;
  float* out_norms;   // as `norms`
  float4* letters;    // [block][warp group][token][3]: activations from the pair's other block
  float4* parts;      // [tile of down][pair][two tokens][32]
  int M, K, tiles;    // tokens, hidden size, K / 64
  int stages;         // of the ring
};

/// What it takes. Two warp groups multiply; one warp fetches weights, one tokens.
struct MlpShape {
  static constexpr int kTokens = 8, kThreads = 320, kStages = 12;
  // Stages on their way, of a block that has begun while the kernels before still run, for these are in a hurry; and until
  // the end, for blocks that begin late have all of their weights before them.
  static constexpr int kPace = 3, kLatePace = 8;
  static constexpr int kLeastHidden = 2048, kMostHidden = 4096, kBudget = 222 * 1024;

  static constexpr int shared_bytes(int hidden, int stages) {
    return 1024 + stages * kStageBytes + hidden * kTokens + hidden / 64 * 2 * kTokens * 4 + kTokens * 128;
  }
  /// Stages of a ring that fits.
  static constexpr int stages(int hidden) {
    int stages = kStages;
    while (shared_bytes(hidden, stages) > kBudget) --stages;
    return stages;
  }
};

}  // namespace tpserve::cuda

// Scales of e4m3 tokens at the end of a GEMM's tile. `Params` is GemmParams; a test on the host has its own.
#pragma once

namespace tpserve::cuda {

/// Scales of kTokens tokens, register r of lane l having that of token 32 r + l. All are asked for at once: loads between
/// the stores of a tile would each wait for L2, since the compiler keeps their order.
template <int kTokens>
struct TokenScales {
  float held[(kTokens + 31) / 32];

  template <typename Params>
  __device__ __forceinline__ TokenScales(const Params& p, int token) {
#pragma unroll
    for (int r = 0; r < (kTokens + 31) / 32; ++r) {
      const int at = r * 32 + threadIdx.x % 32;
      held[r] = at < kTokens && token + at < p.M ? __ldcg(p.token_scale + token + at) : 0.0f;
    }
  }
  /// Of the tokens 8 b + column and the next. By all lanes.
  __device__ __forceinline__ float2 pair(int b, int column) const {
    const int lane = b % 4 * 8 + column;
    return make_float2(__shfl_sync(~0u, held[b / 4], lane), __shfl_sync(~0u, held[b / 4], lane + 1));
  }
};

}  // namespace tpserve::cuda

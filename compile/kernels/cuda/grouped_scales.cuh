// Scales of e4m3 activations by token and group of 128 elements: (K / 256, 2, padded tokens) float32, so that a GEMM's
// stage, 256 bytes of K, has those of all tokens in one piece. Of more than kMaxGroupedTokens tokens each has one scale
// for its whole row, which stands at the token's place in the first group.
//
// What gate_up's GEMM gives of few tokens has a scale for each 32 elements, for that is what one of its tiles holds of a
// token. The tensor of its scales has room for these, (K / 256, 8, padded tokens); of more tokens those of 128 elements
// stand at its head. And what a product gives of a norm that it begins (gemm_norm.cuh) has one for each 64, all that its
// tiles hold of a token. Plain functions, so that the host's tests run them too.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define TPSERVE_SCALES __host__ __device__ __forceinline__
#else
#define TPSERVE_SCALES inline
#endif

namespace tpserve::cuda {

constexpr int kGroupSize = 128;
constexpr int kMaxGroupedTokens = 128;
constexpr int kSiluGroupSize = 32;
constexpr int kNormGroupSize = 64;
constexpr int kMaxSiluGroupedTokens = 16;  // of more, the next GEMM loses more by small groups than a kernel costs

/// Places of tokens in a group: a piece of two groups is whole 16-byte words.
TPSERVE_SCALES int64_t padded_tokens(int64_t num_tokens) { return (num_tokens + 7) / 8 * 8; }

/// Elements of SiLU(gate) * up that share a scale: by the number of tokens alone, so that the GEMM which takes them knows
/// what the one before gave.
TPSERVE_SCALES int silu_group_size(int64_t num_tokens) {
  return num_tokens <= kMaxSiluGroupedTokens ? kSiluGroupSize : kGroupSize;
}

/// Where the scale of a token's group stands, of either size.
TPSERVE_SCALES int64_t scale_at(int64_t group, int64_t token, int64_t num_tokens) {
  return group * padded_tokens(num_tokens) + token;
}

}  // namespace tpserve::cuda

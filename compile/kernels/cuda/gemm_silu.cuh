// The end of gate_up's GEMM: SiLU(gate) * up of a finished tile, so that no kernel runs between this GEMM and the next: of
// bf16 tokens always, of e4m3 tokens up to kMaxSiluGroupedTokens, whose groups a tile has whole. 64 channels are 32 activations in the
// order of `silu.cuh`. Both ways of making an activation, this one and the product followed by elementwise.cu's kernels,
// give the same bits.
#pragma once

#include "gemm_parts.cuh"
#include "grouped_scales.cuh"
#include "silu.cuh"

namespace tpserve::cuda {

/// Of two tokens, from scaled sums in the order of wgmma.cuh: gate of both, then up.
__device__ __forceinline__ float2 activations_of(const float (&values)[4]) {
  // Gate and up as the plain product stores them.
  const uint32_t gate = pack2(values[0], values[1]), up = pack2(values[2], values[3]);
  return {silu(low_half(gate)) * low_half(up), silu(high_half(gate)) * high_half(up)};
}

/// (M, N / 2) bf16 from a warp's 16 channels; `activation` is its first of eight, `values` hold kTokens / 4 of a thread.
template <int kTokens>
__device__ __forceinline__ void store_bf16(const GemmParams& p, const float (&values)[kTokens / 4], int activation) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int b = 0; b < kTokens / 8; ++b) {  // to pairs of activations of one token
    const uint32_t pair = transpose_8x8(pack2(values[b * 2], values[b * 2 + 1]));
    const int m = b * 8 + lane / 4;
    if (m < p.M) {
      bf16* const row = static_cast<bf16*>(p.out) + static_cast<int64_t>(m) * (p.N / 2);
      *reinterpret_cast<uint32_t*>(row + activation + lane % 4 * 2) = pair;
    }
  }
}

/// (M, N / 2) e4m3 and (N / 64, padded tokens) scales: a tile has one group of every token. By the first warp group, whole.
template <int kTokens>
__device__ __forceinline__ void store_groups(const GemmParams& p, const float (&values)[kTokens / 4], int tile) {
  // [tile's parity][warp][token]. A warp that is at its next tile but one has passed that between, whose barrier all warps
  // reach after they have read this one's: a block's tiles are one after the other.
  __shared__ float2 largest_of_warp[2][4][kTokens / 2];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float largest[kTokens / 4];  // of a thread's tokens, 8 b + 2 (lane % 4) and the next
#pragma unroll
  for (int i = 0; i < kTokens / 4; ++i) {
    largest[i] = fabsf(values[i]);
#pragma unroll
    for (int offset = 4; offset < 32; offset *= 2) {
      largest[i] = fmaxf(largest[i], __shfl_xor_sync(~0u, largest[i], offset));
    }
  }
  float2(&places)[4][kTokens / 2] = largest_of_warp[tile % 2];
  if (lane < 4) {
#pragma unroll
    for (int b = 0; b < kTokens / 8; ++b) places[warp][b * 4 + lane] = make_float2(largest[b * 2], largest[b * 2 + 1]);
  }
  meet<3, 128>();
#pragma unroll
  for (int b = 0; b < kTokens / 8; ++b) {
    float2 most = make_float2(1e-12f, 1e-12f);
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const float2 other = places[w][b * 4 + lane % 4];
      most.x = fmaxf(most.x, other.x), most.y = fmaxf(most.y, other.y);
    }
    const uint32_t codes = pack2_fp8(values[b * 2] * (kFp8Max / most.x), values[b * 2 + 1] * (kFp8Max / most.y));
    const uint32_t pair = transpose_8x8((codes & 0xFF) | (codes & 0xFF00) << 8);  // of activations of one token
    const int m = b * 8 + lane / 4;
    if (m < p.M) {
      fp8* const row = static_cast<fp8*>(p.out) + static_cast<int64_t>(m) * (p.N / 2);
      *reinterpret_cast<uint16_t*>(row + tile * 32 + warp * 8 + lane % 4 * 2) =
          static_cast<uint16_t>((pair & 0xFF) | (pair >> 8 & 0xFF00));
    }
    if (warp == 0 && lane < 4) {
      const int first = b * 8 + lane * 2;
      float* const scale = p.out_scale + static_cast<int64_t>(tile) * p.padded_tokens + first;
      if (first < p.M) scale[0] = most.x / kFp8Max;
      if (first + 1 < p.M) scale[1] = most.y / kFp8Max;
    }
  }
}

/// The activations of a finished tile of 64 channels, all of them present: bf16, or e4m3 with grouped scales, as the tokens.
/// `sums` of the first warp group, which calls it whole.
template <bool kFp8, int kTokens, typename Scales>
__device__ __forceinline__ void write_silu(const GemmParams& p, const float (&sums)[kTokens / 2], int tile,
                                           const Scales& scales) {
  const int warp = threadIdx.x / 32;
  float activations[kTokens / 4];
#pragma unroll
  for (int b = 0; b < kTokens / 8; ++b) {
    float values[4];
    scales.apply(sums, b, values);
    const float2 two = activations_of(values);
    activations[b * 2] = two.x, activations[b * 2 + 1] = two.y;
  }
  if constexpr (kFp8) {
    store_groups<kTokens>(p, activations, tile);
  } else {
    store_bf16<kTokens>(p, activations, tile * 32 + warp * 8);
  }
}

/// As `write_rows` (gemm_wide.cuh), of a product in bf16, but SiLU(gate) * up.
template <int kTokens>
__device__ __forceinline__ void write_silu_rows(const GemmParams& p, float (&sums)[kTokens / 2], int channel, int token,
                                                int from, int to) {
  const int lane = threadIdx.x % 32, rows = channel < p.N ? p.M - token - lane / 4 : 0;  // from this lane's first on
  const uint32_t size = p.N / 2;
  bf16* const first =
      static_cast<bf16*>(p.out) + static_cast<int64_t>(token + lane / 4) * size + channel / 2 + lane % 4 * 2;
  const TileScales<false, false, kTokens> scales(p, channel, token);
#pragma unroll
  for (int b = 0; b < kTokens / 8; ++b) {
    if (b < from || b >= to) continue;
    float values[4];
    scales.apply(sums, b, values);
    const float2 two = activations_of(values);
    const uint32_t pair = transpose_8x8(pack2(two.x, two.y));  // of one token
    if (b * 8 < rows) *reinterpret_cast<uint32_t*>(first + b * 8 * size) = pair;
  }
}

}  // namespace tpserve::cuda

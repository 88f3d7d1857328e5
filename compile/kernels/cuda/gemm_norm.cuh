// RMSNorm between two GEMMs of one rank without a kernel of its own, for few bf16 tokens. The product before it (o, down)
// ends in the residual stream h = residual + product, in h * weight, and in the sums of squares of each of its tiles; the
// products behind it (qkv, gate_up) take h * weight as their tokens, and each output times 1 / rms(h), which they add up
// from those sums while they fetch. What is rounded to bfloat16 is h and h * weight, where the plain twin (elementwise.cu)
// rounds h and h * weight / rms(h).
//
// In e4m3, of kMaxFoldedFp8Tokens at most, h * weight is rounded to codes with a scale for each 64 elements, a tile's. Of
// h * weight / rms(h) these would be the same codes.
//
// Sums of squares are (tiles of 64 channels, padded tokens) float32. The first tile's have eps * channels besides.
// `Params` is GemmParams; tests run this on the host.
#pragma once

#include "gemm_parts.cuh"
#include "grouped_scales.cuh"

namespace tpserve::cuda {

/// Of more, the ends of tiles cost what the kernel between the products does: 8B on an H100, 64 tokens.
constexpr int kMaxFoldedTokens = 32;
constexpr int kMaxFoldedFp8Tokens = 16;  // as many as have small groups after SiLU

/// What the end of a warp's 16 channels x kTokens tokens adds and multiplies: of token 8 b + lane / 4, four channels from
/// `channel` + 4 (lane % 4), if they are `wanted`. Made before a tile's products: its loads are trips to memory.
template <int kTokens>
struct ResidualRows {
  uint2 rows[kTokens / 8];
  float weight[4];

  template <typename Params>
  __device__ __forceinline__ ResidualRows(const Params& p, int channel, bool wanted) {
    const int lane = threadIdx.x % 32, n = channel + lane % 4 * 4;
#pragma unroll
    for (int b = 0; b < kTokens / 8; ++b) {
      const int m = b * 8 + lane / 4;
      rows[b] = make_uint2(0, 0);
      if (wanted && m < p.M && n < p.N) {
        rows[b] = __ldcg(reinterpret_cast<const uint2*>(p.residual + static_cast<int64_t>(m) * p.N + n));
      }
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) weight[j] = wanted && n < p.N ? __ldg(p.norm_weight + n + j) : 0.0f;
  }
};

/// The residual stream, its product with the norm's weight, and the squares of a finished tile of 64 channels. `sums` of the
/// first warp group, which calls it whole; channels that are not there are zero.
template <bool kFp8, int kTokens, typename Params, typename Scales>
__device__ __forceinline__ void write_residual(const Params& p, const float (&sums)[kTokens / 2], int tile,
                                               const Scales& scales, const ResidualRows<kTokens>& residual) {
  // [tile's parity][warp][token]. A warp that is at its next tile but one has passed that between, whose barrier all warps
  // reach after they have read this one's: a block's tiles are one after the other.
  __shared__ float squares_of_warp[2][4][kTokens], largest_of_warp[2][4][kFp8 ? kTokens : 1];
  const int warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32, n = tile * 64 + warp * 16 + lane % 4 * 4;
  float(&places)[4][kTokens] = squares_of_warp[tile % 2];
  auto& largest = largest_of_warp[tile % 2];
  float weighted[kFp8 ? kTokens / 8 : 1][4];
#pragma unroll
  for (int b = 0; b < kTokens / 8; ++b) {
    float values[4];
    scales.apply(sums, b, values);
    const uint32_t first = transpose_8x8(pack2(values[0], values[1])), second = transpose_8x8(pack2(values[2], values[3]));
    const uint2 product = four_channels(first, second), row = residual.rows[b];  // as the plain product stores it
    const uint2 stream = make_uint2(pack2(low_half(product.x) + low_half(row.x), high_half(product.x) + high_half(row.x)),
                                    pack2(low_half(product.y) + low_half(row.y), high_half(product.y) + high_half(row.y)));
    // The norm sees the residual stream as the next layer will.
    const float h[4] = {low_half(stream.x), high_half(stream.x), low_half(stream.y), high_half(stream.y)};
    float squares = 0.0f;
#pragma unroll
    for (int j = 0; j < 4; ++j) squares += h[j] * h[j];
    squares += __shfl_xor_sync(~0u, squares, 1);
    squares += __shfl_xor_sync(~0u, squares, 2);
    const int m = b * 8 + lane / 4;
    if (lane % 4 == 0) places[warp][m] = squares;
    const int64_t at = static_cast<int64_t>(m) * p.N + n;
    const float(&w)[4] = residual.weight;
    if (m < p.M && n < p.N) *reinterpret_cast<uint2*>(p.residual_out + at) = stream;
    if constexpr (kFp8) {
      float most = 0.0f;
#pragma unroll
      for (int j = 0; j < 4; ++j) weighted[b][j] = h[j] * w[j], most = fmaxf(most, fabsf(weighted[b][j]));
      most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
      most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
      if (lane % 4 == 0) largest[warp][m] = most;
    } else if (m < p.M && n < p.N) {
      *reinterpret_cast<uint2*>(static_cast<bf16*>(p.out) + at) =
          make_uint2(pack2(h[0] * w[0], h[1] * w[1]), pack2(h[2] * w[2], h[3] * w[3]));
    }
  }
  meet<3, 128>();
  const auto most_of = [&](int token) {
    return fmaxf(fmaxf(fmaxf(largest[0][token], largest[1][token]), fmaxf(largest[2][token], largest[3][token])), 1e-12f);
  };
  if constexpr (kFp8) {
#pragma unroll
    for (int b = 0; b < kTokens / 8; ++b) {
      const int m = b * 8 + lane / 4;
      if (m >= p.M || n >= p.N) continue;
      const float factor = kFp8Max / most_of(m);
      const float(&v)[4] = weighted[b];
      *reinterpret_cast<uint32_t*>(static_cast<fp8*>(p.out) + static_cast<int64_t>(m) * p.N + n) =
          pack4_fp8(v[0] * factor, v[1] * factor, v[2] * factor, v[3] * factor);
    }
  }
  const int m = threadIdx.x % 128;
  if (m >= p.M || m >= kTokens) return;
  const float squares = places[0][m] + places[1][m] + places[2][m] + places[3][m];
  p.squares_out[static_cast<int64_t>(tile) * padded_tokens(p.M) + m] =
      tile == 0 ? squares + p.eps * static_cast<float>(p.N) : squares;
  if constexpr (kFp8) p.out_scale[static_cast<int64_t>(tile) * padded_tokens(p.M) + m] = most_of(m) / kFp8Max;
}

/// 1 / rms of each token whose row has `size` elements, for the warp group of 128 threads that calls it; ones without
/// `squares`. The two places are in shared memory.
template <int kTokens>
__device__ __forceinline__ void add_squares(const float* squares, int tokens, int size, float (&parts)[128],
                                            float (&factors)[kTokens]) {
  constexpr int kParts = 128 / kTokens, kBatch = kTokens / 2;  // one batch up to 4,096 elements
  const int thread = threadIdx.x % 128, token = thread % kTokens, part = thread / kTokens;
  if (squares != nullptr) {
    const int tiles = (size + 63) / 64, padded = static_cast<int>(padded_tokens(tokens));
    float sum = 0.0f;
    for (int tile = part; tile < tiles; tile += kBatch * kParts) {
      float batch[kBatch];  // asked for all at once: each is a trip to L2
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int at = tile + i * kParts;
        batch[i] = at < tiles && token < tokens ? __ldcg(squares + at * padded + token) : 0.0f;
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) sum += batch[i];
    }
    parts[thread] = sum;
    meet<3, 128>();
  }
  if (thread < kTokens) {
    float factor = 1.0f;
    if (squares != nullptr) {
      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < kParts; ++i) sum += parts[i * kTokens + thread];
      factor = rsqrtf(sum / static_cast<float>(size));
    }
    factors[thread] = factor;
  }
  meet<3, 128>();
}

/// The same of squares in shared memory, (tiles, 8), by one warp beside those that multiply.
__device__ __forceinline__ void add_squares_of_tiles(const float* squares, int tiles, int size, float (&factors)[8]) {
  const int lane = threadIdx.x % 32;
  float sum = 0.0f;
#pragma unroll 8
  for (int tile = lane / 8; tile < tiles; tile += 4) sum += squares[tile * 8 + lane % 8];
  sum += __shfl_xor_sync(~0u, sum, 8);
  sum += __shfl_xor_sync(~0u, sum, 16);
  if (lane < 8) factors[lane] = rsqrtf(sum / static_cast<float>(size));
}

/// What the end of a tile needs besides the sums: scales of e4m3 channels, biases, and a factor for each token.
template <bool kByChannel, int kTokens>
struct NormedScales {
  ChannelScales<kByChannel> channels;
  const float* factors;

  template <typename Params>
  __device__ __forceinline__ NormedScales(const Params& p, int channel, const float* factors)
      : channels(p, channel), factors(factors) {}
  /// As TileScales'.
  __device__ __forceinline__ void apply(const float* sums, int b, float (&values)[4]) const {
    const float2 pair = *reinterpret_cast<const float2*>(factors + b * 8 + threadIdx.x % 4 * 2);
    channels.apply(sums + b * 4, pair, values);
  }
};

}  // namespace tpserve::cuda

// The ends of tiles of more than 128 tokens: sums of other blocks, and the output. By each consumer warp group for its 64
// channels of the tile.
#pragma once

#include "gemm_parts.cuh"

namespace tpserve::cuda {

/// Makes the compiler take the value for a new one, so that what follows from it is not held in registers over the products.
template <typename T>
__device__ __forceinline__ void keep_here(T& value) {
  asm volatile("" : "+r"(value));
}

/// Adds the partial sums at `place`, of the vectors of eight tokens from `from` to `to`.
template <int kTokens>
__device__ __forceinline__ void add_partials(float (&sums)[kTokens / 2], float4* place, int from, int to) {
  constexpr int kVectors = kTokens / 8;
  constexpr int kBatch = kVectors <= 24 ? kVectors : kVectors / 2;  // that are asked for at once: a trip to L2 for each
  static_assert(kVectors % kBatch == 0);
#pragma unroll
  for (int b = 0; b < kVectors; b += kBatch) {
    if (b + kBatch <= from || b >= to) continue;
    uint4 v[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (b + i >= from && b + i < to) v[i] = load_slot(place + (b + i) * 128);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (b + i >= from && b + i < to) add_partial(sums, b + i, v[i], place + (b + i) * 128);
    }
  }
}

/// Gives the other blocks of a tile this block's sums of their vectors, and adds theirs of its own, in block order. `slot`:
/// this thread's place of this block, `part` of `pieces`; the next part's is `next_slot` further on.
template <int kTokens>
__device__ __forceinline__ void exchange_pieces(float (&sums)[kTokens / 2], float4* slot, size_t next_slot, int part,
                                                int pieces, int from, int to) {
#pragma unroll
  for (int b = 0; b < kTokens / 8; ++b) {
    if (b >= from && b < to) continue;
    store_slot(slot + b * 128, sums[b * 4], sums[b * 4 + 1], sums[b * 4 + 2], sums[b * 4 + 3]);
  }
  float4* const first = slot - part * next_slot;
  for (int other = 0; other < pieces; ++other) {
    if (other != part) add_partials<kTokens>(sums, first + other * next_slot, from, to);
  }
}

/// Nothing of bfloat16 tokens.
template <bool kFp8, int kTokens>
struct HeldScales {
  __device__ __forceinline__ HeldScales(const GemmParams&, int) {}
  __device__ __forceinline__ float2 pair(int, int) const { return make_float2(1.0f, 1.0f); }
};
template <int kTokens>
struct HeldScales<true, kTokens> : TokenScales<kTokens> {
  using TokenScales<kTokens>::TokenScales;
};

/// Two words of a lane, of four channels each, from `pairs` as the transposed products of a warp's first and second eight
/// channels have them: token lane / 4, channels 2 (lane % 4) and the next -> channels 4 (lane % 4) to the third after it.
__device__ __forceinline__ uint2 four_channels(uint32_t first, uint32_t second) {
  const int lane = threadIdx.x % 32, quarter = lane % 4, base = lane - quarter;
  // Even lanes give the first pair and then the second, odd ones the other way round: so two exchanges are enough. For each
  // of four lanes, in four bits, the one whose word it takes.
  constexpr unsigned kSources[] = {0x3120, 0x2031};
  const bool odd = lane % 2 != 0;
  const uint32_t a = __shfl_sync(~0u, odd ? second : first, base + (kSources[0] >> quarter * 4 & 3));
  const uint32_t b = __shfl_sync(~0u, odd ? first : second, base + (kSources[1] >> quarter * 4 & 3));
  return quarter < 2 ? make_uint2(a, b) : make_uint2(b, a);
}

/// Writes a warp's 16 channels x kTokens tokens, of the vectors of eight tokens those from `from` to `to`.
template <bool kFp8, int kTokens>
__device__ __forceinline__ void write_rows(const GemmParams& p, float (&sums)[kTokens / 2], int channel, int token, int from,
                                           int to) {
  const int lane = threadIdx.x % 32, column = lane % 4 * 2;
  const ChannelScales<kFp8, kFp8> scales(p, channel);
  const auto each = [&](const auto& store) {
    const HeldScales<kFp8, kTokens> held(p, token);
#pragma unroll
    for (int b = 0; b < kTokens / 8; ++b) {
      if (b < from || b >= to) continue;
      float values[4];
      scales.apply(sums + b * 4, held.pair(b, column), values);
      store(b, values);
    }
  };
  const int64_t stride = p.N;
  uint32_t step = p.N;  // within the tile 32 bits are enough
  keep_here(step);
  if (p.out_float32) {
    const int m = token + column, n = channel + lane / 4;
    float* const first = static_cast<float*>(p.out) + m * stride + n;
    each([&](int b, const float(&values)[4]) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (m + b * 8 + j % 2 < p.M && n + j / 2 * 8 < p.N) first[(b * 8 + j % 2) * step + j / 2 * 8] = values[j];
      }
    });
    return;
  }
  const int n = channel + lane % 4 * 4;
  const int rows = n < p.N ? p.M - token - lane / 4 : 0;  // from this lane's first on
  bf16* const first = static_cast<bf16*>(p.out) + (token + lane / 4) * stride + n;
  each([&](int b, const float(&values)[4]) {
    const uint2 four = four_channels(transpose_8x8(pack2(values[0], values[1])), transpose_8x8(pack2(values[2], values[3])));
    if (b * 8 < rows) *reinterpret_cast<uint2*>(first + b * 8 * step) = four;
  });
}

/// Of a tile of a team's run, its `member`'s tokens.
template <typename T, int kTokens, int kBlocks>
__device__ __forceinline__ void write_wide(const GemmParams& p, float (&sums)[kTokens / 2], int tile, int member, int from,
                                           int to) {
  const int warp = threadIdx.x / 32;
  const int channel = (tile / p.plan.run_tokens * kBlocks + warp / 4) * 64 + warp % 4 * 16;
  const int token = (tile % p.plan.run_tokens + member) * kTokens;
  write_rows<sizeof(T) == 1, kTokens>(p, sums, channel, token, from, to);
}

/// The end of a tile, or of this block's piece of it. `slot`: this thread's place in the block's.
template <typename T, int kTokens, int kBlocks>
__device__ __forceinline__ void finish_wide(const GemmParams& p, float (&sums)[kTokens / 2], int tile, const WideRun& run,
                                            float4* slot) {
  constexpr int kVectors = kTokens / 8;
  const int pieces = p.plan.pieces;
  if (pieces == 1) return write_wide<T, kTokens, kBlocks>(p, sums, tile, run.member, 0, kVectors);
  const size_t next_slot = static_cast<size_t>(p.plan.team) * kBlocks * kVectors * 128;
  const int part = run.piece % pieces;
  int from = part * kVectors / pieces, to = (part + 1) * kVectors / pieces;
  keep_here(from), keep_here(to);
  exchange_pieces<kTokens>(sums, slot, next_slot, part, pieces, from, to);
  write_wide<T, kTokens, kBlocks>(p, sums, tile, run.member, from, to);
}

}  // namespace tpserve::cuda

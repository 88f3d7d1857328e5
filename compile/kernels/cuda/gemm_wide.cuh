// The ends of wide tiles: sums of other blocks, and the output. By each consumer warp group for its 64 channels of the tile.
#pragma once

#include "gemm_parts.cuh"
#include "gemm_silu.cuh"

namespace tpserve::cuda {

/// Makes the compiler take the value for a new one, so that what follows from it is not held in registers over the products.
template <typename T>
__device__ __forceinline__ void keep_here(T& value) {
  asm volatile("" : "+r"(value));
}

/// Gives the other blocks of a tile this block's sums of their vectors, of the tile's first `vectors`, and adds theirs of
/// its own, in block order. `slot`: this thread's place of this block, `part` of `pieces`; the next part's is `next_slot`
/// further on.
template <int kTokens>
__device__ __forceinline__ void exchange_pieces(float (&sums)[kTokens / 2], float4* slot, size_t next_slot, int part,
                                                int pieces, int vectors, int from, int to) {
#pragma unroll
  for (int b = 0; b < kTokens / 8; ++b) {
    if (b >= vectors || (b >= from && b < to)) continue;
    store_slot(slot + b * 128, sums[b * 4], sums[b * 4 + 1], sums[b * 4 + 2], sums[b * 4 + 3]);
  }
  float4* const first = slot - part * next_slot;
  for (int other = 0; other < pieces; ++other) {
    if (other != part) add_partials<kTokens>(sums, first + other * next_slot, from, to);
  }
}

/// Writes a warp's 16 channels x kTokens tokens, of the vectors of eight tokens those from `from` to `to`.
template <bool kFp8, int kTokens>
__device__ __forceinline__ void write_rows(const GemmParams& p, float (&sums)[kTokens / 2], int channel, int token, int from,
                                           int to) {
  const int lane = threadIdx.x % 32, column = lane % 4 * 2;
  const auto each = [&](const auto& store) {
    const TileScales<kFp8, kFp8, kTokens> scales(p, channel, token);
#pragma unroll
    for (int b = 0; b < kTokens / 8; ++b) {
      if (b < from || b >= to) continue;
      float values[4];
      scales.apply(sums, b, values);
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

/// What a warp group needs to send its wide tiles to peers.
struct PeerStage {
  PushEpoch& epoch;
  uint8_t* stage;
  int barrier;
};

/// As `write_rows`, but to peers. By the whole warp group.
template <bool kFp8, int kTokens>
__device__ __forceinline__ void send_rows(const GemmParams& p, float (&sums)[kTokens / 2], int channel, int token, int from,
                                          int to, const PeerStage& by) {
  constexpr int kVectors = kStageTokens / 8;
  const TileScales<kFp8, kFp8, kTokens> scales(p, channel, token);
  const PeerTile tile(p.push, by.epoch.wait(), channel, p.M, p.N, by.stage, by.barrier);
#pragma unroll
  for (int b = 0; b < kTokens / 8; ++b) {
    const int first = b / kVectors * kVectors;
    if (b == first) tile.open();
    if (b >= from && b < to) {
      float values[4];
      scales.apply(sums, b, values);
      uint32_t pairs[2];  // of channels of one token
#pragma unroll
      for (int h = 0; h < 2; ++h) pairs[h] = transpose_8x8(pack2(values[h * 2], values[h * 2 + 1]));
      tile.store(b, pairs);
    }
    if (b + 1 == first + kVectors || b + 1 == kTokens / 8) {
      tile.send(token + first * 8, (max(from, first) - first) * 8, (min(to, b + 1) - first) * 8);
    }
  }
}

/// Of a tile of a team's run, its `member`'s tokens. `S`: the kernel's Shape.
template <typename T, typename S>
__device__ __forceinline__ void write_wide(const GemmParams& p, float (&sums)[S::kTokens / 2], int tile, int member, int from,
                                           int to, const PeerStage& by) {
  constexpr bool kFp8 = sizeof(T) == 1;
  const int warp = threadIdx.x / 32;
  const int channel = (tile / p.plan.run_tokens * S::kBlocks + warp / 4) * 64 + warp % 4 * 16;
  const int token = (tile % p.plan.run_tokens + member) * p.plan.tile_tokens;
  if constexpr (S::kPush) {
    send_rows<kFp8, S::kTokens>(p, sums, channel, token, from, to, by);
  } else if constexpr (S::kSilu) {
    write_silu_rows<S::kTokens>(p, sums, channel, token, from, to);
  } else {
    write_rows<kFp8, S::kTokens>(p, sums, channel, token, from, to);
  }
}

/// The end of a tile, or of this block's piece of it. `slot`: this thread's place in the block's.
template <typename T, typename S>
__device__ __forceinline__ void finish_wide(const GemmParams& p, float (&sums)[S::kTokens / 2], int tile, const WideRun& run,
                                            float4* slot, const PeerStage& by) {
  constexpr int kVectors = S::kTokens / 8;
  const int pieces = p.plan.pieces, vectors = p.plan.tile_tokens / 8;
  int from = 0, to = vectors;
  if (pieces > 1) {
    const size_t next_slot = static_cast<size_t>(p.plan.team) * S::kBlocks * kVectors * 128;
    const int part = run.piece % pieces;
    from = part * vectors / pieces, to = (part + 1) * vectors / pieces;
    keep_here(from), keep_here(to);
    exchange_pieces<S::kTokens>(sums, slot, next_slot, part, pieces, vectors, from, to);
  }
  write_wide<T, S>(p, sums, tile, run.member, from, to, by);
}

}  // namespace tpserve::cuda

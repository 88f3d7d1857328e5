// What the end of a GEMM's tile needs besides its sums: scales, other blocks' partial sums, and channels side by side.
// `Params` is GemmParams; tests run this on the host.
#pragma once

#include "slots.cuh"
#include "token_scales.cuh"

namespace tpserve::cuda {

/// What finishes the sums of a thread's two channels, `channel` + lane / 4 and the eighth after it. Made before a tile's
/// products: its loads are trips to memory.
template <bool kByChannel>
struct ChannelScales {
  float scale[2] = {1.0f, 1.0f}, bias[2] = {0.0f, 0.0f};

  template <typename Params>
  __device__ __forceinline__ ChannelScales(const Params& p, int channel) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int at = channel + threadIdx.x % 32 / 4 + h * 8;
      if (at >= p.N) continue;
      if (kByChannel) scale[h] = __ldg(p.channel_scale + at);
      if (p.bias != nullptr) bias[h] = __ldg(p.bias + at);
    }
  }

  /// With the scales of two tokens: value 2 h + i is of channel h and token i.
  __device__ __forceinline__ void apply(const float* sums, float2 of_tokens, float (&values)[4]) const {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float factor = scale[j / 2] * (j % 2 == 0 ? of_tokens.x : of_tokens.y);
      values[j] = fmaf(sums[j], factor, bias[j / 2]);
    }
  }

  /// Without: value 2 h + i is of channel h.
  __device__ __forceinline__ void apply(const float* sums, float (&values)[4]) const {
#pragma unroll
    for (int j = 0; j < 4; ++j) values[j] = kByChannel ? fmaf(sums[j], scale[j / 2], bias[j / 2]) : sums[j] + bias[j / 2];
  }
};

/// What the end of a tile of 16 channels of a warp and kTokens tokens, the first `token`, needs besides the sums.
template <bool kByChannel, bool kByToken, int kTokens>
struct TileScales {
  ChannelScales<kByChannel> channels;

  template <typename Params>
  __device__ __forceinline__ TileScales(const Params& p, int channel, int) : channels(p, channel) {}
  /// Of vector b of eight tokens; by all lanes. Value 2 h + i is of channel h and token 2 (lane % 4) + i.
  __device__ __forceinline__ void apply(const float* sums, int b, float (&values)[4]) const {
    channels.apply(sums + b * 4, values);
  }
};
template <bool kByChannel, int kTokens>
struct TileScales<kByChannel, true, kTokens> {
  ChannelScales<kByChannel> channels;
  TokenScales<kTokens> tokens;

  template <typename Params>
  __device__ __forceinline__ TileScales(const Params& p, int channel, int token)
      : channels(p, channel), tokens(p, token) {}
  __device__ __forceinline__ void apply(const float* sums, int b, float (&values)[4]) const {
    channels.apply(sums + b * 4, tokens.pair(b, threadIdx.x % 4 * 2), values);
  }
};

/// Asks for one block's partial sums of the vectors of eight tokens from `from` to `to`, all at once, for each is a trip to
/// L2. `place`: this thread's, of the first of kCount vectors.
template <int kCount>
__device__ __forceinline__ void ask_partial(uint4 (&asked)[kCount], const float4* place, int from = 0, int to = kCount) {
#pragma unroll
  for (int b = 0; b < kCount; ++b) {
    if (b >= from && b < to) asked[b] = load_slot(place + b * 128);
  }
}

/// Adds them once they are there, to the sums of the same vectors, and marks their places as empty again. What had not come
/// is asked for again all at once.
template <int kCount>
__device__ __forceinline__ void take_partial(float* sums, uint4 (&asked)[kCount], float4* place, int from = 0,
                                             int to = kCount) {
  while (true) {
    bool come = true;
#pragma unroll
    for (int b = 0; b < kCount; ++b) come = come && (b < from || b >= to || !is_empty(asked[b]));
    if (come) break;
    ask_partial(asked, place, from, to);
  }
#pragma unroll
  for (int b = 0; b < kCount; ++b) {
    if (b < from || b >= to) continue;
    empty_slot(place + b * 128);
    sums[b * 4] += __uint_as_float(asked[b].x), sums[b * 4 + 1] += __uint_as_float(asked[b].y);
    sums[b * 4 + 2] += __uint_as_float(asked[b].z), sums[b * 4 + 3] += __uint_as_float(asked[b].w);
  }
}

/// Adds the partial sums at `place`, of the vectors of eight tokens from `from` to `to`.
template <int kTokens>
__device__ __forceinline__ void add_partials(float (&sums)[kTokens / 2], float4* place, int from, int to) {
  constexpr int kVectors = kTokens / 8;
  constexpr int kBatch = kVectors <= 24 ? kVectors : kVectors / 2;  // for which there are registers
  static_assert(kVectors % kBatch == 0);
#pragma unroll
  for (int b = 0; b < kVectors; b += kBatch) {
    if (b + kBatch <= from || b >= to) continue;
    uint4 asked[kBatch];
    ask_partial(asked, place + b * 128, from - b, to - b);
    take_partial(sums + b * 4, asked, place + b * 128, from - b, to - b);
  }
}

/// Asks for the partial sums of the first kBlocks blocks after this one, as far as `sharers` go. `slot`: this thread's place
/// of its own block; the next block's is `next` further on.
template <int kBlocks, int kVectors>
__device__ __forceinline__ void ask_partials(uint4 (&asked)[kBlocks][kVectors], const float4* slot, int next, int sharers) {
#pragma unroll
  for (int j = 0; j < kBlocks; ++j) {
    if (j < sharers) ask_partial(asked[j], slot + static_cast<size_t>(j + 1) * next);
  }
}

/// Adds what `ask_partials` has asked for, block after block.
template <int kBlocks, int kVectors>
__device__ __forceinline__ void take_partials(float* sums, uint4 (&asked)[kBlocks][kVectors], float4* slot, int next,
                                              int sharers) {
#pragma unroll
  for (int j = 0; j < kBlocks; ++j) {
    if (j < sharers) take_partial(sums, asked[j], slot + static_cast<size_t>(j + 1) * next);
  }
}

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

}  // namespace tpserve::cuda

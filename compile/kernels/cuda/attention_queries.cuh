// Queries of decode items as the second operand of products with slices of keys: as a kernel of its own has turned them, or
// turned here, in a step that only decodes. By each warp for itself: that is one trip to L2 and no meeting.
//
// A thread has of column k (sixteen dimensions) of row 8 t + lane / 4 the dimensions 2 (lane % 4) and the next, and those
// eight further on. What the rotation pairs, d and d + head_dim / 2, it has both.
#pragma once

#include "attention_fragments.cuh"
#include "attention_params.cuh"

namespace tpserve::cuda {

/// Cosines and sines of a position, for a thread's dimensions of the first half of a head.
template <int kHeadDim>
struct QueryAngles {
  float2 cosine[kHeadDim / 32][2], sine[kHeadDim / 32][2];

  /// The table is a parameter, which no kernel writes: before `pdl_wait`.
  __device__ __forceinline__ QueryAngles(const float* rope, int position) {
    const float* at = rope + static_cast<int64_t>(position) * kHeadDim + threadIdx.x % 4 * 2;
#pragma unroll
    for (int k = 0; k < kHeadDim / 32; ++k) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        cosine[k][h] = __ldg(reinterpret_cast<const float2*>(at + k * 16 + h * 8));
        sine[k][h] = __ldg(reinterpret_cast<const float2*>(at + kHeadDim / 2 + k * 16 + h * 8));
      }
    }
  }
};

/// Of up to 8 kTiles rows.
template <typename KV, int kHeadDim, int kTiles>
struct Queries {
  using F = Fragments<KV, kHeadDim>;
  static constexpr int kColumns = kHeadDim / 16;
  uint32_t pair[kTiles][kColumns][2];

  /// Turned ones.
  __device__ __forceinline__ void load(const AttentionParams<KV>& p, const Item& item, int head) {
    const int lane = threadIdx.x % 32, num_heads = p.kv.num_kv_heads * p.group;
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      const int row = t * 8 + lane / 4;
      const bool present = row < item.count * p.group;
      const int64_t query = static_cast<int64_t>(item.token + row / p.group) * num_heads + head * p.group + row % p.group;
      load_row(t, present, p.q + (present ? query : 0) * kHeadDim + lane % 4 * 2);
    }
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int k = 0; k < kColumns; ++k) pair[t][k][0] = F::query2(pair[t][k][0]), pair[t][k][1] = F::query2(pair[t][k][1]);
    }
  }

  /// Of the one token of an item, as projected; nothing waits for them here.
  __device__ __forceinline__ void load_projected(const AttentionParams<KV>& p, const Item& item, int head) {
    const int lane = threadIdx.x % 32;
    const int64_t token = static_cast<int64_t>(item.token) * (p.group + 2) * p.kv.num_kv_heads;
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      const int row = t * 8 + lane / 4;
      const bool present = row < p.group;
      load_row(t, present, p.added.qkv + (token + head * p.group + (present ? row : 0)) * kHeadDim + lane % 4 * 2);
    }
  }

  /// Normalises them, where there is a norm, and turns them, to the bits of `turn` (rope.cuh).
  __device__ __forceinline__ void turn_projected(const NewTokens& added, const QueryAngles<kHeadDim>& angles) {
    constexpr int kHalf = kColumns / 2;
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      const float factor = added.q_weight == nullptr ? 1.0f : norm_factor(t, added.eps);
#pragma unroll
      for (int k = 0; k < kHalf; ++k) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float2 x = halves(pair[t][k][h]), y = halves(pair[t][k + kHalf][h]);
          if (added.q_weight != nullptr) {
            const float* weight = added.q_weight + k * 16 + h * 8 + threadIdx.x % 4 * 2;
            const float2 of_x = __ldg(reinterpret_cast<const float2*>(weight));
            const float2 of_y = __ldg(reinterpret_cast<const float2*>(weight + kHeadDim / 2));
            x.x *= factor * of_x.x, x.y *= factor * of_x.y;
            y.x *= factor * of_y.x, y.y *= factor * of_y.y;
          }
          const float2 c = angles.cosine[k][h], s = angles.sine[k][h];
          const uint32_t first = pack2(turned_first(x.x, y.x, c.x, s.x), turned_first(x.y, y.y, c.y, s.y));
          const uint32_t second = pack2(turned_second(x.x, y.x, c.x, s.x), turned_second(x.y, y.y, c.y, s.y));
          pair[t][k][h] = F::query2(first), pair[t][k + kHalf][h] = F::query2(second);
        }
      }
    }
  }

 private:
  __device__ __forceinline__ void load_row(int t, bool present, const bf16* source) {
#pragma unroll
    for (int k = 0; k < kColumns; ++k) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        pair[t][k][h] = present ? __ldcg(reinterpret_cast<const uint32_t*>(source + k * 16 + h * 8)) : 0;
      }
    }
  }

  static __device__ __forceinline__ float2 halves(uint32_t word) { return {low_half(word), high_half(word)}; }

  /// Adds squares in the order of `turn`: of pairs of dimensions by the eights they stand in, then of the four pairs.
  __device__ __forceinline__ float norm_factor(int t, float eps) const {
    float squares[kColumns];  // of an eight of the first half, and of the same of the second
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      const float2 x = halves(pair[t][i / 2][i % 2]), y = halves(pair[t][i / 2 + kColumns / 2][i % 2]);
      squares[i] = pair_squares(x.x, x.y, y.x, y.y);
    }
#pragma unroll
    for (int offset = kColumns / 2; offset > 0; offset /= 2) {
#pragma unroll
      for (int i = 0; i < offset; ++i) squares[i] += squares[i + offset];
    }
    float sum = squares[0] + __shfl_xor_sync(~0u, squares[0], 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    return rsqrtf(__fmaf_rn(sum, 1.0f / kHeadDim, eps));
  }
};

}  // namespace tpserve::cuda

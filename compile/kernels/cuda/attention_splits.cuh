// Runs whose positions are cut into chunks: partial sums, and the kernel that adds them.
#pragma once

#include "attention_rows.cuh"

namespace tpserve::cuda {

/// Partial sums of one (row, split, KV head): head_dim values, then the top score and the sum of weights.
template <typename KV, int kHeadDim>
__device__ __forceinline__ int64_t partial_at(const AttentionParams<KV>& p, int row, int split, int head) {
  return ((static_cast<int64_t>(row) * kMaxSplits + split) * p.kv.num_kv_heads + head) * (kHeadDim + 4);
}

template <typename KV, int kHeadDim>
__device__ void store_partial(const AttentionParams<KV>& p, const Item& item, int head, int split,
                              const Rows<KV, kHeadDim>& rows) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = lane / 4 + h * 8;
    if (row >= item.count * p.group) continue;
    float* target = p.partial + partial_at<KV, kHeadDim>(p, item.first_row + row, split, head);
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n) {
      __stcg(reinterpret_cast<float2*>(target + n * 8 + lane % 4 * 2),
             make_float2(rows.out[n][h * 2], rows.out[n][h * 2 + 1]));
    }
    if (lane % 4 == 0) {
      __stcg(reinterpret_cast<float2*>(target + kHeadDim), make_float2(rows.top[h], rows.sum[h]));
    }
  }
}

constexpr int kBatch = 4;

/// Adds the chunks of up to four rows of a run in order; all loads of four chunks are in flight together.
template <typename KV, int kHeadDim>
__device__ void add_splits(const AttentionParams<KV>& p, const Item& item, int head, int first) {
  constexpr int kValues = kHeadDim / 32;
  const int lane = threadIdx.x % 32, num_heads = p.kv.num_kv_heads * p.group, num_rows = item.count * p.group;
  const int64_t stride = static_cast<int64_t>(p.kv.num_kv_heads) * (kHeadDim + 4);
  const float* source[kBatch];
  float2 state[kBatch];
  float values[kBatch][kValues] = {};
#pragma unroll
  for (int r = 0; r < kBatch; ++r) {
    source[r] = p.partial + partial_at<KV, kHeadDim>(p, item.first_row + min(first + r, num_rows - 1), 0, head);
    state[r] = make_float2(-INFINITY, 0.0f);
    if (lane < item.num_splits) {
      state[r] = __ldcg(reinterpret_cast<const float2*>(source[r] + lane * stride + kHeadDim));
    }
  }
  float factor[kBatch], total[kBatch];
  for (int s = 0; s < item.num_splits; s += kBatch) {
    float loaded[kBatch][kBatch][kValues];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int64_t at = min(s + i, item.num_splits - 1) * stride + lane * kValues;
#pragma unroll
      for (int r = 0; r < kBatch; ++r) {
        if constexpr (kValues == 4) {
          const float4 v = __ldcg(reinterpret_cast<const float4*>(source[r] + at));
          loaded[i][r][0] = v.x, loaded[i][r][1] = v.y, loaded[i][r][2] = v.z, loaded[i][r][3] = v.w;
        } else {
          const float2 v = __ldcg(reinterpret_cast<const float2*>(source[r] + at));
          loaded[i][r][0] = v.x, loaded[i][r][1] = v.y;
        }
      }
    }
    if (s == 0) {
      const ScoreScale<KV> scale(p);
#pragma unroll
      for (int r = 0; r < kBatch; ++r) {
        float best = state[r].x;
#pragma unroll
        for (int offset = 16; offset > 0; offset /= 2) best = fmaxf(best, __shfl_xor_sync(~0u, best, offset));
        factor[r] = state[r].x == -INFINITY ? 0.0f : exp2f((state[r].x - best) * scale.of(p));
        total[r] = state[r].y * factor[r];
#pragma unroll
        for (int offset = 16; offset > 0; offset /= 2) total[r] += __shfl_xor_sync(~0u, total[r], offset);
      }
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
#pragma unroll
      for (int r = 0; r < kBatch; ++r) {
        const float f = s + i < item.num_splits ? __shfl_sync(~0u, factor[r], s + i) : 0.0f;
#pragma unroll
        for (int v = 0; v < kValues; ++v) values[r][v] = fmaf(loaded[i][r][v], f, values[r][v]);
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kBatch; ++r) {
    const int row = first + r;
    if (row >= num_rows) break;
    const float inverse = value_scale(p) / total[r];
    bf16* target = p.out + (static_cast<int64_t>(item.token + row / p.group) * num_heads + head * p.group +
                            row % p.group) * kHeadDim + lane * kValues;
#pragma unroll
    for (int v = 0; v < kValues; v += 2) {
      *reinterpret_cast<uint32_t*>(target + v) = pack2(values[r][v] * inverse, values[r][v + 1] * inverse);
    }
  }
}

constexpr int kCombineWarps = 4;

/// A warp per four rows of a run that was cut into chunks.
template <typename KV, int kHeadDim>
__global__ void __launch_bounds__(kCombineWarps * 32) combine_kernel(const __grid_constant__ AttentionParams<KV> p) {
  constexpr int kParts = kDecodeRows / kBatch;
  const int num_heads = p.kv.num_kv_heads;
  const int unit = blockIdx.x * kCombineWarps + threadIdx.x / 32, stride = gridDim.x * kCombineWarps;
  pdl_launch();
  pdl_wait();
  const int num_units = __ldcg(p.plan + 1) * num_heads * kParts;
  for (int i = unit; i < num_units; i += stride) {
    const Item item = load_item(p.layout.decode(p.plan) + i / kParts / num_heads);
    const int begin = p.window > 0 ? max(0, item.position - p.window + 1) : 0, first = i % kParts * kBatch;
    if (item.num_splits == 1 || item.split != begin / item.chunk || first >= item.count * p.group) continue;
    add_splits<KV, kHeadDim>(p, item, i / kParts % num_heads, first);
  }
}

}  // namespace tpserve::cuda

// Runs whose positions are cut into chunks: partial sums, and who adds them: the warp that ends the last chunk.
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

/// Tells the warp that ends the last of a run's chunks for a KV head, when all partial sums are there to be read. The
/// count is then zero again, for the next layer.
template <typename KV>
__device__ __forceinline__ bool ends_last(const AttentionParams<KV>& p, const Item& item, int head) {
  int32_t* arrivals = p.arrivals + item.first_row * p.kv.num_kv_heads + head;
  __threadfence();  // each lane's sums before the count
  __syncwarp();
  int before = 0;
  if (threadIdx.x % 32 == 0) before = atomicAdd(arrivals, 1);
  if (__shfl_sync(~0u, before, 0) != item.num_splits - 1) return false;
  if (threadIdx.x % 32 == 0) *arrivals = 0;
  __threadfence();  // the count before the others' sums
  return true;
}

constexpr int kBatch = 4;

/// Adds the chunks of up to four rows of a run in order; all loads of four chunks are in flight together. Not inlined: it
/// is rare, and its registers would be missing in the products.
template <typename KV, int kHeadDim, Out kOut>
__device__ __noinline__ void add_splits(const AttentionParams<KV>& p, const Item& item, int head, int first) {
  constexpr int kValues = kHeadDim / 32;
  const int lane = threadIdx.x % 32, num_rows = item.count * p.group;
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
    const int token = item.token + row / p.group, query_head = head * p.group + row % p.group;
    const int64_t at = out_at<kHeadDim>(p, token, query_head) + lane * kValues;
    const float inverse = value_scale(p) / total[r];
    if constexpr (kOut == Out::kBf16) {
#pragma unroll
      for (int v = 0; v < kValues; v += 2) {
        *reinterpret_cast<uint32_t*>(p.out + at + v) = pack2(values[r][v] * inverse, values[r][v + 1] * inverse);
      }
    } else {
      static_assert(kValues == 4);
      const float(&f)[kValues] = values[r];
      float largest = fmaxf(fmaxf(fabsf(f[0]), fabsf(f[1])), fmaxf(fabsf(f[2]), fabsf(f[3])));
#pragma unroll
      for (int offset = 16; offset > 0; offset /= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, offset));
      const float factor = inverse * store_scale(p, token, query_head, largest * inverse, lane == 0);
      *reinterpret_cast<uint32_t*>(p.quantized + at) =
          pack4_fp8(f[0] * factor, f[1] * factor, f[2] * factor, f[3] * factor);
    }
  }
}

}  // namespace tpserve::cuda

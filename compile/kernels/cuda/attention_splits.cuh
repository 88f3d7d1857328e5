// Runs, or pieces of them, whose positions are cut into chunks. Their items leave sums in places of their own (slots.cuh),
// and that of the last chunk adds them, in the order of positions.
//
// Why the last may wait for the others: it comes after them in the plan, blocks take items in the plan's order, and all of
// a kernel's blocks run before one of the next kernel does. So of all items that are not done, the first waits for none.
#pragma once

#include "attention_fetch.cuh"
#include "slots.cuh"

namespace tpserve::cuda {

/// Place of one (row, chunk, KV head): head_dim sums, then the top score and the sum of weights.
template <typename KV, int kHeadDim>
__device__ __forceinline__ float4* partial_of(const AttentionParams<KV>& p, int first_row, int row, int split, int head) {
  const int64_t place = (static_cast<int64_t>(first_row + row) * kMaxSplits + split) * p.kv.num_kv_heads + head;
  return reinterpret_cast<float4*>(p.partial + place * (kHeadDim + 4));
}

/// A thread's part of a row's partial sums, on its way: its values, then the row's state.
template <int kHeadDim>
struct Arriving {
  static constexpr int kValues = kHeadDim / 16;
  uint4 word[kValues + 1];

  __device__ __forceinline__ void load(const float4* place) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int j = 0; j < kValues; ++j) word[j] = load_slot(place + j * 4 + lane % 4);
    word[kValues] = load_slot(place + kHeadDim / 4);
  }
  __device__ __forceinline__ bool has_come() const {
    bool all = true;
#pragma unroll
    for (int j = 0; j <= kValues; ++j) all = all && !is_empty(word[j]);
    return all;
  }
  /// After all four lanes of the row have taken its state.
  static __device__ __forceinline__ void empty(float4* place) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int j = 0; j < kValues; ++j) empty_slot(place + j * 4 + lane % 4);
    if (lane % 4 == 0) empty_slot(place + kHeadDim / 4);
  }
};

template <typename KV, int kHeadDim>
__device__ __forceinline__ void store_partial(const AttentionParams<KV>& p, const Item& item, int head, int split,
                                              const Rows<KV, kHeadDim>& rows) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = lane / 4 + h * 8;
    if (row >= item.count * p.group) continue;
    float4* target = partial_of<KV, kHeadDim>(p, item.first_row, row, split, head);
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; n += 2) {
      store_slot(target + n * 2 + lane % 4, rows.out[n][h * 2], rows.out[n][h * 2 + 1], rows.out[n + 1][h * 2],
                 rows.out[n + 1][h * 2 + 1]);
    }
    if (lane % 4 == 0) store_slot(target + kHeadDim / 4, rows.top[h], rows.sum[h], 0.0f, 0.0f);
  }
}

/// Adds the sums of a run's chunks and writes its rows; by the warp that has stored those of the last. Not inlined: it is
/// rare, and its registers would be missing in the products.
template <typename KV, int kHeadDim, Out kOut>
__device__ __noinline__ void add_splits(const AttentionParams<KV>& p, const Item& item, int head) {
  using A = Arriving<kHeadDim>;
  const int lane = threadIdx.x % 32, num_rows = item.count * p.group, num_splits = item.num_splits;
  const int first_row = item.first_row, first_token = item.token, first = item.first_place;
  const float scale = ScoreScale<KV>(p).of(p);
#pragma unroll 1
  for (int h = 0; h * 8 < num_rows; ++h) {
    const int row = lane / 4 + h * 8;
    const bool present = row < num_rows;
    float top = -INFINITY, sum = 0.0f, values[kHeadDim / 4] = {};
    A next;
    if (present) next.load(partial_of<KV, kHeadDim>(p, first_row, row, first, head));
#pragma unroll 1
    for (int split = 0; split < num_splits; ++split) {
      A now = next;
      float4* place = partial_of<KV, kHeadDim>(p, first_row, present ? row : 0, first + split, head);
      if (present) {
        if (split + 1 < num_splits) next.load(partial_of<KV, kHeadDim>(p, first_row, row, first + split + 1, head));
        while (!now.has_come()) now.load(place);
      }
      __syncwarp();
      if (!present) continue;
      A::empty(place);
      const float other_top = __uint_as_float(now.word[A::kValues].x), other_sum = __uint_as_float(now.word[A::kValues].y);
      const float best = fmaxf(top, other_top), shift = best == -INFINITY ? 0.0f : best * scale;
      const float own = exp2f(top * scale - shift), other = exp2f(other_top * scale - shift);
      top = best, sum = sum * own + other_sum * other;
#pragma unroll
      for (int j = 0; j < A::kValues; ++j) {
        const uint4 v = now.word[j];
        const float more[4] = {__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z), __uint_as_float(v.w)};
#pragma unroll
        for (int i = 0; i < 4; ++i) values[j * 4 + i] = values[j * 4 + i] * own + more[i] * other;
      }
    }
    if (present) write_row<KV, kHeadDim, kOut>(p, first_token, head, row, [&](int i) { return values[i]; }, sum);
  }
}

}  // namespace tpserve::cuda

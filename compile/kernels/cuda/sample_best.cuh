// The best token of a row, by one block or by several.
//
// One block has 513 KB of a Llama's logits to read, and takes 8 us for all it does. Where rows are few and their best token is all that
// is wanted, up to eight blocks read a slice each, and the last of them that is done compares what they found.
#pragma once

#include "sample_scratch.cuh"

namespace tpserve::cuda {

/// Of tokens [begin, end), the lowest id among equals; kNotANumber if there is one.
template <typename T>
__device__ __forceinline__ RankedToken best_of(const RowView<T>& row, int begin, int end, SampleScratch& s) {
  float most = -INFINITY;
  int most_id = begin;
  bool bad = false;
  for_each<8>(RowView<T>{row.data + begin}, end - begin, [&](int i, float x) {  // of one thread the lower ids come first
    bad |= x != x;
    if (x > most) most = x, most_id = begin + i;
  });
  bad = __syncthreads_or(bad);
  const RankedToken top = block_reduce(ranked(order_key(most), most_id), RankedToken{0}, s.reduce64, Max{});
  return bad ? kNotANumber : top;
}

__device__ __forceinline__ bool needs_only_best(const SampleParams& p, int r) {
  const GreedyParams greedy{p.slots,      p.temperature,  p.frequency, p.presence,
                            p.bias_count, p.num_logprobs, p.mask_rows, p.num_slots};
  return greedy.needs_only_best(r);
}

/// The best of what is known of row r's first `count` slices.
__device__ __forceinline__ RankedToken best_of_slices(const SampleParams& p, int r, int count) {
  RankedToken top = 0;
#pragma unroll
  for (int i = 0; i < kBestSlices; ++i) {
    if (i < count) top = max(top, __ldcg(p.best + static_cast<int64_t>(r) * kBestSlices + i));
  }
  return top;
}

/// The row's best token, in all threads of its block that is done last; 0 in the others.
template <typename T>
__device__ __forceinline__ RankedToken join_slices(const SampleParams& p, const RowView<T>& row, int r, int slice,
                                                   SampleScratch& s) {
  constexpr int kPerLoad = 16 / sizeof(T);
  const int width = (p.vocab_size + p.num_slices * kPerLoad - 1) / (p.num_slices * kPerLoad) * kPerLoad;
  const int begin = min(slice * width, p.vocab_size);
  const RankedToken own = best_of(row, begin, min(begin + width, p.vocab_size), s);
  if (threadIdx.x == 0) {
    __stcg(p.best + static_cast<int64_t>(r) * kBestSlices + slice, own);
    __threadfence();  // before it counts
    s.found = atomicAdd(p.arrived + r, 1) == p.num_slices - 1;
    __threadfence();  // what it has counted, it sees
  }
  __syncthreads();
  if (!s.found) return 0;
  if (threadIdx.x == 0) p.arrived[r] = 0;
  return best_of_slices(p, r, p.num_slices);
}

/// Blocks of each of so many rows: as many as a GPU of 132 multiprocessors runs at once.
inline int num_slices_of(int64_t num_rows) {
  int count = kBestSlices;
  while (count > 1 && num_rows * count > 132) count /= 2;
  return count;
}

}  // namespace tpserve::cuda

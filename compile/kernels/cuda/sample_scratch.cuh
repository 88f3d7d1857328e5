// What a block of the sampler keeps in shared memory, and sums over its threads that go through it.
#pragma once

#include "sample_logits.cuh"
#include "sample_params.cuh"

namespace tpserve::cuda {

constexpr int kBins = 2048;        // of a digit of a key
constexpr int kCandidates = 2048;  // that are sorted
constexpr int kSegments = 128;     // of a row, for searches by running sum
constexpr int kDistances = 6;      // trial bounds of candidates

struct SampleScratch {
  union {
    Sum bins[kBins];
    RankedToken candidates[kCandidates];
  };
  Sum warp_sums[kWarps];
  Sum selected_sum, selected_bin_sum;
  int selected_bin;
  Sum reduce64[32];
  double reduce_double[32];
  Sum segments[kSegments];
  Sum trial_weight[kDistances];
  int trial_count[kDistances];
  int found, num_candidates;
  int top_count;
  RankedToken top_tokens[kMaxTop];
};

/// The same value in all threads.
__device__ __forceinline__ Sum block_sum(Sum value, SampleScratch& s) {
  return block_reduce(value, Sum{0}, s.reduce64, Add{});
}

/// Inclusive sums over the block in thread order.
__device__ inline Sum block_scan(Sum value, SampleScratch& s) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const Sum other = __shfl_up_sync(~0u, value, offset);
    if (lane >= offset) value += other;
  }
  __syncthreads();
  if (lane == 31) s.warp_sums[warp] = value;
  __syncthreads();
  Sum before = 0;
  for (int w = 0; w < warp; ++w) before += s.warp_sums[w];
  return before + value;
}

}  // namespace tpserve::cuda

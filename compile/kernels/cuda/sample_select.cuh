// Searches of a row by running sums of a measure of its tokens: by falling logit, and by ascending id.
#pragma once

#include "sample_scratch.cuh"

namespace tpserve::cuda {

/// Finds the key at which the measure of the keys above stays below `target` and with it reaches it. `measure(logit, key)`
/// is zero for tokens that do not count; `extra` is added at `extra_key`. `above` receives the measure of all keys above.
///
/// Radix selection: the key's digits of 11, 11 and 10 bits, the highest first, each in a pass over the row.
template <typename T, typename Measure>
__device__ uint32_t select_key(const RowView<T>& row, int size, Sum target, Measure measure, uint32_t extra_key, Sum extra,
                               SampleScratch& s, Sum* above) {
  uint32_t prefix = 0, mask = 0;
  Sum passed = 0;
#pragma unroll 1
  for (int shift = 21; shift >= 0; shift = shift == 21 ? 10 : shift == 10 ? 0 : -1) {
    const int bits = shift == 0 ? 10 : 11, bins = 1 << bits;
    for (int i = threadIdx.x; i < kBins; i += kThreads) s.bins[i] = 0;
    __syncthreads();
    for_each(row, size, [&](int, float logit) {
      const uint32_t key = order_key(logit);
      if ((key & mask) != prefix) return;
      const Sum value = measure(logit, key);
      if (value != 0) atomicAdd(&s.bins[key >> shift & (bins - 1)], value);
    });
    if (threadIdx.x == 0 && extra != 0 && (extra_key & mask) == prefix) {
      atomicAdd(&s.bins[extra_key >> shift & (bins - 1)], extra);
    }
    __syncthreads();
    // Thread t has the bins 2 t and 2 t + 1 from the top.
    const int high = kBins - 1 - 2 * threadIdx.x;
    const Sum first = s.bins[high], second = s.bins[high - 1];
    const Sum through = passed + block_scan(first + second, s), before = through - first - second;
    if (threadIdx.x == 0) s.selected_bin = -1;
    __syncthreads();
    if (before < target && through >= target) {
      const bool in_first = before + first >= target;
      s.selected_bin = in_first ? high : high - 1;
      s.selected_sum = in_first ? before : before + first;
    }
    __syncthreads();
    const int bin = s.selected_bin;
    passed = s.selected_sum;
    __syncthreads();
    prefix |= static_cast<uint32_t>(bin) << shift;
    mask |= static_cast<uint32_t>(bins - 1) << shift;
  }
  *above = passed;
  return prefix;
}

/// The key of the token in place `count` of the ranking, from 1; `above` receives how many tokens have a higher key.
template <typename T>
__device__ __forceinline__ uint32_t select_nth(const RowView<T>& row, int size, int count, SampleScratch& s, Sum* above) {
  const auto one = [](float, uint32_t) { return Sum{1}; };
  return select_key(row, size, static_cast<Sum>(count), one, 0, 0, s, above);
}

/// Puts the measure of each segment of `length` tokens into s.segments. A warp takes one at a time.
template <typename T, typename Measure>
__device__ __forceinline__ void measure_segments(const RowView<T>& row, int size, int length, Measure measure,
                                                 SampleScratch& s) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int segment = warp; segment < kSegments; segment += kWarps) {
    const int begin = min(size, segment * length), end = min(size, begin + length);
    Sum sum = 0;
    for (int first = begin; first < end; first += 32 * 8) {
      float logits[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        if (first + j * 32 + lane < end) logits[j] = row[first + j * 32 + lane];
      }
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        if (first + j * 32 + lane < end) sum += measure(first + j * 32 + lane, logits[j]);
      }
    }
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
    if (lane == 0) s.segments[segment] = sum;
  }
}

/// The lowest id at which the running sum of measure(i, logit), in ascending id, reaches `target`; -1 if none does. First
/// the segment of the row, then the token in it.
template <typename T, typename Measure>
__device__ int find_running(const RowView<T>& row, int size, Measure measure, Sum target, SampleScratch& s) {
  const int length = (size + kSegments - 1) / kSegments;
  measure_segments(row, size, length, measure, s);
  __syncthreads();
  if (threadIdx.x == 0) s.found = -1;
  const Sum mine = threadIdx.x < kSegments ? s.segments[threadIdx.x] : 0;
  const Sum through = block_scan(mine, s);
  __syncthreads();
  const double limit = static_cast<double>(target) - 0.5;  // sums are whole numbers
  if (mine > 0 && static_cast<double>(through) > limit && static_cast<double>(through - mine) <= limit) {
    s.found = threadIdx.x;
    s.selected_sum = through - mine;
  }
  __syncthreads();
  const int segment = s.found;
  if (segment < 0) return -1;
  const Sum before = s.selected_sum;
  __syncthreads();
  if (threadIdx.x == 0) s.found = -1;
  constexpr int kEach = kMaxVocabSize / kSegments / kThreads;  // tokens of a segment that a thread has
  const int begin = segment * length, end = min(size, begin + length);
  Sum values[kEach], sum = 0;
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    const int i = begin + static_cast<int>(threadIdx.x) * kEach + j;
    values[j] = i < end ? measure(i, row[i]) : 0;
    sum += values[j];
  }
  Sum running = before + block_scan(sum, s) - sum;
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    const bool was_below = static_cast<double>(running) <= limit;
    running += values[j];
    if (values[j] > 0 && was_below && static_cast<double>(running) > limit) {
      s.found = begin + static_cast<int>(threadIdx.x) * kEach + j;
    }
  }
  __syncthreads();
  const int found = s.found;
  __syncthreads();
  return found;
}

}  // namespace tpserve::cuda

// Where top_k and top_p cut a row's ranking: what is ranked behind the cut has no part in the draw. Rule 4 of sample.cu.
//
// If the cut is among the few tokens near the best, these are sorted in shared memory: two passes over the row. Else it is
// found by radix selection (sample_select.cuh).
#pragma once

#include "sample_select.cuh"

namespace tpserve::cuda {

/// The tokens ranked above `key`, and the first `ties` with that key by id, are kept.
struct Cut {
  uint32_t key;
  Sum ties;
};

/// How a slot cuts and weighs.
struct Rule {
  float best, inverse_temperature, top_p;
  int top_k;  // 0: all

  __device__ __forceinline__ Sum weight(float logit) const { return logit_weight(logit, best, inverse_temperature); }
};

/// Sorts s.candidates, a power of two of them, descending: Batcher's bitonic sort.
__device__ inline void sort_candidates(int count, SampleScratch& s) {
  for (int size = 2; size <= count; size *= 2) {
    for (int stride = size / 2; stride > 0; stride /= 2) {
      __syncthreads();
      for (int pair = threadIdx.x; pair < count / 2; pair += kThreads) {
        const int low = pair / stride * stride * 2 + pair % stride, high = low + stride;
        const RankedToken a = s.candidates[low], b = s.candidates[high];
        if ((a < b) == ((low & size) == 0)) s.candidates[low] = b, s.candidates[high] = a;
      }
    }
  }
  __syncthreads();
}

/// How far from the best the tokens are that hold all that is kept, in temperatures: the least of a few distances; negative
/// if the tokens there are more than can be sorted, or do not hold it. `total` receives the weight of all tokens.
template <typename T>
__device__ __forceinline__ float candidate_distance(const RowView<T>& row, int size, const Rule& rule, SampleScratch& s,
                                                    Sum& total) {
  constexpr float kDistance[kDistances] = {2.0f, 4.0f, 6.0f, 8.0f, 10.0f, 13.0f};
  const int lane = threadIdx.x % 32;
  int counts[kDistances] = {};
  Sum weights[kDistances] = {};
  total = 0;
  for_each(row, size, [&](int, float logit) {
    const float distance = (rule.best - logit) * rule.inverse_temperature;
    if (distance > 32.0f) return;  // rounds to nothing
    const Sum weight = __float2ull_rn(expf(-distance) * kWeightUnit);
    total += weight;
    if (distance > kDistance[kDistances - 1]) return;
#pragma unroll
    for (int d = 0; d < kDistances; ++d) {
      if (distance <= kDistance[d]) ++counts[d], weights[d] += weight;
    }
  });
  if (threadIdx.x < kDistances) s.trial_count[threadIdx.x] = 0, s.trial_weight[threadIdx.x] = 0;
  total = block_sum(total, s);
#pragma unroll
  for (int d = 0; d < kDistances; ++d) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
      counts[d] += __shfl_xor_sync(~0u, counts[d], offset);
      weights[d] += __shfl_xor_sync(~0u, weights[d], offset);
    }
    if (lane == 0) atomicAdd(&s.trial_count[d], counts[d]), atomicAdd(&s.trial_weight[d], weights[d]);
  }
  __syncthreads();
  const double target = static_cast<double>(rule.top_p) * static_cast<double>(total);
  float least = -1.0f;
  for (int d = kDistances - 1; d >= 0; --d) {
    const bool enough = rule.top_k > 0 ? s.trial_count[d] >= rule.top_k : static_cast<double>(s.trial_weight[d]) >= target;
    if (enough && s.trial_count[d] <= kCandidates) least = kDistance[d];
  }
  return least;
}

/// Puts the tokens up to `distance` from the best into s.candidates, in their ranking; how many they are.
template <typename T>
__device__ __forceinline__ int rank_candidates(const RowView<T>& row, int size, const Rule& rule, float distance,
                                               SampleScratch& s) {
  if (threadIdx.x == 0) s.num_candidates = 0;
  for (int i = threadIdx.x; i < kCandidates; i += kThreads) s.candidates[i] = 0;
  __syncthreads();
  for_each(row, size, [&](int i, float logit) {
    if ((rule.best - logit) * rule.inverse_temperature > distance) return;
    s.candidates[atomicAdd(&s.num_candidates, 1)] = ranked(order_key(logit), i);
  });
  __syncthreads();
  const int count = s.num_candidates;
  int padded = 32;
  while (padded < count) padded *= 2;
  sort_candidates(padded, s);
  return count;
}

/// Cuts by sorting the tokens near the best. False if they are too many, or if those near do not hold all that is kept.
template <typename T>
__device__ bool cut_by_sorting(const RowView<T>& row, int size, const Rule& rule, SampleScratch& s, Cut* cut) {
  Sum total;
  const float distance = candidate_distance(row, size, rule, s, total);
  if (distance < 0.0f) return false;
  const int count = rank_candidates(row, size, rule, distance, s);
  int kept = rule.top_k > 0 ? min(rule.top_k, count) : count;
  if (rule.top_p < 1.0f) {
    const int i = 2 * threadIdx.x;
    Sum pair[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const float logit = logit_of_key(key_of(s.candidates[(i + j) % kCandidates]));
      pair[j] = i + j < kept ? rule.weight(logit) : 0;
    }
    const Sum through = block_scan(pair[0] + pair[1], s);
    __syncthreads();
    Sum all = 0;
    for (int w = 0; w < kWarps; ++w) all += s.warp_sums[w];
    // Without top_k the target is a share of all tokens, those far away too.
    const double goal = static_cast<double>(rule.top_p) * static_cast<double>(rule.top_k > 0 ? all : total);
    if (threadIdx.x == 0) s.found = kept;
    __syncthreads();
    const Sum first = through - pair[1], before = first - pair[0];
    const bool open = threadIdx.x == 0 || static_cast<double>(before) < goal;
    if (open && static_cast<double>(first) >= goal) {
      atomicMin(&s.found, i + 1);
    } else if (static_cast<double>(first) < goal && static_cast<double>(through) >= goal) {
      atomicMin(&s.found, i + 2);
    }
    __syncthreads();
    kept = max(1, s.found);
  }
  const uint32_t key = key_of(s.candidates[kept - 1]);
  int ties = 0;
  for (int i = threadIdx.x; i < kept; i += kThreads) ties += key_of(s.candidates[i]) == key;
  *cut = {key, block_sum(static_cast<Sum>(ties), s)};
  return true;
}

/// The same for any number of candidates.
template <typename T>
__device__ Cut cut_by_selection(const RowView<T>& row, int size, const Rule& rule, SampleScratch& s) {
  Cut cut{0, 0};  // keeps all: no key is as low as zero
  const auto weight = [&](float logit) { return logit_weight(logit, rule.best, rule.inverse_temperature); };
  if (rule.top_k > 0) {
    Sum above;
    cut.key = select_nth(row, size, rule.top_k, s, &above);
    cut.ties = static_cast<Sum>(rule.top_k) - above;
  }
  if (!(rule.top_p < 1.0f)) return cut;
  const Sum tied = cut.ties == 0 ? 0 : cut.ties * weight(logit_of_key(cut.key));
  const auto measure = [&](float logit, uint32_t key) { return key > cut.key ? weight(logit) : Sum{0}; };
  Sum total = 0;
  for_each(row, size, [&](int, float logit) { total += measure(logit, order_key(logit)); });
  total = block_sum(total, s) + tied;
  Sum target = static_cast<Sum>(ceil(static_cast<double>(rule.top_p) * static_cast<double>(total)));
  target = target < 1 ? 1 : target > total ? total : target;
  Sum above;
  const uint32_t key = select_key(row, size, target, measure, cut.key, tied, s, &above);
  const Sum one = weight(logit_of_key(key)), ties = one == 0 ? 1 : (target - above + one - 1) / one;
  return {key, key == cut.key && cut.ties < ties ? cut.ties : ties};
}

}  // namespace tpserve::cuda

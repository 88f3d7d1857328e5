// Log-probabilities of the best tokens of a row.
#pragma once

#include "sample_select.cuh"

namespace tpserve::cuda {

/// Writes the ids and log-probabilities of the first `num_top` tokens of row r's ranking, in its order. `best` is the
/// highest logit, `log_total` the logarithm of the sum of exp(logit - best).
template <typename T>
__device__ __forceinline__ void write_top_logprobs(const SampleParams& p, const RowView<T>& row, int size, int r,
                                                   int num_top, float best, double log_total, SampleScratch& s) {
  Sum above;
  const uint32_t key = select_nth(row, size, num_top, s, &above);
  if (threadIdx.x == 0) s.top_count = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < size; i += kThreads) {
    const uint32_t mine = order_key(row[i]);
    if (mine > key) s.top_tokens[atomicAdd(&s.top_count, 1)] = ranked(mine, i);
  }
  __syncthreads();
  if (threadIdx.x < 32) {  // the tied ones by ascending id, then all in order
    int held = s.top_count;
    for (int i = 0; i < size && held < num_top; i += 32) {
      const int at = i + static_cast<int>(threadIdx.x);
      const bool tied = at < size && order_key(row[at]) == key;
      const uint32_t mask = __ballot_sync(~0u, tied);
      const int place = held + __popc(mask & ((1u << threadIdx.x) - 1));
      if (tied && place < num_top) s.top_tokens[place] = ranked(key, at);
      held += __popc(mask);
    }
    __syncwarp();
    if (static_cast<int>(threadIdx.x) < num_top) {
      const RankedToken mine = s.top_tokens[threadIdx.x];
      int rank = 0;
      for (int i = 0; i < num_top; ++i) rank += s.top_tokens[i] > mine;
      const int token = id_of(mine);
      p.out_top_ids[r * kMaxTop + rank] = token;
      p.out_top_logprobs[r * kMaxTop + rank] = static_cast<float>(static_cast<double>(row[token]) - best - log_total);
    }
  }
}

}  // namespace tpserve::cuda

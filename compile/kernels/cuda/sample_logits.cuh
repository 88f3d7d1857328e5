// A row of logits as a block of the sampler goes through it, and what its tokens weigh.
#pragma once

#include "ranked_token.cuh"

namespace tpserve::cuda {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;

// --- Weights ----------------------------------------------------------------------------------------------------------

/// Of weights, or of tokens. Integers: the same whatever the order of adding, so on every rank.
using Sum = unsigned long long;

constexpr float kWeightUnit = 17592186044416.0f;  // 2^44: weights of kMaxVocabSize tokens fit in 64 bits

__device__ __forceinline__ Sum logit_weight(float logit, float best, float inverse_temperature) {
  return __float2ull_rn(expf((logit - best) * inverse_temperature) * kWeightUnit);
}

// --- Loads ------------------------------------------------------------------------------------------------------------

template <typename T>
struct RowView {
  const T* data;
  __device__ __forceinline__ float operator[](int i) const { return static_cast<float>(data[i]); }
};

/// Calls visit(i, logit) for this thread's share of the tokens [0, size), the lowest first: 16 bytes a load and kBatch loads
/// in flight, since one block alone goes through a row and mostly waits.
template <int kBatch = 4, typename T, typename Visit>
__device__ __forceinline__ void for_each(const RowView<T>& row, int size, Visit&& visit) {
  constexpr int kPerLoad = 16 / sizeof(T);
  const int to_aligned = static_cast<int>(-reinterpret_cast<uintptr_t>(row.data) % 16 / sizeof(T));
  const int head = to_aligned < size ? to_aligned : size, num_loads = (size - head) / kPerLoad;
  const int tail = head + num_loads * kPerLoad, thread = static_cast<int>(threadIdx.x);
  if (thread < head) visit(thread, row[thread]);
  const uint4* source = reinterpret_cast<const uint4*>(row.data + head);
  for (int first = thread; first < num_loads; first += kThreads * kBatch) {
    uint4 loaded[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      if (first + j * kThreads < num_loads) loaded[j] = source[first + j * kThreads];
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int place = first + j * kThreads;
      if (place >= num_loads) break;
      const T* logits = reinterpret_cast<const T*>(&loaded[j]);
#pragma unroll
      for (int k = 0; k < kPerLoad; ++k) visit(head + place * kPerLoad + k, static_cast<float>(logits[k]));
    }
  }
  if (thread < size - tail) visit(tail + thread, row[tail + thread]);
}

}  // namespace tpserve::cuda

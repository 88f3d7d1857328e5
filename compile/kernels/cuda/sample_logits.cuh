// A row of logits as a block of the sampler goes through it: what ranks its tokens, and what they weigh.
#pragma once

#include "common.cuh"

namespace tpserve::cuda {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;

// --- Ranks ------------------------------------------------------------------------------------------------------------

/// Orders as the logit does.
__device__ __forceinline__ uint32_t order_key(float logit) {
  const uint32_t bits = __float_as_uint(logit + 0.0f);  // -0 and 0 are equal
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float logit_of_key(uint32_t key) {
  return __uint_as_float(key & 0x80000000u ? key & 0x7FFFFFFFu : ~key);
}

/// A token as one number: the higher is ranked first, by key, then by lower id. None is zero.
using RankedToken = unsigned long long;

__device__ __forceinline__ RankedToken ranked(uint32_t key, int id) {
  return static_cast<RankedToken>(key) << 32 | (0xFFFFFFFFu - static_cast<uint32_t>(id));
}

__device__ __forceinline__ uint32_t key_of(RankedToken token) { return static_cast<uint32_t>(token >> 32); }

__device__ __forceinline__ int id_of(RankedToken token) {
  return static_cast<int>(0xFFFFFFFFu - static_cast<uint32_t>(token));
}

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

/// Calls visit(i, logit) for this thread's share of the tokens [0, size), in any order: 16 bytes a load and several loads in
/// flight, since one block alone goes through a row and mostly waits.
template <typename T, typename Visit>
__device__ __forceinline__ void for_each(const RowView<T>& row, int size, Visit&& visit) {
  constexpr int kBatch = 4, kPerLoad = 16 / sizeof(T);
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

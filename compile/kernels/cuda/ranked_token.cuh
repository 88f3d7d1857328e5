// What ranks the tokens of a row of logits, and which rows need no more than their best one.
#pragma once

#include "common.cuh"

namespace tpserve::cuda {

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

/// The most a row can have: it has a NaN. Its key is no number's.
constexpr RankedToken kNotANumber = ~RankedToken{0};

__device__ __forceinline__ RankedToken ranked_or_nan(float logit, int id) {
  return logit != logit ? kNotANumber : ranked(order_key(logit), id);
}

/// Places of a row of which each has the best token of a slice of its columns.
constexpr int kBestSlices = 8;

/// What of a slot's sampling parameters, (slots,) each, decides whether the best token is all that its row is wanted for.
struct GreedyParams {
  const int32_t* slots;  // (R,)
  const float *temperature, *frequency, *presence;
  const int32_t *bias_count, *num_logprobs, *mask_rows;
  int num_slots;

  __device__ __forceinline__ bool is_padding(int row) const {
    const int slot = __ldcg(slots + row);
    return slot < 0 || slot >= num_slots;
  }
  /// Of a row that is not padding.
  __device__ __forceinline__ bool needs_only_best(int row) const {
    const int slot = __ldcg(slots + row);
    return __ldcg(temperature + slot) <= 0.0f && __ldcg(frequency + slot) == 0.0f && __ldcg(presence + slot) == 0.0f &&
           __ldcg(bias_count + slot) <= 0 && __ldcg(num_logprobs + slot) < 0 && __ldcg(mask_rows + slot) < 0;
  }
};

}  // namespace tpserve::cuda

// What attention takes and where its output goes, of items of any kind.
#pragma once

#include <type_traits>

#include "attention_plan.cuh"
#include "grouped_scales.cuh"
#include "rope.cuh"

namespace tpserve::cuda {

template <typename KV>
struct AttentionParams {
  NewTokens added;  // of a step that only decodes
  const bf16* q;    // of any other
  PagedKV<KV> kv;
  int32_t* plan;
  float* partial;  // places of slots.cuh
  bf16* out;       // or, with a scale for each token and head:
  fp8* quantized;
  float* scales;
  int num_tokens, group, window;
  float scale_log2;  // scale * log2(e): weights are exp2((score - max) * scale_log2)
  PlanLayout layout;
};

/// What scores are multiplied by; of e4m3 pages it is read once an item.
template <typename KV>
struct ScoreScale {
  __device__ explicit ScoreScale(const AttentionParams<KV>&) {}
  __device__ float of(const AttentionParams<KV>& p) const { return p.scale_log2; }
};
template <>
struct ScoreScale<fp8> {
  float value;
  __device__ explicit ScoreScale(const AttentionParams<fp8>& p) : value(p.scale_log2 * __ldg(p.kv.scales)) {}
  __device__ float of(const AttentionParams<fp8>&) const { return value; }
};

/// What sums of weighted values are multiplied by.
template <typename KV>
__device__ __forceinline__ float value_scale(const AttentionParams<KV>& p) {
  if constexpr (std::is_same_v<KV, fp8>) return __ldg(p.kv.scales + 1);
  return 1.0f;
}

/// What attention gives: bfloat16, or e4m3 with a scale for each head of 128, or two of 64, which are a group
/// (grouped_scales.cuh).
enum class Out { kBf16, kGrouped };

/// Rows, of heads beside each other, whose output shares a scale.
template <Out kOut, int kHeadDim>
constexpr int kRowsOfScale = kOut == Out::kGrouped ? kGroupSize / kHeadDim : 1;

/// Where a row's output begins: of a token and a query head.
template <int kHeadDim, typename KV>
__device__ __forceinline__ int64_t out_at(const AttentionParams<KV>& p, int token, int query_head) {
  return (static_cast<int64_t>(token) * p.kv.num_kv_heads * p.group + query_head) * kHeadDim;
}

/// Stores the scale of a group whose largest magnitude is `largest`; returns what its values are multiplied by. One lane
/// of those that have the group gives `writes`.
template <typename KV>
__device__ __forceinline__ float store_scale(const AttentionParams<KV>& p, int token, int group, float largest,
                                             bool writes) {
  largest = fmaxf(largest, 1e-12f);
  if (writes) p.scales[scale_at(group, token, p.num_tokens)] = largest / kFp8Max;
  return kFp8Max / largest;
}

}  // namespace tpserve::cuda

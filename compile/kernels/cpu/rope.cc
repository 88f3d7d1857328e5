// Rotary embedding of queries and keys, and the append of keys and values to their pages.
//
// The rotation is Hugging Face's `rotate_half`: dimension i pairs with i + head_dim / 2 (Su et al., RoFormer, eq. 34,
// with the pairs laid out in halves). With norm weights each head of q and k is first RMS-normalised (Qwen3).
#include <vector>

#include "paged.h"

namespace tpserve {
namespace {

struct HeadNorm {
  const float* q_weight;
  const float* k_weight;
  float eps;
};

void normalise(const float* x, const float* weight, float eps, int64_t size, float* out) {
  float squares = 0.0f;
  for (int64_t i = 0; i < size; ++i) squares += x[i] * x[i];
  const float scale = 1.0f / std::sqrt(squares / static_cast<float>(size) + eps);
  for (int64_t i = 0; i < size; ++i) out[i] = x[i] * scale * weight[i];
}

TPSERVE_INLINE void rotate(const float* x, const float* table, int64_t half, float* out, int64_t stride) {
  const float *cosines = table, *sines = table + half;
  for (int64_t i = 0; i < half; ++i) {
    const float a = x[i], b = x[i + half];
    out[i * stride] = a * cosines[i] - b * sines[i];
    out[(i + half) * stride] = b * cosines[i] + a * sines[i];
  }
}

void append(const TensorView& qkv, const TensorView& positions, const TensorView& token_slots,
            const TensorView& page_table, const TensorView& rope, const TensorView& kv_layer, const TensorView& q_out,
            const HeadNorm* norm) {
  check_rank("q_out", q_out, 3);
  check_rank("rope", rope, 2);
  const int64_t num_tokens = q_out.size(0), num_heads = q_out.size(1), dim = q_out.size(2);
  const PagedKV kv = PagedKV::from(kv_layer, page_table, dim);
  const int64_t num_kv_heads = kv.num_kv_heads, width = (num_heads + 2 * num_kv_heads) * dim;
  if (dim % 2 != 0) TVM_FFI_THROW(ValueError) << "head_dim is " << dim << ", expected an even number";
  const float* source = checked<float>("qkv", qkv, {num_tokens, width});
  const int32_t* position = checked<int32_t>("positions", positions, {num_tokens});
  const int32_t* slot = checked<int32_t>("token_slots", token_slots, {num_tokens});
  const float* table = checked<float>("rope", rope, {-1, dim});
  float* queries = checked<float>("q_out", q_out, {num_tokens, num_heads, dim});
  kv.check_tokens(slot, position, num_tokens);
  check_indices("positions", position, num_tokens, rope.size(0));
  for (int64_t t = 0; t < num_tokens; ++t) {
    kv.check_pages(slot[t], position[t] / kv.page_size, position[t] / kv.page_size);
  }

  const int64_t half = dim / 2;
  parallel_for(num_tokens, num_threads(num_tokens * width * 2, num_tokens), [&](int64_t t) {
    static thread_local std::vector<float> normalised;
    normalised.resize(static_cast<size_t>(dim));
    const float* row = source + t * width;
    const float* angles = table + position[t] * dim;
    const int64_t page = kv.table[slot[t] * kv.pages_per_slot + position[t] / kv.page_size];
    const int64_t offset = position[t] % kv.page_size;
    for (int64_t h = 0; h < num_heads; ++h, row += dim) {
      const float* head = row;
      if (norm != nullptr) normalise(head, norm->q_weight, norm->eps, dim, normalised.data()), head = normalised.data();
      rotate(head, angles, half, queries + (t * num_heads + h) * dim, 1);
    }
    for (int64_t h = 0; h < num_kv_heads; ++h, row += dim) {
      const float* head = row;
      if (norm != nullptr) normalise(head, norm->k_weight, norm->eps, dim, normalised.data()), head = normalised.data();
      rotate(head, angles, half, kv.keys(page, h) + offset, kv.page_size);
    }
    for (int64_t h = 0; h < num_kv_heads; ++h, row += dim) {
      std::memcpy(kv.values(page, h) + offset * dim, row, static_cast<size_t>(dim) * sizeof(float));
    }
  });
}

void rope_append(TensorView qkv, TensorView positions, TensorView token_slots, TensorView page_table, TensorView rope,
                 TensorView kv_layer, TensorView q_out) {
  append(qkv, positions, token_slots, page_table, rope, kv_layer, q_out, nullptr);
}

void qk_norm_rope_append(TensorView qkv, TensorView q_weight, TensorView k_weight, double eps, TensorView positions,
                         TensorView token_slots, TensorView page_table, TensorView rope, TensorView kv_layer,
                         TensorView q_out) {
  check_rank("q_out", q_out, 3);
  const int64_t dim = q_out.size(2);
  const HeadNorm norm{checked<float>("q_weight", q_weight, {dim}), checked<float>("k_weight", k_weight, {dim}),
                      static_cast<float>(eps)};
  append(qkv, positions, token_slots, page_table, rope, kv_layer, q_out, &norm);
}

TVM_FFI_DLL_EXPORT_TYPED_FUNC(rope_append, rope_append);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(qk_norm_rope_append, qk_norm_rope_append);

}  // namespace
}  // namespace tpserve

// Where a token's keys and values live. One layer of the KV pages is (num_pages, num_kv_heads, 2, page_size * head_dim)
// of bfloat16 or e4m3, keys then values, both by position; kv_layout.cuh says how within a page and head.
//
// A plain bulk copy of sixteen rows of a panel lands in shared memory free of bank conflicts, and with page_size 16 the
// keys and values of a page and head are one copy.
#pragma once

#include "common.cuh"
#include "kv_layout.cuh"

namespace tpserve::cuda {

/// What e4m3 pages have besides: a value is what is stored times the scale of its layer.
template <typename KV>
struct KVScales {};
template <>
struct KVScales<fp8> {
  const float* scales;  // (2,): of keys, of values
};

inline KVScales<fp8> scales_from(const TensorView& kv_scale) { return {checked<float>("kv_scale", kv_scale, {2})}; }

template <typename KV>
struct PagedKV : KVScales<KV> {
  KV* data;
  const int32_t* table;  // (num_slots, pages_per_slot)
  int num_pages, num_kv_heads, page_size, num_slots, pages_per_slot;

  static PagedKV from(KVScales<KV> scales, const TensorView& kv_layer, const TensorView& page_table, int64_t head_dim) {
    check_rank("kv_layer", kv_layer, 4);
    check_rank("page_table", page_table, 2);
    const int64_t elements = kv_layer.size(3);
    if (head_dim != 64 && head_dim != 128) {
      TVM_FFI_THROW(ValueError) << "head_dim is " << head_dim << ", expected 64 or 128";
    }
    if (elements % (head_dim * kSliceRows) != 0) {
      TVM_FFI_THROW(ValueError) << "kv_layer has " << elements << " elements a page, expected a multiple of "
                                << kSliceRows << " positions of " << head_dim;
    }
    return {scales,
            checked<KV>("kv_layer", kv_layer, {-1, -1, 2, -1}),
            checked<int32_t>("page_table", page_table, {-1, -1}),
            static_cast<int>(kv_layer.size(0)),
            static_cast<int>(kv_layer.size(1)),
            static_cast<int>(elements / head_dim),
            static_cast<int>(page_table.size(0)),
            static_cast<int>(page_table.size(1))};
  }

  /// Keys of (page, head); values follow page_size * head_dim elements later.
  template <int kHeadDim>
  __device__ __forceinline__ KV* keys(int page, int head) const {
    return data + (static_cast<int64_t>(page) * num_kv_heads + head) * 2 * page_size * kHeadDim;
  }
};

}  // namespace tpserve::cuda

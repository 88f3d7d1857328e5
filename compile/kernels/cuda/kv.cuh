// Where a token's keys and values live. One layer of the KV pages is (num_pages, num_kv_heads, 2, page_size * head_dim)
// bfloat16, keys then values, both by position. Within a page and head:
//
//   head_dim / 64 panels of (page_size, 64); a row of a panel is 128 bytes, eight 16-byte chunks, and chunk c of row r
//   stands at place c ^ (r % 8).
//
// So a plain bulk copy of sixteen rows lands in shared memory free of bank conflicts, and eight rows are a core matrix of
// wgmma's 128-byte swizzle. With page_size 16 the keys and values of a page and head are one copy.
#pragma once

#include "common.cuh"

namespace tpserve::cuda {

constexpr int kSliceRows = 16;  // positions fetched together; page_size is a multiple of it

struct PagedKV {
  bf16* data;
  const int32_t* table;  // (num_slots, pages_per_slot)
  int num_pages, num_kv_heads, page_size, num_slots, pages_per_slot;

  static PagedKV from(const TensorView& kv_layer, const TensorView& page_table, int64_t head_dim) {
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
    return {checked<bf16>("kv_layer", kv_layer, {-1, -1, 2, -1}),
            checked<int32_t>("page_table", page_table, {-1, -1}),
            static_cast<int>(kv_layer.size(0)),
            static_cast<int>(kv_layer.size(1)),
            static_cast<int>(elements / head_dim),
            static_cast<int>(page_table.size(0)),
            static_cast<int>(page_table.size(1))};
  }

  /// Keys of (page, head); values follow page_size * head_dim elements later.
  template <int kHeadDim>
  __device__ __forceinline__ bf16* keys(int page, int head) const {
    return data + (static_cast<int64_t>(page) * num_kv_heads + head) * 2 * page_size * kHeadDim;
  }

  /// Offset of eight dimensions, from d (a multiple of 8), of a row within keys or values of (page, head).
  __device__ __forceinline__ int chunk(int row, int d) const {
    return (d / 64 * page_size + row) * 64 + (d / 8 % 8 ^ row % 8) * 8;
  }
};

}  // namespace tpserve::cuda

// Where a token's keys and values live. One layer of the KV pages is (num_pages, num_kv_heads, 2, head_dim * page_size)
// float32; within a page K is transposed, (head_dim, page_size), and V is (page_size, head_dim).
//
//   position:     0 ........ 15 | 16 ....... 31 | 32 ...
//   page:         table[slot,0] | table[slot,1] | table[slot,2]
#pragma once

#include "common.h"

namespace tpserve {

struct PagedKV {
  float* data;
  const int32_t* table;  // (num_slots, pages_per_slot)
  int64_t num_pages, num_kv_heads, head_dim, page_size, num_slots, pages_per_slot;

  /// Checks shapes; `head_dim` comes from the queries, since a page states only head_dim * page_size.
  static PagedKV from(const TensorView& kv_layer, const TensorView& page_table, int64_t head_dim) {
    check_rank("kv_layer", kv_layer, 4);
    check_rank("page_table", page_table, 2);
    const int64_t page_elements = kv_layer.size(3);
    if (head_dim < 1 || page_elements % head_dim != 0) {
      TVM_FFI_THROW(ValueError) << "kv_layer has " << page_elements << " elements a page, not a multiple of head_dim "
                                << head_dim;
    }
    return {checked<float>("kv_layer", kv_layer, {-1, -1, 2, -1}),
            checked<int32_t>("page_table", page_table, {-1, -1}),
            kv_layer.size(0),
            kv_layer.size(1),
            head_dim,
            page_elements / head_dim,
            page_table.size(0),
            page_table.size(1)};
  }

  float* keys(int64_t page, int64_t head) const {
    return data + (page * num_kv_heads + head) * 2 * head_dim * page_size;
  }
  float* values(int64_t page, int64_t head) const { return keys(page, head) + head_dim * page_size; }

  /// Throws unless token_slots and positions are in range.
  void check_tokens(const int32_t* token_slots, const int32_t* positions, int64_t num_tokens) const {
    check_indices("token_slots", token_slots, num_tokens, num_slots);
    check_indices("positions", positions, num_tokens, pages_per_slot * page_size);
  }

  /// Throws unless pages [first, last] of a slot exist.
  void check_pages(int64_t slot, int64_t first, int64_t last) const {
    for (int64_t i = first; i <= last; ++i) {
      const int64_t page = table[slot * pages_per_slot + i];
      if (page < 0 || page >= num_pages) {
        TVM_FFI_THROW(IndexError) << "page_table[" << slot << ", " << i << "] is " << page << ", expected 0 to "
                                  << num_pages - 1;
      }
    }
  }
};

}  // namespace tpserve

// What stays on the device between steps: the last token of every slot, and the page tables.
#include "common.cuh"

namespace tpserve::cuda {
namespace {

constexpr int kThreads = 256;

dim3 blocks_for(int64_t count) { return dim3(static_cast<unsigned>((count + kThreads - 1) / kThreads)); }

__global__ void load_last_tokens_kernel(const int32_t* slots, const int32_t* last, int32_t* ids, int count) {
  pdl_launch();
  pdl_wait();
  const int t = blockIdx.x * kThreads + threadIdx.x;
  if (t >= count || __ldcg(ids + t) >= 0) return;
  const int slot = __ldcg(slots + t);
  ids[t] = slot < 0 ? 0 : __ldcg(last + slot);
}

/// Decoding rows come with token id -1 and get the slot's last token; (T,), (S,), (T,) int32.
void load_last_tokens(TensorView token_slots, TensorView last_token, TensorView token_ids) {
  check_rank("token_ids", token_ids, 1);
  const int64_t count = token_ids.size(0);
  launch(load_last_tokens_kernel, blocks_for(count), kThreads, 0, stream_of(token_ids),
         checked<int32_t>("token_slots", token_slots, {count}), checked<int32_t>("last_token", last_token, {-1}),
         checked<int32_t>("token_ids", token_ids, {count}), static_cast<int>(count));
}

__global__ void store_last_tokens_kernel(const int32_t* ids, const int32_t* slots, int32_t* last, int count) {
  pdl_launch();
  pdl_wait();
  const int r = blockIdx.x * kThreads + threadIdx.x;
  if (r >= count) return;
  const int slot = __ldcg(slots + r);
  if (slot >= 0) last[slot] = __ldcg(ids + r);
}

/// last_token[slots[r]] = ids[r]; padded rows have slot -1. (R,), (R,), (S,) int32.
void store_last_tokens(TensorView ids, TensorView slots, TensorView last_token) {
  check_rank("ids", ids, 1);
  const int64_t count = ids.size(0);
  launch(store_last_tokens_kernel, blocks_for(count), kThreads, 0, stream_of(ids),
         checked<int32_t>("ids", ids, {count}), checked<int32_t>("slots", slots, {count}),
         checked<int32_t>("last_token", last_token, {-1}), static_cast<int>(count));
}

__global__ void scatter_pages_kernel(const int32_t* updates, int32_t* table, int count, int width) {
  pdl_launch();
  pdl_wait();
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (i >= count) return;
  table[static_cast<int64_t>(updates[3 * i]) * width + updates[3 * i + 1]] = updates[3 * i + 2];
}

/// page_table[slot, index] = page for each (slot, index, page) of updates (U, 3) int32.
void scatter_pages(TensorView updates, TensorView page_table) {
  check_rank("updates", updates, 2);
  check_rank("page_table", page_table, 2);
  const int64_t count = updates.size(0);
  launch(scatter_pages_kernel, blocks_for(count), kThreads, 0, stream_of(updates),
         checked<int32_t>("updates", updates, {count, 3}), checked<int32_t>("page_table", page_table, {-1, -1}),
         static_cast<int>(count), static_cast<int>(page_table.size(1)));
}

TVM_FFI_DLL_EXPORT_TYPED_FUNC(load_last_tokens, load_last_tokens);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(store_last_tokens, store_last_tokens);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(scatter_pages, scatter_pages);

}  // namespace
}  // namespace tpserve::cuda

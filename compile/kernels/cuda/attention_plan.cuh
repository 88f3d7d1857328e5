// The kernel that finds a step's attention items: once, for all layers.
#pragma once

#include "attention_items.cuh"
#include "kv.cuh"

namespace tpserve::cuda {

constexpr int kConsumerWarps = 8;
constexpr int kTileRows = 16 * kConsumerWarps;
constexpr int kPlanThreads = 1024;
constexpr int kMaxPlanTokens = 32768;

__device__ __forceinline__ Item load_item(const Item* source) {
  Item item;
#pragma unroll
  for (int j = 0; j < 3; ++j) {
    reinterpret_cast<uint4*>(&item)[j] = load_l2(reinterpret_cast<const uint4*>(source) + j);
  }
  return item;
}

/// Which of the two plans of T tokens of S slots a tensor is, by its size.
inline PlanLayout layout_of(const TensorView& plan, int64_t num_tokens, int64_t num_slots) {
  check_rank("plan", plan, 1);
  const PlanLayout any(static_cast<int>(num_tokens), static_cast<int>(num_slots), false);
  const PlanLayout decodes(static_cast<int>(num_tokens), static_cast<int>(num_slots), true);
  if (plan.size(0) != any.size() && plan.size(0) != decodes.size()) {
    TVM_FFI_THROW(ValueError) << "plan has " << plan.size(0) << " words, expected " << any.size() << " or, of one token a "
                              << "slot, " << decodes.size() << ": as attention_plan_size gives for " << num_tokens
                              << " tokens of " << num_slots << " slots";
  }
  return plan.size(0) == any.size() ? any : decodes;
}

/// Room for decode items and rows of partial sums, handed out as threads ask.
struct DecodeRoom {
  int num_items, num_runs, num_rows;

  /// Rows of a run's sums, or -1: a slot with two runs would need more room than there is. Such a batch is wrong, and loses
  /// its last runs.
  __device__ int take_rows(int rows, int max_runs, int max_rows) {
    const int first = atomicAdd(&num_rows, rows);
    return first + rows > max_rows || atomicAdd(&num_runs, 1) >= max_runs ? -1 : first;
  }

  /// Puts the items of a run, or of a piece of one, whose sums begin at `first_row`.
  __device__ void put(Item item, int first_row, Item* items) {
    if (first_row < 0) return;
    item.first_row = first_row;
    const int at = atomicAdd(&num_items, item.num_splits);
    for (int i = 0; i < item.num_splits; ++i, ++item.split) items[at + i] = item;
  }
};

static __global__ void __launch_bounds__(kPlanThreads)
    plan_kernel(const int32_t* positions, const int32_t* slots, int num_tokens, int num_slots, int group, int num_kv_heads,
                int window, PlanLayout layout, int32_t* plan) {
  __shared__ uint32_t starts[kMaxPlanTokens / 32 + 1];  // bit t: a run starts at token t
  __shared__ int num_wide;
  __shared__ DecodeRoom room;
  pdl_launch();
  pdl_wait();
  const int max_rows = static_cast<int>(max_partial_rows(num_tokens, num_slots, group));
  const int max_runs = min(num_tokens, num_slots);
  if (threadIdx.x == 0) num_wide = 0, room = {};
  for (int t = threadIdx.x; t < (num_tokens / 32 + 1) * 32; t += kPlanThreads) {
    bool start = t >= num_tokens || t == 0;
    if (!start) {
      const int slot = __ldcg(slots + t), before = __ldcg(slots + t - 1);
      start = slot < 0 ? before >= 0 : slot != before || __ldcg(positions + t) != __ldcg(positions + t - 1) + 1;
    }
    const uint32_t mask = __ballot_sync(~0u, start);
    if (threadIdx.x % 32 == 0) starts[t / 32] = mask;
  }
  __syncthreads();
  const int tile_tokens = kTileRows / group;
  for (int t = threadIdx.x; t < num_tokens; t += kPlanThreads) {
    if (!(starts[t / 32] >> t % 32 & 1)) continue;
    int word = (t + 1) / 32;
    uint32_t later = starts[word] & ~0u << (t + 1) % 32;
    while (later == 0) later = starts[++word];
    const int count = word * 32 + __ffs(later) - 1 - t;
    const int slot = __ldcg(slots + t), position = __ldcg(positions + t);
    const int pieces = slot < 0 ? 0 : decode_pieces(count, position, group);
    if (slot < 0 || (count * group > kDecodeRows && pieces == 0)) {
      const Item item{t, count, slot < 0 ? kPadding : kPrefill, slot, position, 0, 1, 0, 0, 0, {}};
      const int tiles = (count + tile_tokens - 1) / tile_tokens;
      const int at = atomicAdd(&num_wide, tiles);
      for (int i = 0; i < tiles; ++i) {  // the last first: they take longest
        const int offset = (tiles - 1 - i) * tile_tokens;
        Item tile = item;
        tile.token = t + offset, tile.position = item.position + offset;
        tile.count = min(tile_tokens, count - offset);
        layout.wide(plan)[at + i] = tile;
      }
      continue;
    }
    const Item run = decode_item(t, count, slot, position, window, num_kv_heads);
    const int first_row = room.take_rows(min(count, kDecodeRows / group) * group, max_runs, max_rows);
    if (pieces == 0) room.put(run, first_row, layout.decode(plan));
    for (int i = 0; i < pieces; ++i) {
      room.put(piece_item(run, i, pieces, group, window, num_kv_heads), first_row, layout.decode(plan));
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) plan[0] = num_wide, plan[1] = room.num_items;
}

/// Of a step in which each token is its slot's only one: there are no runs to look for.
///
/// It lets no kernel start before it ends: attention, which starts before the kernels before it have ended, then finds the
/// plan, and all pages as the step before has left them.
static __global__ void __launch_bounds__(kPlanThreads)
    decode_plan_kernel(const int32_t* positions, const int32_t* slots, int num_tokens, int num_slots, int group,
                       int num_kv_heads, int window, PlanLayout layout, int32_t* plan) {
  __shared__ DecodeRoom room;
  pdl_wait();
  const int max_rows = static_cast<int>(max_partial_rows(num_tokens, num_slots, group));
  const int max_runs = min(num_tokens, num_slots);
  if (threadIdx.x == 0) room = {};
  __syncthreads();
  for (int t = threadIdx.x; t < num_tokens; t += kPlanThreads) {
    const int slot = __ldcg(slots + t), position = __ldcg(positions + t);
    if (slot < 0) {
      layout.decode(plan)[atomicAdd(&room.num_items, 1)] = {t, 1, kPadding, slot, position, 0, 1, 0, 0, 0, {}};
    } else {
      const Item run = decode_item(t, 1, slot, position, window, num_kv_heads);
      room.put(run, room.take_rows(group, max_runs, max_rows), layout.decode(plan));
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) plan[0] = 0, plan[1] = room.num_items;
  __threadfence();  // the end alone makes it seen by those who wait for it
}

}  // namespace tpserve::cuda

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

/// Room for decode items and rows of partial sums, handed out as threads ask: first all count, then all put. The longest
/// items stand first, so that no block begins one when the others are about to end (`item_of_turn`). The order of equal
/// ones is that in which threads came, but a run's own items stay in theirs: the last waits for the others' sums, which
/// are then before it in its own block, or within what other blocks do first.
struct DecodeRoom {
  static constexpr int kLengths = 32;  // in stages; longer ones are one kind
  int num_items, num_runs, num_rows;
  int at[kLengths];  // by length: items; once arranged, where the next of them goes

  __device__ int* of_length(int positions) {
    return at + min((positions + kStageRows - 1) / kStageRows, kLengths) - 1;
  }
  /// Of all chunks of a run but the last, which is as long or shorter; with a window the first may be shorter too.
  __device__ int* whole(const Item& item) { return of_length(item.chunk); }
  __device__ int* last(const Item& item) { return of_length((item.position + item.count - 1) % item.chunk + 1); }

  /// Counts a run's rows. A slot with two runs would need more room than there is (`fits`).
  __device__ void count_run(int rows) { atomicAdd(&num_runs, 1), atomicAdd(&num_rows, rows); }

  /// Counts the items of a run, or of a piece of one.
  __device__ void count(const Item& item) {
    if (item.num_splits > 1) atomicAdd(whole(item), item.num_splits - 1);
    atomicAdd(last(item), 1);
  }

  /// Called by one thread when all have counted. A batch that has more runs than slots is wrong, and decodes nothing.
  __device__ void arrange(int max_runs, int max_rows) {
    const bool fits = num_runs <= max_runs && num_rows <= max_rows;
    for (int i = kLengths - 1; i >= 0 && fits; --i) {
      const int count = at[i];
      at[i] = num_items;
      num_items += count;
    }
    num_runs = fits ? 1 : 0, num_rows = 0;
  }

  __device__ bool fits() const { return num_runs != 0; }  // once arranged
  __device__ int take_rows(int rows) { return atomicAdd(&num_rows, rows); }

  /// Puts what `count` counted; its sums begin at `first_row`.
  __device__ void put(Item item, int first_row, Item* items) {
    item.first_row = first_row;
    if (item.num_splits > 1) {
      const int first = atomicAdd(whole(item), item.num_splits - 1);
      for (int i = 0; i < item.num_splits - 1; ++i, ++item.split) items[first + i] = item;
    }
    items[atomicAdd(last(item), 1)] = item;
  }
};

/// It lets no kernel start before it ends: attention, which starts before the kernels before it have ended, then finds the
/// plan, and all pages as the step before has left them. So does the kernel that appends, of tokens' places and their pages.
static __global__ void __launch_bounds__(kPlanThreads)
    plan_kernel(const int32_t* positions, const int32_t* slots, int num_tokens, int num_slots, int group, int num_kv_heads,
                int window, PlanLayout layout, int32_t* plan) {
  __shared__ uint32_t starts[kMaxPlanTokens / 32 + 1];  // bit t: a run starts at token t
  __shared__ int num_wide;
  __shared__ DecodeRoom room;
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
  const auto put_tiles = [&](const Item& item) {
    const int tiles = (item.count + tile_tokens - 1) / tile_tokens;
    const int at = atomicAdd(&num_wide, tiles);
    for (int i = 0; i < tiles; ++i) {  // the last first: they take longest
      const int offset = (tiles - 1 - i) * tile_tokens;
      Item tile = item;
      tile.token += offset, tile.position += offset;
      tile.count = min(tile_tokens, item.count - offset);
      layout.wide(plan)[at + i] = tile;
    }
  };
  const auto visit_runs = [&](bool is_counting) {
    for (int t = threadIdx.x; t < num_tokens; t += kPlanThreads) {
      if (!(starts[t / 32] >> t % 32 & 1)) continue;
      int word = (t + 1) / 32;
      uint32_t later = starts[word] & ~0u << (t + 1) % 32;
      while (later == 0) later = starts[++word];
      const int count = word * 32 + __ffs(later) - 1 - t;
      const int slot = __ldcg(slots + t), position = __ldcg(positions + t);
      const int pieces = slot < 0 ? 0 : decode_pieces(count, position, group);
      if (slot < 0 || (count * group > kDecodeRows && pieces == 0)) {
        if (is_counting) put_tiles({t, count, slot < 0 ? kPadding : kPrefill, slot, position, 0, 1, 0, 0, 0, position, {}});
        continue;
      }
      const Item run = decode_item(t, count, slot, position, window, num_kv_heads);
      const int rows = min(count, kDecodeRows / group) * group;
      if (is_counting) room.count_run(rows);
      const int first_row = is_counting ? 0 : room.take_rows(rows);
      for (int i = 0; i < max(pieces, 1); ++i) {
        const Item item = pieces == 0 ? run : piece_item(run, i, pieces, group, window, num_kv_heads);
        is_counting ? room.count(item) : room.put(item, first_row, layout.decode(plan));
      }
    }
    __syncthreads();
  };
  visit_runs(true);
  if (threadIdx.x == 0) room.arrange(max_runs, max_rows);
  __syncthreads();
  if (room.fits()) visit_runs(false);
  if (threadIdx.x == 0) plan[0] = num_wide, plan[1] = room.num_items;
  __threadfence();  // the end alone makes it seen by those who wait for it
}

/// Of steps in which each token is its slot's only one, one for each block: there are no runs to look for. It, too, lets none
/// start before. `pitch` and `plan_pitch`: from a step's positions and slots, and from its plan, to the next's.
static __global__ void __launch_bounds__(kPlanThreads)
    decode_plan_kernel(const int32_t* positions, const int32_t* slots, int num_tokens, int num_slots, int group,
                       int num_kv_heads, int window, PlanLayout layout, int32_t* plan, int pitch, int plan_pitch) {
  __shared__ DecodeRoom room;
  positions += blockIdx.x * pitch, slots += blockIdx.x * pitch, plan += blockIdx.x * plan_pitch;
  pdl_wait();
  const int max_rows = static_cast<int>(max_partial_rows(num_tokens, num_slots, group));
  const int max_runs = min(num_tokens, num_slots);
  if (threadIdx.x == 0) room = {};
  __syncthreads();
  const auto visit_tokens = [&](bool is_counting) {
    for (int t = threadIdx.x; t < num_tokens; t += kPlanThreads) {
      const int slot = __ldcg(slots + t), position = __ldcg(positions + t);
      const Item item = slot < 0 ? Item{t, 1, kPadding, slot, 0, 0, 1, 0, kChunk, 0, 0, {}}
                                 : decode_item(t, 1, slot, position, window, num_kv_heads);
      const int rows = slot < 0 ? 0 : group;
      if (is_counting && slot >= 0) room.count_run(rows);
      is_counting ? room.count(item) : room.put(item, room.take_rows(rows), layout.decode(plan));
    }
    __syncthreads();
  };
  visit_tokens(true);
  if (threadIdx.x == 0) room.arrange(max_runs, max_rows);
  __syncthreads();
  if (room.fits()) visit_tokens(false);
  if (threadIdx.x == 0) plan[0] = 0, plan[1] = room.num_items;
  __threadfence();  // the end alone makes it seen by those who wait for it
}

}  // namespace tpserve::cuda

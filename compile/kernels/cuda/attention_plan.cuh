// How a step's attention is cut into items: found once, taken by every layer. attention.cu says what items are.
#pragma once

#include "kv.cuh"

namespace tpserve::cuda {

constexpr int kConsumerWarps = 4;
constexpr int kTileRows = 16 * kConsumerWarps;
constexpr int kDecodeRows = 16;
constexpr int kChunk = 512;     // positions of a decode item, doubled until kMaxSplits chunks are enough
constexpr int kMaxSplits = 32;
constexpr int kPlanThreads = 1024;
constexpr int kMaxPlanTokens = 32768;

enum Kind : int { kPrefill = 0, kDecode = 1, kPadding = 2 };

struct alignas(16) Item {
  int token, count, kind, slot;                 // tokens [token, token + count)
  int position, split, num_splits, first_row;   // of the first token; decode: chunk, chunks, first row of partial sums
  int chunk, unused[3];                         // decode: positions of a chunk
};
static_assert(sizeof(Item) == 48);

/// How the plan's int32 words are used. Mirrored by `attention_plan_size` in sizes.py.
struct PlanLayout {
  int max_wide, max_decode;
  __host__ __device__ PlanLayout(int tokens, int slots)
      : max_wide(tokens), max_decode((tokens < slots ? tokens : slots) * kMaxSplits) {}
  __host__ __device__ int64_t size() const {
    return 16 + 12ll * (static_cast<int64_t>(max_wide) + max_decode);
  }
  // words 0 and 1: number of wide (prefill, padding) and of decode items
  __device__ Item* wide(int32_t* plan) const { return reinterpret_cast<Item*>(plan + 16); }
  __device__ Item* decode(int32_t* plan) const { return wide(plan) + max_wide; }
};

__device__ __forceinline__ Item load_item(const Item* source) {
  Item item;
#pragma unroll
  for (int j = 0; j < 3; ++j) {
    reinterpret_cast<uint4*>(&item)[j] = load_l2(reinterpret_cast<const uint4*>(source) + j);
  }
  return item;
}

/// Rows of partial sums: tokens of decode runs times heads of a group.
__host__ __device__ inline int64_t max_partial_rows(int64_t tokens, int64_t slots, int64_t group) {
  const int64_t per_slot = kDecodeRows / group;
  return (tokens < slots * per_slot ? tokens : slots * per_slot) * group;
}

/// Counts of chunks that are done, at the workspace's start: as many for any number of tokens, since steps of all sizes
/// share the workspace and each leaves them at zero.
__host__ __device__ inline int64_t num_arrivals(int64_t slots, int64_t num_kv_heads) {
  return slots * kDecodeRows * num_kv_heads;
}

static __global__ void __launch_bounds__(kPlanThreads)
    plan_kernel(const int32_t* positions, const int32_t* slots, int num_tokens, int num_slots, int group, int window,
                int32_t* plan) {
  __shared__ uint32_t starts[kMaxPlanTokens / 32 + 1];  // bit t: a run starts at token t
  __shared__ int num_wide, num_decode, num_runs, num_rows;
  pdl_launch();
  pdl_wait();
  const PlanLayout layout(num_tokens, num_slots);
  const int max_rows = static_cast<int>(max_partial_rows(num_tokens, num_slots, group));
  const int max_runs = min(num_tokens, num_slots);
  if (threadIdx.x == 0) num_wide = num_decode = num_runs = num_rows = 0;
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
    Item item{t, count, kPrefill, __ldcg(slots + t), __ldcg(positions + t), 0, 1, 0, 0, {}};
    if (item.slot < 0 || count * group > kDecodeRows) {
      if (item.slot < 0) item.kind = kPadding;
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
    item.kind = kDecode;
    const int length = item.position + count;
    item.chunk = kChunk;
    while ((length + item.chunk - 1) / item.chunk > kMaxSplits) item.chunk *= 2;
    const int begin = window > 0 ? max(0, item.position - window + 1) : 0;
    const int first = begin / item.chunk, last = (length - 1) / item.chunk;
    item.num_splits = last - first + 1;
    item.first_row = atomicAdd(&num_rows, count * group);
    // A slot with two runs would need more room than there is: such a batch is wrong, and loses its last runs.
    if (item.first_row + count * group > max_rows || atomicAdd(&num_runs, 1) >= max_runs) continue;
    const int at = atomicAdd(&num_decode, item.num_splits);
    for (int i = 0; i < item.num_splits; ++i) {
      item.split = first + i;
      layout.decode(plan)[at + i] = item;
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) plan[0] = num_wide, plan[1] = num_decode;
}

}  // namespace tpserve::cuda

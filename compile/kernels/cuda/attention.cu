// Attention of new tokens over the pages of their slots, grouped query heads, causal, with an optional window.
//
// `attention_plan` finds the runs of tokens that follow each other in one slot, once per step, and cuts them into items;
// `attention` (every layer) deals items x KV heads to a persistent grid. Rows of an item are (token, query head of the
// group) pairs; attention_fragments.cuh has the products, over pages of bfloat16 or e4m3.
//   decode item:  a run of at most 16 rows and one chunk of its positions. All four warps have the same rows; each takes
//                 sixteen of the 64 positions of a stage, and the four sums are added. Where a run has several chunks, a
//                 second kernel adds their partial sums in the order of positions.
//   prefill item: up to 64 rows over all their positions; each warp has sixteen rows.
// Chunks start at multiples of a length that depends on the run's own length alone, so results do not depend on what
// else is in the batch. A fifth warp announces items and fetches their queries and stages of 64 positions ahead, across
// items, so that the others never wait for an address.
#include <type_traits>

#include "attention_fragments.cuh"
#include "hopper.cuh"
#include "kv.cuh"

namespace tpserve::cuda {
namespace {

constexpr int kConsumerWarps = 4;
constexpr int kThreads = (kConsumerWarps + 1) * 32;
constexpr int kStageRows = 64;
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

/// Rows of partial sums: tokens of decode runs times heads of a group.
__host__ __device__ int64_t max_partial_rows(int64_t tokens, int64_t slots, int64_t group) {
  const int64_t per_slot = kDecodeRows / group;
  return (tokens < slots * per_slot ? tokens : slots * per_slot) * group;
}

__global__ void __launch_bounds__(kPlanThreads)
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

template <typename KV>
struct AttentionParams {
  const bf16* q;
  PagedKV<KV> kv;
  int32_t* plan;
  float* partial;
  bf16* out;
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

__device__ __forceinline__ void consumer_sync() { asm volatile("bar.sync 1, 128;" ::: "memory"); }

/// Positions an item reads, and those of its stages: multiples of 64, so sums have one order.
struct Range {
  int begin, end;  // [begin, end)
  __device__ Range(const Item& item, int window) {
    begin = window > 0 ? max(0, item.position - window + 1) : 0;
    end = item.position + item.count;
    if (item.kind == kDecode) {
      begin = max(begin, item.split * item.chunk);
      end = min(end, (item.split + 1) * item.chunk);
    }
  }
  __device__ int first_stage() const { return begin / kStageRows; }
  __device__ int last_stage() const { return (end - 1) / kStageRows; }
};

/// Online softmax state of a warp's sixteen rows; a thread has rows lane / 4 and lane / 4 + 8.
template <typename KV, int kHeadDim>
struct Rows {
  using F = Fragments<KV, kHeadDim>;
  uint32_t q[kHeadDim / 16][4];
  float out[kHeadDim / 8][4];
  float top[2], sum[2];  // `sum` is this thread's part
  int limit[2];          // last position that a row sees

  __device__ void start(const AttentionParams<KV>& p, const Item& item, int first_row) {
    const int lane = threadIdx.x % 32, num_rows = item.count * p.group;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = first_row + lane / 4 + h * 8;
      // Rows that are not there repeat the last token; whatever they hold is never written.
      limit[h] = item.position + (row < num_rows ? row / p.group : item.count - 1);
      top[h] = -INFINITY, sum[h] = 0.0f;
    }
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n) out[n][0] = out[n][1] = out[n][2] = out[n][3] = 0.0f;
  }

  /// Queries of sixteen rows from shared memory, as the fetching warp put them.
  __device__ void load_queries(uint32_t queries) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int k = 0; k < kHeadDim / 16; ++k) {
      load_matrices(q[k], queries + (lane % 16) * kHeadDim * 2 + (k * 2 + lane / 16) * 16);
#pragma unroll
      for (int i = 0; i < 4; ++i) q[k][i] = F::query2(q[k][i]);
    }
  }

  __device__ void load_queries(const AttentionParams<KV>& p, const Item& item, int head, int first_row) {
    const int lane = threadIdx.x % 32, num_rows = item.count * p.group;
    const int num_heads = p.kv.num_kv_heads * p.group;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = first_row + lane / 4 + h * 8;
      const bool present = row < num_rows;
      const bf16* source = p.q + (static_cast<int64_t>(item.token + (present ? row / p.group : 0)) * num_heads +
                                  head * p.group + (present ? row % p.group : 0)) * kHeadDim + lane % 4 * 2;
#pragma unroll
      for (int k = 0; k < kHeadDim / 16; ++k) {
        q[k][h] = present ? F::query2(__ldcg(reinterpret_cast<const uint32_t*>(source + k * 16))) : 0;
        q[k][h + 2] = present ? F::query2(__ldcg(reinterpret_cast<const uint32_t*>(source + k * 16 + 8))) : 0;
      }
    }
  }

  /// Takes `kSlices` slices of sixteen positions, the first at `position`, from `slices` in shared memory.
  template <int kSlices>
  __device__ __forceinline__ void attend(uint32_t slices, int position, const Range& range, int window, float scale) {
    const int lane = threadIdx.x % 32;
    float score[kSlices * 2][4];
#pragma unroll
    for (int s = 0; s < kSlices; ++s) {
#pragma unroll
      for (int i = 0; i < 4; ++i) score[s * 2][i] = score[s * 2 + 1][i] = 0.0f;
#pragma unroll
      for (int k = 0; k < kHeadDim / 16; k += F::kColumns) {
        uint32_t b[F::kColumns][4];
        F::keys(slices, s, lane, k, b);
#pragma unroll
        for (int c = 0; c < F::kColumns; ++c) {
          F::multiply_add(score[s * 2], q[k + c], b[c][0], b[c][1]);
          F::multiply_add(score[s * 2 + 1], q[k + c], b[c][2], b[c][3]);
        }
      }
    }
    // Uniform over the warp: does any row see less than all of these positions?
    const bool inside = __all_sync(~0u, position + kSlices * 16 - 1 <= min(limit[0], limit[1]) &&
                                            (window == 0 || position > max(limit[0], limit[1]) - window));
    if (!inside) {
#pragma unroll
      for (int n = 0; n < kSlices * 2; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int at = position + n * 8 + lane % 4 * 2 + i % 2, last = limit[i / 2];
          if (at > last || (window > 0 && at <= last - window)) score[n][i] = -INFINITY;
        }
      }
    }
    float shift[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float best = top[h];
#pragma unroll
      for (int n = 0; n < kSlices * 2; ++n) best = fmaxf(best, fmaxf(score[n][h * 2], score[n][h * 2 + 1]));
      best = fmaxf(best, __shfl_xor_sync(~0u, best, 1));
      best = fmaxf(best, __shfl_xor_sync(~0u, best, 2));
      shift[h] = best == -INFINITY ? 0.0f : best * scale;
      const float factor = exp2f(top[h] * scale - shift[h]);
      top[h] = best;
      sum[h] *= factor;
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n) out[n][h * 2] *= factor, out[n][h * 2 + 1] *= factor;
    }
    // Rows that nobody wrote may hold NaN, which a weight of zero would not remove.
    const bool whole = position >= (range.begin & ~15) && position + kSlices * 16 <= range.end;
#pragma unroll
    for (int s = 0; s < kSlices; ++s) {
      uint32_t a[4];
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float x = exp2f(fmaf(score[s * 2 + n][h * 2], scale, -shift[h]));
          const float y = exp2f(fmaf(score[s * 2 + n][h * 2 + 1], scale, -shift[h]));
          sum[h] += x + y;
          a[n * 2 + h] = F::weight2(x, y);
        }
      }
      uint32_t keep[2] = {~0u, ~0u};
      if (!whole) {
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          const int at = position + s * 16 + n * 8 + lane % 4 * 2;
          const int low = range.begin & ~15;
          keep[n] = (at >= low && at < range.end ? 0xFFFFu : 0u) |
                    (at + 1 >= low && at + 1 < range.end ? 0xFFFF0000u : 0u);
        }
      }
#pragma unroll
      for (int n = 0; n < kHeadDim / 16; n += F::kColumns) {
        uint32_t b[F::kColumns][4];
        F::values(slices, s, lane, n, b);
#pragma unroll
        for (int c = 0; c < F::kColumns; ++c) {
          F::multiply_add(out[(n + c) * 2], a, b[c][0] & keep[0], b[c][1] & keep[1]);
          F::multiply_add(out[(n + c) * 2 + 1], a, b[c][2] & keep[0], b[c][3] & keep[1]);
        }
      }
    }
  }

  __device__ void finish_sums() {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      sum[h] += __shfl_xor_sync(~0u, sum[h], 1);
      sum[h] += __shfl_xor_sync(~0u, sum[h], 2);
    }
  }

  __device__ void write(const AttentionParams<KV>& p, const Item& item, int head, int first_row) const {
    const int lane = threadIdx.x % 32, num_heads = p.kv.num_kv_heads * p.group;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = first_row + lane / 4 + h * 8;
      if (row >= item.count * p.group) continue;
      const float inverse = value_scale(p) / sum[h];
      bf16* target = p.out + (static_cast<int64_t>(item.token + row / p.group) * num_heads + head * p.group +
                              row % p.group) * kHeadDim + lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n) {
        *reinterpret_cast<uint32_t*>(target + n * 8) = pack2(out[n][h * 2] * inverse, out[n][h * 2 + 1] * inverse);
      }
    }
  }
};

template <typename KV, int kHeadDim>
struct Shared {
  static constexpr int kSliceBytes = Fragments<KV, kHeadDim>::kSliceBytes;
  static constexpr int kStages = (96 << 10) / (kStageRows / kSliceRows * kSliceBytes);
  static constexpr int kHeaders = 2;  // items announced ahead
  alignas(128) uint8_t stage[kStages][kStageRows / kSliceRows * kSliceBytes];
  alignas(16) uint8_t queries[kHeaders][kDecodeRows * kHeadDim * 2];  // of decode items
  float added[2][kHeadDim / 4 * 32];  // sums of two warps, eight rows
  float top[kConsumerWarps][kDecodeRows], sum[kConsumerWarps][kDecodeRows];
  Item item[kHeaders];
  int head[kHeaders];
  uint64_t full[kStages], empty[kStages];
  uint64_t header_full[kHeaders], header_empty[kHeaders];
};

/// Announces an item to the consumers, with its queries if it is for decoding.
template <typename KV, int kHeadDim>
__device__ void announce(const AttentionParams<KV>& p, Shared<KV, kHeadDim>& shared, const Item& item, int head,
                         RingPlace& header) {
  const int lane = threadIdx.x % 32;
  const uint32_t token_bytes = p.group * kHeadDim * 2;
  const bool decode = item.kind == kDecode;
  if (lane == 0) {
    barrier_wait(&shared.header_empty[header.slot], header.parity ^ 1);
    shared.item[header.slot] = item;
    shared.head[header.slot] = head;
    barrier_expect(&shared.header_full[header.slot], decode ? item.count * token_bytes : 0);
  }
  __syncwarp();
  if (decode && lane < item.count) {
    const int64_t row = static_cast<int64_t>(item.token + lane) * p.kv.num_kv_heads * p.group + head * p.group;
    bulk_copy(shared_address(shared.queries[header.slot]) + lane * token_bytes, p.q + row * kHeadDim, token_bytes,
              &shared.header_full[header.slot]);
  }
  header.advance(Shared<KV, kHeadDim>::kHeaders);
}

template <typename KV, int kHeadDim>
__device__ void fetch_item(const AttentionParams<KV>& p, Shared<KV, kHeadDim>& shared, const Item& item, int head,
                           RingPlace& place) {
  using S = Shared<KV, kHeadDim>;
  using P = typename Fragments<KV, kHeadDim>::P;
  const int lane = threadIdx.x % 32;
  const Range range(item, p.window);
  const int first_slice = range.begin / kSliceRows, last_slice = (range.end - 1) / kSliceRows;
  const int slices_per_page = p.kv.page_size / kSliceRows;
  const int32_t* table = p.kv.table + static_cast<int64_t>(item.slot) * p.kv.pages_per_slot;
  int known = -32, page_of_lane = 0;  // pages of slices [known, known + 32)
  for (int stage = range.first_stage(); stage <= range.last_stage(); ++stage) {
    const int slice = stage * (kStageRows / kSliceRows);
    if (slice + 3 >= known + 32) {
      known = slice;
      page_of_lane = __ldcg(table + min(known + lane, last_slice) / slices_per_page);
    }
    const int mine = slice + lane % 4;
    const bool wanted = lane < 4 && mine >= first_slice && mine <= last_slice;
    const int page = __shfl_sync(~0u, page_of_lane, mine - known);
    const int count = __popc(__ballot_sync(~0u, wanted));
    if (lane == 0) {
      barrier_wait(&shared.empty[place.slot], place.parity ^ 1);
      barrier_expect(&shared.full[place.slot], count * S::kSliceBytes);
    }
    __syncwarp();
    if (wanted) {
      const char* source = reinterpret_cast<const char*>(p.kv.template keys<kHeadDim>(page, head));
      const uint32_t target = shared_address(shared.stage[place.slot]) + lane * S::kSliceBytes;
      if (slices_per_page == 1) {
        bulk_copy(target, source, S::kSliceBytes, &shared.full[place.slot]);
      } else {
        source += mine % slices_per_page * P::kSliceBytes;
#pragma unroll
        for (int panel = 0; panel < 2 * P::kCount; ++panel) {  // of keys, then of values
          bulk_copy(target + panel * P::kSliceBytes, source + static_cast<int64_t>(panel) * p.kv.page_size * P::kRowBytes,
                    P::kSliceBytes, &shared.full[place.slot]);
        }
      }
    }
    place.advance(S::kStages);
  }
}

/// Adds the four warps' sums, (w + w2) + (w1 + w3) whichever warp w `role` 0 is; the result is in that warp.
template <typename KV, int kHeadDim>
__device__ void add_warps(Shared<KV, kHeadDim>& shared, Rows<KV, kHeadDim>& rows, float scale, int role, bool many_rows) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  rows.finish_sums();
  if (lane % 4 == 0) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      shared.top[warp][lane / 4 + h * 8] = rows.top[h];
      shared.sum[warp][lane / 4 + h * 8] = rows.sum[h];
    }
  }
  consumer_sync();
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = lane / 4 + h * 8;
    float best = -INFINITY, total = 0.0f;
#pragma unroll
    for (int w = 0; w < kConsumerWarps; ++w) best = fmaxf(best, shared.top[w][row]);
    const float shift = best == -INFINITY ? 0.0f : best * scale;
#pragma unroll
    for (int w = 0; w < kConsumerWarps; ++w) total += shared.sum[w][row] * exp2f(shared.top[w][row] * scale - shift);
    const float factor = exp2f(rows.top[h] * scale - shift);
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n) rows.out[n][h * 2] *= factor, rows.out[n][h * 2 + 1] *= factor;
    rows.top[h] = best, rows.sum[h] = total;
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    if (h == 1 && !many_rows) break;
    const auto put = [&](int to) {
#pragma unroll
      for (int i = 0; i < kHeadDim / 4; ++i) shared.added[to][i * 32 + lane] = rows.out[i / 2][h * 2 + i % 2];
    };
    const auto take = [&](int from) {
#pragma unroll
      for (int i = 0; i < kHeadDim / 4; ++i) rows.out[i / 2][h * 2 + i % 2] += shared.added[from][i * 32 + lane];
    };
    if (h == 1) consumer_sync();
    if (role >= 2) put(role - 2);
    consumer_sync();
    if (role < 2) take(role);
    if (role == 1) put(1);
    consumer_sync();
    if (role == 0) take(1);
  }
}

/// Partial sums of one (row, split, KV head): head_dim values, then the top score and the sum of weights.
template <typename KV, int kHeadDim>
__device__ __forceinline__ int64_t partial_at(const AttentionParams<KV>& p, int row, int split, int head) {
  return ((static_cast<int64_t>(row) * kMaxSplits + split) * p.kv.num_kv_heads + head) * (kHeadDim + 4);
}

template <typename KV, int kHeadDim>
__device__ void store_partial(const AttentionParams<KV>& p, const Item& item, int head, int split,
                              const Rows<KV, kHeadDim>& rows) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = lane / 4 + h * 8;
    if (row >= item.count * p.group) continue;
    float* target = p.partial + partial_at<KV, kHeadDim>(p, item.first_row + row, split, head);
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n) {
      __stcg(reinterpret_cast<float2*>(target + n * 8 + lane % 4 * 2),
             make_float2(rows.out[n][h * 2], rows.out[n][h * 2 + 1]));
    }
    if (lane % 4 == 0) {
      __stcg(reinterpret_cast<float2*>(target + kHeadDim), make_float2(rows.top[h], rows.sum[h]));
    }
  }
}

constexpr int kBatch = 4;

/// Adds the chunks of up to four rows of a run in order; all loads of four chunks are in flight together.
template <typename KV, int kHeadDim>
__device__ void add_splits(const AttentionParams<KV>& p, const Item& item, int head, int first) {
  constexpr int kValues = kHeadDim / 32;
  const int lane = threadIdx.x % 32, num_heads = p.kv.num_kv_heads * p.group, num_rows = item.count * p.group;
  const int64_t stride = static_cast<int64_t>(p.kv.num_kv_heads) * (kHeadDim + 4);
  const float* source[kBatch];
  float2 state[kBatch];
  float values[kBatch][kValues] = {};
#pragma unroll
  for (int r = 0; r < kBatch; ++r) {
    source[r] = p.partial + partial_at<KV, kHeadDim>(p, item.first_row + min(first + r, num_rows - 1), 0, head);
    state[r] = make_float2(-INFINITY, 0.0f);
    if (lane < item.num_splits) {
      state[r] = __ldcg(reinterpret_cast<const float2*>(source[r] + lane * stride + kHeadDim));
    }
  }
  float factor[kBatch], total[kBatch];
  for (int s = 0; s < item.num_splits; s += kBatch) {
    float loaded[kBatch][kBatch][kValues];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int64_t at = min(s + i, item.num_splits - 1) * stride + lane * kValues;
#pragma unroll
      for (int r = 0; r < kBatch; ++r) {
        if constexpr (kValues == 4) {
          const float4 v = __ldcg(reinterpret_cast<const float4*>(source[r] + at));
          loaded[i][r][0] = v.x, loaded[i][r][1] = v.y, loaded[i][r][2] = v.z, loaded[i][r][3] = v.w;
        } else {
          const float2 v = __ldcg(reinterpret_cast<const float2*>(source[r] + at));
          loaded[i][r][0] = v.x, loaded[i][r][1] = v.y;
        }
      }
    }
    if (s == 0) {
      const ScoreScale<KV> scale(p);
#pragma unroll
      for (int r = 0; r < kBatch; ++r) {
        float best = state[r].x;
#pragma unroll
        for (int offset = 16; offset > 0; offset /= 2) best = fmaxf(best, __shfl_xor_sync(~0u, best, offset));
        factor[r] = state[r].x == -INFINITY ? 0.0f : exp2f((state[r].x - best) * scale.of(p));
        total[r] = state[r].y * factor[r];
#pragma unroll
        for (int offset = 16; offset > 0; offset /= 2) total[r] += __shfl_xor_sync(~0u, total[r], offset);
      }
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
#pragma unroll
      for (int r = 0; r < kBatch; ++r) {
        const float f = s + i < item.num_splits ? __shfl_sync(~0u, factor[r], s + i) : 0.0f;
#pragma unroll
        for (int v = 0; v < kValues; ++v) values[r][v] = fmaf(loaded[i][r][v], f, values[r][v]);
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kBatch; ++r) {
    const int row = first + r;
    if (row >= num_rows) break;
    const float inverse = value_scale(p) / total[r];
    bf16* target = p.out + (static_cast<int64_t>(item.token + row / p.group) * num_heads + head * p.group +
                            row % p.group) * kHeadDim + lane * kValues;
#pragma unroll
    for (int v = 0; v < kValues; v += 2) {
      *reinterpret_cast<uint32_t*>(target + v) = pack2(values[r][v] * inverse, values[r][v + 1] * inverse);
    }
  }
}

/// `finisher`: the warp that ends the item while the others go on to the next.
template <typename KV, int kHeadDim>
__device__ void consume_decode(const AttentionParams<KV>& p, Shared<KV, kHeadDim>& shared, const Item& item, int head,
                               int finisher, RingPlace& place, Rows<KV, kHeadDim>& rows) {
  using S = Shared<KV, kHeadDim>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const Range range(item, p.window);
  const ScoreScale<KV> scale(p);
  rows.start(p, item, 0);
  for (int stage = range.first_stage(); stage <= range.last_stage(); ++stage) {
    barrier_wait(&shared.full[place.slot], place.parity);
    const int position = stage * kStageRows + warp * kSliceRows;
    if (position < range.end && position + kSliceRows > range.begin) {
      rows.template attend<1>(shared_address(shared.stage[place.slot]) + warp * S::kSliceBytes, position, range,
                              p.window, scale.of(p));
    }
    __syncwarp();
    if (lane == 0) barrier_arrive(&shared.empty[place.slot]);
    place.advance(S::kStages);
  }
  const int role = (warp - finisher) & (kConsumerWarps - 1);
  add_warps(shared, rows, scale.of(p), role, item.count * p.group > 8);
  if (role != 0) return;
  if (item.num_splits == 1) {
    rows.write(p, item, head, 0);
    return;
  }
  // Chunks of a window start above zero; partial sums are kept by their order.
  const int begin = p.window > 0 ? max(0, item.position - p.window + 1) : 0;
  store_partial(p, item, head, item.split - begin / item.chunk, rows);
}

template <typename KV, int kHeadDim>
__device__ void consume_prefill(const AttentionParams<KV>& p, Shared<KV, kHeadDim>& shared, const Item& item, int head,
                                RingPlace& place, Rows<KV, kHeadDim>& rows) {
  using S = Shared<KV, kHeadDim>;
  const int lane = threadIdx.x % 32, first_row = threadIdx.x / 32 * 16;
  const Range range(item, p.window);
  const ScoreScale<KV> scale(p);
  rows.start(p, item, first_row);
  rows.load_queries(p, item, head, first_row);
  const bool any = first_row < item.count * p.group;
  for (int stage = range.first_stage(); stage <= range.last_stage(); ++stage) {
    barrier_wait(&shared.full[place.slot], place.parity);
    if (any) {
      rows.template attend<4>(shared_address(shared.stage[place.slot]), stage * kStageRows, range, p.window,
                              scale.of(p));
    }
    __syncwarp();
    if (lane == 0) barrier_arrive(&shared.empty[place.slot]);
    place.advance(S::kStages);
  }
  rows.finish_sums();
  if (any) rows.write(p, item, head, first_row);
}

template <typename KV, int kHeadDim>
__device__ void write_zeros(const AttentionParams<KV>& p, const Item& item, int head) {
  const int width = p.group * kHeadDim / 8, num_heads = p.kv.num_kv_heads * p.group;
  for (int i = threadIdx.x; i < item.count * width; i += kConsumerWarps * 32) {
    const int64_t row = static_cast<int64_t>(item.token + i / width) * num_heads + head * p.group;
    reinterpret_cast<uint4*>(p.out + row * kHeadDim)[i % width] = uint4{};
  }
}

__device__ __forceinline__ Item load_item(const Item* source) {
  Item item;
#pragma unroll
  for (int j = 0; j < 3; ++j) {
    reinterpret_cast<uint4*>(&item)[j] = load_l2(reinterpret_cast<const uint4*>(source) + j);
  }
  return item;
}

template <typename KV, int kHeadDim>
__global__ void __launch_bounds__(kThreads, 2) attention_kernel(const __grid_constant__ AttentionParams<KV> p) {
  using S = Shared<KV, kHeadDim>;
  extern __shared__ __align__(1024) uint8_t memory[];
  S& shared = *reinterpret_cast<S*>(memory);
  const int warp = threadIdx.x / 32;
  if (threadIdx.x == 0) {
    for (int i = 0; i < S::kStages; ++i) {
      barrier_init(&shared.full[i], 1), barrier_init(&shared.empty[i], kConsumerWarps);
    }
    for (int i = 0; i < S::kHeaders; ++i) {
      barrier_init(&shared.header_full[i], 1), barrier_init(&shared.header_empty[i], kConsumerWarps);
    }
    barrier_init_fence();
  }
  pdl_launch();
  __syncthreads();
  pdl_wait();
  const int num_heads = p.kv.num_kv_heads;
  RingPlace place, header;
  if (warp == kConsumerWarps) {
    // The first item is read along with the counts, as if there were decode items only.
    Item next = load_item(p.layout.decode(p.plan) + min(static_cast<int>(blockIdx.x) / num_heads, p.layout.max_decode - 1));
    const int num_wide = __ldcg(p.plan) * num_heads, num_items = num_wide + __ldcg(p.plan + 1) * num_heads;
    const auto at = [&](int i) {
      const bool wide = i < num_wide;
      return (wide ? p.layout.wide(p.plan) : p.layout.decode(p.plan)) + (wide ? i : i - num_wide) / num_heads;
    };
    if (num_wide > 0 && blockIdx.x < num_items) next = load_item(at(blockIdx.x));
    for (int i = blockIdx.x; i < num_items; i += gridDim.x) {
      const Item item = next;
      if (i + static_cast<int>(gridDim.x) < num_items) next = load_item(at(i + gridDim.x));
      const int head = (i < num_wide ? i : i - num_wide) % num_heads;
      announce(p, shared, item, head, header);
      if (item.kind != kPadding) fetch_item<KV, kHeadDim>(p, shared, item, head, place);
    }
    return;
  }
  const int num_items = (__ldcg(p.plan) + __ldcg(p.plan + 1)) * num_heads;
  Rows<KV, kHeadDim> rows;
  int finisher = 0;
  for (int i = blockIdx.x; i < num_items; i += gridDim.x) {
    barrier_wait(&shared.header_full[header.slot], header.parity);
    const Item item = shared.item[header.slot];
    const int head = shared.head[header.slot];
    if (item.kind == kDecode) rows.load_queries(shared_address(shared.queries[header.slot]));
    __syncwarp();
    if (threadIdx.x % 32 == 0) barrier_arrive(&shared.header_empty[header.slot]);
    header.advance(S::kHeaders);
    if (item.kind == kPadding) {
      write_zeros<KV, kHeadDim>(p, item, head);
    } else if (item.kind == kDecode) {
      consume_decode<KV, kHeadDim>(p, shared, item, head, finisher, place, rows);
      finisher = (finisher + 1) % kConsumerWarps;
    } else {
      consume_prefill<KV, kHeadDim>(p, shared, item, head, place, rows);
    }
  }
}

constexpr int kCombineWarps = 4;

/// A warp per four rows of a run that was cut into chunks.
template <typename KV, int kHeadDim>
__global__ void __launch_bounds__(kCombineWarps * 32) combine_kernel(const __grid_constant__ AttentionParams<KV> p) {
  constexpr int kParts = kDecodeRows / kBatch;
  const int num_heads = p.kv.num_kv_heads;
  const int unit = blockIdx.x * kCombineWarps + threadIdx.x / 32, stride = gridDim.x * kCombineWarps;
  pdl_launch();
  pdl_wait();
  const int num_units = __ldcg(p.plan + 1) * num_heads * kParts;
  for (int i = unit; i < num_units; i += stride) {
    const Item item = load_item(p.layout.decode(p.plan) + i / kParts / num_heads);
    const int begin = p.window > 0 ? max(0, item.position - p.window + 1) : 0, first = i % kParts * kBatch;
    if (item.num_splits == 1 || item.split != begin / item.chunk || first >= item.count * p.group) continue;
    add_splits<KV, kHeadDim>(p, item, i / kParts % num_heads, first);
  }
}

/// Words of the plan of a step with up to T tokens of S slots.
int64_t attention_plan_size(int64_t num_tokens, int64_t num_slots) {
  return PlanLayout(static_cast<int>(num_tokens), static_cast<int>(num_slots)).size();
}

/// float32 elements of workspace that `attention` needs for T tokens of S slots.
int64_t attention_workspace_size(int64_t num_tokens, int64_t num_slots, int64_t num_heads, int64_t num_kv_heads,
                                 int64_t head_dim) {
  return max_partial_rows(num_tokens, num_slots, num_heads / num_kv_heads) * kMaxSplits * num_kv_heads * (head_dim + 4);
}

/// (T,) positions and slots -> the plan that `attention` of every layer of this step takes.
void attention_plan(TensorView positions, TensorView token_slots, int64_t num_slots, int64_t num_heads,
                    int64_t num_kv_heads, int64_t window, TensorView plan) {
  check_rank("positions", positions, 1);
  const int64_t num_tokens = positions.size(0);
  const int32_t* position = checked<int32_t>("positions", positions, {num_tokens});
  const int32_t* slot = checked<int32_t>("token_slots", token_slots, {num_tokens});
  if (num_kv_heads < 1 || num_heads % num_kv_heads != 0 || num_heads / num_kv_heads > kDecodeRows) {
    TVM_FFI_THROW(ValueError) << num_heads << " query heads over " << num_kv_heads
                              << " KV heads: expected groups of 1 to " << kDecodeRows;
  }
  if (num_tokens > kMaxPlanTokens) {
    TVM_FFI_THROW(ValueError) << num_tokens << " tokens in a step, at most " << kMaxPlanTokens << " are supported";
  }
  if (window < 0) TVM_FFI_THROW(ValueError) << "window is " << window << ", expected 0 (none) or more";
  int32_t* words = checked<int32_t>("plan", plan, {attention_plan_size(num_tokens, num_slots)});
  launch(plan_kernel, 1, kPlanThreads, 0, stream_of(plan), position, slot, static_cast<int>(num_tokens),
         static_cast<int>(num_slots), static_cast<int>(num_heads / num_kv_heads), static_cast<int>(window), words);
}

template <typename KV>
void attend(const TensorView& q, KVScales<KV> scales, const TensorView& kv_layer, const TensorView& page_table,
            const TensorView& plan, double scale, int64_t window, const TensorView& workspace, const TensorView& out) {
  check_rank("q", q, 3);
  check_rank("workspace", workspace, 1);
  const int64_t num_tokens = q.size(0), num_heads = q.size(1), dim = q.size(2);
  const PagedKV<KV> kv = PagedKV<KV>::from(scales, kv_layer, page_table, dim);
  if (num_heads % kv.num_kv_heads != 0) {
    TVM_FFI_THROW(ValueError) << num_heads << " query heads cannot be shared by " << kv.num_kv_heads << " KV heads";
  }
  const PlanLayout layout(static_cast<int>(num_tokens), kv.num_slots);
  AttentionParams<KV> p{checked<bf16>("q", q, {num_tokens, num_heads, dim}),
                    kv,
                    checked<int32_t>("plan", plan, {layout.size()}),
                    checked<float>("workspace", workspace, {-1}),
                    checked<bf16>("out", out, {num_tokens, num_heads * dim}),
                    static_cast<int>(num_tokens),
                    static_cast<int>(num_heads / kv.num_kv_heads),
                    static_cast<int>(window),
                    static_cast<float>(scale * 1.4426950408889634),
                    layout};
  const int64_t need = attention_workspace_size(num_tokens, kv.num_slots, num_heads, kv.num_kv_heads, dim);
  if (workspace.size(0) < need) {
    TVM_FFI_THROW(ValueError) << "workspace has " << workspace.size(0) << " elements, expected at least " << need;
  }
  int num_sms = 0;
  check_cuda(cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, q.device().device_id), "SM count");
  const int64_t max_items = (static_cast<int64_t>(layout.max_wide) + layout.max_decode) * kv.num_kv_heads;
  const dim3 grid(static_cast<unsigned>(max_items < 2 * num_sms ? max_items : 2 * num_sms));
  const int64_t max_units = static_cast<int64_t>(layout.max_decode) * kv.num_kv_heads * kDecodeRows / kBatch;
  const int64_t blocks = max_units / kCombineWarps < 4 * num_sms ? max_units / kCombineWarps : 4 * num_sms;
  const dim3 combine_grid(static_cast<unsigned>(blocks));
  const cudaStream_t stream = stream_of(out);
  if (dim == 128) {
    launch(attention_kernel<KV, 128>, grid, kThreads, sizeof(Shared<KV, 128>), stream, p);
    launch(combine_kernel<KV, 128>, combine_grid, kCombineWarps * 32, 0, stream, p);
  } else {
    launch(attention_kernel<KV, 64>, grid, kThreads, sizeof(Shared<KV, 64>), stream, p);
    launch(combine_kernel<KV, 64>, combine_grid, kCombineWarps * 32, 0, stream, p);
  }
}

/// (T, Hq, D) bf16 -> (T, Hq * D) bf16. Tokens with slot -1 give zeros.
void attention(TensorView q, TensorView kv_layer, TensorView page_table, TensorView plan, double scale, int64_t window,
               TensorView workspace, TensorView out) {
  attend<bf16>(q, {}, kv_layer, page_table, plan, scale, window, workspace, out);
}

/// The same over e4m3 pages; `kv_scale` is (2,) float32, of keys and of values.
void attention_fp8(TensorView q, TensorView kv_scale, TensorView kv_layer, TensorView page_table, TensorView plan,
                   double scale, int64_t window, TensorView workspace, TensorView out) {
  attend<fp8>(q, scales_from(kv_scale), kv_layer, page_table, plan, scale, window, workspace, out);
}

template <typename S>
constexpr bool kTwoFit = 2 * (sizeof(S) + 1024) <= 228 * 1024;
static_assert(kTwoFit<Shared<bf16, 128>> && kTwoFit<Shared<fp8, 128>>, "two blocks must fit on a multiprocessor");
static_assert(kTwoFit<Shared<bf16, 64>> && kTwoFit<Shared<fp8, 64>>, "two blocks must fit on a multiprocessor");

TVM_FFI_DLL_EXPORT_TYPED_FUNC(attention_plan_size, attention_plan_size);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(attention_workspace_size, attention_workspace_size);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(attention_plan, attention_plan);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(attention, attention);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(attention_fp8, attention_fp8);

}  // namespace
}  // namespace tpserve::cuda

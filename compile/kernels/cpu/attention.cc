// Attention of new tokens over the pages of their slots, grouped query heads, causal, with an optional window.
//
// One task is a tile of up to kTileTokens tokens that follow each other in one slot, for one KV head; its rows are
// (token, query head of the group) pairs. Two passes: all scores of a row into a buffer, then softmax, then the weighted
// sum of values. A lane is a key's place in its page, so scores, the softmax sum and the sum over values (one chain
// over positions) run in an order fixed by positions alone; a tile only shares loads of K and V between its rows.
// Keys outside a row's range get weight zero, which leaves its sums as they are.
#include <algorithm>
#include <limits>
#include <vector>

#include "paged.h"

namespace tpserve {
namespace {

constexpr int64_t kTileTokens = 8;
constexpr int kRows = 4;  // rows per register block

struct Tile {
  int64_t token, count;  // tokens [token, token + count) have consecutive positions in one slot
};

/// scores[r][j] = q[r] . K[j] for the keys of pages [first, last], `stride` floats per row.
template <int R>
TPSERVE_INLINE void score_rows(const PagedKV& kv, const int32_t* table, int64_t head, int64_t first, int64_t last,
                               const float* const* q, float scale, float* scores, int64_t stride) {
  const int64_t dim = kv.head_dim, page_size = kv.page_size;
  for (int64_t i = first; i <= last; ++i) {
    const float* keys = kv.keys(table[i], head);
    for (int64_t lane = 0; lane < page_size; lane += kLanes) {
      part sum[R][kParts] = {};
      for (int64_t d = 0; d < dim; ++d) {
        part key[kParts];
#pragma GCC unroll 4
        for (int c = 0; c < kParts; ++c) key[c] = load_part(keys + d * page_size + lane + c * kPartLanes);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          const part query = splat_part(q[r][d]);
#pragma GCC unroll 4
          for (int c = 0; c < kParts; ++c) sum[r][c] += query * key[c];
        }
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        float* row = scores + r * stride + (i - first) * page_size + lane;
#pragma GCC unroll 4
        for (int c = 0; c < kParts; ++c) store_part(row + c * kPartLanes, sum[r][c] * splat_part(scale));
      }
    }
  }
}

/// out[r][d0 : d0 + kPartLanes * C] = sum over keys j < count of weights[r][j] * V[j].
template <int R, int C>
TPSERVE_INLINE void mix_values(const PagedKV& kv, const int32_t* table, int64_t head, int64_t first, int64_t count,
                               const float* weights, int64_t stride, int64_t d0, float* const* out) {
  const int64_t dim = kv.head_dim, page_size = kv.page_size;
  part sum[R][C] = {};
  for (int64_t start = 0; start < count; start += page_size) {
    const float* values = kv.values(table[first + start / page_size], head) + d0;
    const int64_t keys = std::min(page_size, count - start);
    for (int64_t j = 0; j < keys; ++j) {
      part value[C];
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) value[c] = load_part(values + j * dim + c * kPartLanes);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const part weight = splat_part(weights[r * stride + start + j]);
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) sum[r][c] += weight * value[c];
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) store_part(out[r] + d0 + c * kPartLanes, sum[r][c]);
  }
}

/// Turns scores of keys [begin, end) into weights that sum to one, and those of the other keys up to `count` into zero.
void softmax(float* scores, int64_t begin, int64_t end, int64_t count) {
  const float lowest = -std::numeric_limits<float>::infinity();
  std::fill(scores, scores + begin, lowest);
  std::fill(scores + end, scores + count, lowest);
  v16 best = splat(lowest);
  for (int64_t j = 0; j < count; j += kLanes) {
    const v16 s = load(scores + j);
    best = s > best ? s : best;
  }
  const v16 top = splat(max_lanes(best));
  v16 sum = {};
  for (int64_t j = 0; j < count; j += kLanes) {
    const v16 e = exp_lanes(load(scores + j) - top);
    sum += e;
    store(scores + j, e);
  }
  const v16 inverse = splat(1.0f / sum_lanes(sum));
  for (int64_t j = 0; j < count; j += kLanes) store(scores + j, load(scores + j) * inverse);
}

/// Parts of a row that `mix_values` takes at once: as many sums as registers hold, and enough to hide an FMA's latency.
constexpr int parts_for(int rows) {
  if (kPartLanes == 8 && rows > 2) return 2;
  return kPartLanes < 16 && rows == 1 ? 8 : 4;
}

template <int R>
void run_rows(const PagedKV& kv, const int32_t* table, int64_t head, int64_t first, int64_t last, const float* const* q,
              const int64_t* begins, const int64_t* ends, float scale, float* scores, float* const* out) {
  const int64_t count = (last - first + 1) * kv.page_size;
  score_rows<R>(kv, table, head, first, last, q, scale, scores, count);
  int64_t used = 0;
  for (int r = 0; r < R; ++r) {
    softmax(scores + r * count, begins[r], ends[r], count);
    used = std::max(used, ends[r]);
  }
  int64_t d = 0;
  constexpr int kWide = parts_for(R);
  for (; d + kWide * kPartLanes <= kv.head_dim; d += kWide * kPartLanes) {
    mix_values<R, kWide>(kv, table, head, first, used, scores, count, d, out);
  }
  for (; d < kv.head_dim; d += kLanes) mix_values<R, kParts>(kv, table, head, first, used, scores, count, d, out);
}

void attention(TensorView q, TensorView kv_layer, TensorView positions, TensorView token_slots, TensorView page_table,
               double scale, int64_t window, TensorView out) {
  check_rank("q", q, 3);
  const int64_t num_tokens = q.size(0), num_heads = q.size(1), dim = q.size(2);
  const PagedKV kv = PagedKV::from(kv_layer, page_table, dim);
  const float* queries = checked<float>("q", q, {num_tokens, num_heads, dim});
  const int32_t* position = checked<int32_t>("positions", positions, {num_tokens});
  const int32_t* slot = checked<int32_t>("token_slots", token_slots, {num_tokens});
  float* result = checked<float>("out", out, {num_tokens, num_heads * dim});
  if (dim % kLanes != 0 || kv.page_size % kLanes != 0) {
    TVM_FFI_THROW(ValueError) << "head_dim " << dim << " and page size " << kv.page_size << " must be multiples of "
                              << kLanes;
  }
  if (num_heads % kv.num_kv_heads != 0) {
    TVM_FFI_THROW(ValueError) << num_heads << " query heads cannot be shared by " << kv.num_kv_heads << " KV heads";
  }
  if (window < 0) TVM_FFI_THROW(ValueError) << "window is " << window << ", expected 0 (none) or more";
  kv.check_tokens(slot, position, num_tokens);

  const int64_t group = num_heads / kv.num_kv_heads;
  const auto begin_of = [window](int64_t pos) { return window > 0 ? std::max<int64_t>(0, pos - window + 1) : 0; };
  static thread_local std::vector<Tile> tiles;
  tiles.clear();
  int64_t work = 0;
  for (int64_t t = 0; t < num_tokens; ++t) {
    const bool joins = t > 0 && tiles.back().count < kTileTokens && slot[t] == slot[t - 1] &&
                       position[t] == position[t - 1] + 1;
    if (joins) {
      ++tiles.back().count;
    } else {
      tiles.push_back({t, 1});
    }
    const int64_t begin = begin_of(position[t]);
    if (!joins) kv.check_pages(slot[t], begin / kv.page_size, position[t] / kv.page_size);
    if (joins) kv.check_pages(slot[t], position[t] / kv.page_size, position[t] / kv.page_size);
    work += (position[t] - begin + 1) * num_heads * dim * 2;
  }
  const int64_t num_tasks = static_cast<int64_t>(tiles.size()) * kv.num_kv_heads;
  const Tile* const tile_data = tiles.data();
  parallel_pieces(num_tasks, 1, num_threads(work, num_tasks), [&](int64_t task_begin, int64_t task_end) {
    for (int64_t task = task_begin; task < task_end; ++task) {
      const Tile tile = tile_data[task / kv.num_kv_heads];
      const int64_t head = task % kv.num_kv_heads;
      const int64_t start = position[tile.token];
      const int64_t first = begin_of(start) / kv.page_size;
      const int32_t* table = kv.table + slot[tile.token] * kv.pages_per_slot;
      static thread_local std::vector<float> scores;
      const int64_t num_rows = tile.count * group;
      for (int64_t row = 0; row < num_rows; row += kRows) {
        const int rows = static_cast<int>(std::min<int64_t>(kRows, num_rows - row));
        const float* q_rows[kRows];
        float* out_rows[kRows];
        int64_t begins[kRows], ends[kRows];
        int64_t last = 0;
        for (int r = 0; r < rows; ++r) {
          const int64_t step = (row + r) / group, pos = start + step;
          const int64_t at = ((tile.token + step) * num_heads + head * group + (row + r) % group) * dim;
          q_rows[r] = queries + at;
          out_rows[r] = result + at;
          begins[r] = begin_of(pos) - first * kv.page_size;
          ends[r] = pos + 1 - first * kv.page_size;
          last = pos / kv.page_size;
        }
        scores.resize(std::max(scores.size(), static_cast<size_t>((last - first + 1) * kv.page_size * rows)));
        const auto run = rows == 4   ? run_rows<4>
                         : rows == 3 ? run_rows<3>
                         : rows == 2 ? run_rows<2>
                                     : run_rows<1>;
        run(kv, table, head, first, last, q_rows, begins, ends, static_cast<float>(scale), scores.data(), out_rows);
      }
    }
  });
}

TVM_FFI_DLL_EXPORT_TYPED_FUNC(attention, attention);

}  // namespace
}  // namespace tpserve

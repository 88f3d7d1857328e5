// How a step's attention is cut into items, and where they stand in the plan; plain functions, so that the host's tests
// run them too. attention.cu says what items are.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define TPSERVE_ITEMS __host__ __device__ __forceinline__
#else
#define TPSERVE_ITEMS inline
#endif

namespace tpserve::cuda {

constexpr int kDecodeRows = 16;
// Positions of a decode item. A short run is one chunk; a longer one must be cut anyway, and then into pieces for as many
// blocks as its sums are worth, doubled until kMaxSplits chunks are enough. Where many KV heads make many items anyway,
// shorter chunks cost more than they bring (8B on one GPU, benchmarks/README.md).
constexpr int kChunk = 512, kShortChunk = 256;
constexpr int kShortSplits = 8;   // most of the shorter ones
constexpr int kManyKvHeads = 8;
constexpr int kMaxSplits = 32;
constexpr int kMaxPieces = 4;  // of a run of a few tokens more than a decode item holds, as a draft that is verified
constexpr int kStageRows = 64;  // positions fetched together

enum Kind : int { kPrefill = 0, kDecode = 1, kPadding = 2 };

struct alignas(16) Item {
  int token, count, kind, slot;                 // tokens [token, token + count)
  int position, split, num_splits, first_row;   // of the first token; decode: chunk, chunks, first row of partial sums
  int chunk, first_place;                       // decode: positions of a chunk, place of the first chunk's sums
  int run_position, unused;                     // of the first token that the slot has in the step
};
static_assert(sizeof(Item) == 48);

/// How the plan's int32 words are used, of a step of any kind, or of one that only decodes: each token is its slot's only
/// one. For any tokens the two differ in size, so a plan says itself what it is. Mirrored by `attention_plan_size` in
/// sizes.py.
struct PlanLayout {
  int max_wide, max_decode;
  TPSERVE_ITEMS PlanLayout(int tokens, int slots, bool decode_only) {
    const int most = tokens < slots ? tokens : slots;  // decoding runs
    max_wide = decode_only ? 0 : tokens;
    max_decode = most * kMaxSplits + (decode_only ? tokens - most : 0);  // padding is among them
  }
  TPSERVE_ITEMS bool decode_only() const { return max_wide == 0; }
  TPSERVE_ITEMS int64_t size() const { return 16 + 12ll * (static_cast<int64_t>(max_wide) + max_decode); }
  // words 0 and 1: number of wide (prefill, padding) and of decode items
  TPSERVE_ITEMS Item* wide(int32_t* plan) const { return reinterpret_cast<Item*>(plan + 16); }
  TPSERVE_ITEMS Item* decode(int32_t* plan) const { return wide(plan) + max_wide; }
};

/// Rows of partial sums: tokens of decode runs times heads of a group.
TPSERVE_ITEMS int64_t max_partial_rows(int64_t tokens, int64_t slots, int64_t group) {
  const int64_t per_slot = kDecodeRows / group;
  return (tokens < slots * per_slot ? tokens : slots * per_slot) * group;
}

/// The first item of a run that decodes; the others differ in `split`, each one more than the one before. Chunks start at
/// multiples of a length that depends on the run's own length and the model alone.
TPSERVE_ITEMS Item decode_item(int token, int count, int slot, int position, int window, int num_kv_heads) {
  Item item{token, count, kDecode, slot, position, 0, 1, 0, kChunk, 0, position, {}};
  const int length = position + count;
  if (num_kv_heads < kManyKvHeads && length > kChunk && length <= kShortSplits * kShortChunk) item.chunk = kShortChunk;
  while ((length + item.chunk - 1) / item.chunk > kMaxSplits) item.chunk *= 2;
  const int begin = window > 0 && position - window + 1 > 0 ? position - window + 1 : 0;
  item.split = begin / item.chunk;
  item.num_splits = (length - 1) / item.chunk - item.split + 1;
  return item;
}

/// Pieces of as many tokens as a decode item holds in which a run attends, or 0 if that is one piece or too many. A short
/// context is read once instead, for all tokens together. By the run's own length alone.
TPSERVE_ITEMS int decode_pieces(int count, int position, int group) {
  const int per_piece = kDecodeRows / group, pieces = (count + per_piece - 1) / per_piece;
  return pieces > 1 && pieces <= kMaxPieces && position + count > kChunk ? pieces : 0;
}

/// The first item of a piece, as `decode_item`. All pieces together have as many items and places as one run may have.
TPSERVE_ITEMS Item piece_item(const Item& run, int piece, int pieces, int group, int window, int num_kv_heads) {
  const int per_piece = kDecodeRows / group, offset = piece * per_piece, most = kMaxSplits / pieces;
  const int left = run.count - offset;
  const int count = left < per_piece ? left : per_piece;
  Item item = decode_item(run.token + offset, count, run.slot, run.position + offset, window, num_kv_heads);
  // As long as the run wants it, not the piece: all pieces then have the same chunks.
  item.chunk = kShortChunk;
  while ((run.position + run.count + item.chunk - 1) / item.chunk > most) item.chunk *= 2;
  const int begin = window > 0 && item.position - window + 1 > 0 ? item.position - window + 1 : 0;
  item.split = begin / item.chunk;
  item.num_splits = (item.position + item.count - 1) / item.chunk - item.split + 1;
  item.first_place = piece * most, item.run_position = run.position;
  return item;
}

/// Positions an item reads, and those of its stages: multiples of 64, so sums have one order.
struct Range {
  int begin, end;  // [begin, end)
  TPSERVE_ITEMS Range(const Item& item, int window) {
    begin = window > 0 && item.position - window + 1 > 0 ? item.position - window + 1 : 0;
    end = item.position + item.count;
    if (item.kind == kDecode) {
      const int first = item.split * item.chunk, last = first + item.chunk;
      begin = begin > first ? begin : first;
      end = end < last ? end : last;
    }
  }
  TPSERVE_ITEMS int first_stage() const { return begin / kStageRows; }
  TPSERVE_ITEMS int last_stage() const { return (end - 1) / kStageRows; }
  /// Behind those of its stages that have positions of earlier steps alone.
  TPSERVE_ITEMS int first_new_stage(const Item& item) const {
    const int stage = item.run_position / kStageRows;
    return stage < first_stage() ? first_stage() : stage <= last_stage() ? stage : last_stage() + 1;
  }
  /// Whether the last token of an item that decodes is in it: of all items of a run, the last one alone.
  TPSERVE_ITEMS bool has_newest(const Item& item) const { return end == item.position + item.count; }
};

/// What a block does in its turn, of all items times KV heads. Every other turn goes the other way round: who began with one
/// of the longest goes on with one of the shortest.
TPSERVE_ITEMS int item_of_turn(int turn, int block, int num_blocks) {
  return turn * num_blocks + (turn % 2 == 0 ? block : num_blocks - 1 - block);
}

/// Heads of a decoding token that one KV head has, in places: the group's queries, the key, the value. Returns which of
/// all heads of qkv, (Hq + 2 Hkv) queries, keys and values, stands there.
TPSERVE_ITEMS int head_at(int place, int kv_head, int group, int num_kv_heads) {
  return place < group ? kv_head * group + place : place * num_kv_heads + kv_head;
}

}  // namespace tpserve::cuda

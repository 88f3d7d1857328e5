// What the kernel of qkv and attention takes (qkv_attention_kernel.cuh), and how its blocks share the work.
#pragma once

#include "gemm_cursor.cuh"
#include "gemm_parts.cuh"
#include "kv.cuh"

namespace tpserve::cuda {

template <typename KV>
struct QkvAttentionParams {
  PackedWeights weights;
  const float* channel_scale;
  const float* norms;  // scales (K / 64, 8), then squares (K / 64, 8)
  PagedKV<KV> kv;
  const float* rope;                 // (max_model_len, 64): cosines, then sines
  const int32_t *positions, *slots;  // (M,)
  float4* letters;                   // [block][block of its team that sends][token][16]: sums of half of K, of a head
  float4* chunks;                    // [team][token][block][head][17]: sums over a block's positions, and their state
  fp8* out;
  float* out_scales;  // (Hq / 4, 2, 8)
  int M, K;
  int token_shift;    // of eight warps 1 << token_shift attend to each token
  int page_shift;     // of pages with 1 << page_shift slices
  float scale_log2;   // scale * log2(e), as attention's
};

/// What it takes: groups of four heads of 64. Eight warps multiply and attend, one fetches weights and tokens. It runs once
/// through its code, which must come to each multiprocessor first: hence few divisions and little unrolled.
struct QkvAttentionShape {
  static constexpr int kTokens = 8, kHeadDim = 64, kGroup = 4, kPairs = kGroup / 2;
  static constexpr int kMembers = 2 * (kGroup + 2);  // blocks of a KV head: two for each of its heads, with half of K each
  static constexpr int kWarps = 8, kThreads = (kWarps + 1) * 32;
  static constexpr int kMostHidden = 2048, kMostStages = kMostHidden / 512;
  static constexpr int kQuads = kHeadDim / 4, kOfBlock = kTokens * kQuads;  // float4 of a head, and of all tokens
  static constexpr int kRowFloats = kHeadDim + 4;  // of a token, of one of a block's two warp groups
  static constexpr int kPartFloats = kTokens * kHeadDim + 4;  // of a block's letters; heads lie in different banks
  /// Where weights were come the team's sums, then those of warps over positions.
  static constexpr int kLeftAt = kMembers * kPartFloats * 4, kSumBytes = kLeftAt + kWarps * kGroup * kHeadDim * 4;
  /// And a second slice for each warp, whose first stands by itself.
  static constexpr int kSlicesAt = (kSumBytes + 127) / 128 * 128;

  template <typename KV>
  static __host__ __device__ constexpr int slice_bytes() {
    return kSliceRows * kHeadDim * 2 * static_cast<int>(sizeof(KV));
  }
  template <typename KV>
  static __host__ __device__ constexpr int ring_bytes(int hidden) {
    const int weights = hidden / 512 * kStageBytes, others = kSlicesAt + kWarps * slice_bytes<KV>();
    return ((weights > others ? weights : others) + 1023) / 1024 * 1024;
  }
  static __host__ __device__ constexpr int norm_bytes(int hidden) { return hidden / 64 * 2 * kTokens * 4; }
  template <typename KV>
  static constexpr int shared_bytes(int hidden) {
    return 1024 + ring_bytes<KV>(hidden) + hidden / 2 * kTokens + norm_bytes(hidden) + kWarps * slice_bytes<KV>();
  }
  /// For `token_shift`.
  static constexpr int shift_of(int tokens) { return tokens > 4 ? 0 : tokens > 2 ? 1 : tokens > 1 ? 2 : 3; }
};

/// The slices of sixteen positions, [begin, end), of a token's context that one block of its team attends to. Few blocks do,
/// with a slice or two for each of their warps: the others make room on their multiprocessors for the kernels that follow.
/// The newest position is in the last slice.
struct ContextShare {
  int slices, each;  // of the whole context, of a block
  int turn;          // of the blocks: from the first on, each has some
  int begin, end;

  __device__ __forceinline__ ContextShare(int slot, int position, int token, int member, int token_shift) {
    using S = QkvAttentionShape;
    slices = slot < 0 ? 0 : position / kSliceRows + 1;
    each = max(token_shift == 3 ? 8 : 2 << token_shift, (slices + S::kMembers - 1) / S::kMembers);
    turn = (member + token * 5) % S::kMembers;
    begin = min(turn * each, slices), end = min(begin + each, slices);
  }
  /// The block whose turn it is, of a token.
  static __device__ __forceinline__ int member_of(int turn, int token) {
    return (turn + token * 7) % QkvAttentionShape::kMembers;
  }

  __device__ __forceinline__ bool any() const { return begin < end; }
  /// Whether the block whose turn it is has some.
  __device__ __forceinline__ bool any(int turn) const { return turn * each < slices; }
  /// The first block does in any case, for padding is written, too.
  __device__ __forceinline__ bool attends() const { return turn == 0 || any(); }
  /// Whether the block adds up the sums of the token's two heads `pair`.
  __device__ __forceinline__ bool owns(int pair) const { return turn == (any(1) ? pair : 0); }
};

}  // namespace tpserve::cuda

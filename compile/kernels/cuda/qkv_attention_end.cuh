// What blocks of a team (qkv_attention_kernel.cuh) hand on to each other: sums of qkv's channels, then sums over positions.
#pragma once

#include "attention_decode.cuh"
#include "qkv_attention_params.cuh"
#include "slots.cuh"

namespace tpserve::cuda {

/// A step's tokens, of which each lane of a warp knows one.
struct TokensOfLanes {
  int slot_of_lane = -1, position_of_lane = -1;

  __device__ __forceinline__ TokensOfLanes(const int32_t* positions, const int32_t* slots, int count) {
    const int m = threadIdx.x % 32;
    if (m < count) slot_of_lane = __ldcg(slots + m), position_of_lane = __ldcg(positions + m);
  }
  __device__ __forceinline__ int slot(int token) const { return __shfl_sync(~0u, slot_of_lane, token); }
  __device__ __forceinline__ int position(int token) const { return __shfl_sync(~0u, position_of_lane, token); }
  /// Bits of those of a slot up to a position.
  __device__ __forceinline__ uint32_t tokens_before(int slot, int position) const {
    return __ballot_sync(~0u, slot >= 0 && slot_of_lane == slot && position_of_lane <= position);
  }
  /// Bits of the blocks of a team that attend to any of `count` tokens.
  __device__ __forceinline__ uint32_t attending(int count, int token_shift) const {
    uint32_t all = 0;
#pragma unroll 1
    for (int m = 0; m < count; ++m) {
      const int lane = threadIdx.x % 32;
      const ContextShare share(slot(m), position(m), m, lane, token_shift);
      all |= __ballot_sync(~0u, lane < QkvAttentionShape::kMembers && share.attends());
    }
    return all;
  }
};

template <typename KV>
__device__ __forceinline__ float score_scale_of(const QkvAttentionParams<KV>& p) {
  if constexpr (std::is_same_v<KV, fp8>) return p.scale_log2 * __ldg(p.kv.scales);
  return p.scale_log2;
}

/// Gives a block's sums, `own` of its two warp groups, to those of its team that attend, whose bits `to` has.
template <typename KV>
__device__ __forceinline__ void give_sums(const QkvAttentionParams<KV>& p, const float* own, uint32_t to, int team,
                                          int member) {
  using S = QkvAttentionShape;
  const int at = threadIdx.x % S::kOfBlock, turn = threadIdx.x / S::kOfBlock;  // threads take turns with the blocks
  if (at >= p.M * S::kQuads) return;
  own += at / S::kQuads * S::kRowFloats + at % S::kQuads * 4;
  const float4 a = *reinterpret_cast<const float4*>(own);
  const float4 b = *reinterpret_cast<const float4*>(own + S::kTokens * S::kRowFloats);
  const float4 sum = make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
  float4* const of_team = p.letters + (team * S::kMembers * S::kMembers + member) * S::kOfBlock + at;
  static_assert(S::kWarps * 32 == 2 * S::kOfBlock);
#pragma unroll 1
  for (int i = turn; to != 0; to &= to - 1, ++i) {
    if (i % 2 != 0) continue;
    store_slot(of_team + (__ffs(to) - 1) * S::kMembers * S::kOfBlock, sum.x, sum.y, sum.z, sum.w);
  }
}

/// Takes the sums of all of the team: `parts`, of half of K each.
template <typename KV>
__device__ __forceinline__ void take_sums(const QkvAttentionParams<KV>& p, float* parts, int team, int member) {
  using S = QkvAttentionShape;
  constexpr int kAtOnce = 3;
  const int shift = 7 - p.token_shift, mask = (1 << shift) - 1;  // a block's letters, tokens rounded up to a power of two
  static_assert(S::kOfBlock == 128);
  float4* const mine = p.letters + (team * S::kMembers + member) * S::kMembers * S::kOfBlock;
#pragma unroll 1
  for (int first = threadIdx.x; first < S::kMembers << shift; first += S::kWarps * 32 * kAtOnce) {
    uint4 asked[kAtOnce];
    const auto at = [&](int k) { return first + k * S::kWarps * 32; };
    const auto wanted = [&](int k) { return at(k) < S::kMembers << shift && (at(k) & mask) < p.M * S::kQuads; };
    const auto place = [&](int k) { return mine + (at(k) >> shift) * S::kOfBlock + (at(k) & mask); };
    bool come = false;
#pragma unroll 1
    while (!come) {
      come = true;
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        asked[k] = make_uint4(0, 0, 0, 0);
        if (wanted(k)) asked[k] = load_slot(place(k));
      }
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) come = come && !is_empty(asked[k]);
    }
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      if (!wanted(k)) continue;
      empty_slot(place(k));
      *reinterpret_cast<uint4*>(parts + (at(k) >> shift) * S::kPartFloats + (at(k) & mask) * 4) = asked[k];
    }
  }
}

/// Sums over positions: of a block's warps, then of the team's blocks.
template <typename KV>
struct QkvAttentionEnd {
  using S = QkvAttentionShape;
  static constexpr int kHeadDim = S::kHeadDim, kSlots = S::kQuads + 1, kWarpFloats = S::kGroup * kHeadDim;

  const QkvAttentionParams<KV>& p;
  const TokensOfLanes& known;
  float* free;  // shared memory that nobody else has
  float* left;  // [warp][head][64], there, too
  int team, member;
  float scale;

  __device__ __forceinline__ float2 (&states() const)[S::kGroup][S::kWarps] {
    __shared__ float2 state[S::kGroup][S::kWarps];  // top score and sum of weights of a head and warp
    return state;
  }

  /// Of a warp.
  __device__ __forceinline__ void leave(DecodeSums<KV, kHeadDim, 1>& sums) const {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, first = lane % 4 * 2;
    float* const of_warp = left + warp * kWarpFloats;
    float* const places[2] = {of_warp + added_at<kHeadDim>(first, lane / 4), of_warp + added_at<kHeadDim>(first, 8 + lane / 4)};
#pragma unroll
    for (int e = 0; e < 2; ++e) {
#pragma unroll
      for (int lanes = 4; lanes < 32; lanes *= 2) sums.sum[0][e] += __shfl_xor_sync(~0u, sums.sum[0][e], lanes);
      if (first >= S::kGroup) continue;
      if (lane < 4) states()[first + e][warp] = make_float2(sums.top[0][e], sums.sum[0][e]);
#pragma unroll
      for (int n = 0; n < kHeadDim / 16; ++n) {
#pragma unroll
        for (int h = 0; h < 2; ++h) places[h][e * kHeadDim + n * 16] = sums.out[0][n][h * 2 + e];
      }
    }
  }

  __device__ __forceinline__ float4* place(int token, int from, int head) const {
    return p.chunks + (((team * S::kTokens + token) * S::kMembers + from) * S::kGroup + head) * kSlots;
  }

  __device__ __forceinline__ ContextShare share_of(int token, int of_member) const {
    return ContextShare(known.slot(token), known.position(token), token, of_member, p.token_shift);
  }

  /// Adds the warps' sums of each (token, head), by half a warp, and sends them on. Both halves have the same token.
  __device__ __forceinline__ void send() const {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, quad = lane % S::kQuads;
#pragma unroll 1
    for (int first = warp * 2; first < p.M * S::kGroup; first += S::kWarps * 2) {
      const int token = first / S::kGroup, head = first % S::kGroup + lane / S::kQuads;
      if (!share_of(token, member).any()) continue;
      const auto is_tokens = [&](int of_warp) { return of_warp >> p.token_shift == token; };
      // Eight lanes after each other have all warps' states; other tokens' have no part.
      float2 state = states()[head][lane % S::kWarps];
      if (!is_tokens(lane % S::kWarps)) state = make_float2(-INFINITY, 0.0f);
      float top = state.x;
#pragma unroll
      for (int lanes = 1; lanes < S::kWarps; lanes *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, lanes));
      const float factor = weight_of(state.x, shift_of(top, scale), scale);
      float sum = __fmul_rn(state.y, factor);
#pragma unroll
      for (int lanes = 1; lanes < S::kWarps; lanes *= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
      float values[4] = {};
      const float4* const from = reinterpret_cast<const float4*>(left + added_at<kHeadDim>(head, quad * 4));
#pragma unroll
      for (int w = 0; w < S::kWarps; ++w) {
        const float of_warp = __shfl_sync(~0u, factor, w, S::kQuads);
        float4 part = from[w * kWarpFloats / 4];
        if (!is_tokens(w)) part = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        values[0] = __fmaf_rn(part.x, of_warp, values[0]), values[1] = __fmaf_rn(part.y, of_warp, values[1]);
        values[2] = __fmaf_rn(part.z, of_warp, values[2]), values[3] = __fmaf_rn(part.w, of_warp, values[3]);
      }
      float4* const to = place(token, member, head);
      store_slot(to + quad, values[0], values[1], values[2], values[3]);
      if (quad == 0) store_slot(to + S::kQuads, top, sum, 0.0f, 0.0f);
    }
  }

  /// Adds the blocks' sums of two heads of a token, and writes them: by up to four warps of the block that has them, of which
  /// each takes those of three blocks, all at once, for each is a trip to L2.
  __device__ __forceinline__ void write() const {
    // Of [warp group][warp][lane], where the sums of qkv were.
    float4* const values_of_warps = reinterpret_cast<float4*>(free) + threadIdx.x / 128 * 128;
    float2* const states_of_warps = reinterpret_cast<float2*>(free + 256 * 4) + threadIdx.x / 128 * 128;
    constexpr int kAtOnce = S::kMembers / 4;
    static_assert(S::kMembers % 4 == 0 && S::kTokens * S::kPairs <= 32);
    const int group = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32, quad = lane % S::kQuads;
    // A lane looks at a token and pair; of those that the block has the warp groups take turns.
    const bool is_own = share_of(min(lane / S::kPairs, S::kTokens - 1), member).owns(lane % S::kPairs);
    uint32_t owned = __ballot_sync(~0u, is_own && lane < p.M * S::kPairs);
#pragma unroll 1
    for (int turn = group; owned != 0; owned &= owned - 1, ++turn) {
      if (turn % 2 != 0) continue;
      const int at = __ffs(owned) - 1, token = at / S::kPairs, head = at % S::kPairs * 2 + lane / S::kQuads;
      const ContextShare share = share_of(token, member);
      const bool is_alone = !share.any(kAtOnce);  // the first warp
      if (is_alone && warp != 0) continue;
      uint4 values[kAtOnce], state[kAtOnce];
      const auto any = [&](int k) { return share.any(warp * kAtOnce + k); };
      const auto of_block = [&](int k) { return place(token, ContextShare::member_of(warp * kAtOnce + k, token), head); };
      bool come = false;
#pragma unroll 1
      while (!come) {
        come = true;
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) {
          values[k] = make_uint4(0, 0, 0, 0), state[k] = make_uint4(__float_as_uint(-INFINITY), 0, 0, 0);
          if (any(k)) values[k] = load_slot(of_block(k) + quad), state[k] = load_slot(of_block(k) + S::kQuads);
        }
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) come = come && !is_empty(values[k]) && !is_empty(state[k]);
        come = __all_sync(~0u, come);  // lanes share a state, which one of them empties
      }
      RowSums all{{}, -INFINITY, 0.0f};
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        all.top = fmaxf(all.top, __uint_as_float(state[k].x));
        if (!any(k)) continue;
        empty_slot(of_block(k) + quad);
        if (quad == 0) empty_slot(of_block(k) + S::kQuads);
      }
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        const float factor = weight_of(__uint_as_float(state[k].x), shift_of(all.top, scale), scale);
        const uint32_t words[4] = {values[k].x, values[k].y, values[k].z, values[k].w};
        all.sum = __fmaf_rn(__uint_as_float(state[k].y), factor, all.sum);
#pragma unroll
        for (int i = 0; i < 4; ++i) all.values[i] = __fmaf_rn(__uint_as_float(words[i]), factor, all.values[i]);
      }
      if (!is_alone) {
        values_of_warps[warp * 32 + lane] = make_float4(all.values[0], all.values[1], all.values[2], all.values[3]);
        states_of_warps[warp * 32 + lane] = make_float2(all.top, all.sum);
        meet_at<128>(2 + group);
#pragma unroll 1
        for (int w = 1; w < (warp == 0 ? 4 : 0); ++w) {
          const float4 v = values_of_warps[w * 32 + lane];
          const float2 of_warp = states_of_warps[w * 32 + lane];
          all.add({{v.x, v.y, v.z, v.w}, of_warp.x, of_warp.y}, scale);
        }
      }
      if (warp == 0) write_pair(all, known.slot(token), token, team * S::kGroup + head);
      if (!is_alone) meet_at<128>(2 + group);  // before the places are written again
    }
  }

 private:
  /// Writes a head, four dimensions a lane, and the scale that it shares with the next. Padding gives zeros.
  __device__ __forceinline__ void write_pair(RowSums& all, int slot, int token, int query_head) const {
    const int lane = threadIdx.x % 32;
    float value_scale = 1.0f;
    if constexpr (std::is_same_v<KV, fp8>) value_scale = __ldg(p.kv.scales + 1);
    const float inverse = slot < 0 ? 0.0f : value_scale / all.sum;
    float(&v)[4] = all.values;
    float largest = slot < 0 ? 0.0f : 1e-12f;
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i] *= inverse, largest = fmaxf(largest, fabsf(v[i]));
#pragma unroll
    for (int lanes = 1; lanes < 32; lanes *= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, lanes));
    if (lane == 0) p.out_scales[scale_at(query_head / 2, token, p.M)] = largest / kFp8Max;
    const float factor = slot < 0 ? 0.0f : kFp8Max / largest;
    const int64_t row = static_cast<int64_t>(token) * p.kv.num_kv_heads * S::kGroup + query_head;
    *reinterpret_cast<uint32_t*>(p.out + row * kHeadDim + lane % S::kQuads * 4) =
        pack4_fp8(v[0] * factor, v[1] * factor, v[2] * factor, v[3] * factor);
  }
};

}  // namespace tpserve::cuda

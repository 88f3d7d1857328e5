// qkv of at most eight e4m3 tokens and attention to them, of heads of 64, in one kernel. As two each waits for the other's
// end, and the second begins with what is the first's longest way: sums through L2, queries, the newest key. Here weights
// and the context's pages come while the kernels before still run, and blocks hand sums on in slots (slots.cuh): all of
// them run at once.
//
// Blocks that have a KV head are a team, two for each of its heads (the group's queries, the key, the value): of 64 channels
// each, and half of K. Each gives its sums to all of the team. Then each attends to its share of every token's context, for
// all of the group's heads, and leaves sums to one block for each token and two heads, which share a scale.
//
// Tokens may have any slots, and follow each other in one: what a token's share has of new positions comes from the sums.
#pragma once

#include "attention_decode.cuh"
#include "gemm_grouped.cuh"
#include "qkv_attention_end.cuh"

namespace tpserve::cuda {

/// The slices that a warp attends to, every `1 << shift`th of a share, in two places by turns.
template <typename KV>
struct SliceFetch {
  using P = typename Fragments<KV, QkvAttentionShape::kHeadDim>::P;
  static constexpr int kBytes = QkvAttentionShape::slice_bytes<KV>();  // keys, then values
  static_assert(kBytes == 2 * P::kCount * P::kSliceBytes);

  const int32_t* table;
  uint64_t (&full)[2];
  uint8_t* places[2];  // in shared memory
  int first, shift, count, known = 0, page_of_lane;  // of slices [known, known + 32)

  __device__ __forceinline__ SliceFetch(const QkvAttentionParams<KV>& p, int slot, const ContextShare& share, int of_token,
                                        uint64_t (&full)[2], uint8_t* place, uint8_t* next_place)
      : table(p.kv.table + static_cast<int64_t>(max(slot, 0)) * p.kv.pages_per_slot),
        full(full),
        places{place, next_place},
        first(share.begin + of_token),
        shift(p.token_shift),
        count(max(share.end - first + (1 << shift) - 1, 0) >> shift) {
    look_up(p);
  }

  __device__ __forceinline__ int slice(int i) const { return first + (i << shift); }

  __device__ __forceinline__ void look_up(const QkvAttentionParams<KV>& p) {
    const int i = known + static_cast<int>(threadIdx.x % 32);
    page_of_lane = i < count ? __ldcg(table + (slice(i) >> p.page_shift)) : 0;
  }

  /// Fetches the warp's slice i, if there is one, to where nobody reads.
  __device__ __forceinline__ void fetch(const QkvAttentionParams<KV>& p, int head, int i) {
    if (i >= count) return;
    if (i == known + 32) known = i, look_up(p);
    const int page = __shfl_sync(~0u, page_of_lane, i - known);
    if (threadIdx.x % 32 != 0) return;
    const char* source = reinterpret_cast<const char*>(p.kv.template keys<QkvAttentionShape::kHeadDim>(page, head));
    source += (slice(i) & ((1 << p.page_shift) - 1)) * P::kSliceBytes;
    const uint32_t target = shared_address(i % 2 == 0 ? places[0] : places[1]);
    barrier_expect(&full[i % 2], kBytes);
    const int of_panel = P::kSliceBytes << p.page_shift;
#pragma unroll
    for (int panel = 0; panel < 2 * P::kCount; ++panel) {
      bulk_copy(target + panel * P::kSliceBytes, source + panel * of_panel, P::kSliceBytes, &full[i % 2]);
    }
  }
};

/// Key and value of a new token, from sums of both halves of K: as its page stores them, in a warp's first eight lanes.
template <typename KV>
struct NewRow {
  using P = Panels<sizeof(KV), QkvAttentionShape::kHeadDim>;
  using Chunk = typename StoredPart<KV>::Chunk;
  static constexpr int kLanes = QkvAttentionShape::kHeadDim / 16;  // of the key, and of the value

  static __device__ __forceinline__ HeadKind kind() {
    return threadIdx.x % 32 < kLanes ? HeadKind::kKey : HeadKind::kValue;
  }
  static __device__ __forceinline__ int dimension() { return threadIdx.x % kLanes * 8; }

  /// `sums`: of the key's blocks and the value's, `token`'s row. `angles`: cosines and sines of its position.
  static __device__ __forceinline__ StoredPart<KV> make(const PagedKV<KV>& kv, const float* sums, const float* angles) {
    HeadPart part{};
    const int d = dimension();
    if (threadIdx.x % 32 < 2 * kLanes) {
      const float* const first = sums + (kind() == HeadKind::kValue ? 2 : 0) * QkvAttentionShape::kPartFloats + d;
      const float* const second = first + QkvAttentionShape::kPartFloats;
      float f[2][8];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int i = 0; i < 8; ++i) f[h][i] = first[h * 32 + i] + second[h * 32 + i];
      }
      part = {pack8(f[0]), pack8(f[1])};
    }
    Floats turned_by;
#pragma unroll
    for (int i = 0; i < 8; ++i) turned_by.first[i] = angles[d + i], turned_by.second[i] = angles[32 + d + i];
    const Floats floats = turn<QkvAttentionShape::kHeadDim>(part, kind(), turned_by, {}, false, 0.0f);
    return StoredPart<KV>(part, floats, stored_scale(kv, kind()), kind(), d);
  }

  /// Puts it in a slice in shared memory.
  static __device__ __forceinline__ void put(const StoredPart<KV>& stored, uint8_t* slice, int row) {
    if (threadIdx.x % 32 >= 2 * kLanes) return;
    const int d = dimension();
    KV* target = reinterpret_cast<KV*>(slice + (kind() == HeadKind::kValue ? P::kCount * P::kSliceBytes : 0));
    if (std::is_same_v<KV, fp8> && d % 16 != 0) target += 8;
    *reinterpret_cast<Chunk*>(target + P::chunk_at(kSliceRows, row, d)) = stored.first;
    *reinterpret_cast<Chunk*>(target + P::chunk_at(kSliceRows, row, d + 32)) = stored.second;
  }
};

template <typename KV>
static __global__ void __launch_bounds__(QkvAttentionShape::kThreads, 2)
    qkv_attention_kernel(const __grid_constant__ CUtensorMap map, const __grid_constant__ QkvAttentionParams<KV> p) {
  using S = QkvAttentionShape;
  constexpr int kTokens = S::kTokens, kConsumers = S::kWarps * 32;
  extern __shared__ uint8_t memory[];
  __shared__ uint64_t full[S::kMostStages], own, spare, fetched[S::kWarps][2];
  __shared__ alignas(16) float of_groups[2 * kTokens * S::kRowFloats], angles_of_token[kTokens][S::kHeadDim];
  __shared__ alignas(8) float factors[kTokens];
  const uint32_t ring = (shared_address(memory) + 1023) & ~1023u;
  uint8_t* const base = memory + (ring - shared_address(memory));
  uint8_t* const tokens = base + S::ring_bytes<KV>(p.K);
  float* const scales = reinterpret_cast<float*>(tokens + p.K / 2 * kTokens);
  uint8_t* const slices = reinterpret_cast<uint8_t*>(scales) + S::norm_bytes(p.K);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int team = blockIdx.x / S::kMembers, member = blockIdx.x % S::kMembers;
  const int tile = head_at(member / 2, team, S::kGroup, p.kv.num_kv_heads), half = member % 2, units = p.K / 512;
  if (threadIdx.x == kConsumers) {
#pragma unroll 1
    for (int i = 0; i < units; ++i) barrier_init(full + i, 1);
#pragma unroll 1
    for (int i = 0; i < 2 * S::kWarps; ++i) barrier_init(&fetched[0][0] + i, 1);
    barrier_init(&own, 1), barrier_init(&spare, 4 * S::kMostStages + 1);  // which nobody waits for
    barrier_init_fence();
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
    pdl_launch();
  }
  __syncthreads();
  if (warp == S::kWarps) {
    if (elected()) {
      const uint32_t full_of_stages = in_register(shared_address(full));
      const uint64_t once = evict_first_policy();
      WeightCursor at;
      at.start(p.weights, tile * p.weights.packed_k + half * units);
#pragma unroll 1
      for (int i = 0; i < units; ++i, at.advance(p.weights)) {
        barrier_expect(full_of_stages + i * 8, kStageBytes);
        bulk_copy_once(ring + i * kStageBytes, at.address(p.weights, 0), kStageBytes, full_of_stages + i * 8, once);
      }
      pdl_wait();
      barrier_expect(&own, p.K / 2 * kTokens + S::norm_bytes(p.K));
      copy_few_tokens(shared_address(tokens), &map, half * (p.K / 256), &own);
      bulk_copy(shared_address(scales), p.norms, S::norm_bytes(p.K), &own);
    }
    __syncwarp();
    barrier_wait(&own, 0);
    add_squares_of_tiles(scales + p.K / 64 * kTokens, p.K / 64, p.K, factors);
    return arrive<1, S::kThreads>();
  }
  const int group = __shfl_sync(~0u, warp / 4, 0), warp_of_group = warp % 4;
  // Positions, slots and pages are there: the step's plan has ended before any kernel after it started.
  const int token = warp >> p.token_shift;
  const TokensOfLanes known(p.positions, p.slots, p.M);
  const int slot = known.slot(token), position = known.position(token);
  const uint32_t attending = known.attending(p.M, p.token_shift);
  SliceFetch<KV> fetch(p, slot, ContextShare(slot, position, token, member, p.token_shift), warp & ((1 << p.token_shift) - 1),
                       fetched[warp], slices + warp * SliceFetch<KV>::kBytes,
                       base + S::kSlicesAt + warp * SliceFetch<KV>::kBytes);
  fetch.fetch(p, team, 0);
  const int newest_page = slot < 0 ? 0 : __ldcg(fetch.table + (position / kSliceRows >> p.page_shift));
  if (threadIdx.x < p.M * S::kQuads) {
    const int at = max(__ldcg(p.positions + threadIdx.x / S::kQuads), 0);
    reinterpret_cast<float4*>(angles_of_token)[threadIdx.x] = __ldg(
        reinterpret_cast<const float4*>(p.rope + static_cast<int64_t>(at) * S::kHeadDim) + threadIdx.x % S::kQuads);
  }
  float scale_of[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) scale_of[h] = __ldg(p.channel_scale + tile * 64 + warp_of_group * 16 + lane / 4 + h * 8);
  const QueryAngles<S::kHeadDim> angles(p.rope, max(position, 0));
  const float score_scale = score_scale_of(p);
  pdl_wait();
  barrier_wait(&own, 0);
  __syncwarp();  // products are of whole warps
  float sums[4] = {};
  const uint64_t b_tokens = matrix_descriptor(shared_address(tokens));
#pragma unroll 1
  for (int u = group; u < units; u += 2) {
    barrier_wait(full + u, 0);
    GroupedStage<kTokens, 64>::add(sums, matrix_descriptor(ring + u * kStageBytes), b_tokens + u * (2 * kTokens * 8),
                                   scales + (half * (p.K / 128) + u * 4) * kTokens, kTokens, &spare);
  }
  meet<1, S::kThreads>();  // factors are there
  {
    const int c = warp_of_group * 16 + lane / 4, m = lane % 4 * 2;
    const float2 factor = *reinterpret_cast<const float2*>(factors + m);
    float* const part = of_groups + (group * kTokens + m) * S::kRowFloats + c;
    part[0] = sums[0] * (scale_of[0] * factor.x), part[S::kRowFloats] = sums[1] * (scale_of[0] * factor.y);
    part[8] = sums[2] * (scale_of[1] * factor.x), part[S::kRowFloats + 8] = sums[3] * (scale_of[1] * factor.y);
  }
  meet<1, kConsumers>();
  fetch.fetch(p, team, 1);  // nobody reads weights again
  give_sums(p, of_groups, attending, team, member);
  if ((attending >> member & 1) == 0) return;
  float* const parts = reinterpret_cast<float*>(base);  // [block of the team][token][64]
  take_sums(p, parts, team, member);
  meet<1, kConsumers>();

  Queries<KV, S::kHeadDim, 1> queries;
  {
    const int row = lane / 4;
    const float* const first = parts + 2 * row * S::kPartFloats + token * S::kHeadDim + lane % 4 * 2;
#pragma unroll
    for (int k = 0; k < S::kHeadDim / 16; ++k) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        // Of the four rows that are not there anything: nobody writes what they give.
        const float2 a = *reinterpret_cast<const float2*>(first + k * 16 + h * 8);
        const float2 b = *reinterpret_cast<const float2*>(first + S::kPartFloats + k * 16 + h * 8);
        queries.pair[0][k][h] = pack2(a.x + b.x, a.y + b.y);
      }
    }
    queries.turn_projected(NewTokens{}, angles);
  }
  DecodeSums<KV, S::kHeadDim, 1> attended;
  attended.start();
  const Item item{token, 1, kDecode, slot, position, 0, 1, 0, 1 << 30, 0, position, {}};
  const Range range(item, 0);
  const uint32_t before = known.tokens_before(slot, position);
#pragma unroll 1
  for (int i = 0; i < fetch.count; ++i) {
    const int slice = fetch.slice(i);
    barrier_wait(&fetched[warp][i % 2], i / 2 & 1);
    uint8_t* const at = i % 2 == 0 ? fetch.places[0] : fetch.places[1];
    bool is_changed = false;
#pragma unroll 1
    for (uint32_t left = before; left != 0; left &= left - 1) {
      const int other = __ffs(left) - 1, new_position = known.position(other);
      if (new_position / kSliceRows != slice) continue;
      const float* const of_key = parts + 2 * S::kGroup * S::kPartFloats + other * S::kHeadDim;
      const StoredPart<KV> stored = NewRow<KV>::make(p.kv, of_key, angles_of_token[other]);
      NewRow<KV>::put(stored, at, new_position % kSliceRows);
      if (other == token && lane < 2 * NewRow<KV>::kLanes) {
        const int row = position & ((kSliceRows << p.page_shift) - 1);
        stored.template store<S::kHeadDim>(p.kv, newest_page, row, team, NewRow<KV>::kind(), NewRow<KV>::dimension());
      }
      is_changed = true;
    }
    if (is_changed) async_proxy_fence();  // before what is copied there next
    __syncwarp();
    attended.attend(queries, shared_address(at), slice * kSliceRows, item, range, S::kGroup, 0, score_scale);
    __syncwarp();
    fetch.fetch(p, team, i + 2);
  }
  float* const left = reinterpret_cast<float*>(base + S::kLeftAt);
  QkvAttentionEnd<KV> end{p, known, parts, left, team, member, score_scale};
  end.leave(attended);
  meet<1, kConsumers>();
  end.send();
  end.write();
}

}  // namespace tpserve::cuda

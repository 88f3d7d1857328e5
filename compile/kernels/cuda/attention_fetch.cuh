// The ninth warp of attention's blocks: it announces items and fetches the stages that the other eight read, ahead of them
// and across items. In a step that only decodes it also appends each token's key and value.
#pragma once

#include "attention_fragments.cuh"
#include "attention_params.cuh"
#include "hopper.cuh"

namespace tpserve::cuda {

template <typename KV, int kHeadDim>
struct Shared {
  static constexpr int kSliceBytes = Fragments<KV, kHeadDim>::kSliceBytes;
  static constexpr int kStageBytes = kStageRows / kSliceRows * kSliceBytes;
  static constexpr int kStages = (96 << 10) / kStageBytes;
  static constexpr int kHeaders = 2;  // items announced ahead
  alignas(128) uint8_t stage[kStages][kStageBytes];
  float2 state[kConsumerWarps][kDecodeRows];  // top score and sum of weights of a warp's rows
  Item item[kHeaders];
  int head[kHeaders];
  uint64_t full[kStages], empty[kStages];
  uint64_t header_full[kHeaders], header_empty[kHeaders];
};

/// Tiles of eight rows that a decode item has.
__device__ __forceinline__ int tiles_of(const Item& item, int group) { return item.count * group <= 8 ? 1 : 2; }

/// Where the warps of a decode item of so many tiles leave their sums for one another: in as many places of the ring as
/// that takes, behind the item's stages.
template <typename KV, int kHeadDim>
struct Scratch {
  using S = Shared<KV, kHeadDim>;
  int warp_bytes, stages;

  __device__ __forceinline__ explicit Scratch(int tiles)
      : warp_bytes(tiles * 8 * kHeadDim * static_cast<int>(sizeof(float))),
        stages((kConsumerWarps * warp_bytes + S::kStageBytes - 1) / S::kStageBytes) {}
  static_assert(kConsumerWarps * 2 * 8 * kHeadDim * sizeof(float) <= S::kStages * S::kStageBytes);

  /// A warp's sums, where the first place is `slot`.
  __device__ __forceinline__ float* of(S& shared, int slot, int warp) const {
    const int warps_of_stage = S::kStageBytes / warp_bytes;
    int at = slot + warp / warps_of_stage;
    if (at >= S::kStages) at -= S::kStages;
    return reinterpret_cast<float*>(shared.stage[at] + warp % warps_of_stage * warp_bytes);
  }
};

/// Where an item's stages are, and which of them is next.
template <typename KV, int kHeadDim>
struct StageFetch {
  using S = Shared<KV, kHeadDim>;
  using P = typename Fragments<KV, kHeadDim>::P;
  static constexpr int kSlices = kStageRows / kSliceRows;

  const int32_t* table;
  int slices_per_page, first_slice, last_slice;
  int stage, end;           // the next, and behind the last
  int known, page_of_lane;  // pages of slices [known, known + 32)

  __device__ StageFetch(const AttentionParams<KV>& p, const Item& item, const Range& range)
      : table(p.kv.table + static_cast<int64_t>(item.slot) * p.kv.pages_per_slot),
        slices_per_page(p.kv.page_size / kSliceRows),
        first_slice(range.begin / kSliceRows),
        last_slice((range.end - 1) / kSliceRows),
        stage(range.first_stage()),
        end(range.last_stage() + 1) {
    look_up(stage * kSlices);
  }

  __device__ void look_up(int slice) {
    known = slice;
    page_of_lane = __ldcg(table + min(slice + static_cast<int>(threadIdx.x % 32), last_slice) / slices_per_page);
  }

  /// Fetches a stage when the ring has room for it.
  __device__ __forceinline__ void next(const AttentionParams<KV>& p, S& shared, int head, RingPlace& place) {
    const int lane = threadIdx.x % 32, slice = stage++ * kSlices;
    if (slice + kSlices > known + 32) look_up(slice);
    const int mine = slice + lane % kSlices;
    const bool wanted = lane < kSlices && mine >= first_slice && mine <= last_slice;
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
          const int64_t at = static_cast<int64_t>(panel) * p.kv.page_size * P::kRowBytes;
          bulk_copy(target + panel * P::kSliceBytes, source + at, P::kSliceBytes, &shared.full[place.slot]);
        }
      }
    }
    place.advance(S::kStages);
  }
};

/// Key and value of the token of a decode item, if the item's range has its position: of one KV head, the key in the first
/// lanes and the value in those that follow.
template <typename KV, int kHeadDim>
struct NewKeyValue {
  static constexpr int kLanes = kHeadDim / 16;  // of a head

  Floats weight;  // of keys, if there is a norm
  float scale;
  Floats angles;
  HeadPart part;
  int page;

  static __device__ __forceinline__ bool present() { return threadIdx.x % 32 < 2 * kLanes; }
  static __device__ __forceinline__ HeadKind kind() {
    return threadIdx.x % 32 < kLanes ? HeadKind::kKey : HeadKind::kValue;
  }
  static __device__ __forceinline__ int dimension() { return threadIdx.x % kLanes * 8; }

  /// Parameters, which no kernel writes: before `pdl_wait`.
  __device__ void load_parameters(const AttentionParams<KV>& p) {
    scale = stored_scale(p.kv, kind());
    weight = {};
    if (p.added.k_weight != nullptr) weight.load<kHeadDim>(p.added.k_weight + dimension());
  }

  /// What is known of a token before it is projected.
  __device__ void look_up(const AttentionParams<KV>& p, const Item& item) {
    angles.load<kHeadDim>(p.added.rope + static_cast<int64_t>(item.position) * kHeadDim + dimension());
    page = __ldcg(p.kv.table + static_cast<int64_t>(item.slot) * p.kv.pages_per_slot + item.position / p.kv.page_size);
  }

  /// Issues the loads; nothing waits for them here.
  __device__ void load(const AttentionParams<KV>& p, const Item& item, int head) {
    const int num_kv = p.kv.num_kv_heads, place = p.group + (kind() == HeadKind::kValue);
    const int64_t first = static_cast<int64_t>(item.token) * (p.group + 2) * num_kv;
    part = {};
    if (present()) {
      part.template load<kHeadDim>(p.added.qkv + (first + head_at(place, head, p.group, num_kv)) * kHeadDim + dimension());
    }
  }

  /// Puts them in their page.
  __device__ void put(const AttentionParams<KV>& p, const Item& item, int head) {
    const Floats turned = turn<kHeadDim>(part, kind(), angles, weight, p.added.k_weight != nullptr, p.added.eps);
    const StoredPart<KV> stored(part, turned, scale, kind(), dimension());
    if (present()) {
      stored.template store<kHeadDim>(p.kv, page, item.position % p.kv.page_size, head, kind(), dimension());
    }
  }
};

/// Announces an item once its place is free.
template <typename KV, int kHeadDim>
__device__ __forceinline__ void announce(Shared<KV, kHeadDim>& shared, const Item& item, int head,
                                         const RingPlace& header) {
  if (threadIdx.x % 32 == 0) {
    barrier_wait(&shared.header_empty[header.slot], header.parity ^ 1);
    shared.item[header.slot] = item;
    shared.head[header.slot] = head;
    barrier_arrive(&shared.header_full[header.slot]);
  }
  __syncwarp();
}

/// Gives the consumers of a decode item places of the ring for their sums.
template <typename KV, int kHeadDim>
__device__ __forceinline__ void give_scratch(Shared<KV, kHeadDim>& shared, const Item& item, int group, RingPlace& place) {
  for (int i = Scratch<KV, kHeadDim>(tiles_of(item, group)).stages; i > 0; --i) {
    if (threadIdx.x % 32 == 0) {
      barrier_wait(&shared.empty[place.slot], place.parity ^ 1);
      barrier_arrive(&shared.full[place.slot]);
    }
    place.advance(Shared<KV, kHeadDim>::kStages);
  }
  __syncwarp();
}

/// Fetches an item's stages. `first`: the block's first item; of those that earlier steps have appended, as many as the ring
/// has room for come while the kernels before still run.
///
/// `kAppends`: in a step that only decodes, where the token is still to be appended. Of its items the one whose range has
/// its position does so, and no other reads what that changes: ranges begin at multiples of a stage.
template <bool kAppends, typename KV, int kHeadDim>
__device__ void fetch_item(const AttentionParams<KV>& p, Shared<KV, kHeadDim>& shared, const Item& item, int head,
                           bool first, NewKeyValue<KV, kHeadDim>& token, RingPlace& place) {
  const Range range(item, p.window);
  const bool appends = kAppends && range.has_newest(item);
  if (appends) token.look_up(p, item);
  if (appends && !first) token.load(p, item, head);
  StageFetch<KV, kHeadDim> fetch(p, item, range);
  // Where steps only decode the rule is the same stage, found by fewer instructions.
  const int newest = kAppends ? fetch.end - (appends ? 1 : 0) : range.first_new_stage(item);
  const int before = first ? min(newest, fetch.stage + Shared<KV, kHeadDim>::kStages) : newest;
  while (true) {
    if (fetch.stage == before) {
      if (first) {
        pdl_wait();
        if (appends) token.load(p, item, head);
      }
      if (appends) {
        token.put(p, item, head);
        async_proxy_fence();  // what each lane has put in the page, before any lane copies it
        __syncwarp();
      }
    }
    if (fetch.stage == fetch.end) return;
    fetch.next(p, shared, head, place);
  }
}

/// All that the ninth warp does: the block's items of the plan, which has ended before any kernel after it started
/// (plan_kernel).
template <bool kAppends, typename KV, int kHeadDim>
__device__ void fetch_items(const AttentionParams<KV>& p, Shared<KV, kHeadDim>& shared) {
  NewKeyValue<KV, kHeadDim> token;
  if constexpr (kAppends) token.load_parameters(p);
  const int num_heads = p.kv.num_kv_heads;
  // The first item is read along with the counts, as if there were decode items only.
  Item next = load_item(p.layout.decode(p.plan) + min(static_cast<int>(blockIdx.x) / num_heads, p.layout.max_decode - 1));
  const int num_wide = __ldcg(p.plan) * num_heads, num_items = num_wide + __ldcg(p.plan + 1) * num_heads;
  const auto at = [&](int i) {
    const bool wide = i < num_wide;
    return (wide ? p.layout.wide(p.plan) : p.layout.decode(p.plan)) + (wide ? i : i - num_wide) / num_heads;
  };
  if (num_wide > 0 && blockIdx.x < num_items) next = load_item(at(blockIdx.x));
  RingPlace place, header;
  bool first = true;
  for (int turn = 0, i = blockIdx.x, later; i < num_items; i = later) {
    const Item item = next;
    later = item_of_turn(++turn, blockIdx.x, gridDim.x);
    if (later < num_items) next = load_item(at(later));
    const int head = (i < num_wide ? i : i - num_wide) % num_heads;
    announce(shared, item, head, header);
    header.advance(Shared<KV, kHeadDim>::kHeaders);
    if (item.kind == kPadding) continue;
    fetch_item<kAppends>(p, shared, item, head, first, token, place);
    first = false;
    if (item.kind == kDecode) give_scratch(shared, item, p.group, place);
  }
}

}  // namespace tpserve::cuda

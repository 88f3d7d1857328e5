// The fifth warp of attention's blocks: it announces items and fetches what the other four read, ahead of them and across
// items. In a step that only decodes it also turns each item's queries and appends its token's key and value.
#pragma once

#include "attention_rows.cuh"
#include "hopper.cuh"

namespace tpserve::cuda {

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

/// The token of a decode item: its queries of one KV head and, if the item's range has its position, its key and value.
/// The warp's lanes have several heads at once.
template <typename KV, int kHeadDim>
struct DecodeToken {
  static constexpr int kLanes = kHeadDim / 16, kHeads = 32 / kLanes;  // lanes of a head, heads of a pass
  static constexpr int kPasses = (kDecodeRows + 2 + kHeads - 1) / kHeads;

  Floats q_weight, k_weight;  // if there is a norm
  float key_scale, value_scale;
  Floats angles;
  HeadPart parts[kPasses];
  int page;

  /// Parameters, which no kernel writes: before `pdl_wait`.
  __device__ void load_parameters(const AttentionParams<KV>& p) {
    key_scale = stored_scale(p.kv, HeadKind::kKey), value_scale = stored_scale(p.kv, HeadKind::kValue);
    if (p.added.q_weight == nullptr) return;
    const int d = threadIdx.x % kLanes * 8;
    q_weight.load<kHeadDim>(p.added.q_weight + d), k_weight.load<kHeadDim>(p.added.k_weight + d);
  }

  /// Issues all loads; nothing waits for them here.
  __device__ void load(const AttentionParams<KV>& p, const Item& item, int head, bool appends) {
    const int lane = threadIdx.x % 32, d = lane % kLanes * 8;
    const int num_kv = p.kv.num_kv_heads;
    const bf16* row = p.added.qkv + static_cast<int64_t>(item.token) * (p.group + 2) * num_kv * kHeadDim + d;
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const int place = pass * kHeads + lane / kLanes;
      parts[pass] = {};
      if (place < p.group + (appends ? 2 : 0)) {
        parts[pass].template load<kHeadDim>(row + head_at(place, head, p.group, num_kv) * kHeadDim);
      }
    }
    angles.template load<kHeadDim>(p.added.rope + static_cast<int64_t>(item.position) * kHeadDim + d);
    page = 0;
    if (appends) {
      page = __ldcg(p.kv.table + static_cast<int64_t>(item.slot) * p.kv.pages_per_slot + item.position / p.kv.page_size);
    }
  }

  /// Puts queries where the consumers read them, and key and value in their page.
  __device__ void put(const AttentionParams<KV>& p, const Item& item, int head, bool appends, uint8_t* queries) {
    const int lane = threadIdx.x % 32, d = lane % kLanes * 8;
    const int num_places = p.group + (appends ? 2 : 0);
    const bool has_norm = p.added.q_weight != nullptr;
#pragma unroll 1
    for (int first = 0; first < num_places; first += kHeads) {  // one piece of code: it is read from memory once a step
      const int place = first + lane / kLanes;
      const HeadKind kind = place < p.group ? HeadKind::kQuery : place == p.group ? HeadKind::kKey : HeadKind::kValue;
      Floats weight{};
      if (has_norm) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          weight.first[i] = kind == HeadKind::kQuery ? q_weight.first[i] : k_weight.first[i];
          weight.second[i] = kind == HeadKind::kQuery ? q_weight.second[i] : k_weight.second[i];
        }
      }
      HeadPart part = parts[0];
      const Floats turned = turn<kHeadDim>(part, kind, angles, weight, has_norm, p.added.eps);
      if (place < p.group) part.template store<kHeadDim>(reinterpret_cast<bf16*>(queries) + place * kHeadDim + d);
      if (appends && first + kHeads > p.group) {
        const StoredPart<KV> stored(part, turned, kind == HeadKind::kKey ? key_scale : value_scale, kind, d);
        if (place >= p.group && place < num_places) {
          stored.template store<kHeadDim>(p.kv, page, item.position % p.kv.page_size, head, kind, d);
        }
      }
#pragma unroll
      for (int pass = 1; pass < kPasses; ++pass) parts[pass - 1] = parts[pass];
    }
  }
};

/// Waits until an item's place is free, and writes what it is; lane 0.
template <typename KV, int kHeadDim>
__device__ __forceinline__ void put_header(Shared<KV, kHeadDim>& shared, const Item& item, int head,
                                           const RingPlace& header) {
  barrier_wait(&shared.header_empty[header.slot], header.parity ^ 1);
  shared.item[header.slot] = item;
  shared.head[header.slot] = head;
}

/// Announces an item, with copies of its queries if it is for decoding, and fetches its stages.
template <typename KV, int kHeadDim>
__device__ void fetch_item(const AttentionParams<KV>& p, Shared<KV, kHeadDim>& shared, const Item& item, int head,
                           RingPlace& header, RingPlace& place) {
  const int lane = threadIdx.x % 32;
  const uint32_t token_bytes = p.group * kHeadDim * 2;
  const bool decode = item.kind == kDecode;
  if (lane == 0) {
    put_header(shared, item, head, header);
    barrier_expect(&shared.header_full[header.slot], decode ? item.count * token_bytes : 0);
  }
  __syncwarp();
  if (decode && lane < item.count) {
    const int64_t row = static_cast<int64_t>(item.token + lane) * p.kv.num_kv_heads * p.group + head * p.group;
    bulk_copy(shared_address(shared.queries[header.slot]) + lane * token_bytes, p.q + row * kHeadDim, token_bytes,
              &shared.header_full[header.slot]);
  }
  if (item.kind == kPadding) return;
  StageFetch<KV, kHeadDim> fetch(p, item, Range(item, p.window));
  while (fetch.stage < fetch.end) fetch.next(p, shared, head, place);
}

/// The same in a step that only decodes, where the queries are still to be turned. Of a token's items the one whose range
/// has its position appends it, and no other reads what that changes: ranges begin at multiples of a stage.
///
/// `first`: the block's first item, whose older positions are fetched while the kernels before still run.
template <typename KV, int kHeadDim>
__device__ void fetch_and_append(const AttentionParams<KV>& p, Shared<KV, kHeadDim>& shared, const Item& item, int head,
                                 bool first, DecodeToken<KV, kHeadDim>& token, RingPlace& header, RingPlace& place) {
  const int lane = threadIdx.x % 32;
  if (item.kind == kPadding) {
    pdl_wait();
    if (lane == 0) {
      put_header(shared, item, head, header);
      barrier_arrive(&shared.header_full[header.slot]);
    }
    __syncwarp();
    return;
  }
  const Range range(item, p.window);
  const bool appends = range.has_newest(item);
  if (!first) token.load(p, item, head, appends);
  StageFetch<KV, kHeadDim> fetch(p, item, range);
  // Meanwhile, stages that the new position is not in: as many as there is room for before the item is announced, since
  // nobody empties a stage of an item that nobody knows of.
  const int newest = fetch.end - (appends ? 1 : 0);
  const int announced_at = min(newest, fetch.stage + Shared<KV, kHeadDim>::kStages);
  if (first) {
    while (fetch.stage < announced_at) fetch.next(p, shared, head, place);
    pdl_wait();
    token.load(p, item, head, appends);
  }
  while (true) {
    if (fetch.stage == announced_at) {
      if (lane == 0) put_header(shared, item, head, header);
      __syncwarp();
      token.put(p, item, head, appends, shared.queries[header.slot]);
      __syncwarp();
      if (lane == 0) barrier_arrive(&shared.header_full[header.slot]);
    }
    if (fetch.stage == fetch.end) return;
    if (fetch.stage == newest) {  // what each lane has put in the page, before any lane copies it
      async_proxy_fence();
      __syncwarp();
    }
    fetch.next(p, shared, head, place);
  }
}

/// All that the fifth warp does: items of the plan from the block's number on, as many further as there are blocks.
template <typename KV, int kHeadDim, bool kAppends>
__device__ void fetch_items(const AttentionParams<KV>& p, Shared<KV, kHeadDim>& shared) {
  DecodeToken<KV, kHeadDim> token;
  if constexpr (kAppends) {  // the plan has ended before any kernel after it started (decode_plan_kernel)
    token.load_parameters(p);
  } else {
    pdl_wait();
  }
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
  for (int i = blockIdx.x; i < num_items; i += gridDim.x) {
    const Item item = next;
    if (i + static_cast<int>(gridDim.x) < num_items) next = load_item(at(i + gridDim.x));
    const int head = (i < num_wide ? i : i - num_wide) % num_heads;
    if constexpr (kAppends) {
      fetch_and_append(p, shared, item, head, i == static_cast<int>(blockIdx.x), token, header, place);
    } else {
      fetch_item(p, shared, item, head, header, place);
    }
    header.advance(Shared<KV, kHeadDim>::kHeaders);
  }
}

}  // namespace tpserve::cuda

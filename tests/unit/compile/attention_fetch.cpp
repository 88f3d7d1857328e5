// The warp of attention's blocks that fetches, how the others take queries, and the kernel that appends any tokens, on the
// host.
#include <algorithm>
#include <atomic>

#include "attention_fetch.cuh"
#include "attention_queries.cuh"
#include "rope.cu"

using namespace tpserve::cuda;

namespace {

struct Case {
  int num_tokens, num_heads, num_kv_heads, page_size, num_slots, pages_per_slot, window;
  const int32_t *positions, *slots, *table;
  const uint16_t* qkv;
  const float *rope, *q_weight, *k_weight, *scales;
  void* pages;
  uint16_t* q;     // (T, Hq, D)
  int32_t* times;  // (T, Hkv): how often queries of a token came
  int num_blocks;
  int64_t early_bytes;  // of pages, copied before the kernels in front had ended
};

template <typename KV>
PagedKV<KV> pages_of(const Case& c) {
  PagedKV<KV> kv{};
  if constexpr (std::is_same_v<KV, fp8>) kv.scales = c.scales;
  kv.data = static_cast<KV*>(c.pages), kv.table = c.table;
  kv.num_kv_heads = c.num_kv_heads, kv.page_size = c.page_size;
  kv.num_slots = c.num_slots, kv.pages_per_slot = c.pages_per_slot;
  return kv;
}

NewTokens tokens_of(const Case& c) {
  return {reinterpret_cast<const bf16*>(c.qkv), c.q_weight, c.k_weight, c.rope, 1e-6f};
}

/// What the consuming warps got of an item.
struct Got {
  Item item;
  int head;
  std::vector<std::vector<uint8_t>> stages;
};

std::atomic<int> num_overwritten;  // bytes of sums that something else came to stand in

/// The consumers' part of the barriers; they are slow now and then.
template <typename KV, int kHeadDim>
void consume(const AttentionParams<KV>& p, Shared<KV, kHeadDim>& shared, int block, int num_blocks,
             std::vector<Got>& got) {
  using S = Shared<KV, kHeadDim>;
  const int num_items = (p.plan[0] + p.plan[1]) * p.kv.num_kv_heads;
  RingPlace place, header;
  for (int turn = 0, i; (i = item_of_turn(turn, block, num_blocks)) < num_items; ++turn) {
    barrier_wait(&shared.header_full[header.slot], header.parity);
    Got& mine = got.emplace_back();
    mine.item = shared.item[header.slot], mine.head = shared.head[header.slot];
    if (i % 3 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(2));
    for (int w = 0; w < kConsumerWarps; ++w) barrier_arrive(&shared.header_empty[header.slot]);
    header.advance(S::kHeaders);
    if (mine.item.kind == kPadding) continue;
    const Range range(mine.item, p.window);
    for (int stage = range.first_stage(); stage <= range.last_stage(); ++stage) {
      barrier_wait(&shared.full[place.slot], place.parity);
      mine.stages.emplace_back(shared.stage[place.slot], shared.stage[place.slot] + sizeof(shared.stage[0]));
      for (int w = 0; w < kConsumerWarps; ++w) barrier_arrive(&shared.empty[place.slot]);
      place.advance(S::kStages);
    }
    if (mine.item.kind != kDecode) continue;
    // Their places in the ring, which they fill while nothing else is copied there.
    const Scratch<KV, kHeadDim> scratch(tiles_of(mine.item, p.group));
    const int slot = place.slot;
    RingPlace last = place;
    for (int k = 0; k < scratch.stages; ++k, last.advance(S::kStages)) barrier_wait(&shared.full[last.slot], last.parity);
    const auto each = [&](const auto& visit) {
      for (int w = 0; w < kConsumerWarps; ++w) {
        auto* bytes = reinterpret_cast<uint8_t*>(scratch.of(shared, slot, w));
        for (int k = 0; k < scratch.warp_bytes; ++k) visit(bytes[k], static_cast<uint8_t>(w * 31 + i));
      }
    };
    each([](uint8_t& byte, uint8_t value) { byte = value; });
    if (turn < 4) std::this_thread::sleep_for(std::chrono::milliseconds(20));  // for what follows to come
    each([&](uint8_t& byte, uint8_t value) { num_overwritten += byte != value; });
    for (int k = 0; k < scratch.stages; ++k, place.advance(S::kStages)) {
      for (int w = 0; w < kConsumerWarps; ++w) barrier_arrive(&shared.empty[place.slot]);
    }
  }
}

/// Puts the bfloat16 queries of an item where they belong in `rows`, (T, Hq, D) from its first on, as one warp of the others
/// takes them.
template <int kHeadDim, int kTiles>
void take_queries(const AttentionParams<bf16>& p, const Item& item, int head, bool projected, uint16_t* rows) {
  Queries<bf16, kHeadDim, kTiles> queries;
  if (projected) {
    const QueryAngles<kHeadDim> angles(p.added.rope, item.position);
    queries.load_projected(p, item, head);
    queries.turn_projected(p.added, angles);
  } else {
    queries.load(p, item, head);
  }
  const int lane = threadIdx.x;
  for (int t = 0; t < kTiles; ++t) {
    const int row = t * 8 + lane / 4;
    if (row >= item.count * p.group) continue;
    for (int k = 0; k < kHeadDim / 16; ++k) {
      for (int h = 0; h < 2; ++h) {
        const int query = row / p.group * p.kv.num_kv_heads * p.group + row % p.group;
        uint16_t* at = rows + query * kHeadDim + k * 16 + h * 8 + lane % 4 * 2;
        at[0] = queries.pair[t][k][h] & 0xFFFF, at[1] = queries.pair[t][k][h] >> 16;
      }
    }
  }
}

/// Whether the stages are the pages' slices, as the pages are in the end.
template <typename KV, int kHeadDim>
bool has_slices(const AttentionParams<KV>& p, const Got& got) {
  using P = Panels<sizeof(KV), kHeadDim>;
  constexpr int kSliceBytes = Shared<KV, kHeadDim>::kSliceBytes;
  const Range range(got.item, p.window);
  for (int slice = range.begin / kSliceRows; slice <= (range.end - 1) / kSliceRows; ++slice) {
    const int first = slice * kSliceRows, stage = first / kStageRows - range.first_stage();
    const uint8_t* found = got.stages.at(stage).data() + slice % (kStageRows / kSliceRows) * kSliceBytes;
    const int page = p.kv.table[got.item.slot * p.kv.pages_per_slot + first / p.kv.page_size];
    const auto* keys = reinterpret_cast<const uint8_t*>(p.kv.template keys<kHeadDim>(page, got.head));
    for (int panel = 0; panel < 2 * P::kCount; ++panel) {
      const uint8_t* rows = keys + panel * p.kv.page_size * P::kRowBytes + first % p.kv.page_size * P::kRowBytes;
      if (std::memcmp(found + panel * P::kSliceBytes, rows, P::kSliceBytes) != 0) return false;
    }
  }
  return true;
}

/// What kernels before this one are still to write of an array: anything.
template <typename T>
Unfinished to_come(const T* begin, size_t count) { return {begin, std::vector<uint8_t>(count * sizeof(T))}; }

Unfinished projections(const Case& c, int head_dim) {
  return to_come(c.qkv, static_cast<size_t>(c.num_tokens) * (c.num_heads + 2 * c.num_kv_heads) * head_dim);
}

/// Without a plan, nothing that the kernel takes is there before it has waited.
template <typename KV>
void append_all(const Case& c, int head_dim, bool is_planned) {
  unfinished = {projections(c, head_dim)};
  if (!is_planned) {
    unfinished.push_back(to_come(c.positions, c.num_tokens)), unfinished.push_back(to_come(c.slots, c.num_tokens));
    unfinished.push_back(to_come(c.table, c.num_slots * c.pages_per_slot));
  }
  bf16* q = reinterpret_cast<bf16*>(c.q);
  append<KV>({tokens_of(c), pages_of<KV>(c), c.positions, c.slots, q, c.num_tokens, c.num_heads, is_planned}, head_dim,
             nullptr);
}

/// Where the slot of an item's tokens begins in the step.
int first_position(const Case& c, const Item& item) {
  return c.positions[std::find(c.slots, c.slots + c.num_tokens, item.slot) - c.slots];
}

/// Runs the blocks of a step one after the other: by a plan of decodes or, behind the kernel that appends, by any step's.
/// Returns how much was not as it should be.
template <typename KV, int kHeadDim>
int fetch(Case& c, bool decode_only) {
  const auto* pages = static_cast<const uint8_t*>(c.pages);
  const size_t page_bytes = 2ull * c.num_kv_heads * c.page_size * kHeadDim * sizeof(KV);
  const std::vector<uint8_t> before(pages, pages + page_bytes * c.num_slots * c.pages_per_slot);
  if (!decode_only) append_all<KV>(c, kHeadDim, true);
  unfinished = {projections(c, kHeadDim)};
  if (!decode_only) {
    unfinished.push_back({pages, before});
    unfinished.push_back(to_come(c.q, static_cast<size_t>(c.num_tokens) * c.num_heads * kHeadDim));
  }
  const PlanLayout layout(c.num_tokens, c.num_slots, decode_only);
  std::vector<int32_t> storage(layout.size() + 4, -1);
  AttentionParams<KV> p{.layout = layout};
  p.plan = reinterpret_cast<int32_t*>((reinterpret_cast<uintptr_t>(storage.data()) + 15) / 16 * 16);
  p.added = tokens_of(c), p.kv = pages_of<KV>(c), p.q = reinterpret_cast<const bf16*>(c.q);
  p.num_tokens = c.num_tokens, p.group = c.num_heads / c.num_kv_heads, p.window = c.window;
  run_block(dim3(), dim3(0), 0, (c.num_tokens / 32 + 1) * 32, [&] {
    const auto plan = [&](auto kernel, auto... pitches) {
      kernel(c.positions, c.slots, c.num_tokens, c.num_slots, p.group, c.num_kv_heads, c.window, layout, p.plan, pitches...);
    };
    decode_only ? plan(decode_plan_kernel, 0, 0) : plan(plan_kernel);
  });
  std::atomic<int> num_bad = 0;
  gave_up = false, num_overwritten = 0, early_bytes = 0;
  std::vector<Got> got;
  for (int block = 0; block < c.num_blocks; ++block) {
    auto shared = std::make_unique<Shared<KV, kHeadDim>>();
    using S = Shared<KV, kHeadDim>;
    shared_base = reinterpret_cast<uint8_t*>(shared.get());
    for (int i = 0; i < S::kStages; ++i) {
      barrier_init(&shared->full[i], 1), barrier_init(&shared->empty[i], kConsumerWarps);
    }
    for (int i = 0; i < S::kHeaders; ++i) {
      barrier_init(&shared->header_full[i], 1), barrier_init(&shared->header_empty[i], kConsumerWarps);
    }
    std::thread consumer([&] { consume(p, *shared, block, c.num_blocks, got); });
    run_block(dim3(c.num_blocks), dim3(block), kConsumerWarps * 32, 32, [&] {
      decode_only ? fetch_items<true>(p, *shared) : fetch_items<false>(p, *shared);
      num_bad += static_cast<int>(!pending_stores.empty());  // never fenced
    });
    consumer.join();
  }
  // Queries are the same of pages of either type, which float16 holds no better here.
  AttentionParams<bf16> plain{.layout = layout};
  plain.added = p.added, plain.q = p.q, plain.group = p.group, plain.kv.num_kv_heads = c.num_kv_heads;
  const size_t size = static_cast<size_t>(c.num_tokens) * c.num_heads * kHeadDim;
  std::vector<uint16_t> queries(c.q, c.q + size);
  const auto all_queries = [&](const auto& visit) {
    for (const Got& each : got) {
      if (gave_up || each.item.kind != kDecode) continue;
      visit(each, queries.data() + (static_cast<int64_t>(each.item.token) * c.num_heads + each.head * p.group) * kHeadDim);
    }
  };
  run_block(dim3(), dim3(), 0, 32, [&] {
    pdl_wait();
    all_queries([&](const Got& each, uint16_t* rows) {
      tiles_of(each.item, p.group) == 1 ? take_queries<kHeadDim, 1>(plain, each.item, each.head, decode_only, rows)
                                        : take_queries<kHeadDim, 2>(plain, each.item, each.head, decode_only, rows);
    });
  });
  if (!decode_only) num_bad += std::memcmp(c.q, queries.data(), size * 2) != 0;  // as the kernel before has turned them
  std::memcpy(c.q, queries.data(), size * 2);
  for (const Got& each : got) {
    if (gave_up) break;
    if (each.item.kind == kPadding) {
      for (int i = 0; i < each.item.count; ++i) num_bad += c.slots[each.item.token + i] >= 0;
      continue;
    }
    num_bad += !has_slices<KV, kHeadDim>(p, each) + (each.item.run_position != first_position(c, each.item));
    ++c.times[each.item.token * c.num_kv_heads + each.head];
  }
  c.early_bytes = early_bytes;
  return num_bad + gave_up + num_overwritten;
}

}  // namespace

/// Puts the decode items of a step's plan, (items, 4): token, split, splits, positions to the end of the chunk or run. Returns
/// how many.
extern "C" int decode_items(const int32_t* positions, const int32_t* slots, int num_tokens, int num_slots, int group,
                            int num_kv_heads, int window, int decode_only, int32_t* out) {
  const PlanLayout layout(num_tokens, num_slots, decode_only != 0);
  const int pitch = num_tokens + 3, words = (layout.size() + 15) / 16 * 16;
  std::vector<int32_t> storage(2 * words + 4, -1), rows(4 * pitch, -1);  // the step that is wanted is the second of two
  std::copy_n(positions, num_tokens, rows.data() + pitch), std::copy_n(slots, num_tokens, rows.data() + 3 * pitch);
  auto* plans = reinterpret_cast<int32_t*>((reinterpret_cast<uintptr_t>(storage.data()) + 15) / 16 * 16);
  int32_t* const plan = plans + (decode_only ? words : 0);
  run_block(dim3(2), dim3(decode_only ? 1 : 0), 0, (num_tokens / 32 + 1) * 32, [&] {
    if (decode_only) {
      decode_plan_kernel(rows.data(), rows.data() + 2 * pitch, num_tokens, num_slots, group, num_kv_heads, window, layout,
                         plans, pitch, words);
    } else {
      plan_kernel(positions, slots, num_tokens, num_slots, group, num_kv_heads, window, layout, plan);
    }
  });
  for (int i = 0; i < plan[1]; ++i, out += 4) {
    const Item& item = layout.decode(plan)[i];
    const int first = item.split * item.chunk, end = item.position + item.count;
    out[0] = item.token, out[1] = item.split, out[2] = item.num_splits;
    out[3] = item.kind == kPadding ? 0 : (end < first + item.chunk ? end : first + item.chunk) - first;
  }
  return plan[1];
}

extern "C" void append_step(const Case* c, int head_dim) { append_all<bf16>(*c, head_dim, false); }

extern "C" int fetch_step(Case* c, int head_dim, int is_fp8, int decode_only) {
  const bool d = decode_only != 0;
#ifdef BF16_128_ALONE  // which is compiled sooner than all
  return is_fp8 || head_dim != 128 ? 1 : fetch<bf16, 128>(*c, d);
#else
  if (is_fp8) return head_dim == 128 ? fetch<fp8, 128>(*c, d) : fetch<fp8, 64>(*c, d);
  return head_dim == 128 ? fetch<bf16, 128>(*c, d) : fetch<bf16, 64>(*c, d);
#endif
}

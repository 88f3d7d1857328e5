// Attention of new tokens over the pages of their slots, grouped query heads, causal, with an optional window.
//
// `attention_plan` finds the runs of tokens that follow each other in one slot, once per step, and cuts them into items;
// `attention` (every layer) deals items x KV heads to a persistent grid. Rows of an item are (token, query head of the
// group) pairs; attention_rows.cuh has what a warp does with them, over pages of bfloat16 or e4m3.
//   decode item:  a run of at most 16 rows and one chunk of its positions. All four warps have the same rows; each takes
//                 sixteen of the 64 positions of a stage, and the four sums are added. Where a run has several chunks, the
//                 warp that ends the last of them adds all partial sums, in the order of positions.
//   prefill item: up to 64 rows over all their positions; each warp has sixteen rows.
// Chunks start at multiples of a length that depends on the run's own length alone, so results do not depend on what
// else is in the batch. A fifth warp announces items and fetches their queries and stages of 64 positions ahead, across
// items, so that the others never wait for an address.
#include "attention_splits.cuh"
#include "elementwise.cuh"
#include "hopper.cuh"

namespace tpserve::cuda {
namespace {

constexpr int kThreads = (kConsumerWarps + 1) * 32;

__device__ __forceinline__ void consumer_sync() { asm volatile("bar.sync 1, 128;" ::: "memory"); }

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
          const int64_t at = static_cast<int64_t>(panel) * p.kv.page_size * P::kRowBytes;
          bulk_copy(target + panel * P::kSliceBytes, source + at, P::kSliceBytes, &shared.full[place.slot]);
        }
      }
    }
    place.advance(S::kStages);
  }
}

/// Adds the four warps' sums, (w + w2) + (w1 + w3) whichever warp w `role` 0 is; the result is in that warp.
template <typename KV, int kHeadDim>
__device__ void add_warps(Shared<KV, kHeadDim>& shared, Rows<KV, kHeadDim>& rows, float scale, int role,
                          bool many_rows) {
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

/// `finisher`: the warp that ends the item while the others go on to the next.
template <typename KV, int kHeadDim, Out kOut>
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
    rows.template write<kOut>(p, item, head, 0);
    return;
  }
  // Chunks of a window start above zero; partial sums are kept by their order.
  const int begin = p.window > 0 ? max(0, item.position - p.window + 1) : 0;
  store_partial(p, item, head, item.split - begin / item.chunk, rows);
  if (!ends_last(p, item, head)) return;
  for (int first = 0; first < item.count * p.group; first += kBatch) {
    add_splits<KV, kHeadDim, kOut>(p, item, head, first);
  }
}

template <typename KV, int kHeadDim, Out kOut>
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
  if (any) rows.template write<kOut>(p, item, head, first_row);
}

template <typename KV, int kHeadDim, Out kOut>
__device__ void write_zeros(const AttentionParams<KV>& p, const Item& item, int head) {
  constexpr int kItems = kOut == Out::kBf16 ? 8 : 16;  // of 16 bytes
  const int width = p.group * kHeadDim / kItems;
  for (int i = threadIdx.x; i < item.count * width; i += kConsumerWarps * 32) {
    const int64_t at = out_at<kHeadDim>(p, item.token + i / width, head * p.group) + i % width * kItems;
    if constexpr (kOut == Out::kBf16) {
      *reinterpret_cast<uint4*>(p.out + at) = uint4{};
    } else {
      *reinterpret_cast<uint4*>(p.quantized + at) = uint4{};
    }
  }
  if constexpr (kOut == Out::kGrouped) {
    for (int i = threadIdx.x; i < item.count * p.group; i += kConsumerWarps * 32) {
      p.scales[scale_at(head * p.group + i % p.group, item.token + i / p.group, p.num_tokens)] = 0.0f;
    }
  }
}

template <typename KV, int kHeadDim, Out kOut>
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
      write_zeros<KV, kHeadDim, kOut>(p, item, head);
    } else if (item.kind == kDecode) {
      consume_decode<KV, kHeadDim, kOut>(p, shared, item, head, finisher, place, rows);
      finisher = (finisher + 1) % kConsumerWarps;
    } else {
      consume_prefill<KV, kHeadDim, kOut>(p, shared, item, head, place, rows);
    }
  }
}

/// Words of the plan of a step with up to T tokens of S slots.
int64_t attention_plan_size(int64_t num_tokens, int64_t num_slots) {
  return PlanLayout(static_cast<int>(num_tokens), static_cast<int>(num_slots)).size();
}

/// float32 elements of workspace that `attention` needs for T tokens of S slots.
int64_t attention_workspace_size(int64_t num_tokens, int64_t num_slots, int64_t num_heads, int64_t num_kv_heads,
                                 int64_t head_dim) {
  const int64_t rows = max_partial_rows(num_tokens, num_slots, num_heads / num_kv_heads);
  return num_arrivals(num_slots, num_kv_heads) + rows * kMaxSplits * num_kv_heads * (head_dim + 4);
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

/// Where a step's output goes: `out`, or `quantized` and `scales`.
struct Output {
  const TensorView* out;
  const TensorView* quantized;
  const TensorView* scales;
};

template <typename KV, int kHeadDim, Out kOut>
void run(const AttentionParams<KV>& p, int device, cudaStream_t stream) {
  int num_sms = 0;
  check_cuda(cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device), "SM count");
  const int64_t max_items = (static_cast<int64_t>(p.layout.max_wide) + p.layout.max_decode) * p.kv.num_kv_heads;
  const dim3 grid(static_cast<unsigned>(max_items < 2 * num_sms ? max_items : 2 * num_sms));
  launch(attention_kernel<KV, kHeadDim, kOut>, grid, kThreads, sizeof(Shared<KV, kHeadDim>), stream, p);
}

template <typename KV>
void attend(const TensorView& q, KVScales<KV> kv_scales, const TensorView& kv_layer, const TensorView& page_table,
            const TensorView& plan, double scale, int64_t window, const TensorView& workspace, const Output& output) {
  check_rank("q", q, 3);
  check_rank("workspace", workspace, 1);
  const int64_t num_tokens = q.size(0), num_heads = q.size(1), dim = q.size(2);
  const PagedKV<KV> kv = PagedKV<KV>::from(kv_scales, kv_layer, page_table, dim);
  if (num_heads % kv.num_kv_heads != 0) {
    TVM_FFI_THROW(ValueError) << num_heads << " query heads cannot be shared by " << kv.num_kv_heads << " KV heads";
  }
  const PlanLayout layout(static_cast<int>(num_tokens), kv.num_slots);
  const int64_t need = attention_workspace_size(num_tokens, kv.num_slots, num_heads, kv.num_kv_heads, dim);
  if (workspace.size(0) < need) {
    TVM_FFI_THROW(ValueError) << "workspace has " << workspace.size(0) << " elements, expected at least " << need;
  }
  AttentionParams<KV> p{.layout = layout};
  p.q = checked<bf16>("q", q, {num_tokens, num_heads, dim});
  p.kv = kv;
  p.plan = checked<int32_t>("plan", plan, {layout.size()});
  float* floats = checked<float>("workspace", workspace, {-1});
  p.arrivals = reinterpret_cast<int32_t*>(floats);
  p.partial = floats + num_arrivals(kv.num_slots, kv.num_kv_heads);
  p.num_tokens = static_cast<int>(num_tokens);
  p.group = static_cast<int>(num_heads / kv.num_kv_heads);
  p.window = static_cast<int>(window);
  p.scale_log2 = static_cast<float>(scale * 1.4426950408889634);
  const int device = q.device().device_id;
  const cudaStream_t stream = stream_of(q);
  if (output.out != nullptr) {
    p.out = checked<bf16>("out", *output.out, {num_tokens, num_heads * dim});
    return dim == 128 ? run<KV, 128, Out::kBf16>(p, device, stream) : run<KV, 64, Out::kBf16>(p, device, stream);
  }
  check_multiple("the query heads", num_heads, 2);
  p.quantized = checked<fp8>("out", *output.quantized, {num_tokens, num_heads * dim});
  p.scales = checked<float>("scales", *output.scales, {num_heads / 2, 2, padded_tokens(num_tokens)});
  run<KV, 128, Out::kGrouped>(p, device, stream);
}

/// As `attend`, with e4m3 out; `scratch` is (T, Hq * D) bf16, for more tokens than have grouped scales.
template <typename KV>
void attend_grouped(const TensorView& q, KVScales<KV> kv_scales, const TensorView& kv_layer,
                    const TensorView& page_table, const TensorView& plan, double scale, int64_t window,
                    const TensorView& workspace, const TensorView& scratch, const TensorView& out,
                    const TensorView& scales) {
  check_rank("q", q, 3);
  if (q.size(2) != kGroupSize) {
    TVM_FFI_THROW(ValueError) << "heads of " << q.size(2) << " dimensions, grouped scales are for " << kGroupSize;
  }
  const bool grouped = q.size(0) <= kMaxGroupedTokens;
  const Output output = grouped ? Output{nullptr, &out, &scales} : Output{&scratch, nullptr, nullptr};
  attend<KV>(q, kv_scales, kv_layer, page_table, plan, scale, window, workspace, output);
  if (!grouped) quantize_fp8_grouped(scratch, out, scales);
}

/// (T, Hq, D) bf16 -> (T, Hq * D) bf16. Tokens with slot -1 give zeros. The workspace's first words (`num_arrivals`) must
/// be zero when it is first used, and are so afterwards.
void attention(TensorView q, TensorView kv_layer, TensorView page_table, TensorView plan, double scale, int64_t window,
               TensorView workspace, TensorView out) {
  attend<bf16>(q, {}, kv_layer, page_table, plan, scale, window, workspace, {&out, nullptr, nullptr});
}

/// The same over e4m3 pages; `kv_scale` is (2,) float32, of keys and of values.
void attention_fp8(TensorView q, TensorView kv_scale, TensorView kv_layer, TensorView page_table, TensorView plan,
                   double scale, int64_t window, TensorView workspace, TensorView out) {
  attend<fp8>(q, scales_from(kv_scale), kv_layer, page_table, plan, scale, window, workspace, {&out, nullptr, nullptr});
}

/// As `attention`, giving e4m3 with grouped scales; heads of 128.
void attention_grouped(TensorView q, TensorView kv_layer, TensorView page_table, TensorView plan, double scale,
                       int64_t window, TensorView workspace, TensorView scratch, TensorView out, TensorView scales) {
  attend_grouped<bf16>(q, {}, kv_layer, page_table, plan, scale, window, workspace, scratch, out, scales);
}

void attention_fp8_grouped(TensorView q, TensorView kv_scale, TensorView kv_layer, TensorView page_table,
                           TensorView plan, double scale, int64_t window, TensorView workspace, TensorView scratch,
                           TensorView out, TensorView scales) {
  attend_grouped<fp8>(q, scales_from(kv_scale), kv_layer, page_table, plan, scale, window, workspace, scratch, out,
                      scales);
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
TVM_FFI_DLL_EXPORT_TYPED_FUNC(attention_grouped, attention_grouped);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(attention_fp8_grouped, attention_fp8_grouped);

}  // namespace
}  // namespace tpserve::cuda

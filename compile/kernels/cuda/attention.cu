// Attention of new tokens over the pages of their slots, grouped query heads, causal, with an optional window.
//
// `attention_plan` finds the runs of tokens that follow each other in one slot, once per step, and cuts them into items;
// `attention` (every layer) deals items x KV heads to a persistent grid. Rows of an item are (token, query head of the
// group) pairs; pages are of bfloat16 or e4m3.
//   decode item:  a run of at most 16 rows, or a piece of one of a few more, and one chunk of its positions
//                 (attention_decode.cuh). All eight warps have the same rows, and positions of their own.
//   prefill item: up to 128 rows over all their positions; each warp has sixteen rows (attention_rows.cuh).
// Chunks start at multiples of a length that depends on the run's own length alone, so results do not depend on what
// else is in the batch. A ninth warp announces items and fetches their stages of 64 positions ahead, across items, so that
// the others never wait for an address.
//
// New tokens are turned and appended by a kernel of its own (rope.cu) or, in a step in which each token is its slot's
// only one, here: between two GEMMs a kernel costs more than what it does. Both give the same bits. Either way blocks fetch
// what earlier steps have appended while the kernels before still run.
#include "attention_decode.cuh"
#include "attention_rows.cuh"
#include "elementwise.cuh"
#include "joined.cuh"

namespace tpserve::cuda {
namespace {

/// How many threads a kernel has. Where more than one tile's registers are needed, four warps to fetch, of which one does,
/// leave theirs to the consumers: spilled ones are slow here, since shared memory leaves little to L1. `kTeams`: of four
/// warps, whose sums one keeps; two such blocks share a multiprocessor.
template <bool kDecodeOnly, int kTiles, int kTeams>
struct Threads {
  static_assert(kTeams == 1 || (kTeams == 2 && kDecodeOnly && kTiles == 1), "registers for two blocks");
  static constexpr bool kGiveRegisters = !kDecodeOnly || kTiles > 1;
  static constexpr int kConsumers = kConsumerWarps / kTeams;
  static constexpr int kCount = (kConsumers + (kGiveRegisters ? 4 : 1)) * 32;
};

/// Of the 168 that all begin with.
template <bool kDecodeOnly>
struct Registers {
  static constexpr int kProducer = kDecodeOnly ? 96 : 56, kConsumer = kDecodeOnly ? 200 : 224;
};

template <Out kOut, typename KV, int kHeadDim>
__device__ __forceinline__ void consume_prefill(const AttentionParams<KV>& p, Shared<KV, kHeadDim>& shared,
                                                const Item& item, int head, RingPlace& place) {
  using S = Shared<KV, kHeadDim>;
  const int lane = threadIdx.x % 32, first_row = threadIdx.x / 32 * 16;
  const Range range(item, p.window);
  const ScoreScale<KV> scale(p);
  Rows<KV, kHeadDim> rows;
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

template <int kWarps, int kHeadDim, Out kOut, typename KV>
__device__ void write_zeros(const AttentionParams<KV>& p, const Item& item, int head) {
  constexpr int kItems = kOut == Out::kBf16 ? 8 : 16;  // of 16 bytes
  const int width = p.group * kHeadDim / kItems;
#pragma unroll 1
  for (int i = threadIdx.x; i < item.count * width; i += kWarps * 32) {
    const int64_t at = out_at<kHeadDim>(p, item.token + i / width, head * p.group) + i % width * kItems;
    if constexpr (kOut == Out::kBf16) {
      *reinterpret_cast<uint4*>(p.out + at) = uint4{};
    } else {
      *reinterpret_cast<uint4*>(p.quantized + at) = uint4{};
    }
  }
  if constexpr (kOut == Out::kGrouped) {
    const int groups = p.group / kRowsOfScale<kOut, kHeadDim>;
#pragma unroll 1
    for (int i = threadIdx.x; i < item.count * groups; i += kWarps * 32) {
      p.scales[scale_at(head * groups + i % groups, item.token + i / groups, p.num_tokens)] = 0.0f;
    }
  }
}

/// A word that all of an item's that consumers use have a part in, for `await_loaded`.
__device__ __forceinline__ uint32_t words_of(const Item& item) {
  return item.token | item.count | item.kind | item.slot | item.position | item.split | item.num_splits | item.first_row |
         item.chunk | item.first_place;
}

/// `kDecodeOnly`: of a step in which each token is its slot's only one; it appends them on the way. `kTiles`: of eight rows,
/// that its decode items have at most.
template <typename KV, int kHeadDim, Out kOut, bool kDecodeOnly, int kTiles, int kTeams>
__global__ void __launch_bounds__(Threads<kDecodeOnly, kTiles, kTeams>::kCount, kTeams)
    attention_kernel(const __grid_constant__ AttentionParams<KV> p) {
  using S = Shared<KV, kHeadDim>;
  using T = Threads<kDecodeOnly, kTiles, kTeams>;
  extern __shared__ __align__(1024) uint8_t memory[];
  S& shared = *reinterpret_cast<S*>(memory);
  if (threadIdx.x == 0) {
    for (int i = 0; i < S::kStages; ++i) {
      barrier_init(&shared.full[i], 1), barrier_init(&shared.empty[i], T::kConsumers);
    }
    for (int i = 0; i < S::kHeaders; ++i) {
      barrier_init(&shared.header_full[i], 1), barrier_init(&shared.header_empty[i], T::kConsumers);
    }
    barrier_init_fence();
  }
  pdl_launch();
  __syncthreads();
  if (threadIdx.x / 32 >= T::kConsumers) {
    if constexpr (T::kGiveRegisters) set_registers<Registers<kDecodeOnly>::kProducer, false>();
    if (threadIdx.x / 32 == T::kConsumers) fetch_items<kDecodeOnly>(p, shared);
    return;
  }
  if constexpr (T::kGiveRegisters) set_registers<Registers<kDecodeOnly>::kConsumer, true>();
  const int num_items = (__ldcg(p.plan) + __ldcg(p.plan + 1)) * p.kv.num_kv_heads;
  bool waited = !kDecodeOnly;  // no flag there: it would take the place of a register that products need
  if (waited) pdl_wait();
  RingPlace place, header;
  for (int turn = 0; item_of_turn(turn, blockIdx.x, gridDim.x) < num_items; ++turn) {
    barrier_wait(&shared.header_full[header.slot], header.parity);
    const Item item = shared.item[header.slot];
    const int head = shared.head[header.slot];
    await_loaded(words_of(item) | head);
    __syncwarp();
    if (threadIdx.x % 32 == 0) barrier_arrive(&shared.header_empty[header.slot]);
    header.advance(S::kHeaders);
    if (item.kind == kPadding) {
      wait_once(waited);
      write_zeros<T::kConsumers, kHeadDim, kOut>(p, item, head);
    } else if constexpr (kDecodeOnly) {
      consume_decode<kTiles, kOut, true, kTeams>(p, shared, item, head, waited, place);
    } else if (item.kind == kPrefill) {
      consume_prefill<kOut>(p, shared, item, head, place);
    } else if (tiles_of(item, p.group) == 1) {
      consume_decode<1, kOut, false, 1>(p, shared, item, head, waited, place);
    } else {
      consume_decode<2, kOut, false, 1>(p, shared, item, head, waited, place);
    }
  }
  wait_once(waited);
}

/// Words of the plan of a step with T tokens of S slots: of any such step, or of one in which each token is its slot's only
/// one.
int64_t attention_plan_size(int64_t num_tokens, int64_t num_slots, bool decode_only) {
  return PlanLayout(static_cast<int>(num_tokens), static_cast<int>(num_slots), decode_only).size();
}

/// float32 elements of workspace that `attention` needs for T tokens of S slots.
int64_t attention_workspace_size(int64_t num_tokens, int64_t num_slots, int64_t num_heads, int64_t num_kv_heads,
                                 int64_t head_dim) {
  const int64_t rows = max_partial_rows(num_tokens, num_slots, num_heads / num_kv_heads);
  return rows * kMaxSplits * num_kv_heads * (head_dim + 4);
}

void check_heads(int64_t num_heads, int64_t num_kv_heads) {
  if (num_kv_heads < 1 || num_heads < 1 || num_heads % num_kv_heads != 0 || num_heads / num_kv_heads > kDecodeRows) {
    TVM_FFI_THROW(ValueError) << num_heads << " query heads over " << num_kv_heads
                              << " KV heads: expected groups of 1 to " << kDecodeRows;
  }
}

void check_plan(int64_t num_tokens, int64_t num_heads, int64_t num_kv_heads, int64_t window) {
  check_heads(num_heads, num_kv_heads);
  if (num_tokens > kMaxPlanTokens) {
    TVM_FFI_THROW(ValueError) << num_tokens << " tokens in a step, at most " << kMaxPlanTokens << " are supported";
  }
  if (window < 0) TVM_FFI_THROW(ValueError) << "window is " << window << ", expected 0 (none) or more";
}

/// (T,) positions and slots -> the plan that `attention` of every layer of this step takes. The plan's size says whether
/// it is one of decodes alone; then no two tokens may have the same slot, and those with slot -1 may be anywhere. In any
/// other step a slot's tokens follow each other, and no slot reads in its pages what another one appends in the same step.
void attention_plan(TensorView positions, TensorView token_slots, int64_t num_slots, int64_t num_heads,
                    int64_t num_kv_heads, int64_t window, TensorView plan) {
  check_rank("positions", positions, 1);
  const int64_t num_tokens = positions.size(0);
  const int32_t* position = checked<int32_t>("positions", positions, {num_tokens});
  const int32_t* slot = checked<int32_t>("token_slots", token_slots, {num_tokens});
  check_plan(num_tokens, num_heads, num_kv_heads, window);
  const PlanLayout layout = layout_of(plan, num_tokens, num_slots);
  int32_t* words = checked<int32_t>("plan", plan, {layout.size()});
  const int tokens = static_cast<int>(num_tokens), slots = static_cast<int>(num_slots);
  const int group = static_cast<int>(num_heads / num_kv_heads), kv_heads = static_cast<int>(num_kv_heads);
  if (layout.decode_only()) {
    launch(decode_plan_kernel, 1, kPlanThreads, 0, stream_of(plan), position, slot, tokens, slots, group, kv_heads,
           static_cast<int>(window), layout, words, 0, 0);
  } else {
    launch(plan_kernel, 1, kPlanThreads, 0, stream_of(plan), position, slot, tokens, slots, group, kv_heads,
           static_cast<int>(window), layout, words);
  }
}

/// The plans of N steps of T decodes at once: positions and slots (N, P), of which the first T columns count, and plans
/// (N, at least attention_plan_size), each as `attention_plan` gives it.
void attention_plans(TensorView positions, TensorView token_slots, int64_t num_tokens, int64_t num_slots,
                     int64_t num_heads, int64_t num_kv_heads, int64_t window, TensorView plans) {
  check_rank("positions", positions, 2);
  check_rank("plans", plans, 2);
  const int64_t steps = positions.size(0), pitch = positions.size(1), plan_pitch = plans.size(1);
  check_plan(num_tokens, num_heads, num_kv_heads, window);
  const PlanLayout layout(static_cast<int>(num_tokens), static_cast<int>(num_slots), true);
  if (num_tokens > pitch || layout.size() > plan_pitch) {
    TVM_FFI_THROW(ValueError) << "rows of " << pitch << " tokens and " << plan_pitch << " words of plans, " << num_tokens
                              << " tokens of " << num_slots << " slots need " << layout.size() << " words";
  }
  launch(decode_plan_kernel, static_cast<unsigned>(steps), kPlanThreads, 0, stream_of(plans),
         checked<int32_t>("positions", positions, {steps, pitch}),
         checked<int32_t>("token_slots", token_slots, {steps, pitch}), static_cast<int>(num_tokens),
         static_cast<int>(num_slots), static_cast<int>(num_heads / num_kv_heads), static_cast<int>(num_kv_heads),
         static_cast<int>(window), layout, checked<int32_t>("plans", plans, {steps, plan_pitch}), static_cast<int>(pitch),
         static_cast<int>(plan_pitch));
}

/// Norm weights of queries and keys with their epsilon, or none.
struct HeadNorm {
  const TensorView* q_weight = nullptr;
  const TensorView* k_weight = nullptr;
  double eps = 0.0;
};

/// Where a step's output goes: `out`, or `quantized` and `scales`.
struct Output {
  const TensorView* out;
  const TensorView* quantized = nullptr;
  const TensorView* scales = nullptr;
};

template <typename KV, int kHeadDim, Out kOut>
void run(const AttentionParams<KV>& p, int device, cudaStream_t stream) {
  int num_sms = 0;
  check_cuda(cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device), "SM count");
  const int64_t max_items = (static_cast<int64_t>(p.layout.max_wide) + p.layout.max_decode) * p.kv.num_kv_heads;
  const auto queue = [&](auto decode_only, auto tiles, auto teams) {
    constexpr bool kDecodeOnly = decltype(decode_only)::value;
    constexpr int kTiles = decltype(tiles)::value, kTeams = decltype(teams)::value;
    const auto blocks = static_cast<unsigned>(max_items < num_sms * kTeams ? max_items : num_sms * kTeams);
    launch(attention_kernel<KV, kHeadDim, kOut, kDecodeOnly, kTiles, kTeams>, blocks,
           static_cast<unsigned>(Threads<kDecodeOnly, kTiles, kTeams>::kCount), sizeof(Shared<KV, kHeadDim>), stream, p);
  };
  constexpr std::integral_constant<int, 1> one;
  constexpr std::integral_constant<int, 2> two;
  if (!p.layout.decode_only()) return queue(std::false_type(), two, one);
  if (p.group > 8) return queue(std::true_type(), two, one);
  if (p.num_tokens * p.kv.num_kv_heads > num_sms) return queue(std::true_type(), one, two);
  queue(std::true_type(), one, one);
}

template <typename KV>
void attend(const AttentionInputs& in, const HeadNorm& norm, KVScales<KV> kv_scales, const Output& output) {
  check_rank("q", in.q, 2);
  check_rank("rope", in.rope, 2);
  check_rank("workspace", in.workspace, 1);
  const int64_t num_tokens = in.q.size(0), dim = in.rope.size(1);
  const PagedKV<KV> kv = PagedKV<KV>::from(kv_scales, in.kv_layer, in.page_table, dim);
  const int64_t num_heads = in.q.size(1) / dim;
  check_heads(num_heads, kv.num_kv_heads);
  const int64_t need = attention_workspace_size(num_tokens, kv.num_slots, num_heads, kv.num_kv_heads, dim);
  if (in.workspace.size(0) < need) {
    TVM_FFI_THROW(ValueError) << "workspace has " << in.workspace.size(0) << " elements, expected at least " << need;
  }
  NewTokens added{};
  added.qkv = checked<bf16>("qkv", in.qkv, {num_tokens, (num_heads + 2 * kv.num_kv_heads) * dim});
  added.rope = checked<float>("rope", in.rope, {-1, dim});
  added.eps = static_cast<float>(norm.eps);
  if (norm.q_weight != nullptr) {
    added.q_weight = checked<float>("q_weight", *norm.q_weight, {dim});
    added.k_weight = checked<float>("k_weight", *norm.k_weight, {dim});
  }
  const int32_t* positions = checked<int32_t>("positions", in.positions, {num_tokens});
  const int32_t* slots = checked<int32_t>("token_slots", in.token_slots, {num_tokens});
  bf16* q = checked<bf16>("q", in.q, {num_tokens, num_heads * dim});
  const PlanLayout layout = layout_of(in.plan, num_tokens, kv.num_slots);
  AttentionParams<KV> p{.layout = layout};
  p.added = added;
  p.q = q;
  p.kv = kv;
  p.plan = checked<int32_t>("plan", in.plan, {layout.size()});
  float* floats = checked<float>("workspace", in.workspace, {-1});
  p.partial = floats;
  p.num_tokens = static_cast<int>(num_tokens);
  p.group = static_cast<int>(num_heads / kv.num_kv_heads);
  p.window = static_cast<int>(in.window);
  p.scale_log2 = static_cast<float>(in.scale * 1.4426950408889634);
  const bool is_grouped = output.out == nullptr;
  if (is_grouped) {
    check_multiple("the size of all query heads", num_heads * dim, 2 * kGroupSize);
    check_multiple("the size of a group's query heads", p.group * dim, kGroupSize);
    p.quantized = checked<fp8>("out", *output.quantized, {num_tokens, num_heads * dim});
    p.scales = checked<float>("scales", *output.scales, {num_heads * dim / (2 * kGroupSize), 2, padded_tokens(num_tokens)});
  } else {
    p.out = checked<bf16>("out", *output.out, {num_tokens, num_heads * dim});
  }
  const int device = in.q.device().device_id;
  const cudaStream_t stream = stream_of(in.q);
  if (!layout.decode_only()) {
    append<KV>({added, kv, positions, slots, q, p.num_tokens, static_cast<int>(num_heads), true}, dim, stream);
  }
  if (is_grouped) {
    return dim == 128 ? run<KV, 128, Out::kGrouped>(p, device, stream) : run<KV, 64, Out::kGrouped>(p, device, stream);
  }
  return dim == 128 ? run<KV, 128, Out::kBf16>(p, device, stream) : run<KV, 64, Out::kBf16>(p, device, stream);
}

/// As `attend`, with e4m3 out. More tokens than have grouped scales go through `q` in bfloat16: a token's output of a head
/// is written when its queries have been read, by the last of its items.
template <typename KV>
void attend_grouped(const AttentionInputs& in, const HeadNorm& norm, KVScales<KV> kv_scales, const TensorView& out,
                    const TensorView& scales) {
  check_rank("q", in.q, 2);
  check_rank("rope", in.rope, 2);
  if (in.q.size(0) <= kMaxGroupedTokens) return attend<KV>(in, norm, kv_scales, {nullptr, &out, &scales});
  attend<KV>(in, norm, kv_scales, {&in.q});
  quantize_fp8_grouped(in.q, out, scales);
}

}  // namespace

void attend_grouped(const AttentionInputs& in, const TensorView* kv_scale, const TensorView& out, const TensorView& scales) {
  if (kv_scale == nullptr) return attend_grouped<bf16>(in, {}, {}, out, scales);
  attend_grouped<fp8>(in, {}, scales_from(*kv_scale), out, scales);
}

namespace {

/// (T, (Hq + 2 Hkv) D) bf16 -> (T, Hq D) bf16: turns queries and keys, appends keys and values to their pages, and attends.
/// `q` is (T, Hq D) bf16, for the turned queries of steps that do not only decode. Tokens with slot -1 append nothing and
/// give zeros. The workspace must be empty (slots.cuh) when it is first used, and is so afterwards.
void attention(TensorView qkv, TensorView kv_layer, TensorView positions, TensorView token_slots, TensorView page_table,
               TensorView rope, TensorView plan, double scale, int64_t window, TensorView workspace, TensorView q,
               TensorView out) {
  attend<bf16>({qkv, kv_layer, positions, token_slots, page_table, rope, plan, scale, window, workspace, q}, {}, {},
               {&out});
}

/// The same over e4m3 pages; `kv_scale` is (2,) float32, of keys and of values.
void attention_fp8(TensorView qkv, TensorView kv_scale, TensorView kv_layer, TensorView positions,
                   TensorView token_slots, TensorView page_table, TensorView rope, TensorView plan, double scale,
                   int64_t window, TensorView workspace, TensorView q, TensorView out) {
  attend<fp8>({qkv, kv_layer, positions, token_slots, page_table, rope, plan, scale, window, workspace, q}, {},
              scales_from(kv_scale), {&out});
}

/// As `attention`, giving e4m3 with grouped scales.
void attention_grouped(TensorView qkv, TensorView kv_layer, TensorView positions, TensorView token_slots,
                       TensorView page_table, TensorView rope, TensorView plan, double scale, int64_t window,
                       TensorView workspace, TensorView q, TensorView out, TensorView scales) {
  attend_grouped<bf16>({qkv, kv_layer, positions, token_slots, page_table, rope, plan, scale, window, workspace, q}, {},
                       {}, out, scales);
}

void attention_fp8_grouped(TensorView qkv, TensorView kv_scale, TensorView kv_layer, TensorView positions,
                           TensorView token_slots, TensorView page_table, TensorView rope, TensorView plan,
                           double scale, int64_t window, TensorView workspace, TensorView q, TensorView out,
                           TensorView scales) {
  attend_grouped<fp8>({qkv, kv_layer, positions, token_slots, page_table, rope, plan, scale, window, workspace, q}, {},
                      scales_from(kv_scale), out, scales);
}

/// The same with a norm of each head of queries and keys; its weights are (D,) float32.
void qk_norm_attention(TensorView qkv, TensorView q_weight, TensorView k_weight, double eps, TensorView kv_layer,
                       TensorView positions, TensorView token_slots, TensorView page_table, TensorView rope,
                       TensorView plan, double scale, int64_t window, TensorView workspace, TensorView q,
                       TensorView out) {
  attend<bf16>({qkv, kv_layer, positions, token_slots, page_table, rope, plan, scale, window, workspace, q},
               {&q_weight, &k_weight, eps}, {}, {&out});
}

void qk_norm_attention_fp8(TensorView qkv, TensorView q_weight, TensorView k_weight, double eps, TensorView kv_scale,
                           TensorView kv_layer, TensorView positions, TensorView token_slots, TensorView page_table,
                           TensorView rope, TensorView plan, double scale, int64_t window, TensorView workspace,
                           TensorView q, TensorView out) {
  attend<fp8>({qkv, kv_layer, positions, token_slots, page_table, rope, plan, scale, window, workspace, q},
              {&q_weight, &k_weight, eps}, scales_from(kv_scale), {&out});
}

void qk_norm_attention_grouped(TensorView qkv, TensorView q_weight, TensorView k_weight, double eps,
                               TensorView kv_layer, TensorView positions, TensorView token_slots,
                               TensorView page_table, TensorView rope, TensorView plan, double scale, int64_t window,
                               TensorView workspace, TensorView q, TensorView out, TensorView scales) {
  attend_grouped<bf16>({qkv, kv_layer, positions, token_slots, page_table, rope, plan, scale, window, workspace, q},
                       {&q_weight, &k_weight, eps}, {}, out, scales);
}

void qk_norm_attention_fp8_grouped(TensorView qkv, TensorView q_weight, TensorView k_weight, double eps,
                                   TensorView kv_scale, TensorView kv_layer, TensorView positions,
                                   TensorView token_slots, TensorView page_table, TensorView rope, TensorView plan,
                                   double scale, int64_t window, TensorView workspace, TensorView q, TensorView out,
                                   TensorView scales) {
  attend_grouped<fp8>({qkv, kv_layer, positions, token_slots, page_table, rope, plan, scale, window, workspace, q},
                      {&q_weight, &k_weight, eps}, scales_from(kv_scale), out, scales);
}

TVM_FFI_DLL_EXPORT_TYPED_FUNC(attention_plan_size, attention_plan_size);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(attention_workspace_size, attention_workspace_size);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(attention_plan, attention_plan);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(attention_plans, attention_plans);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(attention, attention);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(attention_fp8, attention_fp8);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(attention_grouped, attention_grouped);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(attention_fp8_grouped, attention_fp8_grouped);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(qk_norm_attention, qk_norm_attention);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(qk_norm_attention_fp8, qk_norm_attention_fp8);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(qk_norm_attention_grouped, qk_norm_attention_grouped);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(qk_norm_attention_fp8_grouped, qk_norm_attention_fp8_grouped);

}  // namespace
}  // namespace tpserve::cuda

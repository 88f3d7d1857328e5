// Rotary embedding of queries and keys, and the append of keys and values to their pages, of a step with any tokens.
// rope.cuh has what a thread does.
#include "rope.cuh"

namespace tpserve::cuda {
namespace {

constexpr int kThreads = 128;

template <typename KV, int kHeadDim, bool kNorm>
__global__ void __launch_bounds__(kThreads) append_kernel(const __grid_constant__ AppendParams<KV> p) {
  constexpr int kLanes = kHeadDim / 16;  // threads per head
  pdl_launch();
  // Behind a plan, which lets no kernel start before it ends, all but the projections is there already. Weights of norms
  // come later: of what all threads share L1 soon has the most, and held here they would cost a third of the blocks.
  if (!p.is_planned) pdl_wait();
  const int64_t token = blockIdx.y;
  const int unit = blockIdx.x * kThreads + threadIdx.x;
  const int head = unit / kLanes, d = unit % kLanes * 8;
  const int num_kv = p.kv.num_kv_heads, all_heads = p.num_heads + 2 * num_kv;
  const bool present = head < all_heads;
  const int slot = __ldcg(p.slots + token), position = __ldcg(p.positions + token);
  const HeadKind kind = head < p.num_heads            ? HeadKind::kQuery
                        : head < p.num_heads + num_kv ? HeadKind::kKey
                                                      : HeadKind::kValue;
  Floats angles{}, weight{};
  if (kind != HeadKind::kValue) {
    angles.load<kHeadDim>(p.added.rope + static_cast<int64_t>(slot < 0 ? 0 : position) * kHeadDim + d);
  }
  const float scale = stored_scale(p.kv, kind);
  int page = 0;
  if (kind != HeadKind::kQuery && slot >= 0) {
    page = __ldcg(p.kv.table + static_cast<int64_t>(slot) * p.kv.pages_per_slot + position / p.kv.page_size);
  }
  pdl_wait();
  if (head - head % (32 / kLanes) >= all_heads) return;  // whole warps only: the norm shuffles
  HeadPart part{};
  if (present) part.load<kHeadDim>(p.added.qkv + (token * all_heads + head) * kHeadDim + d);
  if (kNorm) weight.load<kHeadDim>((kind == HeadKind::kQuery ? p.added.q_weight : p.added.k_weight) + d);
  const Floats turned = turn<kHeadDim>(part, kind, angles, weight, kNorm, p.added.eps);
  const StoredPart<KV> stored(part, turned, scale, kind, d);  // before lanes leave
  if (!present) return;
  if (kind == HeadKind::kQuery) {
    part.store<kHeadDim>(p.q + (token * p.num_heads + head) * kHeadDim + d);
    return;
  }
  if (slot < 0) return;
  stored.template store<kHeadDim>(p.kv, page, position % p.kv.page_size, (head - p.num_heads) % num_kv, kind, d);
}

}  // namespace

template <typename KV>
void append(const AppendParams<KV>& p, int64_t head_dim, cudaStream_t stream) {
  const int64_t units = (p.num_heads + 2ll * p.kv.num_kv_heads) * (head_dim / 16);
  const dim3 grid(static_cast<unsigned>((units + kThreads - 1) / kThreads), static_cast<unsigned>(p.num_tokens));
  const bool has_norm = p.added.q_weight != nullptr;
  const auto kernel = head_dim == 128 ? (has_norm ? append_kernel<KV, 128, true> : append_kernel<KV, 128, false>)
                                      : (has_norm ? append_kernel<KV, 64, true> : append_kernel<KV, 64, false>);
  launch(kernel, grid, kThreads, 0, stream, p);
}

template void append(const AppendParams<bf16>&, int64_t, cudaStream_t);
template void append(const AppendParams<fp8>&, int64_t, cudaStream_t);

namespace {

/// (T, (Hq + 2 Hkv) D) bf16 -> (T, Hq, D) bf16, the turned queries; keys and values go to their pages, of bf16, and nothing
/// is attended to. Tokens with slot -1 append nothing.
void rope_append(TensorView qkv, TensorView positions, TensorView token_slots, TensorView page_table, TensorView rope,
                 TensorView kv_layer, TensorView q) {
  check_rank("q", q, 3);
  check_rank("rope", rope, 2);
  const int64_t num_tokens = q.size(0), num_heads = q.size(1), dim = rope.size(1);
  const PagedKV<bf16> kv = PagedKV<bf16>::from({}, kv_layer, page_table, dim);
  AppendParams<bf16> p{};
  p.added.qkv = checked<bf16>("qkv", qkv, {num_tokens, (num_heads + 2 * kv.num_kv_heads) * dim});
  p.added.rope = checked<float>("rope", rope, {-1, dim});
  p.kv = kv;
  p.positions = checked<int32_t>("positions", positions, {num_tokens});
  p.slots = checked<int32_t>("token_slots", token_slots, {num_tokens});
  p.q = checked<bf16>("q", q, {num_tokens, num_heads, dim});
  p.num_tokens = static_cast<int>(num_tokens), p.num_heads = static_cast<int>(num_heads);
  append<bf16>(p, dim, stream_of(q));
}

TVM_FFI_DLL_EXPORT_TYPED_FUNC(rope_append, rope_append);

}  // namespace
}  // namespace tpserve::cuda

// qkv and attention as one function: one kernel for few tokens, else a product and attention.
#include "gemm_product.cuh"
#include "joined.cuh"
#include "qkv_attention_kernel.cuh"

namespace tpserve::cuda {
namespace {

using Shape = QkvAttentionShape;

/// Of more tokens that follow none, attention's own blocks are as many, and begin while qkv ends (benchmarks/README.md).
constexpr int64_t kMostDecodes = 4;
/// Of the workspace, whose first part has the letters.
constexpr int64_t kLetterBytes = 4 << 20;

void check_heads(int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t hidden) {
  check_multiple("hidden size", hidden, 512);
  if (head_dim != Shape::kHeadDim || heads != kv_heads * Shape::kGroup || kv_heads * Shape::kMembers > kGrid ||
      hidden > Shape::kMostHidden) {
    TVM_FFI_THROW(ValueError) << heads << " query heads and " << kv_heads << " KV heads of " << head_dim << " over hidden size "
                              << hidden << ": expected groups of " << Shape::kGroup << ", up to " << kGrid / Shape::kMembers
                              << " KV heads, of " << Shape::kHeadDim << ", and up to " << Shape::kMostHidden;
  }
}

/// Whether the kernel is for such a step: else a product and attention are.
bool is_joined(int64_t tokens, const AttentionInputs& in) {
  check_rank("kv_layer", in.kv_layer, 4);
  check_rank("page_table", in.page_table, 2);
  const int64_t slices = in.kv_layer.size(3) / (Shape::kHeadDim * kSliceRows);
  const bool decodes = layout_of(in.plan, tokens, in.page_table.size(0)).decode_only();
  return tokens <= (decodes ? kMostDecodes : Shape::kTokens) && in.window == 0 && (slices & (slices - 1)) == 0;
}

template <typename KV>
void join(const Product<fp8>& product, const AttentionInputs& in, KVScales<KV> kv_scales, const TensorView& out,
          const TensorView& scales) {
  QkvAttentionParams<KV> p{};
  p.kv = PagedKV<KV>::from(kv_scales, in.kv_layer, in.page_table, Shape::kHeadDim);
  const int64_t M = product.M, heads = out.size(1) / Shape::kHeadDim, num_kv = p.kv.num_kv_heads;
  check_heads(heads, num_kv, in.rope.size(1), product.K);
  const GemmParams& g = product.params;
  p.weights = {g.weights, g.packed_base, g.packed_rem, g.packed_k};
  p.channel_scale = g.channel_scale, p.norms = g.token_scale;
  p.rope = checked<float>("rope", in.rope, {-1, Shape::kHeadDim});
  p.positions = checked<int32_t>("positions", in.positions, {M});
  p.slots = checked<int32_t>("token_slots", in.token_slots, {M});
  p.letters = g.partial, p.chunks = g.partial + kLetterBytes / sizeof(float4);
  p.out = checked<fp8>("out", out, {M, heads * Shape::kHeadDim});
  p.out_scales = checked<float>("scales", scales, {heads * Shape::kHeadDim / (2 * kGroupSize), 2, padded_tokens(M)});
  p.M = static_cast<int>(M), p.K = static_cast<int>(product.K), p.token_shift = Shape::shift_of(p.M);
  while (kSliceRows << p.page_shift < p.kv.page_size) ++p.page_shift;
  p.scale_log2 = static_cast<float>(in.scale * 1.4426950408889634);
  const int blocks = static_cast<int>(num_kv) * Shape::kMembers;
  static_assert(kGrid * Shape::kMembers * Shape::kOfBlock * sizeof(float4) <= kLetterBytes);
  static_assert(kLetterBytes + kGrid * Shape::kTokens * Shape::kGroup * 17 * sizeof(float4) <= kWorkspaceBytes);
  if (M == 0) return;
  launch(qkv_attention_kernel<KV>, blocks, Shape::kThreads, Shape::shared_bytes<KV>(p.K), product.stream,
         few_tokens_map(product.tokens, M, product.K, product.K / 2), p);
}

void multiply_and_attend(const TensorView& x, const TensorView& norms, const TensorView& weights,
                         const TensorView& channel_scale, const AttentionInputs& in, const TensorView* kv_scale,
                         const TensorView& out, const TensorView& scales) {
  check_rank("qkv", in.qkv, 2);
  check_rank("out", out, 2);
  check_rank("rope", in.rope, 2);
  Product<fp8> product(x, weights, &channel_scale, nullptr, in.qkv.size(1));
  if (!is_joined(product.M, in)) {
    multiply_normed_fp8(x, norms, weights, channel_scale, nullptr, in.qkv);
    return attend_grouped(in, kv_scale, out, scales);
  }
  product.set_norms(norms);
  if (kv_scale == nullptr) return join<bf16>(product, in, {}, out, scales);
  join<fp8>(product, in, scales_from(*kv_scale), out, scales);
}

/// (M, K) e4m3 of a norm that is begun, with `norms` (2, K / 64, M rounded up to 8), and packed qkv with scales of channels;
/// then as `attention_grouped` takes it -> (M, Hq D) e4m3 in `out`, and `scales`. `qkv` (M, (Hq + 2 Hkv) D) and `q`
/// (M, Hq D), bf16, take what is between a product and attention to more tokens.
void qkv_attention_grouped(TensorView x, TensorView norms, TensorView weights, TensorView channel_scale,
                           TensorView kv_layer, TensorView positions, TensorView token_slots, TensorView page_table,
                           TensorView rope, TensorView plan, double scale, int64_t window, TensorView workspace,
                           TensorView qkv, TensorView q, TensorView out, TensorView scales) {
  multiply_and_attend(x, norms, weights, channel_scale,
                      {qkv, kv_layer, positions, token_slots, page_table, rope, plan, scale, window, workspace, q}, nullptr,
                      out, scales);
}

/// The same over pages of e4m3, `kv_scale` (2,).
void qkv_attention_fp8_grouped(TensorView x, TensorView norms, TensorView weights, TensorView channel_scale,
                               TensorView kv_scale, TensorView kv_layer, TensorView positions, TensorView token_slots,
                               TensorView page_table, TensorView rope, TensorView plan, double scale, int64_t window,
                               TensorView workspace, TensorView qkv, TensorView q, TensorView out, TensorView scales) {
  multiply_and_attend(x, norms, weights, channel_scale,
                      {qkv, kv_layer, positions, token_slots, page_table, rope, plan, scale, window, workspace, q}, &kv_scale,
                      out, scales);
}

TVM_FFI_DLL_EXPORT_TYPED_FUNC(qkv_attention_grouped, qkv_attention_grouped);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(qkv_attention_fp8_grouped, qkv_attention_fp8_grouped);

}  // namespace
}  // namespace tpserve::cuda

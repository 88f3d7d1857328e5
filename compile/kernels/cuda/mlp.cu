// A layer's MLP as one function: one kernel for few tokens, else two products.
#include "gemm_product.cuh"
#include "joined.cuh"
#include "mlp_kernel.cuh"

namespace tpserve::cuda {
namespace {

/// Of the workspace, whose first part has the letters.
constexpr int64_t kLetterBytes = 1 << 20;

void check_sizes(int64_t hidden, int64_t activations) {
  check_multiple("hidden size", hidden, 4 * kNormGroupSize);
  check_multiple("activations", activations, 2 * kGroupSize);
  if (hidden < MlpShape::kLeastHidden || hidden > MlpShape::kMostHidden || activations < hidden ||
      activations > 64 * kGrid) {
    TVM_FFI_THROW(ValueError) << "an MLP of " << activations << " activations and hidden size " << hidden << ": expected "
                              << MlpShape::kLeastHidden << " to " << MlpShape::kMostHidden << ", and as many to "
                              << 64 * kGrid << " activations";
  }
}

/// (M, K) e4m3 of a norm that is begun, with `norms` (2, K / 64, M rounded up to 8); packed gate_up (2F, K), interleaved
/// (silu.cuh), and down (K, F), with scales of channels; residual (M, K) bf16 and a norm's weight (K,) -> residual + MLP in
/// `stream`, (M, K) bf16, and its norm begun, in `out` and `out_norms`. The rest takes what is between two products of more
/// tokens: bf16 (M, 2F) and (M, K), e4m3 (M, F) and its scales (F / 256, 8, M rounded up to 8).
void mlp_fp8_add_rms_norm(TensorView x, TensorView norms, TensorView gate_up, TensorView gate_up_scale, TensorView down,
                          TensorView down_scale, TensorView residual, TensorView norm_weight, double eps,
                          TensorView gate_up_scratch, TensorView act, TensorView act_scales, TensorView scratch,
                          TensorView stream, TensorView out, TensorView out_norms) {
  check_rank("act", act, 2);
  const int64_t F = act.size(1);
  const Product<fp8> up = [&] {
    Product<fp8> product(x, gate_up, &gate_up_scale, nullptr, 2 * F);
    product.set_norms(norms);
    return product;
  }();
  const int64_t M = up.M, K = up.K;
  check_sizes(K, F);
  if (M > MlpShape::kTokens) {
    multiply_normed_silu_fp8(x, norms, gate_up, gate_up_scale, nullptr, gate_up_scratch, act, act_scales);
    return multiply_add_rms_norm_fp8(GemmKind::kFp8AfterSilu, act, act_scales, down, down_scale, nullptr, residual,
                                     norm_weight, eps, scratch, stream, out, out_norms);
  }
  Product<fp8> next(act, down, &down_scale, nullptr, K);
  next.end_in_residual(residual, norm_weight, eps, stream, out, out_norms);
  const GemmParams &a = up.params, &b = next.params;
  MlpParams p{};
  p.gate_up = {a.weights, a.packed_base, a.packed_rem, a.packed_k}, p.gate_up_scale = a.channel_scale;
  p.down = {b.weights, b.packed_base, b.packed_rem, b.packed_k}, p.down_scale = b.channel_scale;
  p.norms = a.token_scale;
  p.residual = b.residual, p.norm_weight = b.norm_weight, p.eps = b.eps;
  p.stream = b.residual_out, p.out = static_cast<fp8*>(b.out), p.out_norms = b.out_scale;
  p.letters = a.partial, p.parts = a.partial + kLetterBytes / sizeof(float4);
  p.M = static_cast<int>(M), p.K = static_cast<int>(K), p.tiles = static_cast<int>(K / 64);
  p.stages = MlpShape::stages(p.K);
  const int blocks = static_cast<int>(F / 64);
  static_assert(kGrid * 2 * MlpShape::kTokens * 3 * sizeof(float4) <= kLetterBytes);
  static_assert(kLetterBytes + MlpShape::kMostHidden / 64 * (kGrid / 2) * 128 * sizeof(float4) <= kWorkspaceBytes);
  if (M == 0) return;
  launch(mlp_kernel, blocks, MlpShape::kThreads, MlpShape::shared_bytes(p.K, p.stages), up.stream,
         few_tokens_map(up.tokens, M, K, K), p);
}

TVM_FFI_DLL_EXPORT_TYPED_FUNC(mlp_fp8_add_rms_norm, mlp_fp8_add_rms_norm);

}  // namespace
}  // namespace tpserve::cuda

// The functions of products that begin an RMSNorm, or take e4m3 tokens of one: gemm_norm.cuh says how.
#include "elementwise.cuh"
#include "gemm.cuh"
#include "gemm_dispatch.cuh"
#include "gemm_product.cuh"
#include "joined.cuh"

namespace tpserve::cuda {
namespace {

std::optional<TensorView> optional(const TensorView* bias) {
  return bias == nullptr ? std::nullopt : std::optional<TensorView>(*bias);
}

/// residual + x w^T -> `stream`, and its norm in `out`: whole, or begun, with `squares`. `scratch` (M, N) bf16 takes the
/// product of tokens so many that the norm has a kernel.
void multiply_add_rms_norm(const TensorView& x, const TensorView& weights, const TensorView* bias,
                           const TensorView& residual, const TensorView& norm_weight, double eps,
                           const TensorView& scratch, const TensorView& stream, const TensorView& out,
                           const TensorView& squares) {
  check_rank("out", out, 2);
  Product<bf16> product(x, weights, nullptr, bias, out.size(1));
  const int64_t M = product.M;
  checked<bf16>("scratch", scratch, {M, product.params.N});
  if (M > kMaxFoldedTokens) {
    run_gemm({GemmKind::kBf16, x, weights, std::nullopt, std::nullopt, optional(bias)}, scratch);
    return add_rms_norm(scratch, residual, norm_weight, eps, stream, out);
  }
  product.end_in_residual(residual, norm_weight, eps, stream, out, squares);
  if (M == 0) return;
  dispatch_few<bf16, kMaxFoldedTokens, 0, End::kResidual>(product.params, product.tokens, product.K, product.stream);
}

}  // namespace

/// The same of e4m3 tokens with the scales of `kind`, and its norm in e4m3 with `norms`.
void multiply_add_rms_norm_fp8(GemmKind kind, const TensorView& x, const TensorView& token_scale, const TensorView& weights,
                               const TensorView& channel_scale, const TensorView* bias, const TensorView& residual,
                               const TensorView& norm_weight, double eps, const TensorView& scratch,
                               const TensorView& stream, const TensorView& out, const TensorView& norms) {
  check_rank("out", out, 2);
  Product<fp8> product(x, weights, &channel_scale, bias, out.size(1));
  GemmParams& p = product.params;
  const int64_t M = product.M;
  checked<bf16>("scratch", scratch, {M, p.N});
  product.end_in_residual(residual, norm_weight, eps, stream, out, norms);
  if (M > kMaxFoldedFp8Tokens) {
    run_gemm({kind, x, weights, token_scale, channel_scale, optional(bias)}, scratch);
    return add_rms_norm_fp8(scratch, residual, norm_weight, eps, stream, out, p.out_scale);
  }
  const bool after_silu = kind == GemmKind::kFp8AfterSilu;
  if (kind == GemmKind::kFp8) {
    p.token_scale = checked<float>("token_scale", token_scale, {M});
  } else {
    product.set_grouped_scales(token_scale, after_silu ? kSiluGroups : 2);
  }
  if (M == 0) return;
  const auto run = [&](auto group) {
    dispatch_few<fp8, kMaxFoldedFp8Tokens, decltype(group)::value, End::kResidual>(p, product.tokens, product.K,
                                                                                    product.stream);
  };
  if (kind == GemmKind::kFp8) return run(std::integral_constant<int, 0>());
  if (after_silu) return run(std::integral_constant<int, kSiluGroupSize>());
  run(std::integral_constant<int, kGroupSize>());
}

/// x w^T of e4m3 tokens of a norm, with its `norms`.
void multiply_normed_fp8(const TensorView& x, const TensorView& norms, const TensorView& weights,
                         const TensorView& channel_scale, const TensorView* bias, const TensorView& out) {
  check_rank("out", out, 2);
  Product<fp8> product(x, weights, &channel_scale, bias, out.size(1));
  if (product.M > kMaxFoldedFp8Tokens) return run_gemm_of_norms(x, norms, weights, channel_scale, bias, out);
  product.set_out(out);
  product.set_norms(norms);
  if (product.M == 0) return;
  dispatch_few<fp8, kMaxFoldedFp8Tokens, kNormGroupSize, End::kMemory>(product.params, product.tokens, product.K,
                                                                       product.stream);
}

/// SiLU(gate) * up of the same tokens, with grouped scales. `scratch` (M, 2F) bf16 takes the product of tokens so many that
/// the kernel does not end in SiLU.
void multiply_normed_silu_fp8(const TensorView& x, const TensorView& norms, const TensorView& weights,
                              const TensorView& channel_scale, const TensorView* bias, const TensorView& scratch,
                              const TensorView& out, const TensorView& scales) {
  static_assert(kMaxFoldedFp8Tokens == kMaxSiluGroupedTokens);
  check_rank("out", out, 2);
  const int64_t F = out.size(1);
  check_multiple("F", F, 2 * kGroupSize);
  Product<fp8> product(x, weights, &channel_scale, bias, 2 * F);
  checked<bf16>("scratch", scratch, {product.M, 2 * F});
  if (product.M > kMaxSiluGroupedTokens) {
    run_gemm_of_norms(x, norms, weights, channel_scale, bias, scratch);
    return silu_mul_grouped(scratch, out, scales);
  }
  product.set_norms(norms);
  GemmParams& p = product.params;
  p.out = checked<fp8>("out", out, {product.M, F});
  p.out_scale = checked<float>("scales", scales, {F / (2 * kGroupSize), kSiluGroups, p.padded_tokens});
  if (product.M == 0) return;
  dispatch_few<fp8, kMaxSiluGroupedTokens, kNormGroupSize, End::kSilu>(p, product.tokens, product.K, product.stream);
}

namespace {

/// (M, K) bf16, packed bf16, residual (M, N) bf16, (N,) float32, eps -> residual + product and its norm, (M, N) bf16 each.
void gemm_add_rms_norm(TensorView x, TensorView weights, TensorView residual, TensorView norm_weight, double eps,
                       TensorView scratch, TensorView residual_out, TensorView out, TensorView squares) {
  multiply_add_rms_norm(x, weights, nullptr, residual, norm_weight, eps, scratch, residual_out, out, squares);
}

void gemm_add_rms_norm_bias(TensorView x, TensorView weights, TensorView bias, TensorView residual, TensorView norm_weight,
                            double eps, TensorView scratch, TensorView residual_out, TensorView out, TensorView squares) {
  multiply_add_rms_norm(x, weights, &bias, residual, norm_weight, eps, scratch, residual_out, out, squares);
}

/// As `gemm_add_rms_norm`, of e4m3 with a scale for each token; the norm in e4m3, with `norms` (2, N / 64, M rounded up to 8).
void gemm_fp8_add_rms_norm(TensorView x, TensorView token_scale, TensorView weights, TensorView channel_scale,
                           TensorView residual, TensorView norm_weight, double eps, TensorView scratch,
                           TensorView residual_out, TensorView out, TensorView norms) {
  multiply_add_rms_norm_fp8(GemmKind::kFp8, x, token_scale, weights, channel_scale, nullptr, residual, norm_weight, eps,
                            scratch, residual_out, out, norms);
}

void gemm_fp8_add_rms_norm_bias(TensorView x, TensorView token_scale, TensorView weights, TensorView channel_scale,
                                TensorView bias, TensorView residual, TensorView norm_weight, double eps,
                                TensorView scratch, TensorView residual_out, TensorView out, TensorView norms) {
  multiply_add_rms_norm_fp8(GemmKind::kFp8, x, token_scale, weights, channel_scale, &bias, residual, norm_weight, eps,
                            scratch, residual_out, out, norms);
}

/// The same of e4m3 with grouped scales.
void gemm_fp8_grouped_add_rms_norm(TensorView x, TensorView scales, TensorView weights, TensorView channel_scale,
                                   TensorView residual, TensorView norm_weight, double eps, TensorView scratch,
                                   TensorView residual_out, TensorView out, TensorView norms) {
  multiply_add_rms_norm_fp8(GemmKind::kFp8Grouped, x, scales, weights, channel_scale, nullptr, residual, norm_weight, eps,
                            scratch, residual_out, out, norms);
}

void gemm_fp8_grouped_add_rms_norm_bias(TensorView x, TensorView scales, TensorView weights, TensorView channel_scale,
                                        TensorView bias, TensorView residual, TensorView norm_weight, double eps,
                                        TensorView scratch, TensorView residual_out, TensorView out, TensorView norms) {
  multiply_add_rms_norm_fp8(GemmKind::kFp8Grouped, x, scales, weights, channel_scale, &bias, residual, norm_weight, eps,
                            scratch, residual_out, out, norms);
}

/// And of what `gemm_fp8_silu_mul` gives.
void gemm_fp8_after_silu_add_rms_norm(TensorView x, TensorView scales, TensorView weights, TensorView channel_scale,
                                      TensorView residual, TensorView norm_weight, double eps, TensorView scratch,
                                      TensorView residual_out, TensorView out, TensorView norms) {
  multiply_add_rms_norm_fp8(GemmKind::kFp8AfterSilu, x, scales, weights, channel_scale, nullptr, residual, norm_weight, eps,
                            scratch, residual_out, out, norms);
}

void gemm_fp8_after_silu_add_rms_norm_bias(TensorView x, TensorView scales, TensorView weights, TensorView channel_scale,
                                           TensorView bias, TensorView residual, TensorView norm_weight, double eps,
                                           TensorView scratch, TensorView residual_out, TensorView out, TensorView norms) {
  multiply_add_rms_norm_fp8(GemmKind::kFp8AfterSilu, x, scales, weights, channel_scale, &bias, residual, norm_weight, eps,
                            scratch, residual_out, out, norms);
}

/// (M, K) e4m3 of a norm with `norms` (2, K / 64, M rounded up to 8), packed e4m3 with (N,) scales -> (M, N) bf16 or float32.
void gemm_fp8_normed(TensorView x, TensorView norms, TensorView weights, TensorView channel_scale, TensorView out) {
  multiply_normed_fp8(x, norms, weights, channel_scale, nullptr, out);
}

void gemm_fp8_normed_bias(TensorView x, TensorView norms, TensorView weights, TensorView channel_scale, TensorView bias,
                          TensorView out) {
  multiply_normed_fp8(x, norms, weights, channel_scale, &bias, out);
}

/// The same tokens -> what `gemm_fp8_silu_mul` gives.
void gemm_fp8_normed_silu_mul(TensorView x, TensorView norms, TensorView weights, TensorView channel_scale,
                              TensorView scratch, TensorView out, TensorView scales) {
  multiply_normed_silu_fp8(x, norms, weights, channel_scale, nullptr, scratch, out, scales);
}

void gemm_fp8_normed_silu_mul_bias(TensorView x, TensorView norms, TensorView weights, TensorView channel_scale,
                                   TensorView bias, TensorView scratch, TensorView out, TensorView scales) {
  multiply_normed_silu_fp8(x, norms, weights, channel_scale, &bias, scratch, out, scales);
}

TVM_FFI_DLL_EXPORT_TYPED_FUNC(gemm_add_rms_norm, gemm_add_rms_norm);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(gemm_add_rms_norm_bias, gemm_add_rms_norm_bias);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(gemm_fp8_add_rms_norm, gemm_fp8_add_rms_norm);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(gemm_fp8_add_rms_norm_bias, gemm_fp8_add_rms_norm_bias);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(gemm_fp8_grouped_add_rms_norm, gemm_fp8_grouped_add_rms_norm);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(gemm_fp8_grouped_add_rms_norm_bias, gemm_fp8_grouped_add_rms_norm_bias);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(gemm_fp8_after_silu_add_rms_norm, gemm_fp8_after_silu_add_rms_norm);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(gemm_fp8_after_silu_add_rms_norm_bias, gemm_fp8_after_silu_add_rms_norm_bias);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(gemm_fp8_normed, gemm_fp8_normed);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(gemm_fp8_normed_bias, gemm_fp8_normed_bias);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(gemm_fp8_normed_silu_mul, gemm_fp8_normed_silu_mul);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(gemm_fp8_normed_silu_mul_bias, gemm_fp8_normed_silu_mul_bias);

}  // namespace
}  // namespace tpserve::cuda

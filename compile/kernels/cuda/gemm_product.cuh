// A product's operands, checked, as its kernels take them. On the host.
#pragma once

#include "gemm.cuh"
#include "gemm_norm.cuh"
#include "gemm_parts.cuh"
#include "grouped_scales.cuh"

namespace tpserve::cuda {

constexpr int kSiluGroups = 2 * kGroupSize / kSiluGroupSize;  // of 256 elements

/// Operands of a product of `N` channels.
template <typename T>
struct Product {
  GemmParams params{};
  const T* tokens;
  int64_t M, K;
  cudaStream_t stream;

  Product(const TensorView& x, const TensorView& weights, const TensorView* channel_scale, const TensorView* bias,
          int64_t N) {
    check_rank("x", x, 2);
    M = x.size(0), K = x.size(1);
    check_multiple("K", K, 16 / sizeof(T));
    check_multiple("N", N, 8);
    const int64_t blocks = (N + 63) / 64, packed_k = (K * sizeof(T) + 255) / 256;
    GemmParams& p = params;
    tokens = checked<T>("x", x, {M, K});
    p.weights = reinterpret_cast<const uint8_t*>(
        checked<T>("weights", weights, {blocks * packed_k, 64, static_cast<int64_t>(256 / sizeof(T))}));
    if (channel_scale != nullptr) p.channel_scale = checked<float>("channel_scale", *channel_scale, {N});
    if (bias != nullptr) p.bias = checked<float>("bias", *bias, {N});
    p.M = static_cast<int>(M), p.N = static_cast<int>(N);
    p.channel_blocks = static_cast<int>(blocks);
    p.packed_k = static_cast<int>(packed_k);
    p.packed_base = static_cast<int>(blocks * packed_k / kGrid);
    p.packed_rem = static_cast<int>(blocks * packed_k % kGrid);
    p.partial = reinterpret_cast<float4*>(gemm_workspace(x.device().device_id));
    stream = stream_of(x);
  }

  void set_out(const TensorView& out) {
    const int64_t N = params.N;
    params.out_float32 = has_dtype<float>(out);
    params.out = params.out_float32 ? static_cast<void*>(checked<float>("out", out, {M, N}))
                                    : checked<bf16>("out", out, {M, N});
  }

  /// Of a norm that the product before has begun, if there is one and bf16 tokens are few: that of more is whole.
  void set_squares(const TensorView* squares) {
    if (squares == nullptr || M > kMaxFoldedTokens) return;
    params.squares = checked<float>("squares", *squares, {(K + 63) / 64, padded_tokens(M)});
    params.columns = static_cast<int>(K);
  }

  /// Of e4m3 tokens of a norm: scales and squares (2, K / 64, padded), or those of more tokens, whose norm is whole.
  void set_norms(const TensorView& norms) {
    check_multiple("K", K, 4 * kNormGroupSize);
    params.padded_tokens = static_cast<int>(padded_tokens(M));
    const int64_t tiles = K / kNormGroupSize;
    params.token_scale = checked<float>("norms", norms, {2, tiles, params.padded_tokens});
    if (M > kMaxFoldedFp8Tokens) return;
    params.squares = params.token_scale + tiles * params.padded_tokens;
    params.columns = static_cast<int>(K);
  }

  /// Where the residual stream goes and its norm is begun; `norms`: of e4m3 as `set_norms` takes them, or squares.
  void end_in_residual(const TensorView& residual, const TensorView& norm_weight, double eps, const TensorView& stream,
                       const TensorView& out, const TensorView& norms) {
    GemmParams& p = params;
    const int64_t N = p.N, padded = padded_tokens(M), tiles = (N + 63) / 64;
    p.residual = checked<bf16>("residual", residual, {M, N});
    p.norm_weight = checked<float>("norm_weight", norm_weight, {N});
    p.eps = static_cast<float>(eps);
    p.residual_out = checked<bf16>("residual_out", stream, {M, N});
    p.out = checked<T>("out", out, {M, N});
    if constexpr (sizeof(T) == 1) {
      check_multiple("N", N, 4 * kNormGroupSize);
      p.out_scale = checked<float>("norms", norms, {2, tiles, padded});
      p.squares_out = p.out_scale + tiles * padded;
    } else {
      p.squares_out = checked<float>("squares", norms, {tiles, padded});
    }
  }

  /// Of the tokens; `groups`: of 256 elements, that the tensor has room for.
  void set_grouped_scales(const TensorView& scales, int64_t groups) {
    check_multiple("K", K, 2 * kGroupSize);
    params.padded_tokens = static_cast<int>(padded_tokens(M));
    params.token_scale = checked<float>("scales", scales, {K / (2 * kGroupSize), groups, params.padded_tokens});
  }
};

}  // namespace tpserve::cuda

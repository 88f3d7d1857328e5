// What several kernels do where a joined one (mlp.cu, qkv_attention.cu) is not for the sizes.
#pragma once

#include "gemm.cuh"

namespace tpserve::cuda {

void multiply_normed_fp8(const TensorView& x, const TensorView& norms, const TensorView& weights,
                         const TensorView& channel_scale, const TensorView* bias, const TensorView& out);

void multiply_normed_silu_fp8(const TensorView& x, const TensorView& norms, const TensorView& weights,
                              const TensorView& channel_scale, const TensorView* bias, const TensorView& scratch,
                              const TensorView& out, const TensorView& scales);

void multiply_add_rms_norm_fp8(GemmKind kind, const TensorView& x, const TensorView& token_scale, const TensorView& weights,
                               const TensorView& channel_scale, const TensorView* bias, const TensorView& residual,
                               const TensorView& norm_weight, double eps, const TensorView& scratch,
                               const TensorView& stream, const TensorView& out, const TensorView& norms);

/// What every variant of attention takes, besides scales of pages and a norm.
struct AttentionInputs {
  const TensorView &qkv, &kv_layer, &positions, &token_slots, &page_table, &rope, &plan;
  double scale;
  int64_t window;
  const TensorView &workspace, &q;
};

/// Attention with e4m3 out, `kv_scale` (2,) of e4m3 pages.
void attend_grouped(const AttentionInputs& in, const TensorView* kv_scale, const TensorView& out, const TensorView& scales);

}  // namespace tpserve::cuda

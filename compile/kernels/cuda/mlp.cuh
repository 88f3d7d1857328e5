// The two products that an MLP is where it is no kernel of its own.
#pragma once

#include "gemm.cuh"

namespace tpserve::cuda {

void multiply_normed_silu_fp8(const TensorView& x, const TensorView& norms, const TensorView& weights,
                              const TensorView& channel_scale, const TensorView* bias, const TensorView& scratch,
                              const TensorView& out, const TensorView& scales);

void multiply_add_rms_norm_fp8(GemmKind kind, const TensorView& x, const TensorView& token_scale, const TensorView& weights,
                               const TensorView& channel_scale, const TensorView* bias, const TensorView& residual,
                               const TensorView& norm_weight, double eps, const TensorView& scratch,
                               const TensorView& stream, const TensorView& out, const TensorView& norms);

}  // namespace tpserve::cuda

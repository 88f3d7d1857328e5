// What other kernels' functions queue of elementwise.cu.
#pragma once

#include "common.cuh"

namespace tpserve::cuda {

/// (T, K) bf16 -> e4m3 with grouped scales (grouped_scales.cuh).
void quantize_fp8_grouped(TensorView x, TensorView out, TensorView scales);

/// (T, 2F) bf16, gate and up interleaved (silu.cuh) -> (T, F) e4m3 with scales (F / 256, 8, T rounded up to 8), grouped by
/// silu_group_size(T) (grouped_scales.cuh).
void silu_mul_grouped(TensorView gate_up, TensorView out, TensorView scales);

/// (T, H) bf16, residual (T, H) -> their sum, and its norm.
void add_rms_norm(TensorView x, TensorView residual, TensorView weight, double eps, TensorView residual_out,
                  TensorView out);

/// The same, its norm in e4m3 with a scale for each row, at `scale`.
void add_rms_norm_fp8(const TensorView& x, const TensorView& residual, const TensorView& weight, double eps,
                      const TensorView& residual_out, const TensorView& out, float* scale);

}  // namespace tpserve::cuda

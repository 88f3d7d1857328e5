// What other kernels' functions queue of elementwise.cu.
#pragma once

#include "common.cuh"

namespace tpserve::cuda {

/// (T, K) bf16 -> e4m3 with grouped scales (grouped_scales.cuh).
void quantize_fp8_grouped(TensorView x, TensorView out, TensorView scales);

}  // namespace tpserve::cuda

// SiLU(gate) * up and the order in which gate_up's GEMM gives its operands.
#pragma once

namespace tpserve::cuda {

/// Rows of gate_up's weight, and so the columns of its product, are 8 of gate, 8 of up, and so on (`ParamSpec.interleave`):
/// then the gate and the up of one activation are in one thread's registers (wgmma.cuh), and eight of each stand together
/// in memory.
constexpr int kInterleave = 8;

__device__ __forceinline__ float silu(float x) { return x / (1.0f + __expf(-x)); }

}  // namespace tpserve::cuda

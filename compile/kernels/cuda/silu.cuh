// SiLU(gate) * up and the order in which gate_up's GEMM gives its operands.
#pragma once

#include "common.cuh"

namespace tpserve::cuda {

/// Rows of gate_up's weight, and so the columns of its product, are 8 of gate, 8 of up, and so on (`ParamSpec.interleave`):
/// then the gate and the up of one activation are in one thread's registers (wgmma.cuh), and eight of each stand together
/// in memory.
constexpr int kInterleave = 8;

/// Within some units of the last place of float32. A division to the last bit has a branch, for which a tile's end waits
/// again and again (benchmarks/README.md).
__device__ __forceinline__ float silu(float x) {
  constexpr float kLog2E = 1.4426950408889634f;
  return __fdividef(x, 1.0f + fast_exp2(-kLog2E * x));
}

}  // namespace tpserve::cuda

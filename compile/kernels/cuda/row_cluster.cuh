// Rows that a cluster of eight blocks works on, a thread for each vector of eight elements: a row alone keeps eight
// multiprocessors busy, and is done in the time of one load and one exchange of statistics.
#pragma once

#include "common.cuh"

namespace tpserve::cuda {

constexpr int kRowCluster = 8;
constexpr int kMaxRowWarps = 128;

/// Sum of squares and largest magnitude of a row, over a cluster: each warp sends its part to every block.
struct RowStatistics {
  alignas(16) float2 part[kMaxRowWarps];
  alignas(8) uint64_t barrier;

  __device__ __forceinline__ uint32_t address(const void* p) const {
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
  }

  __device__ void init() {
    if (threadIdx.x == 0) {
      const uint32_t bytes = kRowCluster * (blockDim.x / 32) * sizeof(float2);
      asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(address(&barrier)) : "memory");
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
      asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(address(&barrier)), "r"(bytes) : "memory");
    }
    // Waited for only before the first part is sent: free.
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  }

  __device__ float2 reduce(float squares, float largest) {
    const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
      squares += __shfl_xor_sync(~0u, squares, offset);
      largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, offset));
    }
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
    if (lane < kRowCluster) {
      const uint32_t mine = address(&part[blockIdx.x % kRowCluster * warps + threadIdx.x / 32]);
      uint32_t target, flag;
      asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(target) : "r"(mine), "r"(lane));
      asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(flag) : "r"(address(&barrier)), "r"(lane));
      asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1, %2}, [%3];" ::"r"(target),
                   "r"(__float_as_uint(squares)), "r"(__float_as_uint(largest)), "r"(flag)
                   : "memory");
    }
    uint32_t done = 0;
    while (!done) {
      asm volatile(
          "{\n.reg .pred p;\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], 0;\n"
          "selp.u32 %0, 1, 0, p;\n}"
          : "=r"(done)
          : "r"(address(&barrier))
          : "memory");
    }
    float2 total = make_float2(0.0f, 0.0f);
    for (int i = lane; i < kRowCluster * warps; i += 32) {
      total.x += part[i].x;
      total.y = fmaxf(total.y, part[i].y);
    }
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
      total.x += __shfl_xor_sync(~0u, total.x, offset);
      total.y = fmaxf(total.y, __shfl_xor_sync(~0u, total.y, offset));
    }
    return total;
  }
};

__device__ __forceinline__ void load_weight(const float* weight, int vector, float (&out)[8]) {
  const float4 a = __ldg(reinterpret_cast<const float4*>(weight) + 2 * vector);
  const float4 b = __ldg(reinterpret_cast<const float4*>(weight) + 2 * vector + 1);
  out[0] = a.x, out[1] = a.y, out[2] = a.z, out[3] = a.w, out[4] = b.x, out[5] = b.y, out[6] = b.z, out[7] = b.w;
}

/// Launches a kernel with a cluster for each row, blocks of whole warps with a thread for each vector.
template <typename Params>
void launch_rows(void (*kernel)(Params), int64_t rows, int64_t num_vectors, cudaStream_t stream, const Params& params) {
  if (rows == 0) return;
  const int64_t threads = ((num_vectors + kRowCluster - 1) / kRowCluster + 31) / 32 * 32;
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = kRowCluster, attributes[1].val.clusterDim.y = 1, attributes[1].val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(rows * kRowCluster));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = 2;
  check_cuda(cudaLaunchKernelEx(&config, kernel, params), "kernel launch");
}

}  // namespace tpserve::cuda

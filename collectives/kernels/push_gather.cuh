// The kernel that gathers the ranks' columns of rows over peer memory. Unlike parts of sums, what it sends may be any bits, so
// data are not their own flags: each block raises one at its peers when its share is there.
#pragma once

#include "peer.cuh"

namespace tpserve::cuda {

constexpr int kGatherThreads = 512;

struct GatherParams {
  const uint4* x;
  uint4* out;
  uint8_t* base[kMaxRanks];
  size_t at, slot_bytes;  // of the buffers in a workspace, and of one source's part
  uint64_t timeout_ns;
  int rank, world_size, row_vectors;  // 16-byte vectors of a row of x
  int64_t count;                      // vectors of x
};

/// Says that the block's share has been sent, and waits for the same block's of every other rank. By all threads, after
/// `advance`, whose barrier puts the block's stores before it.
__device__ __forceinline__ void exchange_shares(uint8_t* const (&base)[kMaxRanks], int rank, int world_size, unsigned target,
                                                uint64_t timeout_ns) {
  Control* control = reinterpret_cast<Control*>(base[rank]);
  if (threadIdx.x < static_cast<unsigned>(world_size) && static_cast<int>(threadIdx.x) != rank) {
    const int peer = threadIdx.x;
    __threadfence_system();  // makes them so for the peer
    unsigned* flag = &reinterpret_cast<Control*>(base[peer])->flags[rank][blockIdx.x];
    asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(flag), "r"(target) : "memory");
    const unsigned* own = &control->flags[peer][blockIdx.x];
    Patience patience;
    while (true) {
      unsigned seen;
      asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(seen) : "l"(own) : "memory");
      if (static_cast<int>(seen - target) >= 0 || patience.is_over(control, timeout_ns, peer)) break;
    }
  }
  __syncthreads();
}

/// A block sends its share of the vectors to everybody, says so, waits for the others' shares and puts them in place.
static __global__ void __launch_bounds__(kGatherThreads)
    all_gather_kernel(const __grid_constant__ GatherParams p) {
  pdl_launch();
  pdl_wait();
  Control* control = reinterpret_cast<Control*>(p.base[p.rank]);
  const unsigned epoch = *static_cast<volatile unsigned*>(&control->gather.epoch), buffer = epoch % 2;
  const auto slot_of = [&](int holder, int source) {
    return reinterpret_cast<uint4*>(p.base[holder] + p.at + (buffer * p.world_size + source) * p.slot_bytes);
  };
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x, row = p.row_vectors;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const auto place = [&](int source, int64_t i) { return (i / row * p.world_size + source) * row + i % row; };
  for (int64_t i = begin; i < p.count; i += step) {
    const uint4 v = load_l2(p.x + i);
    p.out[place(p.rank, i)] = v;
    for (int k = 1; k < p.world_size; ++k) store_peer(slot_of((p.rank + k) % p.world_size, p.rank) + i, v);
  }
  advance(&control->gather, epoch, {});  // its buffers need no freeing: flags tell what has come
  exchange_shares(p.base, p.rank, p.world_size, epoch + 1, p.timeout_ns);
  for (int k = 1; k < p.world_size; ++k) {
    const int source = (p.rank + k) % p.world_size;
    const uint4* slot = slot_of(p.rank, source);
    for (int64_t i = begin; i < p.count; i += step) p.out[place(source, i)] = load_l2(slot + i);
  }
}

}  // namespace tpserve::cuda

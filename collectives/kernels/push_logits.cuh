// The kernel that brings the ranks' columns of logits together, as far as the sampler wants them: of a greedy row without
// penalties, bias, mask or log-probabilities each rank sends the best token of its columns, and of padding nothing.
#pragma once

#include "push_gather.cuh"
#include "ranked_token.cuh"

namespace tpserve::cuda {

struct LogitsParams {
  const float* x;     // (R, columns), of this rank
  float* out;         // (R, world_size * columns); only rows that are wanted whole are written
  RankedToken* best;  // (R, kBestSlices), of all ranks' columns; 0: none, or a row that is wanted whole
  GreedyParams greedy;
  uint8_t* base[kMaxRanks];
  size_t at, slot_bytes;  // of the buffers in a workspace, and of one source's part
  uint64_t timeout_ns;
  int rank, world_size, num_rows, columns, vocab_size, slices;  // slices of a row, kBestSlices at most
};

/// One slice of a row's columns, in vectors of four.
struct LogitsSlice {
  int row, slice, begin, end;
  __device__ LogitsSlice(const LogitsParams& p, int index) : row(index / p.slices), slice(index % p.slices) {
    const int vectors = p.columns / 4;
    begin = vectors * slice / p.slices, end = vectors * (slice + 1) / p.slices;
  }
};

/// The best token of a block's slice; in thread 0.
__device__ __forceinline__ RankedToken best_of(const LogitsParams& p, const LogitsSlice& part) {
  __shared__ RankedToken of_warp[kGatherThreads / 32];
  const auto* source = reinterpret_cast<const float4*>(p.x + static_cast<int64_t>(part.row) * p.columns);
  RankedToken best = 0;
  for (int i = part.begin + static_cast<int>(threadIdx.x); i < part.end; i += kGatherThreads) {
    const float4 v = __ldcg(source + i);
    const float logits[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int id = p.rank * p.columns + 4 * i + j;
      if (id < p.vocab_size) best = max(best, ranked_or_nan(logits[j], id));
    }
  }
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) best = max(best, __shfl_xor_sync(~0u, best, offset));
  __syncthreads();  // the slice before has been read
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = best;
  __syncthreads();
  if (threadIdx.x == 0) {
#pragma unroll
    for (int w = 1; w < kGatherThreads / 32; ++w) best = max(best, of_warp[w]);
  }
  return best;
}

/// Each block has slices of its own, of which it sends this rank's part and takes the others'. A token travels as the first
/// vector of its slice.
static __global__ void __launch_bounds__(kGatherThreads)
    gather_logits_kernel(const __grid_constant__ LogitsParams p) {
  pdl_launch();
  pdl_wait();
  Control* control = reinterpret_cast<Control*>(p.base[p.rank]);
  const unsigned epoch = *static_cast<volatile unsigned*>(&control->gather.epoch), buffer = epoch % 2;
  const int64_t vectors = p.columns / 4;
  const auto slot_of = [&](int holder, int source, int row) {
    return reinterpret_cast<uint4*>(p.base[holder] + p.at + (buffer * p.world_size + source) * p.slot_bytes) +
           row * vectors;
  };
  const auto out_of = [&](int source, int row) {
    return reinterpret_cast<uint4*>(p.out) + (static_cast<int64_t>(row) * p.world_size + source) * vectors;
  };
  const int count = p.num_rows * p.slices, thread = static_cast<int>(threadIdx.x);
  for (int index = blockIdx.x; index < count; index += gridDim.x) {
    const LogitsSlice part(p, index);
    if (p.greedy.is_padding(part.row)) continue;
    if (p.greedy.needs_only_best(part.row)) {
      const RankedToken best = best_of(p, part);
      if (thread == 0) {
        const uint4 v{static_cast<uint32_t>(best), static_cast<uint32_t>(best >> 32), 0, 0};
        for (int r = 0; r < p.world_size; ++r) store_peer(slot_of(r, p.rank, part.row) + part.begin, v);
      }
      continue;
    }
    const auto* source = reinterpret_cast<const uint4*>(p.x) + part.row * vectors;
    for (int i = part.begin + thread; i < part.end; i += kGatherThreads) {
      const uint4 v = load_l2(source + i);
      out_of(p.rank, part.row)[i] = v;
      for (int k = 1; k < p.world_size; ++k) {
        store_peer(slot_of((p.rank + k) % p.world_size, p.rank, part.row) + i, v);
      }
    }
  }
  advance(&control->gather, epoch, {});  // its buffers need no freeing: flags tell what has come
  exchange_shares(p.base, p.rank, p.world_size, epoch + 1, p.timeout_ns);
  for (int index = blockIdx.x; index < count; index += gridDim.x) {
    const LogitsSlice part(p, index);
    if (p.greedy.is_padding(part.row)) continue;
    RankedToken* places = p.best + static_cast<int64_t>(part.row) * kBestSlices;
    if (part.slice == 0 && thread >= p.slices && thread < kBestSlices) places[thread] = 0;
    if (p.greedy.needs_only_best(part.row)) {
      if (thread >= 32) continue;
      RankedToken best = 0;
      if (thread < p.world_size) {
        const uint4 v = load_l2(slot_of(p.rank, thread, part.row) + part.begin);
        best = static_cast<RankedToken>(v.y) << 32 | v.x;
      }
#pragma unroll
      for (int offset = 16; offset > 0; offset /= 2) best = max(best, __shfl_xor_sync(~0u, best, offset));
      if (thread == 0) places[part.slice] = best;
      continue;
    }
    if (thread == 0) places[part.slice] = 0;
    for (int k = 1; k < p.world_size; ++k) {
      const int source = (p.rank + k) % p.world_size;
      const uint4* from = slot_of(p.rank, source, part.row);
      for (int i = part.begin + thread; i < part.end; i += kGatherThreads) {
        out_of(source, part.row)[i] = load_l2(from + i);
      }
    }
  }
}

}  // namespace tpserve::cuda

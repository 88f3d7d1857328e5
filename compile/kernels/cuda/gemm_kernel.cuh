// out (M, N) = x (M, K) w^T for bfloat16 or e4m3 operands, any M, with weights packed by `packing.py`.
//
// Swapped operands: weights are wgmma's A (64 channels), tokens its B, so that few tokens waste nothing. One kernel:
//   kBlocks 1 (M <= 96; 128 with grouped scales): a unit of work is one packed stage, 64 channels x 256 bytes of K, against
//   all tokens.
//   kBlocks 2 (more): a unit is 128 channels x 128 bytes of K against 64 to 256 tokens; each warp group has 64 channels.
// Units are dealt to blocks in contiguous runs of the order (channels, K), as a plan says (gemm_plan.cuh). For kBlocks 1 and
// kGrid blocks the packed order is the order in which they read: unit i of block c is stage i * kGrid + c, so all blocks
// together read one contiguous span at a time. A run that starts inside a tile leaves float32 partial sums in its block's
// slot of the workspace, and the block that started the tile adds them; for kBlocks 2 every block of a tile in pieces does
// so for its share of the tokens (gemm_wide.cuh). Always in block order, so sums have one order. Slots are their own flags
// (slots.cuh).
//
// Tiles go to memory, or for a reduction over ranks straight to where it wants them (peer_tile.cuh): with the same bits.
//
// Rows of a tile without a token are not fetched: the copy engine takes longer for rows outside a tensor than for those in
// it. Whatever stands there is of columns of their own, which nobody stores.
//
// Warps of their own fetch (gemm_fetch.cuh); they fill the ring with weights before `pdl_wait`, while the kernel before still
// runs.
//
// Of e4m3 tokens the scales are by token, or grouped (`grouped_scales.cuh`): then the scales of a stage are fetched with
// its tokens, and the product of each group is scaled before it is added (M <= 128).
//
// gate_up's product can end in SiLU(gate) * up (`gemm_silu.cuh`). So can, for few tokens, the residual stream be added, and
// its norm be begun here and ended in the next product (`gemm_norm.cuh`).
#pragma once

#include "gemm.cuh"
#include "gemm_fetch.cuh"
#include "gemm_grouped.cuh"
#include "gemm_norm.cuh"
#include "gemm_parts.cuh"
#include "gemm_silu.cuh"
#include "gemm_wide.cuh"

namespace tpserve::cuda {

/// What fits in a multiprocessor's shared memory, and in half of it. As measured in decode steps (benchmarks/README.md):
///   whole: the next kernels but small ones wait until this one's block ends, but then the next GEMM fetches twice as much
///     while they run. 70B TP=4 with 16 tokens: 8.46 -> 7.41 ms.
///   half: two GEMMs overlap. Better for the shortest, whose weights a ring holds anyway: beside attention's blocks there
///     is room for no more.
enum class Ring { kWhole, kHalf };

/// What a tile ends in: the output in memory, SiLU(gate) * up, the residual stream, or the ranks' workspaces.
enum class End { kMemory, kSilu, kResidual, kPeers };

/// `kGroup_`: elements of K that share a token's scale, 0 for all.
template <int kTokens_, int kBlocks_, Ring kRing, int kGroup_, End kEnd>
struct Shape {
  static constexpr int kTokens = kTokens_, kBlocks = kBlocks_, kGroup = kGroup_;
  static constexpr bool kGrouped = kGroup != 0, kSilu = kEnd == End::kSilu, kPush = kEnd == End::kPeers;
  static constexpr bool kResidual = kEnd == End::kResidual;
  static_assert((!kGrouped && !kResidual) || kBlocks == 1);
  static constexpr int kTilesOfK = kBlocks == 1 ? 2 : 1;  // 128-byte tiles of K in a stage
  static constexpr int kWeightBytes = kTilesOfK * kBlocks * kTileBytes, kTokenBytes = kTilesOfK * kTokens * 128;
  static constexpr int kBytes = kWeightBytes + kTokenBytes;
  static constexpr int kConsumers = kBlocks > 1 ? kBlocks : kTokens <= 32 ? 2 : 1;
  // Four warps to fetch, of which three do, leave their registers to the consumers: of the 168 that all begin with.
  static constexpr bool kGiveRegisters = kBlocks > 1;
  static constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
  static constexpr int kThreads = kConsumers * 128 + (kGiveRegisters ? 128 : 64);
  static constexpr bool kAlternate = kBlocks == 1 && kConsumers == 2;  // warp groups take turns with the stages
  // Small kernels between two GEMMs need some kilobytes beside a whole ring.
  static constexpr int kBudget = (kRing == Ring::kHalf ? 110 : kTokens <= 32 ? 222 : 200) * 1024;
  static constexpr int kExtra = kAlternate ? kTokens * 256 : 0;
  static constexpr int kFitting = (kBudget - kExtra) / kBytes;
  static constexpr int kMostStages = kBlocks > 1 ? 8 : kRing == Ring::kWhole && kTokens <= 32 ? 12 : 6;
  static constexpr int kStages = kFitting < kMostStages ? kFitting : kMostStages;
  static constexpr int kGroups = 256 / (kGrouped ? kGroup : 512);  // of a stage, 0 without
  static constexpr int kScaleBytes = kGroups * kTokens * sizeof(float);           // of a stage, behind the ring
  static constexpr int kStagedTokens = kTokens < kStageTokens ? kTokens : kStageTokens;
  static constexpr int kPeerStageBytes = kPush ? kStagedTokens * kStageStride : 0;  // of a warp group that sends
  static constexpr int kSharedBytes = kStages * (kBytes + kScaleBytes) + kExtra + kBlocks * kPeerStageBytes + 1024;
  static_assert(kSharedBytes <= 226 * 1024, "what a block can have, less its barriers");
  // With few tokens the ring of weights is filled at a measured pace and the first activations have their own barrier.
  static constexpr bool kPaced = kTokens == 8;
  static constexpr int kPace = 3;

  /// What comes with the tokens of a stage.
  static __device__ __forceinline__ int token_bytes(const GemmParams& p) {
    return kTilesOfK * p.box_tokens * 128 + kGroups * p.padded_tokens * static_cast<int>(sizeof(float));
  }
};

constexpr int kPeerBarrier = 3;  // and the next: of the warp groups that send tiles

#define TPSERVE_BAR(op, id, count) asm volatile("bar." op " " #id ", " #count ";" ::: "memory")

template <typename T, typename S>
__global__ void __launch_bounds__(S::kThreads, 1)
    gemm_kernel(const __grid_constant__ CUtensorMap map, const __grid_constant__ GemmParams p) {
  constexpr int kTokens = S::kTokens, kBlocks = S::kBlocks;
  // fp8 products are summed by the tensor cores with few bits; while registers allow it, sums of 256 of K are promoted.
  // So are those of groups that take turns: products under a condition would be serialised by the compiler otherwise.
  constexpr bool kPromote = S::kAlternate || (sizeof(T) == 1 && kBlocks == 1);
  constexpr int kRegisters = kTokens / 2, kVectors = kTokens / 8;
  // Blocks whose partial sums are asked for before the last product, since they are mostly there.
  constexpr int kEarly = kBlocks > 1 ? 0 : kTokens <= 16 ? 4 : kTokens <= 32 ? 2 : kTokens <= 64 ? 1 : 0;
  static_assert(!S::kSilu || kBlocks == 1 || sizeof(T) == 2, "groups of e4m3 activations are of one warp group's channels");
  constexpr bool kByChannel = sizeof(T) == 1, kByToken = kByChannel && !S::kGrouped;
  constexpr bool kHoldScales = kBlocks == 1 && kTokens < 128;  // over the products, while registers allow it
  // Tokens may be of a norm that the product before has begun.
  constexpr bool kNormed = kBlocks == 1 && kTokens <= kMaxFoldedTokens && !S::kResidual && !S::kPush &&
                           (sizeof(T) == 2 || S::kGroup == kNormGroupSize);
  extern __shared__ uint8_t memory[];
  __shared__ uint64_t full[S::kStages + 1], empty[S::kStages];
  __shared__ PushEpoch epoch;
  __shared__ float squares_of_part[kNormed ? 128 : 1];
  __shared__ alignas(8) float factors[kNormed ? kTokens : 1];
  const uint32_t ring = (shared_address(memory) + 1023) & ~1023u;
  uint8_t* behind_ring = memory + (ring - shared_address(memory)) + S::kStages * S::kBytes;
  uint8_t* const peer_stage = behind_ring + S::kExtra + S::kStages * S::kScaleBytes;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, cta = blockIdx.x;
  const auto run = [&] {
    if constexpr (kBlocks > 1) {
      return WideRun(p.plan, cta);
    } else {
      return NarrowRun{p.narrow.first(cta), p.narrow.first(cta + 1)};
    }
  }();
  const int first = run.first, end = run.end;
  if (threadIdx.x == S::kConsumers * 128) {
    for (int i = 0; i <= S::kStages; ++i) barrier_init(full + i, 1);
    for (int i = 0; i < S::kStages; ++i) barrier_init(empty + i, kBlocks * 4);
    if constexpr (S::kPush) epoch.init();
    barrier_init_fence();
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
    if constexpr (!S::kPush) pdl_launch();
  }
  __syncthreads();
  if (warp >= S::kConsumers * 4) {
    if constexpr (S::kGiveRegisters) set_registers<S::kProducerRegisters, false>();
    return fetch<T, S>(p, &map, {ring, full, empty}, &epoch, run, warp - S::kConsumers * 4);
  }
  if constexpr (S::kGiveRegisters) set_registers<S::kConsumerRegisters, true>();
  pdl_wait();
  const int group = __shfl_sync(~0u, warp / 4, 0), thread = threadIdx.x % 128;
  const int block_of_group = kBlocks > 1 ? group : 0;
  const bool writer = kBlocks > 1 || group == 0;
  constexpr int kSlot = kBlocks * kVectors * 128;  // float4 of a block's partial sums
  float4* slot = p.partial + static_cast<size_t>(cta) * kSlot + block_of_group * kVectors * 128 + thread;
  if constexpr (kNormed) {
    if (writer) add_squares<kTokens>(p.squares, p.M, p.columns, squares_of_part, factors);
  }
  if (S::kPaced && first < end) barrier_wait(full + S::kStages, 0);
  RingPlace place;
  for (int unit = first, tile = first / p.units_of_k; unit < end; ++tile) {
    const bool started_here = unit == tile * p.units_of_k;
    const int tile_end = (tile + 1) * p.units_of_k, stop = min(end, tile_end);
    const bool more_segments = stop < end, first_segment = unit == first;
    float sums[kRegisters];
#pragma unroll
    for (int i = 0; i < kRegisters; ++i) sums[i] = 0.0f;
    int held = -1;  // slot of a product still running
    const int sharers = kBlocks == 1 && started_here && stop < tile_end ? sharers_of(p, cta, stop, tile_end) : 0;
    uint4 early[kEarly > 0 ? kEarly : 1][kVectors];
    const int channel = tile * 64 + warp % 4 * 16;
    const auto make_scales = [&] {
      if constexpr (kNormed) {
        return NormedScales<kByChannel, kTokens>(p, channel, factors);
      } else {
        return TileScales<kByChannel, kByToken, kTokens>(p, channel, 0);
      }
    };
    const auto residual = [&] {
      if constexpr (S::kResidual) {
        return ResidualRows<kTokens>(p, channel, writer && started_here);
      } else {
        return 0;
      }
    }();
    const auto held_scales = [&] {
      if constexpr (kHoldScales) {
        return make_scales();
      } else {
        return 0;
      }
    }();
    for (; unit < stop; ++unit) {
      if constexpr (kEarly > 0) {
        if (writer && unit == stop - 1) ask_partials(early, slot, kSlot, sharers);
      }
      if (!S::kAlternate || place.slot % 2 == group) {  // a slot always belongs to the same group: phases stay apart
        barrier_wait(full + place.slot, place.parity);
        const uint32_t stage = ring + place.slot * S::kBytes;
        const uint64_t a = matrix_descriptor(stage + block_of_group * kTileBytes);
        const uint64_t b = matrix_descriptor(stage + S::kWeightBytes);
        if constexpr (S::kGrouped) {
          const float* scales = reinterpret_cast<const float*>(behind_ring + S::kExtra + place.slot * S::kScaleBytes);
          GroupedStage<kTokens, S::kGroup>::add(sums, a, b, scales, p.padded_tokens, empty + place.slot);
        } else if constexpr (kPromote) {
          float fresh[kRegisters];
          wgmma_fence();
#pragma unroll
          for (int k = 0; k < S::kTilesOfK * 4; ++k) {
            Wgmma<T, kTokens>::run(fresh, a + k / 4 * (kTileBytes / 16) + k % 4 * 2,
                                   b + k / 4 * (kTokens * 8) + k % 4 * 2, k != 0);
          }
          wgmma_commit();
          wgmma_wait<0>();
#pragma unroll
          for (int i = 0; i < kRegisters; ++i) asm volatile("" : "+f"(fresh[i])::"memory");
          if (lane == 0) barrier_arrive(empty + place.slot);
#pragma unroll
          for (int i = 0; i < kRegisters; ++i) sums[i] += fresh[i];
        } else {
#pragma unroll
          for (int i = 0; i < kRegisters; ++i) asm volatile("" : "+f"(sums[i])::"memory");
          wgmma_fence();
#pragma unroll
          for (int k = 0; k < S::kTilesOfK * 4; ++k) {
            Wgmma<T, kTokens>::run(sums, a + k / 4 * (kTileBytes / 16) + k % 4 * 2,
                                   b + k / 4 * (kTokens * 8) + k % 4 * 2, 1);
          }
          wgmma_commit();
          if constexpr (kBlocks == 1) {  // bound by memory: the slot matters more than the tensor cores' idle time
            wgmma_wait<0>();
#pragma unroll
            for (int i = 0; i < kRegisters; ++i) asm volatile("" : "+f"(sums[i])::"memory");
            if (lane == 0) barrier_arrive(empty + place.slot);
          } else {
            wgmma_wait<1>();
            if (held >= 0 && lane == 0) barrier_arrive(empty + held);
            held = place.slot;
          }
        }
      }
      place.advance(S::kStages);
    }
    if constexpr (!kPromote) {
      wgmma_wait<0>();
#pragma unroll
      for (int i = 0; i < kRegisters; ++i) asm volatile("" : "+f"(sums[i])::"memory");
      if (held >= 0 && lane == 0) barrier_arrive(empty + held);
    }
    if constexpr (S::kAlternate) {  // add the two groups' halves
      float* half = reinterpret_cast<float*>(behind_ring) + thread;
      if (group == 1) {
        if (!first_segment) TPSERVE_BAR("sync", 2, 256);
#pragma unroll
        for (int i = 0; i < kRegisters; ++i) half[i * 128] = sums[i];
        TPSERVE_BAR("arrive", 1, 256);
      } else {
        TPSERVE_BAR("sync", 1, 256);
#pragma unroll
        for (int i = 0; i < kRegisters; ++i) sums[i] += half[i * 128];
        if (more_segments) TPSERVE_BAR("arrive", 2, 256);
      }
    }
    if (!writer) continue;
    if constexpr (kBlocks > 1) {
      finish_wide<T, S>(p, sums, tile, run, slot, {epoch, peer_stage + group * S::kPeerStageBytes, kPeerBarrier + group});
    } else {
      if (!started_here) {
#pragma unroll
        for (int b = 0; b < kVectors; ++b) {
          store_slot(slot + b * 128, sums[b * 4], sums[b * 4 + 1], sums[b * 4 + 2], sums[b * 4 + 3]);
        }
        continue;
      }
      if constexpr (kEarly > 0) take_partials(sums, early, slot, kSlot, sharers);
      for (int c = kEarly + 1; c <= sharers; ++c) {
        add_partials<kTokens>(sums, slot + static_cast<size_t>(c) * kSlot, 0, kVectors);
      }
      const auto write = [&](const auto& scales) {
        if constexpr (S::kSilu) {
          write_silu<kByChannel, kTokens>(p, sums, tile, scales);
        } else if constexpr (S::kResidual) {
          write_residual<kByChannel, kTokens>(p, sums, tile, scales, residual);
        } else if constexpr (S::kPush) {
          const PeerTile to(p.push, epoch.wait(), channel, p.M, p.N, peer_stage, kPeerBarrier);
          write_tile<kTokens>(p, sums, channel, scales, to);
        } else {
          write_tile<kTokens>(p, sums, channel, scales, MemoryTile{p, channel});
        }
      };
      if constexpr (kHoldScales) {
        write(held_scales);
      } else {
        write(make_scales());
      }
    }
  }
}

}  // namespace tpserve::cuda

// The warps of a GEMM that fetch: one for each 64 channels of weights, as bulk copies of what packing.py has put side by
// side, and one for the tokens, as boxes of a tensor map. Each goes round the ring by itself: the instructions of one warp
// for all, one behind the other, took longer than the products of a wide tile's unit (benchmarks/README.md). Of a stage's
// barrier the first warp tells how much comes, and what comes before it has told counts as well.
//
// `S` is the kernel's Shape.
#pragma once

#include "gemm_parts.cuh"

namespace tpserve::cuda {

/// What the warps know of the ring, in shared memory. Addresses stand in registers.
struct FetchRing {
  uint32_t stages, full, empty;  // the first of each

  __device__ __forceinline__ FetchRing(uint32_t ring, const uint64_t* full_of_stages, const uint64_t* empty_of_stages)
      : stages(in_register(ring)),
        full(in_register(shared_address(full_of_stages))),
        empty(in_register(shared_address(empty_of_stages))) {}
};

/// Where a warp that fetches begins: in its first round waits for slots end at once, for barriers begin in the round before.
__device__ __forceinline__ RingPlace first_round() { return {0, 1}; }

/// The tokens of a block's units, after the kernels before. By one lane.
template <typename T, typename S, typename Units>
__device__ __forceinline__ void fetch_tokens(const GemmParams& p, const CUtensorMap* map, const FetchRing& ring, Units unit,
                                             int count, PushEpoch* epoch) {
  constexpr int kTileK = 128 / sizeof(T);
  const int stage_scales = S::kGroups * p.padded_tokens;  // floats
  RingPlace place = first_round();
  const auto load = [&](uint32_t barrier) {
    const uint32_t target = ring.stages + place.slot * S::kBytes + S::kWeightBytes;
#pragma unroll
    for (int i = 0; i < S::kTilesOfK; ++i) {
      tensor_copy(target + i * S::kTokens * 128, map, (unit.k * S::kTilesOfK + i) * kTileK, unit.token, barrier);
    }
    if constexpr (S::kGrouped) {
      bulk_copy(ring.stages + S::kStages * S::kBytes + S::kExtra + place.slot * S::kScaleBytes,
                p.token_scale + unit.k * stage_scales, stage_scales * 4, barrier);
    }
    unit.advance(p);
    place.advance(S::kStages);
  };
  pdl_wait();
  const unsigned calls = S::kPush ? PushEpoch::read(p.push) : 0;
  const int ahead = min(count, S::kStages);
  if (S::kPaced) barrier_expect(ring.full + S::kStages * 8, ahead * S::token_bytes(p));
  for (int i = 0; i < ahead; ++i) load(ring.full + (S::kPaced ? S::kStages : i) * 8);
  if constexpr (S::kPush) {  // only now may the reduction start: it advances the epoch, and waits for no kernel before
    epoch->hand_over(calls);
    pdl_launch();
  }
  for (int i = ahead; i < count; ++i) {
    barrier_wait(ring.empty + place.slot * 8, place.parity);
    load(ring.full + place.slot * 8);
  }
}

/// Up to 128 tokens: the weights of 64 channels. By one lane.
template <typename T, typename S>
__device__ __forceinline__ void fetch_narrow_weights(const GemmParams& p, const FetchRing& ring, const NarrowRun& run) {
  const int count = run.end - run.first, ahead = min(count, S::kStages), all = S::kWeightBytes + S::token_bytes(p);
  if (count == 0) return;
  const uint64_t once = evict_first_policy();
  WeightCursor weights;
  weights.start(p, run.first);
  RingPlace place = first_round();
  const auto load = [&](int bytes) {
    const uint32_t barrier = ring.full + place.slot * 8;
    barrier_expect(barrier, bytes);
    bulk_copy_once(ring.stages + place.slot * S::kBytes, weights.address(p, 0), kStageBytes, barrier, once);
    weights.advance(p);
    place.advance(S::kStages);
  };
  for (int i = 0; i < ahead; ++i) {
    if (S::kPaced && i >= S::kPace) barrier_wait(ring.full + (i - S::kPace) * 8, 0);
    load(S::kPaced ? S::kWeightBytes : all);
  }
  for (int i = ahead; i < count; ++i) {
    barrier_wait(ring.empty + place.slot * 8, place.parity);
    load(all);
  }
}

/// More: of the 64 channels `member` of each tile. By one lane.
template <typename T, typename S>
__device__ __forceinline__ void fetch_wide_weights(const GemmParams& p, const FetchRing& ring, const WideRun& run,
                                                   int member) {
  const int count = run.end - run.first;
  if (count == 0) return;
  WideUnits unit(p, run);
  WideWeights weights{};
  int bytes = 0;
  // Whether the tile has these channels. If not, it is one of the last, and none that follows has: there nobody waits for this
  // warp, which could miss a round of its barriers.
  const auto begin_tile = [&] {
    const int blocks = min(p.channel_blocks - unit.block, kWideBlocks);
    bytes = blocks * kTileBytes + S::token_bytes(p);
    if (member < blocks) weights.start(p, unit.block + member, unit.k);
    return member < blocks;
  };
  if (!begin_tile()) return;
  RingPlace place = first_round();
  for (int i = 0; i < count; ++i) {
    const uint32_t barrier = ring.full + place.slot * 8;
    barrier_wait(ring.empty + place.slot * 8, place.parity);
    if (member == 0) barrier_expect(barrier, bytes);
    bulk_copy(ring.stages + member * kTileBytes + place.slot * S::kBytes, weights.source, kTileBytes, barrier);
    if (!unit.advance(p)) {
      weights.advance(p);
    } else if (i + 1 < count && !begin_tile()) {
      return;
    }
    place.advance(S::kStages);
  }
}

/// By whole warps; `warp`: of those that fetch.
template <typename T, typename S, typename Run>
__device__ __forceinline__ void fetch(const GemmParams& p, const CUtensorMap* map, const FetchRing& ring, PushEpoch* epoch,
                                      const Run& run, int warp) {
  if (warp > S::kBlocks || !elected()) return;
  if constexpr (S::kBlocks == 1) {
    if (warp < S::kBlocks) return fetch_narrow_weights<T, S>(p, ring, run);
    fetch_tokens<T, S>(p, map, ring, NarrowUnits(p, run), run.end - run.first, epoch);
  } else {
    if (warp < S::kBlocks) return fetch_wide_weights<T, S>(p, ring, run, warp);
    fetch_tokens<T, S>(p, map, ring, WideUnits(p, run), run.end - run.first, epoch);
  }
}

}  // namespace tpserve::cuda

// A layer's MLP of at most eight e4m3 tokens in one kernel: gate_up, SiLU(gate) * up, down, and the residual stream with its
// norm begun (gemm_norm.cuh). As two products each waits for the other's end while memory idles; here a block's ring of
// weights runs on from gate_up's into down's.
//
// A block has 64 activations, of two tiles of gate_up's channels, one for each of its two warp groups. Blocks go in pairs:
// both take the 128 activations of the pair, with which each multiplies one half of down's channels. So the sums of down's
// channels are cut into as many parts as there are pairs, and of each tile of 64 channels one block, its owner, adds them up,
// always in one order (mlp_end.cuh). Activations go to the pair's other block, and sums to the owner, in slots (slots.cuh):
// all blocks run at once.
#pragma once

#include "gemm_grouped.cuh"
#include "gemm_silu.cuh"
#include "mlp_end.cuh"

namespace tpserve::cuda {

/// The warp that fetches weights: gate_up's two tiles in turn, then this block's half of down's channels. One lane works, once
/// all have found where down's are: that takes a division, as long as half a stage does from memory.
__device__ __forceinline__ void fetch_weights(const MlpParams& p, uint32_t ring, const uint64_t* full_of_stages,
                                              const uint64_t* empty_of_stages, const volatile int* released,
                                              const uint8_t* (&down)[32]) {
  const int cta = blockIdx.x, pair = cta / 2, member = cta % 2, units = p.K / 256;
  const int gate_up_stages = 2 * units, count = gate_up_stages + p.tiles / 4;
  static_assert(MlpShape::kMostHidden / 128 <= 32, "a lane for each tile of a half");
  {
    const int of_half = p.tiles / 2, lane = threadIdx.x % 32;
    WeightCursor at;
    at.start(p.down, (member * of_half + min(lane, of_half - 1)) * p.down.packed_k + pair / 2);
    down[lane] = at.address(p.down, pair % 2);
  }
  __syncwarp();
  if (!elected()) return;
  const uint32_t full = in_register(shared_address(full_of_stages)), empty = in_register(shared_address(empty_of_stages));
  const uint64_t once = evict_first_policy();
  WeightCursor first, second;  // of gate_up's two tiles
  first.start(p.gate_up, 2 * cta * units), second.start(p.gate_up, (2 * cta + 1) * units);
  const auto load = [&](int i, int slot) {
    const uint32_t target = ring + slot * kStageBytes, barrier = full + slot * 8;
    barrier_expect(barrier, kStageBytes);
    if (i < gate_up_stages) {
      const auto from = [&](WeightCursor& at) {
        bulk_copy_once(target, at.address(p.gate_up, 0), kStageBytes, barrier, once);
        at.advance(p.gate_up);
      };
      return i % 2 == 0 ? from(first) : from(second);
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      bulk_copy_once(target + h * kTileBytes, down[(i - gate_up_stages) * 2 + h], kTileBytes, barrier, once);
    }
  };
  const int ahead = min(count, p.stages);
  bool is_late = false;
#pragma unroll 1
  for (int i = 0; i < ahead; ++i) {
    if (i == MlpShape::kPace) is_late = *released;
    if (i >= MlpShape::kPace && !*released) barrier_wait(full + (i - MlpShape::kPace) * 8, 0);
    load(i, i);
  }
  RingPlace place, before{ahead - (is_late ? MlpShape::kLatePace : MlpShape::kPace)};
#pragma unroll 1
  for (int i = ahead; i < count; ++i) {
    barrier_wait(full + before.slot * 8, before.parity);
    barrier_wait(empty + place.slot * 8, place.parity);
    load(i, place.slot);
    place.advance(p.stages), before.advance(p.stages);
  }
}

static __global__ void __launch_bounds__(MlpShape::kThreads, 1)
    mlp_kernel(const __grid_constant__ CUtensorMap map, const __grid_constant__ MlpParams p) {
  using S = MlpShape;
  constexpr int kTokens = S::kTokens;
  extern __shared__ uint8_t memory[];
  __shared__ uint64_t full[S::kStages + 1], empty[S::kStages];
  __shared__ alignas(8) float act_scales[4][kTokens];  // of 32 activations each
  __shared__ const uint8_t* down[32];  // where this block's half of its channels is, tile after tile
  __shared__ volatile int released;    // whether the kernels before have ended
  __shared__ alignas(8) float factors[kTokens];
  __shared__ float2 largest_of_warp[2][4][kTokens / 2];
  const uint32_t ring = (shared_address(memory) + 1023) & ~1023u;
  uint8_t* const base = memory + (ring - shared_address(memory));
  uint8_t* const tokens = base + p.stages * kStageBytes;           // K / 128 tiles of 8 tokens x 128 bytes
  uint8_t* const codes = tokens + p.K * kTokens;                   // 8 tokens x 128 activations
  float* const scales = reinterpret_cast<float*>(codes + kTokens * 128);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, cta = blockIdx.x;
  const int pair = cta / 2, member = cta % 2, pairs = gridDim.x / 2;
  const int units = p.K / 256, gate_up_stages = 2 * units, count = gate_up_stages + p.tiles / 4;
  uint64_t* const own = full + S::kStages;
  if (threadIdx.x == 256) {
    for (int i = 0; i <= S::kStages; ++i) barrier_init(full + i, 1);
    for (int i = 0; i < S::kStages; ++i) barrier_init(empty + i, 4);
    released = 0;
    barrier_init_fence();
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
    pdl_launch();
  }
  __syncthreads();
  if (warp == 8) return fetch_weights(p, ring, full, empty, &released, down);
  if (warp == 9) {
    if (lane == 0) {
      pdl_wait();
      released = 1;
      const int scale_bytes = p.tiles * 2 * kTokens * 4;
      barrier_expect(own, p.K * kTokens + scale_bytes);
      copy_few_tokens(shared_address(tokens), &map, 0, own);
      bulk_copy(shared_address(scales), p.norms, scale_bytes, own);
    }
    __syncwarp();
    barrier_wait(own, 0);
    add_squares_of_tiles(scales + p.tiles * kTokens, p.tiles, p.K, factors);
    return arrive<1, 288>();
  }
  const int group = __shfl_sync(~0u, warp / 4, 0), thread = threadIdx.x % 128, warp_of_group = warp % 4;
  pdl_wait();
  const MlpEnd end(p);
  const int tile = 2 * cta + group;  // of gate_up
  float scale_of[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) scale_of[h] = __ldg(p.gate_up_scale + tile * 64 + warp_of_group * 16 + lane / 4 + h * 8);
  barrier_wait(own, 0);
  __syncwarp();  // products are of whole warps
  float sums[4] = {};
  const uint64_t b_tokens = matrix_descriptor(shared_address(tokens));
#pragma unroll 1
  for (int u = 0; u < units; ++u) {
    const int i = 2 * u + group, slot = i % p.stages, turn = i / p.stages;
    barrier_wait(full + slot, turn & 1);
    GroupedStage<kTokens, 64>::add(sums, matrix_descriptor(ring + slot * kStageBytes), b_tokens + u * (2 * kTokens * 8),
                                   scales + u * 4 * kTokens, kTokens, empty + slot);
  }
  meet<1, 288>();  // factors are there, and nobody reads tokens again
  {
    const float2 factor = *reinterpret_cast<const float2*>(factors + lane % 4 * 2);
    const float values[4] = {sums[0] * (scale_of[0] * factor.x), sums[1] * (scale_of[0] * factor.y),
                             sums[2] * (scale_of[1] * factor.x), sums[3] * (scale_of[1] * factor.y)};
    const float2 two = activations_of(values);
    float most[2] = {fabsf(two.x), fabsf(two.y)};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int offset = 4; offset < 32; offset *= 2) most[i] = fmaxf(most[i], __shfl_xor_sync(~0u, most[i], offset));
    }
    if (lane < 4) largest_of_warp[group][warp_of_group][lane] = make_float2(most[0], most[1]);
    meet_at<128>(3 + group);
    float2 of_all = make_float2(1e-12f, 1e-12f);
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const float2 other = largest_of_warp[group][w][lane % 4];
      of_all.x = fmaxf(of_all.x, other.x), of_all.y = fmaxf(of_all.y, other.y);
    }
    const uint32_t both = pack2_fp8(two.x * (kFp8Max / of_all.x), two.y * (kFp8Max / of_all.y));
    const int place = member * 64 + group * 32 + warp_of_group * 8 + lane / 4, m = lane % 4 * 2;
    const auto code_at = [&](int token, int at) { return codes + token * 128 + ((at / 16 ^ token) * 16) + at % 16; };
    *code_at(m, place) = both & 0xFF, *code_at(m + 1, place) = both >> 8 & 0xFF;
    if (warp_of_group == 0 && lane < 4) {
      act_scales[member * 2 + group][m] = of_all.x / kFp8Max, act_scales[member * 2 + group][m + 1] = of_all.y / kFp8Max;
    }
    meet_at<128>(3 + group);
    if (thread < 3 * p.M) {
      const int token = thread / 3, part = thread % 3;
      float4* const letter = p.letters + ((cta * 2 + group) * kTokens + token) * 3 + part;
      float4* const to = p.letters + (((cta ^ 1) * 2 + group) * kTokens + token) * 3 + part;
      const int theirs = (1 - member) * 64 + group * 32;
      if (part < 2) {
        store_slot(to, *reinterpret_cast<const uint4*>(code_at(token, member * 64 + group * 32 + part * 16)));
      } else {
        store_slot(to, act_scales[member * 2 + group][token], 0.0f, 0.0f, 0.0f);
      }
      uint4 come = load_slot(letter);
      while (is_empty(come)) come = load_slot(letter);
      empty_slot(letter);
      if (part < 2) {
        *reinterpret_cast<uint4*>(code_at(token, theirs + part * 16)) = come;
      } else {
        act_scales[(1 - member) * 2 + group][token] = __uint_as_float(come.x);
      }
    }
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  }
  meet<1, 256>();
  float2 of_group[4];
#pragma unroll
  for (int g = 0; g < 4; ++g) of_group[g] = *reinterpret_cast<const float2*>(&act_scales[g][lane % 4 * 2]);
  // Nothing overwrites them; but then no load from shared memory is on its way at an arrival below.
  await_loaded(__float_as_uint(of_group[0].x) | __float_as_uint(of_group[1].x) | __float_as_uint(of_group[2].x) |
               __float_as_uint(of_group[3].x));
  const uint64_t b_codes = matrix_descriptor(shared_address(codes));
#pragma unroll 1
  for (int j = group; j < p.tiles / 4; j += 2) {
    __syncwarp();
    const int i = gate_up_stages + j, slot = i % p.stages, turn = i / p.stages;
    barrier_wait(full + slot, turn & 1);
    float fresh[2][4][4];
    const uint64_t a = matrix_descriptor(ring + slot * kStageBytes);
    wgmma_fence();
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int g = 0; g < 4; ++g) Wgmma<fp8, 8>::run(fresh[h][g], a + h * (kTileBytes / 16) + g * 2, b_codes + g * 2, 0);
    }
    wgmma_commit();
    wgmma_wait<0>();
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int g = 0; g < 4; ++g) {
#pragma unroll
        for (int r = 0; r < 4; ++r) asm volatile("" : "+f"(fresh[h][g][r])::"memory");
      }
    }
    if (i + p.stages < count && lane == 0) barrier_arrive(empty + slot);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (lane % 4 * 2 >= p.M) break;
      float sum[4] = {};
#pragma unroll
      for (int g = 0; g < 4; ++g) {
#pragma unroll
        for (int r = 0; r < 4; ++r) sum[r] = fmaf(fresh[h][g][r], r % 2 == 0 ? of_group[g].x : of_group[g].y, sum[r]);
      }
      const int to = member * (p.tiles / 2) + j * 2 + h;
      store_slot(p.parts + ((static_cast<int64_t>(to) * pairs + pair) * 4 + lane % 4) * 32 + warp_of_group * 8 + lane / 4,
                 sum[0], sum[1], sum[2], sum[3]);
    }
  }
  if (end.tile < 0) return;
  end.write(p, pairs, reinterpret_cast<float4*>(tokens));
}

}  // namespace tpserve::cuda

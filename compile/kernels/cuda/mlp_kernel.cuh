// A layer's MLP of at most eight e4m3 tokens in one kernel: gate_up, SiLU(gate) * up, down, and the residual stream with its
// norm begun (gemm_norm.cuh). As two products each waits for the other's end while memory idles; here a block's ring of
// weights runs on from gate_up's into down's.
//
// A block has 64 activations, of two tiles of gate_up's channels, one for each of its two warp groups. Blocks go in pairs:
// both take the 128 activations of the pair, with which each multiplies one half of down's channels. So the sums of down's
// channels are cut into as many parts as there are pairs, and of each tile of 64 channels one block, its owner, adds them up
// in the order of pairs. Activations go to the pair's other block, and sums to the owner, in slots (slots.cuh): all blocks
// run at once.
#pragma once

#include "gemm_cursor.cuh"
#include "gemm_grouped.cuh"
#include "gemm_norm.cuh"
#include "gemm_parts.cuh"
#include "gemm_silu.cuh"

namespace tpserve::cuda {

/// Weights in the packed layout, of which a stage is 64 channels x 256 bytes of K.
struct PackedWeights {
  const uint8_t* weights;
  int packed_base, packed_rem;
  int packed_k;  // stages of a tile
};

struct MlpParams {
  PackedWeights gate_up, down;
  const float *gate_up_scale, *down_scale;  // of channels
  const float* norms;                       // scales (K / 64, 8), then squares (K / 64, 8)
  const bf16* residual;
  const float* norm_weight;
  float eps;
  bf16* stream;
  fp8* out;
  float* out_norms;   // as `norms`
  float4* letters;    // [block][warp group][token][3]: activations from the pair's other block
  float4* parts;      // [tile of down][pair][two tokens][32]
  int M, K, tiles;    // tokens, hidden size, K / 64
  int stages;         // of the ring
};

/// What it takes. Two warp groups multiply; one warp fetches weights, one tokens.
struct MlpShape {
  static constexpr int kTokens = 8, kThreads = 320, kStages = 12;
  static constexpr int kPace = 3;  // stages on their way while the kernels before still run: they are in a hurry
  static constexpr int kLeastHidden = 2048, kMostHidden = 4096, kBudget = 222 * 1024;

  static constexpr int shared_bytes(int hidden, int stages) {
    return 1024 + stages * kStageBytes + hidden * kTokens + hidden / 64 * 2 * kTokens * 4 + kTokens * 128;
  }
  /// Stages of a ring that fits.
  static constexpr int stages(int hidden) {
    int stages = kStages;
    while (shared_bytes(hidden, stages) > kBudget) --stages;
    return stages;
  }
};

static __global__ void __launch_bounds__(MlpShape::kThreads, 1)
    mlp_kernel(const __grid_constant__ CUtensorMap map, const __grid_constant__ MlpParams p) {
  using S = MlpShape;
  constexpr int kTokens = S::kTokens;
  extern __shared__ uint8_t memory[];
  __shared__ uint64_t full[S::kStages + 1], empty[S::kStages];
  __shared__ alignas(8) float act_scales[4][kTokens];  // of 32 activations each
  __shared__ volatile int released;  // whether the kernels before have ended
  __shared__ float squares_of_part[128];
  __shared__ alignas(8) float factors[kTokens];
  __shared__ float2 largest_of_warp[2][4][kTokens / 2];
  __shared__ float squares_of_tile[2][8], largest_of_tile[2][8];  // [first or second token][warp]
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
  if (warp == 8) {
    if (lane != 0) return;
    const uint64_t once = evict_first_policy();
    WeightCursor first, second;  // of gate_up's two tiles
    first.start(p.gate_up, 2 * cta * units), second.start(p.gate_up, (2 * cta + 1) * units);
    const auto load = [&](int i, int slot) {
      const uint32_t target = ring + slot * kStageBytes;
      barrier_expect(full + slot, kStageBytes);
      if (i < gate_up_stages) {
        const auto from = [&](WeightCursor& at) {
          bulk_copy_once(target, at.address(p.gate_up, 0), kStageBytes, full + slot, once);
          at.advance(p.gate_up);
        };
        return i % 2 == 0 ? from(first) : from(second);
      }
      const int tile = member * (p.tiles / 2) + (i - gate_up_stages) * 2;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        WeightCursor at;
        at.start(p.down, (tile + h) * p.down.packed_k + pair / 2);
        bulk_copy_once(target + h * kTileBytes, at.address(p.down, pair % 2), kTileBytes, full + slot, once);
      }
    };
    const int ahead = min(count, p.stages);
    for (int i = 0; i < ahead; ++i) {
      if (i >= S::kPace && !released) barrier_wait(full + i - S::kPace, 0);
      load(i, i);
    }
    RingPlace place;
    for (int i = ahead; i < count; ++i) {
      barrier_wait(empty + place.slot, place.parity);
      load(i, place.slot);
      place.advance(p.stages);
    }
    return;
  }
  if (warp == 9) {
    if (lane != 0) return;
    pdl_wait();
    released = 1;
    const int scale_bytes = p.tiles * 2 * kTokens * 4;
    barrier_expect(own, p.K * p.M + scale_bytes);
    for (int k = 0; k < p.K / 128; ++k) tensor_copy(shared_address(tokens) + k * kTokens * 128, &map, k * 128, 0, own);
    bulk_copy(shared_address(scales), p.norms, scale_bytes, own);
    return;
  }
  const int group = __shfl_sync(~0u, warp / 4, 0), thread = threadIdx.x % 128, warp_of_group = warp % 4;
  // What ends a tile of down, if this block owns one: of channel `c`, tokens `first` and the fourth after it.
  const int share = gridDim.x / p.tiles;
  const int owned = cta % share == 0 && cta / share < p.tiles ? cta / share : -1;
  const int c = threadIdx.x % 64, first = threadIdx.x / 64, channel = owned * 64 + c;
  pdl_wait();
  float residual[2] = {}, weight = 0.0f, down_scale = 0.0f;
  if (owned >= 0) {
    weight = __ldg(p.norm_weight + channel), down_scale = __ldg(p.down_scale + channel);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int m = first + i * 4;
      if (m < p.M) {
        const uint16_t bits = __ldcg(reinterpret_cast<const uint16_t*>(p.residual) + static_cast<int64_t>(m) * p.K + channel);
        residual[i] = __uint_as_float(static_cast<uint32_t>(bits) << 16);
      }
    }
  }
  const int tile = 2 * cta + group;  // of gate_up
  float scale_of[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) scale_of[h] = __ldg(p.gate_up_scale + tile * 64 + warp_of_group * 16 + lane / 4 + h * 8);
  barrier_wait(own, 0);
  {  // 1 / rms of each token: sixteen threads a token, of which each has K / 1024 squares
    const float* const squares = scales + p.tiles * kTokens;
    if (group == 0) {
      float sum = 0.0f;
      for (int t = thread / 8; t < p.tiles; t += 16) sum += squares[t * kTokens + thread % 8];
      squares_of_part[thread] = sum;
      meet<3, 128>();
      if (thread < kTokens) {
        float total = 0.0f;
#pragma unroll
        for (int i = 0; i < 16; ++i) total += squares_of_part[i * 8 + thread];
        factors[thread] = rsqrtf(total / static_cast<float>(p.K));
      }
    }
  }
  float sums[4] = {};
  const uint64_t b_tokens = matrix_descriptor(shared_address(tokens));
  for (int u = 0; u < units; ++u) {
    const int i = 2 * u + group, slot = i % p.stages, turn = i / p.stages;
    barrier_wait(full + slot, turn & 1);
    GroupedStage<kTokens, 64>::add(sums, matrix_descriptor(ring + slot * kStageBytes), b_tokens + u * (2 * kTokens * 8),
                                   scales + u * 4 * kTokens, kTokens, empty + slot);
  }
  meet<1, 256>();  // factors are there, and nobody reads tokens again
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
  const uint64_t b_codes = matrix_descriptor(shared_address(codes));
  for (int j = group; j < p.tiles / 4; j += 2) {
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
    if (lane % 4 * 2 >= p.M) continue;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
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
  if (owned < 0) return;
  // Each warp adds an eighth of the pairs' parts, eight at a time of up to four tokens.
  float4* const added = reinterpret_cast<float4*>(tokens);  // [two tokens][warp][32]
  const int twos = (p.M + 1) / 2;
  for (int t = 0; t < twos; t += 2) {
    const int beside = min(twos - t, 2);
    float4 sum[2] = {};
    float4* const from = p.parts + (static_cast<int64_t>(owned) * pairs * 4 + t) * 32 + lane;
    for (int q = warp; q < pairs; q += 64) {
      const auto place = [&](int k, int j) { return from + static_cast<int64_t>(q + k * 8) * 128 + j * 32; };
      uint4 asked[8][2];
      bool come = false;
      while (!come) {
        come = true;
#pragma unroll
        for (int k = 0; k < 8; ++k) {
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            asked[k][j] = make_uint4(0, 0, 0, 0);
            if (q + k * 8 < pairs && j < beside) asked[k][j] = load_slot(place(k, j));
          }
        }
#pragma unroll
        for (int k = 0; k < 8; ++k) come = come && !is_empty(asked[k][0]) && !is_empty(asked[k][1]);
      }
#pragma unroll
      for (int k = 0; k < 8; ++k) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          if (q + k * 8 >= pairs || j >= beside) continue;
          empty_slot(place(k, j));
          sum[j].x += __uint_as_float(asked[k][j].x), sum[j].y += __uint_as_float(asked[k][j].y);
          sum[j].z += __uint_as_float(asked[k][j].z), sum[j].w += __uint_as_float(asked[k][j].w);
        }
      }
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      if (j < beside) added[((t + j) * 8 + warp) * 32 + lane] = sum[j];
    }
  }
  meet<1, 256>();
  const int position = c / 16 * 8 + c % 8, high = c / 8 % 2;
  float weighted[2], squares[2], most[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int m = first + i * 4;
    float sum = 0.0f;
    if (m < p.M) {
#pragma unroll
      for (int w = 0; w < 8; ++w) {
        sum += reinterpret_cast<const float*>(added + (m / 2 * 8 + w) * 32 + position)[high * 2 + m % 2];
      }
    }
    // As the plain product stores it, and as the next layer will see the stream.
    const float product = low_half(pack2(sum * down_scale, 0.0f));
    const float h = low_half(pack2(product + residual[i], 0.0f));
    if (m < p.M) p.stream[static_cast<int64_t>(m) * p.K + channel] = __float2bfloat16(h);
    weighted[i] = h * weight, squares[i] = h * h, most[i] = fabsf(weighted[i]);
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
      squares[i] += __shfl_xor_sync(~0u, squares[i], offset);
      most[i] = fmaxf(most[i], __shfl_xor_sync(~0u, most[i], offset));
    }
    if (lane == 0) squares_of_tile[i][warp] = squares[i], largest_of_tile[i][warp] = most[i];
  }
  meet<1, 256>();
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int m = first + i * 4;
    if (m >= p.M) continue;
    const float largest = fmaxf(fmaxf(largest_of_tile[i][first * 2], largest_of_tile[i][first * 2 + 1]), 1e-12f);
    reinterpret_cast<uint8_t*>(p.out)[static_cast<int64_t>(m) * p.K + channel] =
        static_cast<uint8_t>(pack2_fp8(weighted[i] * (kFp8Max / largest), 0.0f));
    if (c == 0) {
      const float total = squares_of_tile[i][first * 2] + squares_of_tile[i][first * 2 + 1];
      p.out_norms[owned * kTokens + m] = largest / kFp8Max;
      p.out_norms[(p.tiles + owned) * kTokens + m] = owned == 0 ? total + p.eps * static_cast<float>(p.K) : total;
    }
  }
}

}  // namespace tpserve::cuda

// out (M, N) = x (M, K) w^T for bfloat16 or e4m3 operands, any M, with weights packed by `packing.py`.
//
// Swapped operands: weights are wgmma's A (64 channels), tokens its B, so that few tokens waste nothing. One kernel:
//   kBlocks 1 (M <= 128): a unit of work is one packed stage, 64 channels x 256 bytes of K, against all tokens.
//   kBlocks 2 (M > 128):  a unit is 128 channels x 128 bytes of K against 96 to 256 tokens; each warp group has 64 channels.
// Units in the order (channels, tokens, K) are dealt to kGrid blocks in equal contiguous runs (stream-K). For kBlocks 1 the
// packed order is the order in which the grid reads: unit i of block c is stage i * kGrid + c, so all blocks together read
// one contiguous span at a time. A run that starts inside a tile leaves float32 partial sums in its block's slot of the
// workspace; the block that started the tile adds them in block order, so sums have one order. An empty slot holds the word
// 0xffffffff, a NaN that no arithmetic makes: the data is its own flag, and the reader restores it.
//
// Tiles go to memory, or for a reduction over ranks straight to where it wants them (push_tile.cuh): with the same bits.
//
// One warp fetches; it fills the ring with weights before `pdl_wait`, while the kernel before still runs.
//
// Of e4m3 tokens the scales are by token, or grouped (`grouped_scales.cuh`): then the scales of a stage are fetched with
// its tokens, and the product of each group is scaled before it is added (M <= 128).
//
// gate_up's product can end in SiLU(gate) * up (`gemm_silu.cuh`): in the kernel itself for few tokens.
#include <type_traits>

#include "elementwise.cuh"
#include "gemm.cuh"
#include "gemm_grouped.cuh"
#include "gemm_parts.cuh"
#include "gemm_silu.cuh"
#include "grouped_scales.cuh"

namespace tpserve::cuda {
namespace {

constexpr int kMaxDevices = 16;

uint8_t* workspace_of_device[kMaxDevices] = {};

/// What fits in a multiprocessor's shared memory, and in half of it. As measured in decode steps (benchmarks/README.md):
///   whole: the next kernels but small ones wait until this one's block ends, but then the next GEMM fetches twice as much
///     while they run. 70B TP=4 with 16 tokens: 8.46 -> 7.41 ms.
///   half: two GEMMs overlap. Better for the shortest, whose weights a ring holds anyway: beside attention's blocks there
///     is room for no more.
enum class Ring { kWhole, kHalf };
constexpr int kWholeMinStages = 8;  // of a block

/// What a tile ends in: the output in memory, SiLU(gate) * up, or the ranks' workspaces.
enum class End { kMemory, kSilu, kPeers };

/// `kGroup_`: elements of K that share a token's scale, 0 for all.
template <int kTokens_, int kBlocks_, Ring kRing, int kGroup_, End kEnd>
struct Shape {
  static constexpr int kTokens = kTokens_, kBlocks = kBlocks_, kGroup = kGroup_;
  static constexpr bool kGrouped = kGroup != 0, kSilu = kEnd == End::kSilu, kPush = kEnd == End::kPeers;
  static_assert((!kGrouped && kEnd == End::kMemory) || kBlocks == 1);
  static_assert(!kPush || kTokens <= kMaxPushedRows);
  static constexpr int kTilesOfK = 2 / kBlocks;  // 128-byte tiles of K in a stage
  static constexpr int kTokenBytes = kTilesOfK * kTokens * 128;
  static constexpr int kBytes = kStageBytes + kTokenBytes;
  static constexpr int kConsumers = kBlocks == 2 || kTokens <= 32 ? 2 : 1;
  static constexpr int kThreads = kConsumers * 128 + 32;
  static constexpr bool kAlternate = kBlocks == 1 && kConsumers == 2;  // warp groups take turns with the stages
  // Small kernels between two GEMMs need some kilobytes beside a whole ring.
  static constexpr int kBudget = (kRing == Ring::kHalf ? 110 : kTokens <= 32 ? 222 : 200) * 1024;
  static constexpr int kExtra = kAlternate ? kTokens * 256 : 0;
  static constexpr int kFitting = (kBudget - kExtra) / kBytes;
  static constexpr int kMostStages = kRing == Ring::kWhole && kTokens <= 32 ? 12 : 6;
  static constexpr int kStages = kFitting < kMostStages ? kFitting : kMostStages;
  static constexpr int kGroups = kGrouped ? 256 / (kGrouped ? kGroup : 256) : 0;  // of a stage
  static constexpr int kScaleBytes = kGroups * kTokens * sizeof(float);           // of a stage, behind the ring
  static constexpr int kSharedBytes = kStages * (kBytes + kScaleBytes) + kExtra + 1024;
  // With few tokens the ring of weights is filled at a measured pace and the first activations have their own barrier.
  static constexpr bool kPaced = kTokens == 8;
  static constexpr int kPace = 3;
};

#define TPSERVE_BAR(op, id, count) asm volatile("bar." op " " #id ", " #count ";" ::: "memory")

/// Where the units of a block's run are, one after the other.
template <int kTokens, int kBlocks>
struct UnitCursor {
  int k, token = 0, block = 0;  // unit within its tile, first token, first 64 channels
  WeightCursor weights[kBlocks];

  __device__ __forceinline__ UnitCursor(const GemmParams& p, int unit) {
    k = unit % p.units_of_k;
    if constexpr (kBlocks > 1) {
      const int tile = unit / p.units_of_k;
      token = tile % p.token_tiles * kTokens, block = tile / p.token_tiles * kBlocks;
      start_tile(p);
    }
  }
  __device__ __forceinline__ void start_tile(const GemmParams& p) {
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) weights[i].start(p, min(block + i, p.channel_blocks - 1) * p.packed_k + k / 2);
  }
  __device__ __forceinline__ void advance(const GemmParams& p) {
    if (++k < p.units_of_k) {
      if constexpr (kBlocks > 1) {
        if (k % 2 == 0) {
#pragma unroll
          for (int i = 0; i < kBlocks; ++i) weights[i].advance(p);
        }
      }
      return;
    }
    k = 0;
    if constexpr (kBlocks > 1) {
      token += kTokens;
      if (token >= p.token_tiles * kTokens) token = 0, block += kBlocks;
      start_tile(p);
    }
  }
};

/// The warp that fetches; one lane works.
template <typename T, typename S>
__device__ void produce(const GemmParams& p, const CUtensorMap* map, uint32_t ring, uint64_t* full, uint64_t* empty,
                        PushEpoch* epoch, int first, int count) {
  constexpr int kTokens = S::kTokens, kBlocks = S::kBlocks, kTileK = 128 / sizeof(T);
  const int stage_scales = S::kGroups * p.padded_tokens;           // floats
  const int token_bytes = S::kTokenBytes + stage_scales * 4;       // what a stage brings after pdl_wait
  const uint64_t once = evict_first_policy();
  const int ahead = count < S::kStages ? count : S::kStages;
  const uint8_t* source = p.weights + static_cast<size_t>(blockIdx.x) * kStageBytes;
  UnitCursor<kTokens, kBlocks> weights(p, first), tokens = weights;
  const auto load_weights = [&](int slot, int bytes) {
    const uint32_t target = ring + slot * S::kBytes;
    if constexpr (kBlocks == 1) {
      barrier_expect(full + slot, bytes);
      bulk_copy_once(target, source, kStageBytes, full + slot, once);
      source += static_cast<size_t>(kGrid) * kStageBytes;
    } else {
      const int present = p.channel_blocks - weights.block < 2 ? 1 : 2;
      barrier_expect(full + slot, bytes - (2 - present) * kTileBytes);
#pragma unroll
      for (int i = 0; i < kBlocks; ++i) {
        if (i >= present) break;
        bulk_copy(target + i * kTileBytes, weights.weights[i].address(p, weights.k % 2), kTileBytes, full + slot);
      }
      weights.advance(p);
    }
  };
  const auto load_tokens = [&](int slot, uint64_t* barrier) {
    const uint32_t target = ring + slot * S::kBytes + kStageBytes;
#pragma unroll
    for (int i = 0; i < S::kTilesOfK; ++i) {
      tensor_copy(target + i * kTokens * 128, map, (tokens.k * S::kTilesOfK + i) * kTileK, tokens.token, barrier);
    }
    if constexpr (S::kGrouped) {
      bulk_copy(ring + S::kStages * S::kBytes + S::kExtra + slot * S::kScaleBytes, p.token_scale + tokens.k * stage_scales,
                stage_scales * 4, barrier);
    }
    tokens.advance(p);
  };
  for (int i = 0; i < ahead; ++i) {
    if (S::kPaced && i >= S::kPace) barrier_wait(full + i - S::kPace, 0);
    load_weights(i, S::kPaced ? kStageBytes : kStageBytes + token_bytes);
  }
  pdl_wait();
  const unsigned calls = S::kPush ? PushEpoch::read(p.push) : 0;
  uint64_t* own = full + S::kStages;
  if (S::kPaced) barrier_expect(own, ahead * token_bytes);
  for (int i = 0; i < ahead; ++i) load_tokens(i, S::kPaced ? own : full + i);
  if constexpr (S::kPush) {  // only now may the reduction start: it advances the epoch, and waits for no kernel before
    epoch->hand_over(calls);
    pdl_launch();
  }
  RingPlace place;
  for (int i = ahead; i < count; ++i) {
    barrier_wait(empty + place.slot, place.parity);
    load_weights(place.slot, kStageBytes + token_bytes);
    load_tokens(place.slot, full + place.slot);
    place.advance(S::kStages);
  }
}

template <typename T, typename S>
__global__ void __launch_bounds__(S::kThreads, 1)
    gemm_kernel(const __grid_constant__ CUtensorMap map, const __grid_constant__ GemmParams p) {
  constexpr int kTokens = S::kTokens, kBlocks = S::kBlocks;
  // fp8 products are summed by the tensor cores with few bits; while registers allow it, sums of 256 of K are promoted.
  // So are those of groups that take turns: products under a condition would be serialised by the compiler otherwise.
  constexpr bool kPromote = S::kAlternate || (sizeof(T) == 1 && kBlocks == 1);
  constexpr int kRegisters = kTokens / 2, kVectors = kTokens / 8;
  constexpr int kEarly = kBlocks == 2 ? 0 : kTokens <= 16 ? 4 : kTokens <= 32 ? 2 : kTokens <= 64 ? 1 : 0;
  extern __shared__ uint8_t memory[];
  __shared__ uint64_t full[S::kStages + 1], empty[S::kStages];
  __shared__ PushEpoch epoch;
  const uint32_t ring = (shared_address(memory) + 1023) & ~1023u;
  uint8_t* behind_ring = memory + (ring - shared_address(memory)) + S::kStages * S::kBytes;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, cta = blockIdx.x;
  const int first = p.base * cta + min(cta, p.rem), count = p.base + (cta < p.rem);
  if (threadIdx.x == S::kConsumers * 128) {
    for (int i = 0; i <= S::kStages; ++i) barrier_init(full + i, 1);
    for (int i = 0; i < S::kStages; ++i) barrier_init(empty + i, kBlocks * 4);
    if constexpr (S::kPush) epoch.init();
    barrier_init_fence();
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
    if constexpr (!S::kPush) pdl_launch();
  }
  __syncthreads();
  if (warp == S::kConsumers * 4) {
    if (lane == 0) produce<T, S>(p, &map, ring, full, empty, &epoch, first, count);
    return;
  }
  pdl_wait();
  const int group = __shfl_sync(~0u, warp / 4, 0), thread = threadIdx.x % 128;
  const int block_of_group = kBlocks == 2 ? group : 0;
  const bool writer = kBlocks == 2 || group == 0;
  constexpr int kSlot = kBlocks * kVectors * 128;  // float4 of a block's partial sums
  float4* slot = p.partial + static_cast<size_t>(cta) * kSlot + block_of_group * kVectors * 128 + thread;
  if (S::kPaced && count > 0) barrier_wait(full + S::kStages, 0);
  const int end = first + count;
  RingPlace place;
  for (int unit = first, tile = first / p.units_of_k; unit < end; ++tile) {
    const bool started_here = unit == tile * p.units_of_k;
    const int tile_end = (tile + 1) * p.units_of_k, stop = min(end, tile_end);
    const bool more_segments = stop < end, first_segment = unit == first;
    float sums[kRegisters];
#pragma unroll
    for (int i = 0; i < kRegisters; ++i) sums[i] = 0.0f;
    int held = -1;  // slot of a product still running
    const int sharers = started_here && stop < tile_end ? sharers_of(p, cta, stop, tile_end) : 0;
    uint4 early[kEarly > 0 ? kEarly : 1][kVectors];  // partial sums asked for before the last product, for they are mostly there
    const auto load_early = [&](int from) {
#pragma unroll
      for (int j = 0; j < kEarly; ++j) {
#pragma unroll
        for (int b = 0; b < kVectors; ++b) {
          if (from + j <= sharers) early[j][b] = load_slot(slot + static_cast<size_t>(from + j) * kSlot + b * 128);
        }
      }
    };
    for (; unit < stop; ++unit) {
      if (kEarly > 0 && writer && unit == stop - 1) load_early(1);
      if (!S::kAlternate || place.slot % 2 == group) {  // a slot always belongs to the same group: phases stay apart
        barrier_wait(full + place.slot, place.parity);
        const uint32_t stage = ring + place.slot * S::kBytes;
        const uint64_t a = matrix_descriptor(stage + block_of_group * kTileBytes);
        const uint64_t b = matrix_descriptor(stage + kStageBytes);
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
    if (!started_here) {
#pragma unroll
      for (int b = 0; b < kVectors; ++b) {
        store_slot(slot + b * 128, sums[b * 4], sums[b * 4 + 1], sums[b * 4 + 2], sums[b * 4 + 3]);
      }
      continue;
    }
    for (int c = 1; c <= sharers; c += kEarly > 0 ? kEarly : 1) {  // partial sums of the blocks after this one
      if constexpr (kEarly > 0) {
        if (c > 1) load_early(c);
#pragma unroll
        for (int j = 0; j < kEarly; ++j) {
          if (c + j > sharers) break;
#pragma unroll
          for (int b = 0; b < kVectors; ++b) {
            add_partial(sums, b, early[j][b], slot + static_cast<size_t>(c + j) * kSlot + b * 128);
          }
        }
      } else {
        constexpr int kBatch = kVectors <= 16 ? kVectors : 4;
#pragma unroll
        for (int b = 0; b < kVectors; b += kBatch) {
          uint4 v[kBatch];
#pragma unroll
          for (int i = 0; i < kBatch; ++i) v[i] = load_slot(slot + static_cast<size_t>(c) * kSlot + (b + i) * 128);
#pragma unroll
          for (int i = 0; i < kBatch; ++i) {
            add_partial(sums, b + i, v[i], slot + static_cast<size_t>(c) * kSlot + (b + i) * 128);
          }
        }
      }
    }
    const int block = kBlocks == 1 ? tile : tile / p.token_tiles * 2 + group;
    const int token = kBlocks == 1 ? 0 : tile % p.token_tiles * kTokens;
    constexpr bool kByChannel = sizeof(T) == 1, kByToken = kByChannel && !S::kGrouped;
    const int channel = block * 64 + warp % 4 * 16;
    if constexpr (S::kSilu) {
      write_silu<T, kTokens>(p, sums, tile);
    } else if constexpr (S::kPush) {
      write_tile<kByChannel, kByToken, kTokens>(p, sums, channel, 0, PeerTile(p.push, epoch.wait(), channel, p.M, p.N));
    } else {
      write_tile<kByChannel, kByToken, kTokens>(p, sums, channel, token, MemoryTile{p, channel, token});
    }
  }
}

/// One thread per 16 bytes of the packed weight.
__global__ void __launch_bounds__(256)
    pack_kernel(const uint8_t* plain, uint4* packed, int64_t rows, int64_t row_bytes, int steps, int base, int rem) {
  pdl_launch();
  pdl_wait();
  const int64_t index = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  const int place = static_cast<int>(index / (kStageBytes / 16)), chunk = static_cast<int>(index % (kStageBytes / 16));
  const int run = place % kGrid, stage = base * run + min(run, rem) + place / kGrid;
  const int row_of_stage = chunk % (kTileBytes / 16) / 8, tile = chunk / (kTileBytes / 16);
  const int64_t row = static_cast<int64_t>(stage / steps) * 64 + row_of_stage;
  const int64_t byte = static_cast<int64_t>(stage % steps) * 256 + tile * 128 + (chunk % 8 ^ row_of_stage % 8) * 16;
  uint4 value{};
  if (row < rows && byte < row_bytes) value = load_l2(plain + row * row_bytes + byte);
  packed[index] = value;
}

// --- Host -----------------------------------------------------------------------------------------------------------

template <typename T, int kTokens, int kBlocks, Ring kRing, int kGroup = 0, End kEnd = End::kMemory>
void run(GemmParams p, const T* x, int64_t K, cudaStream_t stream) {
  using S = Shape<kTokens, kBlocks, kRing, kGroup, kEnd>;
  const int64_t bytes = K * sizeof(T);
  p.units_of_k = static_cast<int>(kBlocks == 1 ? (bytes + 255) / 256 : (bytes + 127) / 128);
  p.token_tiles = (p.M + kTokens - 1) / kTokens;
  const int units = (p.channel_blocks + kBlocks - 1) / kBlocks * p.token_tiles * p.units_of_k;
  p.base = units / kGrid, p.rem = units % kGrid;
  launch(gemm_kernel<T, S>, kGrid, S::kThreads, S::kSharedBytes, stream, token_map(x, p.M, K, kTokens), p);
}

/// One tile of all tokens, p.M <= kMost of them.
template <typename T, int kMost, int kGroup = 0, End kEnd = End::kMemory>
void dispatch_few(const GemmParams& p, const T* x, int64_t K, cudaStream_t stream) {
  static_assert(kMost == 32 || kMost == 64);
  const auto with_ring = [&](auto tokens) {
    constexpr int kTokens = decltype(tokens)::value;
    if (p.packed_base < kWholeMinStages) return run<T, kTokens, 1, Ring::kHalf, kGroup, kEnd>(p, x, K, stream);
    run<T, kTokens, 1, Ring::kWhole, kGroup, kEnd>(p, x, K, stream);
  };
  if (p.M <= 8) return with_ring(std::integral_constant<int, 8>());
  if (p.M <= 16) return with_ring(std::integral_constant<int, 16>());
  if (p.M <= 32) return with_ring(std::integral_constant<int, 32>());
  if constexpr (kMost == 64) with_ring(std::integral_constant<int, 64>());
}

/// Chooses the tile for p.M tokens, as measured: `gpu_kernels.py` on an H200, every tile at every shape of 8B and 70B.
template <typename T, int kGroup>
void dispatch(const GemmParams& p, const T* x, int64_t K, cudaStream_t stream) {
  if (p.M <= 64) return dispatch_few<T, 64, kGroup>(p, x, K, stream);
  static_assert(kMaxGroupedTokens == 128, "the tiles of one block of channels");
  if (p.M <= 96) return run<T, 96, 1, Ring::kWhole, kGroup>(p, x, K, stream);
  if (p.M <= 128) return run<T, 128, 1, Ring::kWhole, kGroup>(p, x, K, stream);
  if (p.M <= 256 && p.channel_blocks <= 128) {
    // Few channels: one tile of all tokens would be shared by so many blocks that adding their sums takes longer than
    // the products.
    if (p.M <= 192) return run<T, 96, 2, Ring::kWhole>(p, x, K, stream);
    return run<T, 128, 2, Ring::kWhole>(p, x, K, stream);
  }
  if (p.M > 256 && p.M <= 320) return run<T, 160, 2, Ring::kWhole>(p, x, K, stream);
  const auto padded = [&](int tile) { return (p.M + tile - 1) / tile * tile; };
  if (padded(192) < padded(256)) return run<T, 192, 2, Ring::kWhole>(p, x, K, stream);
  run<T, 256, 2, Ring::kWhole>(p, x, K, stream);
}

/// Operands of a product of `N` channels.
template <typename T>
struct Product {
  GemmParams params{};
  const T* tokens;
  int64_t M, K;
  cudaStream_t stream;

  Product(const TensorView& x, const TensorView& weights, const TensorView* channel_scale, const TensorView* bias,
          int64_t N) {
    check_rank("x", x, 2);
    M = x.size(0), K = x.size(1);
    check_multiple("K", K, 16 / sizeof(T));
    check_multiple("N", N, 8);
    const int64_t blocks = (N + 63) / 64, packed_k = (K * sizeof(T) + 255) / 256;
    GemmParams& p = params;
    tokens = checked<T>("x", x, {M, K});
    p.weights = reinterpret_cast<const uint8_t*>(
        checked<T>("weights", weights, {blocks * packed_k, 64, static_cast<int64_t>(256 / sizeof(T))}));
    if (channel_scale != nullptr) p.channel_scale = checked<float>("channel_scale", *channel_scale, {N});
    if (bias != nullptr) p.bias = checked<float>("bias", *bias, {N});
    p.M = static_cast<int>(M), p.N = static_cast<int>(N);
    p.channel_blocks = static_cast<int>(blocks);
    p.packed_k = static_cast<int>(packed_k);
    p.packed_base = static_cast<int>(blocks * packed_k / kGrid);
    p.packed_rem = static_cast<int>(blocks * packed_k % kGrid);
    const int device = x.device().device_id;
    if (device >= kMaxDevices || workspace_of_device[device] == nullptr) {
      TVM_FFI_THROW(RuntimeError) << "device " << device << " has no workspace: call init_device(" << device << ") first";
    }
    p.partial = reinterpret_cast<float4*>(workspace_of_device[device]);
    stream = stream_of(x);
  }

  void set_out(const TensorView& out) {
    const int64_t N = params.N;
    params.out_float32 = has_dtype<float>(out);
    params.out = params.out_float32 ? static_cast<void*>(checked<float>("out", out, {M, N}))
                                    : checked<bf16>("out", out, {M, N});
  }

  /// Of the tokens; `groups`: of 256 elements, that the tensor has room for.
  void set_grouped_scales(const TensorView& scales, int64_t groups) {
    check_multiple("K", K, 2 * kGroupSize);
    params.padded_tokens = static_cast<int>(padded_tokens(M));
    params.token_scale = checked<float>("scales", scales, {K / (2 * kGroupSize), groups, params.padded_tokens});
  }
};

/// Queues a product; with a target, the one that the ranks get.
template <int kGroup, typename T>
void queue(Product<T>& product, const PushTarget* target) {
  static_assert(kMaxSiluGroupedTokens == 32 && kMaxPushedRows == 64, "the tiles that there are of few tokens");
  constexpr int kMost = kGroup == kSiluGroupSize ? 32 : 64;
  GemmParams& p = product.params;
  if (product.M == 0) return;
  if (target != nullptr) {
    if (product.M > kMaxPushedRows || p.out_float32) {
      TVM_FFI_THROW(ValueError) << "out has " << product.M << " rows of " << (p.out_float32 ? 32 : 16)
                                << " bits, only bfloat16 of up to " << kMaxPushedRows << " rows is sent to peers";
    }
    p.push = *target;
    return dispatch_few<T, kMost, kGroup, End::kPeers>(p, product.tokens, product.K, product.stream);
  }
  if constexpr (kGroup == kSiluGroupSize) {
    dispatch_few<T, kMost, kGroup>(p, product.tokens, product.K, product.stream);
  } else {
    dispatch<T, kGroup>(p, product.tokens, product.K, product.stream);
  }
}

constexpr int kSiluGroups = 2 * kGroupSize / kSiluGroupSize;  // of 256 elements

template <typename T>
void multiply(const TensorView& x, const TensorView& weights, const TensorView* token_scale,
              const TensorView* channel_scale, const TensorView* bias, const TensorView& out,
              const PushTarget* target = nullptr) {
  check_rank("out", out, 2);
  Product<T> product(x, weights, channel_scale, bias, out.size(1));
  product.set_out(out);
  if (token_scale != nullptr) {
    product.params.token_scale = checked<float>("token_scale", *token_scale, {product.M});
  }
  queue<0>(product, target);
}

/// `after_silu`: the scales are those that gate_up's GEMM gives.
void multiply_grouped(const TensorView& x, const TensorView& scales, const TensorView& weights,
                      const TensorView& channel_scale, const TensorView* bias, const TensorView& out, bool after_silu,
                      const PushTarget* target = nullptr) {
  check_rank("out", out, 2);
  Product<fp8> product(x, weights, &channel_scale, bias, out.size(1));
  product.set_out(out);
  product.set_grouped_scales(scales, after_silu ? kSiluGroups : 2);
  if (after_silu && silu_group_size(product.M) == kSiluGroupSize) return queue<kSiluGroupSize>(product, target);
  queue<kGroupSize>(product, target);
}

/// (M, F) of SiLU(gate) * up: bf16, or e4m3 with `scales`, of the type of the tokens. `scratch` (M, 2F) bf16 takes the
/// product of tokens so many that the kernel does not end in SiLU.
template <typename T>
void multiply_silu(const TensorView& x, const TensorView& weights, const TensorView* token_scale,
                   const TensorView* channel_scale, const TensorView* bias, const TensorView& scratch,
                   const TensorView& out, const TensorView* scales) {
  constexpr bool kFp8 = sizeof(T) == 1;
  constexpr int kMost = kFp8 ? kMaxSiluGroupedTokens : kMaxSiluTokens;
  check_rank("out", out, 2);
  const int64_t F = out.size(1);
  check_multiple("F", F, kFp8 ? 2 * kGroupSize : 32);
  Product<T> product(x, weights, channel_scale, bias, 2 * F);
  checked<bf16>("scratch", scratch, {product.M, 2 * F});
  if (product.M > kMost) {
    multiply<T>(x, weights, token_scale, channel_scale, bias, scratch);
    return kFp8 ? silu_mul_grouped(scratch, out, *scales) : silu_mul_interleaved(scratch, out);
  }
  GemmParams& p = product.params;
  p.out = checked<T>("out", out, {product.M, F});
  if constexpr (kFp8) {
    p.token_scale = checked<float>("token_scale", *token_scale, {product.M});
    p.padded_tokens = static_cast<int>(padded_tokens(product.M));
    p.out_scale = checked<float>("scales", *scales, {F / (2 * kGroupSize), kSiluGroups, p.padded_tokens});
  }
  if (product.M > 0) dispatch_few<T, kMost, 0, End::kSilu>(p, product.tokens, product.K, product.stream);
}

void multiply(const GemmCall& call, const TensorView& out, const PushTarget* target) {
  const TensorView* bias = call.bias.has_value() ? &*call.bias : nullptr;
  switch (call.kind) {
    case GemmKind::kBf16:
      return multiply<bf16>(call.x, call.weights, nullptr, nullptr, bias, out, target);
    case GemmKind::kFp8:
      return multiply<fp8>(call.x, call.weights, &*call.token_scale, &*call.channel_scale, bias, out, target);
    default: {
      const bool after_silu = call.kind == GemmKind::kFp8AfterSilu;
      multiply_grouped(call.x, *call.token_scale, call.weights, *call.channel_scale, bias, out, after_silu, target);
    }
  }
}

/// Makes what the GEMMs of a device share. Call once, before any capture; they must then run on one stream at a time.
void init_device(int64_t device) {
  if (device < 0 || device >= kMaxDevices) TVM_FFI_THROW(ValueError) << "device " << device << ", expected 0 to 15";
  if (workspace_of_device[device] != nullptr) return;
  int before = 0, num_sms = 0, major = 0;
  check_cuda(cudaGetDevice(&before), "cudaGetDevice");
  check_cuda(cudaSetDevice(static_cast<int>(device)), "cudaSetDevice");
  check_cuda(cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, static_cast<int>(device)), "SM count");
  check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, static_cast<int>(device)), "capability");
  if (major != 9 || num_sms < kGrid) {
    TVM_FFI_THROW(RuntimeError) << "device " << device << " has " << num_sms << " multiprocessors of capability " << major
                                << ".x; these kernels need capability 9.0 and " << kGrid;
  }
  void* memory = nullptr;
  check_cuda(cudaMalloc(&memory, kWorkspaceBytes), "cudaMalloc of the GEMM workspace");
  check_cuda(cudaMemset(memory, 0xff, kWorkspaceBytes), "cudaMemset");
  check_cuda(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  check_cuda(cudaSetDevice(before), "cudaSetDevice");
  workspace_of_device[device] = static_cast<uint8_t*>(memory);
}

template <typename T>
void pack(const TensorView& weight, const TensorView& packed) {
  const int64_t rows = weight.size(0), row_bytes = weight.size(1) * sizeof(T), steps = (row_bytes + 255) / 256;
  const int64_t stages = (rows + 63) / 64 * steps;
  check_multiple("bytes of a row", row_bytes, 16);
  launch(pack_kernel, static_cast<unsigned>(stages * (kStageBytes / 16 / 256)), 256, 0, stream_of(packed),
         reinterpret_cast<const uint8_t*>(checked<T>("weight", weight, {rows, weight.size(1)})),
         reinterpret_cast<uint4*>(checked<T>("packed", packed, {stages, 64, static_cast<int64_t>(256 / sizeof(T))})), rows,
         row_bytes, static_cast<int>(steps), static_cast<int>(stages / kGrid), static_cast<int>(stages % kGrid));
}

/// (N, K) bf16 or e4m3 as a checkpoint has it -> packed, as `packing.pack` on the host.
void pack_weight(TensorView weight, TensorView packed) {
  check_rank("weight", weight, 2);
  has_dtype<fp8>(weight) ? pack<fp8>(weight, packed) : pack<bf16>(weight, packed);
}

/// (M, K) bf16, packed bf16 -> (M, N) bf16 or float32.
void gemm(TensorView x, TensorView weights, TensorView out) {
  multiply<bf16>(x, weights, nullptr, nullptr, nullptr, out);
}

/// The same plus bias, (N,) float32.
void gemm_bias(TensorView x, TensorView weights, TensorView bias, TensorView out) {
  multiply<bf16>(x, weights, nullptr, nullptr, &bias, out);
}

/// (M, K) e4m3 with (M,) scales, packed e4m3 with (N,) scales -> (M, N) bf16 or float32.
void gemm_fp8(TensorView x, TensorView token_scale, TensorView weights, TensorView channel_scale, TensorView out) {
  multiply<fp8>(x, weights, &token_scale, &channel_scale, nullptr, out);
}

void gemm_fp8_bias(TensorView x, TensorView token_scale, TensorView weights, TensorView channel_scale, TensorView bias,
                   TensorView out) {
  multiply<fp8>(x, weights, &token_scale, &channel_scale, &bias, out);
}

/// (M, K) e4m3 with grouped scales (K / 256, 2, M rounded up to 8), packed e4m3 with (N,) scales -> (M, N) bf16 or float32.
void gemm_fp8_grouped(TensorView x, TensorView scales, TensorView weights, TensorView channel_scale, TensorView out) {
  multiply_grouped(x, scales, weights, channel_scale, nullptr, out, false);
}

void gemm_fp8_grouped_bias(TensorView x, TensorView scales, TensorView weights, TensorView channel_scale, TensorView bias,
                           TensorView out) {
  multiply_grouped(x, scales, weights, channel_scale, &bias, out, false);
}

/// The same of what `gemm_fp8_silu_mul` gives, with scales (K / 256, 8, M rounded up to 8).
void gemm_fp8_after_silu(TensorView x, TensorView scales, TensorView weights, TensorView channel_scale, TensorView out) {
  multiply_grouped(x, scales, weights, channel_scale, nullptr, out, true);
}

void gemm_fp8_after_silu_bias(TensorView x, TensorView scales, TensorView weights, TensorView channel_scale,
                              TensorView bias, TensorView out) {
  multiply_grouped(x, scales, weights, channel_scale, &bias, out, true);
}

/// (M, K) bf16, packed bf16 with gate and up interleaved (silu.cuh) -> SiLU(gate) * up (M, F) bf16; scratch (M, 2F) bf16.
void gemm_silu_mul(TensorView x, TensorView weights, TensorView scratch, TensorView out) {
  multiply_silu<bf16>(x, weights, nullptr, nullptr, nullptr, scratch, out, nullptr);
}

/// The same with (2F,) float32 added to gate and up, in the order of the weight.
void gemm_silu_mul_bias(TensorView x, TensorView weights, TensorView bias, TensorView scratch, TensorView out) {
  multiply_silu<bf16>(x, weights, nullptr, nullptr, &bias, scratch, out, nullptr);
}

/// (M, K) e4m3 with (M,) scales, packed e4m3 with (2F,) scales -> (M, F) e4m3 with scales (F / 256, 8, M rounded up to 8),
/// grouped by silu_group_size(M) (grouped_scales.cuh); scratch (M, 2F) bf16.
void gemm_fp8_silu_mul(TensorView x, TensorView token_scale, TensorView weights, TensorView channel_scale,
                       TensorView scratch, TensorView out, TensorView scales) {
  multiply_silu<fp8>(x, weights, &token_scale, &channel_scale, nullptr, scratch, out, &scales);
}

void gemm_fp8_silu_mul_bias(TensorView x, TensorView token_scale, TensorView weights, TensorView channel_scale,
                            TensorView bias, TensorView scratch, TensorView out, TensorView scales) {
  multiply_silu<fp8>(x, weights, &token_scale, &channel_scale, &bias, scratch, out, &scales);
}

}  // namespace

void run_gemm(const GemmCall& call, const TensorView& out) { multiply(call, out, nullptr); }

void push_gemm(const GemmCall& call, const TensorView& out, const PushTarget& target) { multiply(call, out, &target); }

namespace {

TVM_FFI_DLL_EXPORT_TYPED_FUNC(init_device, init_device);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(pack_weight, pack_weight);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(gemm, gemm);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(gemm_bias, gemm_bias);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(gemm_fp8, gemm_fp8);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(gemm_fp8_bias, gemm_fp8_bias);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(gemm_fp8_grouped, gemm_fp8_grouped);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(gemm_fp8_grouped_bias, gemm_fp8_grouped_bias);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(gemm_fp8_after_silu, gemm_fp8_after_silu);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(gemm_fp8_after_silu_bias, gemm_fp8_after_silu_bias);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(gemm_silu_mul, gemm_silu_mul);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(gemm_silu_mul_bias, gemm_silu_mul_bias);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(gemm_fp8_silu_mul, gemm_fp8_silu_mul);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(gemm_fp8_silu_mul_bias, gemm_fp8_silu_mul_bias);

}  // namespace
}  // namespace tpserve::cuda

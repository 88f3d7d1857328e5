// What the GEMMs share: their parameters, and how a finished tile is written.
#pragma once

#include <cuda.h>

#include "gemm_cursor.cuh"
#include "gemm_tile.cuh"
#include "push_tile.cuh"
#include "wgmma.cuh"

namespace tpserve::cuda {

constexpr int64_t kWorkspaceBytes = static_cast<int64_t>(kGrid) * kWideBlocks * 64 * 256 * 4;

struct GemmParams {
  const uint8_t* weights;
  const float* channel_scale;  // e4m3 only
  const float* token_scale;    // e4m3 only: by token, or grouped
  const float* bias;           // or null
  void* out;
  float* out_scale;  // of SiLU(gate) * up in e4m3, grouped
  float4* partial;
  int M, N;
  int padded_tokens;                   // of a group of grouped scales, taken or given
  int units_of_k;                      // per tile
  int channel_blocks;                  // of 64 channels
  int packed_k, packed_base, packed_rem;  // stages of K per 64 channels, and their runs
  int box_tokens;                         // that a copy brings, of a tile's: all that there are
  bool out_float32;
  NarrowPlan narrow;  // of up to 128 tokens
  WidePlan plan;      // of more
  PushTarget push;    // of kernels whose tiles go to peers
  // Of a norm without a kernel (gemm_norm.cuh): where its tokens come from, or null,
  const float* squares;
  int columns;  // of them
  // and where they are made.
  const bf16* residual;
  const float* norm_weight;
  float eps;
  bf16* residual_out;
  float* squares_out;
};

/// `barrier`: its address in shared memory.
__device__ __forceinline__ void tensor_copy(uint32_t target, const CUtensorMap* map, int k, int token, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
          target),
      "l"(map), "r"(k), "r"(token), "r"(barrier)
      : "memory");
}

/// The same of a `few_tokens_map`: its tiles of eight tokens x 128 bytes, from tile `first` of K on.
__device__ __forceinline__ void copy_few_tokens(uint32_t target, const CUtensorMap* map, int first, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];" ::"r"(
          target),
      "l"(map), "r"(0), "r"(0), "r"(first), "r"(shared_address(barrier))
      : "memory");
}

/// Takes a warp's tile of 16 channels x all tokens, eight tokens at a time, for the output in memory.
struct MemoryTile {
  static constexpr bool kToPeers = false;
  const GemmParams& p;
  int channel;

  /// `pairs`: of token lane / 4 of the eight, channels 2 (lane % 4) and the next, and those eight further on.
  __device__ __forceinline__ void store(int eight, const uint32_t (&pairs)[2]) const {
    const int lane = threadIdx.x % 32, m = eight * 8 + lane / 4, n = channel + lane % 4 * 4;
    const uint2 four = four_channels(pairs[0], pairs[1]);
    if (m < p.M && n < p.N) {
      *reinterpret_cast<uint2*>(static_cast<bf16*>(p.out) + static_cast<int64_t>(m) * p.N + n) = four;
    }
  }
};

/// Scales a warp's 16 channels x kTokens tokens and gives them to `tile`. By the whole warp group.
template <int kTokens, typename Scales, typename Tile>
__device__ __forceinline__ void write_tile(const GemmParams& p, const float (&sums)[kTokens / 2], int channel,
                                           const Scales& scales, const Tile& tile) {
  const int lane = threadIdx.x % 32, column = lane % 4 * 2;
#pragma unroll
  for (int b = 0; b < kTokens / 8; ++b) {
    if constexpr (Tile::kToPeers) {
      if (b * 8 % kStageTokens == 0) tile.open();
    }
    float values[4];
    scales.apply(sums, b, values);
    if (!Tile::kToPeers && p.out_float32) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int m = b * 8 + column + j % 2, n = channel + lane / 4 + j / 2 * 8;
        if (m < p.M && n < p.N) static_cast<float*>(p.out)[static_cast<int64_t>(m) * p.N + n] = values[j];
      }
    } else {
      uint32_t pairs[2];  // of channels of one token
#pragma unroll
      for (int h = 0; h < 2; ++h) pairs[h] = transpose_8x8(pack2(values[h * 2], values[h * 2 + 1]));
      tile.store(b, pairs);
    }
    if constexpr (Tile::kToPeers) {
      const int row = b * 8 / kStageTokens * kStageTokens, end = b * 8 + 8 - row;
      if (end == kStageTokens || b == kTokens / 8 - 1) tile.send(row, 0, end);
    }
  }
}

/// Blocks after `cta` that have a part of the units [covered, tile_end).
__device__ __forceinline__ int sharers_of(const GemmParams& p, int cta, int covered, int tile_end) {
  int count = 0;
  while (covered < tile_end) covered = p.narrow.first(cta + ++count + 1);
  return count;
}

using EncodeTiled = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                                 const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                                 CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

inline EncodeTiled encode_tiled() {
  static const EncodeTiled function = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found;
    check_cuda(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found),
               "cuTensorMapEncodeTiled");
    if (found != cudaDriverEntryPointSuccess) TVM_FFI_THROW(RuntimeError) << "the driver has no cuTensorMapEncodeTiled";
    return reinterpret_cast<EncodeTiled>(entry);
  }();
  return function;
}

/// A map of bytes or bfloat16 with rows of 128 bytes, swizzled; what is outside reads as zero.
template <typename T, int kRank>
CUtensorMap swizzled_map(const T* x, const cuuint64_t (&sizes)[kRank], const cuuint64_t (&strides)[kRank - 1],
                         const cuuint32_t (&box)[kRank]) {
  CUtensorMap map;
  cuuint32_t steps[kRank];
  for (cuuint32_t& step : steps) step = 1;
  const CUresult status = encode_tiled()(
      &map, sizeof(T) == 1 ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, kRank, const_cast<T*>(x), sizes,
      strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) {
    TVM_FFI_THROW(RuntimeError) << "cuTensorMapEncodeTiled: CUresult " << static_cast<int>(status) << " for x of "
                                << sizes[1] << " tokens";
  }
  return map;
}

/// Boxes of 128 bytes of K by `tokens` rows.
template <typename T>
CUtensorMap token_map(const T* x, int64_t M, int64_t K, int tokens) {
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(K), static_cast<cuuint64_t>(M)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(K) * sizeof(T)};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(128 / sizeof(T)), static_cast<cuuint32_t>(tokens)};
  return swizzled_map<T, 2>(x, sizes, strides, box);
}

/// Of up to eight e4m3 tokens `bytes` of K at once, in tiles of eight tokens x 128 bytes: sixteen copies, one after the other,
/// take as long as their way through L2.
inline CUtensorMap few_tokens_map(const fp8* x, int64_t M, int64_t K, int64_t bytes) {
  const cuuint64_t sizes[] = {128, static_cast<cuuint64_t>(M), static_cast<cuuint64_t>(K / 128)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(K), 128};
  const cuuint32_t box[] = {128, 8, static_cast<cuuint32_t>(bytes / 128)};
  return swizzled_map<fp8, 3>(x, sizes, strides, box);
}

}  // namespace tpserve::cuda

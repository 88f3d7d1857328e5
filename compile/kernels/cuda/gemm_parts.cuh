// What the GEMMs share: their parameters, the slots of partial sums, and how a finished tile is written.
#pragma once

#include <cuda.h>

#include "gemm_cursor.cuh"
#include "push_tile.cuh"
#include "slots.cuh"
#include "token_scales.cuh"
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
  int base, rem;                       // units of block c: base + (c < rem)
  int channel_blocks;                  // of 64 channels
  int packed_k, packed_base, packed_rem;  // stages of K per 64 channels, and their runs
  bool out_float32;
  WidePlan plan;    // of more than 128 tokens, whose blocks take no base + (c < rem) units
  PushTarget push;  // of kernels whose tiles go to peers
};

__device__ __forceinline__ void tensor_copy(uint32_t target, const CUtensorMap* map, int k, int token, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
          target),
      "l"(map), "r"(k), "r"(token), "r"(shared_address(barrier))
      : "memory");
}

__device__ __forceinline__ uint32_t transpose_8x8(uint32_t v) {
  uint32_t r;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(v));
  return r;
}

/// What finishes the sums of a thread's two channels, `channel` + lane / 4 and the eighth after it.
template <bool kByChannel, bool kByToken>
struct ChannelScales {
  float scale[2] = {1.0f, 1.0f}, bias[2] = {0.0f, 0.0f};

  __device__ __forceinline__ ChannelScales(const GemmParams& p, int channel) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int at = channel + threadIdx.x % 32 / 4 + h * 8;
      if (at >= p.N) continue;
      if (kByChannel) scale[h] = __ldg(p.channel_scale + at);
      if (p.bias != nullptr) bias[h] = __ldg(p.bias + at);
    }
  }

  /// With the scales of two tokens: value 2 h + i is of channel h and token i.
  __device__ __forceinline__ void apply(const float* sums, float2 of_tokens, float (&values)[4]) const {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float factor = scale[j / 2] * (j % 2 == 0 ? of_tokens.x : of_tokens.y);
      values[j] = fmaf(sums[j], factor, bias[j / 2]);
    }
  }

  /// Of tokens `m` and the next: value 2 h + i is of channel h and token m + i.
  __device__ __forceinline__ void apply(const GemmParams& p, const float* sums, int m, float (&values)[4]) const {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      float factor = scale[j / 2];
      if (kByToken) factor *= m + j % 2 < p.M ? __ldcg(p.token_scale + m + j % 2) : 0.0f;
      values[j] = kByChannel ? fmaf(sums[j], factor, bias[j / 2]) : sums[j] + bias[j / 2];
    }
  }
};

/// Takes a warp's tile of 16 channels x all tokens, eight tokens at a time, for the output in memory.
struct MemoryTile {
  static constexpr bool kToPeers = false;
  const GemmParams& p;
  int channel;

  /// `pairs`: of token lane / 4 of the eight, channels 2 (lane % 4) and the next, and those eight further on.
  __device__ __forceinline__ void store(int eight, const uint32_t (&pairs)[2]) const {
    const int lane = threadIdx.x % 32, m = eight * 8 + lane / 4;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int n = channel + h * 8 + lane % 4 * 2;
      if (m < p.M && n < p.N) {
        *reinterpret_cast<uint32_t*>(static_cast<bf16*>(p.out) + static_cast<int64_t>(m) * p.N + n) = pairs[h];
      }
    }
  }
};

/// Scales by channel, and by token, and gives a warp's 16 channels x kTokens tokens to `tile`.
template <bool kByChannel, bool kByToken, int kTokens, typename Tile>
__device__ __forceinline__ void write_tile(const GemmParams& p, float (&sums)[kTokens / 2], int channel, const Tile& tile) {
  const int lane = threadIdx.x % 32, column = lane % 4 * 2;
  const ChannelScales<kByChannel, kByToken> scales(p, channel);
  const auto held = [&] {
    if constexpr (kByToken) {
      return TokenScales<kTokens>(p, 0);
    } else {
      return 0;
    }
  }();
#pragma unroll
  for (int b = 0; b < kTokens / 8; ++b) {
    float values[4];
    if constexpr (kByToken) {
      scales.apply(sums + b * 4, held.pair(b, column), values);
    } else {
      scales.apply(p, sums + b * 4, b * 8 + column, values);
    }
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
  }
}

/// Blocks after `cta` that have a part of the units [covered, tile_end).
__device__ __forceinline__ int sharers_of(const GemmParams& p, int cta, int covered, int tile_end) {
  int count = 0;
  while (covered < tile_end) covered += p.base + (cta + ++count < p.rem);
  return count;
}

/// Adds four partial sums once they are there, and marks their place as empty again.
template <int kRegisters>
__device__ __forceinline__ void add_partial(float (&sums)[kRegisters], int b, uint4 v, float4* place) {
  while (is_empty(v)) v = load_slot(place);
  empty_slot(place);
  sums[b * 4] += __uint_as_float(v.x), sums[b * 4 + 1] += __uint_as_float(v.y);
  sums[b * 4 + 2] += __uint_as_float(v.z), sums[b * 4 + 3] += __uint_as_float(v.w);
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

/// Boxes of 128 bytes of K by `tokens` rows; what is outside of x reads as zero.
template <typename T>
CUtensorMap token_map(const T* x, int64_t M, int64_t K, int tokens) {
  CUtensorMap map;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(K), static_cast<cuuint64_t>(M)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(K) * sizeof(T)};
  const cuuint32_t box[2] = {static_cast<cuuint32_t>(128 / sizeof(T)), static_cast<cuuint32_t>(tokens)};
  const cuuint32_t steps[2] = {1, 1};
  const CUresult status = encode_tiled()(
      &map, sizeof(T) == 1 ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<T*>(x), sizes,
      strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) {
    TVM_FFI_THROW(RuntimeError) << "cuTensorMapEncodeTiled: CUresult " << static_cast<int>(status) << " for x (" << M
                                << ", " << K << ")";
  }
  return map;
}

}  // namespace tpserve::cuda

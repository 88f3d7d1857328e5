// The end of an MLP's kernel: what the owner of a tile of 64 channels does with the parts of its sums.
#pragma once

#include "gemm_norm.cuh"
#include "mlp_params.cuh"
#include "slots.cuh"

namespace tpserve::cuda {

/// Of one channel of the tile, and two tokens. By the 256 threads that multiply, of every block.
struct MlpEnd {
  int tile;  // that this block owns, or -1
  int c, first, channel;  // of the tile, of all; tokens `first` and the fourth after it
  float residual[2] = {}, weight = 0.0f, down_scale = 0.0f;

  /// Asks for what is there before the sums: once the kernels before have ended.
  __device__ __forceinline__ explicit MlpEnd(const MlpParams& p) : c(threadIdx.x % 64), first(threadIdx.x / 64) {
    const int share = gridDim.x / p.tiles, cta = blockIdx.x;
    tile = cta % share == 0 && cta / share < p.tiles ? cta / share : -1;
    channel = tile * 64 + c;
    if (tile < 0) return;
    weight = __ldg(p.norm_weight + channel), down_scale = __ldg(p.down_scale + channel);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int m = first + i * 4;
      if (m >= p.M) continue;
      const uint16_t bits = __ldcg(reinterpret_cast<const uint16_t*>(p.residual) + static_cast<int64_t>(m) * p.K + channel);
      residual[i] = __uint_as_float(static_cast<uint32_t>(bits) << 16);
    }
  }

  /// Adds the parts, each warp those of every eighth pair and then all warps', and writes the stream with its norm begun.
  /// `added`: shared memory for [two tokens][warp][32], where the tokens were.
  __device__ __forceinline__ void write(const MlpParams& p, int pairs, float4* added) const {
    __shared__ float squares_of_tile[2][8], largest_of_tile[2][8];  // [first or second token][warp]
    static_assert(MlpShape::kTokens / 2 * 8 * 32 * sizeof(float4) <= MlpShape::kLeastHidden * MlpShape::kTokens);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    // Eight of a warp's parts at a time, of up to four tokens: each is a trip to L2.
    const int twos = (p.M + 1) / 2;
#pragma unroll 1
    for (int t = 0; t < twos; t += 2) {
      const int beside = min(twos - t, 2);
      float4 sum[2] = {};
      float4* const from = p.parts + (static_cast<int64_t>(tile) * pairs * 4 + t) * 32 + lane;
#pragma unroll 1
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
        p.out_norms[tile * MlpShape::kTokens + m] = largest / kFp8Max;
        p.out_norms[(p.tiles + tile) * MlpShape::kTokens + m] = tile == 0 ? total + p.eps * static_cast<float>(p.K) : total;
      }
    }
  }
};

}  // namespace tpserve::cuda

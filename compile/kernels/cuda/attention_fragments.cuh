// How attention takes products of keys and values from shared memory: mma.sync m16n8k16 with float32 sums, in bfloat16 or,
// for e4m3 pages, in float16, which holds every e4m3 value exactly and is one instruction away from it.
//
// In float16, weights (at most 1) are closer than in bfloat16; queries are as they were between 6e-5 and 65504 in
// magnitude, lose digits below, and are clipped above.
#pragma once

#include <cuda_fp16.h>

#include "common.cuh"
#include "kv_layout.cuh"

namespace tpserve::cuda {

__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

/// What products over pages of type KV are made of. A column is sixteen dimensions; kColumns of them are loaded at once.
template <typename KV, int kHeadDim>
struct Fragments;

template <int kHeadDim>
struct Fragments<bf16, kHeadDim> {
  using P = Panels<2, kHeadDim>;
  static constexpr int kColumns = 1;
  static constexpr int kSliceBytes = 2 * P::kCount * P::kSliceBytes;  // sixteen positions: keys, then values

  static __device__ __forceinline__ void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, "
        "%2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }

  /// Two queries, or two weights, as the products take them.
  static __device__ __forceinline__ uint32_t query2(uint32_t bf16_pair) { return bf16_pair; }
  static __device__ __forceinline__ uint32_t weight2(float x, float y) { return pack2(x, y); }

  /// Keys of slice s from column k: for each column, b0 and b1 of positions 0 to 7, then of 8 to 15.
  static __device__ __forceinline__ void keys(uint32_t slices, int s, int lane, int k, uint32_t (&b)[kColumns][4]) {
    const int row = lane / 16 * 8 + lane % 8, chunk = k % 4 * 2 + lane / 8 % 2;
    load_matrices(b[0], slices + s * kSliceBytes + k / 4 * P::kSliceBytes + row * 128 + (chunk ^ row % 8) * 16);
  }

  /// Values from column n: for each column, b0 and b1 of its dimensions 0 to 7, then of 8 to 15.
  static __device__ __forceinline__ void values(uint32_t slices, int s, int lane, int n, uint32_t (&b)[kColumns][4]) {
    const int row = lane / 8 % 2 * 8 + lane % 8, chunk = n % 4 * 2 + lane / 16;
    load_matrices_transposed(b[0], slices + s * kSliceBytes + (P::kCount + n / 4) * P::kSliceBytes + row * 128 +
                                       (chunk ^ row % 8) * 16);
  }
};

template <int kHeadDim>
struct Fragments<fp8, kHeadDim> {
  using P = Panels<1, kHeadDim>;
  static constexpr int kColumns = 2;
  static constexpr int kSliceBytes = 2 * P::kCount * P::kSliceBytes;

  static __device__ __forceinline__ void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
        "%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }

  static __device__ __forceinline__ uint32_t query2(uint32_t bf16_pair) {
    uint32_t halves;  // the second operand is the lower half
    asm("cvt.rn.satfinite.f16x2.f32 %0, %1, %2;" : "=r"(halves) : "f"(high_half(bf16_pair)), "f"(low_half(bf16_pair)));
    return halves;
  }
  static __device__ __forceinline__ uint32_t weight2(float x, float y) {
    const __half2 h = __floats2half2_rn(x, y);
    return *reinterpret_cast<const uint32_t*>(&h);
  }

  static __device__ __forceinline__ void keys(uint32_t slices, int s, int lane, int k, uint32_t (&b)[kColumns][4]) {
    uint32_t words[4];
    load_matrices(words, slices + s * kSliceBytes + P::keys_of_lane(lane, k * 16));
#pragma unroll
    for (int column = 0; column < kColumns; ++column) {
#pragma unroll
      for (int i = 0; i < 4; ++i) b[column][i] = widen2(key_codes(words, column, i));
    }
  }

  static __device__ __forceinline__ void values(uint32_t slices, int s, int lane, int n, uint32_t (&b)[kColumns][4]) {
    uint32_t words[4];
    load_matrices_transposed(words, slices + s * kSliceBytes + kSliceBytes / 2 + P::values_of_lane(lane, n * 16));
#pragma unroll
    for (int column = 0; column < kColumns; ++column) {
#pragma unroll
      for (int i = 0; i < 4; ++i) b[column][i] = widen2(value_codes(words, column, i));
    }
  }
};

}  // namespace tpserve::cuda

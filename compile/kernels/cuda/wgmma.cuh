// Warp-group matrix products d += a b, 64 rows of a, N columns of b, both from shared memory. A product takes 32 bytes of K
// (16 bfloat16 or 32 e4m3). Operands stand in rows of 128 bytes with the 128-byte swizzle, groups of eight rows 1024 bytes
// apart; the next 32 bytes of K are two descriptor steps on.
#pragma once

#include "hopper.cuh"

namespace tpserve::cuda {

__device__ __forceinline__ uint64_t matrix_descriptor(uint32_t address) {
  return static_cast<uint64_t>((address & 0x3FFFF) >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

/// Sums of one warp group: N / 2 registers. Register 4 i + j of a thread is row 16 warp + lane / 4 + 8 (j / 2), column
/// 8 i + 2 (lane % 4) + j % 2.
template <typename T, int kColumns>
struct Wgmma;

// Registers of N / 2 sums in the text of an instruction, and as operands.
#define TPSERVE_FOUR(a, b, c, d) ", %" #a ", %" #b ", %" #c ", %" #d
#define TPSERVE_SUMS(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define TPSERVE_TEXT_4 "%0, %1, %2, %3"
#define TPSERVE_SUMS_4 TPSERVE_SUMS(0)
#define TPSERVE_TEXT_8 TPSERVE_TEXT_4 TPSERVE_FOUR(4, 5, 6, 7)
#define TPSERVE_SUMS_8 TPSERVE_SUMS_4, TPSERVE_SUMS(4)
#define TPSERVE_TEXT_16 TPSERVE_TEXT_8 TPSERVE_FOUR(8, 9, 10, 11) TPSERVE_FOUR(12, 13, 14, 15)
#define TPSERVE_SUMS_16 TPSERVE_SUMS_8, TPSERVE_SUMS(8), TPSERVE_SUMS(12)
#define TPSERVE_TEXT_32 TPSERVE_TEXT_16 TPSERVE_FOUR(16, 17, 18, 19) TPSERVE_FOUR(20, 21, 22, 23) \
  TPSERVE_FOUR(24, 25, 26, 27) TPSERVE_FOUR(28, 29, 30, 31)
#define TPSERVE_SUMS_32 TPSERVE_SUMS_16, TPSERVE_SUMS(16), TPSERVE_SUMS(20), TPSERVE_SUMS(24), TPSERVE_SUMS(28)
#define TPSERVE_TEXT_48 TPSERVE_TEXT_32 TPSERVE_FOUR(32, 33, 34, 35) TPSERVE_FOUR(36, 37, 38, 39) \
  TPSERVE_FOUR(40, 41, 42, 43) TPSERVE_FOUR(44, 45, 46, 47)
#define TPSERVE_SUMS_48 TPSERVE_SUMS_32, TPSERVE_SUMS(32), TPSERVE_SUMS(36), TPSERVE_SUMS(40), TPSERVE_SUMS(44)
#define TPSERVE_TEXT_56 TPSERVE_TEXT_48 TPSERVE_FOUR(48, 49, 50, 51) TPSERVE_FOUR(52, 53, 54, 55)
#define TPSERVE_SUMS_56 TPSERVE_SUMS_48, TPSERVE_SUMS(48), TPSERVE_SUMS(52)
#define TPSERVE_TEXT_64 TPSERVE_TEXT_56 TPSERVE_FOUR(56, 57, 58, 59) TPSERVE_FOUR(60, 61, 62, 63)
#define TPSERVE_SUMS_64 TPSERVE_SUMS_56, TPSERVE_SUMS(56), TPSERVE_SUMS(60)
#define TPSERVE_TEXT_72 TPSERVE_TEXT_64 TPSERVE_FOUR(64, 65, 66, 67) TPSERVE_FOUR(68, 69, 70, 71)
#define TPSERVE_SUMS_72 TPSERVE_SUMS_64, TPSERVE_SUMS(64), TPSERVE_SUMS(68)
#define TPSERVE_TEXT_80 TPSERVE_TEXT_72 TPSERVE_FOUR(72, 73, 74, 75) TPSERVE_FOUR(76, 77, 78, 79)
#define TPSERVE_SUMS_80 TPSERVE_SUMS_72, TPSERVE_SUMS(72), TPSERVE_SUMS(76)
#define TPSERVE_TEXT_96 TPSERVE_TEXT_80 TPSERVE_FOUR(80, 81, 82, 83) TPSERVE_FOUR(84, 85, 86, 87) \
  TPSERVE_FOUR(88, 89, 90, 91) TPSERVE_FOUR(92, 93, 94, 95)
#define TPSERVE_SUMS_96 TPSERVE_SUMS_80, TPSERVE_SUMS(80), TPSERVE_SUMS(84), TPSERVE_SUMS(88), TPSERVE_SUMS(92)
#define TPSERVE_TEXT_112 TPSERVE_TEXT_96 TPSERVE_FOUR(96, 97, 98, 99) TPSERVE_FOUR(100, 101, 102, 103) \
  TPSERVE_FOUR(104, 105, 106, 107) TPSERVE_FOUR(108, 109, 110, 111)
#define TPSERVE_SUMS_112 TPSERVE_SUMS_96, TPSERVE_SUMS(96), TPSERVE_SUMS(100), TPSERVE_SUMS(104), TPSERVE_SUMS(108)
#define TPSERVE_TEXT_128 TPSERVE_TEXT_112 TPSERVE_FOUR(112, 113, 114, 115) TPSERVE_FOUR(116, 117, 118, 119) \
  TPSERVE_FOUR(120, 121, 122, 123) TPSERVE_FOUR(124, 125, 126, 127)
#define TPSERVE_SUMS_128 TPSERVE_SUMS_112, TPSERVE_SUMS(112), TPSERVE_SUMS(116), TPSERVE_SUMS(120), TPSERVE_SUMS(124)

/// `A`, `B`, `ACCUMULATE`: the numbers of the operands behind the sums. `MAJOR`: that neither operand is transposed, which
/// bfloat16 alone could be.
#define TPSERVE_WGMMA_OF(T, TYPE, K, COLUMNS, SUMS, A, B, ACCUMULATE, MAJOR)                                    \
  template <>                                                                                                   \
  struct Wgmma<T, COLUMNS> {                                                                                    \
    static __device__ __forceinline__ void run(float (&d)[SUMS], uint64_t a, uint64_t b, int accumulate) {      \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #ACCUMULATE ", 0;\n"                                    \
                   "wgmma.mma_async.sync.aligned.m64n" #COLUMNS "k" #K ".f32." TYPE "." TYPE " {"               \
                   TPSERVE_TEXT_##SUMS "}, %" #A ", %" #B ", p, 1, 1" MAJOR ";\n}"                              \
                   : TPSERVE_SUMS_##SUMS                                                                        \
                   : "l"(a), "l"(b), "r"(accumulate));                                                          \
    }                                                                                                           \
  };
#define TPSERVE_WGMMA(COLUMNS, SUMS, A, B, ACCUMULATE)                                      \
  TPSERVE_WGMMA_OF(bf16, "bf16", 16, COLUMNS, SUMS, A, B, ACCUMULATE, ", 0, 0")             \
  TPSERVE_WGMMA_OF(fp8, "e4m3", 32, COLUMNS, SUMS, A, B, ACCUMULATE, "")

TPSERVE_WGMMA(8, 4, 4, 5, 6)
TPSERVE_WGMMA(16, 8, 8, 9, 10)
TPSERVE_WGMMA(32, 16, 16, 17, 18)
TPSERVE_WGMMA(64, 32, 32, 33, 34)
TPSERVE_WGMMA(96, 48, 48, 49, 50)
TPSERVE_WGMMA(112, 56, 56, 57, 58)
TPSERVE_WGMMA(128, 64, 64, 65, 66)
TPSERVE_WGMMA(144, 72, 72, 73, 74)
TPSERVE_WGMMA(160, 80, 80, 81, 82)
TPSERVE_WGMMA(192, 96, 96, 97, 98)
TPSERVE_WGMMA(224, 112, 112, 113, 114)
TPSERVE_WGMMA(256, 128, 128, 129, 130)

#undef TPSERVE_WGMMA
#undef TPSERVE_WGMMA_OF

}  // namespace tpserve::cuda

// What every CPU kernel shares: sixteen-lane vectors, checked views of tensors, and exp.
//
// Vectors are GCC vector extensions, so the compiler lowers them to AVX-512, two AVX2 halves, or four NEON quarters. Where
// they are wider than a register, GCC 12 keeps arrays of them in memory: sums that a loop adds to are arrays of `part`s.
// Every sum runs in an order fixed by the shapes of one row alone: results do not depend on the number of rows, on
// the number of threads, or on how rows are tiled. For that the build pins FMA contraction (see native.py).
#pragma once

#if defined(__AVX512BW__)
#include <immintrin.h>
#endif
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/function.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>

#include "parallel.h"

#define TPSERVE_INLINE inline __attribute__((always_inline))

namespace tpserve {

using tvm::ffi::TensorView;

constexpr int kLanes = 16;

typedef float v16 __attribute__((vector_size(64)));
typedef float v16_unaligned __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t i16 __attribute__((vector_size(64)));
typedef uint32_t u16 __attribute__((vector_size(64)));
typedef uint16_t h16 __attribute__((vector_size(32)));
typedef uint16_t h16_unaligned __attribute__((vector_size(32), aligned(2), may_alias));

#if defined(__AVX512F__)
constexpr int kPartLanes = 16;
#elif defined(__AVX__)
constexpr int kPartLanes = 8;
#else
constexpr int kPartLanes = 4;
#endif
constexpr int kParts = kLanes / kPartLanes;
/// What a register holds of sixteen lanes.
typedef float part __attribute__((vector_size(4 * kPartLanes)));
typedef float part_unaligned __attribute__((vector_size(4 * kPartLanes), aligned(4), may_alias));

/// A bfloat16 as stored; widened by a shift.
struct bf16 {
  uint16_t bits;
};

TPSERVE_INLINE v16 splat(float x) { return v16{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }

TPSERVE_INLINE v16 load(const float* p) { return *reinterpret_cast<const v16_unaligned*>(p); }

TPSERVE_INLINE v16 load(const bf16* p) {
#if defined(__AVX512BW__)
  // One word permute puts each half in the upper word of its lane; GCC 12 makes seven instructions of the other form.
  const __m512i place = reinterpret_cast<__m512i>(u16{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} << 16);
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return reinterpret_cast<v16>(_mm512_maskz_permutexvar_epi16(0xAAAAAAAAu, place, _mm512_castsi256_si512(half)));
#else
  const h16 half = *reinterpret_cast<const h16_unaligned*>(p);
  return reinterpret_cast<v16>(__builtin_convertvector(half, u16) << 16);
#endif
}

TPSERVE_INLINE part splat_part(float x) { return x - part{}; }

TPSERVE_INLINE part load_part(const float* p) { return *reinterpret_cast<const part_unaligned*>(p); }

TPSERVE_INLINE part load_part(const bf16* p) {
#if defined(__AVX512F__)
  return load(p);
#else
  typedef uint32_t wide __attribute__((vector_size(4 * kPartLanes)));
  typedef uint16_t half __attribute__((vector_size(2 * kPartLanes)));
  typedef uint16_t half_unaligned __attribute__((vector_size(2 * kPartLanes), aligned(2), may_alias));
  const half bits = *reinterpret_cast<const half_unaligned*>(p);
  return reinterpret_cast<part>(__builtin_convertvector(bits, wide) << 16);
#endif
}

TPSERVE_INLINE void store_part(float* p, part x) { *reinterpret_cast<part_unaligned*>(p) = x; }

TPSERVE_INLINE void store(float* p, v16 x) { *reinterpret_cast<v16_unaligned*>(p) = x; }

TPSERVE_INLINE float widen(float x) { return x; }

TPSERVE_INLINE float widen(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}

/// Sum of the lanes, always as the same tree.
TPSERVE_INLINE float sum_lanes(v16 x) {
  float a[kLanes];
  store(a, x);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) a[i] += a[i + width];
  }
  return a[0];
}

TPSERVE_INLINE float max_lanes(v16 x) {
  float a[kLanes];
  store(a, x);
  float best = a[0];
  for (int i = 1; i < kLanes; ++i) best = a[i] > best ? a[i] : best;
  return best;
}

/// exp(x) within about 1 ulp; 0 below -87.3 and clamped at exp(88.3) above. Cody-Waite reduction by ln 2 in two
/// parts, then a minimax polynomial for exp on [-ln2/2, ln2/2] (Moshier, Cephes `expf`).
TPSERVE_INLINE v16 exp_lanes(v16 x) {
  const v16 low = splat(-87.3f), high = splat(88.3f);
  const i16 underflow = x < low;
  x = x < low ? low : x;
  x = x > high ? high : x;
  // Adding and taking away 1.5 * 2^23 rounds to the nearest integer.
  const v16 shifter = splat(12582912.0f);
  v16 n = x * splat(1.44269504088896341f) + shifter;
  const i16 exponent = reinterpret_cast<i16>(n) - reinterpret_cast<i16>(shifter);
  n = n - shifter;
  v16 r = x - n * splat(0.693359375f);
  r = r - n * splat(-2.12194440e-4f);
  v16 p = splat(1.9875691500e-4f);
  p = p * r + splat(1.3981999507e-3f);
  p = p * r + splat(8.3334519073e-3f);
  p = p * r + splat(4.1665795894e-2f);
  p = p * r + splat(1.6666665459e-1f);
  p = p * r + splat(5.0000001201e-1f);
  p = p * (r * r) + r + splat(1.0f);
  const v16 scaled = p * reinterpret_cast<v16>((exponent + 127) << 23);
  return underflow ? v16{} : scaled;
}

// --- Checked access to arguments ------------------------------------------------------------------------------------

template <typename T>
struct DType;
template <>
struct DType<float> {
  static constexpr DLDataType value{kDLFloat, 32, 1};
  static constexpr const char* name = "float32";
};
template <>
struct DType<bf16> {
  static constexpr DLDataType value{kDLBfloat, 16, 1};
  static constexpr const char* name = "bfloat16";
};
template <>
struct DType<int32_t> {
  static constexpr DLDataType value{kDLInt, 32, 1};
  static constexpr const char* name = "int32";
};
template <>
struct DType<int64_t> {
  static constexpr DLDataType value{kDLInt, 64, 1};
  static constexpr const char* name = "int64";
};

template <typename T>
bool has_dtype(const TensorView& t) {
  const DLDataType d = t.dtype(), want = DType<T>::value;
  return d.code == want.code && d.bits == want.bits && d.lanes == want.lanes;
}

inline std::string shape_text(const TensorView& t) {
  std::string text = "(";
  for (int i = 0; i < t.ndim(); ++i) text += (i ? ", " : "") + std::to_string(t.size(i));
  return text + ")";
}

/// Pointer to a contiguous CPU tensor of the given type and shape; -1 in `shape` takes any size there.
template <typename T>
T* checked(const char* name, const TensorView& t, std::initializer_list<int64_t> shape) {
  bool same = t.ndim() == static_cast<int>(shape.size());
  int axis = 0;
  for (const int64_t want : shape) {
    if (!same) break;
    same = want == -1 || t.size(axis) == want;
    ++axis;
  }
  if (!same) {
    std::string text = "(";
    for (const int64_t want : shape) text += (text.size() > 1 ? ", " : "") + (want < 0 ? "any" : std::to_string(want));
    TVM_FFI_THROW(ValueError) << name << " has shape " << shape_text(t) << ", expected " << text << ")";
  }
  if (!has_dtype<T>(t)) {
    TVM_FFI_THROW(TypeError) << name << " has dtype code " << static_cast<int>(t.dtype().code) << " with "
                             << static_cast<int>(t.dtype().bits) << " bits, expected " << DType<T>::name;
  }
  if (t.device().device_type != kDLCPU) {
    TVM_FFI_THROW(ValueError) << name << " is on device type " << static_cast<int>(t.device().device_type)
                              << ", expected a CPU tensor";
  }
  if (!t.IsContiguous()) TVM_FFI_THROW(ValueError) << name << " with shape " << shape_text(t) << " is not contiguous";
  return reinterpret_cast<T*>(static_cast<char*>(t.data_ptr()) + t.byte_offset());
}

inline void check_rank(const char* name, const TensorView& t, int ndim) {
  if (t.ndim() != ndim) {
    TVM_FFI_THROW(ValueError) << name << " has " << t.ndim() << " dimensions, expected " << ndim;
  }
}

/// Throws unless 0 <= values[i] < limit for all i.
inline void check_indices(const char* name, const int32_t* values, int64_t count, int64_t limit) {
  for (int64_t i = 0; i < count; ++i) {
    if (values[i] < 0 || values[i] >= limit) {
      TVM_FFI_THROW(IndexError) << name << "[" << i << "] is " << values[i] << ", expected 0 to " << limit - 1;
    }
  }
}

}  // namespace tpserve

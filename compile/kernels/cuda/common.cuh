// What every CUDA kernel shares: checked views of tensors, launches, and bfloat16 vectors.
//
// All kernels can be captured in a graph: they allocate nothing, wait for nothing on the host, and read every length,
// position and table from device memory. All are launched with programmatic stream serialisation: a kernel starts while
// the one before it drains, and must not touch what others wrote before `pdl_wait()` (but a reduction beside its GEMM: peer.cuh).
// Every kernel calls it on every path, for its end must imply the end of all kernels before it.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/function.h>

#include <cstdint>
#include <initializer_list>
#include <string>
#include <utility>

#include "fp8.cuh"

namespace tpserve::cuda {

using tvm::ffi::TensorView;
using bf16 = __nv_bfloat16;
using fp8 = __nv_fp8_e4m3;

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
struct DType<fp8> {
  static constexpr DLDataType value{kDLFloat8_e4m3fn, 8, 1};
  static constexpr const char* name = "float8_e4m3fn";
};
template <>
struct DType<uint8_t> {
  static constexpr DLDataType value{kDLUInt, 8, 1};
  static constexpr const char* name = "uint8";
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

/// Pointer to a contiguous CUDA tensor of the given type and shape; -1 in `shape` takes any size there.
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
  if (t.device().device_type != kDLCUDA) {
    TVM_FFI_THROW(ValueError) << name << " is on device type " << static_cast<int>(t.device().device_type)
                              << ", expected a CUDA tensor";
  }
  if (!t.IsContiguous()) TVM_FFI_THROW(ValueError) << name << " with shape " << shape_text(t) << " is not contiguous";
  T* data = reinterpret_cast<T*>(static_cast<char*>(t.data_ptr()) + t.byte_offset());
  if (reinterpret_cast<uintptr_t>(data) % 16 != 0) TVM_FFI_THROW(ValueError) << name << " is not aligned to 16 bytes";
  return data;
}

inline void check_rank(const char* name, const TensorView& t, int ndim) {
  if (t.ndim() != ndim) {
    TVM_FFI_THROW(ValueError) << name << " has " << t.ndim() << " dimensions, expected " << ndim;
  }
}

inline void check_multiple(const char* name, int64_t value, int64_t of) {
  if (value % of != 0) TVM_FFI_THROW(ValueError) << name << " is " << value << ", expected a multiple of " << of;
}

// --- Launches -------------------------------------------------------------------------------------------------------

inline void check_cuda(cudaError_t status, const char* what) {
  if (status != cudaSuccess) TVM_FFI_THROW(RuntimeError) << what << ": " << cudaGetErrorString(status);
}

inline cudaStream_t stream_of(const TensorView& t) {
  return static_cast<cudaStream_t>(TVMFFIEnvGetStream(t.device().device_type, t.device().device_id));
}

/// Launches `kernel` so that it may start while its predecessor drains.
template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream, Args&&... args) {
  if (grid.x == 0 || grid.y == 0) return;
  if (shared_bytes > 48 * 1024) {
    check_cuda(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(shared_bytes)),
               "cudaFuncSetAttribute");
  }
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  check_cuda(cudaLaunchKernelEx(&config, kernel, Params(std::forward<Args>(args))...), "kernel launch");
}

__device__ __forceinline__ void pdl_wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ __forceinline__ void pdl_launch() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// --- Vectors and reductions -----------------------------------------------------------------------------------------

__device__ __forceinline__ float low_half(uint32_t w) { return __uint_as_float(w << 16); }
__device__ __forceinline__ float high_half(uint32_t w) { return __uint_as_float(w & 0xFFFF0000u); }

__device__ __forceinline__ void unpack8(uint4 v, float (&f)[8]) {
  f[0] = low_half(v.x), f[1] = high_half(v.x), f[2] = low_half(v.y), f[3] = high_half(v.y);
  f[4] = low_half(v.z), f[5] = high_half(v.z), f[6] = low_half(v.w), f[7] = high_half(v.w);
}

__device__ __forceinline__ uint32_t pack2(float a, float b) {
  const __nv_bfloat162 h = __floats2bfloat162_rn(a, b);
  return *reinterpret_cast<const uint32_t*>(&h);
}

__device__ __forceinline__ uint4 pack8(const float (&f)[8]) {
  return {pack2(f[0], f[1]), pack2(f[2], f[3]), pack2(f[4], f[5]), pack2(f[6], f[7])};
}

/// What another kernel wrote: through L2, since a block of this kernel may have shared its L1 with that one.
__device__ __forceinline__ uint4 load_l2(const void* p) { return __ldcg(static_cast<const uint4*>(p)); }

/// 2^x, to two units of the last place; 0 where it would be less than the smallest normal number.
__device__ __forceinline__ float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

struct Add {
  template <typename T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};
struct Max {
  template <typename T>
  __device__ T operator()(T a, T b) const {
    return a > b ? a : b;
  }
};

/// The same value in all threads; one order of operations. `scratch` holds 32 values.
template <typename T, typename Op>
__device__ __forceinline__ T block_reduce(T value, T neutral, T* scratch, Op op) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value = op(value, __shfl_xor_sync(~0u, value, offset));
  __syncthreads();  // the scratch may still be read from the reduction before
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  value = threadIdx.x % 32 < (blockDim.x + 31) / 32 ? scratch[threadIdx.x % 32] : neutral;
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value = op(value, __shfl_xor_sync(~0u, value, offset));
  return value;
}

}  // namespace tpserve::cuda

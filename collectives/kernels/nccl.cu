// What collectives by NCCL need beside NCCL.
#include "common.cuh"

namespace tpserve::cuda {
namespace {

/// (world, rows, columns) -> (rows, world * columns), in 16-byte vectors.
__global__ void __launch_bounds__(256)
    join_columns_kernel(const uint4* parts, uint4* out, int world_size, int64_t rows, int row_vectors) {
  pdl_launch();
  pdl_wait();
  const int64_t index = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  if (index >= rows * world_size * row_vectors) return;
  const int64_t row = index / row_vectors, vector = index % row_vectors;  // row of (rows * world)
  out[index] = load_l2(parts + (row % world_size * rows + row / world_size) * row_vectors + vector);
}

template <typename T>
void join(const TensorView& parts, const TensorView& out) {
  constexpr int kVector = 16 / sizeof(T);
  check_rank("parts", parts, 3);
  const int64_t world = parts.size(0), rows = parts.size(1), columns = parts.size(2);
  check_multiple("columns", columns, kVector);
  const T* source = checked<T>("parts", parts, {world, rows, columns});
  T* target = checked<T>("out", out, {rows, world * columns});
  const int64_t vectors = rows * world * columns / kVector;
  launch(join_columns_kernel, dim3(static_cast<unsigned>((vectors + 255) / 256)), 256, 0, stream_of(out),
         reinterpret_cast<const uint4*>(source), reinterpret_cast<uint4*>(target), static_cast<int>(world), rows,
         static_cast<int>(columns / kVector));
}

/// Puts the ranks' columns side by side: (world, rows, columns) float32 or bfloat16 -> (rows, world * columns).
void join_columns(TensorView parts, TensorView out) {
  has_dtype<bf16>(parts) ? join<bf16>(parts, out) : join<float>(parts, out);
}

/// Where a tensor's elements begin, for libraries that take addresses.
int64_t device_address(TensorView t) { return reinterpret_cast<int64_t>(t.data_ptr()) + static_cast<int64_t>(t.byte_offset()); }

TVM_FFI_DLL_EXPORT_TYPED_FUNC(join_columns, join_columns);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(device_address, device_address);

}  // namespace
}  // namespace tpserve::cuda

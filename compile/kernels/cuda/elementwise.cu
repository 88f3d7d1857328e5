// Norms, activation, row copies and quantisation to fp8: one block per token, the row in registers.
//
// Activations and the residual stream are bfloat16, sums float32. A quantised row is e4m3 with one float32 scale, the
// largest magnitude / 448; `scale` times the stored value is the value. What needs no other sum of the row is quantised in
// groups, each with its own scale (grouped_scales.cuh), so that no block needs a whole row.
#include "elementwise.cuh"

#include "grouped_scales.cuh"
#include "silu.cuh"

namespace tpserve::cuda {
namespace {

// In a chain of fp8 layers a thread for each vector of a row took less time than fewer threads, or clusters of blocks, at
// every number of tokens (benchmarks/README.md).
constexpr int kMaxThreads = 1024;

/// SiLU's rows are gate then up, or interleaved (silu.cuh).
enum class Row { kCopy, kNorm, kAddNorm, kSilu, kSiluInterleaved };
constexpr bool is_silu(Row row) { return row == Row::kSilu || row == Row::kSiluInterleaved; }

struct RowParams {
  const bf16* x;         // (rows, size); for SiLU (rows, 2 size)
  const bf16* residual;  // kAddNorm
  const float* weight;   // norms
  const int32_t* index;  // row of x for each output row, or null
  int64_t num_source_rows;
  bf16* residual_out;
  bf16* out;
  fp8* quantized;  // instead of `out`
  float* scale;
  int size;
  float eps;
};

/// Vectors of eight gates and of their ups: where vector `v` of a row of 2 `size` elements stands.
template <bool kInterleaved>
__device__ __forceinline__ int gate_at(int v) {
  static_assert(kInterleave == 8);
  return kInterleaved ? v * 16 : v * 8;
}
template <bool kInterleaved>
__device__ __forceinline__ int up_at(int v, int size) {
  return kInterleaved ? v * 16 + 8 : size + v * 8;
}

/// silu(gate) * up of vector `v`; `gate_up` is its row.
template <bool kInterleaved>
__device__ __forceinline__ void activate(const bf16* gate_up, int v, int size, float (&values)[8]) {
  float up[8];
  unpack8(load_l2(gate_up + gate_at<kInterleaved>(v)), values);
  unpack8(load_l2(gate_up + up_at<kInterleaved>(v, size)), up);
#pragma unroll
  for (int j = 0; j < 8; ++j) values[j] = silu(values[j]) * up[j];
}

template <Row kRow, int kVectors, bool kQuantize>
__global__ void __launch_bounds__(kMaxThreads) transform_rows(const __grid_constant__ RowParams p) {
  __shared__ float scratch[32];
  pdl_launch();
  pdl_wait();
  const int64_t row = blockIdx.x;
  const int num_vectors = p.size / 8;
  int64_t source = row;
  if (kRow == Row::kCopy && p.index != nullptr) source = __ldcg(p.index + row);
  const bool present = source >= 0 && source < p.num_source_rows;  // rows of padding give zeros
  float values[kVectors][8];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int v = threadIdx.x + i * blockDim.x;
    uint4 raw{};
    if (!is_silu(kRow) && v < num_vectors && present) raw = load_l2(p.x + source * p.size + v * 8);
    unpack8(raw, values[i]);
    if (v >= num_vectors) continue;
    if constexpr (kRow == Row::kAddNorm) {
      float other[8];
      unpack8(load_l2(p.residual + row * p.size + v * 8), other);
#pragma unroll
      for (int j = 0; j < 8; ++j) values[i][j] += other[j];
      const uint4 sum = pack8(values[i]);
      *reinterpret_cast<uint4*>(p.residual_out + row * p.size + v * 8) = sum;
      unpack8(sum, values[i]);  // the norm sees the residual stream as the next layer will
    }
    if constexpr (is_silu(kRow)) activate<kRow == Row::kSiluInterleaved>(p.x + row * 2 * p.size, v, p.size, values[i]);
  }
  if constexpr (kRow == Row::kNorm || kRow == Row::kAddNorm) {
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
#pragma unroll
      for (int j = 0; j < 8; ++j) squares += values[i][j] * values[i][j];
    }
    squares = block_reduce(squares, 0.0f, scratch, Add{});
    const float factor = rsqrtf(squares / static_cast<float>(p.size) + p.eps);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int v = threadIdx.x + i * blockDim.x;
      if (v >= num_vectors) continue;
      const float4 a = *reinterpret_cast<const float4*>(p.weight + v * 8);
      const float4 b = *reinterpret_cast<const float4*>(p.weight + v * 8 + 4);
      const float weights[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
      for (int j = 0; j < 8; ++j) values[i][j] *= factor * weights[j];
    }
  }
  float inverse = 0.0f;
  if constexpr (kQuantize) {
    float largest = 0.0f;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
#pragma unroll
      for (int j = 0; j < 8; ++j) largest = fmaxf(largest, fabsf(values[i][j]));
    }
    largest = fmaxf(block_reduce(largest, 0.0f, scratch, Max{}), 1e-12f);
    inverse = kFp8Max / largest;
    if (threadIdx.x == 0) p.scale[row] = largest / kFp8Max;
  }
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int v = threadIdx.x + i * blockDim.x;
    if (v >= num_vectors) continue;
    if constexpr (kQuantize) {
      const float(&f)[8] = values[i];
      uint2 q;
      q.x = pack4_fp8(f[0] * inverse, f[1] * inverse, f[2] * inverse, f[3] * inverse);
      q.y = pack4_fp8(f[4] * inverse, f[5] * inverse, f[6] * inverse, f[7] * inverse);
      *reinterpret_cast<uint2*>(p.quantized + row * p.size + v * 8) = q;
    } else {
      *reinterpret_cast<uint4*>(p.out + row * p.size + v * 8) = pack8(values[i]);
    }
  }
}

template <Row kRow, bool kQuantize>
void run(const RowParams& p, int64_t rows, cudaStream_t stream) {
  check_multiple("the row size", p.size, 8);
  const int num_vectors = p.size / 8;
  const auto with = [&](auto kernel, int vectors) {
    const int threads = ((num_vectors + vectors - 1) / vectors + 31) / 32 * 32;
    launch(kernel, dim3(static_cast<unsigned>(rows)), threads, 0, stream, p);
  };
  if (num_vectors <= kMaxThreads) return with(transform_rows<kRow, 1, kQuantize>, 1);
  if (num_vectors <= 2 * kMaxThreads) return with(transform_rows<kRow, 2, kQuantize>, 2);
  if (num_vectors <= 4 * kMaxThreads) return with(transform_rows<kRow, 4, kQuantize>, 4);
  TVM_FFI_THROW(ValueError) << "rows of " << p.size << " elements, at most " << 4 * 8 * kMaxThreads << " are supported";
}

/// Quantises groups of kGroup elements of x, or of silu(gate) * up interleaved: a thread has eight of a group's elements.
template <bool kSilu, int kGroup>
__global__ void __launch_bounds__(256) transform_groups(const __grid_constant__ RowParams p) {
  constexpr int kThreads = kGroup / 8;  // of a group
  pdl_launch();
  pdl_wait();
  const int64_t row = blockIdx.y;
  const int v = blockIdx.x * 256 + threadIdx.x;
  if (v >= p.size / 8) return;  // whole warps: a row is a multiple of 256 elements
  float values[8];
  if constexpr (kSilu) {
    activate<true>(p.x + row * 2 * p.size, v, p.size, values);
  } else {
    unpack8(load_l2(p.x + row * p.size + v * 8), values);
  }
  float largest = 1e-12f;
#pragma unroll
  for (int j = 0; j < 8; ++j) largest = fmaxf(largest, fabsf(values[j]));
#pragma unroll
  for (int offset = kThreads / 2; offset > 0; offset /= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, offset));
  }
  const float inverse = kFp8Max / largest;
  uint2 q;
  q.x = pack4_fp8(values[0] * inverse, values[1] * inverse, values[2] * inverse, values[3] * inverse);
  q.y = pack4_fp8(values[4] * inverse, values[5] * inverse, values[6] * inverse, values[7] * inverse);
  *reinterpret_cast<uint2*>(p.quantized + row * p.size + v * 8) = q;
  if (v % kThreads == 0) p.scale[scale_at(v / kThreads, row, p.num_source_rows)] = largest / kFp8Max;
}

/// With grouped scales, or with those of rows where tokens are many.
template <bool kSilu>
void run_groups(const RowParams& p, cudaStream_t stream) {
  const int64_t rows = p.num_source_rows;
  if (rows > kMaxGroupedTokens) return run<kSilu ? Row::kSiluInterleaved : Row::kCopy, true>(p, rows, stream);
  const dim3 grid(static_cast<unsigned>((p.size / 8 + 255) / 256), static_cast<unsigned>(rows));
  if constexpr (kSilu) {
    if (silu_group_size(rows) == kSiluGroupSize) {
      return launch(transform_groups<true, kSiluGroupSize>, grid, 256, 0, stream, p);
    }
  }
  launch(transform_groups<kSilu, kGroupSize>, grid, 256, 0, stream, p);
}

/// Without a scale no row must be whole in one block: rows are cut, so that one token keeps many blocks busy.
template <bool kInterleaved>
__global__ void __launch_bounds__(256) silu_mul_kernel(const bf16* gate_up, bf16* out, int size) {
  pdl_launch();
  pdl_wait();
  const int64_t row = blockIdx.y;
  const int v = blockIdx.x * 256 + threadIdx.x;
  if (v >= size / 8) return;
  float values[8];
  activate<kInterleaved>(gate_up + row * 2 * size, v, size, values);
  *reinterpret_cast<uint4*>(out + row * size + v * 8) = pack8(values);
}

template <bool kInterleaved>
void run_silu_mul(const TensorView& gate_up, const TensorView& out) {
  check_rank("out", out, 2);
  const int64_t rows = out.size(0), size = out.size(1);
  check_multiple("the row size", size, 8);
  const bf16* source = checked<bf16>("gate_up", gate_up, {rows, 2 * size});
  bf16* target = checked<bf16>("out", out, {rows, size});
  const dim3 grid(static_cast<unsigned>((size / 8 + 255) / 256), static_cast<unsigned>(rows));
  launch(silu_mul_kernel<kInterleaved>, grid, 256, 0, stream_of(out), source, target, static_cast<int>(size));
}

void copy_rows(const char* what, const TensorView& index, const TensorView& table, const TensorView& out) {
  check_rank(what, index, 1);
  check_rank("out", out, 2);
  const int64_t rows = out.size(0), size = out.size(1);
  RowParams p{};
  p.x = checked<bf16>("the source of rows", table, {-1, size});
  p.index = checked<int32_t>(what, index, {rows});
  p.num_source_rows = table.size(0);
  p.out = checked<bf16>("out", out, {rows, size});
  p.size = static_cast<int>(size);
  run<Row::kCopy, false>(p, rows, stream_of(out));
}

/// (T,) int32, (V, H) bf16 -> (T, H) bf16. Ids out of range (padding) give zeros.
void embed(TensorView ids, TensorView table, TensorView out) { copy_rows("ids", ids, table, out); }

/// (T, H) bf16, (R,) int32 -> (R, H) bf16. Rows out of range (padding) give zeros.
void take_rows(TensorView x, TensorView rows, TensorView out) { copy_rows("rows", rows, x, out); }

RowParams norm_params(const TensorView& x, const TensorView& weight, double eps) {
  check_rank("x", x, 2);
  RowParams p{};
  p.x = checked<bf16>("x", x, {-1, -1});
  p.num_source_rows = x.size(0);
  p.size = static_cast<int>(x.size(1));
  p.weight = checked<float>("weight", weight, {x.size(1)});
  p.eps = static_cast<float>(eps);
  return p;
}

void set_quantized(RowParams& p, const TensorView& out, const TensorView& scale, int64_t rows, int64_t size) {
  p.quantized = checked<fp8>("out", out, {rows, size});
  p.scale = checked<float>("scale", scale, {rows});
}

/// `groups`: of 256 elements of a row, that the tensor of scales has room for.
void set_groups(RowParams& p, const TensorView& out, const TensorView& scales, int64_t rows, int64_t size, int64_t groups) {
  check_multiple("the row size", size, 2 * kGroupSize);
  p.num_source_rows = rows;
  p.size = static_cast<int>(size);
  p.quantized = checked<fp8>("out", out, {rows, size});
  p.scale = checked<float>("scales", scales, {size / (2 * kGroupSize), groups, padded_tokens(rows)});
}

void rms_norm(TensorView x, TensorView weight, double eps, TensorView out) {
  RowParams p = norm_params(x, weight, eps);
  p.out = checked<bf16>("out", out, {x.size(0), x.size(1)});
  run<Row::kNorm, false>(p, x.size(0), stream_of(out));
}

void rms_norm_fp8(TensorView x, TensorView weight, double eps, TensorView out, TensorView scale) {
  RowParams p = norm_params(x, weight, eps);
  set_quantized(p, out, scale, x.size(0), x.size(1));
  run<Row::kNorm, true>(p, x.size(0), stream_of(out));
}

void add_rms_norm_fp8(TensorView x, TensorView residual, TensorView weight, double eps, TensorView residual_out,
                      TensorView out, TensorView scale) {
  cuda::add_rms_norm_fp8(x, residual, weight, eps, residual_out, out, checked<float>("scale", scale, {x.size(0)}));
}

/// (T, 2F) bf16, gate then up -> (T, F) bf16.
void silu_mul(TensorView gate_up, TensorView out) { run_silu_mul<false>(gate_up, out); }

/// (T, 2F) bf16, gate then up -> (T, F) e4m3 and (T,) scales.
void silu_mul_fp8(TensorView gate_up, TensorView out, TensorView scale) {
  check_rank("out", out, 2);
  const int64_t rows = out.size(0), size = out.size(1);
  RowParams p{};
  p.x = checked<bf16>("gate_up", gate_up, {rows, 2 * size});
  p.num_source_rows = rows;
  p.size = static_cast<int>(size);
  set_quantized(p, out, scale, rows, size);
  run<Row::kSilu, true>(p, rows, stream_of(out));
}

/// (T, H) bf16 -> e4m3 and (T,) scales.
void quantize_fp8(TensorView x, TensorView out, TensorView scale) {
  check_rank("x", x, 2);
  RowParams p{};
  p.x = checked<bf16>("x", x, {-1, -1});
  p.num_source_rows = x.size(0);
  p.size = static_cast<int>(x.size(1));
  set_quantized(p, out, scale, x.size(0), x.size(1));
  run<Row::kCopy, true>(p, x.size(0), stream_of(out));
}

}  // namespace

void add_rms_norm_fp8(const TensorView& x, const TensorView& residual, const TensorView& weight, double eps,
                      const TensorView& residual_out, const TensorView& out, float* scale) {
  RowParams p = norm_params(x, weight, eps);
  p.residual = checked<bf16>("residual", residual, {x.size(0), x.size(1)});
  p.residual_out = checked<bf16>("residual_out", residual_out, {x.size(0), x.size(1)});
  p.quantized = checked<fp8>("out", out, {x.size(0), x.size(1)});
  p.scale = scale;
  run<Row::kAddNorm, true>(p, x.size(0), stream_of(out));
}

void add_rms_norm(TensorView x, TensorView residual, TensorView weight, double eps, TensorView residual_out,
                  TensorView out) {
  RowParams p = norm_params(x, weight, eps);
  p.residual = checked<bf16>("residual", residual, {x.size(0), x.size(1)});
  p.residual_out = checked<bf16>("residual_out", residual_out, {x.size(0), x.size(1)});
  p.out = checked<bf16>("out", out, {x.size(0), x.size(1)});
  run<Row::kAddNorm, false>(p, x.size(0), stream_of(out));
}

void quantize_fp8_grouped(TensorView x, TensorView out, TensorView scales) {
  check_rank("x", x, 2);
  RowParams p{};
  p.x = checked<bf16>("x", x, {-1, -1});
  set_groups(p, out, scales, x.size(0), x.size(1), 2);
  run_groups<false>(p, stream_of(out));
}

void silu_mul_interleaved(TensorView gate_up, TensorView out) { run_silu_mul<true>(gate_up, out); }

void silu_mul_grouped(TensorView gate_up, TensorView out, TensorView scales) {
  check_rank("out", out, 2);
  const int64_t rows = out.size(0), size = out.size(1);
  RowParams p{};
  p.x = checked<bf16>("gate_up", gate_up, {rows, 2 * size});
  set_groups(p, out, scales, rows, size, 2 * kGroupSize / kSiluGroupSize);
  run_groups<true>(p, stream_of(out));
}

namespace {

TVM_FFI_DLL_EXPORT_TYPED_FUNC(embed, embed);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(take_rows, take_rows);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(rms_norm, rms_norm);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(rms_norm_fp8, rms_norm_fp8);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(add_rms_norm, add_rms_norm);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(add_rms_norm_fp8, add_rms_norm_fp8);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(silu_mul, silu_mul);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(silu_mul_fp8, silu_mul_fp8);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(silu_mul_grouped, silu_mul_grouped);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(silu_mul_interleaved, silu_mul_interleaved);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(quantize_fp8, quantize_fp8);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(quantize_fp8_grouped, quantize_fp8_grouped);

}  // namespace
}  // namespace tpserve::cuda

// Activation, norms, and row copies. Each row is one task and its sums have one order.
#include "common.h"

namespace tpserve {
namespace {

/// Covers [0, size): `vector(i)` for sixteen elements at i, then `scalar(i)` for each that is left.
template <typename Vector, typename Scalar>
TPSERVE_INLINE void sweep(int64_t size, Vector&& vector, Scalar&& scalar) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) vector(i);
  for (; i < size; ++i) scalar(i);
}

TPSERVE_INLINE v16 silu(v16 x) { return x / (splat(1.0f) + exp_lanes(-x)); }

void silu_mul(TensorView gate_up, TensorView out) {
  check_rank("out", out, 2);
  const int64_t num_tokens = out.size(0), size = out.size(1);
  const float* source = checked<float>("gate_up", gate_up, {num_tokens, 2 * size});
  float* target = checked<float>("out", out, {num_tokens, size});
  parallel_for(num_tokens, num_threads(num_tokens * size * 16, num_tokens), [&](int64_t t) {
    const float *gate = source + t * 2 * size, *up = gate + size;
    float* row = target + t * size;
    sweep(
        size, [&](int64_t i) { store(row + i, silu(load(gate + i)) * load(up + i)); },
        [&](int64_t i) { row[i] = silu(splat(gate[i]))[0] * up[i]; });
  });
}

/// out = x / rms(x) * weight for one row.
TPSERVE_INLINE void normalise_row(const float* x, const float* weight, float eps, int64_t size, float* out) {
  v16 lanes = {};
  float tail = 0.0f;
  sweep(
      size, [&](int64_t i) { lanes += load(x + i) * load(x + i); }, [&](int64_t i) { tail += x[i] * x[i]; });
  const float mean = (sum_lanes(lanes) + tail) / static_cast<float>(size);
  const float scale = 1.0f / std::sqrt(mean + eps);
  sweep(
      size, [&](int64_t i) { store(out + i, load(x + i) * splat(scale) * load(weight + i)); },
      [&](int64_t i) { out[i] = x[i] * scale * weight[i]; });
}

void rms_norm(TensorView x, TensorView weight, double eps, TensorView out) {
  check_rank("x", x, 2);
  const int64_t num_tokens = x.size(0), size = x.size(1);
  const float* source = checked<float>("x", x, {num_tokens, size});
  const float* scale = checked<float>("weight", weight, {size});
  float* target = checked<float>("out", out, {num_tokens, size});
  parallel_for(num_tokens, num_threads(num_tokens * size * 3, num_tokens), [&](int64_t t) {
    normalise_row(source + t * size, scale, static_cast<float>(eps), size, target + t * size);
  });
}

void add_rms_norm(TensorView x, TensorView residual, TensorView weight, double eps, TensorView residual_out,
                  TensorView out) {
  check_rank("x", x, 2);
  const int64_t num_tokens = x.size(0), size = x.size(1);
  const float* left = checked<float>("x", x, {num_tokens, size});
  const float* right = checked<float>("residual", residual, {num_tokens, size});
  const float* scale = checked<float>("weight", weight, {size});
  float* sum = checked<float>("residual_out", residual_out, {num_tokens, size});
  float* target = checked<float>("out", out, {num_tokens, size});
  parallel_for(num_tokens, num_threads(num_tokens * size * 4, num_tokens), [&](int64_t t) {
    for (int64_t i = t * size; i < (t + 1) * size; ++i) sum[i] = left[i] + right[i];
    normalise_row(sum + t * size, scale, static_cast<float>(eps), size, target + t * size);
  });
}

template <typename W>
void copy_rows(const W* table, const int32_t* rows, int64_t count, int64_t size, float* out) {
  parallel_for(count, num_threads(count * size, count), [&](int64_t t) {
    const W* source = table + rows[t] * size;
    float* target = out + t * size;
    sweep(
        size, [&](int64_t i) { store(target + i, load(source + i)); },
        [&](int64_t i) { target[i] = widen(source[i]); });
  });
}

void embed(TensorView ids, TensorView table, TensorView out) {
  check_rank("ids", ids, 1);
  check_rank("table", table, 2);
  const int64_t count = ids.size(0), size = table.size(1);
  const int32_t* rows = checked<int32_t>("ids", ids, {count});
  float* target = checked<float>("out", out, {count, size});
  check_indices("ids", rows, count, table.size(0));
  if (has_dtype<bf16>(table)) {
    copy_rows(checked<bf16>("table", table, {-1, size}), rows, count, size, target);
  } else {
    copy_rows(checked<float>("table", table, {-1, size}), rows, count, size, target);
  }
}

void take_rows(TensorView x, TensorView rows, TensorView out) {
  check_rank("x", x, 2);
  check_rank("rows", rows, 1);
  const int64_t count = rows.size(0), size = x.size(1);
  const int32_t* indices = checked<int32_t>("rows", rows, {count});
  check_indices("rows", indices, count, x.size(0));
  copy_rows(checked<float>("x", x, {-1, size}), indices, count, size, checked<float>("out", out, {count, size}));
}

TVM_FFI_DLL_EXPORT_TYPED_FUNC(silu_mul, silu_mul);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(rms_norm, rms_norm);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(add_rms_norm, add_rms_norm);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(embed, embed);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(take_rows, take_rows);

}  // namespace
}  // namespace tpserve

// What the library says of itself.
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/string.h>

namespace tpserve::cuda {
namespace {

/// Functions that compiled graphs call, each registered as "tpserve.cuda.<name>" by whoever loads the library.
tvm::ffi::Array<tvm::ffi::String> kernel_names() {
  return {"add_rms_norm", "add_rms_norm_fp8", "attention", "attention_fp8", "attention_fp8_grouped",
          "attention_grouped", "attention_plan", "concat_2", "concat_3", "embed", "gemm", "gemm_add_rms_norm",
          "gemm_add_rms_norm_bias", "gemm_bias", "gemm_fp8", "gemm_fp8_add_rms_norm", "gemm_fp8_add_rms_norm_bias",
          "gemm_fp8_after_silu", "gemm_fp8_after_silu_add_rms_norm", "gemm_fp8_after_silu_add_rms_norm_bias",
          "gemm_fp8_after_silu_bias", "gemm_fp8_bias", "gemm_fp8_grouped", "gemm_fp8_grouped_add_rms_norm",
          "gemm_fp8_grouped_add_rms_norm_bias", "gemm_fp8_grouped_bias", "gemm_fp8_normed", "gemm_fp8_normed_bias",
          "gemm_fp8_normed_silu_mul", "gemm_fp8_normed_silu_mul_bias", "gemm_fp8_silu_mul", "gemm_fp8_silu_mul_bias",
          "gemm_normed", "gemm_normed_bias", "gemm_normed_silu_mul", "gemm_normed_silu_mul_bias", "gemm_silu_mul",
          "gemm_silu_mul_bias", "mlp_fp8_add_rms_norm", "qk_norm_attention", "qk_norm_attention_fp8",
          "qk_norm_attention_fp8_grouped", "qk_norm_attention_grouped", "qkv_attention_fp8_grouped",
          "qkv_attention_grouped", "quantize_fp8", "quantize_fp8_grouped", "rms_norm", "rms_norm_fp8",
          "rope_append", "sample", "silu_mul", "silu_mul_fp8", "silu_mul_grouped", "silu_mul_interleaved", "take_rows"};
}

TVM_FFI_DLL_EXPORT_TYPED_FUNC(kernel_names, kernel_names);

}  // namespace
}  // namespace tpserve::cuda

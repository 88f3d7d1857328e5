// What the library says of itself, and how many threads it may use.
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/string.h>

#include "common.h"

namespace tpserve {
namespace {

/// Functions that compiled graphs call, each registered as "tpserve.cpu.<name>" by whoever loads the library.
tvm::ffi::Array<tvm::ffi::String> kernel_names() {
  return {"add_rms_norm", "attention",   "embed",  "gemm",     "gemm_bias", "qk_norm_rope_append",
          "rms_norm",     "rope_append", "sample", "silu_mul", "take_rows"};
}

/// For the whole process; ranks that share a machine divide its cores.
void set_num_threads(int64_t count) {
  if (count < 1) TVM_FFI_THROW(ValueError) << "the number of threads is " << count << ", expected 1 or more";
  set_max_threads(static_cast<int>(count));
}

TVM_FFI_DLL_EXPORT_TYPED_FUNC(kernel_names, kernel_names);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(set_num_threads, set_num_threads);

}  // namespace
}  // namespace tpserve

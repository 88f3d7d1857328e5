// The size of the thread team of all kernels in this library.
#include "common.h"

namespace tpserve {
namespace {

/// For calls from the calling thread; ranks that share a machine divide its cores.
void set_num_threads(int64_t count) {
  if (count < 1) TVM_FFI_THROW(ValueError) << "the number of threads is " << count << ", expected 1 or more";
  omp_set_num_threads(static_cast<int>(count));
}

TVM_FFI_DLL_EXPORT_TYPED_FUNC(set_num_threads, set_num_threads);

}  // namespace
}  // namespace tpserve

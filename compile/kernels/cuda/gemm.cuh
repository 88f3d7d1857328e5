// What other kernels' functions queue of gemm.cu.
#pragma once

#include <tvm/ffi/string.h>

#include <algorithm>
#include <iterator>
#include <optional>

#include "common.cuh"
#include "push_tile.cuh"

namespace tpserve::cuda {

/// A GEMM and its operands.
struct GemmCall {
  TensorView x;        // (M, K)
  TensorView weights;  // packed
  std::optional<TensorView> token_scale, channel_scale, bias;
  bool grouped;  // scales of tokens

  /// `name`: of a function that gemm.cu exports; `args`: those that it takes before its output.
  static GemmCall from(const tvm::ffi::String& name, tvm::ffi::PackedArgs args) {
    struct Kind {
      const char* name;
      bool fp8, grouped, bias;
    };
    static constexpr Kind kKinds[] = {
        {"gemm", false, false, false},           {"gemm_bias", false, false, true},
        {"gemm_fp8", true, false, false},        {"gemm_fp8_bias", true, false, true},
        {"gemm_fp8_grouped", true, true, false}, {"gemm_fp8_grouped_bias", true, true, true},
    };
    const Kind* kind = std::find_if(std::begin(kKinds), std::end(kKinds), [&](const Kind& k) { return name == k.name; });
    if (kind == std::end(kKinds)) TVM_FFI_THROW(ValueError) << "there is no GEMM named " << name;
    const int expected = 2 + 2 * kind->fp8 + kind->bias;
    if (args.size() != expected) {
      TVM_FFI_THROW(TypeError) << name << " takes " << expected << " arguments before its output, got " << args.size();
    }
    int next = 0;
    const auto take = [&] { return args[next++].cast<TensorView>(); };
    const TensorView x = take();
    std::optional<TensorView> token_scale, channel_scale, bias;
    if (kind->fp8) token_scale = take();
    const TensorView weights = take();
    if (kind->fp8) channel_scale = take();
    if (kind->bias) bias = take();
    return {x, weights, token_scale, channel_scale, bias, kind->grouped};
  }
};

/// out (M, N) = x w^T.
void run_gemm(const GemmCall& call, const TensorView& out);

/// The same for up to kMaxPushedRows rows, but what bf16 `out` would get is sent to the ranks: `out` gives only the shape.
/// The next kernel in the stream must be the pushed reduction of the same call: it may start before this one ends.
void push_gemm(const GemmCall& call, const TensorView& out, const PushTarget& target);

}  // namespace tpserve::cuda

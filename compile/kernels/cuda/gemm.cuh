// What other kernels' functions queue of gemm.cu.
#pragma once

#include <tvm/ffi/string.h>

#include <algorithm>
#include <iterator>
#include <optional>

#include "common.cuh"
#include "push_tile.cuh"

namespace tpserve::cuda {

/// By the tokens and their scales: e4m3 with one for each row, with grouped ones, or with those of gate_up's GEMM.
enum class GemmKind { kBf16, kFp8, kFp8Grouped, kFp8AfterSilu };

/// A GEMM and its operands.
struct GemmCall {
  GemmKind kind;
  TensorView x;        // (M, K)
  TensorView weights;  // packed
  std::optional<TensorView> token_scale, channel_scale;  // of e4m3
  std::optional<TensorView> bias;

  /// `name`: of a function that gemm.cu exports; `args`: those that it takes before its output.
  static GemmCall from(const tvm::ffi::String& name, tvm::ffi::PackedArgs args) {
    struct Function {
      const char* name;
      GemmKind kind;
      bool bias;
    };
    static constexpr Function kFunctions[] = {
        {"gemm", GemmKind::kBf16, false},
        {"gemm_bias", GemmKind::kBf16, true},
        {"gemm_fp8", GemmKind::kFp8, false},
        {"gemm_fp8_bias", GemmKind::kFp8, true},
        {"gemm_fp8_grouped", GemmKind::kFp8Grouped, false},
        {"gemm_fp8_grouped_bias", GemmKind::kFp8Grouped, true},
        {"gemm_fp8_after_silu", GemmKind::kFp8AfterSilu, false},
        {"gemm_fp8_after_silu_bias", GemmKind::kFp8AfterSilu, true},
    };
    const Function* found =
        std::find_if(std::begin(kFunctions), std::end(kFunctions), [&](const Function& f) { return name == f.name; });
    if (found == std::end(kFunctions)) TVM_FFI_THROW(ValueError) << "there is no GEMM named " << name;
    const bool fp8 = found->kind != GemmKind::kBf16;
    const int expected = 2 + 2 * fp8 + found->bias;
    if (args.size() != expected) {
      TVM_FFI_THROW(TypeError) << name << " takes " << expected << " arguments before its output, got " << args.size();
    }
    int next = 0;
    const auto take = [&] { return args[next++].cast<TensorView>(); };
    const TensorView x = take();
    std::optional<TensorView> token_scale, channel_scale, bias;
    if (fp8) token_scale = take();
    const TensorView weights = take();
    if (fp8) channel_scale = take();
    if (found->bias) bias = take();
    return {found->kind, x, weights, token_scale, channel_scale, bias};
  }
};

/// What the GEMMs of a device share, in its memory.
uint8_t* gemm_workspace(int device);

/// out (M, N) = x w^T.
void run_gemm(const GemmCall& call, const TensorView& out);

/// The same of e4m3 tokens of a whole norm, whose scales stand at the head of `norms` (gemm_norm.cuh).
void run_gemm_of_norms(const TensorView& x, const TensorView& norms, const TensorView& weights,
                       const TensorView& channel_scale, const TensorView* bias, const TensorView& out);

/// The same for up to kMaxPushedRows rows, but what bf16 `out` would get is sent to the ranks: `out` gives only the shape.
/// The next kernel in the stream must be the pushed reduction of the same call: it may start before this one ends.
void push_gemm(const GemmCall& call, const TensorView& out, const PushTarget& target);

}  // namespace tpserve::cuda

// The functions of the GEMM: what they take. gemm_dispatch.cuh chooses tile and ring, gemm_kernel.cuh has the kernel.
#include "elementwise.cuh"
#include "gemm.cuh"
#include "gemm_dispatch.cuh"
#include "gemm_product.cuh"

namespace tpserve::cuda {
namespace {

constexpr int kMaxDevices = 16;

uint8_t* workspace_of_device[kMaxDevices] = {};

/// One thread per 16 bytes of the packed weight.
__global__ void __launch_bounds__(256)
    pack_kernel(const uint8_t* plain, uint4* packed, int64_t rows, int64_t row_bytes, int steps, int base, int rem) {
  pdl_launch();
  pdl_wait();
  const int64_t index = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  const int place = static_cast<int>(index / (kStageBytes / 16)), chunk = static_cast<int>(index % (kStageBytes / 16));
  const int run = place % kGrid, stage = base * run + min(run, rem) + place / kGrid;
  const int row_of_stage = chunk % (kTileBytes / 16) / 8, tile = chunk / (kTileBytes / 16);
  const int64_t row = static_cast<int64_t>(stage / steps) * 64 + row_of_stage;
  const int64_t byte = static_cast<int64_t>(stage % steps) * 256 + tile * 128 + (chunk % 8 ^ row_of_stage % 8) * 16;
  uint4 value{};
  if (row < rows && byte < row_bytes) value = load_l2(plain + row * row_bytes + byte);
  packed[index] = value;
}

// --- Host -----------------------------------------------------------------------------------------------------------

/// Queues a product; with a target, the one that the ranks get.
template <int kGroup, typename T>
void queue(Product<T>& product, const PushTarget* target) {
  GemmParams& p = product.params;
  if (product.M == 0) return;
  if (target != nullptr) {
    if (product.M > kMaxPushedRows || p.out_float32) {
      TVM_FFI_THROW(ValueError) << "out has " << product.M << " rows of " << (p.out_float32 ? 32 : 16)
                                << " bits, only bfloat16 of up to " << kMaxPushedRows << " rows is sent to peers";
    }
    p.push = *target;
    return dispatch<T, kGroup, End::kPeers>(p, product.tokens, product.K, product.stream);
  }
  dispatch<T, kGroup, End::kMemory>(p, product.tokens, product.K, product.stream);
}

template <typename T>
void multiply(const TensorView& x, const TensorView& weights, const TensorView* token_scale,
              const TensorView* channel_scale, const TensorView* bias, const TensorView& out,
              const PushTarget* target = nullptr, const TensorView* squares = nullptr) {
  check_rank("out", out, 2);
  Product<T> product(x, weights, channel_scale, bias, out.size(1));
  product.set_out(out);
  product.set_squares(squares);
  if (token_scale != nullptr) {
    product.params.token_scale = checked<float>("token_scale", *token_scale, {product.M});
  }
  queue<0>(product, target);
}

/// `after_silu`: the scales are those that gate_up's GEMM gives.
void multiply_grouped(const TensorView& x, const TensorView& scales, const TensorView& weights,
                      const TensorView& channel_scale, const TensorView* bias, const TensorView& out, bool after_silu,
                      const PushTarget* target = nullptr) {
  check_rank("out", out, 2);
  Product<fp8> product(x, weights, &channel_scale, bias, out.size(1));
  product.set_out(out);
  product.set_grouped_scales(scales, after_silu ? kSiluGroups : 2);
  if (after_silu && silu_group_size(product.M) == kSiluGroupSize) return queue<kSiluGroupSize>(product, target);
  queue<kGroupSize>(product, target);
}

/// (M, F) of SiLU(gate) * up.
void multiply_silu(const TensorView& x, const TensorView& weights, const TensorView* bias, const TensorView& out,
                   const TensorView* squares = nullptr) {
  check_rank("out", out, 2);
  const int64_t F = out.size(1);
  check_multiple("F", F, 32);
  Product<bf16> product(x, weights, nullptr, bias, 2 * F);
  product.set_squares(squares);
  product.params.out = checked<bf16>("out", out, {product.M, F});
  if (product.M > 0) dispatch<bf16, 0, End::kSilu>(product.params, product.tokens, product.K, product.stream);
}

/// The same of e4m3, with grouped scales. `scratch` (M, 2F) bf16 takes the product of tokens so many that the kernel does not
/// end in SiLU.
void multiply_silu_fp8(const TensorView& x, const TensorView& token_scale, const TensorView& weights,
                       const TensorView& channel_scale, const TensorView* bias, const TensorView& scratch,
                       const TensorView& out, const TensorView& scales) {
  check_rank("out", out, 2);
  const int64_t F = out.size(1);
  check_multiple("F", F, 2 * kGroupSize);
  Product<fp8> product(x, weights, &channel_scale, bias, 2 * F);
  checked<bf16>("scratch", scratch, {product.M, 2 * F});
  if (product.M > kMaxSiluGroupedTokens) {
    multiply<fp8>(x, weights, &token_scale, &channel_scale, bias, scratch);
    return silu_mul_grouped(scratch, out, scales);
  }
  GemmParams& p = product.params;
  p.out = checked<fp8>("out", out, {product.M, F});
  p.token_scale = checked<float>("token_scale", token_scale, {product.M});
  p.padded_tokens = static_cast<int>(padded_tokens(product.M));
  p.out_scale = checked<float>("scales", scales, {F / (2 * kGroupSize), kSiluGroups, p.padded_tokens});
  if (product.M == 0) return;
  dispatch_few<fp8, kMaxSiluGroupedTokens, 0, End::kSilu>(p, product.tokens, product.K, product.stream);
}

void multiply(const GemmCall& call, const TensorView& out, const PushTarget* target) {
  const TensorView* bias = call.bias.has_value() ? &*call.bias : nullptr;
  switch (call.kind) {
    case GemmKind::kBf16:
      return multiply<bf16>(call.x, call.weights, nullptr, nullptr, bias, out, target);
    case GemmKind::kFp8:
      return multiply<fp8>(call.x, call.weights, &*call.token_scale, &*call.channel_scale, bias, out, target);
    default: {
      const bool after_silu = call.kind == GemmKind::kFp8AfterSilu;
      multiply_grouped(call.x, *call.token_scale, call.weights, *call.channel_scale, bias, out, after_silu, target);
    }
  }
}

/// Makes what the GEMMs of a device share. Call once, before any capture; they must then run on one stream at a time.
void init_device(int64_t device) {
  if (device < 0 || device >= kMaxDevices) TVM_FFI_THROW(ValueError) << "device " << device << ", expected 0 to 15";
  if (workspace_of_device[device] != nullptr) return;
  int before = 0, num_sms = 0, major = 0;
  check_cuda(cudaGetDevice(&before), "cudaGetDevice");
  check_cuda(cudaSetDevice(static_cast<int>(device)), "cudaSetDevice");
  check_cuda(cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, static_cast<int>(device)), "SM count");
  check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, static_cast<int>(device)), "capability");
  if (major != 9 || num_sms < kGrid) {
    TVM_FFI_THROW(RuntimeError) << "device " << device << " has " << num_sms << " multiprocessors of capability " << major
                                << ".x; these kernels need capability 9.0 and " << kGrid;
  }
  void* memory = nullptr;
  check_cuda(cudaMalloc(&memory, kWorkspaceBytes), "cudaMalloc of the GEMM workspace");
  check_cuda(cudaMemset(memory, 0xff, kWorkspaceBytes), "cudaMemset");
  check_cuda(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  check_cuda(cudaSetDevice(before), "cudaSetDevice");
  workspace_of_device[device] = static_cast<uint8_t*>(memory);
}

template <typename T>
void pack(const TensorView& weight, const TensorView& packed) {
  const int64_t rows = weight.size(0), row_bytes = weight.size(1) * sizeof(T), steps = (row_bytes + 255) / 256;
  const int64_t stages = (rows + 63) / 64 * steps;
  check_multiple("bytes of a row", row_bytes, 16);
  launch(pack_kernel, static_cast<unsigned>(stages * (kStageBytes / 16 / 256)), 256, 0, stream_of(packed),
         reinterpret_cast<const uint8_t*>(checked<T>("weight", weight, {rows, weight.size(1)})),
         reinterpret_cast<uint4*>(checked<T>("packed", packed, {stages, 64, static_cast<int64_t>(256 / sizeof(T))})), rows,
         row_bytes, static_cast<int>(steps), static_cast<int>(stages / kGrid), static_cast<int>(stages % kGrid));
}

/// (N, K) bf16 or e4m3 as a checkpoint has it -> packed, as `packing.pack` on the host.
void pack_weight(TensorView weight, TensorView packed) {
  check_rank("weight", weight, 2);
  has_dtype<fp8>(weight) ? pack<fp8>(weight, packed) : pack<bf16>(weight, packed);
}

/// (M, K) bf16, packed bf16 -> (M, N) bf16 or float32.
void gemm(TensorView x, TensorView weights, TensorView out) {
  multiply<bf16>(x, weights, nullptr, nullptr, nullptr, out);
}

/// The same plus bias, (N,) float32.
void gemm_bias(TensorView x, TensorView weights, TensorView bias, TensorView out) {
  multiply<bf16>(x, weights, nullptr, nullptr, &bias, out);
}

/// (M, K) e4m3 with (M,) scales, packed e4m3 with (N,) scales -> (M, N) bf16 or float32.
void gemm_fp8(TensorView x, TensorView token_scale, TensorView weights, TensorView channel_scale, TensorView out) {
  multiply<fp8>(x, weights, &token_scale, &channel_scale, nullptr, out);
}

void gemm_fp8_bias(TensorView x, TensorView token_scale, TensorView weights, TensorView channel_scale, TensorView bias,
                   TensorView out) {
  multiply<fp8>(x, weights, &token_scale, &channel_scale, &bias, out);
}

/// (M, K) e4m3 with grouped scales (K / 256, 2, M rounded up to 8), packed e4m3 with (N,) scales -> (M, N) bf16 or float32.
void gemm_fp8_grouped(TensorView x, TensorView scales, TensorView weights, TensorView channel_scale, TensorView out) {
  multiply_grouped(x, scales, weights, channel_scale, nullptr, out, false);
}

void gemm_fp8_grouped_bias(TensorView x, TensorView scales, TensorView weights, TensorView channel_scale, TensorView bias,
                           TensorView out) {
  multiply_grouped(x, scales, weights, channel_scale, &bias, out, false);
}

/// The same of what `gemm_fp8_silu_mul` gives, with scales (K / 256, 8, M rounded up to 8).
void gemm_fp8_after_silu(TensorView x, TensorView scales, TensorView weights, TensorView channel_scale, TensorView out) {
  multiply_grouped(x, scales, weights, channel_scale, nullptr, out, true);
}

void gemm_fp8_after_silu_bias(TensorView x, TensorView scales, TensorView weights, TensorView channel_scale,
                              TensorView bias, TensorView out) {
  multiply_grouped(x, scales, weights, channel_scale, &bias, out, true);
}

/// (M, K) bf16, packed bf16 with gate and up interleaved (silu.cuh) -> SiLU(gate) * up (M, F) bf16.
void gemm_silu_mul(TensorView x, TensorView weights, TensorView out) { multiply_silu(x, weights, nullptr, out); }

/// The same with (2F,) float32 added to gate and up, in the order of the weight.
void gemm_silu_mul_bias(TensorView x, TensorView weights, TensorView bias, TensorView out) {
  multiply_silu(x, weights, &bias, out);
}

/// (M, K) e4m3 with (M,) scales, packed e4m3 with (2F,) scales -> (M, F) e4m3 with scales (F / 256, 8, M rounded up to 8),
/// grouped by silu_group_size(M) (grouped_scales.cuh); scratch (M, 2F) bf16.
void gemm_fp8_silu_mul(TensorView x, TensorView token_scale, TensorView weights, TensorView channel_scale,
                       TensorView scratch, TensorView out, TensorView scales) {
  multiply_silu_fp8(x, token_scale, weights, channel_scale, nullptr, scratch, out, scales);
}

void gemm_fp8_silu_mul_bias(TensorView x, TensorView token_scale, TensorView weights, TensorView channel_scale,
                            TensorView bias, TensorView scratch, TensorView out, TensorView scales) {
  multiply_silu_fp8(x, token_scale, weights, channel_scale, &bias, scratch, out, scales);
}

/// The next take a norm that is begun (gemm_norm.cu): its tokens, (M, K) bf16, and `squares` (K / 64, M rounded up to 8).
void gemm_normed(TensorView x, TensorView squares, TensorView weights, TensorView out) {
  multiply<bf16>(x, weights, nullptr, nullptr, nullptr, out, nullptr, &squares);
}

void gemm_normed_bias(TensorView x, TensorView squares, TensorView weights, TensorView bias, TensorView out) {
  multiply<bf16>(x, weights, nullptr, nullptr, &bias, out, nullptr, &squares);
}

void gemm_normed_silu_mul(TensorView x, TensorView squares, TensorView weights, TensorView out) {
  multiply_silu(x, weights, nullptr, out, &squares);
}

void gemm_normed_silu_mul_bias(TensorView x, TensorView squares, TensorView weights, TensorView bias, TensorView out) {
  multiply_silu(x, weights, &bias, out, &squares);
}

}  // namespace

uint8_t* gemm_workspace(int device) {
  if (device >= kMaxDevices || workspace_of_device[device] == nullptr) {
    TVM_FFI_THROW(RuntimeError) << "device " << device << " has no workspace: call init_device(" << device << ") first";
  }
  return workspace_of_device[device];
}

void run_gemm(const GemmCall& call, const TensorView& out) { multiply(call, out, nullptr); }

void run_gemm_of_norms(const TensorView& x, const TensorView& norms, const TensorView& weights,
                       const TensorView& channel_scale, const TensorView* bias, const TensorView& out) {
  check_rank("out", out, 2);
  Product<fp8> product(x, weights, &channel_scale, bias, out.size(1));
  product.set_out(out);
  product.set_norms(norms);
  queue<0>(product, nullptr);
}

void push_gemm(const GemmCall& call, const TensorView& out, const PushTarget& target) { multiply(call, out, &target); }

namespace {

TVM_FFI_DLL_EXPORT_TYPED_FUNC(init_device, init_device);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(pack_weight, pack_weight);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(gemm, gemm);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(gemm_bias, gemm_bias);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(gemm_fp8, gemm_fp8);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(gemm_fp8_bias, gemm_fp8_bias);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(gemm_fp8_grouped, gemm_fp8_grouped);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(gemm_fp8_grouped_bias, gemm_fp8_grouped_bias);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(gemm_fp8_after_silu, gemm_fp8_after_silu);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(gemm_fp8_after_silu_bias, gemm_fp8_after_silu_bias);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(gemm_normed, gemm_normed);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(gemm_normed_bias, gemm_normed_bias);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(gemm_normed_silu_mul, gemm_normed_silu_mul);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(gemm_normed_silu_mul_bias, gemm_normed_silu_mul_bias);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(gemm_silu_mul, gemm_silu_mul);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(gemm_silu_mul_bias, gemm_silu_mul_bias);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(gemm_fp8_silu_mul, gemm_fp8_silu_mul);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(gemm_fp8_silu_mul_bias, gemm_fp8_silu_mul_bias);

}  // namespace
}  // namespace tpserve::cuda

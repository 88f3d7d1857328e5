// Suffix decoding on the device, see suffix_rows.cuh: a block drafts for each slot, another keeps sequences that leave.
#include "speculation.cuh"
#include "suffix_rows.cuh"

namespace tpserve::cuda {
namespace {

constexpr int kThreads = 1024;
constexpr int kMaxWords = 40;  // of marks that a thread has, 160 KiB in all: texts of up to 1.3 million tokens

struct Block {
  int32_t* scratch;  // (32,), shared

  __device__ int rank() const { return static_cast<int>(threadIdx.x); }
  __device__ int size() const { return kThreads; }
  __device__ void sync() const { __syncthreads(); }
  __device__ int32_t add(int32_t* sum, int32_t value) const { return atomicAdd(sum, value); }
  __device__ int32_t max(int32_t value) const { return block_reduce(value, int32_t{0}, scratch, Max()); }
  __device__ int32_t sum(int32_t value) const { return block_reduce(value, int32_t{0}, scratch, Add()); }
};
static_assert(kThreads == 32 * 32, "each reduction is of 32 warps: no neutral value is ever taken");

Earlier earlier_of(const TensorView& tokens, const TensorView& held) {
  check_rank("earlier", tokens, 1);
  if (tokens.size(0) < 1) TVM_FFI_THROW(ValueError) << "room for " << tokens.size(0) << " earlier tokens";
  return {checked<int32_t>("earlier", tokens, {-1}), checked<int32_t>("held", held, {2}),
          static_cast<int>(tokens.size(0))};
}

/// Of a block, in front of its marks.
struct Shared {
  SuffixScratch suffix;
  int32_t reduce[32];
};

__global__ void __launch_bounds__(kThreads)
    draft_suffix_kernel(SlotState s, Earlier earlier, int num_drafts, const int32_t* decode_slots, int stride) {
  extern __shared__ __align__(16) uint8_t memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  uint32_t* const marks = reinterpret_cast<uint32_t*>(memory + sizeof(Shared));
  pdl_launch();
  pdl_wait();
  const int slot = fresh(decode_slots + static_cast<int64_t>(blockIdx.x) * stride);
  if (slot >= 0) draft_by_suffix(Block{shared.reduce}, s, earlier, slot, num_drafts, shared.suffix, marks);
}

/// All draft tokens of each slot, as its longest run of last tokens went on in `earlier` (E,) and in its own text.
void draft_suffix(TensorView tokens, TensorView num_tokens, TensorView max_len, TensorView draft_tokens,
                  TensorView earlier, TensorView held, TensorView decode_slots, int64_t stride, int64_t num_drafts) {
  const SlotState s = state_of(tokens, num_tokens, max_len, draft_tokens);
  const Earlier e = earlier_of(earlier, held);
  const int64_t batch = batch_of(decode_slots, stride);
  if (num_drafts < 1 || num_drafts > s.max_drafts) {
    TVM_FFI_THROW(ValueError) << num_drafts << " draft tokens, expected 1 to " << s.max_drafts;
  }
  const int num_words = words_of_marks(e.capacity + 1 + s.width, kThreads);
  if (num_words > kMaxWords) {
    TVM_FFI_THROW(ValueError) << "a text of " << e.capacity << " earlier and " << s.width << " own tokens, expected up to "
                              << 32 * kThreads * kMaxWords;
  }
  const size_t shared_bytes = sizeof(Shared) + sizeof(uint32_t) * kThreads * num_words;
  launch(draft_suffix_kernel, dim3(static_cast<unsigned>(batch)), kThreads, shared_bytes, stream_of(tokens), s, e,
         static_cast<int>(num_drafts), checked<int32_t>("decode_slots", decode_slots, {batch * stride}),
         static_cast<int>(stride));
}

__global__ void __launch_bounds__(kThreads) keep_suffix_kernel(SlotState s, Earlier earlier, int slot) {
  pdl_launch();
  pdl_wait();
  keep_sequence(Block{nullptr}, s, earlier, slot);
}

/// Appends the tokens of a slot whose sequence leaves to `earlier` (E,); `held`: (2,), where the next goes and how many are.
void keep_suffix(TensorView tokens, TensorView num_tokens, TensorView max_len, TensorView draft_tokens,
                 TensorView earlier, TensorView held, int64_t slot) {
  const SlotState s = state_of(tokens, num_tokens, max_len, draft_tokens);
  if (slot < 0 || slot >= tokens.size(0)) TVM_FFI_THROW(ValueError) << "slot " << slot << " of " << tokens.size(0);
  launch(keep_suffix_kernel, dim3(1), kThreads, 0, stream_of(tokens), s, earlier_of(earlier, held),
         static_cast<int>(slot));
}

TVM_FFI_DLL_EXPORT_TYPED_FUNC(draft_suffix, draft_suffix);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(keep_suffix, keep_suffix);

}  // namespace
}  // namespace tpserve::cuda

// All-reduce over peer memory, alone or fused with residual + RMSNorm (+ quantisation to e4m3), and all-gather.
//
// push_rows.cuh has the kernels that reduce rows, push_gather.cuh the one that gathers columns, push_logits.cuh the one that
// gathers what the sampler wants of logits.
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/map.h>
#include <tvm/ffi/string.h>

#include <algorithm>
#include <memory>
#include <utility>

#include "gemm.cuh"
#include "push_gather.cuh"
#include "push_logits.cuh"
#include "push_rows.cuh"

namespace tpserve::cuda {
namespace {

using tvm::ffi::Any;
using tvm::ffi::AnyView;
using tvm::ffi::Array;
using tvm::ffi::Function;
using tvm::ffi::Map;
using tvm::ffi::PackedArgs;
using tvm::ffi::String;

/// Row t of `out` is that of x if it belongs to this rank, which is t % ranks, else zeros.
__global__ void __launch_bounds__(256)
    own_rows_kernel(const uint4* x, uint4* out, int rank, int world_size, int row_vectors) {
  pdl_launch();
  pdl_wait();
  const int64_t row = blockIdx.x;
  const bool own_it = row % world_size == rank;
  for (int v = threadIdx.x; v < row_vectors; v += 256) {
    out[row * row_vectors + v] = own_it ? load_l2(x + row * row_vectors + v) : uint4{};
  }
}

/// One rank's side of a group. Its functions queue kernels on the current stream and wait for nothing.
class PushGroup {
 public:
  PushGroup(int64_t rank, const Array<int64_t>& bases, int64_t max_hidden, int64_t gather_bytes,
            int64_t one_shot_bytes, double timeout_s)
      : rank_(static_cast<int>(rank)),
        world_size_(static_cast<int>(bases.size())),
        max_hidden_(max_hidden),
        gather_bytes_(gather_bytes),
        one_shot_bytes_(one_shot_bytes),
        timeout_ns_(static_cast<uint64_t>(timeout_s * 1e9)),
        at_(workspace_of(world_size_, max_hidden, gather_bytes)) {
    for (int r = 0; r < world_size_; ++r) base_[r] = reinterpret_cast<uint8_t*>(bases[r]);
  }

  void all_reduce(const TensorView& x, const TensorView& out) const {
    ReduceParams p = params(x);
    p.out = checked<bf16>("out", out, {x.size(0), x.size(1)});
    reduce<Mode::kPlain, false>(p, x.size(0), stream_of(out));
  }

  /// `gemm`: if given, x is the scratch memory of its output, (rows, hidden), which up to kMaxPushedRows rows never see.
  void add_rms_norm(const GemmCall* gemm, const TensorView& x, const TensorView& residual, const TensorView& weight,
                    double eps, const TensorView& residual_out, const TensorView& out) const {
    ReduceParams p = params(x, residual, weight, eps, residual_out);
    p.out = checked<bf16>("out", out, {x.size(0), x.size(1)});
    multiply_and_reduce<Mode::kNorm>(gemm, x, p);
  }

  void add_rms_norm_fp8(const GemmCall* gemm, const TensorView& x, const TensorView& residual, const TensorView& weight,
                        double eps, const TensorView& residual_out, const TensorView& out, const TensorView& scale) const {
    ReduceParams p = params(x, residual, weight, eps, residual_out);
    p.quantized = checked<fp8>("out", out, {x.size(0), x.size(1)});
    p.scale = checked<float>("scale", scale, {x.size(0)});
    multiply_and_reduce<Mode::kQuantize>(gemm, x, p);
  }

  /// The residual stream as `add_rms_norm` leaves it for so many rows, whole in all of them.
  void whole_rows(const TensorView& x, const TensorView& out) const {
    ReduceParams p = params(x);
    const int64_t rows = x.size(0);
    p.out = checked<bf16>("out", out, {rows, x.size(1)});
    const bool is_whole = is_one_shot(rows, x.size(1));
    launch(own_rows_kernel, dim3(static_cast<unsigned>(rows)), 256, 0, stream_of(out),
           reinterpret_cast<const uint4*>(p.x), reinterpret_cast<uint4*>(p.out), is_whole ? 0 : rank_,
           is_whole ? 1 : world_size_, p.num_vectors);
    if (is_whole) return;
    p.x = p.out;  // in place: whoever writes a vector has read it before
    reduce<Mode::kPlain, false>(p, rows, stream_of(out));
  }

  template <typename T>
  void all_gather(const TensorView& x, const TensorView& out) const {
    check_rank("x", x, 2);
    const int64_t rows = x.size(0), row_bytes = x.size(1) * static_cast<int64_t>(sizeof(T));
    check_multiple("bytes of a row", row_bytes, 16);
    const auto* source = reinterpret_cast<const uint8_t*>(checked<T>("x", x, {rows, x.size(1)}));
    auto* target = reinterpret_cast<uint8_t*>(checked<T>("out", out, {rows, x.size(1) * world_size_}));
    if (row_bytes > gather_bytes_) {
      TVM_FFI_THROW(ValueError) << "a row of " << row_bytes << " bytes, at most " << gather_bytes_ << " were reserved";
    }
    const int64_t piece = gather_bytes_ / row_bytes;
    for (int64_t first = 0; first < rows; first += piece) {
      const int64_t count = std::min(piece, rows - first);
      GatherParams p{};
      p.x = reinterpret_cast<const uint4*>(source + first * row_bytes);
      p.out = reinterpret_cast<uint4*>(target + first * row_bytes * world_size_);
      std::copy(base_, base_ + world_size_, p.base);
      p.at = at_.gather, p.slot_bytes = static_cast<size_t>(gather_bytes_);
      p.timeout_ns = timeout_ns_;
      p.rank = rank_, p.world_size = world_size_;
      p.row_vectors = static_cast<int>(row_bytes / 16), p.count = count * row_bytes / 16;
      const int64_t blocks = std::min<int64_t>(kGatherBlocks, (p.count + kGatherThreads - 1) / kGatherThreads);
      launch(all_gather_kernel, dim3(static_cast<unsigned>(blocks)), kGatherThreads, 0, stream_of(out), p);
    }
  }

  /// (R, columns) of each rank -> (R, ranks * columns), of rows that the sampler wants whole, and the best tokens of others.
  void gather_logits(const TensorView& x, int64_t vocab_size, GreedyParams greedy, const TensorView& out,
                     const TensorView& best) const {
    const int64_t rows = x.size(0), columns = x.size(1);
    check_multiple("columns", columns, 4);
    LogitsParams p{};
    p.x = checked<float>("x", x, {rows, columns});
    p.out = checked<float>("out", out, {rows, columns * world_size_});
    p.best = reinterpret_cast<RankedToken*>(checked<int64_t>("best", best, {rows, kBestSlices}));
    std::copy(base_, base_ + world_size_, p.base);
    p.at = at_.gather, p.slot_bytes = static_cast<size_t>(gather_bytes_);
    p.timeout_ns = timeout_ns_;
    p.rank = rank_, p.world_size = world_size_;
    p.columns = static_cast<int>(columns), p.vocab_size = static_cast<int>(vocab_size);
    const int64_t piece = std::min(rows, gather_bytes_ / (columns * 4));
    if (rows > 0 && piece == 0) {
      TVM_FFI_THROW(ValueError) << "a row of " << columns * 4 << " bytes, at most " << gather_bytes_ << " were reserved";
    }
    for (int64_t first = 0; first < rows; first += piece) {
      const int64_t count = std::min(piece, rows - first);
      LogitsParams q = p;
      q.x += first * columns, q.out += first * columns * world_size_, q.best += first * kBestSlices;
      q.greedy = greedy, q.greedy.slots += first;
      q.num_rows = static_cast<int>(count);
      const int64_t slices = std::min<int64_t>({kBestSlices, columns / 4, kGatherBlocks / count});
      q.slices = static_cast<int>(std::max<int64_t>(slices, 1));
      const int64_t blocks = std::min<int64_t>(kGatherBlocks, count * q.slices);
      launch(gather_logits_kernel, dim3(static_cast<unsigned>(blocks)), kGatherThreads, 0, stream_of(out), q);
    }
  }

 private:
  ReduceParams params(const TensorView& x) const {
    check_rank("x", x, 2);
    const int64_t hidden = x.size(1);
    check_multiple("hidden", hidden, 8);
    if (hidden < 8 || hidden > max_hidden_) {
      TVM_FFI_THROW(ValueError) << "rows of " << hidden << ", this group was made for 8 to " << max_hidden_;
    }
    ReduceParams p{};
    p.x = checked<bf16>("x", x, {x.size(0), hidden});
    std::copy(base_, base_ + world_size_, p.base);
    p.at = at_;
    p.timeout_ns = timeout_ns_;
    p.rank = rank_;
    p.num_vectors = static_cast<int>(hidden / 8);
    p.row_vectors = static_cast<int>(max_hidden_ / 8);
    return p;
  }

  ReduceParams params(const TensorView& x, const TensorView& residual, const TensorView& weight, double eps,
                      const TensorView& residual_out) const {
    ReduceParams p = params(x);
    p.residual = checked<bf16>("residual", residual, {x.size(0), x.size(1)});
    p.weight = checked<float>("weight", weight, {x.size(1)});
    p.residual_out = checked<bf16>("residual_out", residual_out, {x.size(0), x.size(1)});
    p.eps = static_cast<float>(eps);
    return p;
  }

  /// By the rows of the whole call, so that all calls of a model's step agree on who holds its residual stream.
  bool is_one_shot(int64_t rows, int64_t hidden) const {
    return rows <= kOneShotRows && rows * hidden * 2 <= one_shot_bytes_;
  }

  PushTarget push_target(int64_t rows, int64_t hidden) const {
    const bool one_shot = is_one_shot(rows, hidden);
    const auto* control = reinterpret_cast<const Control*>(base_[rank_]);
    PushTarget target{};
    for (int r = 0; r < world_size_; ++r) target.base[r] = base_[r] + (one_shot ? at_.one_shot : at_.two_shot);
    target.epoch = one_shot ? &control->one_shot.epoch : &control->two_shot.epoch;
    target.rows = PushRows::of(Places{world_size_, static_cast<int>(max_hidden_ / 8)}, one_shot, rank_);
    return target;
  }

  template <Mode kMode>
  void multiply_and_reduce(const GemmCall* gemm, const TensorView& x, const ReduceParams& p) const {
    const int64_t rows = x.size(0);
    const cudaStream_t stream = stream_of(x);
    if (gemm != nullptr && rows <= kMaxPushedRows) {
      push_gemm(*gemm, x, push_target(rows, x.size(1)));
      return reduce<kMode, true>(p, rows, stream);
    }
    if (gemm != nullptr) run_gemm(*gemm, x);
    reduce<kMode, false>(p, rows, stream);
  }

  template <Mode kMode, bool kPushed>
  void reduce(ReduceParams p, int64_t rows, cudaStream_t stream) const {
    const int64_t hidden = static_cast<int64_t>(p.num_vectors) * 8;
    const bool one_shot = is_one_shot(rows, hidden);
    while (rows > 0) {
      const int64_t piece = std::min<int64_t>(rows, kPieceRows);
      switch (world_size_) {
        case 2:
          launch_piece<2, kMode, kPushed>(p, piece, one_shot, stream);
          break;
        case 4:
          launch_piece<4, kMode, kPushed>(p, piece, one_shot, stream);
          break;
        default:
          launch_piece<8, kMode, kPushed>(p, piece, one_shot, stream);
      }
      rows -= piece;
      p.x += piece * hidden;
      if (p.residual != nullptr) p.residual += piece * hidden, p.residual_out += piece * hidden;
      if (p.out != nullptr) p.out += piece * hidden;
      if (p.quantized != nullptr) p.quantized += piece * hidden, p.scale += piece;
    }
  }

  template <int kRanks, Mode kMode, bool kPushed>
  static void launch_piece(ReduceParams p, int64_t rows, bool one_shot, cudaStream_t stream) {
    p.rows = static_cast<int>(rows);
    if (one_shot) return launch_rows(one_shot_kernel<kRanks, kMode, kPushed>, rows, p.num_vectors, stream, p);
    launch_rows(two_shot_kernel<kRanks, kMode, kPushed>, (rows + kRanks - 1) / kRanks, p.num_vectors, stream, p);
  }

  const int rank_, world_size_;
  const int64_t max_hidden_, gather_bytes_, one_shot_bytes_;
  const uint64_t timeout_ns_;
  const Workspace at_;
  uint8_t* base_[kMaxRanks] = {};
};

void check_group(int64_t world_size, int64_t max_hidden, int64_t gather_bytes) {
  if (world_size != 2 && world_size != 4 && world_size != 8) {
    TVM_FFI_THROW(ValueError) << "world_size is " << world_size << ", expected 2, 4 or 8";
  }
  check_multiple("max_hidden", max_hidden, 8);
  if (max_hidden < 8 || max_hidden > kMaxThreads * kRowCluster * 8) {
    TVM_FFI_THROW(ValueError) << "max_hidden is " << max_hidden << ", expected 8 to " << kMaxThreads * kRowCluster * 8;
  }
  check_multiple("gather_bytes", gather_bytes, 16);
}

/// Bytes of each rank's workspace.
int64_t push_workspace_bytes(int64_t world_size, int64_t max_hidden, int64_t gather_bytes) {
  check_group(world_size, max_hidden, gather_bytes);
  return static_cast<int64_t>(workspace_of(world_size, max_hidden, gather_bytes).total);
}

/// Brings a new workspace of the current device into its first state; waits for it.
void push_clear(int64_t workspace, int64_t world_size, int64_t max_hidden, int64_t gather_bytes, int64_t late_address) {
  check_group(world_size, max_hidden, gather_bytes);
  const Workspace at = workspace_of(world_size, max_hidden, gather_bytes);
  auto* memory = reinterpret_cast<uint8_t*>(workspace);
  check_cuda(cudaMemset(memory, 0, at.one_shot), "cudaMemset");
  check_cuda(cudaMemset(memory + at.one_shot, 0xff, at.total - at.one_shot), "cudaMemset");
  auto* late_on_host = reinterpret_cast<unsigned*>(late_address);
  check_cuda(cudaMemcpy(&reinterpret_cast<Control*>(memory)->late_on_host, &late_on_host, sizeof late_on_host,
                        cudaMemcpyHostToDevice),
             "cudaMemcpy");
  check_cuda(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
}

TensorView tensor(const AnyView& argument) { return argument.cast<TensorView>(); }

/// The GEMM that the first arguments name, and the last `count` arguments.
std::pair<GemmCall, PackedArgs> split_call(PackedArgs args, int count) {
  const int own = args.size() - count;
  if (own < 1) TVM_FFI_THROW(TypeError) << "got " << args.size() << " arguments, expected more than " << count;
  return {GemmCall::from(args[0].cast<String>(), args.Slice(1, own)), args.Slice(own)};
}

/// The functions of one rank, for rows of up to `max_hidden`. `workspaces`: addresses by rank, as this process sees them,
/// each cleared before any call. Calls of up to `one_shot_bytes` send their rows to everybody.
Map<String, Function> push_create(int64_t rank, Array<int64_t> workspaces, int64_t max_hidden, int64_t gather_bytes,
                                  int64_t one_shot_bytes, double timeout_s) {
  check_group(static_cast<int64_t>(workspaces.size()), max_hidden, gather_bytes);
  const auto group = std::make_shared<PushGroup>(rank, workspaces, max_hidden, gather_bytes, one_shot_bytes, timeout_s);
  Map<String, Function> out;
  out.Set("all_reduce", Function::FromTyped([group](TensorView x, TensorView y) { group->all_reduce(x, y); }));
  out.Set("whole_rows", Function::FromTyped([group](TensorView x, TensorView y) { group->whole_rows(x, y); }));
  // Of float32 or bfloat16.
  out.Set("all_gather", Function::FromTyped([group](TensorView x, TensorView y) {
            has_dtype<bf16>(x) ? group->all_gather<bf16>(x, y) : group->all_gather<float>(x, y);
          }));
  // By slot: from temperature to mask_rows, as GreedyParams has them.
  out.Set("gather_logits",
          Function::FromTyped([group](TensorView x, int64_t vocab_size, TensorView slots, TensorView temperature,
                                      TensorView frequency, TensorView presence, TensorView bias_count,
                                      TensorView num_logprobs, TensorView mask_rows, TensorView out, TensorView best) {
            check_rank("x", x, 2);
            check_rank("temperature", temperature, 1);
            const int64_t num_slots = temperature.size(0);
            GreedyParams greedy{};
            greedy.slots = checked<int32_t>("slots", slots, {x.size(0)});
            greedy.temperature = checked<float>("temperature", temperature, {num_slots});
            greedy.frequency = checked<float>("frequency_penalty", frequency, {num_slots});
            greedy.presence = checked<float>("presence_penalty", presence, {num_slots});
            greedy.bias_count = checked<int32_t>("bias_count", bias_count, {num_slots});
            greedy.num_logprobs = checked<int32_t>("num_logprobs", num_logprobs, {num_slots});
            greedy.mask_rows = checked<int32_t>("mask_rows", mask_rows, {num_slots});
            greedy.num_slots = static_cast<int>(num_slots);
            group->gather_logits(x, vocab_size, greedy, out, best);
          }));
  out.Set("all_reduce_add_rms_norm",
          Function::FromTyped([group](TensorView x, TensorView residual, TensorView weight, double eps,
                                      TensorView residual_out, TensorView y) {
            group->add_rms_norm(nullptr, x, residual, weight, eps, residual_out, y);
          }));
  out.Set("all_reduce_add_rms_norm_fp8",
          Function::FromTyped([group](TensorView x, TensorView residual, TensorView weight, double eps,
                                      TensorView residual_out, TensorView y, TensorView scale) {
            group->add_rms_norm_fp8(nullptr, x, residual, weight, eps, residual_out, y, scale);
          }));
  // (name of the GEMM, its arguments without the output, residual, weight, eps, scratch, residual_out, out[, scale])
  out.Set("gemm_all_reduce_add_rms_norm", Function::FromPacked([group](PackedArgs args, Any*) {
            const auto [gemm, rest] = split_call(args, 6);
            group->add_rms_norm(&gemm, tensor(rest[3]), tensor(rest[0]), tensor(rest[1]), rest[2].cast<double>(),
                                tensor(rest[4]), tensor(rest[5]));
          }));
  out.Set("gemm_all_reduce_add_rms_norm_fp8", Function::FromPacked([group](PackedArgs args, Any*) {
            const auto [gemm, rest] = split_call(args, 7);
            group->add_rms_norm_fp8(&gemm, tensor(rest[3]), tensor(rest[0]), tensor(rest[1]), rest[2].cast<double>(),
                                    tensor(rest[4]), tensor(rest[5]), tensor(rest[6]));
          }));
  return out;
}

TVM_FFI_DLL_EXPORT_TYPED_FUNC(push_workspace_bytes, push_workspace_bytes);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(push_clear, push_clear);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(push_create, push_create);

}  // namespace
}  // namespace tpserve::cuda

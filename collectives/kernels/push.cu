// All-reduce over peer memory, alone or fused with residual + RMSNorm (+ quantisation to e4m3), and all-gather.
//
// One-shot, for few rows: every rank sends its partial sums to every other, and all add them, in rank order, so that all
// have the same bits. Two-shot: row t belongs to rank t % ranks, which alone reduces, adds its shard of the residual,
// normalises, quantises, and sends the result; a rank's residual stream is then whole only in its own rows, which the
// next call, of equally many rows, takes as it is.
//
// Of up to kMaxPushedRows rows, the GEMM before sends the partial sums itself: the reduction then starts beside it and only
// waits for data. See peer.cuh for why it may.
//
// Rows may be of any size up to the group's largest, call by call: see push_places.cuh.
//
// A row, or in a two-shot call a group of rows, one of each rank, is handled by a cluster of eight blocks, a thread has one
// vector of eight elements of each. Row statistics go through the cluster's shared memory. Measured against NCCL in benchmarks/README.md.
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/map.h>
#include <tvm/ffi/string.h>

#include <algorithm>
#include <memory>
#include <utility>

#include "gemm.cuh"
#include "peer.cuh"
#include "row_cluster.cuh"

namespace tpserve::cuda {
namespace {

using tvm::ffi::Any;
using tvm::ffi::AnyView;
using tvm::ffi::Array;
using tvm::ffi::Function;
using tvm::ffi::Map;
using tvm::ffi::PackedArgs;
using tvm::ffi::String;

constexpr int kMaxThreads = 256;
constexpr unsigned kNap_ns = 32;  // between looks for the own GEMM's sums; not tuned

enum class Mode { kPlain, kNorm, kQuantize };

struct ReduceParams {
  const bf16* x;         // (rows, hidden): this rank's partial sums, unless its GEMM sends them
  const bf16* residual;  // the same shape, unless kPlain
  const float* weight;   // (hidden,)
  bf16* residual_out;
  bf16* out;       // sums (kPlain) or normed
  fp8* quantized;  // kQuantize
  float* scale;    // (rows,)
  uint8_t* base[kMaxRanks];
  Workspace at;
  uint64_t timeout_ns;
  int rank;
  int rows;         // of this launch
  int num_vectors;  // of a row of this call
  int row_vectors;  // from row to row in the buffers
  float eps;
};

__device__ __forceinline__ Control* control_of(const ReduceParams& p) { return reinterpret_cast<Control*>(p.base[p.rank]); }

/// What the call before has left to free in `buffer`.
__device__ __forceinline__ Used used_of(const Turn* turn, unsigned buffer) {
  const volatile Used* used = &turn->used[buffer];
  return {used->rows, used->vectors};
}

/// This thread among those of its call, each with a vector of a row, or of a group of rows.
__device__ __forceinline__ Worker worker(int row, int vector) {
  return {static_cast<unsigned>(row), gridDim.x / kRowCluster, static_cast<unsigned>(vector), kRowCluster * blockDim.x};
}

struct Finished {
  uint4 values;     // kPlain, kNorm
  uint2 quantized;  // kQuantize
  float scale;
};

/// Adds the ranks' parts of one vector and the residual, and makes the output.
template <int kRanks, Mode kMode>
__device__ __forceinline__ Finished finish(const ReduceParams& p, RowStatistics& statistics, size_t at, bool present,
                                           const uint4 (&parts)[kRanks], uint4 residual, const float (&weight)[8]) {
  Finished done{};
  float sum[8], other[8];
  unpack8(parts[0], sum);
#pragma unroll
  for (int r = 1; r < kRanks; ++r) {
    unpack8(parts[r], other);
#pragma unroll
    for (int i = 0; i < 8; ++i) sum[i] += other[i];
  }
  if constexpr (kMode == Mode::kPlain) {
    done.values = pack8(sum);
    return done;
  } else {
    unpack8(residual, other);
#pragma unroll
    for (int i = 0; i < 8; ++i) sum[i] += other[i];
    const uint4 total = pack8(sum);
    if (present) reinterpret_cast<uint4*>(p.residual_out)[at] = total;
    unpack8(total, sum);  // the norm sees the residual stream as the next layer will
    float squares = 0.0f, largest = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      squares += sum[i] * sum[i];
      sum[i] *= weight[i];
      if constexpr (kMode == Mode::kQuantize) largest = fmaxf(largest, fabsf(sum[i]));
    }
    const float2 row = statistics.reduce(squares, largest);
    const float factor = rsqrtf(row.x / static_cast<float>(p.num_vectors * 8) + p.eps);
    if constexpr (kMode == Mode::kNorm) {
#pragma unroll
      for (int i = 0; i < 8; ++i) sum[i] *= factor;
      done.values = pack8(sum);
    } else {  // the norm's factor cancels in what is stored and stays in the scale
      const float most = fmaxf(row.y, 1e-12f), inverse = kFp8Max / most;
      done.quantized.x = pack4_fp8(sum[0] * inverse, sum[1] * inverse, sum[2] * inverse, sum[3] * inverse);
      done.quantized.y = pack4_fp8(sum[4] * inverse, sum[5] * inverse, sum[6] * inverse, sum[7] * inverse);
      done.scale = most * factor / kFp8Max;
    }
    return done;
  }
}

template <Mode kMode>
__device__ __forceinline__ void write(const ReduceParams& p, size_t at, int row, int vector, const Finished& done) {
  if constexpr (kMode == Mode::kQuantize) {
    reinterpret_cast<uint2*>(p.quantized)[at] = done.quantized;
    if (vector == 0) p.scale[row] = done.scale;
  } else {
    reinterpret_cast<uint4*>(p.out)[at] = done.values;
  }
}

/// Sleeps until this rank's GEMM has sent the warp's first vector, of which `own` is the place: the other ranks' GEMMs end at
/// about the same time. So while the GEMM runs a warp asks for one vector now and then, and the GEMM keeps the L2's bandwidth.
__device__ __forceinline__ void await_gemm(const ReduceParams& p, const uint4* own, bool present) {
  if (present && threadIdx.x % 32 == 0) {
    Patience patience;
    while (!has_come(load_peer(own)) && !patience.is_over(control_of(p), p.timeout_ns, p.rank)) __nanosleep(kNap_ns);
  }
  __syncwarp();
}

/// Waits for the ranks' vectors; unless a GEMM has sent them, the own one is already in `parts[0]`.
template <int kRanks, bool kPushed>
__device__ __forceinline__ void gather_parts(const ReduceParams& p, const uint4* source, size_t stride, bool present,
                                             uint4 (&parts)[kRanks]) {
  if (!present) return;
  const uint4 own = parts[0];
  Patience patience;
  while (true) {
    int late = -1;
#pragma unroll
    for (int r = 0; r < kRanks; ++r) parts[r] = !kPushed && r == p.rank ? own : load_peer(source + r * stride);
#pragma unroll
    for (int r = 0; r < kRanks; ++r) late = late < 0 && !has_come(parts[r]) ? r : late;
    if (late < 0 || patience.is_over(control_of(p), p.timeout_ns, late)) return;
  }
}

template <int kRanks, Mode kMode, bool kPushed>
__device__ __forceinline__ void one_shot(const ReduceParams& p) {
  __shared__ RowStatistics statistics;
  const int row = blockIdx.x / kRowCluster, vector = blockIdx.x % kRowCluster * blockDim.x + threadIdx.x;
  const bool present = vector < p.num_vectors;
  float weight[8] = {};
  if constexpr (kMode != Mode::kPlain) {
    statistics.init();
    if (present) load_weight(p.weight, vector, weight);
  }
  pdl_launch();
  if constexpr (!kPushed) pdl_wait();
  Turn* turn = &control_of(p)->one_shot;
  const unsigned epoch = *static_cast<volatile unsigned*>(&turn->epoch), buffer = epoch % kBuffers;
  const Places places{kRanks, p.row_vectors};
  const size_t at = static_cast<size_t>(row) * p.num_vectors + vector;
  uint4 parts[kRanks] = {}, residual{};
  if (present) {
    if constexpr (!kPushed) parts[0] = sendable(load_l2(reinterpret_cast<const uint4*>(p.x) + at));
    if constexpr (kMode != Mode::kPlain) residual = load_l2(reinterpret_cast<const uint4*>(p.residual) + at);
    if constexpr (!kPushed) {
      const size_t place = places.one_shot(buffer, p.rank, row) + vector;
#pragma unroll
      for (int i = 1; i < kRanks; ++i) {  // each rank begins with another peer
        store_peer(reinterpret_cast<uint4*>(p.base[(p.rank + i) % kRanks] + p.at.one_shot) + place, parts[0]);
      }
    }
  }
  const Worker w = worker(row, vector);
  advance(turn, epoch, {w.rows, static_cast<unsigned>(p.num_vectors)});
  uint4* mine = reinterpret_cast<uint4*>(p.base[p.rank] + p.at.one_shot);
  // While the data fly: free the buffer of the call before. Threads without a vector help, since its rows may be longer.
  const unsigned before = (epoch + 2) % kBuffers;
  free_one_shot<kRanks>(places, before, used_of(turn, before), w, [&](size_t place) {
    __stcg(mine + place, make_uint4(kEmpty, kEmpty, kEmpty, kEmpty));
  });
  if constexpr (kPushed) await_gemm(p, mine + places.one_shot(buffer, p.rank, row) + vector, present);
  const size_t stride = places.one_shot(0, 1, 0);  // from source to source
  gather_parts<kRanks, kPushed>(p, mine + places.one_shot(buffer, 0, row) + vector, stride, present, parts);
  __syncwarp();
  const Finished done = finish<kRanks, kMode>(p, statistics, at, present, parts, residual, weight);
  if (present) write<kMode>(p, at, row, vector, done);
}

/// Sends this thread's vector of a reduced row to all others; `done` becomes what they get.
template <int kRanks, Mode kMode>
__device__ __forceinline__ void send_row(const ReduceParams& p, const Places& places, unsigned buffer, int row, int vector,
                                         Finished& done) {
  const size_t place = places.reduced(buffer, row);
  if constexpr (kMode == Mode::kQuantize) {
    done.quantized = sendable(done.quantized);
    const uint32_t scale = sendable(__float_as_uint(done.scale), 0x7FFFFFFFu);
#pragma unroll
    for (int i = 1; i < kRanks; ++i) {
      uint8_t* peer = p.base[(p.rank + i) % kRanks];
      store_peer(reinterpret_cast<uint2*>(reinterpret_cast<uint4*>(peer + p.at.rows) + place) + vector, done.quantized);
      if (vector == 0) store_peer(reinterpret_cast<uint32_t*>(peer + p.at.scales) + places.scale(buffer, row), scale);
    }
  } else {
    done.values = sendable(done.values);
#pragma unroll
    for (int i = 1; i < kRanks; ++i) {
      store_peer(reinterpret_cast<uint4*>(p.base[(p.rank + i) % kRanks] + p.at.rows) + place + vector, done.values);
    }
  }
}

/// Waits for what the other ranks have made of their rows of a group; those of ranks (own + i) % ranks.
template <int kRanks, Mode kMode>
__device__ __forceinline__ void receive_rows(const ReduceParams& p, const Places& places, unsigned buffer, int first,
                                             int vector) {
  const uint4* received = reinterpret_cast<const uint4*>(p.base[p.rank] + p.at.rows);
  const uint32_t* scales = reinterpret_cast<const uint32_t*>(p.base[p.rank] + p.at.scales);
  Finished done[kRanks];
  Patience patience;
  int late = -1;
  do {
    late = -1;
#pragma unroll
    for (int i = 1; i < kRanks; ++i) {  // all asked for before any is looked at
      const int row = first + (p.rank + i) % kRanks;
      if (row >= p.rows) continue;
      const uint4* source = received + places.reduced(buffer, row);
      if constexpr (kMode == Mode::kQuantize) {
        done[i].quantized = load_peer(reinterpret_cast<const uint2*>(source) + vector);
        if (vector == 0) done[i].scale = __uint_as_float(load_peer(scales + places.scale(buffer, row)));
      } else {
        done[i].values = load_peer(source + vector);
      }
    }
#pragma unroll
    for (int i = 1; i < kRanks; ++i) {
      const int owner = (p.rank + i) % kRanks;
      if (first + owner >= p.rows) continue;
      bool come = true;
      if constexpr (kMode == Mode::kQuantize) {
        come = has_come(done[i].quantized) && (vector != 0 || has_come(__float_as_uint(done[i].scale)));
      } else {
        come = has_come(done[i].values);
      }
      if (!come) late = owner;
    }
  } while (late >= 0 && !patience.is_over(control_of(p), p.timeout_ns, late));
#pragma unroll
  for (int i = 1; i < kRanks; ++i) {
    const int row = first + (p.rank + i) % kRanks;
    if (row < p.rows) write<kMode>(p, static_cast<size_t>(row) * p.num_vectors + vector, row, vector, done[i]);
  }
}

/// A cluster takes a group of rows, one of each rank: it sends all but one, reduces that one, and receives the others.
template <int kRanks, Mode kMode, bool kPushed>
__device__ __forceinline__ void two_shot(const ReduceParams& p) {
  __shared__ RowStatistics statistics;
  const int group = blockIdx.x / kRowCluster, vector = blockIdx.x % kRowCluster * blockDim.x + threadIdx.x;
  const int first = group * kRanks, row = first + p.rank;
  const bool present = vector < p.num_vectors, own_it = row < p.rows;  // the last group may lack it, for a whole cluster
  float weight[8] = {};
  if constexpr (kMode != Mode::kPlain) {
    if (own_it) {
      statistics.init();
      if (present) load_weight(p.weight, vector, weight);
    }
  }
  pdl_launch();
  if constexpr (!kPushed) pdl_wait();
  Control* control = control_of(p);
  Turn* turn = &control->two_shot;
  const unsigned epoch = *static_cast<volatile unsigned*>(&turn->epoch), buffer = epoch % kBuffers;
  const Places places{kRanks, p.row_vectors};
  const size_t at = static_cast<size_t>(row) * p.num_vectors + vector;
  const size_t slot = places.two_shot(buffer, p.rank, row) + vector;  // the same for all rows of the group
  uint4 parts[kRanks] = {}, residual{};
  if (present) {
    if constexpr (!kPushed) {
      const uint4* x = reinterpret_cast<const uint4*>(p.x) + static_cast<size_t>(first) * p.num_vectors + vector;
#pragma unroll
      for (int i = 0; i < kRanks; ++i) {  // each rank begins with another peer
        const int holder = (p.rank + i) % kRanks;
        if (first + holder < p.rows) parts[i] = load_l2(x + static_cast<size_t>(holder) * p.num_vectors);
      }
#pragma unroll
      for (int i = 1; i < kRanks; ++i) {
        const int holder = (p.rank + i) % kRanks;
        if (first + holder < p.rows) {
          store_peer(reinterpret_cast<uint4*>(p.base[holder] + p.at.two_shot) + slot, sendable(parts[i]));
        }
      }
      parts[0] = sendable(parts[0]);
    }
    if constexpr (kMode != Mode::kPlain) {
      if (own_it) residual = load_l2(reinterpret_cast<const uint4*>(p.residual) + at);
    }
  }
  const Worker w = worker(group, vector);
  advance(turn, epoch, {static_cast<unsigned>(p.rows), static_cast<unsigned>(p.num_vectors)});
  uint4* slots = reinterpret_cast<uint4*>(p.base[p.rank] + p.at.two_shot);
  uint4* received = reinterpret_cast<uint4*>(p.base[p.rank] + p.at.rows);
  uint32_t* scales = reinterpret_cast<uint32_t*>(p.base[p.rank] + p.at.scales);
  // While the data fly: free the buffer of the call before. Threads without a vector help, since its rows may be longer.
  const unsigned before = (epoch + 2) % kBuffers;
  const uint4 empty = make_uint4(kEmpty, kEmpty, kEmpty, kEmpty);
  free_two_shot<kRanks>(
      places, p.rank, before, used_of(turn, before), w, [&](size_t place) { __stcg(slots + place, empty); },
      [&](size_t place) { __stcg(received + place, empty); }, [&](size_t place) { __stcg(scales + place, kEmpty); });
  if constexpr (kPushed) {
    // Without a row that stays here the first one that does, if any, tells the same.
    const int stays = own_it ? row : p.rank;
    await_gemm(p, slots + places.two_shot(buffer, p.rank, stays) + vector, present && stays < p.rows);
  }
  if (own_it) {
    const size_t stride = places.two_shot(0, 1, 0);  // from source to source
    gather_parts<kRanks, kPushed>(p, slots + places.two_shot(buffer, 0, row) + vector, stride, present, parts);
    __syncwarp();
    Finished done = finish<kRanks, kMode>(p, statistics, at, present, parts, residual, weight);
    if (present) {
      send_row<kRanks, kMode>(p, places, buffer, row, vector, done);
      write<kMode>(p, at, row, vector, done);
    }
  }
  if (present) receive_rows<kRanks, kMode>(p, places, buffer, first, vector);
}

/// kPushed: the kernel before is the GEMM that sends the parts (peer.cuh). It is waited for last, for the end of a kernel
/// implies the end of all before.
template <int kRanks, Mode kMode, bool kPushed>
__global__ void __launch_bounds__(kMaxThreads) one_shot_kernel(const __grid_constant__ ReduceParams p) {
  one_shot<kRanks, kMode, kPushed>(p);
  if constexpr (kPushed) pdl_wait();
}

template <int kRanks, Mode kMode, bool kPushed>
__global__ void __launch_bounds__(kMaxThreads) two_shot_kernel(const __grid_constant__ ReduceParams p) {
  two_shot<kRanks, kMode, kPushed>(p);
  if constexpr (kPushed) pdl_wait();
}

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

struct GatherParams {
  const uint4* x;
  uint4* out;
  uint8_t* base[kMaxRanks];
  size_t at, slot_bytes;  // of the buffers in a workspace, and of one source's part
  uint64_t timeout_ns;
  int rank, world_size, row_vectors;  // 16-byte vectors of a row of x
  int64_t count;                      // vectors of x
};

/// A block sends its share of the vectors to everybody, says so, waits for the others' shares and puts them in place.
__global__ void __launch_bounds__(512) all_gather_kernel(const __grid_constant__ GatherParams p) {
  pdl_launch();
  pdl_wait();
  Control* control = reinterpret_cast<Control*>(p.base[p.rank]);
  const unsigned epoch = *static_cast<volatile unsigned*>(&control->gather.epoch), buffer = epoch % 2;
  const auto slot_of = [&](int holder, int source) {
    return reinterpret_cast<uint4*>(p.base[holder] + p.at + (buffer * p.world_size + source) * p.slot_bytes);
  };
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x, row = p.row_vectors;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const auto place = [&](int source, int64_t i) { return (i / row * p.world_size + source) * row + i % row; };
  for (int64_t i = begin; i < p.count; i += step) {
    const uint4 v = load_l2(p.x + i);
    p.out[place(p.rank, i)] = v;
    for (int k = 1; k < p.world_size; ++k) store_peer(slot_of((p.rank + k) % p.world_size, p.rank) + i, v);
  }
  advance(&control->gather, epoch, {});  // its buffers need no freeing: flags tell what has come
  const unsigned target = epoch + 1;
  if (threadIdx.x < static_cast<unsigned>(p.world_size) && static_cast<int>(threadIdx.x) != p.rank) {
    const int peer = threadIdx.x;
    // The barrier in `advance` puts the block's stores before this; the fence makes them so for the peer.
    __threadfence_system();
    unsigned* flag = &reinterpret_cast<Control*>(p.base[peer])->flags[p.rank][blockIdx.x];
    asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(flag), "r"(target) : "memory");
    const unsigned* own = &control->flags[peer][blockIdx.x];
    Patience patience;
    while (true) {
      unsigned seen;
      asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(seen) : "l"(own) : "memory");
      if (static_cast<int>(seen - target) >= 0 || patience.is_over(control, p.timeout_ns, peer)) break;
    }
  }
  __syncthreads();
  for (int k = 1; k < p.world_size; ++k) {
    const int source = (p.rank + k) % p.world_size;
    const uint4* slot = slot_of(p.rank, source);
    for (int64_t i = begin; i < p.count; i += step) p.out[place(source, i)] = load_l2(slot + i);
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

  /// `gemm`: if given, x is the scratch memory of its output, (rows, hidden), which few rows never see.
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
      const int64_t blocks = std::min<int64_t>(kGatherBlocks, (p.count + 511) / 512);
      launch(all_gather_kernel, dim3(static_cast<unsigned>(blocks)), 512, 0, stream_of(out), p);
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
void push_clear(int64_t workspace, int64_t world_size, int64_t max_hidden, int64_t gather_bytes) {
  check_group(world_size, max_hidden, gather_bytes);
  const Workspace at = workspace_of(world_size, max_hidden, gather_bytes);
  auto* memory = reinterpret_cast<uint8_t*>(workspace);
  check_cuda(cudaMemset(memory, 0, at.one_shot), "cudaMemset");
  check_cuda(cudaMemset(memory + at.one_shot, 0xff, at.total - at.one_shot), "cudaMemset");
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

/// Address of the int32 word that names the rank a wait gave up on, plus one, in a workspace at `workspace`.
int64_t push_late_address(int64_t workspace) {
  return workspace + static_cast<int64_t>(offsetof(Control, late));
}

TVM_FFI_DLL_EXPORT_TYPED_FUNC(push_workspace_bytes, push_workspace_bytes);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(push_clear, push_clear);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(push_create, push_create);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(push_late_address, push_late_address);

}  // namespace
}  // namespace tpserve::cuda

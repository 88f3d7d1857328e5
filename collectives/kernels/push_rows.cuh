// The kernels that reduce rows over peer memory, alone or fused with residual + RMSNorm (+ quantisation to e4m3).
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
// vector of eight elements of each. Row statistics go through the cluster's shared memory.
#pragma once

#include "peer.cuh"
#include "row_cluster.cuh"

namespace tpserve::cuda {

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

}  // namespace tpserve::cuda

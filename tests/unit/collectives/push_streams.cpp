// Reductions over peer memory as push_rows.cuh has them, with GEMMs that send to them or do not, in streams of several ranks.
#include <cstring>

#include "streams_on_host.h"

namespace {

struct Call {
  bool is_pushed, is_one_shot;
  int mode;  // plain, norm, quantised
  int rows, vectors;
  int before;  // the call of whose rows the residual stream is, or -1
  int exponent;  // of the scale
};

std::vector<Call> calls;

float2 statistics_of_call() {
  const Call& call = calls[streams::world_of_fibers->current->block->kernel->call];
  return {call.vectors * 8.0f, 448.0f * static_cast<float>(1 << call.exponent)};
}

}  // namespace

namespace tpserve::cuda {

// row_cluster.cuh's, with clusters of two: every row has the statistics that its call says.
constexpr int kRowCluster = 2;
struct RowStatistics {
  void init() {}
  float2 reduce(float, float) { return statistics_of_call(); }
};
inline void load_weight(const float*, int, float (&out)[8]) {
  for (float& each : out) each = 1.0f;
}

}  // namespace tpserve::cuda

#include "push_rows.cuh"
#include "push_tile.cuh"

namespace {

using namespace tpserve::cuda;

constexpr int kRowVectors = 6, kProductThreads = 3, kProductBlocks = 4, kMostSlots = 64;

std::vector<std::vector<uint32_t>> slots_of_ranks;

}  // namespace

namespace {

int small(int call, int rank, int row, int element) {  // -3 to 3
  uint32_t h = static_cast<uint32_t>(call) * 2654435761u + rank * 40503u + row * 9176u + element * 1299709u;
  h ^= h >> 15, h *= 2246822519u, h ^= h >> 13;
  return static_cast<int>(h % 7) - 3;
}
constexpr int kResidual = 100;  // stands for a rank

uint4 vector_of(int call, int rank, int row, int vector) {
  float values[8];
  for (int i = 0; i < 8; ++i) values[i] = static_cast<float>(small(call, rank, row, vector * 8 + i));
  return pack8(values);
}

/// What a call of a rank reads and writes.
struct Memory {
  std::vector<uint4> x, residual, residual_out, out;
  std::vector<uint2> quantized;
  std::vector<float> scale;
};

/// Sums of tiles: neighbouring blocks share them through slots, which lie elsewhere in calls of another size.
struct Product {
  int call, rank;
  PushTarget target;
  Memory* memory;
  std::vector<PushEpoch> epochs{kProductBlocks};

  /// After `pdl_wait`: the product before, too, has ended, so that its operands and slots are free.
  void share(int block, int thread) const {
    streams::World& world = *streams::world_of_fibers;
    const int number = world.current->block->kernel->number;
    if (number >= 2 && !world.streams[rank][number - 2]->ended) world.fail("two products at once");
    const int stride = 2 + calls[call].vectors % 3;
    uint32_t* slots = slots_of_ranks[rank].data();
    if (block % 2 == 1) {
      const uint32_t tag = call;
      world.store(slots + block * stride + thread, &tag, 1, false);
      return;
    }
    uint32_t* slot = slots + (block + 1) * stride + thread;
    while (*slot == ~0u) world.yield();
    if (*slot != static_cast<uint32_t>(call)) world.fail("sums of another call");
    const uint32_t empty = ~0u;
    world.store(slot, &empty, 1, false);
  }

  void send(int block, int thread, unsigned epoch) const {
    const Call& c = calls[call];
    for (int first = (block * 2 + thread) * TileSender::kVectors; first < c.vectors;
         first += kProductBlocks * 2 * TileSender::kVectors) {
      for (int of_group = 0; of_group < kStageThreads; ++of_group) {
        const TileSender sender(of_group);
        if (first + sender.vector >= c.vectors) continue;
        for (int row = sender.token; row < c.rows; row += TileSender::kStep) {
          const uint4 values = sendable(vector_of(call, rank, row, first + sender.vector));
          sender.send(target.rows, epoch % kBuffers, first, row, [&](int holder, unsigned place) {
            store_peer(reinterpret_cast<uint4*>(target.base[holder]) + place, values);
          });
        }
      }
    }
  }

  void pushed() {
    const int block = blockIdx.x, thread = static_cast<int>(threadIdx.x) - 1;
    if (thread < 0) {
      pdl_wait();
      const unsigned epoch = PushEpoch::read(target);
      epochs[block].hand_over(epoch);
      pdl_launch();
      return;
    }
    pdl_wait();
    share(block, thread);
    send(block, thread, epochs[block].wait());
    streams::World& world = *streams::world_of_fibers;
    for (uint32_t n = world.below(16) == 0 ? world.below(400) : 0; n > 0; --n) world.yield();  // some end late
  }

  void to_memory() {
    const int block = blockIdx.x, thread = static_cast<int>(threadIdx.x) - 1;
    if (thread < 0) return pdl_launch();
    pdl_wait();
    share(block, thread);
    const Call& c = calls[call];
    for (int at = block * 2 + thread; at < c.rows * c.vectors; at += kProductBlocks * 2) {
      const uint4 values = vector_of(call, rank, at / c.vectors, at % c.vectors);
      streams::world_of_fibers->store(&memory->x[at], &values, 4, false, false);
    }
  }
};

template <int kRanks, Mode kMode, bool kPushed>
void reduce(const ReduceParams& p, bool is_one_shot) {
  is_one_shot ? one_shot_kernel<kRanks, kMode, kPushed>(p) : two_shot_kernel<kRanks, kMode, kPushed>(p);
}
template <int kRanks>
void reduce(const Call& c, const ReduceParams& p) {
  const auto with_mode = [&](auto mode) {
    constexpr Mode kMode = decltype(mode)::value;
    c.is_pushed ? reduce<kRanks, kMode, true>(p, c.is_one_shot) : reduce<kRanks, kMode, false>(p, c.is_one_shot);
  };
  if (c.mode == 0) return with_mode(std::integral_constant<Mode, Mode::kPlain>());
  if (c.mode == 1) return with_mode(std::integral_constant<Mode, Mode::kNorm>());
  with_mode(std::integral_constant<Mode, Mode::kQuantize>());
}

void make_calls(std::mt19937& random, int count) {
  calls.clear();
  std::map<std::vector<int>, std::pair<int, int>> chains;  // the last call, and how long
  for (int n = 0; n < count; ++n) {
    Call c{};
    c.is_pushed = random() % 2 == 0, c.is_one_shot = random() % 2 == 0;
    c.rows = std::vector{1, 2, 3, 5, 9}[random() % 5], c.vectors = std::vector{1, 3, 6}[random() % 3];
    c.mode = static_cast<int>(random() % 3), c.exponent = static_cast<int>(random() % 4);
    c.before = -1;
    if (c.mode != 0) {
      auto& [last, length] = chains.try_emplace({c.is_one_shot, c.rows, c.vectors}, -1, 0).first->second;
      c.before = length % 6 == 0 ? -1 : last;
      last = n, ++length;
    }
    calls.push_back(c);
  }
}

std::string check(const Call& c, int n, int num_ranks, int rank, const std::vector<std::vector<Memory>>& memory,
                  std::vector<std::vector<float>>& totals) {
  totals[n].resize(c.rows * c.vectors * 8);
  const Memory& m = memory[rank][n];
  for (int row = 0; row < c.rows; ++row) {
    for (int v = 0; v < c.vectors; ++v) {
      float sum[8];
      for (int i = 0; i < 8; ++i) {
        const int element = v * 8 + i;
        sum[i] = 0.0f;
        for (int r = 0; r < num_ranks; ++r) sum[i] += static_cast<float>(small(n, r, row, element));
        if (c.mode != 0) {
          sum[i] += c.before < 0 ? static_cast<float>(small(n, kResidual, row, element))
                                 : totals[c.before][(row * c.vectors + v) * 8 + i];
        }
        totals[n][(row * c.vectors + v) * 8 + i] = sum[i];
      }
      const int at = row * c.vectors + v;
      const uint4 expected = pack8(sum);
      const bool own = c.is_one_shot || row % num_ranks == rank;
      bool same = true;
      if (c.mode != 0 && own) same = std::memcmp(&m.residual_out[at], &expected, 16) == 0;
      if (c.mode == 2) {
        const float inverse = 1.0f / static_cast<float>(1 << c.exponent);
        const uint32_t codes[2] = {
            pack4_fp8(sum[0] * inverse, sum[1] * inverse, sum[2] * inverse, sum[3] * inverse),
            pack4_fp8(sum[4] * inverse, sum[5] * inverse, sum[6] * inverse, sum[7] * inverse)};
        same = same && std::memcmp(&m.quantized[at], codes, 8) == 0;
        same = same && m.scale[row] == static_cast<float>(1 << c.exponent);
      } else {
        same = same && std::memcmp(&m.out[at], &expected, 16) == 0;
      }
      if (same) continue;
      return "call " + std::to_string(n) + " of rank " + std::to_string(rank) + " has a wrong row " + std::to_string(row);
    }
  }
  return "";
}

template <int kRanks>
std::string simulate(unsigned seed, int count) {
  streams::World world;
  streams::world_of_fibers = &world;
  world.random.seed(seed);
  make_calls(world.random, count);
  world.streams.resize(kRanks), world.next.assign(kRanks, 0);
  const Workspace at = workspace_of(kRanks, kRowVectors * 8, 16);
  slots_of_ranks.assign(kRanks, std::vector<uint32_t>(kMostSlots, ~0u));
  std::vector<std::vector<Memory>> memory(kRanks, std::vector<Memory>(calls.size()));
  world.memories.assign(kRanks, std::vector<uint8_t>(at.gather, 0xFF));
  for (auto& bytes : world.memories) std::memset(bytes.data(), 0, at.one_shot);
  for (int rank = 0; rank < kRanks; ++rank) {
    for (int n = 0; n < count; ++n) {
      const Call& c = calls[n];
      Memory& m = memory[rank][n];
      const uint4 poison{0xABCDABCD, 0xABCDABCD, 0xABCDABCD, 0xABCDABCD};
      m.x.assign(c.rows * c.vectors, poison), m.residual_out = m.out = m.x;
      m.quantized.assign(m.x.size(), {0xABABABAB, 0xABABABAB}), m.scale.assign(c.rows, -1.0f);
      for (int i = 0; i < c.rows * c.vectors; ++i) {
        m.residual.push_back(vector_of(n, kResidual, i / c.vectors, i % c.vectors));
      }
      ReduceParams p{};
      p.x = reinterpret_cast<const bf16*>(m.x.data());
      const auto& residual = c.before < 0 ? m.residual : memory[rank][c.before].residual_out;
      p.residual = reinterpret_cast<const bf16*>(residual.data());
      p.residual_out = reinterpret_cast<bf16*>(m.residual_out.data()), p.out = reinterpret_cast<bf16*>(m.out.data());
      p.quantized = reinterpret_cast<fp8*>(m.quantized.data()), p.scale = m.scale.data();
      auto product = std::make_shared<Product>();
      product->call = n, product->rank = rank, product->memory = &m;
      for (PushEpoch& epoch : product->epochs) epoch.init();
      for (int r = 0; r < kRanks; ++r) {
        p.base[r] = world.memories[r].data();
        product->target.base[r] = p.base[r] + (c.is_one_shot ? at.one_shot : at.two_shot);
      }
      auto* control = reinterpret_cast<Control*>(p.base[rank]);
      product->target.epoch = c.is_one_shot ? &control->one_shot.epoch : &control->two_shot.epoch;
      product->target.rows = PushRows::of(Places{kRanks, kRowVectors}, c.is_one_shot, rank);
      p.at = at, p.timeout_ns = 1, p.rank = rank, p.rows = c.rows;
      p.num_vectors = c.vectors, p.row_vectors = kRowVectors, p.eps = 0.0f;
      world.queue(rank, n, kProductBlocks, kProductThreads,
                  [product, &c] { c.is_pushed ? product->pushed() : product->to_memory(); });
      const int clusters = c.is_one_shot ? c.rows : (c.rows + kRanks - 1) / kRanks;
      const int threads = (c.vectors + kRowCluster - 1) / kRowCluster;
      world.queue(rank, n, clusters * kRowCluster, threads, [p, &c] { reduce<kRanks>(c, p); });
    }
  }
  world.run();
  std::string wrong = world.wrong;
  std::vector<std::vector<float>> totals(calls.size());
  for (int n = 0; n < count && wrong.empty(); ++n) {
    for (int rank = 0; rank < kRanks && wrong.empty(); ++rank) wrong = check(calls[n], n, kRanks, rank, memory, totals);
  }
  return wrong;
}

}  // namespace

/// Returns whether something was wrong, and writes what.
extern "C" int simulate_streams(unsigned seed, int count, char* wrong, int size) {
  const std::string what = simulate<NUM_RANKS>(seed, count);
  std::strncpy(wrong, what.c_str(), size - 1);
  return !what.empty();
}

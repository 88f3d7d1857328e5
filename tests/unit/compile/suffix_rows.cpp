// The blocks of suffix_rows.cuh on the host, each with threads of its own, for test_cuda_suffix.py.
#include "suffix_rows.cuh"

#include <atomic>
#include <barrier>
#include <thread>
#include <vector>

using namespace tpserve::cuda;

namespace {

class Threads {
 public:
  Threads(int rank, std::vector<int32_t>& values, std::barrier<>& barrier)
      : rank_(rank), values_(values), barrier_(barrier) {}
  int rank() const { return rank_; }
  int size() const { return static_cast<int>(values_.size()); }
  void sync() const { barrier_.arrive_and_wait(); }
  int32_t add(int32_t* sum, int32_t value) const { return std::atomic_ref<int32_t>(*sum).fetch_add(value); }
  int32_t max(int32_t value) const {
    return reduce(value, [](int32_t a, int32_t b) { return a > b ? a : b; });
  }
  int32_t sum(int32_t value) const {
    return reduce(value, [](int32_t a, int32_t b) { return a + b; });
  }

 private:
  template <typename Op>
  int32_t reduce(int32_t value, Op op) const {
    sync();
    values_[rank_] = value;
    sync();
    int32_t result = values_[0];
    for (int i = 1; i < size(); ++i) result = op(result, values_[i]);
    return result;
  }

  int rank_;
  std::vector<int32_t>& values_;
  std::barrier<>& barrier_;
};

/// Runs `body` in every thread of a team.
template <typename Body>
void run(int num_threads, Body body) {
  std::vector<int32_t> values(num_threads);
  std::barrier barrier(num_threads);
  std::vector<std::thread> others;
  for (int rank = 1; rank < num_threads; ++rank) {
    others.emplace_back([&, rank] { body(Threads(rank, values, barrier)); });
  }
  body(Threads(0, values, barrier));
  for (std::thread& other : others) other.join();
}

}  // namespace

extern "C" {
void suffix(SlotState* s, Earlier* earlier, int batch, int num_drafts, int num_threads, const int32_t* decode_slots,
            int stride) {
  const int num_words = words_of_marks(earlier->capacity + 1 + s->width, num_threads);
  for (int b = 0; b < batch; ++b) {
    const int slot = decode_slots[b * stride];
    if (slot < 0) continue;
    SuffixScratch shared;  // with whatever stood there
    std::vector<uint32_t> marks(num_words * num_threads, 0x55555555);
    run(num_threads, [&](const Threads& team) {
      draft_by_suffix(team, *s, *earlier, slot, num_drafts, shared, marks.data());
    });
  }
}

void keep(SlotState* s, Earlier* earlier, int num_threads, int slot) {
  run(num_threads, [&](const Threads& team) { keep_sequence(team, *s, *earlier, slot); });
}
}

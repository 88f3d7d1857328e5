// What a model's ranks and those that its draft has to itself tell each other, over peer memory: before a round the draft's
// first rank sends every rank of the model its draft tokens, and after each step the model's first rank sends every rank of
// the draft where the slots are.
//
// Each rank owns a mailbox into which one other rank writes, letters in turn. A letter is whole when its number stands
// beside it; the words themselves may be anything. Who writes waits for room: it knows how many letters each reader has
// taken, for readers say so in the writer's mailbox. Both ends count on the device, one letter for each launch, and queue
// the same letters in the same order, since they follow the same plans.
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/map.h>
#include <tvm/ffi/string.h>

#include <memory>

#include "peer.cuh"
#include "speculation.cuh"

namespace tpserve::cuda {
namespace {

using tvm::ffi::Array;
using tvm::ffi::Function;
using tvm::ffi::Map;
using tvm::ffi::String;

constexpr int kLinkThreads = 256;
constexpr unsigned kLetters = 16;  // that may lie unread: more than plans are ahead of results
constexpr int kMaxReaders = 8;

struct LinkControl {
  unsigned sent, received;         // letters so far, by the owner
  unsigned late;                   // 1 + the rank that a wait gave up on
  unsigned* late_on_host;
  unsigned arrived[kLetters];      // 1 + the number of the letter that lies there; by who writes here
  unsigned taken[kMaxReaders];     // letters that each reader of the owner's has taken; by the readers
};

constexpr size_t kLettersAt = 1024;  // in a mailbox, after its control
static_assert(sizeof(LinkControl) <= kLettersAt);

size_t letter_bytes(int64_t num_words) { return (4 * static_cast<size_t>(num_words) + 15) / 16 * 16; }

__device__ __forceinline__ int32_t* letter_of(uint8_t* mailbox, unsigned number, size_t bytes) {
  return reinterpret_cast<int32_t*>(mailbox + kLettersAt + number % kLetters * bytes);
}

__device__ __forceinline__ unsigned acquire(const unsigned* p) {
  unsigned value;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(p) : "memory");
  return value;
}

__device__ __forceinline__ void release(unsigned* p, unsigned value) {
  __threadfence_system();  // what other threads of the block wrote before the barrier goes before it, too
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(p), "r"(value) : "memory");
}

struct SendParams {
  uint8_t* own;
  uint8_t* readers[kMaxReaders];
  int ranks[kMaxReaders];  // of the readers, for messages
  int num_readers;
  size_t bytes;  // of a letter
  uint64_t timeout_ns;
};

/// Sends `count` words, the i-th of which is `word(i)`, to all readers. One block.
template <typename Word>
__global__ void __launch_bounds__(kLinkThreads)
    send_letter_kernel(const __grid_constant__ SendParams p, int count, Word word) {
  pdl_launch();
  pdl_wait();
  auto* own = reinterpret_cast<LinkControl*>(p.own);
  const unsigned number = *static_cast<volatile unsigned*>(&own->sent);
  const int reader = threadIdx.x;
  if (reader < p.num_readers) {
    Patience patience;
    while (static_cast<int>(number - acquire(&own->taken[reader])) >= static_cast<int>(kLetters)) {
      if (patience.is_over(own, p.timeout_ns, p.ranks[reader])) break;
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < count; i += kLinkThreads) {
    const auto value = static_cast<uint32_t>(word(i));
    for (int r = 0; r < p.num_readers; ++r) {
      store_peer(reinterpret_cast<uint32_t*>(letter_of(p.readers[r], number, p.bytes)) + i, value);
    }
  }
  __syncthreads();
  if (reader < p.num_readers) {
    release(&reinterpret_cast<LinkControl*>(p.readers[reader])->arrived[number % kLetters], number + 1);
  }
  if (threadIdx.x == 0) *static_cast<volatile unsigned*>(&own->sent) = number + 1;
}

struct TakeParams {
  uint8_t* own;
  uint8_t* writer;
  int writer_rank;
  int place;  // the owner's among the writer's readers
  size_t bytes;
  uint64_t timeout_ns;
};

/// Waits for the next letter and hands each of `count` words on: `take(i, words)`. One block.
template <typename Take>
__global__ void __launch_bounds__(kLinkThreads)
    take_letter_kernel(const __grid_constant__ TakeParams p, int count, Take take) {
  pdl_launch();
  pdl_wait();
  auto* own = reinterpret_cast<LinkControl*>(p.own);
  const unsigned number = *static_cast<volatile unsigned*>(&own->received);
  if (threadIdx.x == 0) {
    Patience patience;
    while (static_cast<int>(acquire(&own->arrived[number % kLetters]) - (number + 1)) < 0) {
      if (patience.is_over(own, p.timeout_ns, p.writer_rank)) break;
    }
  }
  __syncthreads();
  const int32_t* words = letter_of(p.own, number, p.bytes);
  for (int i = threadIdx.x; i < count; i += kLinkThreads) take(i, words);
  __syncthreads();
  if (threadIdx.x == 0) {
    *static_cast<volatile unsigned*>(&own->received) = number + 1;
    release(&reinterpret_cast<LinkControl*>(p.writer)->taken[p.place], number + 1);
  }
}

struct DraftWord {
  SlotState s;
  __device__ int32_t operator()(int i) const { return draft_at(s, i / s.max_drafts, i % s.max_drafts); }
};

struct TakeDraft {
  SlotState s;
  __device__ void operator()(int i, const int32_t* words) const { s.draft_tokens[i] = fresh(words + i); }
};

struct ToldWord {
  SlotState s;
  __device__ int32_t operator()(int i) const { return told_word(s, i / told_words(s), i % told_words(s)); }
};

struct TakeTold {
  SlotState s;
  __device__ void operator()(int i, const int32_t* words) const {
    const int width = told_words(s), slot = i / width;
    take_told(s, slot, i % width, words + slot * width);
  }
};

/// One rank's ends: what it reads is written by one rank, what it writes is read by others, or by none.
class Link {
 public:
  Link(int64_t own, int64_t writer, int64_t writer_rank, int64_t place, const Array<int64_t>& readers,
       const Array<int64_t>& ranks, int64_t num_words, double send_timeout_s, double take_timeout_s)
      : num_words_(num_words) {
    const auto count = static_cast<int64_t>(readers.size());
    if (count > kMaxReaders || static_cast<int64_t>(ranks.size()) != count || place < 0 || place >= kMaxReaders) {
      TVM_FFI_THROW(ValueError) << count << " readers of " << ranks.size() << " ranks, place " << place
                                << ": expected up to " << kMaxReaders;
    }
    const auto nanoseconds = [](double seconds) { return static_cast<uint64_t>(seconds * 1e9); };
    auto* memory = reinterpret_cast<uint8_t*>(own);
    take_ = {memory, reinterpret_cast<uint8_t*>(writer), static_cast<int>(writer_rank), static_cast<int>(place),
             letter_bytes(num_words), nanoseconds(take_timeout_s)};
    send_ = {memory, {}, {}, static_cast<int>(count), letter_bytes(num_words), nanoseconds(send_timeout_s)};
    for (int64_t r = 0; r < count; ++r) {
      send_.readers[r] = reinterpret_cast<uint8_t*>(static_cast<int64_t>(readers[r]));
      send_.ranks[r] = static_cast<int>(ranks[r]);
    }
  }

  template <typename Word>
  void send(const SlotState& s, int64_t count, const TensorView& where) const {
    check(count);
    launch(send_letter_kernel<Word>, dim3(1), kLinkThreads, 0, stream_of(where), send_, static_cast<int>(count),
           Word{s});
  }

  template <typename Take>
  void take(const SlotState& s, int64_t count, const TensorView& where) const {
    check(count);
    launch(take_letter_kernel<Take>, dim3(1), kLinkThreads, 0, stream_of(where), take_, static_cast<int>(count),
           Take{s});
  }

 private:
  void check(int64_t count) const {
    if (count > num_words_) TVM_FFI_THROW(ValueError) << count << " words in letters of " << num_words_;
  }

  const int64_t num_words_;
  SendParams send_{};
  TakeParams take_{};
};

/// Bytes of a mailbox for letters of so many words.
int64_t link_bytes(int64_t num_words) {
  return static_cast<int64_t>(kLettersAt + kLetters * letter_bytes(num_words));
}

/// Brings a new mailbox of the current device into its first state; waits for it.
void link_clear(int64_t mailbox, int64_t num_words, int64_t late_address) {
  auto* memory = reinterpret_cast<uint8_t*>(mailbox);
  check_cuda(cudaMemset(memory, 0, static_cast<size_t>(link_bytes(num_words))), "cudaMemset");
  auto* late_on_host = reinterpret_cast<unsigned*>(late_address);
  check_cuda(cudaMemcpy(&reinterpret_cast<LinkControl*>(memory)->late_on_host, &late_on_host, sizeof late_on_host,
                        cudaMemcpyHostToDevice),
             "cudaMemcpy");
  check_cuda(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
}

/// What one rank queues, each over tokens, num_tokens, max_len and draft_tokens. Addresses of mailboxes are as this process
/// sees them, each cleared before any call; `place` is this rank's among the writer's readers.
Map<String, Function> link_create(int64_t own, int64_t writer, int64_t writer_rank, int64_t place,
                                  Array<int64_t> readers, Array<int64_t> ranks, int64_t num_words,
                                  double send_timeout_s, double take_timeout_s) {
  const auto link = std::make_shared<Link>(own, writer, writer_rank, place, readers, ranks, num_words, send_timeout_s,
                                           take_timeout_s);
  Map<String, Function> out;
  out.Set("send_drafts", Function::FromTyped([link](TensorView a, TensorView b, TensorView c, TensorView d) {
            const SlotState s = state_of(a, b, c, d);
            link->send<DraftWord>(s, d.numel(), d);
          }));
  out.Set("take_drafts", Function::FromTyped([link](TensorView a, TensorView b, TensorView c, TensorView d) {
            const SlotState s = state_of(a, b, c, d);
            link->take<TakeDraft>(s, d.numel(), d);
          }));
  out.Set("tell", Function::FromTyped([link](TensorView a, TensorView b, TensorView c, TensorView d) {
            const SlotState s = state_of(a, b, c, d);
            link->send<ToldWord>(s, b.size(0) * told_words(s), b);
          }));
  out.Set("take_told", Function::FromTyped([link](TensorView a, TensorView b, TensorView c, TensorView d) {
            const SlotState s = state_of(a, b, c, d);
            link->take<TakeTold>(s, b.size(0) * told_words(s), b);
          }));
  return out;
}

TVM_FFI_DLL_EXPORT_TYPED_FUNC(link_bytes, link_bytes);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(link_clear, link_clear);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(link_create, link_create);

}  // namespace
}  // namespace tpserve::cuda

// All-reduce and all-gather between processes of one machine through a POSIX shared-memory segment.
//
// One shot: in call s a rank copies its data into its region, publishes s, waits until every rank has published s, and
// then reads all regions itself, in rank order; so every rank computes the same bits. Regions have two halves used in
// turn. Two are enough: a rank starts call s after it saw every other rank publish s - 1, which a rank does only after
// it has finished s - 2, the last call that read the half which s overwrites.
//
//   segment:  Header | Rank 0 | Rank 1 | ... | data of rank 0: half 0, half 1 | data of rank 1: ...
//
// Waiting: a short spin, then a futex on the late rank's published number, woken by it only if somebody sleeps.
// The name is unlinked once all ranks are attached, so a killed process leaves nothing behind.
#include <fcntl.h>
#include <linux/futex.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <tvm/ffi/container/map.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/string.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <climits>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <string>

namespace tpserve {
namespace {

using tvm::ffi::Any;
using tvm::ffi::Function;
using tvm::ffi::Map;
using tvm::ffi::String;
using tvm::ffi::TensorView;

constexpr uint64_t kMagic = 0x7470736572766531;  // "tpserve1"
constexpr int kMaxRanks = 64;
constexpr int64_t kSleepSliceNs = 100'000'000;  // upper bound of one sleep: the flags are looked at again

enum class Op : int64_t { kAllReduce = 1, kAllGather = 2 };

const char* name_of(Op op) { return op == Op::kAllReduce ? "all_reduce" : "all_gather"; }

struct alignas(64) Header {
  std::atomic<uint64_t> magic;  // stored last by rank 0
  int64_t world_size, capacity;
  std::atomic<uint32_t> num_attached;
  std::atomic<uint32_t> aborted_by;  // rank + 1
};

struct Posted {
  Op op;
  int64_t bytes;
};

struct alignas(128) Rank {
  std::atomic<uint32_t> published;  // low bits of the last call number; the futex word
  std::atomic<uint32_t> num_sleeping;
  std::atomic<uint32_t> attached;
  std::atomic<uint32_t> departed;
  Posted posted[2];
};

static_assert(std::atomic<uint32_t>::is_always_lock_free && sizeof(std::atomic<uint32_t>) == 4);

int64_t now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1'000'000'000LL + t.tv_nsec;
}

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

void futex_wait(std::atomic<uint32_t>* word, uint32_t expected, int64_t ns) {
  const timespec timeout{ns / 1'000'000'000, ns % 1'000'000'000};
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(word), FUTEX_WAIT, expected, &timeout, nullptr, 0);
}

void futex_wake(std::atomic<uint32_t>* word) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(word), FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

/// Removes the file descriptor on every way out.
struct Descriptor {
  int fd = -1;
  ~Descriptor() {
    if (fd >= 0) ::close(fd);
  }
};

class Communicator {
 public:
  Communicator(std::string name, int64_t rank, int64_t world_size, int64_t capacity, double attach_timeout_s,
               double timeout_s, int64_t spin_us)
      : name_("/" + name), rank_(rank), world_size_(world_size), capacity_(capacity),
        timeout_ns_(static_cast<int64_t>(timeout_s * 1e9)), spin_ns_(spin_us * 1000) {
    if (world_size < 1 || world_size > kMaxRanks) {
      TVM_FFI_THROW(ValueError) << "world_size is " << world_size << ", expected 1 to " << kMaxRanks;
    }
    if (rank < 0 || rank >= world_size) {
      TVM_FFI_THROW(ValueError) << "rank is " << rank << ", expected 0 to " << world_size - 1;
    }
    if (capacity < 64 || capacity % 64 != 0) {
      TVM_FFI_THROW(ValueError) << "capacity_bytes is " << capacity << ", expected a positive multiple of 64";
    }
    if (timeout_ns_ <= 0) TVM_FFI_THROW(ValueError) << "timeout_s is " << timeout_s << ", expected more than 0";
    size_ = sizeof(Header) + world_size * sizeof(Rank) + world_size * 2 * capacity;
    const int64_t deadline = now_ns() + static_cast<int64_t>(attach_timeout_s * 1e9);
    if (rank == 0) {
      create();
    } else {
      attach(deadline);
    }
    try {
      meet(deadline);
    } catch (...) {
      shm_unlink(name_.c_str());
      munmap(header_, size_);
      throw;
    }
  }

  ~Communicator() { close(); }

  void all_reduce(const TensorView& x, const TensorView& out) {
    check("x", x);
    check("out", out);
    if (x.numel() != out.numel()) {
      TVM_FFI_THROW(ValueError) << "x has " << x.numel() << " elements and out " << out.numel();
    }
    const float* source = data<float>(x);
    float* target = data<float>(out);
    const int64_t total = x.numel(), step = capacity_ / static_cast<int64_t>(sizeof(float));
    Call call(*this, Op::kAllReduce, total * static_cast<int64_t>(sizeof(float)));
    for (int64_t begin = 0; begin < total; begin += step) {
      const int64_t count = std::min(step, total - begin);
      exchange(Op::kAllReduce, source + begin, count * static_cast<int64_t>(sizeof(float)));
      sum(target + begin, count);
    }
  }

  void all_gather(const TensorView& x, const TensorView& out) {
    check("x", x);
    check("out", out);
    if (x.ndim() != 2 || out.ndim() != 2 || x.size(0) != out.size(0) || x.size(1) * world_size_ != out.size(1)) {
      TVM_FFI_THROW(ValueError) << "x has shape " << x.shape() << " and out " << out.shape()
                                << ", expected (rows, columns) and (rows, " << world_size_ << " * columns)";
    }
    const float* source = data<float>(x);
    float* target = data<float>(out);
    const int64_t columns = x.size(1), total = x.numel(), step = capacity_ / static_cast<int64_t>(sizeof(float));
    Call call(*this, Op::kAllGather, total * static_cast<int64_t>(sizeof(float)));
    for (int64_t begin = 0; begin < total; begin += step) {
      const int64_t end = std::min(total, begin + step);
      exchange(Op::kAllGather, source + begin, (end - begin) * static_cast<int64_t>(sizeof(float)));
      for (int64_t r = 0; r < world_size_; ++r) {
        const float* piece = region<float>(r);
        for (int64_t i = begin; i < end;) {
          const int64_t row = i / columns, column = i % columns, count = std::min(columns - column, end - i);
          std::memcpy(target + row * columns * world_size_ + r * columns + column, piece + (i - begin),
                      static_cast<size_t>(count) * sizeof(float));
          i += count;
        }
      }
    }
  }

  /// Makes every waiter on every rank throw, and every later call. From any thread.
  void abort() {
    const std::lock_guard lock(map_mutex_);
    if (header_ == nullptr) return;
    header_->aborted_by.store(static_cast<uint32_t>(rank_ + 1));
    wake_all();
  }

  /// Leaves the group. From any thread; a call in progress on another thread throws.
  void close() {
    {
      const std::lock_guard lock(map_mutex_);
      if (header_ == nullptr) return;
      ranks_[rank_].departed.store(1);
      wake_all();
    }
    const std::lock_guard call_lock(call_mutex_);
    const std::lock_guard lock(map_mutex_);
    if (header_ == nullptr) return;
    munmap(header_, size_);
    header_ = nullptr;
  }

  Map<String, Any> stats() const {
    Map<String, Any> out;
    for (const Op op : {Op::kAllReduce, Op::kAllGather}) {
      const Totals& totals = totals_of(op);
      Map<String, Any> one;
      one.Set("calls", totals.num_calls.load());
      one.Set("bytes", totals.num_bytes.load());
      one.Set("microseconds", static_cast<double>(totals.busy_ns.load()) * 1e-3);
      out.Set(name_of(op), one);
    }
    return out;
  }

 private:
  /// One call at a time; counts it. A call that throws leaves ranks out of step, so the communicator is then broken.
  struct Call {
    Communicator& self;
    std::lock_guard<std::mutex> lock;
    Op op;
    int64_t bytes, begin;
    int exceptions;

    Call(Communicator& owner, Op kind, int64_t size)
        : self(owner),
          lock(owner.call_mutex_),
          op(kind),
          bytes(size),
          begin(now_ns()),
          exceptions(std::uncaught_exceptions()) {
      self.waited_ns_ = self.absent_ns_ = 0;
      if (self.header_ == nullptr) TVM_FFI_THROW(RuntimeError) << "communicator of rank " << self.rank_ << " is closed";
      if (self.broken_) {
        TVM_FFI_THROW(RuntimeError) << "communicator of rank " << self.rank_ << " failed in call " << self.sequence_
                                    << " and cannot be used again";
      }
    }
    ~Call() {
      if (std::uncaught_exceptions() > exceptions) self.broken_ = true;
      Totals& totals = self.totals_[static_cast<int64_t>(op) - 1];
      totals.num_calls.fetch_add(1, std::memory_order_relaxed);
      totals.num_bytes.fetch_add(bytes, std::memory_order_relaxed);
      const int64_t whole = now_ns() - begin, absent = self.absent_ns_ + absence(whole - self.waited_ns_);
      totals.busy_ns.fetch_add(whole - absent, std::memory_order_relaxed);
    }
  };

  struct Totals {
    std::atomic<int64_t> num_calls{0}, num_bytes{0}, busy_ns{0};
  };

  const Totals& totals_of(Op op) const { return totals_[static_cast<int64_t>(op) - 1]; }

  static void check(const char* name, const TensorView& t) {
    const DLDataType d = t.dtype();
    if (d.code != kDLFloat || d.bits != 32 || d.lanes != 1) {
      TVM_FFI_THROW(TypeError) << name << " has dtype code " << static_cast<int>(d.code) << " with "
                               << static_cast<int>(d.bits) << " bits, expected float32";
    }
    if (t.device().device_type != kDLCPU) {
      TVM_FFI_THROW(ValueError) << name << " is on device type " << static_cast<int>(t.device().device_type)
                                << ", expected a CPU tensor";
    }
    if (!t.IsContiguous()) TVM_FFI_THROW(ValueError) << name << " is not contiguous";
  }

  template <typename T>
  static T* data(const TensorView& t) {
    return reinterpret_cast<T*>(static_cast<char*>(t.data_ptr()) + t.byte_offset());
  }

  /// Data of a rank in the current call.
  template <typename T>
  T* region(int64_t rank) const {
    return reinterpret_cast<T*>(regions_ + (rank * 2 + static_cast<int64_t>(sequence_ % 2)) * capacity_);
  }

  void create() {
    shm_made_ = true;
    Descriptor file{shm_open(name_.c_str(), O_CREAT | O_EXCL | O_RDWR, 0600)};
    if (file.fd < 0) {
      TVM_FFI_THROW(RuntimeError) << "cannot create shared memory " << name_ << ": " << std::strerror(errno);
    }
    // Reserved now, since a full /dev/shm would otherwise kill the process at its first write.
    const int status = posix_fallocate(file.fd, 0, static_cast<off_t>(size_));
    if (status != 0) {
      shm_unlink(name_.c_str());
      TVM_FFI_THROW(RuntimeError) << "cannot reserve " << size_ << " bytes of shared memory for " << name_ << ": "
                                  << std::strerror(status) << " (enlarge /dev/shm or lower capacity_bytes)";
    }
    try {
      map(file.fd);
    } catch (...) {
      shm_unlink(name_.c_str());
      throw;
    }
    new (header_) Header{};
    for (int64_t r = 0; r < world_size_; ++r) new (ranks_ + r) Rank{};
    header_->world_size = world_size_;
    header_->capacity = capacity_;
    header_->magic.store(kMagic);
  }

  void attach(int64_t deadline) {
    while (true) {
      Descriptor file{shm_open(name_.c_str(), O_RDWR, 0600)};
      struct stat info {};
      if (file.fd < 0 && errno != ENOENT) {
        TVM_FFI_THROW(RuntimeError) << "cannot open shared memory " << name_ << ": " << std::strerror(errno);
      }
      if (file.fd >= 0 && fstat(file.fd, &info) == 0 && info.st_size > 0) {
        if (info.st_size != static_cast<off_t>(size_)) {
          TVM_FFI_THROW(ValueError) << "shared memory " << name_ << " has " << info.st_size << " bytes, rank " << rank_
                                    << " expects " << size_ << ": ranks disagree on world_size or capacity_bytes";
        }
        map(file.fd);
        break;
      }
      if (now_ns() > deadline) {
        TVM_FFI_THROW(TimeoutError) << "rank " << rank_ << " waited " << seconds() << " s for rank 0 to create " << name_;
      }
      nap();
    }
    while (header_->magic.load() != kMagic) {
      if (now_ns() > deadline) {
        shm_unlink(name_.c_str());
        munmap(header_, size_);
        TVM_FFI_THROW(TimeoutError) << "rank " << rank_ << " waited " << seconds() << " s for rank 0 to fill " << name_;
      }
      nap();
    }
  }

  void map(int fd) {
    void* address = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (address == MAP_FAILED) {
      TVM_FFI_THROW(RuntimeError) << "cannot map " << size_ << " bytes of " << name_ << ": " << std::strerror(errno);
    }
    header_ = static_cast<Header*>(address);
    ranks_ = reinterpret_cast<Rank*>(header_ + 1);
    regions_ = reinterpret_cast<char*>(ranks_ + world_size_);
  }

  /// Waits until all ranks are attached; then the name is not needed any more.
  void meet(int64_t deadline) {
    if (header_->world_size != world_size_ || header_->capacity != capacity_) {
      TVM_FFI_THROW(ValueError) << "rank " << rank_ << " has world_size " << world_size_ << " and capacity_bytes "
                                << capacity_ << ", rank 0 has " << header_->world_size << " and " << header_->capacity;
    }
    if (ranks_[rank_].attached.exchange(1) != 0) {
      TVM_FFI_THROW(ValueError) << "rank " << rank_ << " is already attached to " << name_;
    }
    header_->num_attached.fetch_add(1);
    while (header_->num_attached.load() < world_size_) {
      if (now_ns() > deadline) {
        TVM_FFI_THROW(TimeoutError) << "rank " << rank_ << " waited " << seconds() << " s for rank"
                                    << list([](const Rank& r) { return r.attached.load() == 0; }) << " to attach to "
                                    << name_;
      }
      nap();
    }
    if (shm_made_) shm_unlink(name_.c_str());
  }

  void exchange(Op op, const void* source, int64_t bytes) {
    ++sequence_;
    Rank& mine = ranks_[rank_];
    std::memcpy(region<char>(rank_), source, static_cast<size_t>(bytes));
    mine.posted[sequence_ % 2] = {op, bytes};
    // Sequentially consistent against the sleeper's increment, so that either it sees the number or we see it.
    mine.published.store(static_cast<uint32_t>(sequence_));
    if (mine.num_sleeping.load() != 0) futex_wake(&mine.published);
    const int64_t begin = now_ns();
    for (int64_t r = 0; r < world_size_; ++r) {
      if (r == rank_) continue;
      wait_for(ranks_[r], op, begin);
      const Posted& other = ranks_[r].posted[sequence_ % 2];
      if (other.op != op || other.bytes != bytes) {
        TVM_FFI_THROW(ValueError) << "call " << sequence_ << " is " << name_of(op) << " of " << bytes << " bytes on rank "
                                  << rank_ << " and " << name_of(other.op) << " of " << other.bytes
                                  << " bytes on rank " << r;
      }
    }
  }

  /// Of the time of what takes a slice at most, that in which this process did not run although it was free to: it was
  /// stopped. Such a rank has waited for nobody, and is itself the one that is late.
  static int64_t absence(int64_t ns) { return ns > 2 * kSleepSliceNs ? ns - kSleepSliceNs : 0; }

  bool has_published(const Rank& other) const {
    return static_cast<int32_t>(other.published.load(std::memory_order_acquire) - static_cast<uint32_t>(sequence_)) >= 0;
  }

  void wait_for(Rank& other, Op op, int64_t begin) {
    int64_t now = begin;
    while (!has_published(other)) {
      const int64_t before = now;
      check_flags(other, op);
      if (now - begin < spin_ns_) {
        for (int i = 0; i < 16; ++i) relax();
      } else {
        const int64_t left = begin + timeout_ns_ - now;
        if (left <= 0) {
          TVM_FFI_THROW(TimeoutError) << "rank " << rank_ << " waited " << seconds() << " s in " << name_of(op)
                                      << ", call " << sequence_ << ", for rank"
                                      << list([this](const Rank& r) { return !has_published(r); });
        }
        other.num_sleeping.fetch_add(1);
        const uint32_t seen = other.published.load();
        if (static_cast<int32_t>(seen - static_cast<uint32_t>(sequence_)) < 0) {
          futex_wait(&other.published, seen, std::min(left, kSleepSliceNs));
        }
        other.num_sleeping.fetch_sub(1);
      }
      now = now_ns();
      waited_ns_ += now - before;
      absent_ns_ += absence(now - before);
    }
  }

  void check_flags(const Rank& other, Op op) const {
    const uint32_t by = header_->aborted_by.load(std::memory_order_relaxed);
    if (by != 0) {
      TVM_FFI_THROW(RuntimeError) << name_of(op) << ", call " << sequence_ << " on rank " << rank_
                                  << ", was aborted by rank " << by - 1;
    }
    const bool self_left = ranks_[rank_].departed.load(std::memory_order_relaxed) != 0;
    if (self_left || (other.departed.load(std::memory_order_relaxed) != 0 && !has_published(other))) {
      TVM_FFI_THROW(RuntimeError) << name_of(op) << ", call " << sequence_ << " on rank " << rank_ << ": rank "
                                  << (self_left ? rank_ : &other - ranks_) << " has closed its communicator";
    }
  }

  void sum(float* __restrict out, int64_t count) const {
    const float* regions[kMaxRanks];
    for (int64_t r = 0; r < world_size_; ++r) regions[r] = region<float>(r);
    constexpr int64_t kBlock = 1024;  // stays in the first-level cache while the ranks are added one after the other
    for (int64_t begin = 0; begin < count; begin += kBlock) {
      const int64_t size = std::min(kBlock, count - begin);
      std::memcpy(out + begin, regions[0] + begin, static_cast<size_t>(size) * sizeof(float));
      for (int64_t r = 1; r < world_size_; ++r) {
        const float* __restrict piece = regions[r] + begin;
        for (int64_t i = 0; i < size; ++i) out[begin + i] += piece[i];
      }
    }
  }

  void wake_all() {
    for (int64_t r = 0; r < world_size_; ++r) futex_wake(&ranks_[r].published);
  }

  template <typename Predicate>
  std::string list(Predicate&& selects) const {
    std::string text;
    for (int64_t r = 0; r < world_size_; ++r) {
      if (r != rank_ && selects(ranks_[r])) text += (text.empty() ? " " : ", ") + std::to_string(r);
    }
    return text;
  }

  double seconds() const { return static_cast<double>(timeout_ns_) * 1e-9; }

  static void nap() {
    const timespec pause{0, 1'000'000};
    nanosleep(&pause, nullptr);
  }

  const std::string name_;
  const int64_t rank_, world_size_, capacity_, timeout_ns_, spin_ns_;
  bool shm_made_ = false;
  size_t size_ = 0;
  Header* header_ = nullptr;
  Rank* ranks_ = nullptr;
  char* regions_ = nullptr;
  std::mutex call_mutex_, map_mutex_;
  uint64_t sequence_ = 0;
  bool broken_ = false;
  int64_t waited_ns_ = 0, absent_ns_ = 0;  // of the present call: in its loops of waiting, and of all, see `absence`
  Totals totals_[2];  // by Op
};

/// The functions of one communicator. They share it; `close` ends it for all.
Map<String, Function> shm_create(String name, int64_t rank, int64_t world_size, int64_t capacity,
                                 double attach_timeout_s, double timeout_s, int64_t spin_us) {
  const auto comm =
      std::make_shared<Communicator>(name, rank, world_size, capacity, attach_timeout_s, timeout_s, spin_us);
  Map<String, Function> out;
  out.Set("all_reduce", Function::FromTyped([comm](TensorView x, TensorView y) { comm->all_reduce(x, y); }));
  out.Set("all_gather", Function::FromTyped([comm](TensorView x, TensorView y) { comm->all_gather(x, y); }));
  out.Set("abort", Function::FromTyped([comm]() { comm->abort(); }));
  out.Set("close", Function::FromTyped([comm]() { comm->close(); }));
  out.Set("stats", Function::FromTyped([comm]() { return comm->stats(); }));
  return out;
}

TVM_FFI_DLL_EXPORT_TYPED_FUNC(shm_create, shm_create);

}  // namespace
}  // namespace tpserve

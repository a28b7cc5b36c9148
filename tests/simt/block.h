// A running block, or the blocks of a cluster: threads, memory, and where they wait for each other.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <utility>
#include <vector>

#include "counters.h"
#include "fiber.h"

namespace simt {

constexpr unsigned kMaxCopies = 1024;  // cp.async of one thread in flight
// TSan takes whatever ran on one fiber for ordered, and by way of a barrier everything that ran on a block's fibers. So blocks
// share several sets of fibers, scattered: most pairs of blocks have none in common. Clusters have one set, or they were too many.
#ifdef SIMT_TSAN
constexpr unsigned kSets = 4;
#else
constexpr unsigned kSets = 1;
#endif

// memcpy and memset that no sanitizer intercepts.
inline void quiet_copy(void* to, const void* from, size_t size) {
  for (size_t i = 0; i < size; ++i) static_cast<volatile char*>(to)[i] = static_cast<const volatile char*>(from)[i];
}
inline void quiet_fill(void* to, unsigned char byte, size_t size) {
  for (size_t i = 0; i < size; ++i) static_cast<volatile unsigned char*>(to)[i] = byte;
}

std::string place(Site site);  // file:line
bool same(Site a, Site b);

// Exact size and its own allocation, so that ASan sees overruns; under TSan fresh pages, so that no block meets the
// accesses of the one before. All NaN in every floating-point type.
class SharedMemory {
 public:
  explicit SharedMemory(size_t size) : size_(size) {
    size = std::max<size_t>(size, 1);
#ifdef SIMT_TSAN
    data_ = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data_ == MAP_FAILED) __builtin_trap();
#else
    if (posix_memalign(&data_, 128, size)) __builtin_trap();
#endif
    quiet_fill(data_, 0xFF, size);
  }
  SharedMemory(SharedMemory&& other) noexcept : data_(std::exchange(other.data_, nullptr)), size_(other.size_) {}
  ~SharedMemory() {
#ifdef SIMT_TSAN
    if (data_) munmap(data_, std::max<size_t>(size_, 1));
#else
    std::free(data_);
#endif
  }
  void* data() const { return data_; }
  size_t size() const { return size_; }
  bool holds(const void* p, size_t size) const {
    const size_t offset = static_cast<const char*>(p) - static_cast<const char*>(data_);
    return offset < size_ && size <= size_ - offset;
  }

 private:
  void* data_ = nullptr;
  size_t size_;
};

struct Copy {
  void* to;
  const void* from;
  unsigned bytes;
  bool in;
  unsigned group;
};

enum class State { ready, at_barrier, at_cluster_barrier, in_collective, exited };

struct Fiber {
  void* stack_pointer;
  dim3 thread;
  unsigned slot;  // of its strand
  bool entered;
  State state;
  const char* what;  // it waits in, and where
  Site site;
  unsigned generation;             // of the barrier or the warp, which it waits to pass
  unsigned shared_calls;           // static shared memory, by order of declaration
  unsigned group, landed, issued;  // cp.async: the open group; copies landed and issued, in all
  std::vector<Copy> copies;        // ring of those in between
};

struct Lanes {
  alignas(8) unsigned char bytes[kWarp][kPayload];
};

// A point where threads wait for each other. Two of everything, by the parity of the generation: a thread that runs ahead
// to the next meeting must not touch what the others have yet to take from this one.
struct Meeting {
  unsigned arrived = 0, generation = 0;
  const char* what = nullptr;
  Site site;
  char sync[kSets][2];  // addresses that stand for the order of memory
};
struct Warp {
  unsigned alive = 0;
  Meeting meeting;
  Lanes lanes[2];
};

struct Block {
  dim3 index;
  std::vector<SharedMemory> shared;  // [0] is the dynamic one
  size_t shared_used = 0;
  Meeting barrier;
  unsigned alive = 0;
  bool read = false;  // its shared memory, by another block since the cluster met
};

// One block where a launch is not in clusters. Threads count through its blocks.
class Cluster {
 public:
  Cluster(dim3 grid, dim3 size, unsigned count, size_t shared_bytes, const std::function<void()>& body)
      : grid(grid), size(size), threads(size.x * size.y * size.z), warps_of_block((threads + kWarp - 1) / kWarp),
        shared_bytes(shared_bytes), body(body), sets(count > 1 ? 1 : kSets), blocks(count), fibers(count * threads),
        warps(count * warps_of_block), strands(count * threads * sets) {
    here.block_size = size;
    here.grid = grid;
  }
  ~Cluster() {
    SIMT_ON_TSAN(__tsan_acquire(&end_sync);)
    if (failed) strands.abandon();
  }
  bool run(uint64_t index);  // of the cluster in the grid; false: a fault ended it

  // --- called by the running thread
  [[noreturn]] void stop(const std::string& what);
  void wait(State state, const Meeting& meeting, unsigned generation);
  void arrive(Meeting& meeting, const char* what, Site site);
  Fiber& current() { return fibers[running]; }
  Block& block() { return blocks[running / threads]; }
  unsigned lane() const { return running % threads % kWarp; }
  unsigned warp_index() const { return running / threads * warps_of_block + running % threads / kWarp; }
  Warp& warp() { return warps[warp_index()]; }

  const dim3 grid, size;
  const unsigned threads, warps_of_block;
  const size_t shared_bytes;
  const std::function<void()>& body;
  const unsigned sets;
  std::vector<Block> blocks;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Strands strands;
  Meeting barrier;
  unsigned alive = 0, running = 0, set = 0;
  bool failed = false;
  char end_sync = 0;
  std::unique_ptr<Counter> counter;

 private:
  void prepare(uint64_t index);
  void resume(unsigned i);
  void yield();
  bool runnable(unsigned i) const;
  void report(const std::string& what);
  std::string waiting() const;
  static void entry();

  void* scheduler = nullptr;  // its stack pointer
  SIMT_ON_TSAN(void* scheduler_fiber = nullptr;)
  SIMT_ON_ASAN(const void* scheduler_stack = nullptr; size_t scheduler_stack_size = 0;)
};

extern thread_local constinit Cluster* t_cluster __attribute__((tls_model("initial-exec")));

}  // namespace simt

// Runs CUDA kernels on the CPU. Every CUDA thread is a fiber that runs until it meets a barrier or a warp collective;
// one OS thread runs whole blocks. What the GPU leaves undefined becomes visible: shared memory starts as NaN, a cp.async
// lands only at its wait, threads run in the order that the test chose, and what cannot be right ends the launch with a
// message. twin.h maps portable.cuh onto this.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <source_location>
#include <string>

#define SIMT_EXPORT extern "C" __attribute__((visibility("default")))

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace simt {

using Site = std::source_location;  // of the access or collective in the kernel
constexpr unsigned kWarp = 32;
constexpr size_t kPayload = 32;  // bytes a lane may give to a collective

// CUDA's error codes
constexpr int kInvalidValue = 1, kInvalidConfiguration = 9, kLaunchFailure = 719, kInvalidClusterSize = 912;

enum class Order : int { forward, reverse, random };

struct Config {
  Order order = Order::forward;
  unsigned seed = 0;     // of the random order
  unsigned workers = 1;  // OS threads
  int64_t shared_limit = 163 << 10;
  unsigned cluster = 1;  // most blocks of one
  uint64_t end_blocks = ~uint64_t{0} / 2;  // run only so many blocks (or clusters) at either end of the grid
  bool count = false;
};
extern Config config;

struct Coordinates {
  dim3 thread, block, block_size, grid;
};
extern thread_local constinit Coordinates here __attribute__((tls_model("initial-exec")));

// Runs body() in every thread of the grid; 0 or one of the codes above, with message() saying what went wrong.
int launch(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& body, unsigned cluster = 1);
const std::string& message();

// --- for running threads

// Ends the launch; message() will name the block and thread too.
[[noreturn]] void fault(const std::string& what, Site site);

unsigned lane();
void sync_threads(Site site);
void sync_warp(Site site);
void sync_cluster(Site site);

// A warp collective: all 32 lanes give up to kPayload bytes each, and read what others gave with peek.
struct Lanes;
const Lanes* exchange(const char* what, const void* mine, size_t size, Site site);
void peek(const Lanes* lanes, unsigned lane, void* value, size_t size);
void count_mma(unsigned fma);  // once a lane, as the next
void count_ldmatrix();

void* shared(size_t bytes, Site site);  // static: the k-th call of every thread gets the same memory
void* dynamic_shared();

// What p, in this block's shared memory, is in that of another block of the cluster.
const void* of_block(const void* p, unsigned bytes, unsigned rank, Site site);

enum class Space : uint8_t { global, shared };
enum class Use : uint8_t { read, write };
// Checks alignment and space of an access and counts it; `active` false: this lane sits the access out.
void access(Space space, Use use, const void* p, unsigned bytes, bool active, Site site);

void copy_async(void* shared, const void* global, unsigned bytes, bool in, Site site);
void copy_async_commit();
void copy_async_wait(unsigned pending);

}  // namespace simt

// Runs blocks: a launch spreads them over OS threads, a cluster of them switches between the fibers of its threads.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <mutex>
#include <random>
#include <thread>

#include "block.h"

namespace simt {

Config config;
thread_local constinit Coordinates here __attribute__((tls_model("initial-exec")));

thread_local constinit Cluster* t_cluster __attribute__((tls_model("initial-exec"))) = nullptr;

static std::string g_message;
static std::mutex g_mutex;

std::string place(Site site) {
  const std::string file = site.file_name();
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(site.line());
}
bool same(Site a, Site b) { return a.line() == b.line() && a.column() == b.column() && !std::strcmp(a.file_name(), b.file_name()); }

void Cluster::report(const std::string& what) {
  failed = true;
  std::lock_guard lock(g_mutex);
  const dim3 b = here.block;
  if (g_message.empty())
    g_message = what + " [block " + std::to_string(b.x) + ", " + std::to_string(b.y) + ", " + std::to_string(b.z) + "]";
}

void Cluster::stop(const std::string& what) {
  report(what + ", thread " + std::to_string(running % threads));
  yield();  // for good
  __builtin_trap();
}

void Cluster::yield() {
  SIMT_ON_ASAN(void* fake = nullptr; const bool last = current().state == State::exited || failed;
               __sanitizer_start_switch_fiber(last ? nullptr : &fake, scheduler_stack, scheduler_stack_size);)
  SIMT_ON_TSAN(__tsan_switch_to_fiber(scheduler_fiber, 1);)  // 1: the switch itself orders nothing
  simt_switch(&current().stack_pointer, scheduler);
  SIMT_ON_ASAN(__sanitizer_finish_switch_fiber(fake, nullptr, nullptr);)
}

void Cluster::resume(unsigned i) {
  Fiber& f = fibers[i];
  running = i;
  here.thread = f.thread;
  here.block = blocks[i / threads].index;
  f.state = State::ready;
  SIMT_ON_ASAN(void* fake = nullptr; __sanitizer_start_switch_fiber(&fake, strands[f.slot].bottom, Strand::kSize);)
  SIMT_ON_TSAN(__tsan_switch_to_fiber(strands[f.slot].tsan, f.entered ? 1 : 0);)  // 0: ordered after the launch
  f.entered = true;
  simt_switch(&scheduler, f.stack_pointer);
  SIMT_ON_ASAN(__sanitizer_finish_switch_fiber(fake, nullptr, nullptr);)
}

void Cluster::entry() {
  Cluster& b = *t_cluster;
  SIMT_ON_ASAN(__sanitizer_finish_switch_fiber(nullptr, &b.scheduler_stack, &b.scheduler_stack_size);)
  b.body();
  SIMT_ON_TSAN(__tsan_release(&b.end_sync);)
  Fiber& f = b.current();
  if (f.landed != f.issued) b.stop("a thread exits with cp.async in flight");
  f.state = State::exited;
  --b.warp().alive;
  const auto leave = [](Meeting& m, unsigned& alive) {
    if (--alive && m.arrived == alive) m.arrived = 0, ++m.generation;  // it no longer counts
  };
  Block& block = b.block();
  if (block.alive == 1 && block.read) b.stop("a block exits before it has met those that read its shared memory");
  leave(block.barrier, block.alive);
  leave(b.barrier, b.alive);
  b.yield();
  __builtin_trap();
}

// Whoever comes last opens the meeting and runs on.
void Cluster::arrive(Meeting& meeting, const char* what, Site site) {
  if (!meeting.arrived++) {
    meeting.what = what;
    meeting.site = site;
  } else if (!same(meeting.site, site)) {
    stop(std::string(what) + " at " + place(site) + ", where another thread is in " + meeting.what + " at " + place(meeting.site));
  }
}

void Cluster::wait(State state, const Meeting& meeting, unsigned generation) {
  Fiber& f = current();
  f.state = state;
  f.what = meeting.what;
  f.site = meeting.site;
  f.generation = generation;
  yield();
}

bool Cluster::runnable(unsigned i) const {
  const Fiber& f = fibers[i];
  switch (f.state) {
    case State::ready: return true;
    case State::at_barrier: return blocks[i / threads].barrier.generation != f.generation;
    case State::at_cluster_barrier: return barrier.generation != f.generation;
    case State::in_collective: return warps[i / threads * warps_of_block + i % threads / kWarp].meeting.generation != f.generation;
    default: return false;
  }
}

std::string Cluster::waiting() const {
  std::string text = "deadlock";
  for (unsigned i = 0, end; i < fibers.size(); i = end) {
    const Fiber& f = fibers[i];
    const auto alike = [&](const Fiber& g) { return g.state == f.state && (f.state == State::exited || same(g.site, f.site)); };
    for (end = i; end < fibers.size() && alike(fibers[end]);) ++end;
    const std::string first = std::to_string(i), last = std::to_string(end - 1);
    text += std::string(i ? "; " : ": ") + (end - i > 1 ? "threads " + first + "-" + last : "thread " + first);
    text += f.state == State::exited ? std::string(" exited") : std::string(" in ") + f.what + " at " + place(f.site);
  }
  return text;
}

void Cluster::prepare(uint64_t index) {
  alive = static_cast<unsigned>(fibers.size());
  barrier = {};
  for (Block& b : blocks) {
    const uint64_t i = index * blocks.size() + (&b - blocks.data());
    b.index = {static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y), static_cast<unsigned>(i / grid.x / grid.y)};
    b.alive = threads;
    b.barrier = {};
    b.read = false;
    b.shared.clear();
    b.shared.emplace_back(shared_bytes);
    b.shared_used = shared_bytes;
  }
  const uint64_t scattered = (index + 1) * 0x9E3779B97F4A7C15u;
  set = static_cast<unsigned>(scattered >> 56) % sets;
  const unsigned count = alive, rotation = static_cast<unsigned>((scattered >> 32) % count);
  for (unsigned w = 0; w < warps.size(); ++w) {
    warps[w].alive = std::min(kWarp, threads - w % warps_of_block * kWarp);
    warps[w].meeting = {};
  }
  for (unsigned i = 0; i < count; ++i) {
    Fiber& f = fibers[i];
    const unsigned t = i % threads;
    f.thread = {t % size.x, t / size.x % size.y, t / (size.x * size.y)};
    f.slot = set * count + (i + rotation) % count;
    f.stack_pointer = strands[f.slot].prepare(entry);
    f.entered = false;
    f.state = State::ready;
    f.shared_calls = f.group = f.landed = f.issued = 0;
  }
  if (counter) counter->start(static_cast<unsigned>(warps.size()));
}

bool Cluster::run(uint64_t index) {
  t_cluster = this;
  prepare(index);
  SIMT_ON_TSAN(scheduler_fiber = __tsan_get_current_fiber();)
  const unsigned count = static_cast<unsigned>(fibers.size());
  std::vector<unsigned> order(count);
  for (unsigned i = 0; i < count; ++i) order[i] = config.order == Order::reverse ? count - 1 - i : i;
  std::mt19937 random(static_cast<unsigned>(config.seed + index * 7919));
  for (bool progress = true; alive && !failed;) {
    if (!progress) {
      report(waiting());
      break;
    }
    if (config.order == Order::random) std::shuffle(order.begin(), order.end(), random);
    progress = false;
    for (unsigned i : order) {
      if (failed || !runnable(i)) continue;
      progress = true;
      resume(i);
    }
  }
  if (counter)
    for (unsigned w = 0; w < warps.size(); ++w) counter->meet(w);
  t_cluster = nullptr;
  return !failed;
}

const std::string& message() { return g_message; }

int launch(dim3 grid, dim3 size, size_t shared_bytes, const std::function<void()>& body, unsigned cluster) {
  g_message.clear();
  const uint64_t threads = uint64_t{size.x} * size.y * size.z, blocks = uint64_t{grid.x} * grid.y * grid.z;
  const bool bad_grid = !blocks || grid.x > 0x7FFFFFFF || grid.y > 65535 || grid.z > 65535;
  if (bad_grid || !threads || threads > 1024 || size.z > 64) {
    const auto text = [](dim3 d) { return std::to_string(d.x) + " x " + std::to_string(d.y) + " x " + std::to_string(d.z); };
    g_message = "invalid configuration: grid " + text(grid) + ", block " + text(size);
    return kInvalidConfiguration;
  }
  if (static_cast<int64_t>(shared_bytes) > config.shared_limit) {
    g_message = "dynamic shared memory of " + std::to_string(shared_bytes) + " bytes, the limit is " + std::to_string(config.shared_limit);
    return kInvalidValue;
  }
  if (cluster > 1 && (cluster > config.cluster || grid.x % cluster)) {
    g_message = "clusters of " + std::to_string(cluster) + " blocks in a grid of " + std::to_string(grid.x) + ", the limit is " +
                std::to_string(config.cluster);
    return kInvalidClusterSize;
  }
  const uint64_t clusters = blocks / cluster, ends = std::min(clusters, config.end_blocks);
  std::atomic<uint64_t> next{0};
  std::atomic<bool> failed{false};
  LaunchCount count;
  count.grid = grid, count.block = size, count.shared_bytes = shared_bytes;
  const auto work = [&] {
    Cluster running(grid, size, cluster, shared_bytes, body);
    if (config.count) running.counter = std::make_unique<Counter>();
    for (uint64_t i; !failed && (i = next++) < std::min(2 * ends, clusters);)
      if (!running.run(i < ends ? i : clusters - std::min(2 * ends, clusters) + i)) failed = true;
    std::lock_guard lock(g_mutex);
    if (running.counter) count.merge(running.counter->total);
  };
  std::vector<std::thread> others;
  for (unsigned i = 1; i < config.workers && i < blocks; ++i) others.emplace_back(work);
  work();
  for (std::thread& t : others) t.join();
  if (config.count) publish(std::move(count));
  return failed ? kLaunchFailure : 0;
}

}  // namespace simt

SIMT_EXPORT void simt_configure(int order, unsigned seed, unsigned workers, int64_t shared_limit, unsigned cluster, uint64_t end_blocks, int count) {
  simt::config = {static_cast<simt::Order>(order), seed, workers, shared_limit, cluster, end_blocks, count != 0};
}
SIMT_EXPORT const char* simt_message() { return simt::message().c_str(); }
SIMT_EXPORT int64_t simt_shared_limit() { return simt::config.shared_limit; }
SIMT_EXPORT int64_t simt_cluster_limit() { return simt::config.cluster; }

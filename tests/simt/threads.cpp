// What running threads call. Like the engine without a sanitizer: threads hand each other values behind its back, and it is
// told which of that orders memory.
#include <algorithm>

#include "block.h"

namespace simt {

void fault(const std::string& what, Site site) { t_cluster->stop(what + " at " + place(site)); }

unsigned lane() { return t_cluster->lane(); }

void sync_threads(Site site) {
  Cluster& b = *t_cluster;
  Meeting& m = b.block().barrier;
  const unsigned generation = m.generation;
  SIMT_ON_TSAN(__tsan_release(&m.sync[b.set][generation & 1]);)
  b.arrive(m, "sync_threads", site);
  if (m.arrived == b.block().alive) {
    if (b.counter)
      for (unsigned w = 0, first = b.running / b.threads * b.warps_of_block; w < b.warps_of_block; ++w) b.counter->meet(first + w);
    m.arrived = 0;
    ++m.generation;
  } else {
    b.wait(State::at_barrier, m, generation);
  }
  SIMT_ON_TSAN(__tsan_acquire(&m.sync[b.set][generation & 1]);)
}

void sync_cluster(Site site) {
  Cluster& b = *t_cluster;
  Meeting& m = b.barrier;
  const unsigned generation = m.generation;
  SIMT_ON_TSAN(__tsan_release(&m.sync[b.set][generation & 1]);)
  b.arrive(m, "sync_cluster", site);
  if (m.arrived == b.alive) {
    if (b.counter)
      for (unsigned w = 0; w < b.warps.size(); ++w) b.counter->meet(w);
    for (Block& block : b.blocks) block.read = false;
    m.arrived = 0;
    ++m.generation;
  } else {
    b.wait(State::at_cluster_barrier, m, generation);
  }
  SIMT_ON_TSAN(__tsan_acquire(&m.sync[b.set][generation & 1]);)
}

const void* of_block(const void* p, unsigned bytes, unsigned rank, Site site) {
  Cluster& b = *t_cluster;
  if (rank >= b.blocks.size()) fault("block " + std::to_string(rank) + " of a cluster of " + std::to_string(b.blocks.size()), site);
  const auto& mine = b.block().shared;
  const auto it = std::find_if(mine.begin(), mine.end(), [&](const SharedMemory& m) { return m.holds(p, bytes); });
  if (it == mine.end()) fault("load outside of shared memory", site);
  Block& other = b.blocks[rank];
  const size_t which = it - mine.begin();
  if (!other.alive) fault("load from a block that has exited", site);
  if (which >= other.shared.size()) fault("load from a block that has yet to start", site);
  other.read |= &other != &b.block();
  const ptrdiff_t offset = static_cast<const char*>(p) - static_cast<const char*>(it->data());
  const void* there = static_cast<const char*>(other.shared[which].data()) + offset;
  if (b.counter) b.counter->record(b.warp_index(), lane(), Space::shared, Use::read, there, bytes, site);
  return there;
}

const Lanes* exchange(const char* what, const void* mine, size_t size, Site site) {
  Cluster& b = *t_cluster;
  Warp& w = b.warp();
  Meeting& m = w.meeting;
  if (w.alive != kWarp)
    fault(std::string(what) + " needs 32 lanes, of which " + std::to_string(kWarp - w.alive) + " exited or do not exist", site);
  if (size > kPayload) fault(std::string(what) + " gives too many bytes", site);
  const unsigned generation = m.generation;
  Lanes& lanes = w.lanes[generation & 1];
  b.arrive(m, what, site);
  quiet_copy(lanes.bytes[lane()], mine, size);
  if (m.arrived == kWarp) {
    if (b.counter) b.counter->meet(b.warp_index());
    m.arrived = 0;
    ++m.generation;
  } else {
    b.wait(State::in_collective, m, generation);
  }
  return &lanes;
}

void peek(const Lanes* lanes, unsigned lane, void* value, size_t size) { quiet_copy(value, lanes->bytes[lane], size); }

void sync_warp(Site site) {
  SIMT_ON_TSAN(Meeting& m = t_cluster->warp().meeting; char* sync = &m.sync[t_cluster->set][m.generation & 1]; __tsan_release(sync);)
  exchange("sync_warp", nullptr, 0, site);
  SIMT_ON_TSAN(__tsan_acquire(sync);)
}

void count_mma(unsigned fma) {
  if (Counter* counter = t_cluster->counter.get(); counter && lane() == 0) ++counter->total.mma, counter->total.mma_fma += fma;
}
void count_ldmatrix() {
  if (Counter* counter = t_cluster->counter.get(); counter && lane() == 0) ++counter->total.ldmatrix;
}

void* shared(size_t bytes, Site site) {
  Block& b = t_cluster->block();
  const unsigned call = ++t_cluster->current().shared_calls;
  if (call == b.shared.size()) {
    b.shared.emplace_back(bytes);
    b.shared_used += bytes;
    const std::string used = std::to_string(b.shared_used), limit = std::to_string(config.shared_limit);
    if (b.shared_used > static_cast<size_t>(config.shared_limit))
      fault("static and dynamic shared memory together take " + used + " bytes of " + limit, site);
  }
  if (b.shared[call].size() != bytes) fault("FC_SHARED reached in different orders by threads", site);
  return b.shared[call].data();
}
void* dynamic_shared() { return t_cluster->block().shared[0].data(); }

void access(Space space, Use use, const void* p, unsigned bytes, bool active, Site site) {
  Cluster& b = *t_cluster;
  if (active) {
    const char* what = use == Use::read ? "load" : "store";
    if (reinterpret_cast<uintptr_t>(p) % bytes) fault("misaligned " + std::to_string(bytes) + "-byte " + what, site);
    const auto& mine = b.block().shared;
    const bool inside = std::any_of(mine.begin(), mine.end(), [&](const SharedMemory& m) { return m.holds(p, bytes); });
    if (inside != (space == Space::shared))
      fault(std::string(what) + (inside ? " of shared memory as global" : " outside of shared memory"), site);
  }
  if (b.counter) b.counter->record(b.warp_index(), lane(), space, use, p, active ? bytes : 0, site);
}

void copy_async(void* to, const void* from, unsigned bytes, bool in, Site site) {
  Fiber& f = t_cluster->current();
  access(Space::shared, Use::write, to, bytes, true, site);
  access(Space::global, Use::read, from, bytes, in, site);
  f.copies.resize(kMaxCopies);  // most kernels need none
  if (f.issued - f.landed == kMaxCopies) fault("too many cp.async in flight", site);
  f.copies[f.issued++ % kMaxCopies] = {to, from, bytes, in, f.group};
}
void copy_async_commit() { ++t_cluster->current().group; }
void copy_async_wait(unsigned pending) {
  Fiber& f = t_cluster->current();
  for (; f.landed != f.issued; ++f.landed) {
    const Copy& c = f.copies[f.landed % kMaxCopies];
    if (c.group + pending >= f.group) break;
    SIMT_ON_TSAN(if (c.in) __tsan_read_range(const_cast<void*>(c.from), c.bytes); __tsan_write_range(c.to, c.bytes);)
    if (c.in)
      quiet_copy(c.to, c.from, c.bytes);
    else
      quiet_fill(c.to, 0, c.bytes);
  }
}

}  // namespace simt

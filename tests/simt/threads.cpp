// What running threads call. Like the engine without a sanitizer: threads hand each other values behind its back, and it is
// told which of that orders memory.
#include <algorithm>

#include "block.h"

namespace simt {

void fault(const std::string& what, Site site) { t_block->stop(what + " at " + place(site)); }

unsigned lane() { return t_block->running % kWarp; }

void sync_threads(Site site) {
  Block& b = *t_block;
  Meeting& m = b.barrier;
  const unsigned generation = m.generation;
  SIMT_ON_TSAN(__tsan_release(&m.sync[b.set][generation & 1]);)
  b.arrive(m, "sync_threads", site);
  if (m.arrived == b.alive) {
    if (b.counter)
      for (unsigned w = 0; w < b.warps.size(); ++w) b.counter->meet(w);
    m.arrived = 0;
    ++m.generation;
  } else {
    b.wait(State::at_barrier, m, generation);
  }
  SIMT_ON_TSAN(__tsan_acquire(&m.sync[b.set][generation & 1]);)
}

const Lanes* exchange(const char* what, const void* mine, size_t size, Site site) {
  Block& b = *t_block;
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
    if (b.counter) b.counter->meet(b.running / kWarp);
    m.arrived = 0;
    ++m.generation;
  } else {
    b.wait(State::in_collective, m, generation);
  }
  return &lanes;
}

void peek(const Lanes* lanes, unsigned lane, void* value, size_t size) { quiet_copy(value, lanes->bytes[lane], size); }

void sync_warp(Site site) {
  SIMT_ON_TSAN(Meeting& m = t_block->warp().meeting; char* sync = &m.sync[t_block->set][m.generation & 1]; __tsan_release(sync);)
  exchange("sync_warp", nullptr, 0, site);
  SIMT_ON_TSAN(__tsan_acquire(sync);)
}

void count_instruction(bool mma) {
  Block& b = *t_block;
  if (b.counter && lane() == 0) ++(mma ? b.counter->total.mma : b.counter->total.ldmatrix);
}

void* shared(size_t bytes, Site site) {
  Block& b = *t_block;
  const unsigned call = ++b.current().shared_calls;
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
void* dynamic_shared() { return t_block->shared[0].data(); }

void access(Space space, Use use, const void* p, unsigned bytes, bool active, Site site) {
  Block& b = *t_block;
  if (active) {
    const char* what = use == Use::read ? "load" : "store";
    if (reinterpret_cast<uintptr_t>(p) % bytes) fault("misaligned " + std::to_string(bytes) + "-byte " + what, site);
    const bool inside = std::any_of(b.shared.begin(), b.shared.end(), [&](const SharedMemory& m) { return m.holds(p, bytes); });
    if (inside != (space == Space::shared))
      fault(std::string(what) + (inside ? " of shared memory as global" : " outside of shared memory"), site);
  }
  if (b.counter) b.counter->record(b.running / kWarp, lane(), space, use, p, active ? bytes : 0, site);
}

void copy_async(void* to, const void* from, unsigned bytes, bool in, Site site) {
  Fiber& f = t_block->current();
  access(Space::shared, Use::write, to, bytes, true, site);
  access(Space::global, Use::read, from, bytes, in, site);
  if (f.issued - f.landed == kMaxCopies) fault("too many cp.async in flight", site);
  f.copies[f.issued++ % kMaxCopies] = {to, from, bytes, in, f.group};
}
void copy_async_commit() { ++t_block->current().group; }
void copy_async_wait(unsigned pending) {
  Fiber& f = t_block->current();
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

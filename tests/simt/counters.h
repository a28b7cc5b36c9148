// Counts what the memory system would see of the accesses that go through portable.cuh, one warp access at a time: the
// n-th execution of a source line by the lanes of a warp since they last met counts as one access.
#pragma once

#include <cstdint>
#include <unordered_map>
#include <vector>

#include "simt.h"

namespace simt {

constexpr uint64_t kSector = 32, kBank = 4, kBanks = 32;

// What one source line did in one launch.
struct LineCount {
  Site site;
  Space space;
  Use use;
  uint64_t accesses = 0;    // by warps
  uint64_t sectors = 0;     // global: distinct sectors of each access, summed
  uint64_t wavefronts = 0;  // shared: passes that bank conflicts make of them
  uint64_t ideal = 0;       // shared: passes without conflicts
};

struct LaunchCount {
  dim3 grid, block;
  uint64_t shared_bytes = 0, mma = 0, mma_fma = 0, ldmatrix = 0;
  std::unordered_map<uint64_t, uint64_t> sectors[2];  // by Use: how many warp accesses touched each sector
  std::unordered_map<uint64_t, LineCount> lines;      // by site, space and use

  void merge(const LaunchCount& other);
};

// Of one OS thread: collects the accesses of lanes until the warp meets, then counts them.
class Counter {
 public:
  void start(unsigned warps);  // of a block
  void record(unsigned warp, unsigned lane, Space space, Use use, const void* p, unsigned bytes, Site site);
  void meet(unsigned warp);  // the lanes of the warp are together again
  LaunchCount total;

 private:
  struct Access {
    uint64_t address[kWarp];
    unsigned bytes[kWarp];  // 0: the lane sat it out
  };
  struct Line {
    Site site;
    Space space;
    Use use;
    unsigned executed[kWarp] = {};  // by lane, since the warp met
    std::vector<Access> accesses;
  };
  void count(const Line& line, const Access& access);
  std::vector<std::unordered_map<uint64_t, Line>> open_;  // by warp
};

// Passes of one warp access through shared memory: lanes of 4 bytes or less go 32 at a time, of 8 bytes 16, of 16 bytes
// 8; each group takes as many passes as the fullest bank holds different words.
struct Passes {
  uint64_t wavefronts = 0, ideal = 0;
};
Passes shared_passes(const uint64_t (&address)[kWarp], const unsigned (&bytes)[kWarp]);

void publish(LaunchCount&& launch);  // for Python: see the extern "C" functions of counters.cpp

}  // namespace simt

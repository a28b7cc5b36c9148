#include "counters.h"

#include <algorithm>
#include <bit>
#include <cstdio>

namespace simt {

static uint64_t key_of(Site site, Space space, Use use) {
  static_assert(sizeof(Site) == 8);  // the address of a record that the compiler keeps once a call
  return std::bit_cast<uint64_t>(site) * 4 + static_cast<uint64_t>(space) * 2 + static_cast<uint64_t>(use);
}

void LaunchCount::merge(const LaunchCount& other) {
  mma += other.mma;
  mma_fma += other.mma_fma;
  ldmatrix += other.ldmatrix;
  for (int use = 0; use < 2; ++use)
    for (const auto& [sector, hits] : other.sectors[use]) sectors[use][sector] += hits;
  for (const auto& [key, line] : other.lines) {
    LineCount& sum = lines.try_emplace(key, LineCount{line.site, line.space, line.use}).first->second;
    sum.accesses += line.accesses;
    sum.sectors += line.sectors;
    sum.wavefronts += line.wavefronts;
    sum.ideal += line.ideal;
  }
}

void Counter::start(unsigned warps) {
  open_.clear();
  open_.resize(warps);
}

void Counter::record(unsigned warp, unsigned lane, Space space, Use use, const void* p, unsigned bytes, Site site) {
  Line& line = open_[warp].try_emplace(key_of(site, space, use), Line{site, space, use, {}, {}}).first->second;
  const unsigned nth = line.executed[lane]++;
  if (nth == line.accesses.size()) line.accesses.push_back({});
  line.accesses[nth].address[lane] = reinterpret_cast<uint64_t>(p);
  line.accesses[nth].bytes[lane] = bytes;
}

void Counter::meet(unsigned warp) {
  for (auto& [key, line] : open_[warp]) {
    for (const Access& access : line.accesses) count(line, access);
    line.accesses.clear();
    std::fill_n(line.executed, kWarp, 0u);
  }
}

void Counter::count(const Line& line, const Access& access) {
  if (std::none_of(access.bytes, access.bytes + kWarp, [](unsigned n) { return n; })) return;
  const uint64_t key = key_of(line.site, line.space, line.use);
  LineCount& sum = total.lines.try_emplace(key, LineCount{line.site, line.space, line.use}).first->second;
  ++sum.accesses;
  if (line.space == Space::shared) {
    const Passes passes = shared_passes(access.address, access.bytes);
    sum.wavefronts += passes.wavefronts;
    sum.ideal += passes.ideal;
    return;
  }
  uint64_t touched[2 * kWarp];
  unsigned n = 0;
  for (unsigned lane = 0; lane < kWarp; ++lane)  // an aligned access of up to 16 bytes lies in one sector
    if (access.bytes[lane]) touched[n++] = access.address[lane] / kSector;
  std::sort(touched, touched + n);
  n = static_cast<unsigned>(std::unique(touched, touched + n) - touched);
  for (unsigned i = 0; i < n; ++i) ++total.sectors[static_cast<int>(line.use)][touched[i]];
  sum.sectors += n;
}

Passes shared_passes(const uint64_t (&address)[kWarp], const unsigned (&bytes)[kWarp]) {
  const unsigned widest = std::max(4u, *std::max_element(bytes, bytes + kWarp)), group = 4 * kWarp / widest;
  Passes passes;
  for (unsigned first = 0; first < kWarp; first += group) {
    uint64_t words[kWarp];
    unsigned n = 0;
    for (unsigned lane = first; lane < first + group; ++lane)
      for (uint64_t byte = 0; byte < bytes[lane]; byte += kBank) words[n++] = (address[lane] + byte) / kBank;
    std::sort(words, words + n);
    n = static_cast<unsigned>(std::unique(words, words + n) - words);
    unsigned in_bank[kBanks] = {};
    for (unsigned i = 0; i < n; ++i) ++in_bank[words[i] % kBanks];
    passes.wavefronts += *std::max_element(in_bank, in_bank + kBanks);
    passes.ideal += n > 0;
  }
  return passes;
}

static std::vector<LaunchCount> launches;
static std::string text;

void publish(LaunchCount&& launch) { launches.push_back(std::move(launch)); }

}  // namespace simt

// The launches counted since the last clear. Sectors are read out as (sector, warp accesses) pairs of one use.
SIMT_EXPORT void simt_counters_clear() { simt::launches.clear(); }

SIMT_EXPORT uint64_t simt_sectors(uint64_t launch, int use, uint64_t* pairs) {
  const auto& sectors = simt::launches[launch].sectors[use];
  if (pairs)
    for (const auto& [sector, hits] : sectors) *pairs++ = sector, *pairs++ = hits;
  return sectors.size();
}

SIMT_EXPORT const char* simt_counters_json() {
  std::string& s = simt::text = "[";
  const auto number = [&s](const char* name, uint64_t n) {
    s += std::string(s.back() == '{' ? "\"" : ", \"") + name + "\": " + std::to_string(n);
  };
  for (const auto& launch : simt::launches) {
    s += s.size() > 1 ? ", {" : "{";
    number("blocks", uint64_t{launch.grid.x} * launch.grid.y * launch.grid.z);
    number("threads", launch.block.x * launch.block.y * launch.block.z);
    number("shared_bytes", launch.shared_bytes);
    number("mma", launch.mma);
    number("mma_fma", launch.mma_fma);
    number("ldmatrix", launch.ldmatrix);
    s += ", \"lines\": [";
    for (const auto& [key, line] : launch.lines) {
      s += s.back() == '[' ? "{" : ", {";
      number("line", line.site.line());
      s += ", \"file\": \"" + std::string(line.site.file_name()) + "\"";
      s += std::string(", \"space\": \"") + (line.space == simt::Space::shared ? "shared" : "global") + "\"";
      s += std::string(", \"use\": \"") + (line.use == simt::Use::read ? "read" : "write") + "\"";
      number("accesses", line.accesses);
      number("sectors", line.sectors);
      number("wavefronts", line.wavefronts);
      number("ideal", line.ideal);
      s += "}";
    }
    s += "]}";
  }
  s += "]";
  return s.c_str();
}

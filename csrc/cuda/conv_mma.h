// Where the tensor cores run a depthwise convolution, and how they cut it into tiles: host arithmetic. README.md draws it.
#pragma once

#include "../geometry.h"
#include "params.h"

namespace fastconv::cuda {

// A strip is `height` (kMmaRows, but where the norm is joined) x kMmaColumns outputs of one channel; sixteen of one channel are the M of
// an mma. `tall` strips on top
// of each other are a slab, and slabs are counted through the batch: along W, then down the map, then from image to image.
constexpr int kMmaStrips = 16, kMmaRows = 7, kMmaColumns = 8;
constexpr int kMmaChannels = 16;  // of a block: 32 bytes of a pixel, whole sectors
constexpr int kMmaThreads = 256;

// A tile is `slabs` consecutive slabs, of one channel in a plane of shared memory. The plane is counted in units of 16 bytes,
// eight columns of a row. A run of `across` slabs side by side takes across + 1 units of a row, since the last one's windows
// reach eight columns further. Maps wider than a tile: one run of slabs, which may end in one band and go on in the next,
// `stride` = across + 1 units further along the same rows. Others: `stacked` whole bands, `stride` units apart.
struct ConvMmaTiles {
  int height, tall, slabs, across;
  int bands;    // of slabs in a map
  int stacked;
  int rows;     // of a slab with its halo
  int pitch;    // units from row to row
  int stride, plane;
  bool down;    // strip m is number m % tall of slab m / tall, or else number m / slabs of slab m % slabs
  int64_t count;

  constexpr int strips() const { return tall * slabs; }
};

// Unit that the window of strip m begins with, in a tile that starts with the first slab of a band.
constexpr int mma_strip_unit(const ConvMmaTiles& t, int m) {
  const int slab = t.down ? m / t.tall : m % t.slabs, strip = t.down ? m % t.tall : m / t.slabs;
  return slab / t.across * t.stride + slab % t.across + strip * t.height * t.pitch;
}

// Passes of the two halves of an ldmatrix, of eight strips each: as many as strips meet in one of the eight units of 16 bytes
// that the banks hold.
constexpr int mma_passes(const ConvMmaTiles& t) {
  int sum = 0;
  for (int half = 0; half < 2; ++half) {
    int met[8] = {}, most = 0;
    for (int m = 8 * half; m < std::min(8 * half + 8, t.strips()); ++m) most = std::max(most, ++met[mma_strip_unit(t, m) % 8]);
    sum += most;
  }
  return sum;
}

constexpr ConvMmaTiles conv_mma_tiles(const ConvShape& s, int height = kMmaRows) {
  if (s.pixels() == 0) return {};
  const int halo = static_cast<int>(2 * s.pad());
  const int64_t strips = ceil_div(s.H, height);
  // As tall as stages the fewest rows.
  int tall = 1;
  const auto staged = [&](int t) { return ceil_div(strips, t) * (t * height + halo); };
  for (int t = 2; t <= 4; ++t)
    if (staged(t) <= staged(tall)) tall = t;
  ConvMmaTiles best{};
  const int across = static_cast<int>(ceil_div(s.W, kMmaColumns)), bands = static_cast<int>(ceil_div(strips, tall));
  const int most = kMmaStrips / tall;
  const bool narrow = across <= most;
  const int stacked = narrow ? static_cast<int>(std::min<int64_t>(most / across, s.N * bands)) : 1;
  const int slabs = narrow ? stacked * across : most, rows = tall * height + halo;
  const int units = narrow ? across + 1 : most + 1 + (across % most != 0);
  // The first layout without bank conflicts, from small to large, or else with the fewest.
  int fewest = 0;
  for (int pitch = units; pitch < units + 4; ++pitch)
    for (int gap = 0; gap < (stacked > 1 ? 8 : 1); ++gap)
      for (const bool down : {true, false}) {
        const int stride = narrow ? rows * pitch + gap : across + 1;
        const ConvMmaTiles t{height, tall, slabs, across, bands, stacked, rows, pitch, stride, stacked > 1 ? stacked * stride : rows * pitch,
                             down,  ceil_div(s.N * bands * across, slabs)};
        const int passes = mma_passes(t);
        if (fewest == 0 || passes < fewest) fewest = passes, best = t;
        if (fewest <= 2) return best;
      }
  return best;
}

// Bytes of shared memory: the windows of the strips, the pairs of weights, the planes of a tile, and backward those of x without
// a halo. The upper eight channels lie half the banks further on than their pitch says, so that a warp with two lanes to a pixel
// meets no bank twice.
constexpr int kMmaSkew = 64, kMmaCentre = kMmaStrips * kMmaRows * 16;  // bytes; of a plane without a halo
constexpr int kMmaWindows = 128;  // bytes
constexpr int kMmaPairs = 22;  // of weights to a tap row: see conv_mma.cuh
constexpr int64_t mma_plane_bytes(int64_t plane) { return kMmaChannels * plane + kMmaSkew; }
constexpr int64_t conv_mma_shared(const ConvMmaTiles& t, int64_t K, bool centre) {
  return kMmaWindows + kMmaChannels * K * kMmaPairs * 4 + mma_plane_bytes(t.plane * 16) + (centre ? mma_plane_bytes(kMmaCentre) : 0);
}

// The choice between the kernels of this library, for every GPU from sm_80 on. No GPU has decided: by counters (README.md). A
// tile costs the tensor cores' kernel the same however few of its outputs lie on the map, about as much as the plain kernel
// takes for a third of them with 7 x 7 taps, for three fifths with 5 x 5; 3 x 3 moves its bytes in time without tensor cores.
// Backward, x and dx may be float32 beside a dy of 16 bits, as autocast leaves them.
//
//   K        dtype             share of a tile on the map    kernel    decided
//   7        bfloat16, float16 >= 1/3                        mma       by counters
//   5        bfloat16, float16 >= 3/5                        mma       by counters
//   3, 5, 7  all others                                      plain     by counters
//   others   any                                             general   the only one
//
// A GPU whose blocks have less shared memory than a tile takes runs the plain kernel too.
constexpr bool conv_mma_pays(const ConvShape& s, const ConvMmaTiles& t) {
  // Rows, their elements and slabs are counted in 32 bits.
  if (std::max(s.H, s.W) >= 1 << 24 || s.W * s.C >= 1 << 30 || (t.count + 1) * t.slabs >= int64_t{1} << 31) return false;
  const int64_t slots = t.count * kMmaStrips * t.height * kMmaColumns;
  return s.K == 7 ? 3 * s.pixels() >= slots : s.K == 5 ? 5 * s.pixels() >= 3 * slots : false;
}
// Forward with the norm in one launch (depthwise_conv_norm_mma_kernel.cu): a block owns all channels of a tile of low strips, so
// that sixteen of them fit shared memory, and takes `groups` runs of kMmaChannels channels at a time. Only where a
// multiprocessor holds 512 threads: fewer do not hide the latency of memory. By counters, as the table above.
constexpr int kMmaJoinedRows = 3, kMmaJoinedTaps = 7;
constexpr int kMmaPlaces = 4 * kMmaStrips * 4;  // bytes: where each strip lies
constexpr int kMmaHeader = 512;                 // windows and places
struct JoinedMmaPlan {
  ConvMmaTiles tiles;  // count 0: nothing fits or pays
  int groups;
  int64_t group, z, z_pitch, shared;  // bytes: of a group's weights and planes; before z; of a pixel of z; in all
};
constexpr JoinedMmaPlan conv_norm_mma_plan(const ConvShape& s, const Gpu& gpu) {
  constexpr int64_t kReserved = 1 << 10, kResident = 512;  // bytes of each block, for the system; threads
  if (s.pixels() == 0 || s.C % 8 != 0 || s.C > kJoinedChannels || s.K != kMmaJoinedTaps) return {};
  const ConvMmaTiles t = conv_mma_tiles(s, kMmaJoinedRows);
  const int64_t runs = t.stacked > 1 || t.slabs % t.across == 0 ? 1 : ceil_div(t.across, t.slabs);
  const int64_t reads = (s.H + (t.bands - 1) * (s.K - 1)) * (s.W + (runs - 1) * (s.K - 1));
  if (!conv_mma_pays(s, t) || 5 * reads > 11 * s.H * s.W || 2 * t.count < gpu.multiprocessors) return {};
  const int64_t group = round_up(kMmaChannels * s.K * kMmaPairs * 4 + mma_plane_bytes(t.plane * 16), 128);
  const int64_t z_pitch = round_up(s.C * 2, 64), chunks = ceil_div(s.C, kMmaChannels);
  for (const int groups : {1, 2}) {
    const int64_t z = kMmaHeader + groups * group, shared = z + kMmaStrips * kMmaJoinedRows * kMmaColumns * z_pitch;
    if (shared > gpu.shared || groups > chunks) break;
    const int64_t blocks = (gpu.shared + kReserved) / (shared + kReserved);
    if (blocks * groups * kMmaThreads >= kResident) return {t, groups, group, z, z_pitch, shared};
  }
  return {};
}

constexpr bool conv_mma_serves(int64_t K, DType staged, DType other, DType weight) {
  return (K == 5 || K == 7) && staged != DType::kFloat && other == staged && (weight == staged || weight == DType::kFloat);
}

}  // namespace fastconv::cuda

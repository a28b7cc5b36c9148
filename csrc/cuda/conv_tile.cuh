// Tiles of a depthwise convolution in shared memory, and what a thread computes from them. kConvChunk = 32 channels of a
// pixel lie together, so that eight lanes with kQuad channels each read a pixel, and the four units of a warp four pixels.
//
// An odd pitch puts pixels of neighbouring runs or rows into different halves of the banks, where 32 channels fill half.
#pragma once

#include "../geometry.h"
#include "array.cuh"

namespace fastconv::cuda {

constexpr int kChunk = kConvChunk, kRun = kConvRun;
constexpr int kQuad = 4, kUnit = kChunk / kQuad;  // channels of a thread; lanes of a unit
constexpr int kWeightPitch = kConvWeightPitch;    // [tap][kWeightPitch] float: as near to free of conflicts as both ways of access allow

constexpr int odd(int n) { return n | 1; }

// Sizes of a launch that its blocks share. A tile is in shared memory as [images][rows + 2 halo][pitch][kChunk].
struct ConvGrid {
  int images, rows, runs;  // of a tile
  int across, together;    // tiles: side by side; of the same images
  int chunks;
  int64_t tiles, slices;   // blocks: slices x chunks, each a run of consecutive tiles
  bool wide;               // every activation moves in accesses of 16 bytes

  constexpr int columns() const { return runs * kRun; }
  constexpr int units() const { return images * rows * runs; }
  constexpr unsigned threads() const { return static_cast<unsigned>(round_up(units() * kUnit, kWarp)); }
};

inline ConvGrid conv_grid(const ConvShape& s, const ConvTiles& t, int64_t slices, bool wide) {
  const auto small = [](int64_t n) { return static_cast<int>(n); };
  return {small(t.images), small(t.rows), small(t.runs()), small(t.across), small(t.down * t.across), small(ceil_div(s.C, kChunk)),
          t.count, slices, wide};
}

// Where a tile lies: images from n on, output rows from h on, columns from w on.
struct TilePlace {
  int64_t n, h, w;
};
FC_DEVICE TilePlace place_of(const ConvGrid& g, int64_t tile) {
  const int64_t group = tile / g.together;
  const int inside = static_cast<int>(tile - group * g.together);
  return {group * g.images, static_cast<int64_t>(inside / g.across) * g.rows, static_cast<int64_t>(inside % g.across) * g.columns()};
}

FC_DEVICE int element_size(DType dtype) { return dtype == DType::kFloat ? 4 : 2; }

// Starts copying a tile with its halo, 32 channels from c0 on, in the array's own dtype. Zeros land outside the maps and past
// the last channel.
FC_DEVICE void stage_tile(const Array& a, const ConvShape& s, const ConvGrid& g, const TilePlace& at, int halo, int pitch, int64_t c0,
                          unsigned char* tile) {
  const int size = element_size(a.dtype), rows = g.rows + 2 * halo, columns = g.columns() + 2 * halo;
  const int parts = g.wide ? kChunk * size / 16 : kChunk, part = threadIdx.x % parts * (g.wide ? 16 : size);
  const bool in_channels = c0 + part / size < s.C;
  // `row` counts through the images; image_row is the first of the present one. Subtracting is cheaper than to divide, and
  // leaves no quotients in registers that the compiler would keep from tile to tile.
  for (int column = threadIdx.x / parts, row = 0, image = 0, image_row = 0;; column += blockDim.x / parts) {
    for (; column >= columns; column -= columns) ++row;
    if (row >= g.images * rows) break;
    for (; row - image_row >= rows; image_row += rows) ++image;
    const int64_t n = at.n + image, h = at.h + row - image_row - halo, w = at.w + column - halo;
    const bool in = in_channels && n < s.N && h >= 0 && h < s.H && w >= 0 && w < s.W;
    const char* const from = static_cast<const char*>(a.data) + (in ? (((n * s.H + h) * s.W + w) * s.C + c0) * size + part : 0);
    unsigned char* const to = tile + (row * pitch + column) * kChunk * size + part;
    if (g.wide) copy_async<16>(to, from, in);
    else if (size == 4) store_shared(to, load_global<uint32_t>(from, in));
    else store_shared(to, load_global<uint16_t>(from, in));
  }
}

// weight[c0 ..][taps] as [tap][kWeightPitch] float; `flip`: tap k in place taps - 1 - k.
FC_DEVICE void stage_weight(const Array& weight, int64_t C, int64_t c0, int taps, bool flip, float* out) {
  for (int i = threadIdx.x; i < kChunk * taps; i += blockDim.x) {
    const int c = i / taps, tap = i - c * taps;
    const float v = load_array<1>(weight, c0 * taps + i, c0 + c < C)[0];
    store_shared(out + (flip ? taps - 1 - tap : tap) * kWeightPitch + c, v);
  }
}

using Quad = Vec<float, kQuad>;

// kQuad staged elements, which start at element `i` of a tile.
template <class T> FC_DEVICE Quad load_quad(const T* tile, int i, bool in = true) {
  return to_float(load_shared<Vec<T, kQuad>>(tile + i, in));
}

// acc[j] += sum over taps of tile[kh][j + kw] * weight[kh, kw], `tile` and `weight` at this thread's pixel and channels.
template <class T, int K> FC_DEVICE void conv_run(const T* tile, int pitch, const float* weight, Quad (&acc)[kRun]) {
#pragma unroll 1
  for (int kh = 0; kh < K; ++kh) {
    Quad tap[K];
#pragma unroll
    for (int kw = 0; kw < K; ++kw) tap[kw] = load_shared<Quad>(weight + (kh * K + kw) * kWeightPitch);
#pragma unroll
    for (int column = 0; column < kRun + K - 1; ++column) {
      const Quad v = load_quad(tile, (kh * pitch + column) * kChunk);
#pragma unroll
      for (int kw = 0; kw < K; ++kw) {
        const int j = column - kw;
        if (j < 0 || j >= kRun) continue;
#pragma unroll
        for (int i = 0; i < kQuad; ++i) acc[j][i] = fmaf(v[i], tap[kw][i], acc[j][i]);
      }
    }
  }
}

// Four 16-bit values in two words.
template <class T> FC_DEVICE Vec<uint32_t, 2> halves(const Quad& v) { return {from_floats<T>(v[0], v[1]), from_floats<T>(v[2], v[3])}; }

// v, and what lies at `more`.
template <class T> FC_DEVICE Quad plus(Quad v, const T* more, int64_t offset, bool in) {
  const Quad add = to_float(load_global<Vec<T, kQuad>>(more + offset, in));
#pragma unroll
  for (int i = 0; i < kQuad; ++i) v[i] += add[i];
  return v;
}

// The first `count` pixels of a run, from element `offset` on, with `more` added where it is given: by predicates, since a branch
// costs registers. Full warps call this. Two lanes hold eight channels of a pixel between them: for 16-bit stores of 16 bytes they
// trade, and the even lane stores even pixels, the odd lane odd ones.
template <class T> FC_DEVICE void store_run(T* out, const T* more, int64_t offset, int64_t C, const Quad (&acc)[kRun], int count) {
  const bool odd_lane = threadIdx.x % 2;
  const int added = more ? count : 0;
#pragma unroll
  for (int j = 0; j < kRun; j += 2) {
    const Vec<uint32_t, 2> first = halves<T>(plus(acc[j], more, offset + j * C, j < added));
    const Vec<uint32_t, 2> second = j + 1 < kRun ? halves<T>(plus(acc[j + 1 < kRun ? j + 1 : j], more, offset + (j + 1) * C, j + 1 < added)) : first;
    const uint32_t low = shuffle_xor(odd_lane ? first[0] : second[0], 1), high = shuffle_xor(odd_lane ? first[1] : second[1], 1);
    Vec<uint32_t, 4> pixel;  // member by member: a choice between two would go through memory
    pixel[0] = odd_lane ? low : first[0];
    pixel[1] = odd_lane ? high : first[1];
    pixel[2] = odd_lane ? second[0] : low;
    pixel[3] = odd_lane ? second[1] : high;
    store_global(out + offset + (j + odd_lane) * C - (odd_lane ? kQuad : 0), pixel, j + odd_lane < count);
  }
}
template <> FC_DEVICE void store_run<float>(float* out, const float* more, int64_t offset, int64_t C, const Quad (&acc)[kRun], int count) {
  const int added = more ? count : 0;
#pragma unroll
  for (int j = 0; j < kRun; ++j) store_global(out + offset + j * C, plus(acc[j], more, offset + j * C, j < added), j < count);
}

// The same, for channel c on, one element at a time where the array cannot be stored in 16 bytes; `more`, in the dtype of `out`, only
// where it can.
FC_DEVICE void store_run(const MutableArray& out, int64_t pixel, int64_t C, int64_t c, const Quad (&acc)[kRun], int count, bool wide,
                         const Array& more = {}) {
  const int64_t offset = pixel * C + c;
  if (!wide) {
#pragma unroll
    for (int j = 0; j < kRun; ++j)
#pragma unroll
      for (int i = 0; i < kQuad; ++i) store_array<1>(out, offset + j * C + i, {acc[j][i]}, j < count && c + i < C);
    return;
  }
  if (c >= C) count = 0;
  const auto store = [&](auto* to) { store_run(to, static_cast<decltype(to)>(const_cast<void*>(more.data)), offset, C, acc, count); };
  if (out.dtype == DType::kBFloat16) store(static_cast<bf16*>(out.data));
  else if (out.dtype == DType::kHalf) store(static_cast<fp16*>(out.data));
  else store(static_cast<float*>(out.data));
}

// What this thread of a block computes: kRun outputs of row `row` of image `image`, from column `column` of the tile on,
// kQuad channels from `quad` of the chunk on. Threads past the last unit follow along, with nothing to store.
struct RunPlace {
  int image, row, column, quad;
  bool active;
  // Element of the tile that the window of the first output begins with.
  FC_DEVICE int corner(const ConvGrid& g, int halo, int pitch) const {
    return ((image * (g.rows + 2 * halo) + row) * pitch + column) * kChunk + quad;
  }
};
FC_DEVICE RunPlace run_of(const ConvGrid& g, int unit) {
  const int last = g.units() - 1, used = unit < last ? unit : last, row = used / g.runs;
  return {row / g.rows, row % g.rows, used % g.runs * kRun, static_cast<int>(threadIdx.x) % kUnit * kQuad, unit <= last};
}
FC_DEVICE RunPlace run_of(const ConvGrid& g) { return run_of(g, threadIdx.x / kUnit); }
FC_DEVICE int64_t first_pixel(const ConvShape& s, const TilePlace& at, const RunPlace& run) {
  return ((at.n + run.image) * s.H + at.h + run.row) * s.W + at.w + run.column;
}
// Outputs of the run that lie inside the map.
FC_DEVICE int run_count(const ConvShape& s, const TilePlace& at, const RunPlace& run) {
  if (!run.active || at.n + run.image >= s.N || at.h + run.row >= s.H) return 0;
  const int64_t left = s.W - at.w - run.column;
  return left < 0 ? 0 : left < kRun ? static_cast<int>(left) : kRun;
}

}  // namespace fastconv::cuda

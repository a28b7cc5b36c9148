// What ops of two passes over an image share, sums of each channel and then something done with them: how threads walk its map,
// what a block holds of it in shared memory between the passes, and the sums over pixels where channels lie side by side.
//
// A tile is up to 64 lanes side by side, N channels each, in as many rows as there are threads for; a thread walks down the
// pixels of its lane. Which pixels follows image, block and thread alone, so that an image gets the same bits in any batch.
#pragma once

#include "../geometry.h"
#include "array.cuh"

namespace fastconv::cuda {

constexpr int kPassThreads = 256, kPassMost = 512;  // of a block: of a pass over memory; of any other at most
constexpr int kAtOnce = 4;                          // accesses that a thread has in flight
constexpr int kX = 1, kDy = 2;                      // the maps that a pass reads or holds

struct ImageTiles { int lanes, rows, across; };

template <int N> ImageTiles image_tiles(int64_t C, int64_t threads) {
  constexpr int64_t kLanes = 64;
  const int64_t groups = ceil_div(C, N), across = ceil_div(groups, kLanes), lanes = ceil_div(groups, across);
  return {static_cast<int>(lanes), static_cast<int>(threads / lanes), static_cast<int>(across)};
}

// This thread's place in a tile; `in`: it has channels.
struct TilePlace {
  int64_t channel;  // first of the thread
  int row;
  bool in;
};
template <int N> FC_DEVICE TilePlace tile_place(const ImageTiles& g, int64_t C, int tile) {
  const int row = threadIdx.x / g.lanes;
  const int64_t channel = (static_cast<int64_t>(tile) * g.lanes + threadIdx.x % g.lanes) * N;
  return {channel, row, row < g.rows && channel < C};
}

// Elements first, first + step, .. before end, `stride` apart in memory from `offset` on, counted from where the block begins.
struct Walk {
  int64_t first, end;
  int step;
  int64_t offset, stride;
  bool in;  // this thread has any
};

// A run of pixels of an image, which begin at element `origin` of the batch, and where they are kept in shared memory: as in
// global memory, or null.
struct Pixels {
  int64_t image, begin, end, origin;
  unsigned char *x = nullptr, *dy = nullptr;
};
template <class Params> FC_DEVICE Pixels pixels_of(const Params& p, int64_t image, int64_t parts, int64_t part) {
  const int64_t begin = part_begin(p.L, parts, part);
  return {image, begin, part_begin(p.L, parts, part + 1), (image * p.L + begin) * p.C};
}
FC_DEVICE Walk down_pixels(const ImageTiles& g, const TilePlace& at, const Pixels& run, int64_t C) {
  return {at.row, run.end - run.begin, g.rows, at.channel, C, at.in};
}

template <int N> FC_DEVICE void keep(unsigned char* kept, DType dtype, int64_t i, const Raw<N>& raw, bool in) {
  if (N == 8 || dtype == DType::kFloat) store_shared(kept + 16 / N * i, raw.words, in);
  else store_shared(kept + 2 * i, Vec<uint32_t, 2>{raw.words[0], raw.words[1]}, in);
}
template <int N> FC_DEVICE Raw<N> kept_raw(const unsigned char* kept, DType dtype, int64_t i, bool in) {
  if (N == 8 || dtype == DType::kFloat) return {load_shared<Vec<uint32_t, 4>>(kept + 16 / N * i, in)};
  const auto halves = load_shared<Vec<uint32_t, 2>>(kept + 2 * i, in);
  return {{halves[0], halves[1], 0, 0}};
}

// Calls f(offset, in, x, dy) for what this thread walks over, `offset` elements from held.origin on; with kKept it comes out of
// shared memory.
template <int N, int kReads, bool kKept, class Params, class Held, class F>
FC_DEVICE void for_walk(const Params& p, const Walk& walk, const Held& held, F&& f) {
  const auto read = [&](const Array& a, const unsigned char* kept, int64_t offset, bool in) {
    if constexpr (kKept) return kept_raw<N>(kept, a.dtype, offset, in);
    else return load_raw<N>(a, held.origin + offset, in);
  };
  for (int64_t first = walk.first; first < walk.end; first += kAtOnce * walk.step) {
    Raw<N> x[kAtOnce], dy[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int64_t at = first + i * walk.step, offset = walk.offset + at * walk.stride;
      const bool in = walk.in && at < walk.end;
      if constexpr (kReads & kX) x[i] = read(p.x, held.x, offset, in);
      if constexpr (kReads & kDy) dy[i] = read(p.dy, held.dy, offset, in);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int64_t at = first + i * walk.step;
      f(walk.offset + at * walk.stride, walk.in && at < walk.end, x[i], dy[i]);
    }
  }
}

// The same out of global memory, for the first pass, which keeps the maps kKeeps.
template <int N, int kReads, int kKeeps, class Params, class Held, class F>
FC_DEVICE void for_first_walk(const Params& p, const Walk& walk, const Held& held, F&& f) {
  for_walk<N, kReads, false>(p, walk, held, [&](int64_t offset, bool in, const Raw<N>& x, const Raw<N>& dy) {
    if constexpr (kKeeps & kX) keep<N>(held.x, p.x.dtype, offset, x, in);
    if constexpr (kKeeps & kDy) keep<N>(held.dy, p.dy.dtype, offset, dy, in);
    f(x, dy);
  });
}

// kSums sums over a run of pixels of one tile, each formed by add(sums, x, dy): each thread down its pixels, then over the rows
// of threads, in order. Calls store(sum, channel, values, in) for a few channels side by side. scratch: response_scratch_floats.
template <int N, int kSums, int kReads, int kKeeps, class Params, class Add, class Store>
FC_DEVICE void sum_tile(const Params& p, const ImageTiles& g, int tile, const Pixels& run, float* scratch, Add&& add, Store&& store) {
  constexpr int kPart = N < 4 ? N : 4, kParts = N / kPart;
  Vec<float, N> sums[kSums] = {};
  const Walk walk = down_pixels(g, tile_place<N>(g, p.C, tile), run, p.C);
  for_first_walk<N, kReads, kKeeps>(p, walk, run, [&](const Raw<N>& x, const Raw<N>& dy) { add(sums, x, dy); });
  // Of each thread kPart channels, then the next of each; the gap puts the two into different banks.
  const int plane = static_cast<int>(blockDim.x) * kPart + static_cast<int>(kResponseGap);
#pragma unroll
  for (int r = 0; r < kSums; ++r) {
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      Vec<float, kPart> own;
#pragma unroll
      for (int i = 0; i < kPart; ++i) own[i] = sums[r][part * kPart + i];
      store_shared(scratch + part * plane + threadIdx.x * kPart, own);
    }
    sync_threads();
    const int lane = threadIdx.x / kParts, part = threadIdx.x % kParts;
    if (lane < g.lanes) {
      Vec<float, kPart> total{};
      for (int row = 0; row < g.rows; ++row) {
        const auto other = load_shared<Vec<float, kPart>>(scratch + part * plane + (row * g.lanes + lane) * kPart);
#pragma unroll
        for (int i = 0; i < kPart; ++i) total[i] += other[i];
      }
      const int64_t channel = (static_cast<int64_t>(tile) * g.lanes + lane) * N + part * kPart;
      store(r, channel, total, channel < p.C);
    }
    sync_threads();
  }
}

// A block's sums of a channel, of `slices` partials `stride` floats apart, in order; or of the blocks of a cluster, at `sums`
// in the shared memory of each.
FC_DEVICE float sum_of_slices(const float* partial, int64_t slices, int64_t stride) {
  float sum = 0;
#pragma unroll 8
  for (int64_t slice = 0; slice < slices; ++slice) sum += load_global<float>(partial + slice * stride);
  return sum;
}
FC_DEVICE float sum_of_cluster(const float* sums, int64_t blocks) {
  float sum = 0;
  for (int64_t other = 0; other < blocks; ++other) sum += load_cluster(sums, static_cast<int>(other));
  return sum;
}

// Whether enough of its clusters run at a time: too many multiprocessors would stand idle.
template <class... P> bool clusters_fill(void (*kernel)(P...), const ResidentPlan& plan, const Gpu& gpu) {
  if (plan.blocks <= 1) return true;
  const dim3 block(static_cast<unsigned>(plan.threads));
  const int64_t fit = clusters_that_fit(kernel, static_cast<unsigned>(plan.blocks), block, static_cast<size_t>(plan.shared));
  return 2 * fit * plan.blocks >= gpu.multiprocessors;
}

}  // namespace fastconv::cuda

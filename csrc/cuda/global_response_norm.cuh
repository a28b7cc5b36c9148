// global_response_norm on the GPU, what both directions share: sums over the pixels of each image, a few operations on them
// that make coefficients of each channel, and a pass that applies these. In two passes over memory, or in one by a cluster of
// blocks that holds the image. A Direction, Forward or Backward, has the arithmetic.
//
// A tile is up to 64 lanes side by side, N channels each, in as many rows as there are threads for; a thread walks down the
// pixels of its lane. Which pixels follows image, block and thread alone, so that an image gets the same bits in any batch.
#pragma once

#include "activation.cuh"
#include "array.cuh"
#include "global_response_norm_kernel.h"

namespace fastconv::cuda {

constexpr int kResponseThreads = 256, kResponseMost = 512;  // of a block: of a pass over memory; of any other at most
constexpr int kAtOnce = 4;                                  // pixels that a thread has in flight

struct ResponseTiles { int lanes, rows, across; };

template <int N> ResponseTiles response_tiles(int64_t C, int64_t threads) {
  constexpr int64_t kLanes = 64;
  const int64_t groups = C / N, across = ceil_div(groups, kLanes), lanes = ceil_div(groups, across);
  return {static_cast<int>(lanes), static_cast<int>(threads / lanes), static_cast<int>(across)};
}

// This thread's place in a tile; `in`: it has channels.
struct ResponsePlace {
  int64_t channel;  // first of the thread
  int row;
  bool in;
};
template <int N> FC_DEVICE ResponsePlace response_place(const ResponseTiles& g, int64_t C, int tile) {
  const int row = threadIdx.x / g.lanes;
  const int64_t channel = (static_cast<int64_t>(tile) * g.lanes + threadIdx.x % g.lanes) * N;
  return {channel, row, row < g.rows && channel < C};
}

// A run of pixels of an image, and where they are kept in shared memory: as in global memory, or null.
struct Pixels {
  int64_t image, begin, end;
  unsigned char *x = nullptr, *dy = nullptr;
};

template <int N> FC_DEVICE void keep(unsigned char* kept, DType dtype, int64_t i, const Raw<N>& raw, bool in) {
  if (N == 8 || dtype == DType::kFloat) store_shared(kept + 16 / N * i, raw.words, in);
  else store_shared(kept + 2 * i, Vec<uint32_t, 2>{raw.words[0], raw.words[1]}, in);
}
template <int N> FC_DEVICE Raw<N> kept_raw(const unsigned char* kept, DType dtype, int64_t i, bool in) {
  if (N == 8 || dtype == DType::kFloat) return {load_shared<Vec<uint32_t, 4>>(kept + 16 / N * i, in)};
  const auto halves = load_shared<Vec<uint32_t, 2>>(kept + 2 * i, in);
  return {{halves[0], halves[1], 0, 0}};
}

// Calls f(pixel, in, x, dy) for the pixels of this thread; with kKept they come out of shared memory.
template <int N, class Direction, bool kKept, class F>
FC_DEVICE void for_pixels(const ResponseParams& p, const ResponseTiles& g, const ResponsePlace& at, const Pixels& run, F&& f) {
  for (int64_t first = run.begin + at.row; first < run.end; first += kAtOnce * g.rows) {
    Raw<N> x[kAtOnce], dy[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int64_t pixel = first + i * g.rows;
      const bool in = at.in && pixel < run.end;
      if constexpr (kKept) {
        const int64_t offset = (pixel - run.begin) * p.C + at.channel;
        x[i] = kept_raw<N>(run.x, p.x.dtype, offset, in);
        if constexpr (Direction::kBackward) dy[i] = kept_raw<N>(run.dy, p.dy.dtype, offset, in);
      } else {
        const int64_t offset = (run.image * p.L + pixel) * p.C + at.channel;
        x[i] = load_raw<N>(p.x, offset, in);
        if constexpr (Direction::kBackward) dy[i] = load_raw<N>(p.dy, offset, in);
      }
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int64_t pixel = first + i * g.rows;
      f(pixel, at.in && pixel < run.end, x[i], dy[i]);
    }
  }
}

// The sums over a run of pixels of one tile: each thread down its pixels, then over the rows of threads, in order. Calls
// store(sum, channel, values, in) for a few channels side by side. scratch: response_scratch_floats.
template <int N, class Direction, bool kKeep, class Store>
FC_DEVICE void sum_tile(const ResponseParams& p, const ResponseTiles& g, int tile, const Pixels& run, float* scratch, Store&& store) {
  constexpr int kPart = N < 4 ? N : 4, kParts = N / kPart;
  const ResponsePlace at = response_place<N>(g, p.C, tile);
  Vec<float, N> sums[Direction::kSums] = {};
  for_pixels<N, Direction, false>(p, g, at, run, [&](int64_t pixel, bool in, const Raw<N>& x, const Raw<N>& dy) {
    if constexpr (kKeep) {
      const int64_t offset = (pixel - run.begin) * p.C + at.channel;
      keep<N>(run.x, p.x.dtype, offset, x, in);
      if constexpr (Direction::kBackward) keep<N>(run.dy, p.dy.dtype, offset, dy, in);
    }
    Direction::template add<N>(sums, activated<N>(to_float(x, p.x.dtype), p.act).value, dy, p.dy.dtype);
  });
  // Of each thread kPart channels, then the next of each; the gap puts the two into different banks.
  const int plane = static_cast<int>(blockDim.x) * kPart + static_cast<int>(kResponseGap);
#pragma unroll
  for (int r = 0; r < Direction::kSums; ++r) {
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

// Sum over the block, the same bits in each thread. scratch: a float for each warp.
FC_DEVICE float block_sum(float v, float* scratch) {
  v = warp_sum(v);
  sync_threads();  // what was there has been read
  store_shared(scratch + threadIdx.x / kWarp, v, threadIdx.x % kWarp == 0);
  sync_threads();
  float sum = 0;
  for (unsigned warp = 0; warp < blockDim.x / kWarp; ++warp) sum += load_shared<float>(scratch + warp);
  return sum;
}

// The coefficients of an image's channels, [kSums][C]: in global memory between two launches, or in shared memory, where the
// halves of eight channels lie `half` floats apart, so that 16 bytes of neighbouring lanes are side by side.
template <int N> struct GlobalCoefficients {
  float* data;
  int64_t C;
  FC_DEVICE float load(int r, int64_t c) const { return load_global<float>(data + r * C + c); }
  FC_DEVICE void store(int r, int64_t c, float v) const { store_global(data + r * C + c, v); }
  FC_DEVICE Vec<float, N> vector(int r, int64_t c, bool in) const { return load_array<N>(Array{data + r * C, DType::kFloat}, c, in); }
};
template <int N> struct SharedCoefficients {
  float* data;
  int64_t half;
  FC_DEVICE float* at(int r, int64_t c) const { return data + r * 2 * half + (N == 8 ? c / 8 * 4 + c % 4 + c / 4 % 2 * half : c); }
  FC_DEVICE float load(int r, int64_t c) const { return load_shared<float>(at(r, c)); }
  FC_DEVICE void store(int r, int64_t c, float v) const { store_shared(at(r, c), v); }
  FC_DEVICE Vec<float, N> vector(int r, int64_t c, bool in) const {
    Vec<float, N> v;
#pragma unroll
    for (int i = 0; i < N; i += 4) {
      const auto part = load_shared<Vec<float, 4>>(at(r, c + i), in);
#pragma unroll
      for (int j = 0; j < 4; ++j) v[i + j] = part[j];
    }
    return v;
  }
};

template <int N, class Direction, bool kKept, class Coefficients>
FC_DEVICE void apply_tile(const ResponseParams& p, const ResponseTiles& g, int tile, const Pixels& run, const Coefficients& coefficients) {
  const ResponsePlace at = response_place<N>(g, p.C, tile);
  const Vec<float, N> factor = coefficients.vector(0, at.channel, at.in);
  const Vec<float, N> term =
      Direction::kBackward ? coefficients.vector(Direction::kSums - 1, at.channel, at.in) : load_array<N>(p.bias, at.channel, at.in);
  for_pixels<N, Direction, kKept>(p, g, at, run, [&](int64_t pixel, bool in, const Raw<N>& x, const Raw<N>& dy) {
    const Activated<N> a = activated<N>(to_float(x, p.x.dtype), p.act);
    const Vec<float, N> out = Direction::template result<N>(a, dy, p.dy.dtype, factor, term);
    store_array<N>(p.out, (run.image * p.L + pixel) * p.C + at.channel, out, in);
  });
}

// Blocks: images x slices x tiles across.
template <int N, class Direction>
__global__ void __launch_bounds__(kResponseThreads, 2)
global_response_norm_sum_kernel(ResponseParams p, ResponseTiles g, int64_t slices) {
  FC_SHARED(float, scratch, response_scratch_floats(N, kResponseThreads));
  const int64_t index = blockIdx.x / g.across, image = index / slices, slice = index % slices;
  const Pixels run{image, part_begin(p.L, slices, slice), part_begin(p.L, slices, slice + 1)};
  float* const partial = p.partial + index * Direction::kSums * p.C;
  const int tile = static_cast<int>(blockIdx.x % g.across);
  sum_tile<N, Direction, false>(p, g, tile, run, scratch, [&](int r, int64_t c, const auto& values, bool in) {
    store_global(partial + r * p.C + c, values, in);
  });
}

// A block an image.
template <class Direction>
__global__ void __launch_bounds__(kResponseMost) global_response_norm_coefficients_kernel(ResponseParams p, int64_t slices) {
  FC_SHARED(float, scratch, kWarp);
  const int64_t image = blockIdx.x, C = p.C;
  const float* const partial = p.partial + image * slices * Direction::kSums * C;
  const auto total = [&](int r, int64_t c) {
    float sum = 0;
#pragma unroll 8
    for (int64_t slice = 0; slice < slices; ++slice) sum += load_global<float>(partial + (slice * Direction::kSums + r) * C + c);
    return sum;
  };
  Direction::finish(p, image, total, GlobalCoefficients<1>{p.coefficients + image * Direction::kSums * C, C}, scratch, true);
}

// Blocks as those of the sums in reverse: of the images summed last the L2 cache still holds the pixels.
template <int N, class Direction>
__global__ void __launch_bounds__(kResponseThreads, 2)
global_response_norm_apply_kernel(ResponseParams p, ResponseTiles g, int64_t slices) {
  const int64_t block = gridDim.x - 1 - blockIdx.x, index = block / g.across, image = index / slices, slice = index % slices;
  const Pixels run{image, part_begin(p.L, slices, slice), part_begin(p.L, slices, slice + 1)};
  const GlobalCoefficients<N> coefficients{p.coefficients + image * Direction::kSums * p.C, p.C};
  apply_tile<N, Direction, false>(p, g, static_cast<int>(block % g.across), run, coefficients);
}

// A cluster an image, a run of its pixels each block: their sums lie in the shared memory of each, where all blocks read them.
template <int N, class Direction>
__global__ void __launch_bounds__(kResponseMost) global_response_norm_resident_kernel(ResponseParams p, ResponseTiles g) {
  constexpr int kSums = Direction::kSums;
  FC_DYNAMIC_SHARED(shared);
  const int64_t blocks = p.plan.blocks, image = blockIdx.x / blocks, rank = blockIdx.x % blocks, C = p.C;
  float* const scratch = reinterpret_cast<float*>(shared);
  float* const sums = scratch + response_scratch_floats(N, blockDim.x);
  float* const held = sums + kSums * C;
  unsigned char* const x = reinterpret_cast<unsigned char*>(held + kSums * 2 * p.plan.half);
  unsigned char* const dy = x + ceil_div(p.L, blocks) * C * dtype_size(p.x.dtype);
  const Pixels run{image, part_begin(p.L, blocks, rank), part_begin(p.L, blocks, rank + 1), x, dy};
  for (int tile = 0; tile < g.across; ++tile)
    sum_tile<N, Direction, true>(p, g, tile, run, scratch, [&](int r, int64_t c, const auto& values, bool in) {
      store_shared(sums + r * C + c, values, in);
    });
  sync_cluster();
  const SharedCoefficients<N> coefficients{held, p.plan.half};
  const auto total = [&](int r, int64_t c) {
    float sum = 0;
    for (int64_t other = 0; other < blocks; ++other) sum += load_cluster(sums + r * C + c, static_cast<int>(other));
    return sum;
  };
  Direction::finish(p, image, total, coefficients, scratch, rank == 0);
  sync_cluster();  // the coefficients are whole, and the sums have been read
  if (!p.out.data) return;
  for (int tile = 0; tile < g.across; ++tile) apply_tile<N, Direction, true>(p, g, tile, run, coefficients);
}

template <int N, class Direction> int launch_in_two_passes(const ResponseParams& p, Stream stream) {
  const ResponseTiles g = response_tiles<N>(p.C, kResponseThreads);
  const int64_t slices = response_slices(p.L);
  const dim3 grid(static_cast<unsigned>(p.N * slices * g.across)), images(static_cast<unsigned>(p.N));
  int error = launch(global_response_norm_sum_kernel<N, Direction>, grid, dim3(kResponseThreads), 0, stream, p, g, slices);
  if (error == 0)
    error = launch(global_response_norm_coefficients_kernel<Direction>, images, dim3(kResponseMost), 0, stream, p, slices);
  if (error == 0 && p.out.data)
    error = launch(global_response_norm_apply_kernel<N, Direction>, grid, dim3(kResponseThreads), 0, stream, p, g, slices);
  return error;
}

template <int N, class Direction> int launch_resident(const ResponseParams& p, Stream stream) {
  const auto [blocks, threads, shared, half] = p.plan;
  const dim3 grid(static_cast<unsigned>(p.N * blocks)), block(static_cast<unsigned>(threads));
  return launch_clusters(global_response_norm_resident_kernel<N, Direction>, static_cast<unsigned>(blocks), grid, block,
                         static_cast<size_t>(shared), stream, p, response_tiles<N>(p.C, threads));
}

template <class Direction> void set_plan(ResponseParams& p, const Gpu& gpu) {
  const int width = vector_width(p.C, p.x, p.dy, p.out);
  const int64_t size = dtype_size(p.x.dtype) + (Direction::kBackward ? dtype_size(p.dy.dtype) : 0);
  p.plan = response_plan(p.L, p.C, width, size, Direction::kSums, gpu);
  if (p.plan.blocks <= 1) return;
  const auto clusters = [&](auto kernel) {
    const dim3 block(static_cast<unsigned>(p.plan.threads));
    return clusters_that_fit(kernel, static_cast<unsigned>(p.plan.blocks), block, static_cast<size_t>(p.plan.shared));
  };
  const int64_t fit =
      width == 8 ? clusters(global_response_norm_resident_kernel<8, Direction>) : clusters(global_response_norm_resident_kernel<4, Direction>);
  if (2 * fit * p.plan.blocks < gpu.multiprocessors) p.plan = {};  // too many would stand idle
}

template <class Direction> int launch_response(const ResponseParams& p, Stream stream) {
  const int width = vector_width(p.C, p.x, p.dy, p.out);
  if (p.plan.blocks > 0) return width == 8 ? launch_resident<8, Direction>(p, stream) : launch_resident<4, Direction>(p, stream);
  return width == 8   ? launch_in_two_passes<8, Direction>(p, stream)
         : width == 4 ? launch_in_two_passes<4, Direction>(p, stream)
                      : launch_in_two_passes<1, Direction>(p, stream);
}

}  // namespace fastconv::cuda

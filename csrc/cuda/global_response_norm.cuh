// global_response_norm on the GPU, what both directions share: sums over the pixels of each image, a few operations on them
// that make coefficients of each channel, and a pass that applies these. In two passes over memory, or in one by a cluster of
// blocks that holds the image. A Direction, Forward or Backward, has the arithmetic.
#pragma once

#include "activation.cuh"
#include "global_response_norm_kernel.h"
#include "image_passes.cuh"

namespace fastconv::cuda {

// The sums over a run of pixels of one tile.
template <int N, class Direction, bool kKeep, class Store>
FC_DEVICE void response_sums(const ResponseParams& p, const ImageTiles& g, int tile, const Pixels& run, float* scratch, Store&& store) {
  const auto add = [&](Vec<float, N>(&sums)[Direction::kSums], const Raw<N>& x, const Raw<N>& dy) {
    Direction::template add<N>(sums, activated<N>(to_float(x, p.x.dtype), p.act).value, dy, p.dy.dtype);
  };
  sum_tile<N, Direction::kSums, Direction::kMaps, kKeep ? Direction::kMaps : 0>(p, g, tile, run, scratch, add, store);
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
FC_DEVICE void apply_tile(const ResponseParams& p, const ImageTiles& g, int tile, const Pixels& run, const Coefficients& coefficients) {
  const TilePlace at = tile_place<N>(g, p.C, tile);
  const Vec<float, N> factor = coefficients.vector(0, at.channel, at.in);
  const Vec<float, N> term =
      Direction::kBackward ? coefficients.vector(Direction::kSums - 1, at.channel, at.in) : load_array<N>(p.bias, at.channel, at.in);
  const Walk walk = down_pixels(g, at, run, p.C);
  for_walk<N, Direction::kMaps, kKept>(p, walk, run, [&](int64_t offset, bool in, const Raw<N>& x, const Raw<N>& dy) {
    const Activated<N> a = activated<N>(to_float(x, p.x.dtype), p.act);
    store_array<N>(p.out, run.origin + offset, Direction::template result<N>(a, dy, p.dy.dtype, factor, term), in);
  });
}

// Blocks: images x slices x tiles across.
template <int N, class Direction>
__global__ void __launch_bounds__(kPassThreads, 2)
global_response_norm_sum_kernel(ResponseParams p, ImageTiles g, int64_t slices) {
  FC_SHARED(float, scratch, response_scratch_floats(N, kPassThreads));
  const int64_t index = blockIdx.x / g.across;
  const Pixels run = pixels_of(p, index / slices, slices, index % slices);
  float* const partial = p.partial + index * Direction::kSums * p.C;
  const int tile = static_cast<int>(blockIdx.x % g.across);
  response_sums<N, Direction, false>(p, g, tile, run, scratch, [&](int r, int64_t c, const auto& values, bool in) {
    store_global(partial + r * p.C + c, values, in);
  });
}

// A block an image.
template <class Direction>
__global__ void __launch_bounds__(kPassMost) global_response_norm_coefficients_kernel(ResponseParams p, int64_t slices) {
  FC_SHARED(float, scratch, kWarp);
  const int64_t image = blockIdx.x, C = p.C;
  const float* const partial = p.partial + image * slices * Direction::kSums * C;
  const auto total = [&](int r, int64_t c) { return sum_of_slices(partial + r * C + c, slices, Direction::kSums * C); };
  Direction::finish(p, image, total, GlobalCoefficients<1>{p.coefficients + image * Direction::kSums * C, C}, scratch, true);
}

// Blocks as those of the sums in reverse: of the images summed last the L2 cache still holds the pixels.
template <int N, class Direction>
__global__ void __launch_bounds__(kPassThreads, 2)
global_response_norm_apply_kernel(ResponseParams p, ImageTiles g, int64_t slices) {
  const int64_t block = gridDim.x - 1 - blockIdx.x, index = block / g.across, image = index / slices;
  const GlobalCoefficients<N> coefficients{p.coefficients + image * Direction::kSums * p.C, p.C};
  apply_tile<N, Direction, false>(p, g, static_cast<int>(block % g.across), pixels_of(p, image, slices, index % slices), coefficients);
}

// A cluster an image, a run of its pixels each block: their sums lie in the shared memory of each, where all blocks read them.
template <int N, class Direction>
__global__ void __launch_bounds__(kPassMost, 1) global_response_norm_resident_kernel(ResponseParams p, ImageTiles g) {
  constexpr int kSums = Direction::kSums;
  FC_DYNAMIC_SHARED(shared);
  const int64_t blocks = p.plan.blocks, image = blockIdx.x / blocks, rank = blockIdx.x % blocks, C = p.C;
  float* const scratch = reinterpret_cast<float*>(shared);
  float* const sums = scratch + response_scratch_floats(N, blockDim.x);
  float* const held = sums + kSums * C;
  Pixels run = pixels_of(p, image, blocks, rank);
  run.x = reinterpret_cast<unsigned char*>(held + kSums * 2 * p.plan.half);
  run.dy = run.x + ceil_div(p.L, blocks) * C * dtype_size(p.x.dtype);
  for (int tile = 0; tile < g.across; ++tile)
    response_sums<N, Direction, true>(p, g, tile, run, scratch, [&](int r, int64_t c, const auto& values, bool in) {
      store_shared(sums + r * C + c, values, in);
    });
  sync_cluster();
  const SharedCoefficients<N> coefficients{held, p.plan.half};
  const auto total = [&](int r, int64_t c) { return sum_of_cluster(sums + r * C + c, blocks); };
  Direction::finish(p, image, total, coefficients, scratch, rank == 0);
  sync_cluster();  // the coefficients are whole, and the sums have been read
  if (!p.out.data) return;
  for (int tile = 0; tile < g.across; ++tile) apply_tile<N, Direction, true>(p, g, tile, run, coefficients);
}

template <int N, class Direction> int launch_in_two_passes(const ResponseParams& p, Stream stream) {
  const ImageTiles g = image_tiles<N>(p.C, kPassThreads);
  const int64_t slices = response_slices(p.L);
  const dim3 grid(static_cast<unsigned>(p.N * slices * g.across)), images(static_cast<unsigned>(p.N));
  int error = launch(global_response_norm_sum_kernel<N, Direction>, grid, dim3(kPassThreads), 0, stream, p, g, slices);
  if (error == 0)
    error = launch(global_response_norm_coefficients_kernel<Direction>, images, dim3(kPassMost), 0, stream, p, slices);
  if (error == 0 && p.out.data)
    error = launch(global_response_norm_apply_kernel<N, Direction>, grid, dim3(kPassThreads), 0, stream, p, g, slices);
  return error;
}

template <int N, class Direction> int launch_resident(const ResponseParams& p, Stream stream) {
  const auto [blocks, threads, shared, half] = p.plan;
  const dim3 grid(static_cast<unsigned>(p.N * blocks)), block(static_cast<unsigned>(threads));
  return launch_clusters(global_response_norm_resident_kernel<N, Direction>, static_cast<unsigned>(blocks), grid, block,
                         static_cast<size_t>(shared), stream, p, image_tiles<N>(p.C, threads));
}

template <class Direction> void set_plan(ResponseParams& p, const Gpu& gpu) {
  const int width = vector_width(p.C, p.x, p.dy, p.out);
  const int64_t size = dtype_size(p.x.dtype) + (Direction::kBackward ? dtype_size(p.dy.dtype) : 0);
  p.plan = response_plan(p.L, p.C, width, size, Direction::kSums, gpu);
  const bool fill = width == 8 ? clusters_fill(global_response_norm_resident_kernel<8, Direction>, p.plan, gpu)
                               : clusters_fill(global_response_norm_resident_kernel<4, Direction>, p.plan, gpu);
  if (!fill) p.plan = {};
}

template <class Direction> int launch_response(const ResponseParams& p, Stream stream) {
  const int width = vector_width(p.C, p.x, p.dy, p.out);
  if (p.plan.blocks > 0) return width == 8 ? launch_resident<8, Direction>(p, stream) : launch_resident<4, Direction>(p, stream);
  return width == 8   ? launch_in_two_passes<8, Direction>(p, stream)
         : width == 4 ? launch_in_two_passes<4, Direction>(p, stream)
                      : launch_in_two_passes<1, Direction>(p, stream);
}

}  // namespace fastconv::cuda

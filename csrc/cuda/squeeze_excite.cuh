// squeeze_excite on the GPU, what both directions share: sums over the pixels of each image, the layers on these, and a pass that
// scales the map. In two passes over memory with a block an image between them, or in one by a cluster of blocks that holds the
// map the second pass needs. A Direction, Forward or Backward, has the arithmetic.
//
// In channels_last channels lie side by side (image_passes.cuh). Else a warp takes a plane, or a slice of one, after another.
#pragma once

#include "gate_layers.cuh"
#include "image_passes.cuh"

namespace fastconv::cuda {

constexpr int kPlaneWarps = kPassThreads / kWarp;  // planes of a block of a pass over memory

// Channels [begin, end) of an image, pixels [first, last) of each, and where they are kept: as Pixels.
struct Planes {
  int64_t image, begin, end, first, last, origin;
  unsigned char *x = nullptr, *dy = nullptr;
};
FC_DEVICE Planes planes_of(const GateParams& p, int64_t image, int64_t begin, int64_t end) {
  return {image, begin, end, 0, p.L, (image * p.C + begin) * p.L};
}
template <int N> FC_DEVICE Walk along_plane(const GateParams& p, const Planes& run, int64_t c) {
  const int64_t lane = threadIdx.x % kWarp;
  return {run.first + lane * N, run.last, kWarp * N, (c - run.begin) * p.L, 1, c < run.end};
}
// Calls f(c) for the planes of this warp; c is past the last where others still have one.
template <class F> FC_DEVICE void for_planes(const Planes& run, F&& f) {
  const int64_t warps = blockDim.x / kWarp, warp = threadIdx.x / kWarp;
  for (int64_t first = run.begin; first < run.end; first += warps) f(first + warp);
}

// store(channel, values, in): sums of a few channels side by side.
template <int N, class Direction, bool kKeep, class Store>
FC_DEVICE void gate_sums(const GateParams& p, const ImageTiles& g, int tile, const Pixels& run, float* scratch, Store&& store) {
  const auto add = [&](Vec<float, N>(&sums)[1], const Raw<N>& x, const Raw<N>& dy) { Direction::template add<N>(p, sums[0], x, dy); };
  const auto one = [&](int, int64_t c, const auto& values, bool in) { store(c, values, in); };
  sum_tile<N, 1, Direction::kSummed, kKeep ? Direction::kScaled : 0>(p, g, tile, run, scratch, add, one);
}
template <int N, class Direction, bool kKeep, class Store> FC_DEVICE void gate_sums(const GateParams& p, const Planes& run, Store&& store) {
  for_planes(run, [&](int64_t c) {
    Vec<float, N> sums{};
    for_first_walk<N, Direction::kSummed, kKeep ? Direction::kScaled : 0>(
        p, along_plane<N>(p, run, c), run, [&](const Raw<N>& x, const Raw<N>& dy) { Direction::template add<N>(p, sums, x, dy); });
    float sum = sums[0];
#pragma unroll
    for (int i = 1; i < N; ++i) sum += sums[i];
    store(c, warp_sum(sum), c < run.end && threadIdx.x % kWarp == 0);
  });
}

// out = map factor + term, of the map that Direction scales.
template <int N, class Direction, bool kKept, class Held, class Factor>
FC_DEVICE void scale_walk(const GateParams& p, const Walk& walk, const Held& held, const Factor& factor, const Factor& term) {
  for_walk<N, Direction::kScaled, kKept>(p, walk, held, [&](int64_t offset, bool in, const Raw<N>& x, const Raw<N>& dy) {
    Vec<float, N> v = Direction::kScaled == kX ? to_float(x, p.x.dtype) : to_float(dy, p.dy.dtype);
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = Direction::kScaled == kX ? v[i] * factor[i] : fmaf(v[i], factor[i], term[i]);
    store_array<N>(p.out, held.origin + offset, v, in);
  });
}
template <int N, class Direction> FC_DEVICE void factors_of(const GateParams& p, int64_t at, bool in, Vec<float, N>& factor, Vec<float, N>& term) {
  factor = load_array<N>(Array{p.z, DType::kFloat}, at, in);
#pragma unroll
  for (int i = 0; i < N; ++i) factor[i] = value_of(p.gate, factor[i]);
  term = load_array<N>(Array{p.dpooled, DType::kFloat}, at, in && Direction::kScaled == kDy);
}
template <int N, class Direction, bool kKept> FC_DEVICE void gate_scale(const GateParams& p, const ImageTiles& g, int tile, const Pixels& run) {
  const TilePlace at = tile_place<N>(g, p.C, tile);
  Vec<float, N> factor, term;
  factors_of<N, Direction>(p, run.image * p.C + at.channel, at.in, factor, term);
  scale_walk<N, Direction, kKept>(p, down_pixels(g, at, run, p.C), run, factor, term);
}
template <int N, class Direction, bool kKept> FC_DEVICE void gate_scale(const GateParams& p, const Planes& run) {
  for_planes(run, [&](int64_t c) {
    Vec<float, 1> one, one_term;
    factors_of<1, Direction>(p, run.image * p.C + c, c < run.end, one, one_term);
    Vec<float, N> factor, term;
#pragma unroll
    for (int i = 0; i < N; ++i) factor[i] = one[0], term[i] = one_term[0];
    scale_walk<N, Direction, kKept>(p, along_plane<N>(p, run, c), run, factor, term);
  });
}

// A block's planes of a pass over memory: blocks are images x slices x runs of kPlaneWarps channels.
FC_DEVICE Planes planes_of_block(const GateParams& p, int64_t block, int64_t slices) {
  const int64_t across = ceil_div(p.C, kPlaneWarps), index = block / across, begin = block % across * kPlaneWarps;
  Planes run = planes_of(p, index / slices, begin, std::min<int64_t>(p.C, begin + kPlaneWarps));
  run.first = plane_begin(p.L, slices, index % slices);
  run.last = plane_begin(p.L, slices, index % slices + 1);
  return run;
}

template <int N, class Direction, bool kLast>
__global__ void __launch_bounds__(kPassThreads, 2) squeeze_excite_sum_kernel(GateParams p, ImageTiles g, int64_t slices) {
  if constexpr (kLast) {
    FC_SHARED(float, scratch, response_scratch_floats(N, kPassThreads));
    const int64_t index = blockIdx.x / g.across;
    const Pixels run = pixels_of(p, index / slices, slices, index % slices);
    gate_sums<N, Direction, false>(p, g, static_cast<int>(blockIdx.x % g.across), run, scratch, [&](int64_t c, const auto& values, bool in) {
      store_global(p.partial + index * p.C + c, values, in);
    });
  } else {
    const int64_t index = blockIdx.x / ceil_div(p.C, kPlaneWarps);
    const Planes run = planes_of_block(p, blockIdx.x, slices);
    gate_sums<N, Direction, false>(p, run, [&](int64_t c, float sum, bool in) { store_global(p.partial + index * p.C + c, sum, in); });
  }
}

// A block an image.
template <class Direction> __global__ void __launch_bounds__(kPassMost) squeeze_excite_gate_kernel(GateParams p, int64_t slices) {
  FC_SHARED(float, scratch, kColumns * kPassMost);
  const float* const partial = p.partial + blockIdx.x * slices * p.C;
  Direction::layers(p, blockIdx.x, Team{1, 0}, [&](int64_t c) { return sum_of_slices(partial + c, slices, p.C); }, scratch);
}

// Blocks as those of the sums in reverse: of the images summed last the L2 cache still holds the pixels.
template <int N, class Direction, bool kLast>
__global__ void __launch_bounds__(kPassThreads, 2) squeeze_excite_scale_kernel(GateParams p, ImageTiles g, int64_t slices) {
  const int64_t block = gridDim.x - 1 - blockIdx.x;
  if constexpr (kLast) {
    const int64_t index = block / g.across;
    gate_scale<N, Direction, false>(p, g, static_cast<int>(block % g.across), pixels_of(p, index / slices, slices, index % slices));
  } else {
    gate_scale<N, Direction, false>(p, planes_of_block(p, block, slices));
  }
}

// A cluster an image: each block holds a run of pixels, whose sums all blocks read, or the planes of its share of the channels.
template <int N, class Direction, bool kLast>
__global__ void __launch_bounds__(kPassMost, 1) squeeze_excite_resident_kernel(GateParams p, ImageTiles g) {
  FC_DYNAMIC_SHARED(shared);
  const int64_t blocks = p.plan.blocks, image = blockIdx.x / blocks;
  const Team team{blocks, blockIdx.x % blocks};
  float* const scratch = reinterpret_cast<float*>(shared);
  float* const sums = scratch + response_scratch_floats(N, blockDim.x);
  unsigned char* const held = reinterpret_cast<unsigned char*>(sums + round_up(p.C, 4));
  if constexpr (kLast) {
    Pixels run = pixels_of(p, image, blocks, team.rank);
    run.x = run.dy = held;
    for (int tile = 0; tile < g.across; ++tile)
      gate_sums<N, Direction, true>(p, g, tile, run, scratch, [&](int64_t c, const auto& values, bool in) { store_shared(sums + c, values, in); });
    sync_cluster();
    Direction::layers(p, image, team, [&](int64_t c) { return sum_of_cluster(sums + c, blocks); }, scratch);
    if (!p.out.data) return;
    for (int tile = 0; tile < g.across; ++tile) gate_scale<N, Direction, true>(p, g, tile, run);
  } else {
    Planes run = planes_of(p, image, team.begin(p.C), team.end(p.C));
    run.x = run.dy = held;
    gate_sums<N, Direction, true>(p, run, [&](int64_t c, float sum, bool in) { store_shared(sums + c, sum, in); });
    sync_cluster();
    Direction::layers(p, image, team, [&](int64_t c) { return load_shared<float>(sums + c); }, scratch);
    if (p.out.data) gate_scale<N, Direction, true>(p, run);
  }
}

template <int N, class Direction, bool kLast> int launch_in_two_passes(const GateParams& p, Stream stream) {
  const ImageTiles g = image_tiles<N>(p.C, kPassThreads);
  const int64_t slices = gate_slices(p.L, p.channels_last), across = kLast ? g.across : ceil_div(p.C, kPlaneWarps);
  const dim3 grid(static_cast<unsigned>(p.N * slices * across)), images(static_cast<unsigned>(p.N));
  int error = launch(squeeze_excite_sum_kernel<N, Direction, kLast>, grid, dim3(kPassThreads), 0, stream, p, g, slices);
  if (error == 0) error = launch(squeeze_excite_gate_kernel<Direction>, images, dim3(kPassMost), 0, stream, p, slices);
  if (error == 0 && p.out.data)
    error = launch(squeeze_excite_scale_kernel<N, Direction, kLast>, grid, dim3(kPassThreads), 0, stream, p, g, slices);
  return error;
}

template <int N, class Direction, bool kLast> int launch_resident(const GateParams& p, Stream stream) {
  const auto [blocks, threads, shared, half] = p.plan;
  const dim3 grid(static_cast<unsigned>(p.N * blocks)), block(static_cast<unsigned>(threads));
  return launch_clusters(squeeze_excite_resident_kernel<N, Direction, kLast>, static_cast<unsigned>(blocks), grid, block,
                         static_cast<size_t>(shared), stream, p, image_tiles<N>(p.C, threads));
}

// Elements of every map that lie side by side and are moved at a time.
inline int gate_width(const GateParams& p) {
  const int64_t run = p.channels_last ? p.C : p.L;
  const int width = vector_width(run, p.x, p.dy, p.out);
  return width == 1 && run % 4 == 0 && in_vectors(8, p.x, p.dy, p.out) ? 4 : width;
}

template <class Direction, bool kLast> void set_plan_as(GateParams& p, const Gpu& gpu) {
  const int width = gate_width(p);
  const Array& held = Direction::kScaled == kX ? p.x : p.dy;
  p.plan = gate_plan(p.L, p.C, kLast, width, dtype_size(held.dtype), gpu);
  const bool fill = width == 8 ? clusters_fill(squeeze_excite_resident_kernel<8, Direction, kLast>, p.plan, gpu)
                               : clusters_fill(squeeze_excite_resident_kernel<4, Direction, kLast>, p.plan, gpu);
  if (!fill) p.plan = {};
}
template <class Direction> void set_plan(GateParams& p, const Gpu& gpu) {
  p.channels_last ? set_plan_as<Direction, true>(p, gpu) : set_plan_as<Direction, false>(p, gpu);
}

template <class Direction, bool kLast> int launch_gate_as(const GateParams& p, Stream stream) {
  const int width = gate_width(p);
  if (p.plan.blocks > 0) return width == 8 ? launch_resident<8, Direction, kLast>(p, stream) : launch_resident<4, Direction, kLast>(p, stream);
  return width == 8   ? launch_in_two_passes<8, Direction, kLast>(p, stream)
         : width == 4 ? launch_in_two_passes<4, Direction, kLast>(p, stream)
                      : launch_in_two_passes<1, Direction, kLast>(p, stream);
}
template <class Direction> int launch_gate(const GateParams& p, Stream stream) {
  return p.channels_last ? launch_gate_as<Direction, true>(p, stream) : launch_gate_as<Direction, false>(p, stream);
}

}  // namespace fastconv::cuda

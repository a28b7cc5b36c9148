// The LayerNorm of depthwise_conv_norm on the GPU as kernels of its own, forward and backward: one pass over the pixels, whose
// channels lie in the registers of a group of lanes.
//
//   dz = rstd (g dy - mean_c(g dy) - xhat mean_c(g dy xhat)),   xhat = (z - mean) rstd,   g = norm_weight
#include "depthwise_conv_norm_kernel.h"

#include "norm_lanes.cuh"
#include "reduce_kernel.h"

namespace fastconv::cuda {
namespace {

constexpr int kThreads = 256;

template <int N> __global__ void __launch_bounds__(kThreads, 2) layer_norm_fwd_kernel(ConvNormForwardParams p, NormGrid g) {
  constexpr int kParts = Lane<N>::kParts;
  FC_SHARED(float, weight, kSegment<N>);
  FC_SHARED(float, bias, kSegment<N>);
  const Lane<N> at(g);
  const Array z{p.conv.y.data, p.conv.y.dtype};
  stage_segment<N>(p.norm_weight, g, at.segment, weight);
  stage_segment<N>(p.norm_bias, g, at.segment, bias);
  sync_threads();

  const int64_t slice = blockIdx.x / g.segments, end = part_begin(g.pixels, g.slices, slice + 1);
  for (int64_t first = part_begin(g.pixels, g.slices, slice); first < end; first += g.step(kThreads)) {
    const int64_t pixel = first + at.group;
    const int64_t segment = pixel * g.C + at.segment;
    const bool in = pixel < end;
    Raw<N> raw[kParts];
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const int c = at.channel(g, part);
      raw[part] = load_raw<N>(z, segment + c, in && c < at.count);
    }
    Vec<float, N> held[kParts];
#pragma unroll
    for (int part = 0; part < kParts; ++part) held[part] = to_float(raw[part], z.dtype);
    const Moments m = moments(g, at, held, p.eps, [&](auto&& add) {
      at.others(g, [&](int64_t c) { add(load_array<N>(z, pixel * g.C + c, in)); });
    });
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const int c = at.channel(g, part);
      store_array<N>(p.y, segment + c, normalised(held[part], m, load_segment<N>(weight, c), load_segment<N>(bias, c)), in && c < at.count);
    }
    const bool first_lane = in && at.lane == 0 && at.segment == 0;
    store_global(p.mean + pixel, m.mean + m.rest, p.mean && first_lane);
    store_global(p.rstd + pixel, m.rstd, p.rstd && first_lane);
  }
}

template <int N> __global__ void __launch_bounds__(kThreads) layer_norm_bwd_kernel(ConvNormBackwardParams p, NormGrid g) {
  constexpr int kParts = Lane<N>::kParts;
  FC_SHARED(float, weight, kSegment<N>);
  FC_SHARED(float, dweight_sum, kSegment<N>);
  FC_SHARED(float, dbias_sum, kSegment<N>);
  const Lane<N> at(g);
  const float scale = 1.0f / static_cast<float>(g.C);
  stage_segment<N>(p.norm_weight, g, at.segment, weight);
  sync_threads();

  Vec<float, N> dweight[kParts] = {}, dbias[kParts] = {};
  const int64_t slice = blockIdx.x / g.segments, end = part_begin(g.pixels, g.slices, slice + 1);
  for (int64_t first = part_begin(g.pixels, g.slices, slice); first < end; first += g.step(kThreads)) {
    const int64_t pixel = first + at.group;
    const int64_t segment = pixel * g.C + at.segment;
    const bool in = pixel < end;
    const float mean = load_global<float>(p.mean + pixel, in), rstd = load_global<float>(p.rstd + pixel, in);
    Raw<N> z_raw[kParts], dy_raw[kParts];
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const int c = at.channel(g, part);
      z_raw[part] = load_raw<N>(p.z, segment + c, in && c < at.count);
      dy_raw[part] = load_raw<N>(p.dy, segment + c, in && c < at.count);
    }
    float sum = 0, product = 0;
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const Vec<float, N> z = to_float(z_raw[part], p.z.dtype), dy = to_float(dy_raw[part], p.dy.dtype);
      const Vec<float, N> w = load_segment<N>(weight, at.channel(g, part));
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const float xhat = (z[i] - mean) * rstd;
        sum = fmaf(w[i], dy[i], sum);
        product = fmaf(w[i] * dy[i], xhat, product);
        dweight[part][i] = fmaf(dy[i], xhat, dweight[part][i]);
        dbias[part][i] += dy[i];
      }
    }
    at.others(g, [&](int64_t c) {
      const Vec<float, N> z = load_array<N>(p.z, pixel * g.C + c, in), dy = load_array<N>(p.dy, pixel * g.C + c, in);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const float w = load_array<1>(p.norm_weight, c + i)[0];
        sum = fmaf(w, dy[i], sum);
        product = fmaf(w * dy[i], (z[i] - mean) * rstd, product);
      }
    });
    sum = group_sum(sum, g.lanes) * scale;
    product = group_sum(product, g.lanes) * scale;
    if (!p.dz.data) continue;
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const int c = at.channel(g, part);
      const Vec<float, N> z = to_float(z_raw[part], p.z.dtype), dy = to_float(dy_raw[part], p.dy.dtype);
      const Vec<float, N> w = load_segment<N>(weight, at.channel(g, part));
      Vec<float, N> dz;
#pragma unroll
      for (int i = 0; i < N; ++i) dz[i] = (w[i] * dy[i] - sum - (z[i] - mean) * rstd * product) * rstd;
      store_array<N>(p.dz, segment + c, dz, in && c < at.count);
    }
  }
  if (!p.norm_partial) return;

  // In order: the pixels of a warp in a fixed tree, then the warps one after another.
#pragma unroll
  for (int part = 0; part < kParts; ++part)
#pragma unroll
    for (int i = 0; i < N; ++i)
      for (int other = g.lanes; other < kWarp; other *= 2) {
        dweight[part][i] += shuffle_xor(dweight[part][i], other);
        dbias[part][i] += shuffle_xor(dbias[part][i], other);
      }
  for (int warp = 0; warp < kThreads / kWarp; ++warp) {
    const bool mine = threadIdx.x / kWarp == warp && threadIdx.x % kWarp < g.lanes;
    if (mine) {
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        const int c = at.channel(g, part);
        if (warp > 0) {
          const Vec<float, N> before_w = load_segment<N>(dweight_sum, c), before_b = load_segment<N>(dbias_sum, c);
#pragma unroll
          for (int i = 0; i < N; ++i) dweight[part][i] += before_w[i], dbias[part][i] += before_b[i];
        }
        store_segment<N>(dweight_sum, c, dweight[part]);
        store_segment<N>(dbias_sum, c, dbias[part]);
      }
    }
    sync_threads();
  }
  float* const partial = p.norm_partial + slice * 2 * g.C + at.segment;  // [slice][2][C]
  for (int c = threadIdx.x; c < g.held; c += kThreads) {
    const bool in = at.segment + c < g.C;
    store_global(partial + c, load_shared<float>(dweight_sum + place_in_segment<N>(c)), in);
    store_global(partial + g.C + c, load_shared<float>(dbias_sum + place_in_segment<N>(c)), in);
  }
}

template <int N> int launch_forward(const ConvNormForwardParams& p, Stream stream) {
  constexpr int64_t kBlocks = 1 << 12;
  const ConvShape& s = p.conv.shape;
  NormGrid g = norm_grid<N>(s, 0);
  g.slices = std::min(ceil_div(g.pixels, 4 * g.step(kThreads)), std::max<int64_t>(1, kBlocks / g.segments));
  return launch(layer_norm_fwd_kernel<N>, dim3(static_cast<unsigned>(g.slices * g.segments)), dim3(kThreads), 0, stream, p, g);
}

template <int N> int launch_backward(const ConvNormBackwardParams& p, Stream stream) {
  const NormGrid g = norm_grid<N>(p.conv.shape, norm_bwd_slices(p.conv.shape));
  return launch(layer_norm_bwd_kernel<N>, dim3(static_cast<unsigned>(g.slices * g.segments)), dim3(kThreads), 0, stream, p, g);
}

// On tensor cores z and its norm are one launch where the plan finds room; x may be float32 beside a z of 16 bits, as autocast
// leaves it, and is rounded to z's dtype.
JoinedMmaPlan joined_mma_plan(const ConvNormForwardParams& p) {
  const ConvShape& s = p.conv.shape;
  const DType z = p.conv.y.dtype, x = p.conv.x.dtype;
  if (!in_vectors(s.C, p.conv.x, p.conv.y, p.y) || !conv_mma_serves(s.K, z, x == DType::kFloat ? z : x, p.conv.weight.dtype)) return {};
  return conv_norm_mma_plan(s, p.gpu);
}

// Without tiles where the rows cannot be read in 16 bytes: the joined form has no other way.
JoinedPlan joined_plan(const ConvNormForwardParams& p) {
  const ConvShape& s = p.conv.shape;
  if (!in_vectors(s.C, p.conv.x, p.conv.y, p.y)) return {};
  return conv_norm_plan(s, dtype_size(p.conv.x.dtype), dtype_size(p.conv.y.dtype), p.gpu);
}

}  // namespace

bool depthwise_conv_norm_joins(const ConvNormForwardParams& p) {
  return joined_mma_plan(p).tiles.count > 0 || joined_plan(p).tiles.count > 0;
}

int depthwise_conv_norm_fwd_launch(const ConvNormForwardParams& p, Stream stream) {
  const JoinedMmaPlan mma = joined_mma_plan(p);
  if (mma.tiles.count > 0) return depthwise_conv_norm_mma_launch(p, mma, stream);
  const JoinedPlan plan = joined_plan(p);
  if (plan.tiles.count > 0) return depthwise_conv_norm_joined_launch(p, plan, stream);
  const int error = depthwise_conv_fwd_launch(p.conv, stream);
  if (error != 0) return error;
  switch (vector_width(p.conv.shape.C, p.conv.y, p.y)) {
    case 8: return launch_forward<8>(p, stream);
    case 4: return launch_forward<4>(p, stream);
    default: return launch_forward<1>(p, stream);
  }
}

int depthwise_conv_norm_bwd_launch(const ConvNormBackwardParams& p, Stream stream) {
  const ConvShape& s = p.conv.shape;
  const int width = vector_width(s.C, p.dy, p.z, p.dz);
  int error = width == 8 ? launch_backward<8>(p, stream) : width == 4 ? launch_backward<4>(p, stream) : launch_backward<1>(p, stream);
  const int64_t slices = norm_bwd_slices(s), stride = 2 * s.C;
  if (error == 0 && p.norm_partial) error = reduce_partials_launch(p.norm_partial, slices, stride, s.C, p.dnorm_weight, stream);
  if (error == 0 && p.norm_partial) error = reduce_partials_launch(p.norm_partial + s.C, slices, stride, s.C, p.dnorm_bias, stream);
  if (error == 0 && (p.conv.dx.data || p.conv.partial)) error = depthwise_conv_bwd_launch(p.conv, stream);
  return error;
}

}  // namespace fastconv::cuda

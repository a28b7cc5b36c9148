// The LayerNorm of depthwise_conv_norm on the GPU, forward and backward: one pass over the pixels, whose channels lie in
// the registers of a group of lanes.
//
//   dz = rstd (g dy - mean_c(g dy) - xhat mean_c(g dy xhat)),   xhat = (z - mean) rstd,   g = norm_weight
#include "depthwise_conv_norm_kernel.h"

#include "array.cuh"
#include "reduce_kernel.h"

namespace fastconv::cuda {
namespace {

constexpr int kThreads = 256;
// Channels of a lane, N at a time: 8 or 4 in accesses of 16 bytes, or 1, where each needs an address of its own.
template <int N> constexpr int kLaneChannels = N > 1 ? 32 : 12;
template <int N> constexpr int kSegment = kLaneChannels<N> * kWarp;  // of a warp

// A pixel belongs to `lanes` lanes of a warp, a power of two: enough for its channels, or all 32. Where those hold fewer
// than C channels, a block holds and writes one segment of them, and reads the rest again as often as it is needed.
struct NormGrid {
  int lanes, held, segments;  // held: channels of the lanes
  int64_t pixels, C, slices;  // blocks: slices x segments
  constexpr int64_t step() const { return kThreads / lanes; }  // pixels that a block holds at a time
};

template <int N> NormGrid norm_grid(const ConvShape& s, int64_t slices) {
  int lanes = 1;
  while (lanes < kWarp && lanes * kLaneChannels<N> < s.C) lanes *= 2;
  const int held = lanes * kLaneChannels<N>;
  return {lanes, held, static_cast<int>(ceil_div(s.C, held)), s.pixels(), s.C, slices};
}

// Sum over the lanes of a pixel, the same bits in each.
FC_DEVICE float group_sum(float v, int lanes) {
  for (int other = lanes / 2; other > 0; other /= 2) v += shuffle_xor(v, other);
  return v;
}

// Which channels and pixel are this thread's.
template <int N> struct Lane {
  static constexpr int kParts = kLaneChannels<N> / N;
  int64_t segment;  // first channel of the block
  int lane, group;  // in the pixel; pixel of the block
  int count;        // channels of the segment that there are
  FC_DEVICE explicit Lane(const NormGrid& g)
      : segment(static_cast<int64_t>(blockIdx.x % g.segments) * g.held), lane(threadIdx.x % g.lanes), group(threadIdx.x / g.lanes),
        count(g.C - segment < g.held ? static_cast<int>(g.C - segment) : g.held) {}
  // First of the N channels of a part, in the segment.
  FC_DEVICE int channel(const NormGrid& g, int part) const { return (part * g.lanes + lane) * N; }
  // Calls f(c) for this lane's share of the channels that the block does not hold, N from c on.
  template <class F> FC_DEVICE void others(const NormGrid& g, F&& f) const {
    const int64_t count = g.segments > 1 ? (g.C < segment + g.held ? segment : g.C - g.held) : 0;
    for (int64_t i = lane * N; i < count; i += g.lanes * N) f(i < segment ? i : i + g.held);
  }
};

// A segment of float32 values in shared memory: where lanes read eight each, the halves of the eights lie apart, so that 16
// bytes of neighbouring lanes are side by side.
template <int N> FC_DEVICE int place_in_segment(int c) { return N < 8 ? c : c / 8 * 4 + c % 4 + c / 4 % 2 * (kSegment<N> / 2); }

template <int N> FC_DEVICE Vec<float, N> load_segment(const float* segment, int c) {
  Vec<float, N> v;
  constexpr int kPart = N < 4 ? N : 4;
#pragma unroll
  for (int i = 0; i < N; i += kPart) {
    const auto part = load_shared<Vec<float, kPart>>(segment + place_in_segment<N>(c + i));
#pragma unroll
    for (int j = 0; j < kPart; ++j) v[i + j] = part[j];
  }
  return v;
}
template <int N> FC_DEVICE void store_segment(float* segment, int c, const Vec<float, N>& v) {
  constexpr int kPart = N < 4 ? N : 4;
#pragma unroll
  for (int i = 0; i < N; i += kPart) {
    Vec<float, kPart> part;
#pragma unroll
    for (int j = 0; j < kPart; ++j) part[j] = v[i + j];
    store_shared(segment + place_in_segment<N>(c + i), part);
  }
}
template <int N> FC_DEVICE void stage_segment(const Array& a, const NormGrid& g, int64_t first, float* segment) {
  for (int c = threadIdx.x; c < g.held; c += kThreads)
    store_shared(segment + place_in_segment<N>(c), load_array<1>(a, first + c, first + c < g.C)[0]);
}

template <int N> __global__ void __launch_bounds__(kThreads, 2) layer_norm_fwd_kernel(ConvNormForwardParams p, NormGrid g) {
  constexpr int kParts = Lane<N>::kParts;
  FC_SHARED(float, weight, kSegment<N>);
  FC_SHARED(float, bias, kSegment<N>);
  const Lane<N> at(g);
  const Array z{p.conv.y.data, p.conv.y.dtype};
  const float scale = 1.0f / static_cast<float>(g.C);
  stage_segment<N>(p.norm_weight, g, at.segment, weight);
  stage_segment<N>(p.norm_bias, g, at.segment, bias);
  sync_threads();

  const int64_t slice = blockIdx.x / g.segments, end = part_begin(g.pixels, g.slices, slice + 1);
  for (int64_t first = part_begin(g.pixels, g.slices, slice); first < end; first += g.step()) {
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
    float sum = 0;
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      held[part] = to_float(raw[part], z.dtype);
#pragma unroll
      for (int i = 0; i < N; ++i) sum += held[part][i];
    }
    at.others(g, [&](int64_t c) {
      const Vec<float, N> v = load_array<N>(z, pixel * g.C + c, in);
#pragma unroll
      for (int i = 0; i < N; ++i) sum += v[i];
    });
    const float mean = group_sum(sum, g.lanes) * scale;
    // The variance in a second pass. Where the mean is far above the deviation its rounding shows: what the deviations
    // sum to, and should not, is taken off them.
    float rest = 0, square = 0;
    const auto add_deviations = [&](const Vec<float, N>& v) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        rest += v[i] - mean;
        square = fmaf(v[i] - mean, v[i] - mean, square);
      }
    };
#pragma unroll
    for (int part = 0; part < kParts; ++part)
      if (at.channel(g, part) < at.count) add_deviations(held[part]);
    at.others(g, [&](int64_t c) { add_deviations(load_array<N>(z, pixel * g.C + c, in)); });
    rest = group_sum(rest, g.lanes) * scale;
    const float centred = group_sum(square, g.lanes) * scale - rest * rest, variance = centred < 0 ? 0.0f : centred;
    // One channel is its own mean. 0 says so to backward, which sees z rounded and would find z - mean a little off 0.
    const float rstd = g.C == 1 ? 0.0f : rsqrt(variance + p.eps);
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const int c = at.channel(g, part);
      const Vec<float, N> w = load_segment<N>(weight, c), b = load_segment<N>(bias, c);
      Vec<float, N> y;
#pragma unroll
      for (int i = 0; i < N; ++i) y[i] = fmaf((held[part][i] - mean - rest) * rstd, w[i], b[i]);
      store_array<N>(p.y, segment + c, y, in && c < at.count);
    }
    const bool first_lane = in && at.lane == 0 && at.segment == 0;
    store_global(p.mean + pixel, mean + rest, p.mean && first_lane);
    store_global(p.rstd + pixel, rstd, p.rstd && first_lane);
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
  for (int64_t first = part_begin(g.pixels, g.slices, slice); first < end; first += g.step()) {
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
  g.slices = std::min(ceil_div(g.pixels, 4 * g.step()), std::max<int64_t>(1, kBlocks / g.segments));
  return launch(layer_norm_fwd_kernel<N>, dim3(static_cast<unsigned>(g.slices * g.segments)), dim3(kThreads), 0, stream, p, g);
}

template <int N> int launch_backward(const ConvNormBackwardParams& p, Stream stream) {
  const NormGrid g = norm_grid<N>(p.conv.shape, norm_bwd_slices(p.conv.shape));
  return launch(layer_norm_bwd_kernel<N>, dim3(static_cast<unsigned>(g.slices * g.segments)), dim3(kThreads), 0, stream, p, g);
}

}  // namespace

int depthwise_conv_norm_fwd_launch(const ConvNormForwardParams& p, Stream stream) {
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

// LayerNorm of the pixels of a tile whose channels wait in shared memory, for the kernels that join it with the convolution.
#pragma once

#include "depthwise_conv_norm_kernel.h"
#include "norm_lanes.cuh"

namespace fastconv::cuda {

// `count` floats of an array: the one at base + from(i), or 0 where from(i) is negative, goes to to(i). kAhead loads of a
// thread are in flight, which the compiler does not see to by itself: converting takes branches.
template <int kAhead, class From, class To> FC_DEVICE void stage_floats(const Array& a, int64_t base, int count, From&& from, To&& to) {
  for (int first = threadIdx.x; first < count; first += kAhead * blockDim.x) {
    Raw<1> raw[kAhead];
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      const int i = first + j * blockDim.x, offset = from(i);
      const bool in = i < count && offset >= 0;
      raw[j] = load_raw<1>(a, in ? base + offset : 0, in);
    }
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      const int i = first + j * blockDim.x;
      store_shared(to(i), to_float(raw[j], a.dtype)[0], i < count);
    }
  }
}

// A pixel of a tile: which one it is in the array, and whether the map has it.
struct PixelPlace {
  int64_t pixel;
  bool in;
};

// The norm of a tile's pixels that lie in the map, z(inside, channel) in shared memory. `segments`: for the norm's weight and bias.
// With a barrier inside, and none after.
template <int N, class Z, class Place>
FC_DEVICE void norm_tile(const ConvNormForwardParams& p, const NormGrid& g, int pixels, const Z& z, float* segments, Place&& place) {
  constexpr int kParts = Lane<N>::kParts;
  const ConvShape& s = p.conv.shape;
  float* const weight = segments;
  float* const bias = segments + kSegment<N>;
  const Lane<N> at(g);
  const auto from = [&](int c) { return c < s.C ? c : -1; };
  stage_floats<3>(p.norm_weight, 0, g.held, from, [&](int c) { return weight + place_in_segment<N>(c); });
  stage_floats<3>(p.norm_bias, 0, g.held, from, [&](int c) { return bias + place_in_segment<N>(c); });
  sync_threads();
  for (int first = 0; first < pixels; first += g.step(blockDim.x)) {
    const int inside = first + at.group;
    const PixelPlace found = inside < pixels ? place(inside) : PixelPlace{0, false};
    const int64_t pixel = found.pixel;
    const bool in = found.in;
    Vec<float, N> held[kParts];
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const int c = at.channel(g, part);
      held[part] = z.template load<N>(inside, c, in && c < at.count);
    }
    const Moments m = moments(g, at, held, p.eps, [](auto&&) {});
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const int c = at.channel(g, part);
      const Vec<float, N> y = normalised(held[part], m, load_segment<N>(weight, c), load_segment<N>(bias, c));
      store_array<N>(p.y, pixel * s.C + c, y, in && c < at.count);
    }
    if (p.mean) {
      store_global(p.mean + pixel, m.mean + m.rest, in && at.lane == 0);
      store_global(p.rstd + pixel, m.rstd, in && at.lane == 0);
    }
  }
}

}  // namespace fastconv::cuda

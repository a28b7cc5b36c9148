// How the channels of a pixel lie in the registers of a group of lanes, and the LayerNorm over them.
#pragma once

#include "array.cuh"

namespace fastconv::cuda {

// Channels of a lane, N at a time: 8 or 4 in accesses of 16 bytes, or 1, where each needs an address of its own.
template <int N> constexpr int kLaneChannels = N > 1 ? 32 : 12;
template <int N> constexpr int kSegment = kLaneChannels<N> * kWarp;  // of a warp

// A pixel belongs to `lanes` lanes of a warp, a power of two: enough for its channels, or all 32. Where those hold fewer
// than C channels, a block holds and writes one segment of them, and reads the rest again as often as it is needed.
struct NormGrid {
  int lanes, held, segments;  // held: channels of the lanes
  int64_t pixels, C, slices;  // blocks: slices x segments
  constexpr int step(unsigned threads) const { return static_cast<int>(threads) / lanes; }  // pixels that a block holds at a time
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
  for (int c = threadIdx.x; c < g.held; c += blockDim.x)
    store_shared(segment + place_in_segment<N>(c), load_array<1>(a, first + c, first + c < g.C)[0]);
}

// Mean of a pixel in two parts, since the first is rounded, and 1 / sqrt(variance + eps). `held`: this lane's values;
// others(f) calls f with those that the block does not hold.
struct Moments {
  float mean, rest, rstd;
};
// A product that no compiler joins with a sum after it: kernels around this code get the same bits.
FC_DEVICE float rounded_product(float a, float b) { return fmaf(a, b, 0.0f); }

template <int N, int kParts, class Others>
FC_DEVICE Moments moments(const NormGrid& g, const Lane<N>& at, const Vec<float, N> (&held)[kParts], float eps, Others&& others) {
  const float scale = 1.0f / static_cast<float>(g.C);
  float sum = 0;
  const auto add = [&](const Vec<float, N>& v) {
#pragma unroll
    for (int i = 0; i < N; ++i) sum += v[i];
  };
#pragma unroll
  for (int part = 0; part < kParts; ++part) add(held[part]);
  others(add);
  const float mean = rounded_product(group_sum(sum, g.lanes), scale);
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
  others(add_deviations);
  rest = rounded_product(group_sum(rest, g.lanes), scale);
  const float centred = fmaf(-rest, rest, rounded_product(group_sum(square, g.lanes), scale)), variance = centred < 0 ? 0.0f : centred;
  // One channel is its own mean. 0 says so to backward, which sees z rounded and would find z - mean a little off 0.
  return {mean, rest, g.C == 1 ? 0.0f : rsqrt(variance + eps)};
}

// What the norm makes of a lane's N values; `weight` and `bias`: theirs.
template <int N>
FC_DEVICE Vec<float, N> normalised(const Vec<float, N>& v, const Moments& m, const Vec<float, N>& weight, const Vec<float, N>& bias) {
  Vec<float, N> y;
#pragma unroll
  for (int i = 0; i < N; ++i) y[i] = fmaf((v[i] - m.mean - m.rest) * m.rstd, weight[i], bias[i]);
  return y;
}

}  // namespace fastconv::cuda

// The pieces of a depthwise convolution on tensor cores: NHWC to planes and back, filters as band matrices, rows of mma.
// conv_mma.h cuts the tiles, README.md draws them. T is bfloat16 or float16.
#pragma once

#include "array.cuh"
#include "conv_mma.h"

namespace fastconv::cuda {

// R: rows of a strip. A block of several groups of kMmaThreads threads has each group work on channels of its own.
constexpr int kMmaWarps = kMmaThreads / kWarp, kMmaOwn = kMmaChannels / kMmaWarps;  // channels of a warp

// Sizes of a launch that its blocks share.
struct MmaGrid {
  ConvMmaTiles tiles;
  int H, W, row;   // of a map, again, and elements of a row: conv_mma_pays has them fit
  int chunks;      // of kMmaChannels channels
  int64_t slices;  // blocks: slices x chunks, each a run of consecutive tiles
  bool wide;       // every activation moves in accesses of 16 bytes
};

// The first slab of a tile: image, band of the image, slab of the band; and how many images there are from this one on, at
// most so many as a tile can reach.
struct MmaPlace {
  int64_t n;
  int band, column, images;
};
FC_DEVICE MmaPlace place_of(const ConvShape& s, const ConvMmaTiles& t, int64_t tile) {
  // Fewer than 2^31 slabs: conv_mma_pays. Dividing 64 bits costs as much as staging two rows.
  const int slab = static_cast<int>(tile * t.slabs), band = slab / t.across, n = band / t.bands;
  const int64_t left = s.N - n;
  return {n, band - n * t.bands, slab - band * t.across, left < kMmaStrips ? static_cast<int>(left) : kMmaStrips};
}

// Strip m of a tile: its slab, and its number from the top of that.
struct Strip {
  int slab, number;
  bool used;
};
FC_DEVICE Strip strip_of(const ConvMmaTiles& t, int m) {
  const int by = t.down ? t.tall : t.slabs, quotient = m / by, rest = m - quotient * by;
  const bool used = m < t.strips();
  return {used ? (t.down ? quotient : rest) : 0, used ? (t.down ? rest : quotient) : 0, used};
}
FC_DEVICE int mma_thread() { return static_cast<int>(threadIdx.x) % kMmaThreads; }

// Unit of a plane that the strip's windows begin with. A strip that is not used reads what the first one does.
template <int R> FC_DEVICE int window_unit(const ConvMmaTiles& t, const MmaPlace& at, const Strip& strip) {
  const int column = at.column + strip.slab, band = column / t.across;
  return band * (t.stride - t.across) + strip.slab + strip.number * R * t.pitch;
}
// Its first output: image after the tile's first, row, column.
struct StripPlace {
  int image, h, w;
};
template <int R> FC_DEVICE StripPlace strip_place(const ConvMmaTiles& t, const MmaPlace& at, const Strip& strip) {
  const int column = at.column + strip.slab, further = column / t.across;
  int image = 0, band = at.band + further;
  for (; band >= t.bands; band -= t.bands) ++image;
  return {image, (band * t.tall + strip.number) * R, (column - further * t.across) * kMmaColumns};
}
// Where the windows of each strip begin, in bytes of a plane: of the tile that is being staged, for all lanes to look up.
template <int R> FC_DEVICE void stage_windows(const ConvMmaTiles& t, const MmaPlace& at, int* windows) {
  const int m = mma_thread();
  if (m < kMmaStrips) store_shared(windows + m, window_unit<R>(t, at, strip_of(t, m)) * 16);
}
// Element of a pixel's first channel, in an array of whole maps.
FC_DEVICE int64_t element_of(const ConvShape& s, const MmaGrid& g, const MmaPlace& at, int image, int h, int w) {
  return (at.n * g.H + (image * g.H + h)) * g.row + w * s.C;
}

// Byte of channel c's plane.
FC_DEVICE int plane_byte(int c, int plane) { return c * plane + c / 8 * kMmaSkew; }

// --- NHWC to planes and back: a thread has two neighbouring pixels in eight channels, which are eight words of the planes

using Eight = Vec<uint32_t, 4>;  // 16-bit values of eight channels

template <bool kWide> FC_DEVICE Eight load_eight(const uint16_t* p, int channels, bool in) {
  if constexpr (kWide) {
    return load_global<Eight>(p, in && channels > 0);
  } else {
    Eight v{};
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i / 2] |= static_cast<uint32_t>(load_global<uint16_t>(p + i, in && i < channels)) << i % 2 * 16;
    return v;
  }
}
template <bool kWide> FC_DEVICE void store_eight(uint16_t* p, int channels, const Eight& v, bool in) {
  if constexpr (kWide) {
    store_global(p, v, in && channels > 0);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) store_global(p + i, static_cast<uint16_t>(v[i / 2] >> i % 2 * 16), in && i < channels);
  }
}
// float32 maps: what autocast leaves in that dtype, rounded on its way into the planes, and results on their way out.
using Values = Vec<float, 8>;
template <class T> FC_DEVICE Values values_of(const Eight& v) {
  Values values;
#pragma unroll
  for (int i = 0; i < 8; ++i) values[i] = to_float(T{static_cast<uint16_t>(v[i / 2] >> i % 2 * 16)});
  return values;
}
template <class T> FC_DEVICE Eight rounded(const Values& v) {
  return {from_floats<T>(v[0], v[1]), from_floats<T>(v[2], v[3]), from_floats<T>(v[4], v[5]), from_floats<T>(v[6], v[7])};
}
template <bool kWide> FC_DEVICE Values load_values(const Array& a, int64_t element, int channels, bool in) {
  if constexpr (kWide) {
    return load_array<8>(a, element, in && channels > 0);
  } else {
    Values v;
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = load_array<1>(a, element + i, in && i < channels)[0];
    return v;
  }
}
template <class T, bool kWide> FC_DEVICE Eight load_eight(const float* p, int channels, bool in) {
  Eight v{};
  if constexpr (kWide) {
    const auto low = load_global<Vec<float, 4>>(p, in && channels > 0), high = load_global<Vec<float, 4>>(p + 4, in && channels > 0);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      v[i] = from_floats<T>(low[2 * i], low[2 * i + 1]);
      v[2 + i] = from_floats<T>(high[2 * i], high[2 * i + 1]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 8; i += 2)
      v[i / 2] = from_floats<T>(load_global<float>(p + i, in && i < channels), load_global<float>(p + i + 1, in && i + 1 < channels));
  }
  return v;
}
template <bool kWide> FC_DEVICE void store_values(float* p, int channels, const Values& values, bool in) {
  if constexpr (kWide) {
    store_global(p, Vec<float, 4>{values[0], values[1], values[2], values[3]}, in && channels > 0);
    store_global(p + 4, Vec<float, 4>{values[4], values[5], values[6], values[7]}, in && channels > 0);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) store_global(p + i, values[i], in && i < channels);
  }
}
// Of a map in either type.
template <class T, bool kWide> FC_DEVICE Eight load_pixel(const uint16_t* p, int channels, bool in) { return load_eight<kWide>(p, channels, in); }
template <class T, bool kWide> FC_DEVICE Eight load_pixel(const float* p, int channels, bool in) { return load_eight<T, kWide>(p, channels, in); }
FC_DEVICE int channels_left(const ConvShape& s, int64_t c) { return s.C - c < 8 ? static_cast<int>(s.C - c) : 8; }
// Words of two pixels with two channels each to words of two channels with two pixels each, and back.
FC_DEVICE uint32_t lows(uint32_t a, uint32_t b) { return byte_permute(a, b, 0x5410); }
FC_DEVICE uint32_t highs(uint32_t a, uint32_t b) { return byte_permute(a, b, 0x7632); }
// `to`, `from`: the word in the plane of the first of the eight channels.
FC_DEVICE void store_pair(unsigned char* to, int plane, const Eight& left, const Eight& right, bool in) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    store_shared(to + 2 * i * plane, lows(left[i], right[i]), in);
    store_shared(to + (2 * i + 1) * plane, highs(left[i], right[i]), in);
  }
}
FC_DEVICE void load_pair(const unsigned char* from, int plane, Eight& left, Eight& right, bool in) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t even = load_shared<uint32_t>(from + 2 * i * plane, in), odd = load_shared<uint32_t>(from + (2 * i + 1) * plane, in);
    left[i] = lows(even, odd);
    right[i] = highs(even, odd);
  }
}

// A tile with its halo into planes, zeros outside of the maps. A thread has one pair of columns, of every so many rows; lanes of
// a warp fill 16 words of a plane side by side. kBatch: loads of a thread in flight, of two pixels each.
template <class T, class Source, int K, int R, int kBatch, bool kWide>
FC_DEVICE void stage_window(const Array& a, const ConvShape& s, const MmaGrid& g, const MmaPlace& at, int64_t c0, unsigned char* planes) {
  const ConvMmaTiles& t = g.tiles;
  const int half = mma_thread() % 2, pair = mma_thread() / 2 % 4, plane = t.plane * 16, first = mma_thread() / 8;
  const int step = kMmaThreads / 8 / t.pitch, unit = first % t.pitch, channels = channels_left(s, c0 + 8 * half);
  const bool ends = t.stacked == 1 && at.column + t.slabs > t.across;  // the run of slabs goes on in the next band
  const bool next = ends && at.column + unit > t.across;
  const int units = t.slabs / t.stacked + 1 + ends;  // of a row that windows reach, of the last those of the slab before it
  const int w = (at.column + unit - (next ? t.across + 1 : 0)) * kMmaColumns + 2 * pair - K / 2;
  const bool wanted = unit < units - 1 || (unit == units - 1 && pair < K / 2);
  const bool left_in = wanted && w >= 0 && w < g.W, right_in = wanted && w + 1 >= 0 && w + 1 < g.W;
  const Source* const from = static_cast<const Source*>(a.data) + at.n * g.H * g.row + w * s.C + c0 + 8 * half;
  unsigned char* const to = planes + plane_byte(8 * half, plane) + 16 * unit + 4 * pair;
  int block = 0, row = first / t.pitch, image = at.band + next == t.bands, band = image ? 0 : at.band + next;
  const int end = row < step ? t.stacked : 0;  // threads that are left over stage nothing
  for (int done = 0; done < t.stacked * t.rows; done += kBatch * step) {
    Eight left[kBatch], right[kBatch];
    int byte[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      for (; row >= t.rows; row -= t.rows) {
        ++block;
        if (++band == t.bands) band = 0, ++image;
      }
      const int h = band * t.tall * R + row - K / 2;
      const bool in = block < end && image < at.images && h >= 0 && h < g.H;
      const Source* const p = from + static_cast<int64_t>(image * g.H + h) * g.row;
      left[i] = load_pixel<T, kWide>(p, channels, in && left_in);
      right[i] = load_pixel<T, kWide>(p + s.C, channels, in && right_in);
      byte[i] = block < end ? (block * t.stride + row * t.pitch) * 16 : -1;
      row += step;
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) store_pair(to + byte[i], plane, left[i], right[i], byte[i] >= 0);
  }
}
template <class T, int K, int R, int kBatch>
FC_DEVICE void stage_window(const Array& a, const ConvShape& s, const MmaGrid& g, const MmaPlace& at, int64_t c0, unsigned char* planes) {
  if (g.wide) stage_window<T, uint16_t, K, R, kBatch, true>(a, s, g, at, c0, planes);
  else stage_window<T, uint16_t, K, R, kBatch, false>(a, s, g, at, c0, planes);
}

// The strips alone, between an NHWC array and planes that hold [strip][row][column]: a warp moves four rows of a strip at a time.
// `move` gets the element of the first of two pixels and its byte in the planes, whether there is such a row and such a strip, the
// channels there are, and whether each of the pixels lies on the map. Strips that are not used are zeros to wgrad, and no outputs.
template <int R, class Move>
FC_DEVICE void for_centre(const ConvShape& s, const MmaGrid& g, const MmaPlace& at, int64_t c0, int plane, Move move) {
  const int lane = mma_thread() % kWarp, half = lane % 2, pair = lane / 2 % 4, channels = channels_left(s, c0 + 8 * half);
#pragma unroll 1
  for (int m = mma_thread() / kWarp; m < kMmaStrips; m += kMmaWarps) {
    const Strip strip = strip_of(g.tiles, m);
    const StripPlace place = strip_place<R>(g.tiles, at, strip);
    const int w = place.w + 2 * pair;
    const int64_t element = element_of(s, g, at, place.image, place.h, w) + c0 + 8 * half;
#pragma unroll
    for (int row = lane / 8; row < 8; row += 4) {
      const bool in = strip.used && row < R && place.image < at.images && place.h + row < g.H;
      const int byte = plane_byte(8 * half, plane) + (m * R + row) * 16 + 4 * pair;
      move(element + row * g.row, byte, row < R, strip.used, channels, in && w < g.W, in && w + 1 < g.W);
    }
  }
}
template <class T, bool kWide>
FC_DEVICE void stage_centre(const Array& a, const ConvShape& s, const MmaGrid& g, const MmaPlace& at, int64_t c0, unsigned char* planes) {
  const bool rounded = a.dtype == DType::kFloat;
  for_centre<kMmaRows>(s, g, at, c0, kMmaCentre, [&](int64_t element, int byte, bool row, bool, int channels, bool left_in, bool right_in) {
    Eight left, right;
    if (rounded) {
      const float* const from = static_cast<const float*>(a.data) + element;
      left = load_eight<T, kWide>(from, channels, left_in);
      right = load_eight<T, kWide>(from + s.C, channels, right_in);
    } else {
      const uint16_t* const from = static_cast<const uint16_t*>(a.data) + element;
      left = load_eight<kWide>(from, channels, left_in);
      right = load_eight<kWide>(from + s.C, channels, right_in);
    }
    store_pair(planes + byte, kMmaCentre, left, right, row);
  });
}
// `more`: added to the outputs, in float32, where it is given; both its pixels are asked for before the first is waited for.
template <class T, bool kWide>
FC_DEVICE void store_centre(const MutableArray& a, const Array& more, const ConvShape& s, const MmaGrid& g, const MmaPlace& at, int64_t c0,
                            const unsigned char* planes) {
  const int plane = g.tiles.plane * 16;
  for_centre<kMmaRows>(s, g, at, c0, plane, [&](int64_t element, int byte, bool row, bool used, int channels, bool left_in, bool right_in) {
    Eight left, right;
    load_pair(planes + byte, plane, left, right, row && used);
    if (more.data || a.dtype == DType::kFloat) {
      Values first = values_of<T>(left), second = values_of<T>(right);
      if (more.data) {
        const Values add = load_values<kWide>(more, element, channels, left_in), next = load_values<kWide>(more, element + s.C, channels, right_in);
#pragma unroll
        for (int i = 0; i < 8; ++i) first[i] += add[i], second[i] += next[i];
      }
      if (a.dtype == DType::kFloat) {
        float* const to = static_cast<float*>(a.data) + element;
        store_values<kWide>(to, channels, first, left_in);
        store_values<kWide>(to + s.C, channels, second, right_in);
        return;
      }
      left = rounded<T>(first);
      right = rounded<T>(second);
    }
    uint16_t* const to = static_cast<uint16_t*>(a.data) + element;
    store_eight<kWide>(to, channels, left, left_in);
    store_eight<kWide>(to + s.C, channels, right, right_in);
  });
}

// --- filters

// Tap row kh as a band: B[k, n] = w[kh, k - n] for 16 columns of a window and 8 outputs. In mma's layout a register holds
// rows k and k + 1 of column n, the pair (w[d], w[d + 1]) with d = k - n from -7 to 14: those pairs, zeros outside of the
// filter, are a table [channel][kh][kMmaPairs] in shared memory. `flip`: tap k in place taps - 1 - k.
// With a barrier inside, and none after.
template <class T, int K> FC_DEVICE void stage_pairs(const Array& weight, int64_t C, int64_t c0, bool flip, uint32_t* pairs) {
  static_assert(kMmaChannels * kMmaPairs % 4 == 0);
  for (int i = mma_thread(); i < kMmaChannels * K * kMmaPairs / 4; i += kMmaThreads) store_shared(pairs + 4 * i, Vec<uint32_t, 4>{});
  sync_threads();
  for (int i = mma_thread(); i < kMmaChannels * K * K; i += kMmaThreads) {
    const int c = i / (K * K), tap = i - c * (K * K), at = flip ? K * K - 1 - tap : tap, kh = at / K, kw = at - kh * K;
    const T w = from_float<T>(load_array<1>(weight, c0 * K * K + i, c0 + c < C)[0]);
    uint16_t* const low = reinterpret_cast<uint16_t*>(pairs + (c * K + kh) * kMmaPairs + kw + 7);
    store_shared(low, w.bits);
    store_shared(low - 1, w.bits);  // the high half of the pair before
  }
}
template <int K> FC_DEVICE void load_bands(const uint32_t* pairs, int c, uint32_t (&band)[K][2]) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int kh = 0; kh < K; ++kh)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int d = 2 * (lane % 4) - lane / 4 + 8 * i;
      band[kh][i] = load_shared<uint32_t>(pairs + (c * K + kh) * kMmaPairs + d + 7);
    }
}

// --- rows of mma

// acc[o] = sum over kh of the windows of row o + kh times band kh: a fragment of windows, loaded once, meets every band. Row o
// of strips g and g + 8 (g = lane / 4), columns 2 (lane % 4) and the next. `window`: what this lane gives to ldmatrix.
template <class T, int K, int R>
FC_DEVICE void conv_strips(const unsigned char* window, int pitch, const uint32_t (&band)[K][2], float (&acc)[R][4]) {
#pragma unroll
  for (int row = 0; row < R + K - 1; ++row) {
    uint32_t a[4];
    ldmatrix(a, window + row * pitch);
#pragma unroll
    for (int kh = 0; kh < K; ++kh)
      if (row >= kh && row < kh + R) mma_m16n8k16<T>(acc[row - kh], a, band[kh]);
  }
}

template <int N> FC_DEVICE bool finite(const float (&acc)[N][4]) {
  float zero = 0;
#pragma unroll
  for (int i = 0; i < N; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) zero = fmaf(acc[i][j], 0.0f, zero);
  return zero == 0;
}

// The zeros of a band make NaN of an Inf that only other outputs of its strip should see, and zeros outside of the map make NaN
// of a weight that is Inf. So where any sum of a warp is not finite, it is formed again, tap by tap.
template <class T, int K, int R>
FC_DEVICE void conv_exactly(const ConvShape& s, const ConvMmaTiles& t, const MmaPlace& at, const unsigned char* plane, const Array& weight,
                            int64_t c, bool flip, float (&acc)[R][4]) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int upper = 0; upper < 2; ++upper) {
    const Strip strip = strip_of(t, lane / 4 + 8 * upper);
    const StripPlace place = strip_place<R>(t, at, strip);
    const unsigned char* const window = plane + window_unit<R>(t, at, strip) * 16 + lane % 4 * 4;
#pragma unroll
    for (int o = 0; o < R; ++o) acc[o][2 * upper] = acc[o][2 * upper + 1] = 0;
#pragma unroll 1
    for (int tap = 0; tap < K * K; ++tap) {
      const int kh = tap / K, kw = tap - kh * K;
      const float w = to_float(from_float<T>(load_array<1>(weight, c * K * K + (flip ? K * K - 1 - tap : tap), c < s.C)[0]));
#pragma unroll
      for (int o = 0; o < R; ++o)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int h = place.h + o + kh - K / 2, x = place.w + lane % 4 * 2 + i + kw - K / 2;
          const bool in = h >= 0 && h < s.H && x >= 0 && x < s.W;
          const float v = to_float(load_shared<T>(reinterpret_cast<const T*>(window + (o + kh) * t.pitch * 16) + i + kw, in));
          if (in) acc[o][2 * upper + i] = fmaf(v, w, acc[o][2 * upper + i]);
        }
    }
  }
}

// Outputs into a plane, from its first byte on: [strip][row][column]. The warp has read what lay there.
template <class T, int R>
FC_DEVICE void write_strips(const ConvMmaTiles& t, unsigned char* plane, const float (&acc)[R][4], float bias) {
  const int lane = threadIdx.x % kWarp, m = lane / 4;
  unsigned char* const to = plane + m * R * 16 + lane % 4 * 4;
#pragma unroll
  for (int o = 0; o < R; ++o) {
    store_shared(to + o * 16, from_floats<T>(acc[o][0] + bias, acc[o][1] + bias), m < t.strips());
    store_shared(to + (8 * R + o) * 16, from_floats<T>(acc[o][2] + bias, acc[o][3] + bias), m + 8 < t.strips());
  }
}

// One channel of a tile: windows in its plane to outputs in the same plane.
template <class T, int K, int R>
FC_DEVICE void conv_plane(const ConvShape& s, const ConvMmaTiles& t, const MmaPlace& at, const int* windows, unsigned char* plane,
                          const uint32_t (&band)[K][2], const Array& weight, int64_t c, bool flip, float bias) {
  const int lane = threadIdx.x % kWarp;
  float acc[R][4] = {};
  conv_strips<T, K, R>(plane + load_shared<int>(windows + lane % 16) + lane / 16 * 16, t.pitch * 16, band, acc);
  if (warp_any(!finite(acc))) conv_exactly<T, K, R>(s, t, at, plane, weight, c, flip, acc);
  sync_warp();  // every lane has read the plane
  write_strips<T, R>(t, plane, acc, bias);
}

inline MmaGrid mma_grid(const ConvShape& s, const ConvMmaTiles& t, int64_t slices, bool wide) {
  const int W = static_cast<int>(s.W), row = static_cast<int>(s.W * s.C), chunks = static_cast<int>(ceil_div(s.C, kMmaChannels));
  return {t, static_cast<int>(s.H), W, row, chunks, slices, wide};
}

}  // namespace fastconv::cuda

// The pieces of a grouped convolution on tensor cores: tiles in shared memory, pixel by pixel, and fragments from them.
// T is bfloat16 or float16. README.md draws it.
//
// A slot is 8 channels of a unit at one tap column kw, and two are the K of an mma: a pair. A row of taps has K kParts of them.
#pragma once

#include "../geometry.h"
#include "array.cuh"
#include "grouped_conv_mma_kernel.h"

namespace fastconv::cuda {

constexpr int kStrip = 8;  // columns; two strips are the sixteen pixels of an mma

// Columns of a tile in shared memory, of one image next to those of the other; with a stride of 2 the even ones first.
struct GroupedWindow {
  int rows, columns, image_columns, reached;  // reached: columns of an image that any output needs
};

// Sizes of a launch that its blocks share.
struct GroupedGrid {
  int H, W, out_H, out_W, C, pad_h, pad_w;
  int width, unit;             // channels: of a group, of a unit
  int rows, images, across, together, chunks;  // of a tile; tiles side by side, of the same images; blocks side by side in channels
  int piece;                   // elements that move at a time: 8, 2 or 1
  int64_t N, tiles, slices;
  GroupedWindow window, centre;  // of the input; of outputs or their gradient
};

template <int kParts> struct GroupedBlock {
  static constexpr int kUnits = 8 / kParts, kWarps = kUnits * kParts, kThreads = kWarps * kWarp;
  static constexpr int kPitch = 8 * 16 + 16;  // bytes of a pixel: an odd number of units of 16, for ldmatrix
};

// A warp's eight channels: of unit `unit`, from channel `first` of it on.
template <int kParts> struct GroupedOwn {
  int unit, first;
  FC_DEVICE GroupedOwn() : unit(threadIdx.x / kWarp / kParts), first(threadIdx.x / kWarp % kParts * 8) {}
};

// Where a tile lies: images from n on, output rows from h on, columns from w on.
struct GroupedPlace {
  int64_t n;
  int h, w;
};
FC_DEVICE GroupedPlace place_of(const GroupedGrid& g, int64_t tile) {
  const int64_t group = tile / g.together;
  const int inside = static_cast<int>(tile - group * g.together);
  return {group * g.images, inside / g.across * g.rows, inside % g.across * 2 * kStrip};
}

// Calls move(element, byte, on the map, in the unit) for each piece of `kPiece` elements of a window whose first pixel lies at h,
// w of the maps; `element` counts from image n on.
template <int kParts, int kPiece, int kStride, class Move>
FC_DEVICE void for_window(const GroupedGrid& g, const GroupedWindow& window, int64_t n, int H, int W, int h0, int w0, int64_t c0,
                          Move move) {
  using Block = GroupedBlock<kParts>;
  constexpr int kPieces = 64 / kPiece, kPixels = Block::kThreads / kPieces;
  const int place = threadIdx.x % kPieces * kPiece, unit = place / (8 * kParts), inside = place - unit * 8 * kParts;
  const int c = static_cast<int>(c0) + unit * g.unit + inside, images = g.N - n < g.images ? static_cast<int>(g.N - n) : g.images;
  const bool in_channels = unit < Block::kUnits && inside < g.unit && c < g.C;
  const int half = window.columns / kStride;
  for (int column = threadIdx.x / kPieces, row = 0;; column += kPixels) {
    for (; column >= window.columns; column -= window.columns) ++row;
    if (row >= window.rows) break;
    const int odd = kStride == 2 && column >= half, at = kStride * (column - odd * half) + odd;
    const int image = at >= window.image_columns, inside_image = at - image * window.image_columns;
    const int h = h0 + row, w = w0 + inside_image;
    const bool in = in_channels && image < images && inside_image < window.reached && h >= 0 && h < H && w >= 0 && w < W;
    move(in ? ((image * H + h) * W + w) * g.C + c : 0, (row * window.columns + column) * Block::kPitch + place * 2, in);
  }
}

// Zeros land outside of the maps, past the last channel and beside a unit.
template <int kParts, int kStride>
FC_DEVICE void stage_window(const Array& a, const GroupedGrid& g, const GroupedWindow& window, int64_t n, int H, int W, int h0, int w0,
                            int64_t c0, unsigned char* to) {
  const uint16_t* const from = static_cast<const uint16_t*>(a.data) + n * H * W * g.C;
  if (g.piece == 8) {
    for_window<kParts, 8, kStride>(g, window, n, H, W, h0, w0, c0,
                                   [&](int element, int byte, bool in) { copy_async<16>(to + byte, from + element, in); });
  } else if (g.piece == 2) {
    for_window<kParts, 2, kStride>(g, window, n, H, W, h0, w0, c0,
                                   [&](int element, int byte, bool in) { copy_async<4>(to + byte, from + element, in); });
  } else {
    for_window<kParts, 1, kStride>(g, window, n, H, W, h0, w0, c0, [&](int element, int byte, bool in) {
      store_shared(reinterpret_cast<uint16_t*>(to + byte), load_global<uint16_t>(from + element, in));
    });
  }
  copy_async_commit();
}
// The input of a tile, whose outputs are `kStride` pixels of it apart.
template <int kParts, int kStride>
FC_DEVICE void stage_input(const Array& x, const GroupedGrid& g, const GroupedPlace& at, int64_t c0, unsigned char* to) {
  stage_window<kParts, kStride>(x, g, g.window, at.n, g.H, g.W, at.h * kStride - g.pad_h, at.w * kStride - g.pad_w, c0, to);
}

// Pixels of `centre` that lie on the map, of which the first is h0, w0.
template <int kParts, int kLayout>
FC_DEVICE void store_outputs(const MutableArray& y, const GroupedGrid& g, int64_t n, int h0, int w0, int64_t c0,
                             const unsigned char* from) {
  uint16_t* const to = static_cast<uint16_t*>(y.data) + n * g.out_H * g.out_W * g.C;
  if (g.piece == 8) {
    for_window<kParts, 8, kLayout>(g, g.centre, n, g.out_H, g.out_W, h0, w0, c0, [&](int element, int byte, bool in) {
      store_global(to + element, load_shared<Vec<uint32_t, 4>>(from + byte, in), in);
    });
  } else if (g.piece == 2) {
    for_window<kParts, 2, kLayout>(g, g.centre, n, g.out_H, g.out_W, h0, w0, c0, [&](int element, int byte, bool in) {
      store_global(to + element, load_shared<uint32_t>(from + byte, in), in);
    });
  } else {
    for_window<kParts, 1, kLayout>(g, g.centre, n, g.out_H, g.out_W, h0, w0, c0, [&](int element, int byte, bool in) {
      store_global(to + element, load_shared<uint16_t>(from + byte, in), in);
    });
  }
}

// --- fragments

// Bytes from a pixel of the window to slot `slot` of its unit, in the row of the tap.
template <int kParts, int kStride> FC_DEVICE int slot_byte(const GroupedGrid& g, int slot) {
  const int kw = slot / kParts;
  return (kw % kStride * (g.window.columns / kStride) + kw / kStride) * GroupedBlock<kParts>::kPitch + slot % kParts * 16;
}
// Bytes to column `column` of strip `strip`.
template <int kParts, int kStride> FC_DEVICE int strip_byte(const GroupedGrid& g, int strip, int column) {
  return (strip * (g.images == 2 ? g.window.image_columns / kStride : kStrip) + column) * GroupedBlock<kParts>::kPitch;
}

// The slots of a row of K taps where the stride is 1. Where a unit ends in kLeft channels past whole slots, 2 or 4, those of the
// row share slots.
template <int K_, int kParts_, int kLeft> struct Row {
  static constexpr int K = K_, kParts = kParts_;
  static constexpr int kWhole = kParts - (kLeft > 0), kOwn = K * kWhole;  // slots: of a tap, of all
  static constexpr int kCount = kOwn + (K * kLeft + 7) / 8, kPairs = kCount / 2;
  static constexpr bool kOdd = kCount % 2;

  struct Input {
    int kw, channel;  // of none from kw = K on
    FC_DEVICE int byte() const { return (kw < K ? kw : 0) * GroupedBlock<kParts>::kPitch + channel * 2; }  // from a pixel on
  };
  // Input i of the eight of a slot; two in a row, from an even one on, are of one tap.
  FC_DEVICE static Input input(int slot, int i) {
    constexpr int kDivisor = kLeft > 0 ? kLeft : 8;
    if (slot < kOwn) return {slot / kWhole, slot % kWhole * 8 + i};
    const int at = (slot - kOwn) * 8 + i;
    return {at / kDivisor, kWhole * 8 + at % kDivisor};
  }
  // Bytes from a pixel to a slot of one tap's own.
  FC_DEVICE static int byte(int slot) { return slot / kWhole * GroupedBlock<kParts>::kPitch + slot % kWhole * 16; }
};

// --- filters

// Element of the weights between two channels of a unit that begins with channel c, or -1 where they share none. `out` and `in`
// are those of the product: where it is transposed, the convolution's input and output.
FC_DEVICE int weight_element(const GroupedConvParams& p, const GroupedGrid& g, int c, int out, int in, int tap) {
  const int K2 = static_cast<int>(p.shape.K * p.shape.K), group = out / g.width * g.width;
  if (out >= g.unit || in >= g.unit || in < group || in >= group + g.width || c + out >= g.C) return -1;
  return p.transposed ? ((c + in) * g.width + out - group) * K2 + tap : ((c + out) * g.width + in - group) * K2 + tap;
}
// The filters of a block's channels, which are all that it needs, in either direction: [channel][g.width][K * K]. With a barrier
// after.
template <class T, int kParts> FC_DEVICE void stage_filters(const GroupedConvParams& p, const GroupedGrid& g, int64_t c0, T* filters) {
  const int64_t left = g.C - c0, channels = left < GroupedBlock<kParts>::kUnits * g.unit ? left : GroupedBlock<kParts>::kUnits * g.unit;
  const int64_t row = g.width * p.shape.K * p.shape.K, first = c0 * row;
  const int count = static_cast<int>(channels * row);
  if (count % 8 == 0 && first % 8 == 0 && reinterpret_cast<uintptr_t>(p.weight.data) % 16 == 0) {
#pragma unroll 4
    for (int i = threadIdx.x * 8; i < count; i += blockDim.x * 8)
      store_shared(filters + i, from_float<T>(load_array<8>(p.weight, first + i)));
  } else {
#pragma unroll 4
    for (int i = threadIdx.x; i < count; i += blockDim.x)
      store_shared(filters + i, from_float<T>(load_array<1>(p.weight, first + i)[0]));
  }
  sync_threads();
}
// Two inputs' filters as a register of b.
template <class T>
FC_DEVICE uint32_t filter_pair(const GroupedConvParams& p, const GroupedGrid& g, int64_t c0, int c, const T* filters, int out, int in,
                               int tap) {
  const int first = static_cast<int>(c0) * g.width * static_cast<int>(p.shape.K * p.shape.K);
  const auto load = [&](int element) { return load_shared<uint16_t>(filters + (element < 0 ? 0 : element - first), element >= 0); };
  return pack(load(weight_element(p, g, c, out, in, tap)), load(weight_element(p, g, c, out, in + 1, tap)));
}

FC_DEVICE bool finite(const float (&acc)[4]) { return (acc[0] * 0 + acc[1] * 0) + (acc[2] * 0 + acc[3] * 0) == 0; }

// A group's inputs times another's zeros are NaN where one is not finite. So where a sum of a warp is not, packed groups form
// theirs again, without those: over `taps` taps, of which `place` gives the byte from the first pixel of the row and the filter's tap.
template <class T, int kLayout, class Place>
FC_DEVICE void conv_exactly(const GroupedConvParams& p, const GroupedGrid& g, const unsigned char* row, int c, int taps, Place place,
                            float (&acc)[4]) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll 1
  for (int i = 0; i < 4; ++i) {
    const int out = lane % 4 * 2 + i % 2, group = out / g.width * g.width;
    const unsigned char* const pixel = row + strip_byte<1, kLayout>(g, i / 2, lane / 4);
    float sum = 0;
#pragma unroll 1
    for (int tap = 0; tap < taps; ++tap) {
      int byte, from;
      place(tap, byte, from);
#pragma unroll 1
      for (int in = group; in < group + g.width; ++in) {
        const int element = weight_element(p, g, c, out, in, from);
        const T weight = from_float<T>(load_array<1>(p.weight, element < 0 ? 0 : element, element >= 0)[0]);
        sum = fmaf(to_float(load_shared<T>(reinterpret_cast<const T*>(pixel + byte + in * 2))), to_float(weight), sum);
      }
    }
    acc[0] = i == 0 ? sum : acc[0], acc[1] = i == 1 ? sum : acc[1], acc[2] = i == 2 ? sum : acc[2], acc[3] = i == 3 ? sum : acc[3];
  }
}

// The bias of a lane's two channels.
template <int kParts>
FC_DEVICE void load_bias(const Array& bias, const GroupedGrid& g, int c, const GroupedOwn<kParts>& own, float (&values)[2]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int channel = own.first + threadIdx.x % 4 * 2 + i;
    values[i] = load_array<1>(bias, c + channel, bias.data && channel < g.unit && c + channel < g.C)[0];
  }
}

// Sums of a row of two strips; `to`: this lane's two channels of its pixel of the first.
template <class T, int kParts> FC_DEVICE void write_outputs(unsigned char* to, const float (&acc)[4], const float (&bias)[2]) {
  store_shared(reinterpret_cast<uint32_t*>(to), from_floats<T>(acc[0] + bias[0], acc[1] + bias[1]));
  store_shared(reinterpret_cast<uint32_t*>(to + kStrip * GroupedBlock<kParts>::kPitch), from_floats<T>(acc[2] + bias[0], acc[3] + bias[1]));
}

// `dx`: of a convolution with a stride of 2, whose tiles count pairs of rows and of columns.
inline GroupedGrid grouped_grid(const GroupedConvShape& s, bool dx, int64_t slices, int piece) {
  const auto small = [](int64_t n) { return static_cast<int>(n); };
  const GroupedTiles t = grouped_tiles(s, dx);
  const GroupedChannels c = grouped_channels(s.width());
  GroupedGrid g{};
  g.H = small(dx ? s.out_H() : s.H), g.W = small(dx ? s.out_W() : s.W), g.C = small(s.C);
  g.out_H = small(dx ? s.H : s.out_H()), g.out_W = small(dx ? s.W : s.out_W());
  g.pad_h = small(s.pad_h), g.pad_w = small(s.pad_w), g.width = small(s.width()), g.unit = small(c.unit);
  g.rows = small(t.rows), g.images = small(t.images), g.across = small(t.across), g.together = small(t.down * t.across);
  g.chunks = small(ceil_div(s.C, c.count())), g.piece = piece;
  g.N = s.N, g.tiles = t.count, g.slices = slices;
  const int K = small(s.K), stride = dx ? 1 : small(s.stride), taps = dx ? (K + 1) / 2 : K, scale = dx ? 2 : 1;
  const int columns = 2 / g.images * kStrip, reached = (columns - 1) * stride + taps, staged = small(round_up(reached, stride));
  g.window = {(g.rows - 1) * stride + taps, g.images * staged, staged, reached};
  g.centre = {g.rows * scale, 2 * kStrip * scale, columns * scale, columns * scale};
  return g;
}
// Bytes of shared memory: two windows, and before them the filters, from where lanes pick theirs.
inline int64_t grouped_shared(const GroupedGrid& g, int64_t pitch) {
  return (g.window.rows * g.window.columns + g.centre.rows * g.centre.columns) * pitch;
}
inline int64_t grouped_shared_with_filters(const GroupedConvShape& s, const GroupedGrid& g, int64_t pitch) {
  return std::max(grouped_shared(g, pitch), grouped_channels(s.width()).count() * s.width() * s.K * s.K * 2);
}

// How many elements of every map can move at a time.
template <class... Arrays> int grouped_piece(const GroupedConvShape& s, const Arrays&... arrays) {
  const auto on = [&](uintptr_t bytes) { return ((reinterpret_cast<uintptr_t>(arrays.data) % bytes == 0) && ...); };
  const int64_t unit = grouped_channels(s.width()).unit;
  return s.C % 8 == 0 && unit % 8 == 0 && on(16) ? 8 : s.C % 2 == 0 && unit % 2 == 0 && on(4) ? 2 : 1;
}

}  // namespace fastconv::cuda

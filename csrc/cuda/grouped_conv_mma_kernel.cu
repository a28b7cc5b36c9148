// grouped_conv on tensor cores with a stride of 1, forward and dx: a warp has 8 output channels of its block's tile, and their
// filters in registers.
#include "grouped_conv_mma_kernel.h"

#include "grouped_conv_mma.cuh"

namespace fastconv::cuda {
namespace {

// A slot of the window's 16 pixels from `row` on, of this lane in ldmatrix, and `pixel`, of its fragment: pixels by inputs.
template <class Slots>
FC_DEVICE void load_slot(const GroupedGrid& g, const unsigned char* row, const unsigned char* pixel, int slot, uint32_t (&a)[2]) {
  if (slot < Slots::kOwn) return ldmatrix(a, row + Slots::byte(slot));
  const auto at = Slots::input(slot, threadIdx.x % 4 * 2);
#pragma unroll
  for (int strip = 0; strip < 2; ++strip) {
    const unsigned char* const from = pixel + at.byte() + strip_byte<Slots::kParts, 1>(g, strip, 0);
    a[strip] = load_shared<uint32_t>(reinterpret_cast<const uint32_t*>(from), at.kw < Slots::K);
  }
}

// Filters of a warp in the layout of b: rows are inputs, columns the 8 outputs.
template <int K, class Slots> struct Filters {
  uint32_t pair[K][Slots::kPairs][2], odd[K];
};

template <class T, int K, int kParts, class Slots>
FC_DEVICE void load_filters(const GroupedConvParams& p, const GroupedGrid& g, int64_t c0, int c, const T* filters,
                            const GroupedOwn<kParts>& own, Filters<K, Slots>& f) {
  const int out = own.first + threadIdx.x % kWarp / 4;
  const auto word = [&](int kh, int slot) {
    const auto at = Slots::input(slot, threadIdx.x % 4 * 2);
    if (at.kw >= K) return uint32_t{0};
    const int here = kh * K + at.kw, tap = p.transposed ? K * K - 1 - here : here;
    return filter_pair(p, g, c0, c, filters, out, at.channel, tap);
  };
#pragma unroll
  for (int kh = 0; kh < K; ++kh) {
#pragma unroll
    for (int pair = 0; pair < Slots::kPairs; ++pair) f.pair[kh][pair][0] = word(kh, 2 * pair), f.pair[kh][pair][1] = word(kh, 2 * pair + 1);
    if constexpr (Slots::kOdd) f.odd[kh] = word(kh, Slots::kCount - 1);
  }
}

template <class T, int K, int kParts, int kLeft>
__global__ void __launch_bounds__(GroupedBlock<kParts>::kThreads, 2) grouped_conv_mma_kernel(GroupedConvParams p, GroupedGrid g) {
  using Block = GroupedBlock<kParts>;
  using Slots = Row<K, kParts, kLeft>;
  FC_DYNAMIC_SHARED(window);
  unsigned char* const outputs = window + g.window.rows * g.window.columns * Block::kPitch;
  const int64_t slice = blockIdx.x / g.chunks, c0 = static_cast<int64_t>(blockIdx.x % g.chunks) * Block::kUnits * g.unit;
  const int lane = threadIdx.x % kWarp, row_bytes = g.window.columns * Block::kPitch;
  const GroupedOwn<kParts> own;
  const int c = static_cast<int>(c0) + own.unit * g.unit, unit_byte = own.unit * kParts * 16;

  const int64_t end = part_begin(g.tiles, g.slices, slice + 1);
  int64_t tile = part_begin(g.tiles, g.slices, slice);
  GroupedPlace at = place_of(g, tile);
  T* const filters = reinterpret_cast<T*>(window);
  stage_filters<T, kParts>(p, g, c0, filters);
  Filters<K, Slots> f;
  load_filters(p, g, c0, c, filters, own, f);
  sync_threads();  // the first tile goes to where the filters are
  stage_input<kParts, 1>(p.x, g, at, c0, window);
  float bias[2];
  load_bias(p.bias, g, c, own, bias);
  const bool second = lane / 16;
  const unsigned char* const first = window + strip_byte<kParts, 1>(g, lane / 8 % 2, lane % 8) + unit_byte;
  const unsigned char* const first_pixel = window + strip_byte<kParts, 1>(g, 0, lane / 4) + unit_byte;
  unsigned char* const mine = outputs + lane / 4 * Block::kPitch + unit_byte + (own.first + lane % 4 * 2) * 2;
  const int rows = c < g.C ? g.rows + K - 1 : 0;  // a warp past the last channel has nothing to do

  while (true) {
    copy_async_wait<0>();
    sync_threads();
    // A fragment of row r is loaded once, for output rows r - kh: acc[i] is of row r - (K - 1) + i.
    float acc[K][4] = {};
#pragma unroll 1
    for (int r = 0; r < rows; ++r) {
      const unsigned char *const row = first + r * row_bytes, *const pixel = first_pixel + r * row_bytes;
      uint32_t pairs[Slots::kPairs][4], odd[2];
#pragma unroll
      for (int i = 0; i < Slots::kPairs; ++i) {
        if (2 * i + 1 < Slots::kOwn) {
          ldmatrix(pairs[i], row + (second ? Slots::byte(2 * i + 1) : Slots::byte(2 * i)));
          continue;
        }
        uint32_t left[2], right[2];
        load_slot<Slots>(g, row, pixel, 2 * i, left);
        load_slot<Slots>(g, row, pixel, 2 * i + 1, right);
        pairs[i][0] = left[0], pairs[i][1] = left[1], pairs[i][2] = right[0], pairs[i][3] = right[1];
      }
      if constexpr (Slots::kOdd) load_slot<Slots>(g, row, pixel, Slots::kCount - 1, odd);
#pragma unroll
      for (int kh = 0; kh < K; ++kh) {
        if (r < kh || r - kh >= g.rows) continue;
#pragma unroll
        for (int i = 0; i < Slots::kPairs; ++i) mma_m16n8k16<T>(acc[K - 1 - kh], pairs[i], f.pair[kh][i]);
        if constexpr (Slots::kOdd) mma_m16n8k8<T>(acc[K - 1 - kh], odd, f.odd[kh]);
      }
      if (r >= K - 1) {
        const int o = r - (K - 1);
        if constexpr (kParts == 1) {
          if (g.width < g.unit && warp_any(!finite(acc[0]))) {
            const auto place = [&](int tap, int& byte, int& from) {
              byte = tap / K * row_bytes + tap % K * Block::kPitch;
              from = p.transposed ? K * K - 1 - tap : tap;
            };
            conv_exactly<T, 1>(p, g, window + o * row_bytes + unit_byte, c, K * K, place, acc[0]);
          }
        }
        write_outputs<T, kParts>(mine + o * 2 * kStrip * Block::kPitch, acc[0], bias);
      }
#pragma unroll
      for (int i = 0; i < K; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) acc[i][j] = i + 1 < K ? acc[i + 1 < K ? i + 1 : i][j] : 0;
    }
    sync_threads();
    const GroupedPlace done = at;
    const bool more = ++tile < end;
    if (more) {  // on its way while the outputs go out
      at = place_of(g, tile);
      stage_input<kParts, 1>(p.x, g, at, c0, window);
    }
    store_outputs<kParts, 1>(p.y, g, done.n, done.h, done.w, c0, outputs);
    if (!more) break;
  }
}

template <class T, int kParts, int kLeft = 0> int launch_conv(const GroupedConvParams& p, Stream stream) {
  using Block = GroupedBlock<kParts>;
  const GroupedConvShape s = p.transposed ? p.shape.transposed() : p.shape;
  const GroupedGrid g = grouped_grid(s, false, grouped_slices(s, false), grouped_piece(s, p.x, p.y));
  return launch(grouped_conv_mma_kernel<T, 3, kParts, kLeft>, dim3(static_cast<unsigned>(g.slices * g.chunks)), dim3(Block::kThreads),
                grouped_shared_with_filters(s, g, Block::kPitch), stream, p, g);
}
template <class T> int launch_conv(const GroupedConvParams& p, Stream stream) {
  const int64_t left = p.shape.width() % 8;
  switch (grouped_channels(p.shape.width()).parts) {
    case 1: return launch_conv<T, 1>(p, stream);
    case 2: return left == 2 ? launch_conv<T, 2, 2>(p, stream) : left == 4 ? launch_conv<T, 2, 4>(p, stream) : launch_conv<T, 2>(p, stream);
    case 3: return left == 2 ? launch_conv<T, 3, 2>(p, stream) : left == 4 ? launch_conv<T, 3, 4>(p, stream) : launch_conv<T, 3>(p, stream);
    default: return launch_conv<T, 4>(p, stream);
  }
}

}  // namespace

int grouped_conv_mma_launch(const GroupedConvParams& p, Stream stream) {
  if (p.shape.stride == 2) return grouped_conv_mma_strided_launch(p, stream);
  return p.x.dtype == DType::kBFloat16 ? launch_conv<bf16>(p, stream) : launch_conv<fp16>(p, stream);
}

}  // namespace fastconv::cuda

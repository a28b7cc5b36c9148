// grouped_conv on tensor cores with a stride of 1, forward and dx: a warp has 8 output channels of its block's tile, and their
// filters in registers.
#include "grouped_conv_mma_kernel.h"

#include "grouped_conv_mma.cuh"

namespace fastconv::cuda {
namespace {

// Filters of a warp in the layout of b: rows are two slots of inputs, columns the 8 outputs.
template <int K, int kParts> struct Filters {
  uint32_t pair[K][kPairs<K, kParts>][2], last[kLasts<K, kParts> + 1][2];
};

template <class T, int K, int kParts>
FC_DEVICE void load_filters(const GroupedConvParams& p, const GroupedGrid& g, int64_t c0, int c, const T* filters,
                            const GroupedOwn<kParts>& own, Filters<K, kParts>& f) {
  const int lane = threadIdx.x % kWarp, out = own.first + lane / 4, in = lane % 4 * 2;
  const auto word = [&](int kh, int slot) {
    const int i = slot % kParts * 8 + in, here = kh * K + slot / kParts, tap = p.transposed ? K * K - 1 - here : here;
    return kh < K ? filter_pair(p, g, c0, c, filters, out, i, tap) : 0;
  };
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int kh = 0; kh < K; ++kh)
#pragma unroll
      for (int pair = 0; pair < kPairs<K, kParts>; ++pair) f.pair[kh][pair][i] = word(kh, 2 * pair + i);
#pragma unroll
    for (int last = 0; last < kLasts<K, kParts>; ++last) f.last[last][i] = word(2 * last + i, K * kParts - 1);
  }
}

template <class T, int K, int kParts>
__global__ void __launch_bounds__(GroupedBlock<kParts>::kThreads, 2) grouped_conv_mma_kernel(GroupedConvParams p, GroupedGrid g) {
  using Block = GroupedBlock<kParts>;
  constexpr bool kOdd = kLasts<K, kParts> > 0;
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
  Filters<K, kParts> f;
  load_filters(p, g, c0, c, filters, own, f);
  sync_threads();  // the first tile goes to where the filters are
  stage_input<kParts, 1>(p.x, g, at, c0, window);
  float bias[2];
  load_bias(p.bias, g, c, own, bias);
  const bool second = lane / 16;
  const unsigned char* const first = window + strip_byte<kParts, 1>(g, lane / 8 % 2, lane % 8) + unit_byte;
  unsigned char* const mine = outputs + lane / 4 * Block::kPitch + unit_byte + (own.first + lane % 4 * 2) * 2;
  const int rows = c < g.C ? g.rows + K - 1 : 0;  // a warp past the last channel has nothing to do

  while (true) {
    copy_async_wait<0>();
    sync_threads();
    // A fragment of row r is loaded once, for output rows r - kh: acc[i] is of row r - (K - 1) + i.
    float acc[K][4] = {};
#pragma unroll 1
    for (int r = 0; r < rows; ++r) {
      const unsigned char* const row = first + r * row_bytes;
      uint32_t pairs[kPairs<K, kParts>][4], last[4];
#pragma unroll
      for (int i = 0; i < kPairs<K, kParts>; ++i) load_pair<kParts, 1, false>(g, row, second, i, pairs[i]);
      if constexpr (kOdd) load_last<K, kParts, 1, false>(g, row, second, r + 1 < rows ? row_bytes : 0, last);
#pragma unroll
      for (int kh = 0; kh < K; ++kh) {
        if (r < kh || r - kh >= g.rows) continue;
#pragma unroll
        for (int i = 0; i < kPairs<K, kParts>; ++i) mma_m16n8k16<T>(acc[K - 1 - kh], pairs[i], f.pair[kh][i]);
        if constexpr (kOdd)
          if (kh % 2 == 0) mma_slots<T>(acc[K - 1 - kh], last, f.last[kh / 2], kh + 1 == K);
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

template <class T, int kParts> int launch_conv(const GroupedConvParams& p, Stream stream) {
  using Block = GroupedBlock<kParts>;
  const GroupedConvShape s = p.transposed ? p.shape.transposed() : p.shape;
  const GroupedGrid g = grouped_grid(s, false, grouped_slices(s, false), grouped_piece(s, p.x, p.y));
  return launch(grouped_conv_mma_kernel<T, 3, kParts>, dim3(static_cast<unsigned>(g.slices * g.chunks)), dim3(Block::kThreads),
                grouped_shared_with_filters(s, g, Block::kPitch), stream, p, g);
}
template <class T> int launch_conv(const GroupedConvParams& p, Stream stream) {
  switch (grouped_channels(p.shape.width()).parts) {
    case 1: return launch_conv<T, 1>(p, stream);
    case 2: return launch_conv<T, 2>(p, stream);
    case 3: return launch_conv<T, 3>(p, stream);
    default: return launch_conv<T, 4>(p, stream);
  }
}

}  // namespace

int grouped_conv_mma_launch(const GroupedConvParams& p, Stream stream) {
  if (p.shape.stride == 2) return grouped_conv_mma_strided_launch(p, stream);
  return p.x.dtype == DType::kBFloat16 ? launch_conv<bf16>(p, stream) : launch_conv<fp16>(p, stream);
}

}  // namespace fastconv::cuda

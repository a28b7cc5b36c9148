// grouped_conv on tensor cores with a stride of 2, forward and dx: a warp has 8 output channels, and their filters in registers.
//
// dx has four classes of outputs, by the parities a and b of h + pad_h and of the column alike: class (a, b) meets the taps
// kh = a, a + 2, .. and kw = b, b + 2, ..
//
//   dx[h] = sum over kh of dy[(h + pad_h - kh) / 2] w[kh]
//
// so that every tap belongs to one class and no product is with a zero. Forward has one class, of all taps. A tile has the rows
// 2 i and 2 i + 1 for i from its first on; its window of dy begins (pad_h + 1) / 2 - (K - 1) / 2 rows further on.
#include "grouped_conv_mma.cuh"

namespace fastconv::cuda {
namespace {

// Slots of a class in order, and where they lie; forward reads a window with even columns first.
template <int K, int kParts, bool kDx> struct Classes {
  static constexpr int kCount = kDx ? 4 : 1, kLayout = kDx ? 1 : 2;
  static constexpr int row_parity(int q) { return q / 2; }
  static constexpr int column_parity(int q) { return q % 2; }
  static constexpr int rows(int q) { return kDx ? (K + 1 - row_parity(q)) / 2 : K; }
  static constexpr int columns(int q) { return kDx ? (K + 1 - column_parity(q)) / 2 : K; }
  static constexpr int taps(int q) { return rows(q) * columns(q); }
  static constexpr int pairs(int q) { return (taps(q) * kParts + 1) / 2; }
  static constexpr int kMost = ((kDx ? (K + 1) / 2 * ((K + 1) / 2) : K * K) * kParts + 1) / 2;  // pairs of class 0
  // Of tap `i` of the class.
  FC_DEVICE static int filter_tap(int q, int i) {
    const int h = i / columns(q), w = i % columns(q);
    return kDx ? (row_parity(q) + 2 * h) * K + column_parity(q) + 2 * w : i;
  }
  FC_DEVICE static int byte(const GroupedGrid& g, int row_bytes, int q, int i) {
    const int h = i / columns(q), w = i % columns(q);
    if constexpr (!kDx) return h * row_bytes + slot_byte<kParts, kLayout>(g, w * kParts);
    const int down = (K - 1) / 2 - (row_parity(q) & g.pad_h) - h, right = (K - 1) / 2 - (column_parity(q) & g.pad_w) - w;
    return down * row_bytes + right * GroupedBlock<kParts>::kPitch;
  }
};

// Calls f(Index<q>{}) for each class: as a constant, q keeps the arrays that it picks from in registers.
template <int q> struct Index {
  static constexpr int value = q;
};
template <int kCount, int q = 0, class F> FC_DEVICE void for_classes(F f) {
  if constexpr (q < kCount) {
    f(Index<q>{});
    for_classes<kCount, q + 1>(f);
  }
}

template <class T, int K, int kParts, bool kDx>
__global__ void __launch_bounds__(GroupedBlock<kParts>::kThreads, 2) grouped_conv_mma_strided_kernel(GroupedConvParams p, GroupedGrid g) {
  using Block = GroupedBlock<kParts>;
  using Class = Classes<K, kParts, kDx>;
  FC_DYNAMIC_SHARED(window);
  unsigned char* const outputs = window + g.window.rows * g.window.columns * Block::kPitch;
  const int64_t slice = blockIdx.x / g.chunks, c0 = static_cast<int64_t>(blockIdx.x % g.chunks) * Block::kUnits * g.unit;
  const int lane = threadIdx.x % kWarp, row_bytes = g.window.columns * Block::kPitch;
  const GroupedOwn<kParts> own;
  const int c = static_cast<int>(c0) + own.unit * g.unit, unit_byte = own.unit * kParts * 16;
  const auto stage = [&](const GroupedPlace& at) {
    const int h = kDx ? at.h + (g.pad_h + 1) / 2 - (K - 1) / 2 : at.h * 2 - g.pad_h;
    const int w = kDx ? at.w + (g.pad_w + 1) / 2 - (K - 1) / 2 : at.w * 2 - g.pad_w;
    stage_window<kParts, Class::kLayout>(p.x, g, g.window, at.n, g.H, g.W, h, w, c0, window);
  };

  const int64_t end = part_begin(g.tiles, g.slices, slice + 1);
  int64_t tile = part_begin(g.tiles, g.slices, slice);
  GroupedPlace at = place_of(g, tile);
  T* const filters = reinterpret_cast<T*>(window);
  stage_filters<T, kParts>(p, g, c0, filters);
  uint32_t f[Class::kCount][Class::kMost][2];
  const auto word = [&](int q, int slot) {
    const int out = own.first + lane / 4, in = slot % kParts * 8 + lane % 4 * 2;
    if (slot >= Class::taps(q) * kParts) return 0u;
    const int tap = Class::filter_tap(q, slot / kParts);
    return filter_pair(p, g, c0, c, filters, out, in, tap);
  };
  for_classes<Class::kCount>([&](auto index) {
    constexpr int q = decltype(index)::value;
#pragma unroll
    for (int i = 0; i < Class::pairs(q); ++i) f[q][i][0] = word(q, 2 * i), f[q][i][1] = word(q, 2 * i + 1);
  });
  sync_threads();  // the first tile goes to where the filters are
  stage(at);
  float bias[2];
  load_bias(p.bias, g, c, own, bias);
  const bool second = lane / 16;
  const unsigned char* const first = window + strip_byte<kParts, Class::kLayout>(g, lane / 8 % 2, lane % 8) + unit_byte;
  unsigned char* const mine = outputs + lane / 4 * Block::kPitch + unit_byte + (own.first + lane % 4 * 2) * 2;
  const int rows = c < g.C ? g.rows : 0;  // a warp past the last channel has nothing to do

  while (true) {
    copy_async_wait<0>();
    sync_threads();
#pragma unroll 1
    for (int o = 0; o < rows; ++o) {
      const unsigned char* const row = first + (kDx ? o : 2 * o) * row_bytes;
      for_classes<Class::kCount>([&](auto index) {
        constexpr int q = decltype(index)::value;
        float acc[4] = {};
#pragma unroll
        for (int i = 0; i < Class::pairs(q); ++i) {
          const int last = Class::taps(q) * kParts - 1, left = 2 * i, right = left + 1;
          const int left_byte = Class::byte(g, row_bytes, q, left / kParts) + left % kParts * 16;
          if (left == last) {
            uint32_t a[2];
            ldmatrix(a, row + left_byte);
            mma_m16n8k8<T>(acc, a, f[q][i][0]);
            continue;
          }
          const int right_byte = Class::byte(g, row_bytes, q, right / kParts) + right % kParts * 16;
          uint32_t a[4];
          ldmatrix(a, row + (second ? right_byte : left_byte));
          mma_m16n8k16<T>(acc, a, f[q][i]);
        }
        if constexpr (kParts == 1) {
          if (g.width < g.unit && warp_any(!finite(acc))) {
            const auto place = [&](int i, int& byte, int& tap) { byte = Class::byte(g, row_bytes, q, i), tap = Class::filter_tap(q, i); };
            conv_exactly<T, Class::kLayout>(p, g, window + (kDx ? o : 2 * o) * row_bytes + unit_byte, c, Class::taps(q), place, acc);
          }
        }
        const int down = (Class::row_parity(q) ^ g.pad_h) & 1, right = (Class::column_parity(q) ^ g.pad_w) & 1;
        const int to = kDx ? (2 * o + down) * 4 * kStrip + right * 2 * kStrip : o * 2 * kStrip;
        write_outputs<T, kParts>(mine + to * Block::kPitch, acc, bias);
      });
    }
    sync_threads();
    const GroupedPlace done = at;
    const bool more = ++tile < end;
    if (more) {  // on its way while the outputs go out
      at = place_of(g, tile);
      stage(at);
    }
    store_outputs<kParts, kDx ? 2 : 1>(p.y, g, done.n, done.h * (kDx ? 2 : 1), done.w * (kDx ? 2 : 1), c0, outputs);
    if (!more) break;
  }
}

template <class T, int kParts, bool kDx> int launch_strided(const GroupedConvParams& p, Stream stream) {
  using Block = GroupedBlock<kParts>;
  const GroupedGrid g = grouped_grid(p.shape, kDx, grouped_slices(p.shape, kDx), grouped_piece(p.shape, p.x, p.y));
  return launch(grouped_conv_mma_strided_kernel<T, 3, kParts, kDx>, dim3(static_cast<unsigned>(g.slices * g.chunks)), dim3(Block::kThreads),
                grouped_shared_with_filters(p.shape, g, Block::kPitch), stream, p, g);
}
template <class T, bool kDx> int launch_strided(const GroupedConvParams& p, Stream stream) {
  switch (grouped_channels(p.shape.width()).parts) {
    case 1: return launch_strided<T, 1, kDx>(p, stream);
    case 2: return launch_strided<T, 2, kDx>(p, stream);
    case 3: return launch_strided<T, 3, kDx>(p, stream);
    default: return launch_strided<T, 4, kDx>(p, stream);
  }
}

}  // namespace

int grouped_conv_mma_strided_launch(const GroupedConvParams& p, Stream stream) {
  if (p.x.dtype == DType::kBFloat16) return p.transposed ? launch_strided<bf16, true>(p, stream) : launch_strided<bf16, false>(p, stream);
  return p.transposed ? launch_strided<fp16, true>(p, stream) : launch_strided<fp16, false>(p, stream);
}

}  // namespace fastconv::cuda

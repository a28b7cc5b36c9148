// grouped_conv on tensor cores: dweight and dbias. A warp sums over the pixels of its block's tiles, for 8 output channels:
//
//   dweight[slot, in; out] = sum over pixels of x[pixel + tap of slot, in] dy[pixel, out]
//   as mma with M = 8 inputs in each of two slots, N = 8 outputs, K = 16 pixels of a row of two strips
#include "grouped_conv_mma.cuh"
#include "grouped_conv_mma_kernel.h"
#include "reduce_kernel.h"

namespace fastconv::cuda {
namespace {

// With a stride of 2, the pixels of a row of the window, channels by pixels, two slots at a time. Lanes of ldmatrix that give the
// second slot have `second`; `row`: what the lane reads of the first.
template <int kParts, int kStride>
FC_DEVICE void load_pair(const GroupedGrid& g, const unsigned char* row, bool second, int i, uint32_t (&pair)[4]) {
  ldmatrix<true>(pair, row + (second ? slot_byte<kParts, kStride>(g, 2 * i + 1) : slot_byte<kParts, kStride>(g, 2 * i)));
}
// The last slot of a row and of the one that lies `next` bytes further on.
template <int K, int kParts, int kStride>
FC_DEVICE void load_last(const GroupedGrid& g, const unsigned char* row, bool second, int next, uint32_t (&last)[4]) {
  ldmatrix<true>(last, row + slot_byte<kParts, kStride>(g, K * kParts - 1) + (second ? next : 0));
}
// With a stride of 1, one slot of the 16 pixels from `row` on, of this lane in ldmatrix, and `pixels`, the two of its fragment.
template <class Slots>
FC_DEVICE void load_slot(const GroupedGrid& g, const unsigned char* row, const unsigned char* pixels, int slot, uint32_t (&x)[2]) {
  if (slot < Slots::kOwn) return ldmatrix<true>(x, row + Slots::byte(slot));
  const auto at = Slots::input(slot, threadIdx.x % kWarp / 4);
#pragma unroll
  for (int strip = 0; strip < 2; ++strip) {
    uint16_t values[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const unsigned char* const from = pixels + at.byte() + strip_byte<Slots::kParts, 1>(g, strip, i);
      values[i] = load_shared<uint16_t>(reinterpret_cast<const uint16_t*>(from), at.kw < Slots::K);
    }
    x[strip] = pack(values[0], values[1]);
  }
}

// `last`: of slots whose number in a row is odd, those of tap rows 0 and 1, 2 and 3, ..; of the last pair only the first half counts.
template <int K, class Slots> struct GroupedSums {
  static constexpr int kLasts = Slots::kOdd ? (K + 1) / 2 : 0;
  float pair[K][Slots::kPairs][4], last[kLasts + 1][4];
};

// A row of dy with 16 pixels, and their sum, of pixels and the channel of this lane.
template <class T> FC_DEVICE void load_dy(const unsigned char* row, uint32_t (&dy)[2], float& dbias) {
  ldmatrix<true>(dy, row);
#pragma unroll
  for (int i = 0; i < 2; ++i) dbias += to_float(T{static_cast<uint16_t>(dy[i])}) + to_float(T{static_cast<uint16_t>(dy[i] >> 16)});
}

template <class T, int K, int kParts, int kStride, int kLeft>
__global__ void __launch_bounds__(GroupedBlock<kParts>::kThreads, 2) grouped_conv_mma_wgrad_kernel(GroupedWgradParams p, GroupedGrid g) {
  using Block = GroupedBlock<kParts>;
  using Slots = Row<K, kParts, kLeft>;
  using Sums = GroupedSums<K, Slots>;
  FC_DYNAMIC_SHARED(window);
  unsigned char* const dy_tile = window + g.window.rows * g.window.columns * Block::kPitch;
  const int64_t slice = blockIdx.x / g.chunks, c0 = static_cast<int64_t>(blockIdx.x % g.chunks) * Block::kUnits * g.unit;
  const int lane = threadIdx.x % kWarp, row_bytes = g.window.columns * Block::kPitch;
  const GroupedOwn<kParts> own;
  const int unit_byte = own.unit * kParts * 16;
  const bool second = lane / 8 % 2;
  const unsigned char* const first = window + strip_byte<kParts, kStride>(g, lane / 16, lane % 8) + unit_byte;
  const unsigned char* const dy_first = dy_tile + lane % 16 * Block::kPitch + unit_byte + own.first * 2;

  const int c = static_cast<int>(c0) + own.unit * g.unit, rows = c < g.C ? g.rows : 0;  // a warp past the last channel has nothing to do
  Sums sums = {};
  float dbias = 0;
  const int64_t end = part_begin(g.tiles, g.slices, slice + 1);
  for (int64_t tile = part_begin(g.tiles, g.slices, slice); tile < end; ++tile) {
    const GroupedPlace at = place_of(g, tile);
    sync_threads();  // the tile before has been read
    stage_input<kParts, kStride>(p.x, g, at, c0, window);
    stage_window<kParts, 1>(p.dy, g, g.centre, at.n, g.out_H, g.out_W, at.h, at.w, c0, dy_tile);
    copy_async_wait<0>();
    sync_threads();
    if constexpr (kStride == 1) {
      const unsigned char* const first_slot = window + strip_byte<kParts, 1>(g, lane / 8 % 2, lane % 8) + unit_byte;
      const unsigned char* const first_pixels = window + strip_byte<kParts, 1>(g, 0, lane % 4 * 2) + unit_byte;
      uint32_t before[2] = {};  // the odd slot of the row before
      uint32_t dy[K][2] = {};   // dy[kh]: the output row that input row r meets with tap row kh
#pragma unroll 1
      for (int r = 0; r < (rows > 0 ? rows + K - 1 : 0); ++r) {
        const unsigned char *const row = first_slot + r * row_bytes, *const pixels = first_pixels + r * row_bytes;
#pragma unroll
        for (int kh = K - 1; kh > 0; --kh) dy[kh][0] = dy[kh - 1][0], dy[kh][1] = dy[kh - 1][1];
        if (r < rows) load_dy<T>(dy_first + r * 2 * kStrip * Block::kPitch, dy[0], dbias);
        const auto met = [&](int kh) { return r >= kh && r - kh < rows; };
#pragma unroll
        for (int i = 0; i < Slots::kPairs; ++i) {
          uint32_t x[4];
          if (2 * i + 1 < Slots::kOwn) {
            ldmatrix<true>(x, first + r * row_bytes + (second ? Slots::byte(2 * i + 1) : Slots::byte(2 * i)));
          } else {
            uint32_t left[2], right[2];
            load_slot<Slots>(g, row, pixels, 2 * i, left);
            load_slot<Slots>(g, row, pixels, 2 * i + 1, right);
            x[0] = left[0], x[1] = right[0], x[2] = left[1], x[3] = right[1];
          }
#pragma unroll
          for (int kh = 0; kh < K; ++kh)
            if (met(kh)) mma_m16n8k16<T>(sums.pair[kh][i], x, dy[kh]);
        }
        if constexpr (Slots::kOdd) {
          uint32_t odd[2];
          load_slot<Slots>(g, row, pixels, Slots::kCount - 1, odd);
#pragma unroll
          for (int i = 0; i < Sums::kLasts; ++i) {  // tap row 2 i of the row before meets the output that 2 i + 1 of this one meets
            const bool two = 2 * i + 1 < K;
            const uint32_t x[4] = {two ? before[0] : odd[0], odd[0], two ? before[1] : odd[1], odd[1]};
            if (met(2 * i + two)) mma_m16n8k16<T>(sums.last[i], x, dy[two ? 2 * i + 1 : 2 * i]);
          }
          before[0] = odd[0], before[1] = odd[1];
        }
      }
    } else {
#pragma unroll 1
      for (int o = 0; o < rows; ++o) {
        uint32_t dy[2];
        load_dy<T>(dy_first + o * 2 * kStrip * Block::kPitch, dy, dbias);
#pragma unroll
        for (int kh = 0; kh < K; ++kh) {
          const unsigned char* const row = first + (o * kStride + kh) * row_bytes;
#pragma unroll
          for (int i = 0; i < Slots::kPairs; ++i) {
            uint32_t x[4];
            load_pair<kParts, kStride>(g, row, second, i, x);
            mma_m16n8k16<T>(sums.pair[kh][i], x, dy);
          }
          if constexpr (Slots::kOdd) {
            if (kh % 2) continue;
            uint32_t x[4];
            load_last<K, kParts, kStride>(g, row, second, kh + 1 < K ? row_bytes : 0, x);
            mma_m16n8k16<T>(sums.last[kh / 2], x, dy);
          }
        }
      }
    }
  }

  float* const partial = p.partial + slice * g.C * (g.width * K * K + 1);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int half = i / 2, out = own.first + lane % 4 * 2 + i % 2, group = out / g.width * g.width;
    const bool used = out < g.unit && c + out < g.C;
    float* const filter = partial + (c + out) * g.width * K * K;
    const auto store = [&](int kh, int slot, float sum) {
      const auto at = Slots::input(slot, lane / 4);
      const int in = at.channel - group;
      store_global(filter + in * K * K + kh * K + at.kw, sum, used && at.kw < K && in >= 0 && in < g.width);
    };
#pragma unroll
    for (int kh = 0; kh < K; ++kh)
#pragma unroll
      for (int pair = 0; pair < Slots::kPairs; ++pair) store(kh, 2 * pair + half, sums.pair[kh][pair][i]);
#pragma unroll
    for (int last = 0; last < Sums::kLasts; ++last)
      if (2 * last + half < K) store(2 * last + half, Slots::kCount - 1, sums.last[last][i]);
  }
  dbias += shuffle_xor(dbias, 1);
  dbias += shuffle_xor(dbias, 2);
  const int out = own.first + lane / 4;
  store_global(partial + static_cast<int64_t>(g.C) * g.width * K * K + c + out, dbias, lane % 4 == 0 && out < g.unit && c + out < g.C);
}

template <class T, int kParts, int kStride, int kLeft = 0> int launch_wgrad(const GroupedWgradParams& p, Stream stream) {
  using Block = GroupedBlock<kParts>;
  const GroupedGrid g = grouped_grid(p.shape, false, grouped_wgrad_slices(p.shape), grouped_piece(p.shape, p.x, p.dy));
  return launch(grouped_conv_mma_wgrad_kernel<T, 3, kParts, kStride, kLeft>, dim3(static_cast<unsigned>(g.slices * g.chunks)),
                dim3(Block::kThreads), grouped_shared(g, Block::kPitch), stream, p, g);
}
template <class T, int kStride> int launch_wgrad(const GroupedWgradParams& p, Stream stream) {
  [[maybe_unused]] const int64_t left = p.shape.width() % 8;
  switch (grouped_channels(p.shape.width()).parts) {
    case 1: return launch_wgrad<T, 1, kStride>(p, stream);
    case 2:
      if constexpr (kStride == 1) {
        if (left == 2) return launch_wgrad<T, 2, 1, 2>(p, stream);
        if (left == 4) return launch_wgrad<T, 2, 1, 4>(p, stream);
      }
      return launch_wgrad<T, 2, kStride>(p, stream);
    case 3: return launch_wgrad<T, 3, kStride>(p, stream);
    default: return launch_wgrad<T, 4, kStride>(p, stream);
  }
}
int launch_partials(const GroupedWgradParams& p, Stream stream) {
  if (p.x.dtype == DType::kBFloat16) return p.shape.stride == 1 ? launch_wgrad<bf16, 1>(p, stream) : launch_wgrad<bf16, 2>(p, stream);
  return p.shape.stride == 1 ? launch_wgrad<fp16, 1>(p, stream) : launch_wgrad<fp16, 2>(p, stream);
}

}  // namespace

int grouped_conv_mma_wgrad_launch(const GroupedWgradParams& p, Stream stream) {
  const GroupedConvShape& s = p.shape;
  const int64_t slices = grouped_wgrad_slices(s), floats = s.weights() + s.C;
  int error = launch_partials(p, stream);
  if (error == 0) error = reduce_partials_launch(p.partial, slices, floats, s.weights(), p.dweight, stream);
  if (error == 0) error = reduce_partials_launch(p.partial + s.weights(), slices, floats, s.C, p.dbias, stream);
  return error;
}

}  // namespace fastconv::cuda

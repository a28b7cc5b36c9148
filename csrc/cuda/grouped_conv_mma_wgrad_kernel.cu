// grouped_conv on tensor cores: dweight and dbias. A warp sums over the pixels of its block's tiles, for 8 output channels:
//
//   dweight[slot, in; out] = sum over pixels of x[pixel + tap of slot, in] dy[pixel, out]
//   as mma with M = 8 inputs in each of two slots, N = 8 outputs, K = 16 pixels of a row of two strips
#include "grouped_conv_mma.cuh"
#include "grouped_conv_mma_kernel.h"
#include "reduce_kernel.h"

namespace fastconv::cuda {
namespace {

template <int K, int kParts> constexpr int kPairs = K * kParts / 2;  // of a row of taps; if its slots are odd in number,
template <int K, int kParts> constexpr int kLasts = K * kParts % 2 ? (K + 1) / 2 : 0;  // the last slots of two rows make a pair

// The pixels of a row of the window, channels by pixels, two slots at a time. Lanes of ldmatrix that give the second slot have
// `second`; `row`: what the lane reads of the first.
template <int kParts, int kStride>
FC_DEVICE void load_pair(const GroupedGrid& g, const unsigned char* row, bool second, int i, uint32_t (&pair)[4]) {
  ldmatrix<true>(pair, row + (second ? slot_byte<kParts, kStride>(g, 2 * i + 1) : slot_byte<kParts, kStride>(g, 2 * i)));
}
// The last slot of a row and of the one that lies `next` bytes further on.
template <int K, int kParts, int kStride>
FC_DEVICE void load_last(const GroupedGrid& g, const unsigned char* row, bool second, int next, uint32_t (&last)[4]) {
  ldmatrix<true>(last, row + slot_byte<kParts, kStride>(g, K * kParts - 1) + (second ? next : 0));
}

// Of the last pair in an odd number of rows only the first half counts.
template <int K, int kParts> struct GroupedSums {
  float pair[K][kPairs<K, kParts>][4], last[kLasts<K, kParts> + 1][4];
};

// A row of dy with 16 pixels, and their sum, of pixels and the channel of this lane.
template <class T> FC_DEVICE void load_dy(const unsigned char* row, uint32_t (&dy)[2], float& dbias) {
  ldmatrix<true>(dy, row);
#pragma unroll
  for (int i = 0; i < 2; ++i) dbias += to_float(T{static_cast<uint16_t>(dy[i])}) + to_float(T{static_cast<uint16_t>(dy[i] >> 16)});
}

template <class T, int K, int kParts, int kStride>
__global__ void __launch_bounds__(GroupedBlock<kParts>::kThreads, 2) grouped_conv_mma_wgrad_kernel(GroupedWgradParams p, GroupedGrid g) {
  using Block = GroupedBlock<kParts>;
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
  GroupedSums<K, kParts> sums = {};
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
      uint32_t dy[K][2] = {};  // dy[kh]: the output row that input row r meets with tap row kh
#pragma unroll 1
      for (int r = 0; r < (rows > 0 ? rows + K - 1 : 0); ++r) {
        const unsigned char* const row = first + r * row_bytes;
#pragma unroll
        for (int kh = K - 1; kh > 0; --kh) dy[kh][0] = dy[kh - 1][0], dy[kh][1] = dy[kh - 1][1];
        if (r < rows) load_dy<T>(dy_first + r * 2 * kStrip * Block::kPitch, dy[0], dbias);
        const auto met = [&](int kh) { return r >= kh && r - kh < rows; };
#pragma unroll
        for (int i = 0; i < kPairs<K, kParts>; ++i) {
          uint32_t x[4];
          load_pair<kParts, kStride>(g, row, second, i, x);
#pragma unroll
          for (int kh = 0; kh < K; ++kh)
            if (met(kh)) mma_m16n8k16<T>(sums.pair[kh][i], x, dy[kh]);
        }
        if constexpr (kLasts<K, kParts> > 0) {
          uint32_t x[4];
          load_last<K, kParts, kStride>(g, row, second, r + 1 < rows + K - 1 ? row_bytes : 0, x);
#pragma unroll
          for (int kh = 0; kh < K; kh += 2)
            if (met(kh)) mma_m16n8k16<T>(sums.last[kh / 2], x, dy[kh]);
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
          for (int i = 0; i < kPairs<K, kParts>; ++i) {
            uint32_t x[4];
            load_pair<kParts, kStride>(g, row, second, i, x);
            mma_m16n8k16<T>(sums.pair[kh][i], x, dy);
          }
          if constexpr (kLasts<K, kParts> > 0) {
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
    const int half = i / 2, in = lane / 4, out = own.first + lane % 4 * 2 + i % 2, group = out / g.width * g.width;
    const bool used = out < g.unit && c + out < g.C;
    float* const first_in = partial + ((c + out) * g.width + in - group) * K * K;
    const auto store = [&](int kh, int slot, float sum) {
      const int part = slot % kParts * 8, from = part + in;
      store_global(first_in + part * K * K + kh * K + slot / kParts, sum, used && from >= group && from < group + g.width);
    };
#pragma unroll
    for (int kh = 0; kh < K; ++kh)
#pragma unroll
      for (int pair = 0; pair < kPairs<K, kParts>; ++pair) store(kh, 2 * pair + half, sums.pair[kh][pair][i]);
#pragma unroll
    for (int last = 0; last < kLasts<K, kParts>; ++last)
      if (2 * last + half < K) store(2 * last + half, K * kParts - 1, sums.last[last][i]);
  }
  dbias += shuffle_xor(dbias, 1);
  dbias += shuffle_xor(dbias, 2);
  const int out = own.first + lane / 4;
  store_global(partial + static_cast<int64_t>(g.C) * g.width * K * K + c + out, dbias, lane % 4 == 0 && out < g.unit && c + out < g.C);
}

template <class T, int kParts, int kStride> int launch_wgrad(const GroupedWgradParams& p, Stream stream) {
  using Block = GroupedBlock<kParts>;
  const GroupedGrid g = grouped_grid(p.shape, false, grouped_wgrad_slices(p.shape), grouped_piece(p.shape, p.x, p.dy));
  return launch(grouped_conv_mma_wgrad_kernel<T, 3, kParts, kStride>, dim3(static_cast<unsigned>(g.slices * g.chunks)),
                dim3(Block::kThreads), grouped_shared(g, Block::kPitch), stream, p, g);
}
template <class T, int kStride> int launch_wgrad(const GroupedWgradParams& p, Stream stream) {
  switch (grouped_channels(p.shape.width()).parts) {
    case 1: return launch_wgrad<T, 1, kStride>(p, stream);
    case 2: return launch_wgrad<T, 2, kStride>(p, stream);
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

// depthwise_conv on tensor cores, backward: dx, and partial sums of dweight and dbias, from one tile of dy with its halo.
//
//   dx         the forward pass over dy with the taps in reverse
//   dweight    G_kh[a, b] = sum over strips and rows o of dy[row o + K - 1 - kh, column a of the window] x[row o, column b]
//              as mma with M = 16 columns of the window, N = 8 of the strip, K = 16 strips, and then
//              dweight[kh, kw] = sum over b of G_kh[b + K - 1 - kw, b]
//   dbias      the same with ones for x
#include "conv_mma.cuh"
#include "depthwise_conv_mma_kernel.h"

namespace fastconv::cuda {
namespace {

// Sums of a channel over all tiles of a block. Of G_kh only the K diagonals a - b = 0 .. K - 1 count, and no lane holds both
// row g and row g + 8 of a column b there (g = lane / 4): row g lies in the band where g >= b, row g + 8 only where g < b.
template <int K> struct Sums {
  float dweight[K][2], dbias;
};

// Ones in the layout of b, one row a strip; zeros for strips that are not used, whose windows are another's.
template <class T> FC_DEVICE void ones_of(const ConvMmaTiles& t, uint32_t (&ones)[2]) {
  const int k = threadIdx.x % 4 * 2;
#pragma unroll
  for (int i = 0; i < 2; ++i)
    ones[i] = from_floats<T>(k + 8 * i < t.strips() ? 1.0f : 0.0f, k + 8 * i + 1 < t.strips() ? 1.0f : 0.0f);
}

// Adds a tile. `window`, `centre`: what this lane gives to ldmatrix, of windows of dy and of rows of x.
template <class T, int K>
FC_DEVICE void wgrad_strips(const unsigned char* window, int pitch, const unsigned char* centre, const uint32_t (&ones)[2], Sums<K>& sums) {
  uint32_t x[kMmaRows][2];
#pragma unroll
  for (int o = 0; o + 1 < kMmaRows; o += 2) {  // the upper lanes give the row after
    uint32_t two[4];
    ldmatrix<true>(two, centre + o * 16);
#pragma unroll
    for (int i = 0; i < 4; ++i) x[o + i / 2][i % 2] = two[i];
  }
  ldmatrix<true>(x[kMmaRows - 1], centre + (kMmaRows - 1) * 16);
  float matrix[K][4] = {}, dbias[4] = {};
#pragma unroll
  for (int row = 0; row < kMmaRows + K - 1; ++row) {
    uint32_t a[4];
    ldmatrix<true>(a, window + row * pitch);
#pragma unroll
    for (int kh = 0; kh < K; ++kh) {
      const int o = row - (K - 1 - kh);
      if (o >= 0 && o < kMmaRows) mma_m16n8k16<T>(matrix[kh], a, x[o]);
    }
    if (row >= K / 2 && row < K / 2 + kMmaRows) mma_m16n8k16<T>(dbias, a, ones);
  }
  const int lane = threadIdx.x % kWarp, g = lane / 4, b = lane % 4 * 2;
#pragma unroll
  for (int kh = 0; kh < K; ++kh)
#pragma unroll
    for (int i = 0; i < 2; ++i) sums.dweight[kh][i] += g >= b + i ? matrix[kh][i] : matrix[kh][2 + i];
  // Columns of the window that lie over the strip: each column of N holds their sum over strips and rows.
  sums.dbias += (b == 0 && g >= K / 2 ? dbias[0] : 0) + (b == 0 && g + 8 < K / 2 + kMmaColumns ? dbias[2] : 0);
}

// Place in a partial, dweight [C][K * K] and then dbias [C], of tap `tap` of channel c; tap K * K is dbias.
template <int K> FC_DEVICE int64_t sum_place(int64_t C, int64_t c, int tap) { return tap == K * K ? C * K * K + c : c * K * K + tap; }

// A channel's sums into a partial, a lane to a tap; false in all lanes where one is not finite. `matrix`: of this
// warp, [K][b % 2][b / 2][kw % 8] floats and K more to each kh, so that neither writing nor reading meets a bank twice.
template <int K> FC_DEVICE bool write_sums(int64_t C, int64_t c, const Sums<K>& sums, float* matrix, float* partial) {
  constexpr int kTaps = K * K, kMatrix = 64 + K;
  const int lane = threadIdx.x % kWarp, g = lane / 4, b = lane % 4 * 2;
  float zero = 0;  // of finite sums
#pragma unroll
  for (int kh = 0; kh < K; ++kh) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      store_shared(matrix + kh * kMatrix + i * 32 + b * 4 + ((K - 1 - g + b + i) & 7), sums.dweight[kh][i]);
      zero += sums.dweight[kh][i] * 0;
    }
  }
  const float dbias = warp_sum(sums.dbias);
  const bool whole = !warp_any(zero + dbias * 0 != 0);
  sync_warp();
#pragma unroll 1
  for (int first = 0; first < kTaps; first += kWarp) {
    const int tap = first + lane;
    const int kh = tap / K, kw = tap - kh * K;
    float sum = 0;
#pragma unroll
    for (int j = 0; j < kMmaColumns; ++j) sum += load_shared<float>(matrix + kh * kMatrix + j % 2 * 32 + j / 2 * 8 + kw, tap < kTaps);
    store_global(partial + sum_place<K>(C, c, tap), sum, c < C && tap < kTaps);
  }
  store_global(partial + sum_place<K>(C, c, kTaps), dbias, c < C && lane == 0);
  sync_warp();  // the next channel's matrices go to the same place
  return whole;
}

// Zeros outside of the maps make NaN of an Inf in the sums of other taps. So where a sum of a channel is not finite, lanes form
// all of them again, a tap each, over the pixels of the block's tiles; tap K * K is dbias.
template <class T, int K>
FC_DEVICE float sum_exactly(const ConvBackwardParams& p, const MmaGrid& g, int64_t first, int count, int64_t c, int tap) {
  const ConvShape& s = p.shape;
  const ConvMmaTiles& t = g.tiles;
  const bool bias = tap == K * K;
  const int down = bias ? 0 : K / 2 - tap / K, right = bias ? 0 : K / 2 - tap % K;
  float sum = 0;
#pragma unroll 1
  for (int tile = 0; tile < count; ++tile) {
    const MmaPlace at = place_of(s, t, first + tile);
#pragma unroll 1
    for (int i = 0; i < t.strips() * kMmaRows * kMmaColumns; ++i) {
      const int m = i / (kMmaRows * kMmaColumns), inside = i - m * (kMmaRows * kMmaColumns);
      const StripPlace place = strip_place<kMmaRows>(t, at, strip_of(t, m));
      const int h = place.h + inside / kMmaColumns, w = place.w + inside % kMmaColumns, dy_h = h + down, dy_w = w + right;
      if (place.image >= at.images || h >= g.H || w >= g.W || dy_h < 0 || dy_h >= g.H || dy_w < 0 || dy_w >= g.W) continue;
      const float dy = load_array<1>(p.dy, element_of(s, g, at, place.image, dy_h, dy_w) + c)[0];
      const T x = from_float<T>(load_array<1>(p.x, element_of(s, g, at, place.image, h, w) + c, !bias)[0]);
      sum = bias ? sum + dy : fmaf(to_float(x), dy, sum);
    }
  }
  return sum;
}

template <class T, int K> __global__ void __launch_bounds__(kMmaThreads, 2) depthwise_conv_mma_bwd_kernel(ConvBackwardParams p, MmaGrid g) {
  FC_DYNAMIC_SHARED(raw);
  const ConvShape& s = p.shape;
  const ConvMmaTiles& t = g.tiles;
  const int plane = t.plane * 16;
  int* const windows = reinterpret_cast<int*>(raw);
  uint32_t* const pairs = reinterpret_cast<uint32_t*>(raw + kMmaWindows);
  unsigned char* const planes = raw + kMmaWindows + kMmaChannels * K * kMmaPairs * 4;
  unsigned char* const x_planes = planes + mma_plane_bytes(plane);
  const int64_t slice = blockIdx.x / g.chunks, c0 = static_cast<int64_t>(blockIdx.x % g.chunks) * kMmaChannels;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, c = warp * kMmaOwn;
  uint32_t ones[2];
  ones_of<T>(t, ones);

  if (p.dx.data) stage_pairs<T, K>(p.weight, s.C, c0, true, pairs);
  Sums<K> sums[kMmaOwn] = {};
  const int64_t begin = part_begin(t.count, g.slices, slice);
  const int count = static_cast<int>(part_begin(t.count, g.slices, slice + 1) - begin);
  for (int tile = 0; tile < count; ++tile) {
    const MmaPlace at = place_of(s, t, begin + tile);
    sync_threads();  // the tile before has been stored
    stage_windows<kMmaRows>(t, at, windows);
    stage_window<T, K, kMmaRows, 2>(p.dy, s, g, at, c0, planes);
    if (p.partial) g.wide ? stage_centre<T, true>(p.x, s, g, at, c0, x_planes) : stage_centre<T, false>(p.x, s, g, at, c0, x_planes);
    sync_threads();
#pragma unroll
    for (int i = 0; i < kMmaOwn; ++i) {
      unsigned char* const mine = planes + plane_byte(c + i, plane);
      if (p.partial) {
        const unsigned char* const centre = x_planes + plane_byte(c + i, kMmaCentre) + (lane % kMmaStrips * kMmaRows + lane / 16) * 16;
        const unsigned char* const window = mine + load_shared<int>(windows + lane % 8 + lane / 16 * 8) + lane / 8 % 2 * 16;
        wgrad_strips<T, K>(window, t.pitch * 16, centre, ones, sums[i]);
      }
      if (p.dx.data) {
        uint32_t band[K][2];
        load_bands<K>(pairs, c + i, band);
        conv_plane<T, K, kMmaRows>(s, t, at, windows, mine, band, p.weight, c0 + c + i, true, 0);
      }
    }
    if (!p.dx.data) continue;
    sync_threads();
    g.wide ? store_centre<T, true>(p.dx, p.dshortcut, s, g, at, c0, planes) : store_centre<T, false>(p.dx, p.dshortcut, s, g, at, c0, planes);
  }
  if (!p.partial) return;
  sync_threads();  // x has been read
  float* const partial = p.partial + slice * s.C * (K * K + 1);
  unsigned broken = 0;
#pragma unroll
  for (int i = 0; i < kMmaOwn; ++i)
    if (!write_sums<K>(s.C, c0 + c + i, sums[i], reinterpret_cast<float*>(x_planes) + warp * K * (64 + K), partial)) broken |= 1u << i;
#pragma unroll 1
  for (int i = 0; i < kMmaOwn; ++i) {
    if (!(broken >> i & 1) || c0 + c + i >= s.C) continue;
#pragma unroll 1
    for (int tap = lane; tap <= K * K; tap += kWarp)
      store_global(partial + sum_place<K>(s.C, c0 + c + i, tap), sum_exactly<T, K>(p, g, begin, count, c0 + c + i, tap));
  }
}

template <class T, int K> int launch_backward(const ConvBackwardParams& p, Stream stream) {
  const ConvMmaTiles tiles = conv_mma_tiles(p.shape);
  const MmaGrid g = mma_grid(p.shape, tiles, conv_wgrad_slices(p.shape), in_vectors(p.shape.C, p.dy, p.x, p.dx, p.dshortcut));
  const dim3 grid(static_cast<unsigned>(g.slices * g.chunks));
  return launch(depthwise_conv_mma_bwd_kernel<T, K>, grid, dim3(kMmaThreads), conv_mma_shared(tiles, K, p.partial), stream, p, g);
}

}  // namespace

bool conv_mma_chosen(const ConvBackwardParams& p) {
  const DType x = p.x.dtype == DType::kFloat ? p.compute : p.x.dtype;  // staging may round it
  if (!conv_mma_serves(p.shape.K, p.dy.dtype, x, p.weight.dtype)) return false;
  const ConvMmaTiles tiles = conv_mma_tiles(p.shape);
  return conv_mma_pays(p.shape, tiles) && conv_mma_shared(tiles, p.shape.K, p.partial) <= shared_memory_limit();
}

int conv_mma_bwd_launch(const ConvBackwardParams& p, Stream stream) {
  if (p.dy.dtype == DType::kBFloat16) return p.shape.K == 7 ? launch_backward<bf16, 7>(p, stream) : launch_backward<bf16, 5>(p, stream);
  return p.shape.K == 7 ? launch_backward<fp16, 7>(p, stream) : launch_backward<fp16, 5>(p, stream);
}

}  // namespace fastconv::cuda

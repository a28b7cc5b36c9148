// depthwise_conv on the GPU, backward: dx, and partial sums of dweight and dbias, from one tile of dy with its halo.
//
//   dx[h, w] = sum over taps of dy[h + pad - kh, w + pad - kw] weight[kh, kw]     forward over dy with the taps in reverse
//   dweight[kh, kw] = sum over (h, w) of x[h, w] dy[h + pad - kh, w + pad - kw]   so that x needs no halo
#include "conv_tile.cuh"
#include "depthwise_conv_general_kernel.h"
#include "depthwise_conv_kernel.h"
#include "depthwise_conv_mma_kernel.h"
#include "reduce_kernel.h"

namespace fastconv::cuda {
namespace {

constexpr int kSumPitch = kChunk + 1;  // [unit][kw][kSumPitch] float: free of conflicts by channel and by tap

// The tap row of a unit, and which of the units with that tap row it is: units of a group divide the rows of a tile.
struct TapPlace {
  int kh, group, groups;
  bool active;
};
template <int K> FC_DEVICE TapPlace tap_of(int units) {
  const int unit = threadIdx.x / kUnit, groups = units / K;
  return {unit % K, unit / K, groups, unit / K < groups};
}

// kPixels staged values of x, whose dtype is its own.
template <int kPixels> FC_DEVICE void load_pixels(const unsigned char* tile, DType dtype, int i, bool in, Quad (&x)[kPixels]) {
#pragma unroll
  for (int j = 0; j < kPixels; ++j) {
    const int at = i + j * kChunk;
    if (dtype == DType::kBFloat16) x[j] = load_quad(reinterpret_cast<const bf16*>(tile), at, in);
    else if (dtype == DType::kHalf) x[j] = load_quad(reinterpret_cast<const fp16*>(tile), at, in);
    else x[j] = load_quad(reinterpret_cast<const float*>(tile), at, in);
  }
}

// acc[kw] += x[j] * dy[j + 2 pad - kw] over kPixels pixels of x. Columns of dy outside [first, end) lie outside the map and
// are skipped: they are zeros, but 0 * Inf is not. A row that is not `in` counts as zeros, and so does its x. Each column
// is loaded ahead of the branch before it, over which the compiler moves nothing.
template <class T, int K, int kPixels>
FC_DEVICE void wgrad_run(const T* dy, const Quad (&x)[kPixels], int first, int end, bool in, Quad (&acc)[K]) {
  Quad next = load_quad(dy, 0, in);
#pragma unroll
  for (int column = 0; column < kPixels + K - 1; ++column) {
    const Quad v = next;
    if (column + 1 < kPixels + K - 1) next = load_quad(dy, (column + 1) * kChunk, in);
    if (column < first || column >= end) continue;
#pragma unroll
    for (int j = 0; j < kPixels; ++j) {
      const int kw = j - column + K - 1;
      if (kw < 0 || kw >= K) continue;
#pragma unroll
      for (int i = 0; i < kQuad; ++i) acc[kw][i] = fmaf(x[j][i], v[i], acc[kw][i]);
    }
  }
}

// Adds a tile to this thread's sums. The lanes of a warp stay together: what differs between units is `in`.
template <class T, int K>
FC_DEVICE void wgrad_tile(const ConvShape& s, const ConvGrid& g, const TilePlace& at, const TapPlace& tap, const T* dy, int dy_pitch,
                          const unsigned char* x, DType x_dtype, int x_pitch, Quad (&acc)[K]) {
  constexpr int kPad = K / 2;
  const int quad = threadIdx.x % kUnit * kQuad;
  const int columns = s.W - at.w < g.columns() ? static_cast<int>(s.W - at.w) : g.columns();
  // Columns of the staged dy that lie inside the map.
  const int staged = g.columns() + 2 * kPad;
  const int left = at.w < kPad ? kPad - static_cast<int>(at.w) : 0;
  const int right = s.W - at.w + kPad < staged ? static_cast<int>(s.W - at.w) + kPad : staged;
  for (int row0 = 0; row0 < g.images * g.rows; row0 += tap.groups) {
    const int row = row0 + tap.group, image = row / g.rows, dy_row = row - image * g.rows + kPad - tap.kh;
    const int64_t n = at.n + image, h = at.h + row - image * g.rows, dy_h = at.h + dy_row;
    const bool in = tap.active && image < g.images && n < s.N && h < s.H && dy_h >= 0 && dy_h < s.H;
    const T* const dy_at = dy + (image * (g.rows + 2 * kPad) + dy_row + kPad) * dy_pitch * kChunk + quad;
    const int x_at = row * x_pitch * kChunk + quad;
    int column = 0;
    for (; columns - column >= kRun; column += kRun) {
      Quad pixels[kRun];
      load_pixels(x, x_dtype, x_at + column * kChunk, in, pixels);
      wgrad_run<T, K>(dy_at + column * kChunk, pixels, left - column, right - column, in, acc);
    }
    for (; column < columns; ++column) {
      Quad pixel[1];
      load_pixels(x, x_dtype, x_at + column * kChunk, in, pixel);
      wgrad_run<T, K>(dy_at + column * kChunk, pixel, left - column, right - column, in, acc);
    }
  }
}

// The sums of a block's threads, added in order, as the block's part of a partial: dweight [C][K * K], then dbias [C].
template <int K>
FC_DEVICE void write_partial(const ConvShape& s, const TapPlace& tap, int64_t c0, const Quad (&acc)[K], const float* dbias, float* sums,
                             float* partial) {
  constexpr int kTaps = K * K;
  const int unit = threadIdx.x / kUnit, units = blockDim.x / kUnit, quad = threadIdx.x % kUnit * kQuad;
#pragma unroll
  for (int kw = 0; kw < K; ++kw)
#pragma unroll
    for (int i = 0; i < kQuad; ++i) store_shared(sums + (unit * K + kw) * kSumPitch + quad + i, acc[kw][i], tap.active);
  sync_threads();
  for (int i = threadIdx.x; i < kChunk * kTaps; i += blockDim.x) {
    const int c = i / kTaps;
    float sum = 0;
    for (int group = 0; group < tap.groups; ++group) sum += load_shared<float>(sums + (group * kTaps + i - c * kTaps) * kSumPitch + c);
    store_global(partial + c0 * kTaps + i, sum, c0 + c < s.C);
  }
  for (int c = threadIdx.x; c < kChunk; c += blockDim.x) {
    float sum = 0;
    for (int other = 0; other < units; ++other) sum += load_shared<float>(dbias + other * kWeightPitch + c);
    store_global(partial + s.C * kTaps + c0 + c, sum, c0 + c < s.C);
  }
}

template <class T, int K> __global__ void __launch_bounds__(224, 2) depthwise_conv_bwd_kernel(ConvBackwardParams p, ConvGrid g) {
  FC_DYNAMIC_SHARED(raw);
  constexpr int kPad = K / 2;
  const ConvShape& s = p.shape;
  const int pitch = odd(g.columns() + 2 * kPad), x_pitch = odd(g.columns());
  float* const weight = reinterpret_cast<float*>(raw);  // [K * K][kWeightPitch]
  float* const dbias = weight + K * K * kWeightPitch;   // [unit][kWeightPitch], each thread its own: registers are short
  unsigned char* const dy_tile = reinterpret_cast<unsigned char*>(dbias + blockDim.x / kUnit * kWeightPitch);
  unsigned char* const x_tile = dy_tile + g.images * (g.rows + 2 * kPad) * pitch * kChunk * static_cast<int>(sizeof(T));
  const T* const dy = reinterpret_cast<const T*>(dy_tile);
  const int64_t slice = blockIdx.x / g.chunks;
  const int64_t c0 = static_cast<int64_t>(blockIdx.x % g.chunks) * kChunk;
  const RunPlace run = run_of(g);
  const TapPlace tap = tap_of<K>(blockDim.x / kUnit);

  if (p.dx.data) stage_weight(p.weight, s.C, c0, K * K, true, weight);
  Quad dweight[K] = {};
  float* const own_dbias = dbias + threadIdx.x / kUnit * kWeightPitch + run.quad;
  store_shared(own_dbias, Quad{});
  const int64_t end = part_begin(g.tiles, g.slices, slice + 1);
  for (int64_t t = part_begin(g.tiles, g.slices, slice); t < end; ++t) {
    const TilePlace at = place_of(g, t);
    sync_threads();  // the tile before has been read
    stage_tile(p.dy, s, g, at, kPad, pitch, c0, dy_tile);
    if (p.partial) stage_tile(p.x, s, g, at, 0, x_pitch, c0, x_tile);
    copy_async_commit();
    copy_async_wait<0>();
    sync_threads();
    const T* const window = dy + run.corner(g, kPad, pitch);
    if (p.dx.data) {
      Quad acc[kRun] = {};
      conv_run<T, K>(window, pitch, weight + run.quad, acc);
      store_run(p.dx, first_pixel(s, at, run), s.C, c0 + run.quad, acc, run_count(s, at, run), g.wide, p.dshortcut);
    }
    if (p.partial) {
      Quad sum = load_shared<Quad>(own_dbias);
#pragma unroll
      for (int j = 0; j < kRun; ++j) {
        const Quad v = load_quad(window, (kPad * pitch + kPad + j) * kChunk, run.active);
#pragma unroll
        for (int i = 0; i < kQuad; ++i) sum[i] += v[i];
      }
      store_shared(own_dbias, sum);
      wgrad_tile<T, K>(s, g, at, tap, dy, pitch, x_tile, p.x.dtype, x_pitch, dweight);
    }
  }
  if (!p.partial) return;
  sync_threads();
  write_partial<K>(s, tap, c0, dweight, dbias, reinterpret_cast<float*>(dy_tile), p.partial + slice * s.C * (K * K + 1));
}

template <class T, int K> int launch_backward(const ConvBackwardParams& p, Stream stream) {
  const ConvTiles tiles = conv_backward_tiles(p.shape);
  const ConvGrid g = conv_grid(p.shape, tiles, conv_wgrad_slices(p.shape), in_vectors(p.shape.C, p.dy, p.x, p.dx, p.dshortcut));
  // wgrad has a unit for each tap row at least.
  const unsigned threads = std::max<unsigned>(g.threads(), round_up(K * kUnit, kWarp));
  const int64_t units = threads / kUnit;
  const int64_t x_bytes = p.partial ? g.images * g.rows * odd(g.columns()) * kChunk * dtype_size(p.x.dtype) : 0;
  const int64_t staged = g.images * (g.rows + K - 1) * odd(g.columns() + K - 1) * kChunk * static_cast<int64_t>(sizeof(T)) + x_bytes;
  const int64_t sums = p.partial ? units / K * K * K * kSumPitch * static_cast<int64_t>(sizeof(float)) : 0;
  const size_t shared = (K * K + units) * kWeightPitch * sizeof(float) + std::max(staged, sums);
  const dim3 grid(static_cast<unsigned>(g.slices * g.chunks));
  return launch(depthwise_conv_bwd_kernel<T, K>, grid, dim3(threads), shared, stream, p, g);
}

int launch_general(const ConvBackwardParams& p, Stream stream) {
  const int error = p.dx.data ? conv_general_launch(p.shape, p.dy, p.weight, {}, true, p.dshortcut, p.dx, stream) : 0;
  return error == 0 && p.partial ? conv_general_wgrad_launch(p, stream) : error;
}

template <class T> int launch_backward(const ConvBackwardParams& p, Stream stream) {
  switch (p.shape.K) {
    case 3: return launch_backward<T, 3>(p, stream);
    case 5: return launch_backward<T, 5>(p, stream);
    case 7: return launch_backward<T, 7>(p, stream);
    default: return launch_general(p, stream);
  }
}

int launch_backward(ConvBackwardParams p, Stream stream) {
  // Element by element the kernel below has no registers left to address the shortcut's gradient: dx is then apart.
  if (p.dx.data && p.dshortcut.data && !in_vectors(p.shape.C, p.dy, p.x, p.dx, p.dshortcut)) {
    const int error = conv_general_launch(p.shape, p.dy, p.weight, {}, true, p.dshortcut, p.dx, stream);
    if (error != 0 || !p.partial) return error;
    p.dx = {};
    p.dshortcut = {};
  }
  switch (p.dy.dtype) {
    case DType::kBFloat16: return launch_backward<bf16>(p, stream);
    case DType::kHalf: return launch_backward<fp16>(p, stream);
    default: return launch_backward<float>(p, stream);
  }
}

}  // namespace

int depthwise_conv_bwd_launch(const ConvBackwardParams& p, Stream stream) {
  const int error = conv_mma_chosen(p) ? conv_mma_bwd_launch(p, stream) : launch_backward(p, stream);
  if (error != 0 || !p.partial) return error;
  const int64_t slices = conv_wgrad_slices(p.shape), count = p.shape.C * p.shape.K * p.shape.K, stride = count + p.shape.C;
  const int weight_error = reduce_partials_launch(p.partial, slices, stride, count, p.dweight, stream);
  return weight_error != 0 ? weight_error : reduce_partials_launch(p.partial + count, slices, stride, p.shape.C, p.dbias, stream);
}

}  // namespace fastconv::cuda

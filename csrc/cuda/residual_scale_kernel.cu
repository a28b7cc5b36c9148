// residual_scale on the GPU: a row is the C channels of a pixel, a thread owns kWidth of them and walks down the rows.
#include "residual_scale_kernel.h"

#include "array.cuh"
#include "reduce_kernel.h"

namespace fastconv::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kRowsEach = 4;  // rows of a thread in the forward pass: enough loads in flight, gamma read once

// A block's threads as rows x lanes, a lane for kWidth channels. Rows of few channels leave some threads idle.
struct Tile {
  int rows, lanes, row;
  int64_t channel;  // first of this thread
  bool in;
};

FC_DEVICE Tile tile_of(int64_t C, int width, unsigned across) {
  const int64_t groups = C / width;
  const int lanes = groups < kThreads ? static_cast<int>(groups) : kThreads, rows = kThreads / lanes, row = threadIdx.x / lanes;
  const int64_t group = static_cast<int64_t>(blockIdx.x % across) * lanes + threadIdx.x % lanes;
  return {rows, lanes, row, group * width, row < rows && group < groups};
}

unsigned tiles_across(int64_t C, int width) { return static_cast<unsigned>(ceil_div(C / width, kThreads)); }

// The image of a row, and the mask's value for it.
class Mask {
 public:
  FC_DEVICE Mask(const Array& mask, int64_t row, int64_t L) : mask_(mask), L_(L), image_(row / L), pixel_(row % L) {}
  FC_DEVICE float value(bool in) const { return mask_.data ? load_array<1>(mask_, image_, in)[0] : 1.0f; }
  FC_DEVICE void advance(int rows) {
    pixel_ += rows;
    if (pixel_ < L_) return;
    const int images = rows < L_ ? 1 : static_cast<int>(pixel_) / static_cast<int>(L_);  // 64-bit division is slow
    image_ += images;
    pixel_ -= images * L_;
  }

 private:
  Array mask_;
  int64_t L_, image_, pixel_;
};

template <int kWidth> FC_DEVICE Vec<float, kWidth> load_gamma(const Array& gamma, const Tile& tile) {
  if (gamma.data) return load_array<kWidth>(gamma, tile.channel, tile.in);
  Vec<float, kWidth> ones;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) ones[i] = 1;
  return ones;
}

template <int kWidth>
__global__ void __launch_bounds__(kThreads) residual_scale_fwd_kernel(ResidualScaleForwardParams p, unsigned across) {
  const Tile tile = tile_of(p.C, kWidth, across);
  const int64_t rows = p.N * p.L, first = static_cast<int64_t>(blockIdx.x / across) * kRowsEach * tile.rows + tile.row;
  Mask mask(p.mask, first, p.L);
  const Vec<float, kWidth> gamma = load_gamma<kWidth>(p.gamma, tile);
#pragma unroll 2
  for (int i = 0; i < kRowsEach; ++i, mask.advance(tile.rows)) {
    const int64_t row = first + i * tile.rows, offset = row * p.C + tile.channel;
    const bool in = tile.in && row < rows;
    const Raw<kWidth> y_raw = load_raw<kWidth>(p.y, offset, in), shortcut_raw = load_raw<kWidth>(p.shortcut, offset, in);
    const float scale = mask.value(in);
    Vec<float, kWidth> out = to_float(y_raw, p.y.dtype);
    const Vec<float, kWidth> shortcut = to_float(shortcut_raw, p.shortcut.dtype);
#pragma unroll
    for (int c = 0; c < kWidth; ++c) out[c] = out[c] * gamma[c] * scale + shortcut[c];
    store_array<kWidth>(p.out, offset, out, in);
  }
}

// A block sums dgamma over one slice of the rows: each thread down its rows, then over the rows of threads, in order.
template <int kWidth>
__global__ void __launch_bounds__(kThreads) residual_scale_bwd_kernel(ResidualScaleBackwardParams p, unsigned across, int64_t slice_rows) {
  // Of each thread kPart channels, then the next of each: 16 bytes of neighbouring lanes are side by side. The gap puts what
  // a row's neighbouring channels read into different banks.
  constexpr int kPart = kWidth < 4 ? kWidth : 4, kPlane = kThreads * kPart + 16;
  FC_SHARED(float, sums, kWidth / kPart * kPlane);  // [kWidth / kPart][thread][kPart]
  const Tile tile = tile_of(p.C, kWidth, across);
  const int64_t slice = blockIdx.x / across, rows = p.N * p.L, begin = slice * slice_rows + tile.row;
  const int64_t end = (slice + 1) * slice_rows < rows ? (slice + 1) * slice_rows : rows;
  Mask mask(p.mask, begin, p.L);
  const Vec<float, kWidth> gamma = load_gamma<kWidth>(p.gamma, tile);
  Vec<float, kWidth> sum{};
#pragma unroll 2
  for (int64_t row = begin; row < end; row += tile.rows, mask.advance(tile.rows)) {
    const int64_t offset = row * p.C + tile.channel;
    const Raw<kWidth> dout_raw = load_raw<kWidth>(p.dout, offset, tile.in);
    const Raw<kWidth> y_raw = load_raw<kWidth>(p.y, offset, tile.in && p.partial);
    const float scale = mask.value(tile.in);
    Vec<float, kWidth> dy = to_float(dout_raw, p.dout.dtype);
    const Vec<float, kWidth> y = to_float(y_raw, p.y.dtype);
#pragma unroll
    for (int c = 0; c < kWidth; ++c) {
      dy[c] *= scale;
      sum[c] += dy[c] * y[c];
      dy[c] *= gamma[c];
    }
    if (p.dy.data) store_array<kWidth>(p.dy, offset, dy, tile.in);
  }
  if (!p.partial) return;
#pragma unroll
  for (int c = 0; c < kWidth; c += kPart) {
    Vec<float, kPart> part;
#pragma unroll
    for (int i = 0; i < kPart; ++i) part[i] = sum[c + i];
    store_shared(sums + c / kPart * kPlane + threadIdx.x * kPart, part);
  }
  sync_threads();
  const int columns = tile.lanes * kWidth;
  const int64_t channel0 = static_cast<int64_t>(blockIdx.x % across) * columns;
  for (int column = threadIdx.x; column < columns; column += kThreads) {
    const int lane = column / kWidth, c = column % kWidth;
    const float* const own = sums + c / kPart * kPlane + lane * kPart + c % kPart;
    float total = 0;
    for (int row = 0; row < tile.rows; ++row) total += load_shared<float>(own + row * tile.lanes * kPart);
    store_global(p.partial + slice * p.C + channel0 + column, total, channel0 + column < p.C);
  }
}

template <int kWidth> int launch_forward(const ResidualScaleForwardParams& p, Stream stream) {
  const unsigned across = tiles_across(p.C, kWidth);
  const int64_t tile_rows = std::max<int64_t>(1, kThreads / (p.C / kWidth)), blocks = across * ceil_div(p.N * p.L, tile_rows * kRowsEach);
  return launch(residual_scale_fwd_kernel<kWidth>, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0, stream, p, across);
}

template <int kWidth> int launch_backward(const ResidualScaleBackwardParams& p, Stream stream) {
  const unsigned across = tiles_across(p.C, kWidth);
  const int64_t rows = p.N * p.L, slices = residual_scale_slices(rows, p.C);
  const dim3 grid(static_cast<unsigned>(across * slices));
  return launch(residual_scale_bwd_kernel<kWidth>, grid, dim3(kThreads), 0, stream, p, across, ceil_div(rows, slices));
}

}  // namespace

int residual_scale_fwd_launch(const ResidualScaleForwardParams& p, Stream stream) {
  const int width = in_vectors(p.C, p.gamma) ? vector_width(p.C, p.shortcut, p.y, p.out) : 1;
  return width == 8 ? launch_forward<8>(p, stream) : width == 4 ? launch_forward<4>(p, stream) : launch_forward<1>(p, stream);
}

int residual_scale_bwd_launch(const ResidualScaleBackwardParams& p, Stream stream) {
  const int width = in_vectors(p.C, p.gamma) ? vector_width(p.C, p.dout, p.y, p.dy) : 1;
  const int error = width == 8 ? launch_backward<8>(p, stream) : width == 4 ? launch_backward<4>(p, stream) : launch_backward<1>(p, stream);
  if (error != 0 || !p.partial) return error;
  return reduce_partials_launch(p.partial, residual_scale_slices(p.N * p.L, p.C), p.C, p.C, p.dgamma, stream);
}

}  // namespace fastconv::cuda

// depthwise_conv on the GPU for any odd K: straight from global memory, where the caches serve what windows share.
#include "depthwise_conv_general_kernel.h"

#include "array.cuh"

namespace fastconv::cuda {
namespace {

constexpr int kChunk = kConvChunk, kOthers = 8;  // threads of a block: [pixel, or tap][channel]

__global__ void __launch_bounds__(kChunk * kOthers)
conv_general_kernel(ConvShape s, Array in, Array weight, Array bias, bool flip, Array more, MutableArray out, int chunks, int64_t tasks) {
  for (int64_t task = blockIdx.x; task < tasks; task += gridDim.x) {
    const int64_t pixel = task / chunks * kOthers + threadIdx.x / kChunk, c = task % chunks * kChunk + threadIdx.x % kChunk;
    if (pixel >= s.pixels() || c >= s.C) continue;
    const int64_t w = pixel % s.W, row = pixel / s.W, h = row % s.H, pad = s.pad(), taps = s.K * s.K;
    float sum = 0;
    for (int64_t kh = 0; kh < s.K; ++kh) {
      if (h + kh < pad || h + kh - pad >= s.H) continue;
      for (int64_t kw = 0; kw < s.K; ++kw) {
        if (w + kw < pad || w + kw - pad >= s.W) continue;
        const int64_t tap = kh * s.K + kw, from = pixel + (kh - pad) * s.W + kw - pad;
        sum = fmaf(load_array<1>(in, from * s.C + c)[0], load_array<1>(weight, c * taps + (flip ? taps - 1 - tap : tap))[0], sum);
      }
    }
    if (bias.data) sum += load_array<1>(bias, c)[0];
    if (more.data) sum += load_array<1>(more, pixel * s.C + c)[0];
    store_array<1>(out, pixel * s.C + c, {sum});
  }
}

// A thread sums one tap of one channel over the rows of a slice; tap K * K is dbias.
__global__ void __launch_bounds__(kChunk * kOthers)
conv_general_wgrad_kernel(ConvBackwardParams p, int chunks, int64_t slices, int64_t tasks) {
  const ConvShape& s = p.shape;
  const int64_t taps = s.K * s.K, pad = s.pad(), groups = tasks / (chunks * slices);
  for (int64_t task = blockIdx.x; task < tasks; task += gridDim.x) {
    const int64_t c = task % chunks * kChunk + threadIdx.x % kChunk, tap = task / chunks % groups * kOthers + threadIdx.x / kChunk;
    const int64_t slice = task / chunks / groups;
    if (tap > taps || c >= s.C) continue;
    const bool bias = tap == taps;
    // dweight[kh, kw] pairs x[h, w] with dy[h + down, w + right].
    const int64_t down = bias ? 0 : pad - tap / s.K, right = bias ? 0 : pad - tap % s.K;
    const int64_t begin = right < 0 ? -right : 0, end = right > 0 ? s.W - right : s.W;
    float sum = 0;
    const int64_t last = part_begin(s.N * s.H, slices, slice + 1);
    for (int64_t row = part_begin(s.N * s.H, slices, slice); row < last; ++row) {
      const int64_t h = row % s.H;
      if (h + down < 0 || h + down >= s.H) continue;
      for (int64_t w = begin; w < end; ++w) {
        const int64_t from = row * s.W + w;
        const float dy = load_array<1>(p.dy, (from + down * s.W + right) * s.C + c)[0];
        sum = bias ? sum + dy : fmaf(load_array<1>(p.x, from * s.C + c)[0], dy, sum);
      }
    }
    store_global(p.partial + slice * s.C * (taps + 1) + (bias ? s.C * taps + c : c * taps + tap), sum);
  }
}

dim3 grid_of(int64_t tasks) { return dim3(static_cast<unsigned>(std::min<int64_t>(tasks, 1 << 20))); }

}  // namespace

int conv_general_launch(const ConvShape& s, Array in, Array weight, Array bias, bool flip, Array more, MutableArray out, Stream stream) {
  const int64_t chunks = ceil_div(s.C, kChunk), tasks = chunks * ceil_div(s.pixels(), kOthers);
  return launch(conv_general_kernel, grid_of(tasks), dim3(kChunk * kOthers), 0, stream, s, in, weight, bias, flip, more, out,
                static_cast<int>(chunks), tasks);
}

int conv_general_wgrad_launch(const ConvBackwardParams& p, Stream stream) {
  const int64_t chunks = ceil_div(p.shape.C, kChunk), slices = conv_wgrad_slices(p.shape);
  const int64_t tasks = chunks * slices * ceil_div(p.shape.K * p.shape.K + 1, kOthers);
  return launch(conv_general_wgrad_kernel, grid_of(tasks), dim3(kChunk * kOthers), 0, stream, p, static_cast<int>(chunks), slices, tasks);
}

}  // namespace fastconv::cuda

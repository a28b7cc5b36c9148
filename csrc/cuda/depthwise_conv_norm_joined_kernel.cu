// depthwise_conv_norm on the GPU, forward in one launch: a block convolves a tile, some chunks of channels at a time, keeps
// z of all its channels in shared memory, and norms it there. z goes to memory only where backward will read it.
//
// z is rounded to its dtype before the norm, as it is where the norm reads it back: both forms have the same
// bits, unless the convolution apart runs on tensor cores.
#include "conv_tile.cuh"
#include "depthwise_conv_norm_kernel.h"
#include "norm_joined.cuh"

namespace fastconv::cuda {
namespace {

// Shared memory: the bias, [together] weights of a chunk, [together] tiles of x, later the norm's weights in their place; then z.
struct JoinedGrid {
  ConvGrid conv;
  NormGrid norm;
  int together;  // chunks at a time, each with threads of its own
  int width;     // channels of an access of the norm: 8 or 4
  int staged;    // bytes before z
  int z_pitch;   // bytes of a pixel of z: a multiple of 64
};

// z of a block's tile. Neighbouring pixels lie in different halves of the banks: where the pitch does not see to that, odd
// pixels have their blocks of 64 bytes swapped in pairs.
struct ZTile {
  unsigned char* data;
  DType dtype;
  int pitch;
  FC_DEVICE unsigned char* at(int pixel, int c) const {
    const int swap = pitch / 64 % 2 ? 0 : pixel % 2 * 64;
    return data + pixel * pitch + (c * element_size(dtype) ^ swap);
  }
  // A run of pixels from `pixel` on, kQuad channels from c on.
  FC_DEVICE void keep(int pixel, int c, const Quad (&acc)[kRun], bool in) const {
#pragma unroll
    for (int j = 0; j < kRun; ++j) {
      unsigned char* const to = at(pixel + j, c);
      if (dtype == DType::kBFloat16) store_shared(to, halves<bf16>(acc[j]), in);
      else if (dtype == DType::kHalf) store_shared(to, halves<fp16>(acc[j]), in);
      else store_shared(to, acc[j], in);
    }
  }
  template <int N> FC_DEVICE Vec<float, N> load(int pixel, int c, bool in) const {
    const unsigned char* const from = at(pixel, c);
    if constexpr (N == 4) {
      if (dtype == DType::kFloat) return load_shared<Quad>(from, in);
    }
    if (dtype == DType::kBFloat16) return to_float(load_shared<Vec<bf16, N>>(from, in));
    return to_float(load_shared<Vec<fp16, N>>(from, in));
  }
};

// Weights of `channels` channels from c0 on, each chunk as stage_weight has it. They come anew with every tile, for which
// lanes take four channels of eight taps: these lie in different banks.
template <int kTaps> FC_DEVICE void stage_weights(const Array& weight, int64_t C, int64_t c0, int channels, float* out) {
  const int left = C - c0 < channels ? static_cast<int>(C - c0) : channels;
  const auto channel = [](int i) { return i / (kQuad * kTaps) * kQuad + i % kQuad; };
  const auto tap = [](int i) { return i / kQuad % kTaps; };
  stage_floats<7>(
      weight, c0 * kTaps, channels * kTaps, [&](int i) { return channel(i) < left ? channel(i) * kTaps + tap(i) : -1; },
      [&](int i) { return out + (channel(i) / kChunk * kTaps + tap(i)) * kWeightPitch + channel(i) % kChunk; });
}

template <class T, int K>
__global__ void __launch_bounds__(kJoinedThreads, 1) conv_norm_joined_kernel(ConvNormForwardParams p, JoinedGrid g) {
  FC_DYNAMIC_SHARED(raw);
  constexpr int kPad = K / 2, kWeights = K * K * kWeightPitch;
  const ConvShape& s = p.conv.shape;
  const int pitch = odd(g.conv.columns() + 2 * kPad), tile = g.conv.images * (g.conv.rows + 2 * kPad) * pitch * kChunk;
  float* const bias = reinterpret_cast<float*>(raw);     // [chunks * kChunk]
  float* const weights = bias + g.conv.chunks * kChunk;  // [together][K * K][kWeightPitch]
  T* const tiles = reinterpret_cast<T*>(weights + g.together * kWeights);
  const ZTile z{raw + g.staged, p.conv.y.dtype, g.z_pitch};

  const int units = g.conv.units(), unit = threadIdx.x / kUnit, last = g.together - 1;
  const int mine = unit / units < last ? unit / units : last, c = mine * kChunk;  // this thread's chunk of those together
  const RunPlace run = run_of(g.conv, unit - mine * units);
  const int first_inside = (run.image * g.conv.rows + run.row) * g.conv.columns() + run.column;
  const TilePlace at = place_of(g.conv, blockIdx.x);
  const int64_t pixel = first_pixel(s, at, run);
  const int count = run_count(s, at, run);

  stage_floats<3>(
      p.conv.bias, 0, g.conv.chunks * kChunk, [&](int i) { return p.conv.bias.data && i < s.C ? i : -1; },
      [&](int i) { return bias + i; });
#pragma unroll 1
  for (int64_t c0 = 0; c0 < s.C; c0 += g.together * kChunk) {
    sync_threads();  // the chunks before have been read
#pragma unroll 1
    for (int other = 0; other < g.together && c0 + other * kChunk < s.C; ++other)
      stage_tile(p.conv.x, s, g.conv, at, kPad, pitch, c0 + other * kChunk, reinterpret_cast<unsigned char*>(tiles + other * tile));
    copy_async_commit();
    stage_weights<K * K>(p.conv.weight, s.C, c0, g.together * kChunk, weights);
    copy_async_wait<0>();
    sync_threads();
    const float* const weight = weights + mine * kWeights + run.quad;
    Quad acc[kRun] = {};
    conv_run<T, K>(tiles + mine * tile + run.corner(g.conv, kPad, pitch), pitch, weight, acc);
    const int64_t channel = c0 + c + run.quad;
    const Quad last = load_shared<Quad>(bias + channel, channel < s.C);  // now, so that a large bias rounds once
#pragma unroll
    for (int j = 0; j < kRun; ++j)
#pragma unroll
      for (int i = 0; i < kQuad; ++i) acc[j][i] += last[i];
    z.keep(first_inside, static_cast<int>(channel), acc, run.active && channel < s.C);
    if (p.conv.y.data) store_run(p.conv.y, pixel, s.C, channel, acc, count, true);
  }
  sync_threads();  // z is whole, and what was staged has been read
  const int columns = g.conv.columns(), pixels = g.conv.units() * kRun;
  const auto place = [&](int inside) {
    const int row = inside / columns, image = row / g.conv.rows;
    const int64_t n = at.n + image, h = at.h + row - image * g.conv.rows, w = at.w + inside - row * columns;
    return PixelPlace{(n * s.H + h) * s.W + w, n < s.N && h < s.H && w < s.W};
  };
  if (g.width == 8) norm_tile<8>(p, g.norm, pixels, z, bias, place);
  else norm_tile<4>(p, g.norm, pixels, z, bias, place);
}

template <class T, int K> int launch_joined(const ConvNormForwardParams& p, const JoinedPlan& plan, Stream stream) {
  const ConvShape& s = p.conv.shape;
  const bool wide = p.conv.y.dtype == DType::kFloat || p.y.dtype == DType::kFloat;
  const JoinedGrid g{conv_grid(s, plan.tiles, plan.tiles.count, true), wide ? norm_grid<4>(s, 1) : norm_grid<8>(s, 1),
                     static_cast<int>(plan.together), wide ? 4 : 8, static_cast<int>(plan.staged), static_cast<int>(plan.z_pitch)};
  const dim3 blocks(static_cast<unsigned>(plan.tiles.count)), threads(static_cast<unsigned>(plan.threads));
  return launch(conv_norm_joined_kernel<T, K>, blocks, threads, static_cast<size_t>(plan.shared), stream, p, g);
}

template <class T> int launch_joined(const ConvNormForwardParams& p, const JoinedPlan& plan, Stream stream) {
  switch (p.conv.shape.K) {
    case 3: return launch_joined<T, 3>(p, plan, stream);
    case 5: return launch_joined<T, 5>(p, plan, stream);
    default: return launch_joined<T, 7>(p, plan, stream);
  }
}

}  // namespace

int depthwise_conv_norm_joined_launch(const ConvNormForwardParams& p, const JoinedPlan& plan, Stream stream) {
  switch (p.conv.x.dtype) {
    case DType::kBFloat16: return launch_joined<bf16>(p, plan, stream);
    case DType::kHalf: return launch_joined<fp16>(p, plan, stream);
    default: return launch_joined<float>(p, plan, stream);
  }
}

}  // namespace fastconv::cuda

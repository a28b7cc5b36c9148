// depthwise_conv on the GPU, forward: a block stages a tile of x with its halo, a thread computes a run of outputs.
#include "depthwise_conv_kernel.h"

#include "conv_tile.cuh"
#include "depthwise_conv_general_kernel.h"
#include "depthwise_conv_mma_kernel.h"

namespace fastconv::cuda {
namespace {

template <class T, int K> __global__ void __launch_bounds__(448, 1) depthwise_conv_fwd_kernel(ConvForwardParams p, ConvGrid g) {
  FC_DYNAMIC_SHARED(raw);
  constexpr int kPad = K / 2;
  float* const weight = reinterpret_cast<float*>(raw);  // [K * K][kWeightPitch]
  float* const bias = weight + K * K * kWeightPitch;    // [kWeightPitch]
  unsigned char* const tile = reinterpret_cast<unsigned char*>(bias + kWeightPitch);
  const ConvShape& s = p.shape;
  const int pitch = odd(g.columns() + 2 * kPad);
  const int64_t slice = blockIdx.x / g.chunks, c0 = static_cast<int64_t>(blockIdx.x % g.chunks) * kChunk;
  const RunPlace run = run_of(g);

  stage_weight(p.weight, s.C, c0, K * K, false, weight);
  for (int c = threadIdx.x; c < kChunk; c += blockDim.x)
    store_shared(bias + c, load_array<1>(p.bias, c0 + c, p.bias.data && c0 + c < s.C)[0]);
  const int64_t end = part_begin(g.tiles, g.slices, slice + 1);
  for (int64_t t = part_begin(g.tiles, g.slices, slice); t < end; ++t) {
    const TilePlace at = place_of(g, t);
    sync_threads();  // the tile before has been read
    stage_tile(p.x, s, g, at, kPad, pitch, c0, tile);
    copy_async_commit();
    copy_async_wait<0>();
    sync_threads();
    Quad acc[kRun] = {};
    conv_run<T, K>(reinterpret_cast<const T*>(tile) + run.corner(g, kPad, pitch), pitch, weight + run.quad, acc);
    const Quad last = load_shared<Quad>(bias + run.quad);  // now, so that a large bias rounds once
#pragma unroll
    for (int j = 0; j < kRun; ++j)
#pragma unroll
      for (int i = 0; i < kQuad; ++i) acc[j][i] += last[i];
    store_run(p.y, first_pixel(s, at, run), s.C, c0 + run.quad, acc, run_count(s, at, run), g.wide);
  }
}

template <class T, int K> int launch_forward(const ConvForwardParams& p, Stream stream) {
  constexpr int64_t kBlocks = 1 << 14;  // enough to fill any GPU; more tiles share a block's weights
  const ConvTiles tiles = conv_forward_tiles(p.shape, sizeof(T));
  const int64_t chunks = ceil_div(p.shape.C, kChunk), slices = std::min(tiles.count, std::max<int64_t>(1, kBlocks / chunks));
  const ConvGrid g = conv_grid(p.shape, tiles, slices, in_vectors(p.shape.C, p.x, p.y));
  const size_t tile = g.images * (g.rows + K - 1) * odd(g.columns() + K - 1) * kChunk * sizeof(T);
  const size_t shared = (K * K + 1) * kWeightPitch * sizeof(float) + tile;
  return launch(depthwise_conv_fwd_kernel<T, K>, dim3(static_cast<unsigned>(slices * chunks)), dim3(g.threads()), shared, stream, p, g);
}

template <class T> int launch_forward(const ConvForwardParams& p, Stream stream) {
  switch (p.shape.K) {
    case 3: return launch_forward<T, 3>(p, stream);
    case 5: return launch_forward<T, 5>(p, stream);
    case 7: return launch_forward<T, 7>(p, stream);
    default: return conv_general_launch(p.shape, p.x, p.weight, p.bias, false, {}, p.y, stream);
  }
}

}  // namespace

int depthwise_conv_fwd_launch(const ConvForwardParams& p, Stream stream) {
  if (conv_mma_chosen(p)) return conv_mma_fwd_launch(p, stream);
  switch (p.x.dtype) {
    case DType::kBFloat16: return launch_forward<bf16>(p, stream);
    case DType::kHalf: return launch_forward<fp16>(p, stream);
    default: return launch_forward<float>(p, stream);
  }
}

}  // namespace fastconv::cuda

// depthwise_conv on tensor cores, forward: a block stages a tile of 16 channels in planes, a warp takes two of them.
#include "depthwise_conv_mma_kernel.h"

#include "conv_mma.cuh"

namespace fastconv::cuda {
namespace {

template <class T, int K> __global__ void __launch_bounds__(kMmaThreads, 2) depthwise_conv_mma_fwd_kernel(ConvForwardParams p, MmaGrid g) {
  FC_DYNAMIC_SHARED(raw);
  int* const windows = reinterpret_cast<int*>(raw);
  uint32_t* const pairs = reinterpret_cast<uint32_t*>(raw + kMmaWindows);
  unsigned char* const planes = raw + kMmaWindows + kMmaChannels * K * kMmaPairs * 4;
  const ConvShape& s = p.shape;
  const ConvMmaTiles& t = g.tiles;
  const int64_t slice = blockIdx.x / g.chunks, c0 = static_cast<int64_t>(blockIdx.x % g.chunks) * kMmaChannels;
  const int c = threadIdx.x / kWarp * kMmaOwn;

  stage_pairs<T, K>(p.weight, s.C, c0, false, pairs);
  sync_threads();
  uint32_t band[kMmaOwn][K][2];
  float bias[kMmaOwn];
#pragma unroll
  for (int i = 0; i < kMmaOwn; ++i) {
    load_bands<K>(pairs, c + i, band[i]);
    bias[i] = load_array<1>(p.bias, c0 + c + i, p.bias.data && c0 + c + i < s.C)[0];
  }
  const int64_t end = part_begin(t.count, g.slices, slice + 1);
  for (int64_t tile = part_begin(t.count, g.slices, slice); tile < end; ++tile) {
    const MmaPlace at = place_of(s, t, tile);
    sync_threads();  // the tile before has been stored
    stage_windows<kMmaRows>(t, at, windows);
    stage_window<T, K, kMmaRows, 2>(p.x, s, g, at, c0, planes);
    sync_threads();
#pragma unroll
    for (int i = 0; i < kMmaOwn; ++i)
      conv_plane<T, K, kMmaRows>(s, t, at, windows, planes + plane_byte(c + i, t.plane * 16), band[i], p.weight, c0 + c + i, false, bias[i]);
    sync_threads();
    g.wide ? store_centre<T, true>(p.y, {}, s, g, at, c0, planes) : store_centre<T, false>(p.y, {}, s, g, at, c0, planes);
  }
}

template <class T, int K> int launch_forward(const ConvForwardParams& p, Stream stream) {
  constexpr int64_t kBlocks = 1 << 10;  // enough to fill any GPU; more tiles share a block's filters
  const ConvMmaTiles tiles = conv_mma_tiles(p.shape);
  const int64_t slices = std::min(tiles.count, std::max<int64_t>(1, kBlocks / ceil_div(p.shape.C, kMmaChannels)));
  const MmaGrid g = mma_grid(p.shape, tiles, slices, in_vectors(p.shape.C, p.x, p.y));
  const dim3 grid(static_cast<unsigned>(g.slices * g.chunks));
  return launch(depthwise_conv_mma_fwd_kernel<T, K>, grid, dim3(kMmaThreads), conv_mma_shared(tiles, K, false), stream, p, g);
}

}  // namespace

bool conv_mma_chosen(const ConvForwardParams& p) {
  if (!conv_mma_serves(p.shape.K, p.x.dtype, p.y.dtype, p.weight.dtype)) return false;
  const ConvMmaTiles tiles = conv_mma_tiles(p.shape);
  return conv_mma_pays(p.shape, tiles) && conv_mma_shared(tiles, p.shape.K, false) <= shared_memory_limit();
}

int conv_mma_fwd_launch(const ConvForwardParams& p, Stream stream) {
  if (p.x.dtype == DType::kBFloat16) return p.shape.K == 7 ? launch_forward<bf16, 7>(p, stream) : launch_forward<bf16, 5>(p, stream);
  return p.shape.K == 7 ? launch_forward<fp16, 7>(p, stream) : launch_forward<fp16, 5>(p, stream);
}

}  // namespace fastconv::cuda

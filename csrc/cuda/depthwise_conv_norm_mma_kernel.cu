// depthwise_conv_norm on tensor cores, forward in one launch: a block convolves a tile in all channels, each group of its threads
// sixteen of them at a time, keeps z in shared memory, and norms it there. z goes to memory only where backward will read it.
#include "conv_mma.cuh"
#include "norm_joined.cuh"

namespace fastconv::cuda {
namespace {

constexpr int kRows = kMmaJoinedRows, kTaps = kMmaJoinedTaps, kPixels = kMmaStrips * kRows * kMmaColumns;

struct JoinedMmaGrid {
  MmaGrid conv;
  NormGrid norm;
  int groups, width;      // width: channels of an access of the norm, 8 or 4
  int group, z, z_pitch;  // bytes, as in the plan
};

// z of a block's tile, [strip][row][column] of C channels. Pairs of pixels differ in the order of their blocks of 32 bytes, and
// where the pitch does not see to it neighbours in the order of their halves of 128: so neither lanes with pairs of columns,
// which write, nor lanes with neighbouring channels and pixels, which read, meet in a bank.
template <class T> struct ZTile {
  unsigned char* data;
  int pitch;
  FC_DEVICE unsigned char* at(int pixel, int c) const {
    const int twist = (pixel / 2 % 4 * 32) ^ (pitch / 64 % 2 ? 0 : pixel % 2 * 64);
    return data + ((pixel * pitch + 2 * c) ^ twist);
  }
  template <int N> FC_DEVICE Vec<float, N> load(int pixel, int c, bool in) const { return to_float(load_shared<Vec<T, N>>(at(pixel, c), in)); }
};

// Where strip m lies: image after the tile's first, row, column; no image has the number of a strip that is not used.
FC_DEVICE void stage_places(const ConvMmaTiles& t, const MmaPlace& at, int* places) {
  const int m = threadIdx.x;
  if (m >= kMmaStrips) return;
  const Strip strip = strip_of(t, m);
  const StripPlace place = strip_place<kRows>(t, at, strip);
  store_shared(places + 4 * m, Vec<int, 4>{strip.used ? place.image : 1 << 20, place.h, place.w, 0});
}

// Outputs in the planes of channels from c0 on, to z, and to memory where it is wanted: a warp moves the rows of a strip at a time.
template <class T>
FC_DEVICE void keep_centre(const MutableArray& a, const ConvShape& s, const MmaGrid& g, const MmaPlace& at, const int* places, int64_t c0,
                           const unsigned char* planes, const ZTile<T>& z) {
  const int lane = threadIdx.x % kWarp, half = lane % 2, pair = lane / 2 % 4, row = lane / 8, plane = g.tiles.plane * 16;
  const int channels = channels_left(s, c0 + 8 * half);
#pragma unroll 1
  for (int m = mma_thread() / kWarp; m < kMmaStrips; m += kMmaWarps) {
    const auto place = load_shared<Vec<int, 4>>(places + 4 * m);
    const bool in = row < kRows && place[0] < at.images && channels > 0;
    Eight left, right;
    load_pair(planes + plane_byte(8 * half, plane) + (m * kRows + row) * 16 + 4 * pair, plane, left, right, in);
    const int inside = (m * kRows + row) * kMmaColumns + 2 * pair, h = place[1] + row, w = place[2] + 2 * pair;
    store_shared(z.at(inside, static_cast<int>(c0) + 8 * half), left, in);
    store_shared(z.at(inside + 1, static_cast<int>(c0) + 8 * half), right, in);
    if (!a.data) continue;
    uint16_t* const to = static_cast<uint16_t*>(a.data) + element_of(s, g, at, place[0], h, w) + c0 + 8 * half;
    store_eight<true>(to, channels, left, in && h < g.H && w < g.W);
    store_eight<true>(to + s.C, channels, right, in && h < g.H && w + 1 < g.W);
  }
}

template <class T, class Source>
__global__ void __launch_bounds__(2 * kMmaThreads, 1) depthwise_conv_norm_mma_fwd_kernel(ConvNormForwardParams p, JoinedMmaGrid g) {
  FC_DYNAMIC_SHARED(raw);
  constexpr int K = kTaps;
  int* const windows = reinterpret_cast<int*>(raw);
  int* const places = windows + kMmaWindows / 4;
  const int group = threadIdx.x / kMmaThreads, c = mma_thread() / kWarp * kMmaOwn;
  unsigned char* const mine = raw + kMmaHeader + group * g.group;
  uint32_t* const pairs = reinterpret_cast<uint32_t*>(mine);
  unsigned char* const planes = mine + kMmaChannels * K * kMmaPairs * 4;
  const ConvShape& s = p.conv.shape;
  const ConvMmaTiles& t = g.conv.tiles;
  const ZTile<T> z{raw + g.z, g.z_pitch};
  const MmaPlace at = place_of(s, t, blockIdx.x);
  if (group == 0) stage_windows<kRows>(t, at, windows);
  stage_places(t, at, places);
#pragma unroll 1
  for (int first = 0; first < g.conv.chunks; first += g.groups) {
    const int64_t c0 = static_cast<int64_t>(first + group) * kMmaChannels;  // from C on: there is nothing to load or to keep
    sync_threads();  // the channels before are in z
    stage_window<T, Source, K, kRows, sizeof(Source) == 4 ? 1 : 2, true>(p.conv.x, s, g.conv, at, c0, planes);
    stage_pairs<T, K>(p.conv.weight, s.C, c0, false, pairs);
    sync_threads();
#pragma unroll
    for (int i = 0; i < kMmaOwn; ++i) {
      uint32_t band[K][2];
      load_bands<K>(pairs, c + i, band);
      const float bias = load_array<1>(p.conv.bias, c0 + c + i, p.conv.bias.data && c0 + c + i < s.C)[0];
      conv_plane<T, K, kRows>(s, t, at, windows, planes + plane_byte(c + i, t.plane * 16), band, p.conv.weight, c0 + c + i, false, bias);
    }
    sync_threads();
    keep_centre<T>(p.conv.y, s, g.conv, at, places, c0, planes, z);
  }
  // The norm's weights lie over the pairs, which have been read; behind the barrier that they wait for z is whole.
  static_assert(2 * kSegment<8> * sizeof(float) <= kMmaChannels * K * kMmaPairs * 4 && kSegment<4> <= kSegment<8>);
  const auto place = [&](int inside) {
    const int m = inside / (kRows * kMmaColumns), rest = inside - m * kRows * kMmaColumns;
    const auto strip = load_shared<Vec<int, 4>>(places + 4 * m);
    const int h = strip[1] + rest / kMmaColumns, w = strip[2] + rest % kMmaColumns;
    return PixelPlace{((at.n + strip[0]) * g.conv.H + h) * g.conv.W + w, strip[0] < at.images && h < g.conv.H && w < g.conv.W};
  };
  float* const segments = reinterpret_cast<float*>(raw + kMmaHeader);
  if (g.width == 8) norm_tile<8>(p, g.norm, kPixels, z, segments, place);
  else norm_tile<4>(p, g.norm, kPixels, z, segments, place);
}

template <class T, class Source> int launch_forward(const ConvNormForwardParams& p, const JoinedMmaPlan& plan, Stream stream) {
  const ConvShape& s = p.conv.shape;
  const bool wide = p.y.dtype == DType::kFloat;
  const JoinedMmaGrid g{mma_grid(s, plan.tiles, plan.tiles.count, true), wide ? norm_grid<4>(s, 1) : norm_grid<8>(s, 1), plan.groups, wide ? 4 : 8,
                        static_cast<int>(plan.group), static_cast<int>(plan.z), static_cast<int>(plan.z_pitch)};
  const dim3 blocks(static_cast<unsigned>(plan.tiles.count)), threads(static_cast<unsigned>(plan.groups * kMmaThreads));
  return launch(depthwise_conv_norm_mma_fwd_kernel<T, Source>, blocks, threads, static_cast<size_t>(plan.shared), stream, p, g);
}

}  // namespace

int depthwise_conv_norm_mma_launch(const ConvNormForwardParams& p, const JoinedMmaPlan& plan, Stream stream) {
  const bool wide = p.conv.x.dtype == DType::kFloat;
  if (p.conv.y.dtype == DType::kBFloat16) return wide ? launch_forward<bf16, float>(p, plan, stream) : launch_forward<bf16, uint16_t>(p, plan, stream);
  return wide ? launch_forward<fp16, float>(p, plan, stream) : launch_forward<fp16, uint16_t>(p, plan, stream);
}

}  // namespace fastconv::cuda

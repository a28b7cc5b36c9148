// Sizes, work splits, byte and FLOP counts of the ops: host arithmetic that kernels, tests and benchmarks share. No torch.
#pragma once

#include <algorithm>
#include <cstdint>

namespace fastconv {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// One call of a depthwise convolution: N images of H x W pixels and C channels, K x K taps, "same" padding.
struct ConvShape {
  int64_t N, H, W, C, K;
  constexpr int64_t pad() const { return K / 2; }
  constexpr int64_t pixels() const { return N * H * W; }
  constexpr int64_t elements() const { return pixels() * C; }
};

// A band is a run of whole rows of one image: the unit of work. Its rows are staged with a halo of pad() rows above and
// below, so taller bands stage less twice and shorter ones share better between threads.
struct Bands {
  int64_t rows;       // of a band; the last of an image may have fewer
  int64_t per_image;  // bands in an image
  int64_t count;      // bands in all
};

constexpr Bands split_bands(int64_t N, int64_t H, int64_t rows) {
  rows = std::max<int64_t>(1, std::min(rows, H));
  const int64_t per_image = H > 0 ? ceil_div(H, rows) : 0;
  return {rows, per_image, N * per_image};
}

// Forward: no sum crosses a pixel, so the split may follow the number of threads and the bits stay the same.
// With the norm a band's convolution output stays in the L2 cache: 256 KiB of float32.
constexpr Bands forward_bands(const ConvShape& s, int64_t threads) {
  const int64_t cached = (int64_t{64} << 10) / std::max<int64_t>(1, s.W * s.C);
  const int64_t wanted = ceil_div(4 * threads, std::max<int64_t>(1, s.N));  // bands an image that keep all threads busy
  return split_bands(s.N, s.H, std::min(std::max<int64_t>(cached, 4), ceil_div(s.H, wanted)));
}

// Backward: dweight sums over bands, so the split, and with it the order of every sum, follows the shape alone.
struct BackwardPlan {
  Bands bands;
  int64_t slices;  // runs of consecutive bands, one partial dweight each
  int64_t groups;  // of channel blocks: the second dimension of the grid of tasks
};

// With the norm every group sums over the channels of its slice again: fewer groups.
constexpr BackwardPlan backward_plan(const ConvShape& s, int64_t channel_blocks, bool norm) {
  constexpr int64_t kRows = 14, kSlices = 64;
  const int64_t kTasks = norm ? 8 : 64;
  const Bands bands = split_bands(s.N, s.H, kRows);
  // A partial is as large as K * K pixels: at least twice as many share one, unless that leaves fewer than four slices.
  const int64_t worthwhile = std::max<int64_t>(4, s.pixels() / (2 * s.K * s.K));
  const int64_t slices = std::max<int64_t>(1, std::min({bands.count, kSlices, worthwhile}));
  const int64_t groups = std::max<int64_t>(1, std::min(channel_blocks, ceil_div(kTasks, slices)));
  return {bands, slices, groups};
}

// Sums over pixels (dnorm_weight, dgamma): at most 64 partials, each over a run of consecutive pixels.
constexpr int64_t pixel_slices(int64_t pixels) { return std::max<int64_t>(1, std::min<int64_t>(64, ceil_div(pixels, 64))); }

// First item of part `i` when `count` items are split into `parts` runs as even as possible.
constexpr int64_t part_begin(int64_t count, int64_t parts, int64_t i) { return count / parts * i + std::min(i, count % parts); }

// --- CUDA. The splits follow the shape alone; which kernel runs follows the GPU's shared memory too. So every GPU gives the same
// bits in each run, and all of one kind the same.

// A block works on kConvChunk channels, a thread on a run of kConvRun outputs along W.
constexpr int64_t kConvChunk = 32, kConvRun = 7;
constexpr int64_t kConvWeightPitch = kConvChunk + 4;  // floats of a tap's weights in shared memory

// Tiles of rows x columns outputs, whole runs wide, as even as they come. Of small maps a tile holds those of several
// images, so that a block has enough threads.
struct ConvTiles {
  int64_t images, rows, columns;  // of a tile; the last ones may reach past the map, or past the last image
  int64_t down, across;           // tiles of an image, or of `images` of them
  int64_t count;                  // tiles in all
  constexpr int64_t runs() const { return columns / kConvRun; }  // of a row
};

constexpr ConvTiles conv_tiles(const ConvShape& s, int64_t max_rows, int64_t max_runs, int64_t together = 28) {
  if (s.pixels() == 0) return {};
  constexpr int64_t kStaged = 700;  // of a tile of several images: pixels in shared memory; `together`: runs
  const int64_t runs_of_map = ceil_div(s.W, kConvRun), across = ceil_div(runs_of_map, max_runs), down = ceil_div(s.H, max_rows);
  const int64_t rows = ceil_div(s.H, down), runs = ceil_div(runs_of_map, across), columns = runs * kConvRun;
  const int64_t staged = (rows + s.K - 1) * ((columns + s.K - 1) | 1) + rows * (columns | 1);  // an odd number to a row
  const int64_t images = down * across > 1 ? 1 : std::max<int64_t>(1, std::min({s.N, together / (rows * runs), kStaged / staged}));
  return {images, rows, columns, down, across, ceil_div(s.N, images) * down * across};
}
// A large tile reads less halo, and where elements are narrow it still fits beside others in shared memory. Backward has
// two to hold, of x and of dy.
constexpr ConvTiles conv_forward_tiles(const ConvShape& s, int64_t size) { return size == 2 ? conv_tiles(s, 14, 4) : conv_tiles(s, 20, 2); }
constexpr ConvTiles conv_backward_tiles(const ConvShape& s) { return conv_tiles(s, 14, 2); }

// What a plan asks of the GPU: bytes of shared memory that a block may have, multiprocessors, and the most blocks of a cluster.
struct Gpu {
  int64_t shared, multiprocessors, cluster = 1;
};

// Forward with the norm in one launch: a block owns all channels of a tile, whose convolution output waits in shared memory
// for the norm, so that z is written only for backward and never read. It takes `together` chunks at a time, each with its
// weights and its tile of x. The bits are those of the convolution and the norm apart, so that the plan may follow the GPU.
struct JoinedPlan {
  ConvTiles tiles;                    // count 0: nothing fits or pays, and the norm runs apart
  int64_t together, threads;
  int64_t staged, z_pitch, shared;    // bytes: of the bias, weights and tiles of x; of a pixel of z; in all
};
constexpr int64_t kJoinedThreads = 448, kJoinedChannels = 1024;  // at most; channels: a warp's registers hold no more

constexpr JoinedPlan conv_norm_plan(const ConvShape& s, int64_t x_size, int64_t z_size, const Gpu& gpu) {
  constexpr int64_t kReserved = 1 << 10, kNorm = 2 * kJoinedChannels * 4;  // bytes: of each block, for the system; the norm's weights
  constexpr int64_t kResident = 512, kFewest = 112;                         // threads of a multiprocessor: at 128 registers; that pay
  JoinedPlan best{};
  if (s.pixels() == 0 || s.C % 8 != 0 || s.C > kJoinedChannels || (s.K != 3 && s.K != 5 && s.K != 7)) return best;
  const int64_t chunks = ceil_div(s.C, kConvChunk), z_pitch = round_up(s.C * z_size, 64);
  int64_t most = kFewest - 1;
  for (const int64_t max_rows : {14, 7, 4}) {  // the largest tile of those that keep as many threads busy
    const ConvTiles t = conv_tiles(s, max_rows, 2, 7);
    // More than 2.2 reads of x would cost more than z takes to come back. Few blocks would leave the GPU idle, which the
    // convolution apart has one for each chunk to fill.
    const int64_t reads = (s.H + (t.down - 1) * (s.K - 1)) * (s.W + (t.across - 1) * (s.K - 1));
    if (5 * reads > 11 * s.H * s.W || 2 * t.count < gpu.multiprocessors) continue;
    const int64_t units = t.images * t.rows * t.runs();
    const int64_t tile = t.images * (t.rows + s.K - 1) * ((t.columns + s.K - 1) | 1) * kConvChunk * x_size;
    const int64_t chunk = s.K * s.K * kConvWeightPitch * 4 + tile, bias = chunks * kConvChunk * 4;
    for (int64_t together = 1; together <= chunks && together * units * 8 <= kJoinedThreads; ++together) {
      const int64_t threads = round_up(together * units * 8, 32), staged = std::max(bias + together * chunk, kNorm);
      const int64_t shared = staged + units * kConvRun * z_pitch;
      if (shared > gpu.shared) break;
      const int64_t blocks = std::min((gpu.shared + kReserved) / (shared + kReserved), kResident / threads);
      const int64_t busy = blocks * units * 8 * chunks / ceil_div(chunks, together);  // threads of a multiprocessor, on average
      if (busy <= most) continue;
      most = busy;
      best = {t, together, threads, staged, z_pitch, shared};
    }
  }
  return best;
}

// Runs of consecutive tiles, or for a general K of rows, with one partial dweight and dbias each. A float32 partial is
// written and read, 8 (K * K + 1) bytes a channel: about 5% of backward's 6 bytes a pixel in bfloat16. Blocks come in whole
// waves of one to each of an H200's multiprocessors: the last of a broken one would run alone.
constexpr int64_t conv_wgrad_slices(const ConvShape& s) {
  constexpr int64_t kBlocks = 132, kWaves = 7, kFew = 4;
  const int64_t chunks = std::max<int64_t>(1, ceil_div(s.C, kConvChunk));
  const int64_t worthwhile = std::max(kFew, ceil_div(s.pixels(), 27 * (s.K * s.K + 1))), waves = worthwhile * chunks / kBlocks;
  const int64_t slices = waves == 0 ? worthwhile : std::max(kFew, std::min(waves, kWaves) * kBlocks / chunks);
  return std::max<int64_t>(1, std::min(conv_backward_tiles(s).count, slices));
}
constexpr int64_t conv_wgrad_floats(const ConvShape& s) { return conv_wgrad_slices(s) * s.C * (s.K * s.K + 1); }

// Runs of consecutive pixels with one partial dnorm_weight and dnorm_bias each.
constexpr int64_t norm_bwd_slices(const ConvShape& s) {
  constexpr int64_t kBlocks = 512, kFew = 24;
  return std::max<int64_t>(1, std::min(std::max(kFew, std::min(kBlocks, s.pixels() / 256)), ceil_div(s.pixels(), 32)));
}
constexpr int64_t norm_bwd_floats(const ConvShape& s) { return norm_bwd_slices(s) * 2 * s.C; }

// Runs of pixels with one partial sum each in every image of a global_response_norm in two passes. By the image alone: what
// becomes of one does not depend on those beside it.
constexpr int64_t response_slices(int64_t L) { return std::max<int64_t>(1, std::min<int64_t>(64, ceil_div(L, 96))); }

// In one pass: the blocks of a cluster hold an image in shared memory, a run of pixels each, between the sums over it and what
// these are for. Two blocks to a multiprocessor read while the other computes or writes; where but one fits, it has twice the
// threads. By counters and arithmetic, not yet measured on a GPU.
struct ResidentPlan {
  int64_t blocks, threads, shared;  // of an image, 0: it does not fit; of a block; bytes of a block
  int64_t half;                     // floats to the second half of a row of coefficients, see global_response_norm.cuh
};
constexpr int64_t kResponseGap = 16;  // floats between planes that neighbouring lanes store to and read from
constexpr int64_t response_scratch_floats(int64_t width, int64_t threads) { return width * threads + ceil_div(width, 4) * kResponseGap; }

// Images of L pixels and C channels in accesses of `width`; `size`: bytes kept of an element; `sums`: over each channel.
constexpr ResidentPlan response_plan(int64_t L, int64_t C, int64_t width, int64_t size, int64_t sums, const Gpu& gpu) {
  constexpr int64_t kReserved = 1 << 10, kThreads = 256;  // bytes of each block, for the system
  constexpr int64_t kPortable = 8;                         // blocks of a cluster that every GPU with clusters takes
  ResidentPlan best{};
  if (width == 1) return best;
  for (int64_t blocks = 1; blocks <= gpu.cluster; blocks *= 2) {
    const int64_t half = round_up(C / 2, 32) + kResponseGap;
    const auto shared = [&](int64_t threads) {
      return round_up(ceil_div(L, blocks) * C * size, 16) + 4 * (sums * (C + 2 * half) + response_scratch_floats(width, threads));
    };
    if (best.blocks == 0 && shared(2 * kThreads) <= gpu.shared) best = {blocks, 2 * kThreads, shared(2 * kThreads), half};
    if (blocks <= kPortable && 2 * shared(kThreads) + kReserved <= gpu.shared) return {blocks, kThreads, shared(kThreads), half};
  }
  return best;
}

// One call of a grouped convolution: N maps of H x W pixels and C channels in `groups`, to as many channels.
struct GroupedConvShape {
  int64_t N, H, W, C, K, stride, pad_h, pad_w, groups;
  constexpr int64_t width() const { return C / groups; }  // channels of a group
  constexpr int64_t out_H() const { return (H + 2 * pad_h - K) / stride + 1; }
  constexpr int64_t out_W() const { return (W + 2 * pad_w - K) / stride + 1; }
  constexpr int64_t weights() const { return C * width() * K * K; }
  // With a stride of 1 dx is this convolution of dy, with the filters turned over, inputs and outputs exchanged.
  constexpr GroupedConvShape transposed() const { return {N, out_H(), out_W(), C, K, 1, K - 1 - pad_h, K - 1 - pad_w, groups}; }
};

// Channels of a block on tensor cores: `units` runs of `unit` channels that share no filter with others, each padded to `parts`
// times 8. Groups of 2 and 4 are packed, 8 channels to a unit.
struct GroupedChannels {
  int64_t unit, parts, units;
  constexpr int64_t count() const { return unit * units; }
  constexpr int64_t parts_of_block() const { return parts * units; }  // and its warps
};
constexpr GroupedChannels grouped_channels(int64_t width) {
  const int64_t unit = width < 8 && 8 % width == 0 ? 8 : width, parts = ceil_div(unit, 8);
  return {unit, parts, 8 / parts};
}

// Tiles of a grouped convolution: `rows` of outputs, two strips of 8 columns, which lie side by side, or in two images where
// the maps are no wider than one. dx of a stride of 2 counts in pairs of rows and of columns.
struct GroupedTiles {
  int64_t rows, images, down, across, count;
};
constexpr GroupedTiles grouped_tiles(const GroupedConvShape& s, bool dx) {
  const int64_t H = dx ? ceil_div(s.H, 2) : s.out_H(), W = dx ? ceil_div(s.W, 2) : s.out_W();
  const int64_t down = ceil_div(H, s.stride == 1 ? 14 : 7), across = ceil_div(W, 16), images = W <= 8 ? 2 : 1;
  return {ceil_div(H, down), images, down, across, ceil_div(s.N, images) * down * across};
}

// Blocks come in one wave of as many as an H200's multiprocessors hold: each reads its filters once. A block has a run of
// consecutive tiles and of channels.
constexpr int64_t grouped_blocks(const GroupedChannels& c) { return 132 * (c.parts == 4 ? 2 : 3); }
constexpr int64_t grouped_slices(const GroupedConvShape& s, bool dx) {
  const GroupedChannels c = grouped_channels(s.width());
  return std::min(grouped_tiles(s, dx).count, std::max<int64_t>(1, grouped_blocks(c) / ceil_div(s.C, c.count())));
}

// Runs of tiles with one partial dweight and dbias each: at most 5% of the bytes of x and dy, unless that leaves few blocks.
constexpr int64_t grouped_wgrad_slices(const GroupedConvShape& s) {
  constexpr int64_t kFew = 16;
  const int64_t chunks = ceil_div(s.C, grouped_channels(s.width()).count());
  const int64_t worthwhile = s.N * s.out_H() * s.out_W() / (40 * (s.width() * s.K * s.K + 1));
  return std::max<int64_t>(1, std::min(grouped_slices(s, false), std::max(worthwhile, std::min(kFew, ceil_div(132, chunks)))));
}
constexpr int64_t grouped_wgrad_floats(const GroupedConvShape& s) { return grouped_wgrad_slices(s) * (s.weights() + s.C); }

// Whether the tensor cores' kernels can run a grouped convolution, all passes. Maps are (N, H, W, C) in bfloat16 or float16.
// Offsets inside of a tile's images and of the filters are counted in 32 bits.
constexpr bool grouped_serves(const GroupedConvShape& s) {
  const int64_t largest = std::max(s.H, s.out_H()) * std::max(s.W, s.out_W());
  return s.K == 3 && (s.stride == 1 || s.stride == 2) && s.width() >= 2 && s.width() <= 32 && largest < (1 << 29) / s.C && s.C < 1 << 20;
}

// The choice between these kernels and cuDNN's, in either layout, for every GPU from sm_80 on. By counters and arithmetic
// (csrc/cuda/README.md), unmeasured: ours move their bytes and little else, where cuDNN's grouped kernels in channels_last are
// known to be several times slower.
//
//   channels a group    dtype, layout                          kernel                decided
//   2 to 24, even       bfloat16, float16, channels_last       ours                  by counters
//   26 to 32            the same                               cuDNN NHWC            by arithmetic: bound by tensor cores and shared memory
//   others              any other                              cuDNN, as it comes    ours do not serve it
//
// Below 2^20 elements a launch takes longer than the kernel.
constexpr bool grouped_pays(const GroupedConvShape& s) {
  return grouped_serves(s) && s.width() <= 24 && s.width() % 2 == 0 && s.N * s.out_H() * s.out_W() * s.C >= 1 << 20;
}

// Floating-point operations: a multiply-add counts as two. The norm: 8 an element forward, 14 backward.
constexpr int64_t conv_flops(const ConvShape& s) { return 2 * s.elements() * s.K * s.K; }
constexpr int64_t conv_norm_flops(const ConvShape& s) { return conv_flops(s) + 8 * s.elements(); }
constexpr int64_t conv_norm_bwd_flops(const ConvShape& s) { return 2 * conv_flops(s) + 14 * s.elements(); }

// Fewest bytes through memory, each input read once and each output written once, for `size` bytes an activation
// element; parameters, statistics and partials (a few percent) are left out.
constexpr int64_t conv_bytes(const ConvShape& s, int64_t size) { return 2 * s.elements() * size; }
constexpr int64_t conv_bwd_bytes(const ConvShape& s, int64_t size) { return 3 * s.elements() * size; }
constexpr int64_t conv_norm_bytes(const ConvShape& s, int64_t size, bool save) { return (save ? 3 : 2) * s.elements() * size; }
constexpr int64_t conv_norm_bwd_bytes(const ConvShape& s, int64_t size) { return 6 * s.elements() * size; }
constexpr int64_t global_response_norm_bytes(int64_t elements, int64_t size) { return 2 * elements * size; }
constexpr int64_t global_response_norm_bwd_bytes(int64_t elements, int64_t size) { return 3 * elements * size; }
constexpr int64_t squeeze_excite_bytes(int64_t elements, int64_t size) { return 2 * elements * size; }
constexpr int64_t squeeze_excite_bwd_bytes(int64_t elements, int64_t size) { return 3 * elements * size; }
constexpr int64_t residual_scale_bytes(int64_t elements, int64_t size) { return 3 * elements * size; }
constexpr int64_t residual_scale_bwd_bytes(int64_t elements, int64_t size) { return 3 * elements * size; }

}  // namespace fastconv

// How the tensor cores' window_attention cuts windows and shares out memory and work: host arithmetic, as geometry.h. No torch.
#pragma once

#include "geometry.h"

namespace fastconv {

// One call of window_attention: B maps of H x W tokens with `heads` heads of D channels, windows of wh x ww.
struct WindowShape {
  int64_t B, H, W, heads, D, wh, ww;
  constexpr int64_t windows() const { return B * ceil_div(H, wh) * ceil_div(W, ww); }
  constexpr int64_t positions() const { return (2 * wh - 1) * (2 * ww - 1); }
  // On tensor cores a window is cut into patches of 4 x 4 tokens, sixteen rows of an mma; the last ones may reach past it.
  constexpr int64_t down() const { return ceil_div(wh, 4); }
  constexpr int64_t across() const { return ceil_div(ww, 4); }
  constexpr int64_t patches() const { return down() * across(); }
  // Channels in shared memory, and bytes of a token there: an odd number of units of 16, for ldmatrix.
  constexpr int64_t width() const { return D <= 16 ? 16 : D <= 32 ? 32 : D <= 64 ? 64 : 128; }
  constexpr int64_t token_bytes() const { return 2 * width() + 16; }
  // Of the relative positions of all patches in shared memory. Rows lie 8 banks apart, or 24: a patch reaches six columns.
  constexpr int64_t table_pitch() const { return round_up(8 * across() - 9, 16) + 8; }
  constexpr int64_t table_bytes() const { return 4 * (8 * down() - 1) * table_pitch(); }
};

// A block of window_attention takes windows of one head in turn, each warp a patch of queries or of keys at a time, against
// `rows` rows of patches of the other in shared memory. Offsets there in bytes.
struct WindowPlan {
  int warps = 0, rows = 0, bands = 0;  // warps 0: it does not fit. bands: rows of offsets between patches that a pass of the warps spans
  int places = 0, statistics = 0, table = 0, sums = 0, band = 0, pads = 0, inverse = 0, own = 0, staged = 0;
  int64_t shared = 0;
};
constexpr int64_t kWindowBandFloats = 16 * 16 + 8;  // of one offset between patches
constexpr int64_t kWindowStatic = 128;               // bytes of shared memory beside the plan's
constexpr int64_t kWindowWarps = 8;                   // at most: by registers

constexpr WindowPlan window_plan(const WindowShape& s, bool backward, int64_t shared) {
  if (s.D < 1 || s.D > 128 || s.wh < 1 || s.ww < 1 || s.wh > 24 || s.ww > 24 || std::max(s.H, s.W) >= 1 << 27 || s.windows() >= int64_t{1} << 31)
    return {};
  const int64_t patches = s.patches(), token = s.token_bytes(), row = 2 * s.across() * 16 * token;
  for (int64_t passes = ceil_div(patches, kWindowWarps); passes <= patches; ++passes) {
    const int64_t warps = ceil_div(patches, passes);
    const int64_t bands = warps % s.across() ? std::min(s.down(), ceil_div(warps - 1, s.across()) + 1) : warps / s.across();
    int64_t end = 0;
    const auto take = [&](int64_t bytes) {
      const int64_t begin = end;
      end += round_up(bytes, 16);
      return static_cast<int>(begin);
    };
    WindowPlan p{};
    p.warps = static_cast<int>(warps), p.bands = static_cast<int>(bands);
    p.places = take(patches * 16 * 8), p.table = take(s.table_bytes());
    if (backward) {
      p.statistics = take(patches * 16 * 8), p.sums = take(s.table_bytes());
      p.band = take(4 * bands * (2 * s.across() - 1) * kWindowBandFloats), p.pads = take(warps * 3 * s.width() * 4);
      p.inverse = take(warps * 16 * 4);
    }
    p.own = take(warps * (backward ? 2 : 1) * 16 * token);
    p.staged = static_cast<int>(end);
    p.rows = static_cast<int>(std::min(s.down(), (shared - kWindowStatic - end) / row)), p.shared = end + p.rows * row;
    if (p.rows > 0) return p;
  }
  return {};
}

// Runs of windows that a block takes. Backward each has one partial sum of the gradients of the small tensors: by the shape alone.
constexpr int64_t window_slices(const WindowShape& s) {
  constexpr int64_t kBlocks = 2 * 132;
  return std::max<int64_t>(1, std::min(s.windows(), kBlocks / std::max<int64_t>(1, s.heads)));
}

}  // namespace fastconv

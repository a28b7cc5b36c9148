// window_attention on tensor cores: what the launchers take. The formula is in fastconv/ops/window_attention.py.
#pragma once

#include "../window_geometry.h"
#include "params.h"

namespace fastconv::cuda {

// q, k, v or dy: (B, H, W, heads, D) with a last stride of 1, and what a padded token has, [heads, D]; none: zeros.
struct WindowInput {
  const void* data;
  int64_t stride_b, stride_h, stride_w, stride_head;
  const void* pad;
};

// Of a call, in 32 bits. `columns`: windows side by side; `of_map`: windows of a map; `pitch`: of the table in shared memory, from whose
// `centre` on relative positions count.
struct WindowSizes {
  int H, W, heads, D, wh, ww, down, across, pitch, centre, columns, of_map;
};
inline WindowSizes window_sizes(const WindowShape& s) {
  const auto small = [](int64_t n) { return static_cast<int>(n); };
  const int64_t columns = ceil_div(s.W, s.ww), centre = (4 * s.down() - 1) * s.table_pitch() + 4 * s.across() - 1;
  return {small(s.H), small(s.W), small(s.heads), small(s.D), small(s.wh), small(s.ww), small(s.down()), small(s.across()),
          small(s.table_pitch()), small(centre), small(columns), small(ceil_div(s.H, s.wh) * columns)};
}

struct WindowParams {
  WindowShape shape;
  WindowSizes sizes;  // of the shape
  WindowPlan plan;
  int sh, sw;
  bool pad_first;
  DType dtype;  // bfloat16 or float16, of everything that is not float32 below
  bool vectors;  // whether all rows of D lie on 16 bytes
  WindowInput q, k, v, dy;
  const float* table;        // [positions, heads], or none
  const float* logit_scale;  // [heads], or none: then `scale`
  float scale, mask_value;
  int64_t windows, slices;
  void* out;  // y [B, H, W, heads, D], or dqkv [B, H, W, 3, heads, D]
  // Backward: partial sums of a slice, `partial_floats` from those of the one before; none where there is no such tensor.
  float *dtable, *dlogit_scale, *dpad;  // [positions, heads], [heads], [3, heads, D]
  int64_t partial_floats;
};

int window_attention_mma_launch(const WindowParams& p, Stream stream);
int window_attention_mma_bwd_launch(const WindowParams& p, Stream stream);

}  // namespace fastconv::cuda

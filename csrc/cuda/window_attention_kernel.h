// window_attention on tensor cores: what the launchers take. The formula is in fastconv/ops/window_attention.py.
#pragma once

#include "../geometry.h"
#include "params.h"

namespace fastconv::cuda {

// q, k, v or dy: (B, H, W, heads, D) with a last stride of 1, and what a padded token has, [heads, D]; none: zeros.
struct WindowInput {
  const void* data;
  int64_t stride_b, stride_h, stride_w, stride_head;
  const void* pad;
};

struct WindowParams {
  WindowShape shape;
  WindowPlan plan;
  int sh, sw;
  bool pad_first;
  DType dtype;  // bfloat16 or float16, of everything that is not float32 below
  bool vectors;  // whether all rows of D lie on 16 bytes
  WindowInput q, k, v, dy;
  const float* table;        // [positions, heads], or none
  const float* logit_scale;  // [heads], or none: then `scale`
  float scale, mask_value;
  int64_t slices;
  void* out;  // y [B, H, W, heads, D], or dqkv [B, H, W, 3, heads, D]
  // Backward: partial sums of a slice, `partial_floats` from those of the one before; none where there is no such tensor.
  float *dtable, *dlogit_scale, *dpad;  // [positions, heads], [heads], [3, heads, D]
  int64_t partial_floats;
};

int window_attention_mma_launch(const WindowParams& p, Stream stream);
int window_attention_mma_bwd_launch(const WindowParams& p, Stream stream);

}  // namespace fastconv::cuda

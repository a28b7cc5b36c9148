// grouped_conv on tensor cores: what the launchers take. The formula is in fastconv/ops/grouped_conv.py.
#pragma once

#include "../geometry.h"
#include "params.h"

namespace fastconv::cuda {

// Maps are bfloat16 or float16, all alike; filters of any dtype are rounded to that of the maps.
struct GroupedConvParams {
  GroupedConvShape shape;
  Array x;          // [N, H, W, C]
  Array weight;     // [C, C / groups, K, K]
  Array bias;       // [C], or not given
  MutableArray y;   // [N, out_H, out_W, C]
  bool transposed;  // dx of this convolution: x is dy, and y is dx
};

struct GroupedWgradParams {
  GroupedConvShape shape;
  Array x, dy;                  // [N, H, W, C], [N, out_H, out_W, C]
  MutableArray dweight, dbias;  // [C, C / groups, K, K], [C]
  float* partial;               // grouped_wgrad_floats(shape) floats
};

// For shapes of grouped_serves.
int grouped_conv_mma_launch(const GroupedConvParams& p, Stream stream);
int grouped_conv_mma_strided_launch(const GroupedConvParams& p, Stream stream);  // what the first calls for a stride of 2
int grouped_conv_mma_wgrad_launch(const GroupedWgradParams& p, Stream stream);

}  // namespace fastconv::cuda

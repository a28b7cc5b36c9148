// depthwise_conv on the GPU: what the launchers take. The formula is in fastconv/ops/depthwise_conv.py.
#pragma once

#include "../geometry.h"
#include "params.h"

namespace fastconv::cuda {

struct ConvForwardParams {
  ConvShape shape;
  Array x;            // [N, H, W, C]
  Array weight;       // [C, K * K]
  Array bias;         // [C], or not given
  MutableArray y;     // [N, H, W, C]
};

struct ConvBackwardParams {
  ConvShape shape;
  Array dy, x;                  // [N, H, W, C]
  Array weight;                 // [C, K * K]
  MutableArray dx;              // [N, H, W, C], or not needed
  Array dshortcut;              // [N, H, W, C], added to dx; or not given
  MutableArray dweight, dbias;  // [C, K * K], [C]; both or neither
  DType compute;                // lowest precision in which products may be formed
  float* partial;               // conv_wgrad_floats(shape) floats where dweight is needed, else null
};

int depthwise_conv_fwd_launch(const ConvForwardParams& p, Stream stream);
int depthwise_conv_bwd_launch(const ConvBackwardParams& p, Stream stream);

}  // namespace fastconv::cuda

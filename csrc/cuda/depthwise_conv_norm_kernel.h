// depthwise_conv_norm on the GPU: what the launchers take. The formula is in fastconv/ops/depthwise_conv_norm.py.
#pragma once

#include "conv_mma.h"
#include "depthwise_conv_kernel.h"

namespace fastconv::cuda {

struct ConvNormForwardParams {
  ConvForwardParams conv;        // conv.y is z: no data where neither backward nor, being apart, the norm will read it
  Array norm_weight, norm_bias;  // [C]
  float eps;
  MutableArray y;                // [N, H, W, C]
  float *mean, *rstd;            // [N, H, W], or null
  Gpu gpu;
};

struct ConvNormBackwardParams {
  ConvBackwardParams conv;                // conv.dy reads dz; conv.dx, conv.dweight and conv.dbias are results
  Array dy, z;                            // [N, H, W, C]
  Array norm_weight;                      // [C]
  const float *mean, *rstd;               // [N, H, W]
  MutableArray dz;                        // [N, H, W, C] scratch in the dtype of z; not needed without dx and dweight
  MutableArray dnorm_weight, dnorm_bias;  // [C]; both or neither
  float* norm_partial;                    // norm_bwd_floats(shape) floats where dnorm_weight is needed, else null
};

// Whether one kernel computes z and its norm: only then may z have no data. y and z may still lack theirs here.
bool depthwise_conv_norm_joins(const ConvNormForwardParams& p);
int depthwise_conv_norm_mma_launch(const ConvNormForwardParams& p, const JoinedMmaPlan& plan, Stream stream);
int depthwise_conv_norm_joined_launch(const ConvNormForwardParams& p, const JoinedPlan& plan, Stream stream);
int depthwise_conv_norm_fwd_launch(const ConvNormForwardParams& p, Stream stream);
int depthwise_conv_norm_bwd_launch(const ConvNormBackwardParams& p, Stream stream);

}  // namespace fastconv::cuda

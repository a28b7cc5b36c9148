// depthwise_conv on tensor cores, for bfloat16 and float16: the launchers of depthwise_conv_kernel.h come here first.
#pragma once

#include "depthwise_conv_kernel.h"

namespace fastconv::cuda {

// Whether the tensor cores' kernel is the choice for a call (conv_mma.h) and this GPU can run it.
bool conv_mma_chosen(const ConvForwardParams& p);
bool conv_mma_chosen(const ConvBackwardParams& p);

int conv_mma_fwd_launch(const ConvForwardParams& p, Stream stream);
// As far as the partial sums, which the caller reduces.
int conv_mma_bwd_launch(const ConvBackwardParams& p, Stream stream);

}  // namespace fastconv::cuda

// depthwise_conv on the GPU for kernel sizes that have no kernel of their own.
#pragma once

#include "depthwise_conv_kernel.h"

namespace fastconv::cuda {

// out = bias + the convolution of `in` with weight, or with its taps in reverse, which makes dx of dy; + `more` where it is given.
int conv_general_launch(const ConvShape& shape, Array in, Array weight, Array bias, bool flip, Array more, MutableArray out, Stream stream);
// One partial dweight and dbias for each of conv_wgrad_slices(shape) runs of rows, in the layout of the compiled sizes.
int conv_general_wgrad_launch(const ConvBackwardParams& p, Stream stream);

}  // namespace fastconv::cuda

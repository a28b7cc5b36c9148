// The second half of every sum over pixels: partial sums of fixed shape, added in a fixed order.
#pragma once

#include "params.h"

namespace fastconv::cuda {

// out[i] = sum of partial[slice * stride + i] over the slices, for i < count, whatever else a slice holds.
int reduce_partials_launch(const float* partial, int64_t slices, int64_t stride, int64_t count, MutableArray out, Stream stream);

}  // namespace fastconv::cuda

// residual_scale on the GPU: what the launchers take. The formula is in fastconv/ops/residual_scale.py.
#pragma once

#include "../geometry.h"
#include "params.h"

namespace fastconv::cuda {

// Runs of rows that dgamma is summed over apart: for 512 blocks or fewer, each of 32 rows or more, so that partials stay
// below 5% of the bytes. By the shape alone: the same bits on every GPU.
constexpr int64_t residual_scale_slices(int64_t rows, int64_t C) {
  return std::max<int64_t>(1, std::min(ceil_div(rows, 32), 512 / ceil_div(C, 2048)));
}

struct ResidualScaleForwardParams {
  int64_t N, L, C;    // N images of L pixels
  Array shortcut, y;  // [N, L, C]
  Array gamma, mask;  // [C] and [N], or not given
  MutableArray out;   // [N, L, C]
};

struct ResidualScaleBackwardParams {
  int64_t N, L, C;      // N images of L pixels
  Array dout, y;        // [N, L, C]
  Array gamma, mask;    // [C] and [N], or not given
  MutableArray dy;      // [N, L, C], or not needed
  MutableArray dgamma;  // [C], or not needed
  float* partial;       // residual_scale_slices(N * L, C) * C floats where dgamma is needed, else null
};

int residual_scale_fwd_launch(const ResidualScaleForwardParams& p, Stream stream);
int residual_scale_bwd_launch(const ResidualScaleBackwardParams& p, Stream stream);

}  // namespace fastconv::cuda

// global_response_norm on the GPU: what the launchers take. The formula is in fastconv/ops/global_response_norm.py.
#pragma once

#include "../geometry.h"
#include "params.h"

namespace fastconv::cuda {

// Of both directions. Sums of an image: forward of a^2; backward of dy a and of dy.
struct GlobalResponseNormParams {
  int64_t N, L, C;              // N images of L pixels
  float eps;
  Activation act;
  Array x, dy;                  // [N, L, C]; dy: backward alone
  Array weight, bias;           // [C]; bias: forward alone
  MutableArray out;             // [N, L, C]: y or dx, which may not be needed
  const float* norm;            // [N, C]: backward alone
  float* new_norm;              // [N, C]: forward alone, or null
  float* gradients;             // [N, 2, C], dweight and dbias of each image: backward alone, or null
  MutableArray dweight, dbias;  // [C], with gradients
  ResidentPlan plan;
  float* partial;               // [N, slices, sums, C] where no plan holds an image on the chip, else null
  float* coefficients;          // [N, sums, C], likewise: a's forward; dy's and a's backward
};

using ResponseParams = GlobalResponseNormParams;  // where names grow long

// Sets the plan: how one launch holds an image on the chip, where it can.
void global_response_norm_fwd_plan(GlobalResponseNormParams& p, const Gpu& gpu);
void global_response_norm_bwd_plan(GlobalResponseNormParams& p, const Gpu& gpu);
int global_response_norm_fwd_launch(const GlobalResponseNormParams& p, Stream stream);
int global_response_norm_bwd_launch(const GlobalResponseNormParams& p, Stream stream);

}  // namespace fastconv::cuda

// squeeze_excite on the GPU: what the launchers take. The formula is in fastconv/ops/squeeze_excite.py.
#pragma once

#include "../geometry.h"
#include "params.h"

namespace fastconv::cuda {

// Activations and gates, in the order of FUNCTIONS in fastconv/ops/squeeze_excite.py.
enum class Function : uint8_t { kRelu, kSilu, kGelu, kHardswish, kLeakyRelu, kIdentity, kSigmoid, kHardsigmoid };
constexpr int64_t kFunctions = 8;

// Of both directions. Without w2 the first layer is the only one, and R is C.
struct SqueezeExciteParams {
  int64_t N, L, C, R;                  // N images of L pixels
  bool channels_last;                  // [N, L, C], else [N, C, L]
  Function act, gate;
  Array x, dy;                         // maps; dy: backward alone
  Array w1, b1, w2, b2;                // [R, C], [R], [C, R], [C]; biases: forward alone, or null
  MutableArray out;                    // a map: y or dx, which may not be needed
  float *pooled, *hidden, *z;          // [N, C], [N, R], [N, C]: written forward, where hidden may be null, read backward
  float* activated;                    // [N, R]: of hidden, forward alone
  float *dz, *dhidden, *dpooled;       // as z, hidden and pooled: backward alone; dpooled where out is needed
  float* dactivated;                   // [N, blocks of an image, R]: each block's share of the gradient
  bool need_fc1, need_fc2;
  MutableArray dw1, db1, dw2, db2;
  ResidentPlan plan;
  float* partial;                      // [N, slices, C] where no plan holds an image on the chip, else null
};

using GateParams = SqueezeExciteParams;  // where names grow long

// Sets the plan: how one launch holds an image on the chip, where it can.
void squeeze_excite_fwd_plan(SqueezeExciteParams& p, const Gpu& gpu);
void squeeze_excite_bwd_plan(SqueezeExciteParams& p, const Gpu& gpu);
int squeeze_excite_fwd_launch(const SqueezeExciteParams& p, Stream stream);
int squeeze_excite_bwd_launch(const SqueezeExciteParams& p, Stream stream);

}  // namespace fastconv::cuda

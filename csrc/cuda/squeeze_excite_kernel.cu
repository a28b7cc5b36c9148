// Forward of squeeze_excite: y = x gate(w2 act(w1 mean(x) + b1) + b2).
#include "squeeze_excite_kernel.h"

#include "squeeze_excite.cuh"

namespace fastconv::cuda {
namespace {

struct Forward {
  static constexpr int kSummed = kX, kScaled = kX;  // maps that are read for the sums, and again

  template <int N> static FC_DEVICE void add(const GateParams& p, Vec<float, N>& sums, const Raw<N>& raw, const Raw<N>&) {
    const Vec<float, N> x = to_float(raw, p.x.dtype);
#pragma unroll
    for (int i = 0; i < N; ++i) sums[i] += x[i];
  }

  // The share of a team's block: pooled, hidden and z of the image; total(c): the sum of x over channel c.
  template <class Total> static FC_DEVICE void layers(const GateParams& p, int64_t image, const Team& team, Total&& total, float*) {
    float *const pooled = p.pooled + image * p.C, *const z = p.z + image * p.C, *const activated = p.activated + image * p.R;
    const float scale = 1.0f / static_cast<float>(p.L);
    const bool two = p.w2.data;
    for (int64_t c = team.begin(p.C) + threadIdx.x; c < team.end(p.C); c += blockDim.x) store_global(pooled + c, total(c) * scale);
    sync_cluster();
    if (two) {
      layer_rows(p.w1, p.C, pooled, team.begin(p.R), team.end(p.R), [&](int64_t r, float sum, bool in) {
        const float h = sum + load_array<1>(p.b1, r, in && p.b1.data)[0];
        store_global(p.hidden + image * p.R + r, h, in && p.hidden);
        store_global(activated + r, value_of(p.act, h), in);
      });
      sync_cluster();
    }
    const Array &weight = two ? p.w2 : p.w1, &bias = two ? p.b2 : p.b1;
    layer_rows(weight, p.R, two ? activated : pooled, team.begin(p.C), team.end(p.C), [&](int64_t c, float sum, bool in) {
      store_global(z + c, sum + load_array<1>(bias, c, in && bias.data)[0], in);
    });
    sync_cluster();
  }
};

}  // namespace

void squeeze_excite_fwd_plan(SqueezeExciteParams& p, const Gpu& gpu) { set_plan<Forward>(p, gpu); }

int squeeze_excite_fwd_launch(const SqueezeExciteParams& p, Stream stream) { return launch_gate<Forward>(p, stream); }

}  // namespace fastconv::cuda

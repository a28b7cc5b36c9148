// Forward of global_response_norm: with a = act(x), g = sqrt(sum a^2) and n = g / (mean_c g + eps), y = a (weight n + 1) + bias.
#include "global_response_norm_kernel.h"

#include "global_response_norm.cuh"

namespace fastconv::cuda {
namespace {

struct Forward {
  static constexpr bool kBackward = false;
  static constexpr int kMaps = kX;
  static constexpr int kSums = 1;

  template <int N> static FC_DEVICE void add(Vec<float, N> (&sums)[1], const Vec<float, N>& a, const Raw<N>&, DType) {
#pragma unroll
    for (int i = 0; i < N; ++i) sums[0][i] = fmaf(a[i], a[i], sums[0][i]);
  }

  template <class Total, class Coefficients>
  static FC_DEVICE void finish(const ResponseParams& p, int64_t image, Total&& total, const Coefficients& factor,
                               float* scratch, bool writes) {
    float sum = 0;
    for (int64_t c = threadIdx.x; c < p.C; c += blockDim.x) {
      const float g = sqrtf(total(0, c));
      factor.store(0, c, g);
      sum += g;
    }
    const float scale = 1.0f / (block_sum(sum, scratch) / static_cast<float>(p.C) + p.eps);
    for (int64_t c = threadIdx.x; c < p.C; c += blockDim.x) {
      const float g = factor.load(0, c);
      store_global(p.new_norm + image * p.C + c, g, writes && p.new_norm);
      factor.store(0, c, fmaf(load_array<1>(p.weight, c)[0], g * scale, 1.0f));
    }
  }

  template <int N>
  static FC_DEVICE Vec<float, N> result(const Activated<N>& a, const Raw<N>&, DType, const Vec<float, N>& factor,
                                               const Vec<float, N>& bias) {
    Vec<float, N> y;
#pragma unroll
    for (int i = 0; i < N; ++i) y[i] = fmaf(a.value[i], factor[i], bias[i]);
    return y;
  }
};

}  // namespace

void global_response_norm_fwd_plan(ResponseParams& p, const Gpu& gpu) { set_plan<Forward>(p, gpu); }

int global_response_norm_fwd_launch(const ResponseParams& p, Stream stream) { return launch_response<Forward>(p, stream); }

}  // namespace fastconv::cuda

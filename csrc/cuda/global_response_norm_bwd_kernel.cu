// Backward of global_response_norm: with S = sum dy a, m = mean_c g and n = g / (m + eps), for each image
//
//   dweight = n S,  dbias = sum dy,  dx = (dy (weight n + 1) + a dg / g) act'(x),
//   dg = weight S / (m + eps) - sum_c(weight S g) / (C (m + eps)^2)
#include "global_response_norm_kernel.h"

#include "global_response_norm.cuh"
#include "reduce_kernel.h"

namespace fastconv::cuda {
namespace {

struct Backward {
  static constexpr bool kBackward = true;
  static constexpr int kMaps = kX | kDy;
  static constexpr int kSums = 2;

  template <int N> static FC_DEVICE void add(Vec<float, N> (&sums)[2], const Vec<float, N>& a, const Raw<N>& raw, DType dtype) {
    const Vec<float, N> dy = to_float(raw, dtype);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      sums[0][i] = fmaf(a[i], dy[i], sums[0][i]);
      sums[1][i] += dy[i];
    }
  }

  // In coefficients: the sums, then what dy and a are multiplied with.
  template <class Total, class Coefficients>
  static FC_DEVICE void finish(const ResponseParams& p, int64_t image, Total&& total, const Coefficients& coefficients,
                               float* scratch, bool writes) {
    const float scale = 1.0f / static_cast<float>(p.C);
    float sum = 0, through = 0;
    for (int64_t c = threadIdx.x; c < p.C; c += blockDim.x) {
      const float product = total(0, c), g = load_global<float>(p.norm + image * p.C + c);
      coefficients.store(0, c, product);
      coefficients.store(1, c, total(1, c));
      sum += g;
      through = fmaf(load_array<1>(p.weight, c)[0] * product, g, through);
    }
    const float inverse = 1.0f / (block_sum(sum, scratch) * scale + p.eps);
    const float through_mean = block_sum(through, scratch) * inverse * inverse * scale;
    for (int64_t c = threadIdx.x; c < p.C; c += blockDim.x) {
      const float product = coefficients.load(0, c), dbias = coefficients.load(1, c);
      const float g = load_global<float>(p.norm + image * p.C + c), weight = load_array<1>(p.weight, c)[0], normed = g * inverse;
      float* const gradient = p.gradients + image * 2 * p.C + c;
      store_global(gradient, normed * product, writes && p.gradients);
      store_global(gradient + p.C, dbias, writes && p.gradients);
      const float dg = weight * product * inverse - through_mean;
      coefficients.store(0, c, fmaf(weight, normed, 1.0f));
      // A channel that is zero throughout: its norm has no derivative there, and 0 is what PyTorch takes.
      coefficients.store(1, c, g == 0 ? 0 * dg : dg / g);
    }
  }

  template <int N>
  static FC_DEVICE Vec<float, N> result(const Activated<N>& a, const Raw<N>& raw, DType dtype, const Vec<float, N>& factor,
                                               const Vec<float, N>& term) {
    const Vec<float, N> dy = to_float(raw, dtype);
    Vec<float, N> dx;
#pragma unroll
    for (int i = 0; i < N; ++i) dx[i] = fmaf(dy[i], factor[i], a.value[i] * term[i]) * a.slope[i];
    return dx;
  }
};

}  // namespace

void global_response_norm_bwd_plan(ResponseParams& p, const Gpu& gpu) { set_plan<Backward>(p, gpu); }

int global_response_norm_bwd_launch(const ResponseParams& p, Stream stream) {
  int error = launch_response<Backward>(p, stream);
  if (error == 0 && p.gradients) error = reduce_partials_launch(p.gradients, p.N, 2 * p.C, p.C, p.dweight, stream);
  if (error == 0 && p.gradients) error = reduce_partials_launch(p.gradients + p.C, p.N, 2 * p.C, p.C, p.dbias, stream);
  return error;
}

}  // namespace fastconv::cuda

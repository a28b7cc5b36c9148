// Backward of squeeze_excite: dz = gate'(z) sum(dy x), dhidden = act'(hidden) w2^T dz, dx = dy gate(z) + w1^T dhidden / L. The
// second pass does not read x. dw2 = sum over images of dz act(hidden)^T, dw1 of dhidden pooled^T.
#include "squeeze_excite_kernel.h"

#include "squeeze_excite.cuh"

namespace fastconv::cuda {
namespace {

struct Backward {
  static constexpr int kSummed = kX | kDy, kScaled = kDy;

  template <int N> static FC_DEVICE void add(const GateParams& p, Vec<float, N>& sums, const Raw<N>& raw_x, const Raw<N>& raw_dy) {
    const Vec<float, N> x = to_float(raw_x, p.x.dtype), dy = to_float(raw_dy, p.dy.dtype);
#pragma unroll
    for (int i = 0; i < N; ++i) sums[i] = fmaf(x[i], dy[i], sums[i]);
  }

  // The share of a team's block: dz, dhidden and dpooled of the image; total(c): the sum of dy x over channel c.
  template <class Total> static FC_DEVICE void layers(const GateParams& p, int64_t image, const Team& team, Total&& total, float* scratch) {
    float *const dz = p.dz + image * p.C, *const dhidden = p.dhidden + image * p.R;
    const int64_t begin = team.begin(p.C), end = team.end(p.C);
    const bool two = p.w2.data;
    for (int64_t c = begin + threadIdx.x; c < end; c += blockDim.x)
      store_global(dz + c, gradient_of(p.gate, load_global<float>(p.z + image * p.C + c), total(c)));
    sync_cluster();
    if (two && (p.out.data || p.need_fc1)) {
      float* const shares = p.dactivated + image * team.blocks * p.R;
      layer_columns(p.w2, p.R, dz, begin, end, 0, p.R, 1.0f, scratch, shares + team.rank * p.R);
      sync_cluster();
      for (int64_t r = team.begin(p.R) + threadIdx.x; r < team.end(p.R); r += blockDim.x) {
        const float sum = sum_of_slices(shares + r, team.blocks, p.R);
        store_global(dhidden + r, gradient_of(p.act, load_global<float>(p.hidden + image * p.R + r), sum));
      }
      sync_cluster();
    }
    if (!p.out.data) return;
    layer_columns(p.w1, p.C, two ? dhidden : dz, 0, p.R, team.begin(p.C, kColumns), team.end(p.C, kColumns),
                  1.0f / static_cast<float>(p.L), scratch, p.dpooled + image * p.C);
    sync_cluster();
  }
};

// Gradients of a layer: dweight[m][k] = sum_n dout[n][m] act(in[n][k]) and dbias[m] = sum_n dout[n][m], images in order.
struct LayerGradient {
  int64_t N, M, K;
  const float* dout;
  const float* in;
  Function act;
  MutableArray dweight, dbias;
};

constexpr int kSide = 32, kRowsEach = 4;  // of a block's piece of dweight; rows of a thread

__global__ void __launch_bounds__(kSide * kSide / kRowsEach) squeeze_excite_weight_kernel(LayerGradient p) {
  FC_SHARED(float, dout, kSide * kSide);  // [image][row]
  FC_SHARED(float, in, kSide * kSide);    // [image][column]
  const int64_t across = ceil_div(p.K, kSide), m0 = blockIdx.x / across * kSide, k0 = blockIdx.x % across * kSide;
  const int column = threadIdx.x % kSide, row = threadIdx.x / kSide * kRowsEach;
  Vec<float, kRowsEach> sums{}, bias{};
  for (int64_t n0 = 0; n0 < p.N; n0 += kSide) {
    sync_threads();  // the images before have been read
#pragma unroll
    for (int i = 0; i < kRowsEach; ++i) {
      const int64_t n = n0 + row + i, m = m0 + column, k = k0 + column;
      const float v = load_global<float>(p.in + n * p.K + k, n < p.N && k < p.K);
      store_shared(dout + (row + i) * kSide + column, load_global<float>(p.dout + n * p.M + m, n < p.N && m < p.M));
      store_shared(in + (row + i) * kSide + column, value_of(p.act, v));
    }
    sync_threads();
    const int images = static_cast<int>(std::min<int64_t>(kSide, p.N - n0));
#pragma unroll 8
    for (int n = 0; n < images; ++n) {
      const float v = load_shared<float>(in + n * kSide + column);
      const auto d = load_shared<Vec<float, kRowsEach>>(dout + n * kSide + row);
#pragma unroll
      for (int i = 0; i < kRowsEach; ++i) {
        sums[i] = fmaf(d[i], v, sums[i]);
        bias[i] += d[i];
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kRowsEach; ++i) {
    const int64_t m = m0 + row + i, k = k0 + column;
    store_array<1>(p.dweight, m * p.K + k, {sums[i]}, m < p.M && k < p.K);
    store_array<1>(p.dbias, m, {bias[i]}, m < p.M && k == 0);
  }
}

int launch_weight(const LayerGradient& p, Stream stream) {
  const int64_t blocks = ceil_div(p.M, kSide) * ceil_div(p.K, kSide);
  return launch(squeeze_excite_weight_kernel, dim3(static_cast<unsigned>(blocks)), dim3(kSide * kSide / kRowsEach), 0, stream, p);
}

}  // namespace

void squeeze_excite_bwd_plan(SqueezeExciteParams& p, const Gpu& gpu) { set_plan<Backward>(p, gpu); }

int squeeze_excite_bwd_launch(const SqueezeExciteParams& p, Stream stream) {
  const float* const dfirst = p.w2.data ? p.dhidden : p.dz;
  int error = launch_gate<Backward>(p, stream);
  if (error == 0 && p.need_fc1) error = launch_weight({p.N, p.R, p.C, dfirst, p.pooled, Function::kIdentity, p.dw1, p.db1}, stream);
  if (error == 0 && p.need_fc2) error = launch_weight({p.N, p.C, p.R, p.dz, p.hidden, p.act, p.dw2, p.db2}, stream);
  return error;
}

}  // namespace fastconv::cuda

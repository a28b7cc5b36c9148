// global_response_norm on the CPU: tensors to kernel arguments, and what happens between the two passes over an image.
#include <algorithm>
#include <cmath>

#include "cpu/glue.h"

namespace fastconv::cpu {
namespace {

constexpr const char* kOp = "global_response_norm";

// Pixels of a band: as many as one partial sum covers, in one image.
constexpr int64_t kBandPixels = 200, kBandElements = 1 << 16;

GrnParams params(const Tensor& x, int64_t act) {
  STD_TORCH_CHECK(x.dim() == 3, kOp, ": x must be (N, L, C), got ", shape_string(x));
  STD_TORCH_CHECK(act >= 0 && act <= 2, kOp, ": act must be 0, 1 or 2, got ", act);
  GrnParams p{};
  p.N = x.size(0), p.L = x.size(1), p.C = x.size(2);
  check_tensor(kOp, "x", x, {p.N, p.L, p.C}, x.scalar_type());
  p.bands = std::max<int64_t>(1, ceil_div(p.L, std::clamp<int64_t>(kBandElements / std::max<int64_t>(p.C, 1), 1, kBandPixels)));
  p.act = static_cast<Activation>(act);
  p.x = array(x);
  return p;
}

template <class A> A* data(const Tensor& t) { return static_cast<A*>(t.mutable_data_ptr()); }
template <class A> const A* const_data(const Tensor& t) { return static_cast<const A*>(t.const_data_ptr()); }

// Sum, between(image), apply. Images side by side where they keep the threads busy, so that an image's second pass finds
// some of it in the cache; else the bands of all of them. The sums are the same either way.
template <class Between> void two_passes(const GrnParams& p, bool apply, Between&& between) {
  const Kernels& k = kernels();
  const int64_t scratch_bytes = k.grn_scratch(p);
  const auto images = [&](int64_t grain, auto&& f) {
    torch::stable::parallel_for(0, p.N, grain, [&](int64_t begin, int64_t end) {
      Scratch scratch(scratch_bytes);
      for (int64_t n = begin; n < end; ++n) f(n, scratch.get());
    });
  };
  if (p.N >= static_cast<int64_t>(torch::stable::get_num_threads())) {
    images(1, [&](int64_t n, void* scratch) {
      k.grn_sum(p, scratch, n * p.bands, (n + 1) * p.bands);
      between(n);
      if (apply) k.grn_apply(p, scratch, n * p.bands, (n + 1) * p.bands);
    });
    return;
  }
  run(p, p.N * p.bands, k.grn_scratch, k.grn_sum);
  images(p.N, [&](int64_t n, void*) { between(n); });
  if (apply) run(p, p.N * p.bands, k.grn_scratch, k.grn_apply);
}

// The partial sums of an image, [bands][count], added up in order into the first.
template <class A> A* add_bands(const GrnParams& p, int64_t n, int64_t count) {
  A* sum = static_cast<A*>(p.partial) + n * p.bands * count;
  for (int64_t band = 1; band < p.bands; ++band)
    for (int64_t i = 0; i < count; ++i) sum[i] += sum[band * count + i];
  return sum;
}

template <class A> double mean_norm(const A* norm, int64_t C) {
  double sum = 0;
  for (int64_t c = 0; c < C; ++c) sum += norm[c];
  return sum / static_cast<double>(C);
}

// norm: (N, C), the norms over H and W; empty without `save`.
std::tuple<Tensor, Tensor> global_response_norm_fwd(Tensor x, Tensor weight, Tensor bias, double eps, int64_t act, ScalarType out_dtype, bool save) {
  GrnParams p = params(x, act);
  check_tensor(kOp, "weight", weight, {p.C}, x.scalar_type());
  check_tensor(kOp, "bias", bias, {p.C}, x.scalar_type());
  check_dtype(kOp, "out_dtype", out_dtype, x.scalar_type());
  const ScalarType acc = accumulation_type(x.scalar_type());
  Tensor y = empty(x, {p.N, p.L, p.C}, out_dtype), norm = empty(x, {p.N, p.C}, acc);
  if (x.numel() == 0) return {y, save ? torch::stable::fill_(norm, 0.0) : nothing(x, acc)};
  const Tensor w = in_type(weight, acc), b = in_type(bias, acc), factor = empty(x, {p.N, p.C}, acc), partial = empty(x, {p.N, p.bands, p.C}, acc);
  p.partial = partial.mutable_data_ptr();
  p.factor = factor.const_data_ptr();
  p.term = b.const_data_ptr();
  p.out = mutable_array(y);
  with_accumulation(acc, [&](auto* type) {
    using A = std::remove_pointer_t<decltype(type)>;
    two_passes(p, true, [&](int64_t n) {
      const A* square = add_bands<A>(p, n, p.C);
      A *g = data<A>(norm) + n * p.C, *f = data<A>(factor) + n * p.C;
      for (int64_t c = 0; c < p.C; ++c) g[c] = std::sqrt(square[c]);
      const A scale = static_cast<A>(1.0 / (mean_norm(g, p.C) + eps));
      for (int64_t c = 0; c < p.C; ++c) f[c] = const_data<A>(w)[c] * (g[c] * scale) + A(1);
    });
  });
  return {y, save ? norm : nothing(x, acc)};
}

// With n = g / (mean_c g + eps) and S = sum dy a: dweight = sum_N n S, dbias = sum dy, and
// da = dy (weight n + 1) + a dg / g, dg = weight S / (m + eps) - sum_c(weight S g) / (C (m + eps)^2).
std::tuple<Tensor, Tensor, Tensor> global_response_norm_bwd(Tensor dy, Tensor x, Tensor weight, Tensor norm, double eps, int64_t act, bool need_dx, bool need_dweight) {
  GrnParams p = params(x, act);
  check_tensor(kOp, "dy", dy, {p.N, p.L, p.C}, x.scalar_type());
  check_tensor(kOp, "weight", weight, {p.C}, x.scalar_type());
  const ScalarType acc = accumulation_type(x.scalar_type()), type_of_weight = weight.scalar_type();
  check_tensor(kOp, "norm", norm, {p.N, p.C}, x.scalar_type());
  STD_TORCH_CHECK(norm.scalar_type() == acc, kOp, ": norm must be in the accumulation type");
  Tensor dx = need_dx ? torch::stable::empty_like(x) : nothing(x, x.scalar_type());
  if (x.numel() == 0) {
    const auto zeros = [&] { return need_dweight ? torch::stable::new_zeros(x, {p.C}, type_of_weight) : nothing(x, type_of_weight); };
    return {dx, zeros(), zeros()};
  }
  const Tensor w = in_type(weight, acc), factor = empty(x, {p.N, p.C}, acc), term = empty(x, {p.N, p.C}, acc), partial = empty(x, {p.N, p.bands, 2, p.C}, acc);
  const Tensor dweight = empty(x, {p.N, p.C}, acc), dbias = empty(x, {p.N, p.C}, acc);  // of each image
  p.dy = array(dy);
  p.partial = partial.mutable_data_ptr();
  p.factor = factor.const_data_ptr();
  p.term = term.const_data_ptr();
  if (need_dx) p.out = mutable_array(dx);
  with_accumulation(acc, [&](auto* type) {
    using A = std::remove_pointer_t<decltype(type)>;
    two_passes(p, need_dx, [&](int64_t n) {
      const A* sum = add_bands<A>(p, n, 2 * p.C);
      const A *g = const_data<A>(norm) + n * p.C, *gamma = const_data<A>(w);
      const double scale = 1.0 / (mean_norm(g, p.C) + eps);
      double through_mean = 0;
      for (int64_t c = 0; c < p.C; ++c) through_mean += static_cast<double>(gamma[c] * sum[c]) * g[c];
      through_mean *= scale * scale / static_cast<double>(p.C);
      for (int64_t c = 0, i = n * p.C; c < p.C; ++c, ++i) {
        const A normed = g[c] * static_cast<A>(scale);
        data<A>(dweight)[i] = normed * sum[c];
        data<A>(dbias)[i] = sum[p.C + c];
        data<A>(factor)[i] = gamma[c] * normed + A(1);
        // A channel that is zero throughout: its norm has no derivative there, and 0 is what PyTorch takes.
        const double dg = gamma[c] * sum[c] * scale - through_mean;
        data<A>(term)[i] = static_cast<A>(g[c] == 0 ? 0 * dg : dg / g[c]);
      }
    });
  });
  if (!need_dweight) return {dx, nothing(x, type_of_weight), nothing(x, type_of_weight)};
  return {dx, in_type(reduce(dweight, p.N, p.C), type_of_weight), in_type(reduce(dbias, p.N, p.C), type_of_weight)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastconv, CPU, m) {
  m.impl("global_response_norm_fwd", TORCH_BOX(&global_response_norm_fwd));
  m.impl("global_response_norm_bwd", TORCH_BOX(&global_response_norm_bwd));
}

}  // namespace fastconv::cpu

// global_response_norm on the GPU: tensors to kernel arguments.
#include "cuda/global_response_norm_kernel.h"

#include "cuda/glue.h"

namespace fastconv::cuda {
namespace {

constexpr const char* kOp = "global_response_norm";

GlobalResponseNormParams params(const Tensor& x, const Tensor& weight, double eps, int64_t act) {
  check_first(kOp, "x", x);
  STD_TORCH_CHECK(x.dim() == 3, kOp, ": x must be (N, L, C), got ", shape_string(x));
  STD_TORCH_CHECK(act >= 0 && act <= 2, kOp, ": act must be 0, 1 or 2, got ", act);
  GlobalResponseNormParams p{};
  p.N = x.size(0), p.L = x.size(1), p.C = x.size(2);
  check_array(kOp, "x", x, {p.N, p.L, p.C}, x);
  check_array(kOp, "weight", weight, {p.C}, x);
  const int64_t blocks = p.N * std::max<int64_t>(16, response_slices(p.L) * ceil_div(p.C, 64));  // more than any launch has
  STD_TORCH_CHECK(blocks < int64_t{1} << 31, kOp, ": ", p.N, " images are more than a launch takes; split the batch");
  p.eps = static_cast<float>(eps);
  p.act = static_cast<Activation>(act);
  p.x = array(x);
  p.weight = array(weight);
  return p;
}

// What lies in memory between the passes, where there are two: partial sums and coefficients, `sums` to a channel.
Tensor between_passes(GlobalResponseNormParams& p, const Tensor& x, int64_t sums) {
  const int64_t partial = p.N * response_slices(p.L) * sums * p.C;
  Tensor scratch = floats(x, p.plan.blocks > 0 ? 0 : partial + p.N * sums * p.C);
  if (p.plan.blocks == 0) {
    p.partial = float_data(scratch);
    p.coefficients = p.partial + partial;
  }
  return scratch;
}

std::tuple<Tensor, Tensor> global_response_norm_fwd(
    Tensor x, Tensor weight, Tensor bias, double eps, int64_t act, ScalarType out_dtype, bool save) {
  GlobalResponseNormParams p = params(x, weight, eps, act);
  check_array(kOp, "bias", bias, {p.C}, x);
  check_dtype(kOp, "out_dtype", out_dtype);
  const Place place(x);
  Tensor y = empty(x, {p.N, p.L, p.C}, out_dtype), norm = save ? empty(x, {p.N, p.C}, ScalarType::Float) : floats(x, 0);
  if (x.numel() == 0) return {y, torch::stable::zero_(norm)};
  p.bias = array(bias);
  p.out = mutable_array(y);
  if (save) p.new_norm = float_data(norm);
  global_response_norm_fwd_plan(p, place.gpu());
  const Tensor scratch = between_passes(p, x, 1);
  check_launch(kOp, "forward", global_response_norm_fwd_launch(p, place.stream()));
  return {y, norm};
}

std::tuple<Tensor, Tensor, Tensor> global_response_norm_bwd(
    Tensor dy, Tensor x, Tensor weight, Tensor norm, double eps, int64_t act, bool need_dx, bool need_dweight) {
  GlobalResponseNormParams p = params(x, weight, eps, act);
  check_array(kOp, "dy", dy, {p.N, p.L, p.C}, x);
  check_array(kOp, "norm", norm, {p.N, p.C}, x);
  STD_TORCH_CHECK(norm.scalar_type() == ScalarType::Float, kOp, ": norm must be float32");
  const Place place(x);
  Tensor dx = gradient(x, need_dx), dweight = gradient(weight, need_dweight), dbias = gradient(weight, need_dweight);
  if (x.numel() == 0) return {dx, torch::stable::zero_(dweight), torch::stable::zero_(dbias)};
  const Tensor gradients = floats(x, need_dweight ? p.N * 2 * p.C : 0);
  p.dy = array(dy);
  p.norm = static_cast<const float*>(norm.const_data_ptr());
  if (need_dx) p.out = mutable_array(dx);
  if (need_dweight) {
    p.gradients = float_data(gradients);
    p.dweight = mutable_array(dweight);
    p.dbias = mutable_array(dbias);
  }
  global_response_norm_bwd_plan(p, place.gpu());
  const Tensor scratch = between_passes(p, x, 2);
  if (need_dx || need_dweight) check_launch(kOp, "backward", global_response_norm_bwd_launch(p, place.stream()));
  return {dx, dweight, dbias};
}

}  // namespace

FASTCONV_CUDA_OPS(m) {
  m.impl("global_response_norm_fwd", TORCH_BOX(&global_response_norm_fwd));
  m.impl("global_response_norm_bwd", TORCH_BOX(&global_response_norm_bwd));
}

}  // namespace fastconv::cuda

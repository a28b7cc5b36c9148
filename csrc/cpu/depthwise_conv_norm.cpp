// depthwise_conv_norm on the CPU: tensors to kernel arguments.
#include "cpu/glue.h"

namespace fastconv::cpu {
namespace {

constexpr const char* kOp = "depthwise_conv_norm";

std::tuple<Tensor, Tensor, Tensor, Tensor> depthwise_conv_norm_fwd(
    Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor norm_weight, Tensor norm_bias, double eps,
    ScalarType z_dtype, ScalarType out_dtype, bool save) {
  const ConvShape shape = conv_shape(kOp, x, weight);
  check_tensor(kOp, "norm_weight", norm_weight, {shape.C}, x.scalar_type());
  check_tensor(kOp, "norm_bias", norm_bias, {shape.C}, x.scalar_type());
  check_dtype(kOp, "z_dtype", z_dtype, x.scalar_type());
  check_dtype(kOp, "out_dtype", out_dtype, x.scalar_type());
  const ScalarType acc = accumulation_type(x.scalar_type());

  const std::vector<int64_t> none{0}, all{shape.N, shape.H * shape.W, shape.C}, rows{shape.N, shape.H, shape.W};
  Tensor y = empty(x, {shape.N, shape.H, shape.W, shape.C}, out_dtype), z = empty(x, save ? all : none, z_dtype);
  Tensor mean = empty(x, save ? rows : none, acc), rstd = empty(x, save ? rows : none, acc);
  Tensor packed = pack_weight(weight, shape, false, acc), bias_acc = bias_or_zeros(kOp, bias, x, shape.C, acc);
  Tensor norm_weight_acc = in_type(norm_weight, acc), norm_bias_acc = in_type(norm_bias, acc);

  ForwardParams p = forward_params(shape, x, packed, bias_acc);
  p.norm_weight = norm_weight_acc.const_data_ptr();
  p.norm_bias = norm_bias_acc.const_data_ptr();
  p.eps = eps;
  p.y = mutable_array(y);
  if (save) {
    p.z = mutable_array(z);
    p.mean = mean.mutable_data_ptr();
    p.rstd = rstd.mutable_data_ptr();
  }
  run(p, p.bands.count, kernels().forward_scratch, kernels().forward);
  return {y, z, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> depthwise_conv_norm_bwd(
    Tensor dy, Tensor x, Tensor weight, Tensor norm_weight, Tensor z, Tensor mean, Tensor rstd, std::optional<Tensor> dshortcut,
    bool need_dx, bool need_dweight, bool need_dnorm) {
  x = in_memory_order(x, true);
  const ConvShape shape = conv_shape(kOp, x, weight);
  const auto [N, H, W, C, K] = shape;
  check_tensor(kOp, "dy", dy, {N, H, W, C}, x.scalar_type());
  check_tensor(kOp, "z", z, {N, H * W, C}, x.scalar_type());
  check_tensor(kOp, "norm_weight", norm_weight, {C}, x.scalar_type());
  check_tensor(kOp, "mean", mean, {N, H, W}, x.scalar_type());
  check_tensor(kOp, "rstd", rstd, {N, H, W}, x.scalar_type());
  if (dshortcut) check_like(kOp, "dshortcut", *dshortcut, {N, H, W, C}, x.scalar_type());
  const ScalarType acc = accumulation_type(x.scalar_type()), norm_type = norm_weight.scalar_type();
  STD_TORCH_CHECK(mean.scalar_type() == acc && rstd.scalar_type() == acc, kOp, ": mean and rstd must have the accumulation dtype");

  BackwardParams p = backward_params(shape, true, dy);
  Tensor norm_weight_acc = in_type(norm_weight, acc), norm_partial = empty(x, {p.plan.slices, 2, C}, acc);
  p.z = array(z);
  p.norm_weight = norm_weight_acc.const_data_ptr();
  p.mean = mean.const_data_ptr();
  p.rstd = rstd.const_data_ptr();
  p.norm_partial = norm_partial.mutable_data_ptr();
  if (dshortcut) p.dshortcut = array(*dshortcut);
  auto [dx, dweight, dbias] = conv_backward(p, x, weight, need_dx, need_dweight);
  if (!need_dnorm) return {dx, dweight, dbias, nothing(x, norm_type), nothing(x, norm_type)};
  Tensor sum = torch::stable::view(reduce(norm_partial, p.plan.slices, 2 * C), {2, C});
  const auto row = [&](int64_t i) { return torch::stable::clone(in_type(torch::stable::view(torch::stable::narrow(sum, 0, i, 1), {C}), norm_type)); };
  return {dx, dweight, dbias, row(0), row(1)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastconv, CPU, m) {
  m.impl("depthwise_conv_norm_fwd", TORCH_BOX(&depthwise_conv_norm_fwd));
  m.impl("depthwise_conv_norm_bwd", TORCH_BOX(&depthwise_conv_norm_bwd));
}

}  // namespace fastconv::cpu

// depthwise_conv_norm on the GPU: tensors to kernel arguments.
#include "cuda/depthwise_conv_norm_kernel.h"

#include "cuda/glue.h"

namespace fastconv::cuda {
namespace {

constexpr const char* kOp = "depthwise_conv_norm";

std::tuple<Tensor, Tensor, Tensor, Tensor> depthwise_conv_norm_fwd(
    Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor norm_weight, Tensor norm_bias, double eps,
    ScalarType z_dtype, ScalarType out_dtype, bool save) {
  const ConvShape shape = conv_shape(kOp, x, weight);
  const auto [N, H, W, C, K] = shape;
  check_array(kOp, "norm_weight", norm_weight, {C}, x);
  check_array(kOp, "norm_bias", norm_bias, {C}, x);
  check_dtype(kOp, "z_dtype", z_dtype);
  check_dtype(kOp, "out_dtype", out_dtype);
  ConvNormForwardParams p{};
  p.conv = conv_forward_params(kOp, shape, x, weight, bias);
  p.norm_weight = array(norm_weight);
  p.norm_bias = array(norm_bias);
  p.eps = static_cast<float>(eps);

  const Place place(x);
  const std::vector<int64_t> none{0}, all{N, H * W, C}, rows{N, H, W};
  p.gpu = place.gpu();
  p.conv.y.dtype = dtype_of(z_dtype);
  Tensor y = empty(x, {N, H, W, C}, out_dtype), z = empty(x, save || !depthwise_conv_norm_joins(p) ? all : none, z_dtype);
  Tensor mean = empty(x, save ? rows : none, ScalarType::Float), rstd = empty(x, save ? rows : none, ScalarType::Float);
  p.y = mutable_array(y);
  if (z.numel() > 0) p.conv.y = mutable_array(z);
  if (save) {
    p.mean = float_data(mean);
    p.rstd = float_data(rstd);
  }
  if (shape.elements() > 0) check_launch(kOp, "forward", depthwise_conv_norm_fwd_launch(p, place.stream()));
  return {y, save ? z : empty(x, none, z_dtype), mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> depthwise_conv_norm_bwd(
    Tensor dy, Tensor x, Tensor weight, Tensor norm_weight, Tensor z, Tensor mean, Tensor rstd, std::optional<Tensor> dshortcut,
    bool need_dx, bool need_dweight, bool need_dnorm) {
  x = in_memory_order(x, true);
  const ConvShape shape = conv_shape(kOp, x, weight);
  const auto [N, H, W, C, K] = shape;
  check_array(kOp, "dy", dy, {N, H, W, C}, x);
  check_array(kOp, "z", z, {N, H * W, C}, x);
  check_array(kOp, "norm_weight", norm_weight, {C}, x);
  check_array(kOp, "mean", mean, {N, H, W}, x);
  check_array(kOp, "rstd", rstd, {N, H, W}, x);
  if (dshortcut) {
    check_array(kOp, "dshortcut", *dshortcut, {N, H, W, C}, x);
    check_like(kOp, "dshortcut", *dshortcut, {N, H, W, C}, x.scalar_type());
  }
  STD_TORCH_CHECK(mean.scalar_type() == ScalarType::Float && rstd.scalar_type() == ScalarType::Float, kOp, ": mean and rstd must be float32");

  const Place place(x);
  ConvGradients g(shape, x, weight, need_dx, need_dweight);
  Tensor dz = gradient(z, need_dx || need_dweight);
  Tensor dnorm_weight = gradient(norm_weight, need_dnorm), dnorm_bias = gradient(norm_weight, need_dnorm);
  Tensor norm_partial = floats(x, need_dnorm ? norm_bwd_floats(shape) : 0);
  if (shape.elements() == 0) {
    torch::stable::zero_(dnorm_weight);
    torch::stable::zero_(dnorm_bias);
    return {g.dx, g.dweight, g.dbias, dnorm_weight, dnorm_bias};
  }
  ConvNormBackwardParams p{};
  p.dy = array(dy);
  p.z = array(z);
  p.norm_weight = array(norm_weight);
  p.mean = static_cast<const float*>(mean.const_data_ptr());
  p.rstd = static_cast<const float*>(rstd.const_data_ptr());
  if (need_dx || need_dweight) p.dz = mutable_array(dz);
  if (need_dnorm) {
    p.dnorm_weight = mutable_array(dnorm_weight);
    p.dnorm_bias = mutable_array(dnorm_bias);
    p.norm_partial = float_data(norm_partial);
  }
  p.conv = g.params;
  p.conv.dy = {p.dz.data, p.dz.dtype};
  p.conv.dshortcut = array(dshortcut);
  p.conv.compute = p.z.dtype;  // that of the convolution's output
  if (need_dx || need_dweight || need_dnorm) check_launch(kOp, "backward", depthwise_conv_norm_bwd_launch(p, place.stream()));
  return {g.dx, g.dweight, g.dbias, dnorm_weight, dnorm_bias};
}

}  // namespace

FASTCONV_CUDA_OPS(m) {
  m.impl("depthwise_conv_norm_fwd", TORCH_BOX(&depthwise_conv_norm_fwd));
  m.impl("depthwise_conv_norm_bwd", TORCH_BOX(&depthwise_conv_norm_bwd));
}

}  // namespace fastconv::cuda

// depthwise_conv on the GPU: tensors to kernel arguments, and the pieces that depthwise_conv_norm shares.
#include "cuda/glue.h"

namespace fastconv::cuda {

ConvShape conv_shape(const char* op, const Tensor& x, const Tensor& weight) {
  check_first(op, "x", x);
  STD_TORCH_CHECK(x.dim() == 4, op, ": x must be (N, H, W, C), got ", shape_string(x));
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(2) % 2 == 1, op, ": weight must be (C, 1, K, K) with an odd K, got ", shape_string(weight));
  const ConvShape shape{x.size(0), x.size(1), x.size(2), x.size(3), weight.size(2)};
  check_array(op, "x", x, {shape.N, shape.H, shape.W, shape.C}, x);
  check_array(op, "weight", weight, {shape.C, 1, shape.K, shape.K}, x);
  return shape;
}

ConvForwardParams conv_forward_params(const char* op, const ConvShape& shape, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  if (bias) check_array(op, "bias", *bias, {shape.C}, x);
  return {shape, array(x), array(weight), array(bias), {}};
}

ConvGradients::ConvGradients(const ConvShape& shape, const Tensor& x, const Tensor& weight, bool need_dx, bool need_dweight)
    : params{},
      dx(gradient(x, need_dx)),
      dweight(gradient(weight, need_dweight)),
      dbias(empty(weight, {need_dweight ? shape.C : 0}, weight.scalar_type())),
      partial(floats(x, need_dweight ? conv_wgrad_floats(shape) : 0)) {
  params.shape = shape;
  params.x = array(x);
  params.weight = array(weight);
  params.compute = params.x.dtype;
  if (need_dx) params.dx = mutable_array(dx);
  if (need_dweight) {
    params.dweight = mutable_array(dweight);
    params.dbias = mutable_array(dbias);
    params.partial = float_data(partial);
  }
  if (shape.elements() == 0) {  // no kernel will run: sums over no pixel
    torch::stable::zero_(dweight);
    torch::stable::zero_(dbias);
  }
}

namespace {

constexpr const char* kOp = "depthwise_conv";

Tensor depthwise_conv_fwd(Tensor x, Tensor weight, std::optional<Tensor> bias, ScalarType out_dtype) {
  const ConvShape shape = conv_shape(kOp, x, weight);
  check_dtype(kOp, "out_dtype", out_dtype);
  ConvForwardParams p = conv_forward_params(kOp, shape, x, weight, bias);
  const Place place(x);
  Tensor y = empty(x, {shape.N, shape.H, shape.W, shape.C}, out_dtype);
  p.y = mutable_array(y);
  if (shape.elements() > 0) check_launch(kOp, "forward", depthwise_conv_fwd_launch(p, place.stream()));
  return y;
}

std::tuple<Tensor, Tensor, Tensor> depthwise_conv_bwd(Tensor dy, Tensor x, Tensor weight, bool need_dx, bool need_dweight) {
  x = in_memory_order(x, true);
  const ConvShape shape = conv_shape(kOp, x, weight);
  check_array(kOp, "dy", dy, {shape.N, shape.H, shape.W, shape.C}, x);
  const Place place(x);
  ConvGradients g(shape, x, weight, need_dx, need_dweight);
  g.params.dy = array(dy);
  if (shape.elements() > 0 && (need_dx || need_dweight)) check_launch(kOp, "backward", depthwise_conv_bwd_launch(g.params, place.stream()));
  return {g.dx, g.dweight, g.dbias};
}

}  // namespace

FASTCONV_CUDA_OPS(m) {
  m.impl("depthwise_conv_fwd", TORCH_BOX(&depthwise_conv_fwd));
  m.impl("depthwise_conv_bwd", TORCH_BOX(&depthwise_conv_bwd));
}

}  // namespace fastconv::cuda

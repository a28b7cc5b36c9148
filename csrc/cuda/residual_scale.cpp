// residual_scale on the GPU: tensors to kernel arguments.
#include "cuda/residual_scale_kernel.h"

#include "cuda/glue.h"

namespace fastconv::cuda {
namespace {

constexpr const char* kOp = "residual_scale";

// What both passes take; `name` is the argument that is added to, or comes back, at the result's shape.
template <class Params> Params params(const char* name, const Tensor& other, const Tensor& y, const std::optional<Tensor>& gamma, const std::optional<Tensor>& mask) {
  check_first(kOp, "y", y);
  STD_TORCH_CHECK(y.dim() == 3, kOp, ": y must be (N, L, C), got ", shape_string(y));
  Params p{};
  p.N = y.size(0), p.L = y.size(1), p.C = y.size(2);
  check_array(kOp, "y", y, {p.N, p.L, p.C}, y);
  check_array(kOp, name, other, {p.N, p.L, p.C}, y);
  if (gamma) check_array(kOp, "gamma", *gamma, {p.C}, y);
  if (mask) check_array(kOp, "mask", *mask, {p.N}, y);
  p.y = array(y);
  p.gamma = array(gamma);
  p.mask = array(mask);
  return p;
}

Tensor residual_scale_fwd(Tensor shortcut, Tensor y, std::optional<Tensor> gamma, std::optional<Tensor> mask, ScalarType out_dtype) {
  auto p = params<ResidualScaleForwardParams>("shortcut", shortcut, y, gamma, mask);
  check_dtype(kOp, "out_dtype", out_dtype);
  const Place place(y);
  Tensor out = empty(y, {p.N, p.L, p.C}, out_dtype);
  p.shortcut = array(shortcut);
  p.out = mutable_array(out);
  if (y.numel() > 0) check_launch(kOp, "forward", residual_scale_fwd_launch(p, place.stream()));
  return out;
}

std::tuple<Tensor, Tensor> residual_scale_bwd(Tensor dout, Tensor y, std::optional<Tensor> gamma, std::optional<Tensor> mask, bool need_dy, bool need_dgamma) {
  auto p = params<ResidualScaleBackwardParams>("dout", dout, y, gamma, mask);
  const Place place(y);
  Tensor dy = gradient(y, need_dy), dgamma = empty(y, {need_dgamma ? p.C : 0}, gamma ? gamma->scalar_type() : y.scalar_type());
  if (y.numel() == 0) return {dy, torch::stable::zero_(dgamma)};
  Tensor partial = floats(y, need_dgamma ? residual_scale_slices(p.N * p.L, p.C) * p.C : 0);
  p.dout = array(dout);
  if (need_dy) p.dy = mutable_array(dy);
  if (need_dgamma) {
    p.dgamma = mutable_array(dgamma);
    p.partial = float_data(partial);
  }
  if (need_dy || need_dgamma) check_launch(kOp, "backward", residual_scale_bwd_launch(p, place.stream()));
  return {dy, dgamma};
}

}  // namespace

FASTCONV_CUDA_OPS(m) {
  m.impl("residual_scale_fwd", TORCH_BOX(&residual_scale_fwd));
  m.impl("residual_scale_bwd", TORCH_BOX(&residual_scale_bwd));
}

}  // namespace fastconv::cuda

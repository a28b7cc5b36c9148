// residual_scale on the CPU: tensors to kernel arguments.
#include "cpu/glue.h"

namespace fastconv::cpu {
namespace {

constexpr const char* kOp = "residual_scale";

struct Factors {
  std::optional<Tensor> gamma, mask;  // in the accumulation type; they own what ResidualParams points to
};

Factors fill(ResidualParams& p, const Tensor& y, const std::optional<Tensor>& gamma, const std::optional<Tensor>& mask) {
  STD_TORCH_CHECK(y.dim() == 3, kOp, ": y must be (N, L, C), got ", shape_string(y));
  p.N = y.size(0), p.L = y.size(1), p.C = y.size(2);
  check_tensor(kOp, "y", y, {p.N, p.L, p.C}, y.scalar_type());
  const ScalarType acc = accumulation_type(y.scalar_type());
  Factors f;
  if (gamma) {
    check_tensor(kOp, "gamma", *gamma, {p.C}, y.scalar_type());
    f.gamma = in_type(*gamma, acc);
    p.gamma = f.gamma->const_data_ptr();
  }
  if (mask) {
    check_tensor(kOp, "mask", *mask, {p.N}, y.scalar_type());
    f.mask = in_type(*mask, acc);
    p.mask = f.mask->const_data_ptr();
  }
  p.y = array(y);
  p.slices = pixel_slices(p.N * p.L);
  return f;
}

Tensor residual_scale_fwd(Tensor shortcut, Tensor y, std::optional<Tensor> gamma, std::optional<Tensor> mask, ScalarType out_dtype) {
  ResidualParams p{};
  const Factors factors = fill(p, y, gamma, mask);
  check_tensor(kOp, "shortcut", shortcut, {p.N, p.L, p.C}, y.scalar_type());
  check_dtype(kOp, "out_dtype", out_dtype, y.scalar_type());
  Tensor out = empty(y, {p.N, p.L, p.C}, out_dtype);
  if (y.numel() == 0) return out;
  p.shortcut = array(shortcut);
  p.out = mutable_array(out);
  run(p, p.slices, kernels().residual_scratch, kernels().residual_forward);
  return out;
}

std::tuple<Tensor, Tensor> residual_scale_bwd(Tensor dout, Tensor y, std::optional<Tensor> gamma, std::optional<Tensor> mask, bool need_dy, bool need_dgamma) {
  ResidualParams p{};
  const Factors factors = fill(p, y, gamma, mask);
  check_tensor(kOp, "dout", dout, {p.N, p.L, p.C}, y.scalar_type());
  const ScalarType acc = accumulation_type(y.scalar_type()), gamma_type = gamma ? gamma->scalar_type() : y.scalar_type();
  Tensor dy = need_dy ? torch::stable::empty_like(y) : nothing(y, y.scalar_type());
  if (y.numel() == 0) return {dy, need_dgamma ? torch::stable::new_zeros(y, {p.C}, gamma_type) : nothing(y, gamma_type)};
  Tensor partial = need_dgamma ? empty(y, {p.slices, p.C}, acc) : nothing(y, acc);
  p.dout = array(dout);
  if (need_dy) p.dy = mutable_array(dy);
  p.partial = need_dgamma ? partial.mutable_data_ptr() : nullptr;
  run(p, p.slices, kernels().residual_scratch, kernels().residual_backward);
  return {dy, need_dgamma ? in_type(reduce(partial, p.slices, p.C), gamma_type) : nothing(y, gamma_type)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastconv, CPU, m) {
  m.impl("residual_scale_fwd", TORCH_BOX(&residual_scale_fwd));
  m.impl("residual_scale_bwd", TORCH_BOX(&residual_scale_bwd));
}

}  // namespace fastconv::cpu

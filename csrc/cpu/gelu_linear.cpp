// The passes of gelu_linear over activations on the CPU: tensors to kernel arguments.
#include "cpu/glue.h"

namespace fastconv::cpu {
namespace {

constexpr const char* kOp = "gelu_linear";

GeluParams params(const Tensor& x, bool tanh) {
  STD_TORCH_CHECK(x.dim() == 1, kOp, ": x must be flat, got ", shape_string(x));
  check_tensor(kOp, "x", x, {x.size(0)}, x.scalar_type());
  GeluParams p{};
  p.count = x.numel();
  p.act = tanh ? Activation::kGeluTanh : Activation::kGelu;
  p.x = array(x);
  return p;
}

void run_chunks(const GeluParams& p) { run(p, ceil_div(p.count, kChunk), kernels().gelu_scratch, kernels().gelu); }

Tensor gelu_linear_fwd(Tensor x, bool tanh, ScalarType out_dtype) {
  GeluParams p = params(x, tanh);
  check_dtype(kOp, "out_dtype", out_dtype, x.scalar_type());
  Tensor y = empty(x, {p.count}, out_dtype);
  if (p.count == 0) return y;
  p.y = mutable_array(y);
  run_chunks(p);
  return y;
}

Tensor gelu_linear_bwd(Tensor dy, Tensor x, bool tanh, bool recompute) {
  GeluParams p = params(x, tanh);
  check_tensor(kOp, "dy", dy, {p.count}, x.scalar_type());
  Tensor dx = torch::stable::empty_like(x);
  if (p.count == 0) return dx;
  p.dy = array(dy);
  p.dx = mutable_array(dx);
  if (recompute) p.y = mutable_array(dy);
  run_chunks(p);
  return dx;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastconv, CPU, m) {
  m.impl("gelu_linear_fwd", TORCH_BOX(&gelu_linear_fwd));
  m.impl("gelu_linear_bwd", TORCH_BOX(&gelu_linear_bwd));
}

}  // namespace fastconv::cpu

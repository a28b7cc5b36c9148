// depthwise_conv on the CPU: tensors to kernel arguments, and the pieces that depthwise_conv_norm shares.
#include "cpu/glue.h"

namespace fastconv::cpu {

ConvShape conv_shape(const char* op, const Tensor& x, const Tensor& weight) {
  STD_TORCH_CHECK(x.dim() == 4, op, ": x must be (N, H, W, C), got ", shape_string(x));
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(2) % 2 == 1, op, ": weight must be (C, 1, K, K) with an odd K, got ", shape_string(weight));
  const ConvShape shape{x.size(0), x.size(1), x.size(2), x.size(3), weight.size(2)};
  check_tensor(op, "x", x, {shape.N, shape.H, shape.W, shape.C}, x.scalar_type());
  check_tensor(op, "weight", weight, {shape.C, 1, shape.K, shape.K}, x.scalar_type());
  return shape;
}

Tensor pack_weight(const Tensor& weight, const ConvShape& shape, bool flip, ScalarType acc) {
  const Kernels& k = kernels();
  const int64_t lanes = k.vector_bytes / (acc == ScalarType::Double ? 8 : 4), blocks = ceil_div(shape.C, lanes);
  Tensor packed = empty(weight, {blocks * shape.K * shape.K * lanes}, acc);
  torch::stable::parallel_for(0, blocks, 8, [&](int64_t begin, int64_t end) {
    k.pack_weight(shape, array(weight), flip, acc == ScalarType::Double, packed.mutable_data_ptr(), begin, end);
  });
  return packed;
}

Tensor bias_or_zeros(const char* op, const std::optional<Tensor>& bias, const Tensor& x, int64_t C, ScalarType acc) {
  if (!bias) return torch::stable::new_zeros(x, {C}, acc);
  check_tensor(op, "bias", *bias, {C}, x.scalar_type());
  return in_type(*bias, acc);
}

ForwardParams forward_params(const ConvShape& shape, const Tensor& x, const Tensor& packed, const Tensor& bias) {
  ForwardParams p{};
  p.shape = shape;
  p.bands = forward_bands(shape, torch::stable::get_num_threads());
  p.x = array(x);
  p.packed = packed.const_data_ptr();
  p.bias = bias.const_data_ptr();
  return p;
}

std::tuple<Tensor, Tensor, Tensor> conv_backward(BackwardParams& p, const Tensor& x, const Tensor& weight, bool need_dx, bool need_dweight) {
  const Kernels& k = kernels();
  const ScalarType type = weight.scalar_type(), acc = accumulation_type(x.scalar_type());
  const int64_t C = p.shape.C, taps = p.shape.K * p.shape.K, lanes = k.vector_bytes / dtype_size(dtype_of(acc)), blocks = ceil_div(C, lanes);
  Tensor dx = need_dx ? torch::stable::empty_like(x) : nothing(x, x.scalar_type());
  Tensor packed = pack_weight(weight, p.shape, true, acc);
  Tensor partial = need_dweight ? empty(x, {p.plan.slices, blocks, taps + 1, lanes}, acc) : nothing(x, acc);
  p.packed = packed.const_data_ptr();
  p.x = array(x);
  if (need_dx) p.dx = mutable_array(dx);
  p.partial = need_dweight ? partial.mutable_data_ptr() : nullptr;
  run(p, p.plan.slices * p.plan.groups, k.backward_scratch, k.backward);
  if (!need_dweight) return {dx, nothing(weight, type), nothing(weight, type)};

  Tensor sum = reduce(partial, p.plan.slices, blocks * (taps + 1) * lanes);
  Tensor dweight = empty(weight, {C, 1, p.shape.K, p.shape.K}, acc), dbias = empty(weight, {C}, acc);
  with_accumulation(acc, [&](auto* type_pointer) {
    using A = std::remove_pointer_t<decltype(type_pointer)>;
    const A* from = static_cast<const A*>(sum.const_data_ptr());
    A* to = static_cast<A*>(dweight.mutable_data_ptr());
    A* to_bias = static_cast<A*>(dbias.mutable_data_ptr());
    torch::stable::parallel_for(0, C, 64, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) {
        const A* column = from + c / lanes * (taps + 1) * lanes + c % lanes;
        for (int64_t tap = 0; tap < taps; ++tap) to[c * taps + tap] = column[tap * lanes];
        to_bias[c] = column[taps * lanes];
      }
    });
  });
  return {dx, in_type(dweight, type), in_type(dbias, type)};
}

BackwardParams backward_params(const ConvShape& shape, bool norm, const Tensor& dy) {
  BackwardParams p{};
  p.shape = shape;
  const int64_t lanes = kernels().vector_bytes / dtype_size(dtype_of(accumulation_type(dy.scalar_type())));
  p.plan = backward_plan(shape, ceil_div(shape.C, lanes), norm);
  p.dy = array(dy);
  return p;
}

namespace {

constexpr const char* kOp = "depthwise_conv";

Tensor depthwise_conv_fwd(Tensor x, Tensor weight, std::optional<Tensor> bias, ScalarType out_dtype) {
  const ConvShape shape = conv_shape(kOp, x, weight);
  check_dtype(kOp, "out_dtype", out_dtype, x.scalar_type());
  const ScalarType acc = accumulation_type(x.scalar_type());
  Tensor y = empty(x, {shape.N, shape.H, shape.W, shape.C}, out_dtype);
  Tensor packed = pack_weight(weight, shape, false, acc), bias_acc = bias_or_zeros(kOp, bias, x, shape.C, acc);
  ForwardParams p = forward_params(shape, x, packed, bias_acc);
  p.y = mutable_array(y);
  run(p, p.bands.count, kernels().forward_scratch, kernels().forward);
  return y;
}

std::tuple<Tensor, Tensor, Tensor> depthwise_conv_bwd(Tensor dy, Tensor x, Tensor weight, bool need_dx, bool need_dweight) {
  x = in_memory_order(x, true);
  const ConvShape shape = conv_shape(kOp, x, weight);
  check_tensor(kOp, "dy", dy, {shape.N, shape.H, shape.W, shape.C}, x.scalar_type());
  BackwardParams p = backward_params(shape, false, dy);
  if (!need_dx && !need_dweight) return {nothing(x, x.scalar_type()), nothing(weight, weight.scalar_type()), nothing(weight, weight.scalar_type())};
  return conv_backward(p, x, weight, need_dx, need_dweight);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastconv, CPU, m) {
  m.impl("depthwise_conv_fwd", TORCH_BOX(&depthwise_conv_fwd));
  m.impl("depthwise_conv_bwd", TORCH_BOX(&depthwise_conv_bwd));
}

}  // namespace fastconv::cpu

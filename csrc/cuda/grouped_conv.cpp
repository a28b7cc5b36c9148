// grouped_conv on the GPU: tensors to kernel arguments.
#include "cuda/glue.h"
#include "cuda/grouped_conv_mma_kernel.h"

namespace fastconv::cuda {
namespace {

constexpr const char* kOp = "grouped_conv";

// The shape of a call that the kernels serve. Others are torch's own kernel's: the hub asks before it calls.
GroupedConvShape grouped_shape(const Tensor& x, const Tensor& weight, int64_t stride_h, int64_t stride_w, int64_t padding_h,
                               int64_t padding_w, int64_t groups, bool nhwc) {
  check_first(kOp, "x", x);
  STD_TORCH_CHECK(x.dim() == 4 && weight.dim() == 4, kOp, ": x and weight must have 4 dimensions");
  const GroupedConvShape s{x.size(0), x.size(1), x.size(2), x.size(3), weight.size(2), stride_h, padding_h, padding_w, groups};
  STD_TORCH_CHECK(s.C > 0 && groups > 0 && s.C % groups == 0, kOp, ": groups must divide the channels of x, C=", s.C, ", got ", groups);
  STD_TORCH_CHECK(padding_h >= 0 && padding_w >= 0, kOp, ": padding must not be negative, got ", padding_h, " and ", padding_w);
  check_array(kOp, "weight", weight, {s.C, s.width(), s.K, s.K}, x);
  STD_TORCH_CHECK(nhwc && stride_h == stride_w && s.H + 2 * padding_h >= s.K && s.W + 2 * padding_w >= s.K && grouped_serves(s), kOp,
                  ": no CUDA kernel serves this call (channels_last, 3x3 taps, stride 1 or 2, 2 to 32 channels a group); "
                  "use torch.nn.functional.conv2d");
  check_array(kOp, "x", x, {s.N, s.H, s.W, s.C}, x);
  const bool filters = weight.scalar_type() == ScalarType::Float || weight.scalar_type() == x.scalar_type();
  STD_TORCH_CHECK(x.scalar_type() != ScalarType::Float && filters, kOp, ": the CUDA kernels take bfloat16 or float16 maps, "
                  "and filters of their dtype or float32");
  return s;
}

Tensor grouped_conv_fwd(Tensor x, Tensor weight, std::optional<Tensor> bias, int64_t stride_h, int64_t stride_w, int64_t padding_h,
                        int64_t padding_w, int64_t groups, bool nhwc, ScalarType out_dtype) {
  const GroupedConvShape s = grouped_shape(x, weight, stride_h, stride_w, padding_h, padding_w, groups, nhwc);
  if (bias) check_array(kOp, "bias", *bias, {s.C}, x);
  STD_TORCH_CHECK(out_dtype == x.scalar_type(), kOp, ": out_dtype must be the dtype of x");
  const Place place(x);
  Tensor y = empty_map(x, s.N, s.C, s.out_H(), s.out_W(), out_dtype, nhwc);
  const GroupedConvParams p{s, array(x), array(weight), array(bias), mutable_array(y), false};
  if (s.N > 0) check_launch(kOp, "forward", grouped_conv_mma_launch(p, place.stream()));
  return y;
}

std::tuple<Tensor, Tensor, Tensor> grouped_conv_bwd(Tensor dy, Tensor map, Tensor weight, int64_t stride_h, int64_t stride_w,
                                                    int64_t padding_h, int64_t padding_w, int64_t groups, bool nhwc, bool need_dx,
                                                    bool need_dweight) {
  const Tensor x = in_memory_order(map, nhwc);
  const GroupedConvShape s = grouped_shape(x, weight, stride_h, stride_w, padding_h, padding_w, groups, nhwc);
  check_array(kOp, "dy", dy, {s.N, s.out_H(), s.out_W(), s.C}, x);
  STD_TORCH_CHECK(dy.scalar_type() == x.scalar_type(), kOp, ": dy must have the dtype of x");
  const Place place(x);
  Tensor dx = gradient(x, need_dx), dweight = gradient(weight, need_dweight);
  Tensor dbias = empty(weight, {need_dweight ? s.C : 0}, weight.scalar_type());
  const Tensor partial = floats(x, need_dweight ? grouped_wgrad_floats(s) : 0);
  if (s.N == 0) return {dx, torch::stable::zero_(dweight), torch::stable::zero_(dbias)};
  if (need_dx) {
    const GroupedConvParams p{s, array(dy), array(weight), {}, mutable_array(dx), true};
    check_launch(kOp, "input gradient", grouped_conv_mma_launch(p, place.stream()));
  }
  if (need_dweight) {
    const GroupedWgradParams p{s, array(x), array(dy), mutable_array(dweight), mutable_array(dbias), float_data(partial)};
    check_launch(kOp, "weight gradient", grouped_conv_mma_wgrad_launch(p, place.stream()));
  }
  return {dx, dweight, dbias};
}

}  // namespace

FASTCONV_CUDA_OPS(m) {
  m.impl("grouped_conv_fwd", TORCH_BOX(&grouped_conv_fwd));
  m.impl("grouped_conv_bwd", TORCH_BOX(&grouped_conv_bwd));
}

}  // namespace fastconv::cuda

// window_attention on the GPU: tensors to kernel arguments.
#include "cuda/glue.h"
#include "cuda/reduce_kernel.h"
#include "cuda/window_attention_kernel.h"

namespace fastconv::cuda {
namespace {

constexpr const char* kOp = "window_attention";

using Optional = std::optional<Tensor>;

const float* small(const char* name, const Optional& t, std::initializer_list<int64_t> shape, const Tensor& q) {
  if (!t) return nullptr;
  check_array(kOp, name, *t, shape, q);
  STD_TORCH_CHECK(t->scalar_type() == ScalarType::Float, kOp, ": ", name, " must be float32");
  return static_cast<const float*>(t->const_data_ptr());
}

WindowParams window_params(const Place& place, const Tensor& q, const Tensor& k, const Tensor& v, const Optional& table,
                           const Optional& logit_scale, const Optional& pad, int64_t wh, int64_t ww, int64_t sh, int64_t sw, bool pad_first,
                           double scale, double mask_value, bool backward) {
  check_first(kOp, "q", q);
  STD_TORCH_CHECK(on_device(q), kOp, ": q must be on a CUDA device");
  STD_TORCH_CHECK(q.scalar_type() == ScalarType::BFloat16 || q.scalar_type() == ScalarType::Half, kOp,
                  ": the CUDA kernels take bfloat16 or float16; use FASTCONV_BACKEND=triton for float32");
  STD_TORCH_CHECK(q.dim() == 5, kOp, ": q must be (B, H, W, heads, head_dim), got ", shape_string(q));
  STD_TORCH_CHECK(wh > 0 && ww > 0 && sh >= 0 && sh < wh && sw >= 0 && sw < ww, kOp, ": the shift must be less than the window, got ", sh, ", ",
                  sw, " and ", wh, ", ", ww);
  WindowParams p{};
  p.shape = {q.size(0), q.size(1), q.size(2), q.size(3), q.size(4), wh, ww};
  p.sh = static_cast<int>(sh), p.sw = static_cast<int>(sw), p.pad_first = pad_first, p.dtype = dtype_of(q.scalar_type());
  p.scale = static_cast<float>(scale), p.mask_value = static_cast<float>(mask_value), p.slices = window_slices(p.shape);
  p.windows = p.shape.windows(), p.sizes = window_sizes(p.shape);
  const int64_t D = p.shape.D, heads = p.shape.heads;
  if (q.numel() > 0) {
    p.plan = window_plan(p.shape, backward, place.gpu().shared);
    STD_TORCH_CHECK(p.plan.warps > 0, kOp, ": the CUDA kernels take windows of 24 x 24 tokens and a head_dim of 128 at most, as far as a block has "
                    "the shared memory, got ", wh, " x ", ww, " and ", D, "; use FASTCONV_BACKEND=eager");
  }
  const char* pads = nullptr;
  if (pad) {
    check_array(kOp, "pad", *pad, {3, heads, D}, q);
    STD_TORCH_CHECK(pad->scalar_type() == q.scalar_type(), kOp, ": pad must have the dtype of q");
    pads = static_cast<const char*>(pad->const_data_ptr());
  }
  p.vectors = D % 8 == 0 && reinterpret_cast<uintptr_t>(pads) % 16 == 0;
  const Tensor* parts[] = {&q, &k, &v};
  const char* names[] = {"q", "k", "v"};
  WindowInput* inputs[] = {&p.q, &p.k, &p.v};
  for (int64_t i = 0; i < 3; ++i) {
    const Tensor& t = *parts[i];
    STD_TORCH_CHECK(on_device(t) && t.get_device_index() == q.get_device_index(), kOp, ": ", names[i], " must be on the CUDA device of q");
    STD_TORCH_CHECK(t.dim() == 5 && t.scalar_type() == q.scalar_type(), kOp, ": ", names[i], " must be as q is, got ", shape_string(t));
    for (int64_t d = 0; d < 5; ++d) STD_TORCH_CHECK(t.size(d) == q.size(d), kOp, ": ", names[i], " must have the shape of q, got ", shape_string(t));
    STD_TORCH_CHECK(D <= 1 || t.numel() == 0 || t.stride(4) == 1, kOp, ": ", names[i], " must have a last stride of 1, got ", t.stride(4));
    *inputs[i] = {t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2), t.stride(3), pads ? pads + i * heads * D * 2 : nullptr};
    p.vectors = p.vectors && reinterpret_cast<uintptr_t>(inputs[i]->data) % 16 == 0;
    for (int64_t d = 0; d < 4; ++d) p.vectors = p.vectors && (t.size(d) == 1 || t.stride(d) % 8 == 0);
  }
  p.table = small("table", table, {p.shape.positions(), heads}, q);
  p.logit_scale = small("logit_scale", logit_scale, {heads}, q);
  return p;
}

Tensor window_attention_fwd(Tensor q, Tensor k, Tensor v, Optional table, Optional logit_scale, Optional pad, int64_t wh, int64_t ww, int64_t sh,
                            int64_t sw, bool pad_first, double scale, double mask_value) {
  const Place place(q);
  WindowParams p = window_params(place, q, k, v, table, logit_scale, pad, wh, ww, sh, sw, pad_first, scale, mask_value, false);
  const WindowShape& s = p.shape;
  Tensor y = empty(q, {s.B, s.H, s.W, s.heads * s.D}, q.scalar_type());
  p.out = y.mutable_data_ptr();
  if (q.numel() > 0) check_launch(kOp, "forward", window_attention_mma_launch(p, place.stream()));
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> window_attention_bwd(Tensor dy, Tensor q, Tensor k, Tensor v, Optional table, Optional logit_scale,
                                                                Optional pad, int64_t wh, int64_t ww, int64_t sh, int64_t sw, bool pad_first,
                                                                double scale, double mask_value) {
  const Place place(q);
  WindowParams p = window_params(place, q, k, v, table, logit_scale, pad, wh, ww, sh, sw, pad_first, scale, mask_value, true);
  const WindowShape& s = p.shape;
  const int64_t C = s.heads * s.D;
  check_array(kOp, "dy", dy, {s.B, s.H, s.W, C}, q);
  STD_TORCH_CHECK(dy.scalar_type() == q.scalar_type(), kOp, ": dy must have the dtype of q");
  Tensor dqkv = empty(q, {s.B, s.H, s.W, 3, s.heads, s.D}, q.scalar_type());
  const auto sums = [&](bool given, std::vector<int64_t> shape) {
    if (!given) shape = {0};
    return q.numel() > 0 ? empty(q, shape, ScalarType::Float) : torch::stable::new_zeros(q, shape, ScalarType::Float);
  };
  Tensor dtable = sums(table.has_value(), {s.positions(), s.heads}), dlogit_scale = sums(logit_scale.has_value(), {s.heads});
  Tensor dpad = sums(pad.has_value(), {3, s.heads, s.D});
  if (q.numel() == 0) return {dqkv, dtable, dlogit_scale, dpad};
  p.partial_floats = dtable.numel() + dlogit_scale.numel() + dpad.numel();
  const Tensor partial = floats(q, p.slices * p.partial_floats);
  float* next = float_data(partial);
  const auto part = [&](const Tensor& t) {
    float* const begin = t.numel() > 0 ? next : nullptr;
    next += t.numel();
    return begin;
  };
  p.dtable = part(dtable), p.dlogit_scale = part(dlogit_scale), p.dpad = part(dpad);
  p.dy = {dy.const_data_ptr(), s.H * s.W * C, s.W * C, C, s.D, nullptr};
  p.vectors = p.vectors && reinterpret_cast<uintptr_t>(p.dy.data) % 16 == 0;
  p.out = dqkv.mutable_data_ptr();
  check_launch(kOp, "backward", window_attention_mma_bwd_launch(p, place.stream()));
  const auto add = [&](const float* from, const Tensor& to) {
    if (from)
      check_launch(kOp, "gradient sum", reduce_partials_launch(from, p.slices, p.partial_floats, to.numel(), mutable_array(to), place.stream()));
  };
  add(p.dtable, dtable), add(p.dlogit_scale, dlogit_scale), add(p.dpad, dpad);
  return {dqkv, dtable, dlogit_scale, dpad};
}

}  // namespace

FASTCONV_CUDA_OPS(m) {
  m.impl("window_attention_fwd", TORCH_BOX(&window_attention_fwd));
  m.impl("window_attention_bwd", TORCH_BOX(&window_attention_bwd));
}

}  // namespace fastconv::cuda

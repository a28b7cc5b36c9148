// window_attention on the CPU: tensors to kernel arguments.
#include <algorithm>

#include "cpu/glue.h"

namespace fastconv::cpu {
namespace {

constexpr const char* kOp = "window_attention";

// Windows of a head that one task takes, and one partial sum of the gradients of the small tensors covers.
constexpr int64_t kWindowsOfTask = 16;

struct Call {
  WindowParams p{};
  std::optional<Tensor> table, logit_scale, pad;  // in the accumulation type; they own what p points to
};

Call call(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& table, const std::optional<Tensor>& logit_scale,
          const std::optional<Tensor>& pad, int64_t wh, int64_t ww, int64_t sh, int64_t sw, bool pad_first, double scale, double mask_value) {
  Call c;
  WindowParams& p = c.p;
  STD_TORCH_CHECK(q.dim() == 5, kOp, ": q must be (B, H, W, heads, head_dim), got ", shape_string(q));
  p.B = q.size(0), p.H = q.size(1), p.W = q.size(2), p.heads = q.size(3), p.D = q.size(4);
  STD_TORCH_CHECK(wh > 0 && ww > 0 && sh >= 0 && sh < wh && sw >= 0 && sw < ww, kOp, ": the shift must be less than the window, got ", sh, ", ", sw,
                  " and ", wh, ", ", ww);
  p.wh = wh, p.ww = ww, p.sh = sh, p.sw = sw, p.pad_first = pad_first;
  p.rows = ceil_div(p.H, wh), p.columns = ceil_div(p.W, ww);
  p.slices = std::max<int64_t>(1, ceil_div(p.B * p.rows * p.columns, kWindowsOfTask));
  p.scale = scale, p.mask_value = mask_value;
  const Tensor* parts[] = {&q, &k, &v};
  const char* names[] = {"q", "k", "v"};
  Array* arrays[] = {&p.q, &p.k, &p.v};
  for (int64_t i = 0; i < 3; ++i) {
    const Tensor& t = *parts[i];
    check_dtype(kOp, names[i], t.scalar_type(), q.scalar_type());
    STD_TORCH_CHECK(t.dim() == 5 && t.scalar_type() == q.scalar_type(), kOp, ": ", names[i], " must be as q is, got ", shape_string(t));
    for (int64_t d = 0; d < 5; ++d) STD_TORCH_CHECK(t.size(d) == q.size(d), kOp, ": ", names[i], " must have the shape of q, got ", shape_string(t));
    STD_TORCH_CHECK(p.D <= 1 || t.numel() == 0 || t.stride(4) == 1, kOp, ": ", names[i], " must have a last stride of 1, got ", t.stride(4));
    for (int64_t d = 0; d < 4; ++d) p.stride[i][d] = t.stride(d);
    *arrays[i] = array(t);
  }
  const ScalarType acc = accumulation_type(q.scalar_type());
  const auto small = [&](const char* name, const std::optional<Tensor>& t, std::initializer_list<int64_t> shape, std::optional<Tensor>& kept,
                         const void*& data) {
    if (!t) return;
    check_tensor(kOp, name, *t, shape, q.scalar_type());
    kept = in_type(*t, acc);
    data = kept->const_data_ptr();
  };
  small("table", table, {(2 * wh - 1) * (2 * ww - 1), p.heads}, c.table, p.table);
  small("logit_scale", logit_scale, {p.heads}, c.logit_scale, p.logit_scale);
  small("pad", pad, {3, p.heads, p.D}, c.pad, p.pad);
  return c;
}

Tensor window_attention_fwd(Tensor q, Tensor k, Tensor v, std::optional<Tensor> table, std::optional<Tensor> logit_scale,
                            std::optional<Tensor> pad, int64_t wh, int64_t ww, int64_t sh, int64_t sw, bool pad_first, double scale,
                            double mask_value) {
  Call c = call(q, k, v, table, logit_scale, pad, wh, ww, sh, sw, pad_first, scale, mask_value);
  WindowParams& p = c.p;
  Tensor y = empty(q, {p.B, p.H, p.W, p.heads * p.D}, q.scalar_type());
  p.out = mutable_array(y);
  if (q.numel() > 0) run(p, p.slices * p.heads, kernels().window_scratch, kernels().window_attention);
  return y;
}

// Sums over the slices, in order, of partials [slices][heads][positions + 1 + 3 D] into the gradients of the small tensors.
template <class A> void add_partials(const WindowParams& p, int64_t positions, A* dtable, A* dlogit_scale, A* dpad) {
  const int64_t count = positions + 1 + 3 * p.D;
  const A* partial = static_cast<const A*>(p.partial);
  torch::stable::parallel_for(0, p.heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t head = begin; head < end; ++head)
      for (int64_t slice = 0; slice < p.slices; ++slice) {
        const A* from = partial + (slice * p.heads + head) * count;
        for (int64_t i = 0; dtable && i < positions; ++i) dtable[i * p.heads + head] += from[i];
        if (dlogit_scale) dlogit_scale[head] += from[positions];
        for (int64_t i = 0; dpad && i < 3 * p.D; ++i) dpad[(i / p.D * p.heads + head) * p.D + i % p.D] += from[positions + 1 + i];
      }
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> window_attention_bwd(Tensor dy, Tensor q, Tensor k, Tensor v, std::optional<Tensor> table,
                                                                std::optional<Tensor> logit_scale, std::optional<Tensor> pad, int64_t wh,
                                                                int64_t ww, int64_t sh, int64_t sw, bool pad_first, double scale,
                                                                double mask_value) {
  Call c = call(q, k, v, table, logit_scale, pad, wh, ww, sh, sw, pad_first, scale, mask_value);
  WindowParams& p = c.p;
  const int64_t positions = (2 * wh - 1) * (2 * ww - 1);
  check_tensor(kOp, "dy", dy, {p.B, p.H, p.W, p.heads * p.D}, q.scalar_type());
  STD_TORCH_CHECK(dy.scalar_type() == q.scalar_type(), kOp, ": dy must have the dtype of q");
  const ScalarType acc = accumulation_type(q.scalar_type());
  Tensor dqkv = empty(q, {p.B, p.H, p.W, 3, p.heads, p.D}, q.scalar_type());
  const auto zeros = [&](bool given, std::vector<int64_t> shape) { return given ? torch::stable::new_zeros(q, shape, acc) : nothing(q, acc); };
  Tensor dtable = zeros(table.has_value(), {positions, p.heads}), dlogit_scale = zeros(logit_scale.has_value(), {p.heads});
  Tensor dpad = zeros(pad.has_value(), {3, p.heads, p.D});
  if (q.numel() == 0) return {dqkv, dtable, dlogit_scale, dpad};
  Tensor partial = empty(q, {p.slices, p.heads, positions + 1 + 3 * p.D}, acc);
  p.dy = array(dy), p.out = mutable_array(dqkv), p.partial = partial.mutable_data_ptr();
  run(p, p.slices * p.heads, kernels().window_scratch, kernels().window_attention);
  with_accumulation(acc, [&](auto* type) {
    using A = std::remove_pointer_t<decltype(type)>;
    const auto data = [](const Tensor& t) { return t.numel() > 0 ? static_cast<A*>(t.mutable_data_ptr()) : nullptr; };
    add_partials<A>(p, positions, data(dtable), data(dlogit_scale), data(dpad));
  });
  return {dqkv, dtable, dlogit_scale, dpad};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastconv, CPU, m) {
  m.impl("window_attention_fwd", TORCH_BOX(&window_attention_fwd));
  m.impl("window_attention_bwd", TORCH_BOX(&window_attention_bwd));
}

}  // namespace fastconv::cpu

// window_attention on the CPU: tensors to kernel arguments.
#include <algorithm>

#include "cpu/glue.h"

namespace fastconv::cpu {
namespace {

constexpr const char* kOp = "window_attention";
constexpr int64_t kChunks = 16, kPartialElements = 1 << 22;

struct Settings {
  int64_t wh, ww, sh, sw;
  double scale, mask_value;
  bool pad_first;
};

Tokens tokens_of(const char* name, const Tensor& t, const Tensor& q) {
  STD_TORCH_CHECK(t.dim() == 5, kOp, ": ", name, " must be (B, H, W, heads, D), got ", shape_string(t));
  for (int64_t i = 0; i < 5; ++i) STD_TORCH_CHECK(t.size(i) == q.size(i), kOp, ": ", name, " must have the shape of q ", shape_string(q), ", got ", shape_string(t));
  STD_TORCH_CHECK(t.scalar_type() == q.scalar_type() && is_float_type(t.scalar_type()), kOp, ": ", name, " must have the dtype of q, a floating-point one");
  STD_TORCH_CHECK(t.size(4) <= 1 || t.stride(4) == 1, kOp, ": the channels of ", name, " must be contiguous; pass ", name, ".contiguous()");
  return {array(t), t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}

const void* optional_data(const char* name, const std::optional<Tensor>& t, std::initializer_list<int64_t> shape, ScalarType acc) {
  if (!t) return nullptr;
  check_tensor(kOp, name, *t, shape, acc);
  STD_TORCH_CHECK(t->scalar_type() == acc, kOp, ": ", name, " must be in the accumulation dtype");
  return t->const_data_ptr();
}

AttentionParams params(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& bias, const std::optional<Tensor>& logit_scale,
                       const std::optional<Tensor>& pad_bias, const Settings& s) {
  AttentionParams p{};
  p.q = tokens_of("q", q, q), p.k = tokens_of("k", k, q), p.v = tokens_of("v", v, q);
  STD_TORCH_CHECK(s.wh > 0 && s.ww > 0 && s.sh >= 0 && s.sh < s.wh && s.sw >= 0 && s.sw < s.ww, kOp,
                  ": window must be positive and shift at least 0 and less than it, got ", s.wh, ", ", s.ww, " and ", s.sh, ", ", s.sw);
  p.B = q.size(0), p.H = q.size(1), p.W = q.size(2), p.heads = q.size(3), p.D = q.size(4);
  p.wh = s.wh, p.ww = s.ww, p.sh = s.sh, p.sw = s.sw, p.Hp = round_up(p.H, s.wh), p.Wp = round_up(p.W, s.ww);
  p.scale = s.scale, p.mask_value = s.mask_value, p.pad_first = s.pad_first;
  const ScalarType acc = accumulation_type(q.scalar_type());
  p.bias = optional_data("bias", bias, {p.heads, s.wh * s.ww, s.wh * s.ww}, acc);
  p.logit_scale = optional_data("logit_scale", logit_scale, {p.heads}, acc);
  p.pad = optional_data("pad_bias", pad_bias, {3, p.heads, p.D}, acc);
  return p;
}

int64_t windows_of(const AttentionParams& p) { return p.B * (p.Hp / p.wh) * (p.Wp / p.ww); }

Tensor window_attention_fwd(Tensor q, Tensor k, Tensor v, std::optional<Tensor> bias, std::optional<Tensor> logit_scale,
                            std::optional<Tensor> pad_bias, int64_t wh, int64_t ww, int64_t sh, int64_t sw, double scale,
                            double mask_value, bool pad_first) {
  AttentionParams p = params(q, k, v, bias, logit_scale, pad_bias, {wh, ww, sh, sw, scale, mask_value, pad_first});
  Tensor y = empty(q, {p.B, p.H, p.W, p.heads * p.D}, q.scalar_type());
  p.y = mutable_array(y);
  if (q.numel() > 0) run(p, windows_of(p), kernels().attention_forward_scratch, kernels().attention_forward);
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> window_attention_bwd(Tensor dy, Tensor q, Tensor k, Tensor v, std::optional<Tensor> bias,
                                                                std::optional<Tensor> logit_scale, std::optional<Tensor> pad_bias,
                                                                int64_t wh, int64_t ww, int64_t sh, int64_t sw, double scale,
                                                                double mask_value, bool pad_first, bool packed) {
  AttentionParams p = params(q, k, v, bias, logit_scale, pad_bias, {wh, ww, sh, sw, scale, mask_value, pad_first});
  check_tensor(kOp, "dy", dy, {p.B, p.H, p.W, p.heads * p.D}, q.scalar_type());
  const ScalarType acc = accumulation_type(q.scalar_type());
  const int64_t N = wh * ww, C = p.heads * p.D;
  Tensor dqkv = packed ? empty(q, {p.B, p.H, p.W, 3, p.heads, p.D}, q.scalar_type()) : empty(q, {3, p.B, p.H, p.W, p.heads, p.D}, q.scalar_type());
  const auto zeros = [&](bool wanted, std::vector<int64_t> shape) { return wanted ? torch::stable::new_zeros(q, shape, acc) : nothing(q, acc); };
  if (q.numel() == 0)
    return {dqkv, zeros(bias.has_value(), {p.heads, N, N}), zeros(logit_scale.has_value(), {p.heads}), zeros(pad_bias.has_value(), {3, p.heads, p.D})};
  p.dy = array(dy), p.dqkv = mutable_array(dqkv);
  p.part_stride = packed ? C : p.B * p.H * p.W * C, p.pixel_stride = packed ? 3 * C : C;
  p.chunks = std::clamp<int64_t>(kPartialElements / (p.heads * N * N), 1, std::min(windows_of(p), kChunks));
  const auto partial = [&](bool wanted, int64_t size) { return wanted ? empty(q, {p.chunks, size}, acc) : nothing(q, acc); };
  Tensor dbias = partial(bias.has_value(), p.heads * N * N), dlogit_scale = partial(logit_scale.has_value(), p.heads), dpad = partial(pad_bias.has_value(), 3 * C);
  const auto data = [](const Tensor& t) { return t.numel() > 0 ? t.mutable_data_ptr() : nullptr; };
  p.dbias = data(dbias), p.dlogit_scale = data(dlogit_scale), p.dpad = data(dpad);
  run(p, p.chunks * p.heads, kernels().attention_backward_scratch, kernels().attention_backward);
  const auto sum = [&](const Tensor& partial, std::vector<int64_t> shape) {
    if (partial.numel() == 0) return partial;
    int64_t count = 1;
    for (int64_t size : shape) count *= size;
    return torch::stable::view(reduce(partial, p.chunks, count), shape);
  };
  return {dqkv, sum(dbias, {p.heads, N, N}), sum(dlogit_scale, {p.heads}), sum(dpad, {3, p.heads, p.D})};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastconv, CPU, m) {
  m.impl("window_attention_fwd", TORCH_BOX(&window_attention_fwd));
  m.impl("window_attention_bwd", TORCH_BOX(&window_attention_bwd));
}

}  // namespace fastconv::cpu

// grouped_conv on the CPU: tensors to kernel arguments, the split into bands and blocks of groups.
#include <algorithm>
#include <numeric>

#include "cpu/glue.h"

namespace fastconv::cpu {
namespace {

constexpr const char* kOp = "grouped_conv";

struct Pair {
  int64_t h, w;
};

// One call of the op; in_width and out_width are channels a group.
struct Call {
  int64_t N, C, H, W, out_C, out_H, out_W, K, groups, in_width, out_width;
  Pair stride, padding;
  bool nhwc;

  std::vector<int64_t> map(int64_t channels, int64_t h, int64_t w) const {
    return nhwc ? std::vector<int64_t>{N, h, w, channels} : std::vector<int64_t>{N, channels, h, w};
  }
  int64_t taps() const { return K * K; }
  bool is_empty() const { return N == 0; }
};

void check_map(const char* name, const Tensor& t, const std::vector<int64_t>& s, ScalarType like) {
  check_tensor(kOp, name, t, {s[0], s[1], s[2], s[3]}, like);
}

Call read_call(const Tensor& x, const Tensor& weight, Pair stride, Pair padding, int64_t groups, bool nhwc) {
  STD_TORCH_CHECK(x.dim() == 4, kOp, ": x must have 4 dimensions, got ", shape_string(x));
  STD_TORCH_CHECK(weight.dim() == 4, kOp, ": weight must be (C_out, C / groups, K, K), got ", shape_string(weight));
  Call c{};
  c.nhwc = nhwc;
  c.N = x.size(0), c.C = x.size(nhwc ? 3 : 1), c.H = x.size(nhwc ? 1 : 2), c.W = x.size(nhwc ? 2 : 3);
  c.out_C = weight.size(0), c.K = weight.size(2), c.groups = groups;
  STD_TORCH_CHECK(groups > 0 && c.C > 0 && c.out_C > 0 && c.C % groups == 0 && c.out_C % groups == 0, kOp, ": groups must divide ", c.C, " and ",
                  c.out_C, " channels, got ", groups);
  STD_TORCH_CHECK(c.K % 2 == 1 && c.K <= 7, kOp, ": weight must have K of 1, 3, 5 or 7, got ", shape_string(weight));
  STD_TORCH_CHECK(stride.h > 0 && stride.w > 0 && padding.h >= 0 && padding.w >= 0, kOp, ": stride must be positive and padding not negative");
  c.in_width = c.C / groups, c.out_width = c.out_C / groups;
  c.stride = stride, c.padding = padding;
  c.out_H = (c.H + 2 * padding.h - c.K) / stride.h + 1, c.out_W = (c.W + 2 * padding.w - c.K) / stride.w + 1;
  STD_TORCH_CHECK(c.H > 0 && c.W > 0 && c.H + 2 * padding.h >= c.K && c.W + 2 * padding.w >= c.K, kOp, ": x must hold the kernel, got ",
                  shape_string(x));
  check_map("x", x, c.map(c.C, c.H, c.W), x.scalar_type());
  check_tensor(kOp, "weight", weight, {c.out_C, c.in_width, c.K, c.K}, x.scalar_type());
  return c;
}

// Groups staged together fill whole vectors of 16 channels where that takes no more than 96; bands keep a block in the L2
// cache. Both, and with them the order of every sum, follow the shape alone.
void split(GroupedParams& p) {
  p.block = p.out_width % 6 == 0 ? 6 : p.out_width % 5 == 0 ? 5 : 4;
  const int64_t widest = std::max(p.in_width, p.out_width);
  p.together = std::clamp<int64_t>(16 / std::gcd<int64_t>(p.in_width, 16), 1, std::max<int64_t>(1, 96 / widest));
  p.together = std::min(p.together, p.groups);
  constexpr int64_t kElements = int64_t{128} << 10;
  const int64_t pitch = p.cols + 2, per_row = p.together * (p.in_width * p.stride_h * p.stride_w + p.out_width) * pitch;
  const int64_t most = std::max<int64_t>(4, kElements / std::max<int64_t>(1, per_row));
  p.bands = std::max<int64_t>(1, ceil_div(p.rows, most));
  p.band_rows = std::max<int64_t>(1, ceil_div(p.rows, p.bands));
  p.bands = ceil_div(p.rows, p.band_rows);
}

// Runs a pass with the weights that `at(weight, group, output, input, tap)` picks; `weight` is in the accumulation type.
template <class At> void run_pass(GroupedParams& p, const Tensor& weight, At&& at) {
  split(p);
  const int64_t outputs = ceil_div(p.out_width, p.block);
  Tensor packed = empty(weight, {p.groups * outputs * p.in_width * p.taps * p.block}, weight.scalar_type());
  with_accumulation(weight.scalar_type(), [&](auto* type) {
    const auto* from = static_cast<decltype(type)>(const_cast<void*>(weight.const_data_ptr()));
    auto* to = static_cast<decltype(type)>(packed.mutable_data_ptr());
    for (int64_t g = 0; g < p.groups; ++g)
      for (int64_t o = 0; o < outputs * p.block; o += p.block)
        for (int64_t c = 0; c < p.in_width; ++c)
          for (int64_t t = 0; t < p.taps; ++t)
            for (int64_t i = o; i < o + p.block; ++i) *to++ = i < p.out_width ? at(from, g, i, c, t) : 0;
  });
  p.packed = packed.const_data_ptr();
  run(p, p.N * p.bands * ceil_div(p.groups, p.together), kernels().grouped_scratch, kernels().grouped);
}

GroupedParams forward_pass(const Call& c) {
  GroupedParams p{};
  p.N = c.N, p.groups = c.groups, p.in_width = c.in_width, p.out_width = c.out_width, p.nhwc = c.nhwc;
  p.H = c.H, p.W = c.W, p.out_H = p.rows = c.out_H, p.out_W = p.cols = c.out_W;
  p.step_h = p.step_w = 1;
  p.stride_h = c.stride.h, p.stride_w = c.stride.w, p.pad_h = c.padding.h, p.pad_w = c.padding.w;
  p.taps = c.taps();
  for (int64_t t = 0; t < p.taps; ++t) p.tap_h[t] = t / c.K, p.tap_w[t] = t % c.K;
  return p;
}

// The taps along one axis that reach the outputs phase, phase + stride, ... of dx, as offsets into dy, and the padding that makes
// all of them positive.
struct Axis {
  int64_t count = 0, tap[7], offset[7], pad = 0;

  Axis(int64_t K, int64_t stride, int64_t padding, int64_t phase) {
    for (int64_t k = (phase + padding) % stride; k < K; k += stride) {
      tap[count] = k;
      offset[count++] = (phase + padding - k) / stride;  // exact; the last tap has the smallest
    }
    if (count) pad = std::max<int64_t>(0, -offset[count - 1]);
    for (int64_t i = 0; i < count; ++i) offset[i] += pad;
  }
};

void backward_data(const Call& c, const Tensor& dy, const Tensor& weight, Tensor& dx) {
  for (int64_t phase_h = 0; phase_h < std::min(c.stride.h, c.H); ++phase_h)
    for (int64_t phase_w = 0; phase_w < std::min(c.stride.w, c.W); ++phase_w) {
      const Axis h(c.K, c.stride.h, c.padding.h, phase_h), w(c.K, c.stride.w, c.padding.w, phase_w);
      GroupedParams p{};
      p.N = c.N, p.groups = c.groups, p.in_width = c.out_width, p.out_width = c.in_width, p.nhwc = c.nhwc;
      p.H = c.out_H, p.W = c.out_W, p.out_H = c.H, p.out_W = c.W;
      p.rows = ceil_div(c.H - phase_h, c.stride.h), p.cols = ceil_div(c.W - phase_w, c.stride.w);
      p.step_h = c.stride.h, p.step_w = c.stride.w, p.first_h = phase_h, p.first_w = phase_w;
      p.stride_h = p.stride_w = 1, p.pad_h = h.pad, p.pad_w = w.pad;
      p.taps = h.count * w.count;
      for (int64_t t = 0; t < p.taps; ++t) p.tap_h[t] = h.offset[t / w.count], p.tap_w[t] = w.offset[t % w.count];
      p.in = array(dy);
      p.out = mutable_array(dx);
      run_pass(p, weight, [&](const auto* from, int64_t g, int64_t o, int64_t i, int64_t t) {
        return from[(((g * c.out_width + i) * c.in_width + o) * c.K + h.tap[t / w.count]) * c.K + w.tap[t % w.count]];
      });
    }
}

std::tuple<Tensor, Tensor> backward_weight(const Call& c, const Tensor& dy, const Tensor& x, ScalarType acc) {
  GroupedParams p = forward_pass(c);
  p.in = array(x);
  p.dy = array(dy);
  split(p);
  const int64_t blocks = ceil_div(p.groups, p.together), row = p.in_width * p.taps + 1;
  p.slices = std::clamp<int64_t>(ceil_div(32, blocks), 1, p.N * p.bands);
  Tensor partial = empty(x, {p.slices, c.out_C, row}, acc);
  p.partial = partial.mutable_data_ptr();
  run(p, p.slices * blocks, kernels().grouped_wgrad_scratch, kernels().grouped_wgrad);
  Tensor sum = reduce(partial, p.slices, c.out_C * row);
  Tensor dweight = empty(x, {c.out_C, c.in_width, c.K, c.K}, acc), dbias = empty(x, {c.out_C}, acc);
  with_accumulation(acc, [&](auto* type) {
    const auto* from = static_cast<decltype(type)>(const_cast<void*>(sum.const_data_ptr()));
    auto *to = static_cast<decltype(type)>(dweight.mutable_data_ptr()), *to_bias = static_cast<decltype(type)>(dbias.mutable_data_ptr());
    for (int64_t o = 0; o < c.out_C; ++o, from += row) {
      to = std::copy(from, from + row - 1, to);
      to_bias[o] = from[row - 1];
    }
  });
  return {dweight, dbias};
}

Tensor grouped_conv_fwd(Tensor x, Tensor weight, std::optional<Tensor> bias, int64_t stride_h, int64_t stride_w, int64_t padding_h, int64_t padding_w,
                        int64_t groups, bool nhwc, ScalarType out_dtype) {
  const Call c = read_call(x, weight, {stride_h, stride_w}, {padding_h, padding_w}, groups, nhwc);
  check_dtype(kOp, "out_dtype", out_dtype, x.scalar_type());
  const ScalarType acc = accumulation_type(x.scalar_type());
  const Tensor weight_acc = in_type(weight, acc), bias_acc = bias_or_zeros(kOp, bias, x, c.out_C, acc);
  Tensor y = empty_map(x, c.N, c.out_C, c.out_H, c.out_W, out_dtype, nhwc);
  GroupedParams p = forward_pass(c);
  p.in = array(x);
  p.bias = bias_acc.const_data_ptr();
  p.out = mutable_array(y);
  run_pass(p, weight_acc, [&](const auto* from, int64_t g, int64_t o, int64_t i, int64_t t) {
    return from[((g * c.out_width + o) * c.in_width + i) * p.taps + t];
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> grouped_conv_bwd(Tensor dy, Tensor map, Tensor weight, int64_t stride_h, int64_t stride_w, int64_t padding_h,
                                                    int64_t padding_w, int64_t groups, bool nhwc, bool need_dx, bool need_dweight) {
  const Tensor x = in_memory_order(map, nhwc);
  const Call c = read_call(x, weight, {stride_h, stride_w}, {padding_h, padding_w}, groups, nhwc);
  check_map("dy", dy, c.map(c.out_C, c.out_H, c.out_W), x.scalar_type());
  const ScalarType acc = accumulation_type(x.scalar_type()), type = weight.scalar_type();
  Tensor dx = need_dx ? torch::stable::empty_like(x) : nothing(x, x.scalar_type());
  if (need_dx) backward_data(c, dy, in_type(weight, acc), dx);
  if (!need_dweight) return {dx, nothing(weight, type), nothing(weight, type)};
  if (c.is_empty()) return {dx, torch::stable::new_zeros(weight, {c.out_C, c.in_width, c.K, c.K}), torch::stable::new_zeros(weight, {c.out_C})};
  const auto [dweight, dbias] = backward_weight(c, dy, x, acc);
  return {dx, in_type(dweight, type), in_type(dbias, type)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastconv, CPU, m) {
  m.impl("grouped_conv_fwd", TORCH_BOX(&grouped_conv_fwd));
  m.impl("grouped_conv_bwd", TORCH_BOX(&grouped_conv_bwd));
}

}  // namespace fastconv::cpu

// squeeze_excite on the GPU: tensors to kernel arguments.
#include "cuda/squeeze_excite_kernel.h"

#include "cuda/glue.h"

namespace fastconv::cuda {
namespace {

constexpr const char* kOp = "squeeze_excite";

void check_weight(const char* name, const Tensor& weight, int64_t rows, int64_t columns, const Tensor& x) {
  if (weight.dim() == 4) check_array(kOp, name, weight, {rows, columns, 1, 1}, x);
  else check_array(kOp, name, weight, {rows, columns}, x);
}

Function function_of(int64_t i) {
  STD_TORCH_CHECK(i >= 0 && i < kFunctions, kOp, ": act and gate must be below ", kFunctions, ", got ", i);
  return static_cast<Function>(i);
}

SqueezeExciteParams params(const Tensor& x, const Tensor& w1, const std::optional<Tensor>& w2, int64_t act, int64_t gate, bool channels_last) {
  check_first(kOp, "x", x);
  STD_TORCH_CHECK(x.dim() == 4, kOp, ": x must have 4 dimensions, got ", shape_string(x));
  STD_TORCH_CHECK(w1.dim() >= 2, kOp, ": w1 must be (R, C), got ", shape_string(w1));
  check_array(kOp, "x", x, {x.size(0), x.size(1), x.size(2), x.size(3)}, x);
  SqueezeExciteParams p{};
  p.N = x.size(0), p.C = x.size(channels_last ? 3 : 1);
  p.L = channels_last ? x.size(1) * x.size(2) : x.size(2) * x.size(3);
  p.R = w2 ? w1.size(0) : p.C;
  p.channels_last = channels_last;
  check_weight("w1", w1, p.R, p.C, x);
  if (w2) check_weight("w2", *w2, p.C, p.R, x);
  const int64_t blocks = p.N * std::max<int64_t>(16, gate_slices(p.L, channels_last) * ceil_div(p.C, 8));  // more than any launch has
  STD_TORCH_CHECK(blocks < int64_t{1} << 31, kOp, ": ", p.N, " images are more than a launch takes; split the batch");
  p.act = function_of(act), p.gate = function_of(gate);
  p.x = array(x), p.w1 = array(w1), p.w2 = array(w2);
  return p;
}

// One allocation for what is only needed here, cut into rows that start on 16 bytes.
class Scratch {
 public:
  void row(float** row, int64_t count) {
    rows_.push_back({row, size_});
    size_ += round_up(count, 4);
  }
  Tensor allocate(const Tensor& like) const {
    Tensor memory = floats(like, size_);
    for (const auto& [row, offset] : rows_) *row = float_data(memory) + offset;
    return memory;
  }

 private:
  std::vector<std::pair<float**, int64_t>> rows_;
  int64_t size_ = 0;
};

std::tuple<Tensor, Tensor, Tensor, Tensor> squeeze_excite_fwd(Tensor x, Tensor w1, std::optional<Tensor> b1, std::optional<Tensor> w2,
                                                              std::optional<Tensor> b2, int64_t act, int64_t gate, ScalarType out_dtype,
                                                              bool channels_last, bool save) {
  SqueezeExciteParams p = params(x, w1, w2, act, gate, channels_last);
  if (b1) check_array(kOp, "b1", *b1, {p.R}, x);
  if (b2) check_array(kOp, "b2", *b2, {p.C}, x);
  check_dtype(kOp, "out_dtype", out_dtype);
  const Place place(x);
  const auto saved = [&](int64_t size) { return save && size ? empty(x, {p.N, size}, ScalarType::Float) : floats(x, 0); };
  Tensor y = empty(x, {x.size(0), x.size(1), x.size(2), x.size(3)}, out_dtype);
  Tensor pooled = saved(p.C), hidden = saved(w2 ? p.R : 0), z = saved(p.C);
  if (x.numel() == 0) return {y, torch::stable::zero_(pooled), torch::stable::zero_(hidden), torch::stable::zero_(z)};
  p.b1 = array(b1), p.b2 = array(b2);
  p.out = mutable_array(y);
  squeeze_excite_fwd_plan(p, place.gpu());
  Scratch scratch;
  if (save) p.pooled = float_data(pooled), p.z = float_data(z);
  else scratch.row(&p.pooled, p.N * p.C), scratch.row(&p.z, p.N * p.C);
  if (w2) scratch.row(&p.activated, p.N * p.R);
  if (w2 && save) p.hidden = float_data(hidden);
  if (p.plan.blocks == 0) scratch.row(&p.partial, p.N * gate_slices(p.L, channels_last) * p.C);
  const Tensor memory = scratch.allocate(x);
  check_launch(kOp, "forward", squeeze_excite_fwd_launch(p, place.stream()));
  return {y, pooled, hidden, z};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> squeeze_excite_bwd(Tensor dy, Tensor map, Tensor w1, std::optional<Tensor> w2, Tensor pooled,
                                                                      Tensor hidden, Tensor z, int64_t act, int64_t gate,
                                                                      bool channels_last, bool need_dx, bool need_fc1, bool need_fc2) {
  const Tensor x = in_memory_order(map, channels_last);
  SqueezeExciteParams p = params(x, w1, w2, act, gate, channels_last);
  check_array(kOp, "dy", dy, {x.size(0), x.size(1), x.size(2), x.size(3)}, x);
  const auto saved = [&](const char* name, const Tensor& t, int64_t size) {
    check_array(kOp, name, t, {p.N, size}, x);
    STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, kOp, ": ", name, " must be float32");
    return const_cast<float*>(static_cast<const float*>(t.const_data_ptr()));
  };
  p.pooled = saved("pooled", pooled, p.C), p.z = saved("z", z, p.C);
  if (w2) p.hidden = saved("hidden", hidden, p.R);
  const Place place(x);
  const Tensor& second = w2 ? *w2 : w1;
  p.need_fc1 = need_fc1, p.need_fc2 = need_fc2 && w2;
  const auto bias = [&](const Tensor& weight, bool needed) { return empty(weight, {needed ? weight.size(0) : 0}, weight.scalar_type()); };
  Tensor dx = gradient(x, need_dx);
  Tensor dw1 = gradient(w1, p.need_fc1), db1 = bias(w1, p.need_fc1), dw2 = gradient(second, p.need_fc2), db2 = bias(second, p.need_fc2);
  if (x.numel() == 0) {
    for (Tensor* t : {&dw1, &db1, &dw2, &db2}) torch::stable::zero_(*t);
    return {dx, dw1, db1, dw2, db2};
  }
  p.dy = array(dy);
  p.dw1 = mutable_array(dw1), p.db1 = mutable_array(db1), p.dw2 = mutable_array(dw2), p.db2 = mutable_array(db2);
  if (need_dx) p.out = mutable_array(dx);
  squeeze_excite_bwd_plan(p, place.gpu());
  Scratch scratch;
  scratch.row(&p.dz, p.N * p.C);
  if (w2) scratch.row(&p.dhidden, p.N * p.R), scratch.row(&p.dactivated, p.N * std::max<int64_t>(1, p.plan.blocks) * p.R);
  if (need_dx) scratch.row(&p.dpooled, p.N * p.C);
  if (p.plan.blocks == 0) scratch.row(&p.partial, p.N * gate_slices(p.L, channels_last) * p.C);
  const Tensor memory = scratch.allocate(x);
  if (need_dx || p.need_fc1 || p.need_fc2) check_launch(kOp, "backward", squeeze_excite_bwd_launch(p, place.stream()));
  return {dx, dw1, db1, dw2, db2};
}

}  // namespace

FASTCONV_CUDA_OPS(m) {
  m.impl("squeeze_excite_fwd", TORCH_BOX(&squeeze_excite_fwd));
  m.impl("squeeze_excite_bwd", TORCH_BOX(&squeeze_excite_bwd));
}

}  // namespace fastconv::cuda

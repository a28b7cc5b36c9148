// squeeze_excite on the CPU: tensors to kernel arguments.
#include <utility>

#include "cpu/glue.h"

namespace fastconv::cpu {
namespace {

constexpr const char* kOp = "squeeze_excite";

constexpr int64_t kWorth = 1 << 16;  // multiplications worth a second thread
constexpr int64_t kResident = 768 << 10;  // bytes of a map that a core still has in its L2 cache after a pass over it

struct Sizes {
  int64_t N, L, C, R;
  bool channels_last, two;  // two layers
  ScalarType acc;
};

void check_weight(const char* name, const Tensor& weight, int64_t rows, int64_t columns, ScalarType like) {
  if (weight.dim() == 4) check_tensor(kOp, name, weight, {rows, columns, 1, 1}, like);
  else check_tensor(kOp, name, weight, {rows, columns}, like);
}

Sizes sizes_of(const Tensor& x, const Tensor& w1, const std::optional<Tensor>& w2, bool channels_last) {
  STD_TORCH_CHECK(x.dim() == 4, kOp, ": x must have 4 dimensions, got ", shape_string(x));
  check_tensor(kOp, "x", x, {x.size(0), x.size(1), x.size(2), x.size(3)}, x.scalar_type());
  STD_TORCH_CHECK(w1.dim() >= 2, kOp, ": w1 must be (R, C), got ", shape_string(w1));
  const int64_t C = x.size(channels_last ? 3 : 1), L = channels_last ? x.size(1) * x.size(2) : x.size(2) * x.size(3);
  const Sizes s{x.size(0), L, C, w2 ? w1.size(0) : C, channels_last, w2.has_value(), accumulation_type(x.scalar_type())};
  check_weight("w1", w1, s.R, s.C, x.scalar_type());
  if (w2) check_weight("w2", *w2, s.C, s.R, x.scalar_type());
  return s;
}

Function function_of(int64_t i) {
  STD_TORCH_CHECK(i >= 0 && i < kFunctions, kOp, ": act and gate must be below ", kFunctions, ", got ", i);
  return static_cast<Function>(i);
}

MapParams map_params(const Sizes& s, const Tensor& x) {
  MapParams p{};
  p.N = s.N, p.L = s.L, p.C = s.C, p.channels_last = s.channels_last;
  p.slices = s.channels_last ? ceil_div(s.L, kSlicePixels) : 1;
  p.x = array(x);
  return p;
}

void run_map(const MapParams& p, void (*kernel)(const MapParams&, void*, int64_t, int64_t)) {
  run(p, p.channels_last ? p.N * p.slices : ceil_div(p.N * p.C, kPlanes), kernels().map_scratch, kernel);
}

// Calls f(first, count) for groups of images whose maps stay in the caches from the first pass to the second. Where the
// threads can share the images evenly each takes its own, and never waits for another; else they share the work of each
// group. No sum crosses an image, so that all of this may follow the number of threads.
template <class F> void for_groups(const Sizes& s, const Tensor& x, F&& f) {
  const int64_t bytes = s.L * s.C * dtype_size(dtype_of(x.scalar_type())), threads = torch::stable::get_num_threads();
  const bool by_image = s.N % threads == 0 || s.N >= 4 * threads;
  const int64_t group = std::max<int64_t>(1, (by_image ? 1 : threads) * kResident / bytes);
  const auto images = [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; n += group) f(n, std::min(group, end - n));
  };
  if (by_image) torch::stable::parallel_for(0, s.N, 1, images);
  else images(0, s.N);
}

// The same map from image n on.
MapParams from_image(MapParams p, int64_t n, int64_t count) {
  const int64_t elements = n * p.L * p.C;
  const auto move = [&](auto& a) {
    if (a.data) a.data = const_cast<char*>(static_cast<const char*>(a.data)) + elements * dtype_size(a.dtype);
  };
  move(p.x), move(p.dy), move(p.out);
  p.N = count;
  return p;
}

// Row n of [N][size] in the accumulation type.
void* row(const Sizes& s, void* data, int64_t n, int64_t size) { return static_cast<char*>(data) + n * size * (s.acc == ScalarType::Double ? 8 : 4); }
const void* row(const Sizes& s, const void* data, int64_t n, int64_t size) { return row(s, const_cast<void*>(data), n, size); }

// Tasks of `work` multiplications each: on the calling thread where another one is not worth it.
template <class Params> void run_small(const Params& p, int64_t tasks, int64_t work, void (*kernel)(const Params&, int64_t, int64_t)) {
  torch::stable::parallel_for(0, tasks, std::max<int64_t>(1, kWorth / std::max<int64_t>(1, work)),
                              [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
}

LayerParams layer(const Sizes& s, int64_t N, const void* weight, int64_t M, int64_t K) {
  LayerParams p{};
  p.is_double = s.acc == ScalarType::Double;
  p.N = N, p.M = M, p.K = K, p.weight = weight;
  p.function = Function::kIdentity, p.scale = 1;
  return p;
}

void run_layer(const LayerParams& p, int64_t over, void (*kernel)(const LayerParams&, int64_t, int64_t)) {
  run_small(p, ceil_div(over, kLayerBlock), p.N * p.M * p.K / ceil_div(over, kLayerBlock), kernel);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> squeeze_excite_fwd(Tensor x, Tensor w1, std::optional<Tensor> b1, std::optional<Tensor> w2,
                                                              std::optional<Tensor> b2, int64_t act, int64_t gate, ScalarType out_dtype,
                                                              bool channels_last, bool save) {
  const Sizes s = sizes_of(x, w1, w2, channels_last);
  if (b1) check_tensor(kOp, "b1", *b1, {s.R}, x.scalar_type());
  if (b2) check_tensor(kOp, "b2", *b2, {s.C}, x.scalar_type());
  check_dtype(kOp, "out_dtype", out_dtype, x.scalar_type());
  const Function act_function = function_of(act), gate_function = function_of(gate);
  const auto in_acc = [&](const std::optional<Tensor>& t) { return t ? std::optional(in_type(*t, s.acc)) : t; };
  const std::optional<Tensor> w1_acc = in_acc(w1), b1_acc = in_acc(b1), w2_acc = in_acc(w2), b2_acc = in_acc(b2);
  const auto data = [](const std::optional<Tensor>& t) { return t ? t->const_data_ptr() : nullptr; };

  Tensor pooled = save ? empty(x, {s.N, s.C}, s.acc) : nothing(x, s.acc), z = save ? empty(x, {s.N, s.C}, s.acc) : nothing(x, s.acc);
  Tensor hidden = save && s.two ? empty(x, {s.N, s.R}, s.acc) : nothing(x, s.acc);
  const MapParams map = map_params(s, x);
  const int64_t sums_size = map.slices * s.C, kept = save ? 0 : 2 * s.C + s.R;
  Tensor vectors = empty(x, {s.N, sums_size + s.C + s.R + kept}, s.acc);
  // Last: the heap gives it back whole, with no vector behind it.
  Tensor y = empty(x, {x.size(0), x.size(1), x.size(2), x.size(3)}, out_dtype);
  if (x.numel() > 0) {
    void* next = vectors.mutable_data_ptr();
    const auto rows = [&](int64_t size) { return std::exchange(next, row(s, next, s.N, size)); };
    const auto kept_rows = [&](Tensor& t, int64_t size) { return save ? t.mutable_data_ptr() : rows(size); };
    void *sums = rows(sums_size), *factors = rows(s.C), *activated = rows(s.R);
    void *means = kept_rows(pooled, s.C), *pre_gate = kept_rows(z, s.C), *pre_act = kept_rows(hidden, s.R);
    for_groups(s, x, [&](int64_t n, int64_t count) {
      MapParams group = from_image(map, n, count);
      group.partial = row(s, sums, n, map.slices * s.C);
      run_map(group, kernels().map_sum);

      FoldParams fold{};
      fold.is_double = s.acc == ScalarType::Double;
      fold.C = s.C, fold.slices = map.slices, fold.partial = group.partial;
      fold.scale = 1.0 / static_cast<double>(s.L);
      fold.out = row(s, means, n, s.C);
      run_small(fold, count, map.slices * s.C, kernels().fold);

      LayerParams last = layer(s, count, data(w1_acc), s.C, s.C);
      last.in = fold.out, last.bias = data(b1_acc);
      if (s.two) {
        LayerParams first = layer(s, count, data(w1_acc), s.R, s.C);
        first.in = fold.out, first.bias = data(b1_acc);
        first.pre = row(s, pre_act, n, s.R), first.out = row(s, activated, n, s.R), first.function = act_function;
        run_layer(first, s.R, kernels().layer_forward);
        last = layer(s, count, data(w2_acc), s.C, s.R);
        last.in = first.out, last.bias = data(b2_acc);
      }
      last.pre = row(s, pre_gate, n, s.C), last.out = row(s, factors, n, s.C), last.function = gate_function;
      run_layer(last, s.C, kernels().layer_forward);

      group.factor = last.out, group.out = mutable_array(y);
      group.out.data = static_cast<char*>(group.out.data) + n * s.L * s.C * dtype_size(group.out.dtype);
      run_map(group, kernels().map_apply);
    });
  }
  if (x.numel() == 0) torch::stable::zero_(pooled), torch::stable::zero_(z), torch::stable::zero_(hidden);
  return {y, pooled, hidden, z};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> squeeze_excite_bwd(Tensor dy, Tensor map, Tensor w1, std::optional<Tensor> w2, Tensor pooled,
                                                                      Tensor hidden, Tensor z, int64_t act, int64_t gate,
                                                                      bool channels_last, bool need_dx, bool need_fc1, bool need_fc2) {
  const Tensor x = in_memory_order(map, channels_last);
  const Sizes s = sizes_of(x, w1, w2, channels_last);
  check_tensor(kOp, "dy", dy, {x.size(0), x.size(1), x.size(2), x.size(3)}, x.scalar_type());
  check_tensor(kOp, "pooled", pooled, {s.N, s.C}, x.scalar_type());
  check_tensor(kOp, "z", z, {s.N, s.C}, x.scalar_type());
  if (s.two) check_tensor(kOp, "hidden", hidden, {s.N, s.R}, x.scalar_type());
  STD_TORCH_CHECK(pooled.scalar_type() == s.acc && z.scalar_type() == s.acc && (!s.two || hidden.scalar_type() == s.acc), kOp,
                  ": pooled, hidden and z must have the accumulation dtype");
  const Function act_function = function_of(act), gate_function = function_of(gate);
  need_fc2 = need_fc2 && s.two;
  const ScalarType type1 = w1.scalar_type(), type2 = w2 ? w2->scalar_type() : type1;
  const std::vector<int64_t> none{0};
  const auto shape = [](const Tensor& w) { return std::vector<int64_t>(w.sizes().begin(), w.sizes().end()); };
  const bool some = x.numel() > 0;
  Tensor dx = need_dx ? torch::stable::empty_like(x) : nothing(x, x.scalar_type());
  Tensor dw1 = empty(x, need_fc1 ? shape(w1) : none, s.acc), db1 = empty(x, {need_fc1 ? s.R : 0}, s.acc);
  Tensor dw2 = empty(x, need_fc2 ? shape(*w2) : none, s.acc), db2 = empty(x, {need_fc2 ? s.C : 0}, s.acc);
  if (!some) {
    for (Tensor* t : {&dw1, &db1, &dw2, &db2}) torch::stable::zero_(*t);
  } else if (need_dx || need_fc1 || need_fc2) {
    const Tensor w1_acc = in_type(w1, s.acc), w2_acc = s.two ? in_type(*w2, s.acc) : w1_acc;
    MapParams params = map_params(s, x);
    params.dy = array(dy);
    if (need_dx) params.out = mutable_array(dx);
    Tensor vectors = empty(x, {s.N, params.slices * s.C + 3 * s.C + 2 * s.R}, s.acc);
    void* next = vectors.mutable_data_ptr();
    const auto rows = [&](int64_t size) { return std::exchange(next, row(s, next, s.N, size)); };
    void *sums = rows(params.slices * s.C), *factors = rows(s.C), *dz = rows(s.C), *dpooled = rows(s.C), *dhidden = rows(s.R), *activated = rows(s.R);
    const void *pre_act = hidden.const_data_ptr(), *pre_gate = z.const_data_ptr();
    for_groups(s, x, [&](int64_t n, int64_t count) {
      MapParams group = from_image(params, n, count);
      group.partial = row(s, sums, n, params.slices * s.C);
      run_map(group, kernels().map_sum);

      FoldParams fold{};
      fold.is_double = s.acc == ScalarType::Double;
      fold.C = s.C, fold.slices = params.slices, fold.partial = group.partial, fold.scale = 1;
      fold.z = row(s, pre_gate, n, s.C), fold.out = row(s, dz, n, s.C), fold.gate = row(s, factors, n, s.C), fold.function = gate_function;
      run_small(fold, count, (params.slices + 8) * s.C, kernels().fold);

      const void* dfirst = fold.out;
      if (s.two && (need_dx || need_fc1)) {
        LayerParams p = layer(s, count, w2_acc.const_data_ptr(), s.C, s.R);
        p.dout = fold.out, p.out = row(s, dhidden, n, s.R), p.gradient_at = row(s, pre_act, n, s.R), p.function = act_function;
        run_layer(p, s.R, kernels().layer_backward);
        dfirst = p.out;
      }
      if (!need_dx) return;
      LayerParams p = layer(s, count, w1_acc.const_data_ptr(), s.R, s.C);
      p.dout = dfirst, p.out = row(s, dpooled, n, s.C), p.scale = 1.0 / static_cast<double>(s.L);
      run_layer(p, s.C, kernels().layer_backward);
      group.factor = fold.gate, group.summand = p.out;
      run_map(group, kernels().map_apply);
    });

    const auto weight_gradient = [&](int64_t M, int64_t K, const void* dout, const void* in, Tensor& dweight, Tensor& dbias) {
      LayerParams p = layer(s, s.N, nullptr, M, K);
      p.dout = dout, p.in = in, p.dweight = dweight.mutable_data_ptr(), p.dbias = dbias.mutable_data_ptr();
      run_layer(p, M, kernels().layer_weight);
    };
    if (need_fc1) weight_gradient(s.R, s.C, s.two ? dhidden : dz, pooled.const_data_ptr(), dw1, db1);
    if (need_fc2) {
      FoldParams values{};  // act(hidden), as the gate of one partial
      values.is_double = s.acc == ScalarType::Double, values.C = s.R, values.slices = 1, values.scale = 1;
      values.partial = values.z = pre_act, values.out = dhidden, values.gate = activated, values.function = act_function;
      run_small(values, s.N, 8 * s.R, kernels().fold);
      weight_gradient(s.C, s.R, dz, activated, dw2, db2);
    }
  }
  return {dx, in_type(dw1, type1), in_type(db1, type1), in_type(dw2, type2), in_type(db2, type2)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastconv, CPU, m) {
  m.impl("squeeze_excite_fwd", TORCH_BOX(&squeeze_excite_fwd));
  m.impl("squeeze_excite_bwd", TORCH_BOX(&squeeze_excite_bwd));
}

}  // namespace fastconv::cpu

// What the CPU glue of every op shares: tensors to kernel arguments, scratch, ordered reduction of partials.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <new>
#include <optional>
#include <tuple>
#include <vector>

#include "check.h"
#include "cpu/kernels.h"

namespace fastconv::cpu {

inline DType dtype_of(ScalarType t) {
  return t == ScalarType::Double ? DType::kDouble : t == ScalarType::BFloat16 ? DType::kBFloat16 : t == ScalarType::Half ? DType::kHalf : DType::kFloat;
}
inline ScalarType accumulation_type(ScalarType t) { return t == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }

inline Array array(const Tensor& t) { return {t.const_data_ptr(), dtype_of(t.scalar_type())}; }
inline MutableArray mutable_array(const Tensor& t) { return {t.mutable_data_ptr(), dtype_of(t.scalar_type())}; }
inline Tensor empty(const Tensor& like, std::vector<int64_t> shape, ScalarType dtype) { return torch::stable::new_empty(like, shape, dtype); }
inline Tensor nothing(const Tensor& like, ScalarType dtype) { return empty(like, {0}, dtype); }
// Parameters are small: the kernels read them in the accumulation type only.
inline Tensor in_type(const Tensor& t, ScalarType dtype) { return t.scalar_type() == dtype ? t : torch::stable::to(t, dtype); }

// One block of 64-byte aligned scratch for the calling thread.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) : data_(::operator new(static_cast<size_t>(bytes) + 64, std::align_val_t{64})) {}
  ~Scratch() { ::operator delete(data_, std::align_val_t{64}); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  void* get() const { return data_; }

 private:
  void* data_;
};

// Runs a kernel's tasks on torch's threads, each with its own scratch.
template <class Params>
void run(const Params& p, int64_t tasks, int64_t (*scratch_bytes)(const Params&), void (*kernel)(const Params&, void*, int64_t, int64_t)) {
  const int64_t bytes = scratch_bytes(p);
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    Scratch scratch(bytes);
    kernel(p, scratch.get(), begin, end);
  });
}

// Element type of the accumulation type `acc`: f(static_cast<A*>(nullptr)).
template <class F> void with_accumulation(ScalarType acc, F&& f) {
  if (acc == ScalarType::Double) f(static_cast<double*>(nullptr));
  else f(static_cast<float*>(nullptr));
}

// Sum of [slices][count] over the slices, in order, so that the bits do not depend on the number of threads.
inline Tensor reduce(const Tensor& partial, int64_t slices, int64_t count) {
  Tensor sum = empty(partial, {count}, partial.scalar_type());
  with_accumulation(partial.scalar_type(), [&](auto* type) {
    const auto* from = static_cast<decltype(type)>(const_cast<void*>(partial.const_data_ptr()));
    auto* to = static_cast<decltype(type)>(sum.mutable_data_ptr());
    torch::stable::parallel_for(0, count, 4096, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) to[i] = from[i];
      for (int64_t slice = 1; slice < slices; ++slice)
        for (int64_t i = begin; i < end; ++i) to[i] += from[slice * count + i];
    });
  });
  return sum;
}

// The convolution's weights as the kernels read them: [channel block][K * K][lanes].
Tensor pack_weight(const Tensor& weight, const ConvShape& shape, bool flip, ScalarType acc);

ConvShape conv_shape(const char* op, const Tensor& x, const Tensor& weight);
ForwardParams forward_params(const ConvShape& shape, const Tensor& x, const Tensor& packed, const Tensor& bias);
BackwardParams backward_params(const ConvShape& shape, bool norm, const Tensor& dy);
Tensor bias_or_zeros(const char* op, const std::optional<Tensor>& bias, const Tensor& x, int64_t C, ScalarType acc);
// dx, dweight and dbias from dy, or through the norm where `p` carries it; then also the norm's partials.
std::tuple<Tensor, Tensor, Tensor> conv_backward(BackwardParams& p, const Tensor& x, const Tensor& weight, bool need_dx, bool need_dweight);

}  // namespace fastconv::cpu

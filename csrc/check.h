// Checks of the op glue: what a kernel needs to stay inside memory. The hubs in Python check the rest, with the remedy.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <string>
#include <vector>

namespace fastconv {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string shape_string(const Tensor& t) {
  std::string text = "(";
  for (int64_t i = 0; i < t.dim(); ++i) text += (i ? ", " : "") + std::to_string(t.size(i));
  return text + ")";
}

inline bool is_float_type(ScalarType t) {
  return t == ScalarType::Float || t == ScalarType::BFloat16 || t == ScalarType::Half || t == ScalarType::Double;
}

// A dense floating-point tensor of exactly this shape, in double exactly where `like` is.
inline void check_tensor(const char* op, const char* name, const Tensor& t, std::initializer_list<int64_t> shape, ScalarType like) {
  bool fits = t.dim() == static_cast<int64_t>(shape.size());
  std::string wanted;
  int64_t i = 0;
  for (int64_t size : shape) {
    fits = fits && t.size(i++) == size;
    wanted += (wanted.empty() ? "(" : ", ") + std::to_string(size);
  }
  STD_TORCH_CHECK(fits, op, ": ", name, " must be ", wanted, "), got ", shape_string(t));
  STD_TORCH_CHECK(t.is_contiguous(), op, ": ", name, " must be contiguous; pass ", name, ".contiguous()");
  STD_TORCH_CHECK(is_float_type(t.scalar_type()), op, ": ", name, " must be float32, bfloat16, float16 or float64");
  STD_TORCH_CHECK((t.scalar_type() == ScalarType::Double) == (like == ScalarType::Double), op, ": ", name,
                  " must be float64 exactly where the first argument is");
}

// The same, in the dtype of the first argument.
inline void check_like(const char* op, const char* name, const Tensor& t, std::initializer_list<int64_t> shape, ScalarType first) {
  check_tensor(op, name, t, shape, first);
  STD_TORCH_CHECK(t.scalar_type() == first, op, ": ", name, " must have the dtype of x");
}

// Maps that torch.compile keeps for backward have their channels joined to the axis beside them: fastconv/ops/_layout.py.
inline std::vector<int64_t> joined_shape(int64_t N, int64_t C, int64_t H, int64_t W, bool channels_last) {
  return channels_last ? std::vector{N, H, W * C} : std::vector{N, C * H, W};
}
// Such a map with four axes again; weight: (_, C / groups, ...).
inline Tensor split_map(const char* op, const Tensor& joined, const Tensor& weight, int64_t groups, bool channels_last) {
  const int64_t C = weight.dim() > 1 ? weight.size(1) * groups : 0, axis = channels_last ? 2 : 1;
  STD_TORCH_CHECK(C > 0 && joined.dim() == 3 && joined.size(axis) % C == 0, op, ": in backward x must be ",
                  channels_last ? "(N, H, W * C)" : "(N, C * H, W)", " with C = ", C, ", got ", shape_string(joined));
  const int64_t N = joined.size(0), left = joined.size(axis) / C;
  return channels_last ? torch::stable::view(joined, {N, joined.size(1), left, C}) : torch::stable::view(joined, {N, C, left, joined.size(2)});
}

inline void check_dtype(const char* op, const char* name, ScalarType dtype, ScalarType like) {
  STD_TORCH_CHECK(is_float_type(dtype) && (dtype == ScalarType::Double) == (like == ScalarType::Double), op, ": ", name,
                  " must be a floating-point dtype, and float64 exactly where the first argument is");
}

}  // namespace fastconv

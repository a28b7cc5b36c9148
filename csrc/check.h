// Checks of the op glue: what a kernel needs to stay inside memory. The hubs in Python check the rest, with the remedy.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <string>

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

// A map (N, C, H, W) as it lies in memory. Why maps come like this: in_nchw in fastconv/ops/_layout.py.
inline Tensor in_memory_order(const Tensor& x, bool channels_last) {
  if (!channels_last || x.dim() != 4) return x;
  return torch::stable::transpose(torch::stable::transpose(x, 1, 2), 2, 3);
}
// A new map like that, and no view: of a view that a Function returns nobody may change the values, and many an activation does.
inline Tensor empty_map(const Tensor& like, int64_t N, int64_t C, int64_t H, int64_t W, ScalarType dtype, bool channels_last) {
  using torch::headeronly::MemoryFormat;
  const MemoryFormat format = channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
  return torch::stable::empty({N, C, H, W}, dtype, std::nullopt, like.device(), std::nullopt, format);
}

inline void check_dtype(const char* op, const char* name, ScalarType dtype, ScalarType like) {
  STD_TORCH_CHECK(is_float_type(dtype) && (dtype == ScalarType::Double) == (like == ScalarType::Double), op, ": ", name,
                  " must be a floating-point dtype, and float64 exactly where the first argument is");
}

}  // namespace fastconv

// What the CUDA glue of every op shares: tensors to kernel arguments, device and stream, error codes to messages.
//
// FASTCONV_SIMT builds the same glue around kernels that run on the CPU, for tests: other dispatch key, no device.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#include "check.h"
#include "cuda/depthwise_conv_kernel.h"
#include "cuda/params.h"

#ifdef FASTCONV_SIMT
#define FASTCONV_CUDA_OPS(m) STABLE_TORCH_LIBRARY_IMPL(fastconv_simt, CPU, m)
extern "C" const char* simt_message();
extern "C" int64_t simt_shared_limit();
extern "C" int64_t simt_cluster_limit();
#else
#define FASTCONV_CUDA_OPS(m) STABLE_TORCH_LIBRARY_IMPL(fastconv, CUDA, m)
extern "C" const char* cudaGetErrorString(int code);  // declared here, so that the glue needs no header of the toolkit
extern "C" int cudaDeviceGetAttribute(int* value, int attribute, int device);
#endif

namespace fastconv::cuda {

#ifdef FASTCONV_SIMT

inline bool on_device(const Tensor& t) { return t.is_cpu(); }
inline const char* error_string(int) { return simt_message(); }

struct Place {
  explicit Place(const Tensor&) {}
  Stream stream() const { return nullptr; }
  Gpu gpu() const { return {simt_shared_limit(), 1, simt_cluster_limit()}; }
};

#else

inline bool on_device(const Tensor& t) { return t.is_cuda(); }
inline const char* error_string(int code) { return cudaGetErrorString(code); }

// Makes the device of a tensor current while it lives, and names the stream that work on it belongs to.
class Place {
 public:
  explicit Place(const Tensor& t) : index_(t.get_device_index()), guard_(index_) {}
  Stream stream() const {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    return static_cast<Stream>(stream);
  }
  // cudaDevAttrMaxSharedMemoryPerBlockOptin, ..MultiProcessorCount, ..ClusterLaunch
  Gpu gpu() const { return {attribute(97), attribute(16), attribute(120) ? 16 : 1}; }

 private:
  int attribute(int which) const {
    int value = 0;
    const int code = cudaDeviceGetAttribute(&value, which, index_);
    STD_TORCH_CHECK(code == 0, "the GPU does not say what it has: ", cudaGetErrorString(code), " (CUDA error ", code, ")");
    return value;
  }
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
};

#endif

// Turns a launcher's error code into an exception that says what to do about it.
inline void check_launch(const char* op, const char* what, int code) {
  if (code == 0) return;
  const char* remedy = "; if an earlier kernel failed, CUDA_LAUNCH_BLOCKING=1 shows which";
  if (code == 35 || code == 209 || code == 222)  // driver too old, no code for this GPU, PTX newer than the driver
    remedy = "; the library was not built for this GPU and driver (fastconv doctor): reinstall fastconv here, or use FASTCONV_BACKEND=triton";
  STD_TORCH_CHECK(false, op, ": the ", what, " kernel was not launched: ", error_string(code), " (CUDA error ", code, ")", remedy);
}

inline DType dtype_of(ScalarType t) {
  return t == ScalarType::BFloat16 ? DType::kBFloat16 : t == ScalarType::Half ? DType::kHalf : DType::kFloat;
}
inline Array array(const Tensor& t) { return {t.const_data_ptr(), dtype_of(t.scalar_type())}; }
inline Array array(const std::optional<Tensor>& t) { return t ? array(*t) : Array{}; }
inline MutableArray mutable_array(const Tensor& t) { return {t.mutable_data_ptr(), dtype_of(t.scalar_type())}; }

inline Tensor empty(const Tensor& like, std::vector<int64_t> shape, ScalarType dtype) { return torch::stable::new_empty(like, shape, dtype); }
// A gradient of `like`: uninitialised, or empty where it is not needed.
inline Tensor gradient(const Tensor& like, bool needed) {
  return needed ? torch::stable::empty_like(like) : torch::stable::new_empty(like, {0});
}
inline Tensor zeros(const Tensor& like, std::vector<int64_t> shape) { return torch::stable::new_zeros(like, shape); }
inline Tensor floats(const Tensor& like, int64_t count) { return empty(like, {count}, ScalarType::Float); }
inline float* float_data(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

// A dense tensor of this shape and of a dtype that the kernels have, on the device of the first argument.
inline void check_array(const char* op, const char* name, const Tensor& t, std::initializer_list<int64_t> shape, const Tensor& first) {
  STD_TORCH_CHECK(on_device(t) && t.get_device_index() == first.get_device_index(), op, ": ", name,
                  " must be on the CUDA device of the first argument; move it with ", name, ".to(...)");
  check_tensor(op, name, t, shape, ScalarType::Float);
}
inline void check_dtype(const char* op, const char* name, ScalarType dtype) { fastconv::check_dtype(op, name, dtype, ScalarType::Float); }
inline void check_first(const char* op, const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.scalar_type() != ScalarType::Double, op, ": ", name, " is float64, which the CUDA kernels do not serve; use FASTCONV_BACKEND=eager");
}

ConvShape conv_shape(const char* op, const Tensor& x, const Tensor& weight);
ConvForwardParams conv_forward_params(const char* op, const ConvShape& shape, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias);

// Gradients of a convolution, allocated as they are needed, with the arguments of their kernels but dy.
struct ConvGradients {
  ConvGradients(const ConvShape& shape, const Tensor& x, const Tensor& weight, bool need_dx, bool need_dweight);
  ConvBackwardParams params;
  Tensor dx, dweight, dbias, partial;
};

}  // namespace fastconv::cuda

// What the launchers of csrc/cuda take: arrays with their dtypes, and a stream. No torch and no CUDA header here.
//
// A launcher checks nothing about memory (the glue does), allocates nothing, and returns CUDA's error code: 0, or what
// went wrong when it launched. Every size may be anything from 1 on; the glue answers calls without elements itself.
//
// Dtypes are all float32, bfloat16 or float16, each array its own. Kernels are compiled once for the dtype of the tensor
// that they stage in shared memory or stream through; all other arrays are read and written through a switch on `dtype`
// that is the same for the whole grid: parameters in the prologue, results at the store, partial sums always in float32.
#pragma once

#include <cstdint>

struct CUstream_st;  // cudaStream_t points to it

namespace fastconv::cuda {

using Stream = CUstream_st*;

enum class DType : uint8_t { kFloat, kBFloat16, kHalf };
enum class Activation : uint8_t { kNone, kGelu, kGeluTanh };
constexpr int64_t dtype_size(DType d) { return d == DType::kFloat ? 4 : 2; }

// A contiguous array. Without `data` it was not given, or is not needed. Activations start on 16 bytes only where the
// tensor does: a view may not.
struct Array {
  const void* data = nullptr;
  DType dtype = DType::kFloat;
};
struct MutableArray {
  void* data = nullptr;
  DType dtype = DType::kFloat;
};

}  // namespace fastconv::cuda

// Ordered sums of partials (see reduce_kernel.h).
#include "reduce_kernel.h"

#include "array.cuh"

namespace fastconv::cuda {
namespace {

constexpr int kColumns = 32, kRows = 16;  // of threads: each sums every kRows-th slice of one column

__global__ void __launch_bounds__(kColumns * kRows)
reduce_partials_kernel(const float* partial, int64_t slices, int64_t stride, int64_t count, MutableArray out) {
  FC_SHARED(float, sums, kColumns * kRows);  // [row][column]
  const int column = threadIdx.x % kColumns, row = threadIdx.x / kColumns;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kColumns + column;
  float sum = 0;
#pragma unroll 4
  for (int64_t slice = row; slice < slices; slice += kRows) sum += load_global<float>(partial + slice * stride + i, i < count);
  store_shared(sums + threadIdx.x, sum);
  sync_threads();
  if (row > 0) return;
#pragma unroll
  for (int other = 1; other < kRows; ++other) sum += load_shared<float>(sums + other * kColumns + column);
  store_array<1>(out, i, {sum}, i < count);
}

}  // namespace

int reduce_partials_launch(const float* partial, int64_t slices, int64_t stride, int64_t count, MutableArray out, Stream stream) {
  const int64_t blocks = (count + kColumns - 1) / kColumns;
  return launch(reduce_partials_kernel, dim3(static_cast<unsigned>(blocks)), dim3(kColumns * kRows), 0, stream, partial, slices, stride, count, out);
}

}  // namespace fastconv::cuda

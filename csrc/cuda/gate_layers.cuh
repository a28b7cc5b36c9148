// The layers of a gate on the vectors of one image, by the blocks of a team, each with its share of a layer's results: functions
// and their gradients, products of a matrix with a vector, and with one from the left. Vectors are float32 in global memory, where
// a block finds again what another has written before they met.
#pragma once

#include "activation.cuh"
#include "array.cuh"
#include "squeeze_excite_kernel.h"

namespace fastconv::cuda {

// What is constant in PyTorch keeps its value or its zero, and NaN stays NaN, as in csrc/cpu/functions.h.
FC_DEVICE float sigmoid(float x) { return reciprocal(1.0f + exp2(-1.44269504f * x)); }
FC_DEVICE float hardsigmoid(float x) {
  const float up = x + 3.0f;
  return (up < 0 ? 0 : up > 6.0f ? 6.0f : up) * (1.0f / 6.0f);
}

FC_DEVICE float value_of(Function f, float x) {
  switch (f) {
    case Function::kRelu: return x <= 0 ? 0 : x;
    case Function::kSilu: return x * sigmoid(x);
    case Function::kGelu: return activated<1>({x}, Activation::kGelu).value[0];
    case Function::kHardswish: return x * hardsigmoid(x);
    case Function::kLeakyRelu: return x > 0 ? x : 0.01f * x;
    case Function::kSigmoid: return sigmoid(x);
    case Function::kHardsigmoid: return hardsigmoid(x);
    default: return x;
  }
}

// dy times the derivative at x; 0, not dy times 0, where the function is constant.
FC_DEVICE float gradient_of(Function f, float x, float dy) {
  switch (f) {
    case Function::kRelu: return x <= 0 ? 0 : dy;
    case Function::kSilu: {
      const float s = sigmoid(x);
      return dy * s * fmaf(x, 1.0f - s, 1.0f);
    }
    case Function::kGelu: return dy * activated<1>({x}, Activation::kGelu).slope[0];
    case Function::kHardswish: return x <= -3.0f ? 0 : x < 3.0f ? dy * fmaf(x, 1.0f / 3.0f, 0.5f) : dy;
    case Function::kLeakyRelu: return x > 0 ? dy : 0.01f * dy;
    case Function::kSigmoid: {
      const float s = sigmoid(x);
      return dy * ((1.0f - s) * s);
    }
    case Function::kHardsigmoid: return x > -3.0f && x < 3.0f ? dy * (1.0f / 6.0f) : 0;
    default: return dy;
  }
}

// The blocks that work on an image, and which of them this one is.
struct Team {
  int64_t blocks, rank;
  // Its share of n results, which come in whole units.
  FC_DEVICE int64_t begin(int64_t n, int64_t unit = 1) const { return std::min(n, part_begin(ceil_div(n, unit), blocks, rank) * unit); }
  FC_DEVICE int64_t end(int64_t n, int64_t unit = 1) const { return std::min(n, part_begin(ceil_div(n, unit), blocks, rank + 1) * unit); }
};

constexpr int kColumns = 4;  // of a matrix that a thread takes at a time, where rows allow it
FC_DEVICE bool in_fours(const Array& weight, int64_t K) { return K % kColumns == 0 && reinterpret_cast<uintptr_t>(weight.data) % 16 == 0; }

// store(m, sum_k weight[m][k] v[k], in) for this block's rows m of K columns: as many lanes of a warp as it takes to a row.
template <int W, class Store>
FC_DEVICE void rows_of(const Array& weight, int64_t K, const float* v, int64_t begin, int64_t end, Store&& store) {
  constexpr int kRows = 4;  // in flight
  int lanes = 1;
  while (lanes < kWarp && lanes * W < K) lanes *= 2;
  const int lane = threadIdx.x % lanes, group = threadIdx.x / lanes, groups = blockDim.x / lanes;
  for (int64_t first = begin; first < end; first += groups * kRows) {
    float sums[kRows] = {};
    for (int64_t k = 0; k < K; k += lanes * W) {
      const int64_t column = k + lane * W;
      Raw<W> raw[kRows];
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const int64_t m = first + i * groups + group;
        raw[i] = load_raw<W>(weight, m * K + column, m < end && column < K);
      }
      const auto factor = load_global<Vec<float, W>>(v + column, column < K);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const Vec<float, W> w = to_float(raw[i], weight.dtype);
#pragma unroll
        for (int j = 0; j < W; ++j) sums[i] = fmaf(w[j], factor[j], sums[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      for (int other = lanes / 2; other > 0; other /= 2) sums[i] += shuffle_xor(sums[i], other);
      const int64_t m = first + i * groups + group;
      store(m, sums[i], m < end && lane == 0);
    }
  }
}
template <class Store>
FC_DEVICE void layer_rows(const Array& weight, int64_t K, const float* v, int64_t begin, int64_t end, Store&& store) {
  if (in_fours(weight, K)) rows_of<kColumns>(weight, K, v, begin, end, store);
  else rows_of<1>(weight, K, v, begin, end, store);
}

// out[k] = scale sum_m v[m] weight[m][k] for the rows m and columns k of these ranges: threads side by side along k take a row
// each, and their sums are added up in order. scratch: kColumns floats a thread.
template <int W>
FC_DEVICE void columns_of(const Array& weight, int64_t K, const float* v, int64_t m0, int64_t m1, int64_t k0, int64_t k1, float scale,
                          float* scratch, float* out) {
  const int threads = blockDim.x, lanes = static_cast<int>(std::min<int64_t>(threads, ceil_div(k1 - k0, W)));
  if (lanes == 0) return;
  const int rows = threads / lanes, lane = threadIdx.x % lanes, row = threadIdx.x / lanes;
  for (int64_t first = k0; first < k1; first += lanes * W) {
    const int64_t k = first + lane * W;
    Vec<float, W> sum{};
    if (row < rows) {
#pragma unroll 4
      for (int64_t m = m0 + row; m < m1; m += rows) {
        const Vec<float, W> w = load_array<W>(weight, m * K + k, k < k1);
        const float factor = load_global<float>(v + m);
#pragma unroll
        for (int j = 0; j < W; ++j) sum[j] = fmaf(factor, w[j], sum[j]);
      }
    }
    sync_threads();  // what was in scratch has been read
    store_shared(scratch + threadIdx.x * W, sum);
    sync_threads();
    if (row > 0) continue;
    for (int other = 1; other < rows; ++other) {
      const auto more = load_shared<Vec<float, W>>(scratch + (other * lanes + lane) * W);
#pragma unroll
      for (int j = 0; j < W; ++j) sum[j] += more[j];
    }
#pragma unroll
    for (int j = 0; j < W; ++j) sum[j] *= scale;
    store_global(out + k, sum, k < k1);
  }
}
FC_DEVICE void layer_columns(const Array& weight, int64_t K, const float* v, int64_t m0, int64_t m1, int64_t k0, int64_t k1, float scale,
                             float* scratch, float* out) {
  if (in_fours(weight, K)) columns_of<kColumns>(weight, K, v, m0, m1, k0, k1, scale, scratch, out);
  else columns_of<1>(weight, K, v, m0, m1, k0, k1, scale, scratch, out);
}

}  // namespace fastconv::cuda

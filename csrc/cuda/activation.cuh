// GELU, exact and by tanh, with its slope: csrc/cpu/activation_kernel.h with the hardware's exponential and reciprocal.
#pragma once

#include "params.h"
#include "portable.cuh"

namespace fastconv::cuda {

template <int N> struct Activated { Vec<float, N> value, slope; };

// The polynomial of 1 / (1 + 0.34 u) is a scaled complementary error function: the tail keeps its relative precision, and
// the derivative shares the exponential.
FC_DEVICE void gelu(float x, float& value, float& slope) {
  const float u = x < 0 ? -x : x, t = reciprocal(fmaf(0.34f, u, 1.0f));
  float q = -0.026120283f;
  q = fmaf(q, t, 0.13949855f);
  q = fmaf(q, t, -0.2731308f);
  q = fmaf(q, t, 0.20218049f);
  q = fmaf(q, t, -0.044716973f);
  q = fmaf(q, t, 0.115358554f);
  q = fmaf(q, t, 0.11519781f);
  q = fmaf(q, t, 0.13611218f);
  q = fmaf(q, t, 0.1356205f);
  const float density = exp2(-0.72134752f * x * x), tail = density * (q * t);
  const float cdf = x < 0 ? tail : 1.0f - tail;
  value = x * cdf;
  slope = fmaf(x * density, 0.398942280f, cdf);
}

// x times the logistic function of 2 sqrt(2 / pi) (x + 0.044715 x^3), from the exponential of what is negative: 1 - s loses
// no digits where s is near 1.
FC_DEVICE void gelu_tanh(float x, float& value, float& slope) {
  constexpr float kTwice = 1.59576912f, kLog2e = 1.44269504f;
  const float u = x < 0 ? -x : x, cubic = 0.044715f * x * x;
  const float e = exp2(-kTwice * kLog2e * u * (1.0f + cubic)), larger = reciprocal(1.0f + e), smaller = e * larger;
  const float s = x < 0 ? smaller : larger;
  value = x * s;
  slope = fmaf(x * (smaller * larger), kTwice * fmaf(3.0f, cubic, 1.0f), s);
}

// With kNone the value is x itself.
template <int N> FC_DEVICE Activated<N> activated(const Vec<float, N>& x, Activation act) {
  Activated<N> a;
  if (act == Activation::kGelu) {
#pragma unroll
    for (int i = 0; i < N; ++i) gelu(x[i], a.value[i], a.slope[i]);
  } else if (act == Activation::kGeluTanh) {
#pragma unroll
    for (int i = 0; i < N; ++i) gelu_tanh(x[i], a.value[i], a.slope[i]);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) a.value[i] = x[i], a.slope[i] = 1;
  }
  return a;
}

}  // namespace fastconv::cuda

// Activations, gates and their derivatives, with PyTorch's treatment of NaN and Inf. Included once per SIMD level.

template <class A, class F> FC_INLINE Vec<A> each_lane(Vec<A> v, F&& f) {
  for (int64_t i = 0; i < kLanes<A>; ++i) v[i] = f(v[i]);
  return v;
}

// e^x to 2 units of roundoff: 2^n times a polynomial in the rest (the coefficients of Cephes' expf).
FC_INLINE FloatVec exponential(FloatVec x) {
  const FloatVec high = broadcast<float>(88.0f), low = broadcast<float>(-87.0f);
  const FloatVec inside = x > high ? high : x < low ? low : x;
  const FloatVec shifted = inside * 1.44269504f + 12582912.0f;  // n in the low bits
  const FloatVec n = shifted - 12582912.0f;
  const FloatVec r = inside - n * 0.693359375f + n * 2.12194440e-4f;
  FloatVec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const FloatVec y = (FloatVec)((U32Vec)p + ((U32Vec)shifted << 23));
  return x != x ? x : x > high ? broadcast<float>(__builtin_inff()) : x < low ? zero<float>() : y;
}
FC_INLINE DoubleVec exponential(DoubleVec x) {
  return each_lane<double>(x, [](double v) __attribute__((always_inline)) { return __builtin_exp(v); });
}
FC_INLINE FloatVec error_function(FloatVec x) {
  return each_lane<float>(x, [](float v) __attribute__((always_inline)) { return __builtin_erff(v); });
}
FC_INLINE DoubleVec error_function(DoubleVec x) {
  return each_lane<double>(x, [](double v) __attribute__((always_inline)) { return __builtin_erf(v); });
}

template <class A> FC_INLINE Vec<A> sigmoid(Vec<A> x) { return A(1) / (exponential(-x) + A(1)); }
template <class A> FC_INLINE Vec<A> hardsigmoid(Vec<A> x) {
  const Vec<A> six = broadcast<A>(6), up = x + A(3);
  return (up < zero<A>() ? zero<A>() : up > six ? six : up) * (A(1) / A(6));
}
template <class A> FC_INLINE Vec<A> normal_cdf(Vec<A> x) { return (error_function(x * A(0.70710678118654752440)) + A(1)) * A(0.5); }

template <class A> FC_INLINE Vec<A> value_of(Function f, Vec<A> x) {
  const Vec<A> none = zero<A>();
  switch (f) {
    case Function::kRelu: return x <= none ? none : x;
    case Function::kSilu: return x * sigmoid<A>(x);
    case Function::kGelu: return x * normal_cdf<A>(x);
    case Function::kHardswish: return x * hardsigmoid<A>(x);
    case Function::kLeakyRelu: return x > none ? x : x * A(0.01);
    case Function::kSigmoid: return sigmoid<A>(x);
    case Function::kHardsigmoid: return hardsigmoid<A>(x);
    default: return x;
  }
}

// dy times the derivative at x; 0, not dy times 0, where the function is constant.
template <class A> FC_INLINE Vec<A> gradient_of(Function f, Vec<A> x, Vec<A> dy) {
  const Vec<A> none = zero<A>(), three = broadcast<A>(3);
  switch (f) {
    case Function::kRelu: return x <= none ? none : dy;
    case Function::kSilu: {
      const Vec<A> s = sigmoid<A>(x);
      return dy * s * (x * (A(1) - s) + A(1));
    }
    case Function::kGelu: return dy * (normal_cdf<A>(x) + x * exponential(x * x * A(-0.5)) * A(0.39894228040143267794));
    case Function::kHardswish: return x <= -three ? none : x < three ? dy * (x * (A(1) / A(3)) + A(0.5)) : dy;
    case Function::kLeakyRelu: return x > none ? dy : dy * A(0.01);
    case Function::kSigmoid: {
      const Vec<A> s = sigmoid<A>(x);
      return dy * ((A(1) - s) * s);
    }
    case Function::kHardsigmoid: return (x > -three) & (x < three) ? dy * (A(1) / A(6)) : none;
    default: return dy;
  }
}

// Activations, gates and their derivatives, with PyTorch's treatment of NaN and Inf. Included once per SIMD level.

template <class A, class F> FC_INLINE Vec<A> each_lane(Vec<A> v, F&& f) {
  for (int64_t i = 0; i < kLanes<A>; ++i) v[i] = f(v[i]);
  return v;
}

FC_INLINE DoubleVec exponential(DoubleVec x) {
  return each_lane<double>(x, [](double v) __attribute__((always_inline)) { return __builtin_exp(v); });
}
template <class A> FC_INLINE Vec<A> sigmoid(Vec<A> x) { return x != x ? x : A(1) / (exponential(-x) + A(1)); }
template <class A> FC_INLINE Vec<A> hardsigmoid(Vec<A> x) {
  const Vec<A> six = broadcast<A>(6), up = x + A(3);
  return (up < zero<A>() ? zero<A>() : up > six ? six : up) * (A(1) / A(6));
}

template <class A> FC_INLINE Vec<A> value_of(Function f, Vec<A> x) {
  const Vec<A> none = zero<A>();
  switch (f) {
    case Function::kRelu: return x <= none ? none : x;
    case Function::kSilu: return x * sigmoid<A>(x);
    case Function::kGelu: return gelu(x).value;
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
    case Function::kGelu: return dy * gelu(x).slope;
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

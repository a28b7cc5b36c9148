// GELU and its derivative on vectors, and the op gelu_linear's share of passes over activations. Included once per SIMD level.

FC_INLINE FloatVec absolute(FloatVec x) { return (FloatVec)((U32Vec)x & 0x7FFFFFFFu); }

// exp to 2 units of roundoff: 2^n times a polynomial of least relative error on [-ln 2 / 2, ln 2 / 2] (our own fit).
FC_INLINE FloatVec exponential(FloatVec x) {
  constexpr float kRound = 0x1.8p23f;  // adding it rounds to an integer, which then stands in the low bits
  const FloatVec shifted = x * 1.44269504f + kRound, n = shifted - kRound;
  const FloatVec r = x - n * 0x1.62e4p-1f - n * 1.42860677e-6f;  // ln 2 in two parts
  FloatVec p = broadcast<float>(0.0013836775f);
  p = p * r + 0.00837482f;
  p = p * r + 0.04166823f;
  p = p * r + 0.1666642f;
  p = p * r + 0.4999999f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const FloatVec scaled = (FloatVec)((U32Vec)p + ((U32Vec)shifted << 23));
  const FloatVec none = zero<float>();
  return x < -87.0f ? none : x > 88.0f ? none + __builtin_inff() : scaled;
}

template <class A> struct Activated { Vec<A> value, slope; };

// x Phi(x). Phi(-u) = exp(-u^2 / 2) q(u) with q, a scaled complementary error function, as a polynomial in 1 / (1 + 0.34 u)
// without constant term: the form of Abramowitz and Stegun 7.1.26, with more terms and least relative error, 3e-8, on
// [0, 14] (our own fit). So the tail keeps its relative precision, and the derivative shares the exponential.
FC_INLINE Activated<float> gelu(FloatVec x) {
  const FloatVec u = absolute(x), t = 1.0f / (1.0f + 0.34f * u);
  FloatVec q = broadcast<float>(-0.026120283f);
  q = q * t + 0.13949855f;
  q = q * t - 0.2731308f;
  q = q * t + 0.20218049f;
  q = q * t - 0.044716973f;
  q = q * t + 0.115358554f;
  q = q * t + 0.11519781f;
  q = q * t + 0.13611218f;
  q = q * t + 0.1356205f;
  const FloatVec density = exponential(-0.5f * x * x), tail = density * (q * t);
  const FloatVec cdf = x < 0.0f ? tail : 1.0f - tail;
  return {x * cdf, cdf + x * density * 0.398942280f};
}
// x (1 + tanh(k (x + 0.044715 x^3))) / 2 with k = sqrt(2 / pi): x times the logistic function s of twice the argument. From
// the exponential of what is negative, so that 1 - s loses no digits where s is near 1.
FC_INLINE Activated<float> gelu_tanh(FloatVec x) {
  constexpr float kTwice = 1.59576912f;
  const FloatVec cubic = 0.044715f * x * x;
  const FloatVec e = exponential(-kTwice * absolute(x) * (1.0f + cubic)), larger = 1.0f / (1.0f + e), smaller = e * larger;
  const FloatVec s = x < 0.0f ? smaller : larger;
  return {x * s, s + x * (smaller * larger) * kTwice * (1.0f + 3.0f * cubic)};
}

// In double only for tests of gradients: libm.
FC_INLINE Activated<double> gelu(DoubleVec x) {
  Activated<double> a;
  for (int64_t i = 0; i < kLanes<double>; ++i) {
    const double cdf = 0.5 * __builtin_erfc(-x[i] * 0.70710678118654752440);
    a.value[i] = x[i] * cdf;
    a.slope[i] = cdf + x[i] * __builtin_exp(-0.5 * x[i] * x[i]) * 0.39894228040143267794;
  }
  return a;
}
FC_INLINE Activated<double> gelu_tanh(DoubleVec x) {
  Activated<double> a;
  for (int64_t i = 0; i < kLanes<double>; ++i) {
    const double cubic = 0.044715 * x[i] * x[i], s = 1 / (1 + __builtin_exp(-1.59576912160573071176 * x[i] * (1 + cubic)));
    a.value[i] = x[i] * s;
    a.slope[i] = s + x[i] * s * (1 - s) * 1.59576912160573071176 * (1 + 3 * cubic);
  }
  return a;
}

// With kNone the value is x itself.
template <class A, Activation kAct> FC_INLINE Activated<A> activate(Vec<A> x) {
  if constexpr (kAct == Activation::kGelu) return gelu(x);
  else if constexpr (kAct == Activation::kGeluTanh) return gelu_tanh(x);
  else return {x, broadcast<A>(1)};
}
template <Activation kAct> struct ActivationTag { static constexpr Activation value = kAct; };
template <class F> FC_INLINE void with_activation(Activation act, F&& f) {
  if (act == Activation::kGelu) f(ActivationTag<Activation::kGelu>{});
  else if (act == Activation::kGeluTanh) f(ActivationTag<Activation::kGeluTanh>{});
  else f(ActivationTag<Activation::kNone>{});
}

template <class A> int64_t gelu_scratch_as(const GeluParams&) { return 4 * aligned_bytes(kChunk * sizeof(A)); }

// y = gelu(x); with dy also dx = gelu'(x) dy, where y may lie over dy. A task is a chunk.
template <class A> void gelu_as(const GeluParams& p, char* scratch, int64_t begin, int64_t end) {
  A *x_scratch = carve<A>(scratch, kChunk), *dy_scratch = carve<A>(scratch, kChunk), *y_scratch = carve<A>(scratch, kChunk), *dx_scratch = carve<A>(scratch, kChunk);
  const auto direct = [](MutableArray a) { return a.data && dtype_size(a.dtype) == sizeof(A); };
  with_activation(p.act, [&](auto tag) __attribute__((always_inline)) {
    constexpr Activation kAct = decltype(tag)::value;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task * kChunk, count = p.count - first < kChunk ? p.count - first : kChunk;
      const A* x = read(p.x, first, count, x_scratch);
      A* y = direct(p.y) ? reinterpret_cast<A*>(at(p.y, first)) : y_scratch;
      if (!p.dy.data) {
        for (int64_t i = 0; i < count; i += kLanes<A>) {
          const int64_t lanes = count - i < kLanes<A> ? count - i : kLanes<A>;
          store_lanes<A>(y + i, activate<A, kAct>(load_lanes<A>(x + i, lanes)).value, lanes);
        }
      } else {
        const A* dy = read(p.dy, first, count, dy_scratch);
        A* dx = direct(p.dx) ? reinterpret_cast<A*>(at(p.dx, first)) : dx_scratch;
        for (int64_t i = 0; i < count; i += kLanes<A>) {
          const int64_t lanes = count - i < kLanes<A> ? count - i : kLanes<A>;
          const Activated<A> a = activate<A, kAct>(load_lanes<A>(x + i, lanes));
          store_lanes<A>(dx + i, load_lanes<A>(dy + i, lanes) * a.slope, lanes);
          if (p.y.data) store_lanes<A>(y + i, a.value, lanes);
        }
        if (!direct(p.dx)) write(p.dx, first, count, dx);
      }
      if (p.y.data && !direct(p.y)) write(p.y, first, count, y);
    }
  });
}

// LayerNorm over the channels of each pixel, forward and the first half of backward. Included once per SIMD level.

template <class A> FC_INLINE Vec<A> keep_lanes(Vec<A> v, int64_t lanes) {
  A kept[kLanes<A>] = {};
  store_lanes<A>(kept, v, lanes);
  return load_as(kept);
}

// y = (z - mean) rstd norm_weight + norm_bias for `pixels` rows of C values; the variance in a second pass over the row.
template <class A> void layer_norm_forward(const ForwardParams& p, const A* z, int64_t first_pixel, int64_t pixels) {
  const int64_t C = p.shape.C, full = C / kLanes<A> * kLanes<A>, tail = C - full;
  const A* weight = static_cast<const A*>(p.norm_weight);
  const A* bias = static_cast<const A*>(p.norm_bias);
  A* mean_out = static_cast<A*>(p.mean);
  A* rstd_out = static_cast<A*>(p.rstd);
  with_type<A>(p.y.dtype, [&](auto* type) __attribute__((always_inline)) {
    using T = std::remove_cv_t<std::remove_pointer_t<decltype(type)>>;
    T* y = reinterpret_cast<T*>(at(p.y, first_pixel * C));
    for (int64_t i = 0; i < pixels; ++i, z += C, y += C) {
      Vec<A> sum = zero<A>(), square = zero<A>();
      for (int64_t c = 0; c < full; c += kLanes<A>) sum += load_as(z + c);
      if (tail) sum += load_lanes<A>(z + full, tail);
      const A mean = sum_lanes<A>(sum) / static_cast<A>(C);
      for (int64_t c = 0; c < full; c += kLanes<A>) {
        const Vec<A> d = load_as(z + c) - mean;
        square += d * d;
      }
      if (tail) {
        const Vec<A> d = keep_lanes<A>(load_lanes<A>(z + full, tail) - mean, tail);
        square += d * d;
      }
      // One channel is its own mean. 0 says so to backward, which sees z rounded and would find z - mean a little off 0.
      const A rstd = C == 1 ? A(0) : A(1) / static_cast<A>(__builtin_sqrt(static_cast<double>(sum_lanes<A>(square) / static_cast<A>(C) + static_cast<A>(p.eps))));
      for (int64_t c = 0; c < full; c += kLanes<A>)
        store_as(y + c, (load_as(z + c) - mean) * rstd * load_as(weight + c) + load_as(bias + c));
      if (tail)
        store_lanes<A>(y + full, (load_lanes<A>(z + full, tail) - mean) * rstd * load_lanes<A>(weight + full, tail) + load_lanes<A>(bias + full, tail), tail);
      if (mean_out) mean_out[first_pixel + i] = mean;
      if (rstd_out) rstd_out[first_pixel + i] = rstd;
    }
  });
}

constexpr int64_t kAhead = 1024;  // elements: two streams a thread, which the hardware alone does not keep full

// The two means over channels that couple a pixel's channels in the norm's backward, mean_c(g dy) and mean_c(g dy xhat)
// with g = norm_weight, for kPixels pixels at once, so that g and the partial sums are loaded once for all of them.
// With kSum the pixels also count in dnorm_weight and dnorm_bias.
template <class A, int kPixels, bool kSum>
FC_INLINE void couple_pixels(const BackwardParams& p, int64_t pixel, const A* dy, const A* z, A* coupling, A* dnorm_weight, A* dnorm_bias) {
  const int64_t C = p.shape.C;
  const A* weight = static_cast<const A*>(p.norm_weight);
  A mean[kPixels], rstd[kPixels];
  Vec<A> sum[kPixels], product[kPixels];
  FC_UNROLL for (int i = 0; i < kPixels; ++i) {
    mean[i] = static_cast<const A*>(p.mean)[pixel + i];
    rstd[i] = static_cast<const A*>(p.rstd)[pixel + i];
    sum[i] = product[i] = zero<A>();
  }
  const auto step = [&](int64_t c, int64_t lanes) __attribute__((always_inline)) {
    const Vec<A> g = load_lanes<A>(weight + c, lanes);
    Vec<A> dw = zero<A>(), db = zero<A>();
    FC_UNROLL for (int i = 0; i < kPixels; ++i) {
      prefetch(dy + i * C + c + kAhead);
      prefetch(z + i * C + c + kAhead);
      const Vec<A> d = load_lanes<A>(dy + i * C + c, lanes);
      const Vec<A> xhat = (load_lanes<A>(z + i * C + c, lanes) - mean[i]) * rstd[i];
      sum[i] += g * d;
      product[i] += g * d * xhat;
      if (kSum) dw += d * xhat, db += d;
    }
    if (kSum) {
      store_lanes<A>(dnorm_weight + c, load_lanes<A>(dnorm_weight + c, lanes) + dw, lanes);
      store_lanes<A>(dnorm_bias + c, load_lanes<A>(dnorm_bias + c, lanes) + db, lanes);
    }
  };
  const int64_t full = C / kLanes<A> * kLanes<A>;
  for (int64_t c = 0; c < full; c += kLanes<A>) step(c, kLanes<A>);
  if (full < C) step(full, C - full);
  FC_UNROLL for (int i = 0; i < kPixels; ++i) {
    coupling[2 * i] = sum_lanes<A>(sum[i]) / static_cast<A>(C);
    coupling[2 * i + 1] = sum_lanes<A>(product[i]) / static_cast<A>(C);
  }
}

constexpr int64_t kNormPixels = 4;

// couple_pixels for the pixels [begin, end); `row` holds 2 kNormPixels C values.
template <class A, bool kSum> void couple(const BackwardParams& p, int64_t begin, int64_t end, A* row, A* coupling, A* dnorm) {
  const int64_t C = p.shape.C;
  for (int64_t pixel = begin; pixel < end;) {
    const int64_t count = end - pixel >= kNormPixels ? kNormPixels : 1;
    const A* dy = read(p.dy, pixel * C, count * C, row);
    const A* z = read(p.z, pixel * C, count * C, row + kNormPixels * C);
    A* out = coupling + 2 * (pixel - begin);
    if (count == kNormPixels) couple_pixels<A, kNormPixels, kSum>(p, pixel, dy, z, out, dnorm, dnorm + C);
    else couple_pixels<A, 1, kSum>(p, pixel, dy, z, out, dnorm, dnorm + C);
    pixel += count;
  }
}

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

// kPixels rows at once, so that norm_weight and the partial sums are loaded once for all of them.
template <class A, int kPixels>
FC_INLINE void norm_backward_pixels(const BackwardParams& p, int64_t pixel, const A* dy, const A* z, A* dnorm_weight, A* dnorm_bias) {
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
    Vec<A> dw = load_lanes<A>(dnorm_weight + c, lanes), db = load_lanes<A>(dnorm_bias + c, lanes);
    FC_UNROLL for (int i = 0; i < kPixels; ++i) {
      prefetch(dy + i * C + c + kAhead);
      prefetch(z + i * C + c + kAhead);
      const Vec<A> d = load_lanes<A>(dy + i * C + c, lanes);
      const Vec<A> xhat = (load_lanes<A>(z + i * C + c, lanes) - mean[i]) * rstd[i];
      sum[i] += g * d;
      product[i] += g * d * xhat;
      dw += d * xhat;
      db += d;
    }
    store_lanes<A>(dnorm_weight + c, dw, lanes);
    store_lanes<A>(dnorm_bias + c, db, lanes);
  };
  const int64_t full = C / kLanes<A> * kLanes<A>;
  for (int64_t c = 0; c < full; c += kLanes<A>) step(c, kLanes<A>);
  if (full < C) step(full, C - full);
  A* coupling = static_cast<A*>(p.coupling) + 2 * pixel;
  FC_UNROLL for (int i = 0; i < kPixels; ++i) {
    coupling[2 * i] = sum_lanes<A>(sum[i]) / static_cast<A>(C);
    coupling[2 * i + 1] = sum_lanes<A>(product[i]) / static_cast<A>(C);
  }
}

constexpr int64_t kNormPixels = 4;

template <class A> int64_t norm_backward_scratch_as(const BackwardParams& p) { return 2 * aligned_bytes(kNormPixels * p.shape.C * sizeof(A)); }

// Per pixel the two means over channels that couple them, per slice a partial of dnorm_weight and dnorm_bias.
template <class A> void norm_backward_as(const BackwardParams& p, char* scratch, int64_t begin, int64_t end) {
  const int64_t C = p.shape.C, pixels = p.shape.pixels();
  A* dy_scratch = carve<A>(scratch, kNormPixels * C);
  A* z_scratch = carve<A>(scratch, kNormPixels * C);
  for (int64_t slice = begin; slice < end; ++slice) {
    A* partial = static_cast<A*>(p.norm_partial) + slice * 2 * C;
    for (int64_t c = 0; c < 2 * C; ++c) partial[c] = 0;
    const int64_t pixel1 = part_begin(pixels, p.norm_slices, slice + 1);
    for (int64_t pixel = part_begin(pixels, p.norm_slices, slice); pixel < pixel1;) {
      const int64_t count = pixel1 - pixel >= kNormPixels ? kNormPixels : 1;
      const A* dy = read(p.dy, pixel * C, count * C, dy_scratch);
      const A* z = read(p.z, pixel * C, count * C, z_scratch);
      if (count == kNormPixels) norm_backward_pixels<A, kNormPixels>(p, pixel, dy, z, partial, partial + C);
      else norm_backward_pixels<A, 1>(p, pixel, dy, z, partial, partial + C);
      pixel += count;
    }
  }
}

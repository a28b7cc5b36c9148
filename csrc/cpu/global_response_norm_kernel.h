// Global response normalisation over (N, L, C), the activation before it recomputed in each pass. Included once per SIMD level.
//
// Each direction is a sum over the pixels of an image (a partial for each band of them), a few operations on the sums, which
// the glue does, and a pass that applies them.

template <class A> FC_INLINE int64_t grn_rows(int64_t C) { return C < kChunk ? kChunk / C : 1; }
template <class A> int64_t grn_scratch_as(const GrnParams& p) { return 3 * aligned_bytes(grn_rows<A>(p.C) * p.C * sizeof(A)); }

// Calls f(image, first pixel of (N, L), pixels) for chunks of the bands [begin, end).
template <class A, class F> FC_INLINE void for_rows(const GrnParams& p, int64_t band, F&& f) {
  const int64_t image = band / p.bands, step = grn_rows<A>(p.C);
  const int64_t stop = part_begin(p.L, p.bands, band % p.bands + 1);
  for (int64_t pixel = part_begin(p.L, p.bands, band % p.bands); pixel < stop; pixel += step)
    f(image, image * p.L + pixel, stop - pixel < step ? stop - pixel : step);
}

// partial[band][C]: sum of a^2. With dy, partial[band][2][C]: sums of dy a and of dy.
template <class A> void grn_sum_as(const GrnParams& p, char* scratch, int64_t begin, int64_t end) {
  const int64_t C = p.C, size = grn_rows<A>(C) * C, sums = p.dy.data ? 2 : 1;
  A *x_scratch = carve<A>(scratch, size), *dy_scratch = carve<A>(scratch, size);
  with_activation(p.act, [&](auto tag) __attribute__((always_inline)) {
    constexpr Activation kAct = decltype(tag)::value;
    for (int64_t band = begin; band < end; ++band) {
      A* partial = static_cast<A*>(p.partial) + band * sums * C;
      for (int64_t c = 0; c < sums * C; ++c) partial[c] = 0;
      for_rows<A>(p, band, [&](int64_t, int64_t pixel, int64_t rows) __attribute__((always_inline)) {
        const A* x = read(p.x, pixel * C, rows * C, x_scratch);
        const A* dy = p.dy.data ? read(p.dy, pixel * C, rows * C, dy_scratch) : nullptr;
        for (int64_t c = 0; c < C; c += kLanes<A>) {
          const int64_t lanes = C - c < kLanes<A> ? C - c : kLanes<A>;
          Vec<A> first = zero<A>(), second = zero<A>();
          for (int64_t i = c; i < rows * C; i += C) {
            const Vec<A> a = activate<A, kAct>(load_lanes<A>(x + i, lanes)).value;
            const Vec<A> d = dy ? load_lanes<A>(dy + i, lanes) : a;
            first += a * d;
            second += d;
          }
          store_lanes<A>(partial + c, load_lanes<A>(partial + c, lanes) + first, lanes);
          if (dy) store_lanes<A>(partial + C + c, load_lanes<A>(partial + C + c, lanes) + second, lanes);
        }
      });
    }
  });
}

// out = a factor + term, with term (C,); with dy, out = (dy factor + a term) act'(x), with term (N, C).
template <class A> void grn_apply_as(const GrnParams& p, char* scratch, int64_t begin, int64_t end) {
  const int64_t C = p.C, size = grn_rows<A>(C) * C;
  A *x_scratch = carve<A>(scratch, size), *dy_scratch = carve<A>(scratch, size), *out_scratch = carve<A>(scratch, size);
  const bool direct = dtype_size(p.out.dtype) == sizeof(A);
  with_activation(p.act, [&](auto tag) __attribute__((always_inline)) {
    constexpr Activation kAct = decltype(tag)::value;
    for (int64_t band = begin; band < end; ++band)
      for_rows<A>(p, band, [&](int64_t image, int64_t pixel, int64_t rows) __attribute__((always_inline)) {
        const A* x = read(p.x, pixel * C, rows * C, x_scratch);
        const A* dy = p.dy.data ? read(p.dy, pixel * C, rows * C, dy_scratch) : nullptr;
        A* out = direct ? reinterpret_cast<A*>(at(p.out, pixel * C)) : out_scratch;
        const A* factor = static_cast<const A*>(p.factor) + image * C;
        const A* term = static_cast<const A*>(p.term) + (dy ? image * C : 0);
        for (int64_t row = 0; row < rows * C; row += C)
          for (int64_t c = 0; c < C; c += kLanes<A>) {
            const int64_t lanes = C - c < kLanes<A> ? C - c : kLanes<A>;
            const Activated<A> a = activate<A, kAct>(load_lanes<A>(x + row + c, lanes));
            const Vec<A> f = load_lanes<A>(factor + c, lanes), t = load_lanes<A>(term + c, lanes);
            Vec<A> v;
            if (dy) v = (load_lanes<A>(dy + row + c, lanes) * f + a.value * t) * a.slope;
            else v = a.value * f + t;
            store_lanes<A>(out + row + c, v, lanes);
          }
        if (!direct) write(p.out, pixel * C, rows * C, out);
      });
  });
}

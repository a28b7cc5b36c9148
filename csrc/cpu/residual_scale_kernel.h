// The tail of a residual block, out = shortcut + mask gamma y. Included once per SIMD level.

template <class A> FC_INLINE int64_t chunk_pixels(int64_t C) { return C < kChunk ? kChunk / C : 1; }
template <class A> int64_t residual_scratch_as(const ResidualParams& p) { return 3 * aligned_bytes(chunk_pixels<A>(p.C) * p.C * sizeof(A)); }

// Calls f(first pixel, pixels, mask of their image) for the chunks of the slices [begin, end).
template <class A, class F> FC_INLINE void for_chunks(const ResidualParams& p, int64_t slice, F&& f) {
  const int64_t pixel1 = part_begin(p.N * p.L, p.slices, slice + 1), step = chunk_pixels<A>(p.C);
  for (int64_t pixel = part_begin(p.N * p.L, p.slices, slice); pixel < pixel1;) {
    const int64_t image_end = (pixel / p.L + 1) * p.L, stop = image_end < pixel1 ? image_end : pixel1;
    const int64_t count = stop - pixel < step ? stop - pixel : step;
    f(pixel, count, p.mask ? static_cast<const A*>(p.mask)[pixel / p.L] : A(1));
    pixel += count;
  }
}

template <class A> void residual_forward_as(const ResidualParams& p, char* scratch, int64_t begin, int64_t end) {
  const int64_t C = p.C, size = chunk_pixels<A>(C) * C;
  A *a = carve<A>(scratch, size), *b = carve<A>(scratch, size), *o = carve<A>(scratch, size);
  const A* gamma = static_cast<const A*>(p.gamma);
  const bool direct = dtype_size(p.out.dtype) == sizeof(A);
  for (int64_t slice = begin; slice < end; ++slice)
    for_chunks<A>(p, slice, [&](int64_t pixel, int64_t count, A mask) __attribute__((always_inline)) {
      const A* shortcut = read(p.shortcut, pixel * C, count * C, a);
      const A* y = read(p.y, pixel * C, count * C, b);
      A* out = direct ? reinterpret_cast<A*>(at(p.out, pixel * C)) : o;
      for (int64_t i = 0; i < count; ++i) {
        const int64_t row = i * C;
        for (int64_t c = 0; c < C; c += kLanes<A>) {
          const int64_t lanes = C - c < kLanes<A> ? C - c : kLanes<A>;
          Vec<A> v = load_lanes<A>(y + row + c, lanes) * mask;
          if (gamma) v *= load_lanes<A>(gamma + c, lanes);
          store_lanes<A>(out + row + c, load_lanes<A>(shortcut + row + c, lanes) + v, lanes);
        }
      }
      if (!direct) write(p.out, pixel * C, count * C, out);
    });
}

template <class A> void residual_backward_as(const ResidualParams& p, char* scratch, int64_t begin, int64_t end) {
  const int64_t C = p.C, size = chunk_pixels<A>(C) * C;
  A *a = carve<A>(scratch, size), *b = carve<A>(scratch, size), *o = carve<A>(scratch, size);
  const A* gamma = static_cast<const A*>(p.gamma);
  const bool direct = p.dy.data && dtype_size(p.dy.dtype) == sizeof(A);
  for (int64_t slice = begin; slice < end; ++slice) {
    A* dgamma = p.partial ? static_cast<A*>(p.partial) + slice * C : nullptr;
    if (dgamma)
      for (int64_t c = 0; c < C; ++c) dgamma[c] = 0;
    for_chunks<A>(p, slice, [&](int64_t pixel, int64_t count, A mask) __attribute__((always_inline)) {
      const A* dout = read(p.dout, pixel * C, count * C, a);
      const A* y = dgamma ? read(p.y, pixel * C, count * C, b) : nullptr;
      A* dy = direct ? reinterpret_cast<A*>(at(p.dy, pixel * C)) : o;
      for (int64_t c = 0; c < C; c += kLanes<A>) {
        const int64_t lanes = C - c < kLanes<A> ? C - c : kLanes<A>;
        const Vec<A> scale = gamma ? load_lanes<A>(gamma + c, lanes) * mask : broadcast<A>(mask);
        Vec<A> sum = zero<A>();
        for (int64_t i = c; i < count * C; i += C) {
          const Vec<A> d = load_lanes<A>(dout + i, lanes);
          if (dgamma) sum += d * load_lanes<A>(y + i, lanes);
          if (p.dy.data) store_lanes<A>(dy + i, d * scale, lanes);
        }
        if (dgamma) store_lanes<A>(dgamma + c, load_lanes<A>(dgamma + c, lanes) + sum * mask, lanes);
      }
      if (p.dy.data && !direct) write(p.dy, pixel * C, count * C, dy);
    });
  }
}

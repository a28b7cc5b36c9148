// Depthwise convolution on channels-last maps, forward and backward, with or without the LayerNorm that follows it.
// Included once per SIMD level, inside its namespace.
//
// The work goes by channel blocks of one vector. Rows are staged (converted) into a ring of K rows that stays in the L1
// cache; a strip of kStrip output pixels is kept in registers while K x K taps pass over it. Backward runs one sweep: a
// staged row of dz serves dx of its neighbours and the weight gradient of K rows of x.
//
// Padding is left out of every sum, not added as zeros: a zero times an Inf would be a NaN that no formula holds.
//
//   dx[h, w] = sum_k dz[h - k + pad, ...] weight[k]   = the forward pass over dz with flipped weights
//   dweight[k] = sum_{h, w} x[h, w] dz[h - k + pad, ...]   so that only dz carries a halo

template <class A> FC_INLINE int64_t row_elements(const ConvShape& s) { return s.W * kLanes<A>; }
// K rows of one channel block. Row h lives in slot h % K.
template <class A> struct Ring {
  A* data;
  const A** rows;  // scratch for window()
  int64_t K, pad, H, stride, next;

  Ring(char*& scratch, const ConvShape& s) : K(s.K), pad(s.pad()), H(s.H), stride(row_elements<A>(s)), next(0) {
    data = carve<A>(scratch, K * stride);
    rows = carve<const A*>(scratch, K);
  }
  static int64_t bytes(const ConvShape& s) {
    return aligned_bytes(s.K * row_elements<A>(s) * static_cast<int64_t>(sizeof(A))) + aligned_bytes(s.K * 8);
  }
  void start(int64_t h0) { next = h0 > pad ? h0 - pad : 0; }
  // Stages the rows that output row h needs and points rows[first .. end) at those inside the map.
  template <class Stage> FC_INLINE void window(int64_t h, int64_t& first, int64_t& end, Stage&& stage) {
    const int64_t last = h + pad < H ? h + pad : H - 1;
    for (; next <= last; ++next) stage(next, data + next % K * stride);
    first = h < pad ? pad - h : 0;
    end = h + pad < H ? K : H + pad - h;
    for (int64_t k = first; k < end; ++k) rows[k] = data + (h + k - pad) % K * stride;
  }
};

// One strip of kStrip output pixels from column w on, `count` columns (kLeast or more) before the end of the row:
// acc[j] = sum over taps of row[w + j + kw - pad] * weight[kh, kw]. kK is the kernel size, or 0 where only K is known.
template <class A, int kK, int kStrip, int kLeast, class Emit>
FC_INLINE void conv_strip(const A* const* rows, int64_t first, int64_t end, const A* weight, int64_t K, int64_t w, int64_t count,
                          Emit&& emit) {
  const int64_t left = K / 2 - w, right = K / 2 + count;  // of the columns that the strip meets, those inside the map
  Vec<A> acc[kStrip];
  FC_UNROLL for (int j = 0; j < kStrip; ++j) acc[j] = zero<A>();
  for (int64_t kh = first; kh < end; ++kh) {
    const A* in = rows[kh] + (w - K / 2) * kLanes<A>;
    const A* taps = weight + kh * K * kLanes<A>;
    if constexpr (kK > 0) {
      Vec<A> tap[kK > 0 ? kK : 1];
      FC_UNROLL for (int kw = 0; kw < kK; ++kw) tap[kw] = load(taps + kw * kLanes<A>);
      FC_UNROLL for (int c = 0; c < kStrip + kK - 1; ++c) {
        if ((c < kK / 2 && c < left) || (c >= kK / 2 + kLeast && c >= right)) continue;
        const Vec<A> v = load(in + c * kLanes<A>);
        FC_UNROLL for (int kw = 0; kw < kK; ++kw)
          if (c - kw >= 0 && c - kw < kStrip) acc[c - kw] += tap[kw] * v;
      }
    } else {
      for (int64_t kw = 0; kw < K; ++kw) {
        const Vec<A> tap = load(taps + kw * kLanes<A>);
        const auto add = [&](int j) __attribute__((always_inline)) { acc[j] += tap * load(in + (kw + j) * kLanes<A>); };
        if (kw >= left && kw + kStrip <= right) {
          FC_UNROLL for (int j = 0; j < kStrip; ++j) add(j);
        } else {
          FC_UNROLL for (int j = 0; j < kStrip; ++j)
            if (static_cast<uint64_t>(kw + j - left) < static_cast<uint64_t>(right - left)) add(j);  // left <= kw + j < right
        }
      }
    }
  }
  FC_UNROLL for (int j = 0; j < kStrip; ++j)
    if (j < count) emit(w + j, acc[j]);
}

// A whole row; emit(w, value) receives each output pixel once.
template <class A, int kK, class Emit>
FC_INLINE void conv_row(const A* const* rows, int64_t first, int64_t end, const A* weight, int64_t K, int64_t W, Emit&& emit) {
  constexpr int kLong = kManyRegisters ? 14 : 7;
  for (int64_t w = 0; w < W;) {
    const int64_t left = W - w;
    if (kLong == 14 && left > 11) {
      conv_strip<A, kK, kLong, 12>(rows, first, end, weight, K, w, left, emit);
      w += kLong;
    } else if (left > 4) {
      conv_strip<A, kK, 7, 5>(rows, first, end, weight, K, w, left, emit);
      w += 7;
    } else {
      conv_strip<A, kK, 4, 1>(rows, first, end, weight, K, w, left, emit);
      w += 4;
    }
  }
}

// dweight of kRows consecutive taps kh .. kh + kRows - 1 from kStrip pixels of x: each staged column of dz is loaded once
// and meets all the pixels that it pairs with. acc[r][kw] += x[j] * dz[row of kh + r][j + pad - kw].
template <class A, int kK, int kRows, int kStrip>
FC_INLINE void wgrad_strip(const A* const* dz, const A* x, int64_t w, int64_t W, Vec<A> (&acc)[kRows][kK]) {
  const int64_t left = kK / 2 - w, right = kK / 2 + W - w;  // as in conv_strip
  Vec<A> pixel[kStrip];
  FC_UNROLL for (int j = 0; j < kStrip; ++j) pixel[j] = load(x + (w + j) * kLanes<A>);
  FC_UNROLL for (int c = 0; c < kStrip + kK - 1; ++c) {
    if ((c < kK / 2 && c < left) || (c >= kK / 2 + kStrip && c >= right)) continue;
    FC_UNROLL for (int r = 0; r < kRows; ++r) {
      const Vec<A> v = load(dz[r] + (w + c - kK / 2) * kLanes<A>);
      FC_UNROLL for (int j = 0; j < kStrip; ++j)
        if (j - c + kK - 1 >= 0 && j - c + kK - 1 < kK) acc[r][j - c + kK - 1] += pixel[j] * v;
    }
  }
}

template <class A, int kK, int kRows>
FC_INLINE void wgrad_taps(const A* const* rows, int64_t kh, const A* x, int64_t W, A* dweight) {
  const A* dz[kRows];
  Vec<A> acc[kRows][kK];
  FC_UNROLL for (int r = 0; r < kRows; ++r) {
    dz[r] = rows[kK - 1 - (kh + r)];
    FC_UNROLL for (int kw = 0; kw < kK; ++kw) acc[r][kw] = load(dweight + ((kh + r) * kK + kw) * kLanes<A>);
  }
  int64_t w = 0;
  for (; W - w >= 7; w += 7) wgrad_strip<A, kK, kRows, 7>(dz, x, w, W, acc);
  for (; W - w >= 4; w += 4) wgrad_strip<A, kK, kRows, 4>(dz, x, w, W, acc);
  for (; w < W; ++w) wgrad_strip<A, kK, kRows, 1>(dz, x, w, W, acc);
  FC_UNROLL for (int r = 0; r < kRows; ++r)
    FC_UNROLL for (int kw = 0; kw < kK; ++kw) store(dweight + ((kh + r) * kK + kw) * kLanes<A>, acc[r][kw]);
}

// Adds one row of x, against the window of dz rows around it, to dweight [K * K][lanes].
template <class A, int kK>
FC_INLINE void wgrad_row(const A* const* rows, int64_t first, int64_t end, const A* x, int64_t K, int64_t W, A* dweight) {
  // rows[k] is dz row h + k - pad; tap kh wants dz row h + pad - kh, so k = K - 1 - kh.
  int64_t kh = K - end;
  const int64_t kh_end = K - first;
  if constexpr (kK > 0) {
    while (kh < kh_end) {
      const int64_t left = kh_end - kh;
      if (kManyRegisters && left == 3) {
        wgrad_taps<A, kK, kManyRegisters ? 3 : 1>(rows, kh, x, W, dweight);
        kh += 3;
      } else if (kManyRegisters && left >= 2) {
        wgrad_taps<A, kK, kManyRegisters ? 2 : 1>(rows, kh, x, W, dweight);
        kh += 2;
      } else {
        wgrad_taps<A, kK, 1>(rows, kh, x, W, dweight);
        kh += 1;
      }
    }
  } else {
    for (; kh < kh_end; ++kh)
      for (int64_t kw = 0; kw < K; ++kw) {
        const int64_t shift = K / 2 - kw, w0 = shift < 0 ? -shift : 0, w1 = shift > 0 ? W - shift : W;
        const A* dz = rows[K - 1 - kh] + shift * kLanes<A>;
        Vec<A> acc = load(dweight + (kh * K + kw) * kLanes<A>);
        for (int64_t w = w0; w < w1; ++w) acc += load(x + w * kLanes<A>) * load(dz + w * kLanes<A>);
        store(dweight + (kh * K + kw) * kLanes<A>, acc);
      }
  }
}

// A block takes one vector from each pixel, a stride that hardware prefetchers miss. So staging asks for what comes next:
// the row below, used after this row's arithmetic, and the next block of this pixel, used after this band. On a cold cache
// that is worth 12 to 35% of the backward pass.
template <class T> FC_INLINE void prefetch_staged(const T* p, int64_t row_stride, int64_t block) {
  prefetch(p + row_stride);
  prefetch_l2(p + block);
}

// One channel block of a row of pixels into the accumulation type.
template <class A> FC_INLINE void stage_row(Array a, const ConvShape& s, int64_t pixel, int64_t c0, int64_t lanes, A* out) {
  with_type<A>(a.dtype, [&](auto* type) __attribute__((always_inline)) {
    auto* p = reinterpret_cast<decltype(type)>(at(a, pixel * s.C + c0));
    if (lanes == kLanes<A>)
      for (int64_t w = 0; w < s.W; ++w) {
        prefetch_staged(p + w * s.C, s.W * s.C, kLanes<A>);
        store(out + w * kLanes<A>, load_as(p + w * s.C));
      }
    else
      for (int64_t w = 0; w < s.W; ++w) store(out + w * kLanes<A>, load_lanes<A>(p + w * s.C, lanes));
  });
}

template <class A> void pack_weight_as(const ConvShape& s, Array weight, bool flip, A* packed, int64_t begin, int64_t end) {
  const int64_t taps = s.K * s.K;
  with_type<A>(weight.dtype, [&](auto* type) __attribute__((always_inline)) {
    using T = std::remove_cv_t<std::remove_pointer_t<decltype(type)>>;
    const T* w = static_cast<const T*>(weight.data);
    for (int64_t block = begin; block < end; ++block) {
      A* out = packed + block * taps * kLanes<A>;
      const int64_t c0 = block * kLanes<A>, lanes = s.C - c0 < kLanes<A> ? s.C - c0 : kLanes<A>;
      for (int64_t k = 0; k < taps; ++k) {
        T column[kLanes<A>] = {};
        for (int64_t i = 0; i < lanes; ++i) column[i] = w[(c0 + i) * taps + (flip ? taps - 1 - k : k)];
        store(out + k * kLanes<A>, load_as(column));
      }
    }
  });
}
inline void pack_weight(const ConvShape& s, Array weight, bool flip, bool to_double, void* packed, int64_t begin, int64_t end) {
  if (to_double) pack_weight_as(s, weight, flip, static_cast<double*>(packed), begin, end);
  else pack_weight_as(s, weight, flip, static_cast<float*>(packed), begin, end);
}

// Runs f<kK> for the kernel sizes that are compiled whole, f<0> for the others.
template <class F> FC_INLINE void with_kernel_size(int64_t K, F&& f) {
  if (K == 7) f(std::integral_constant<int, 7>{});
  else if (K == 5) f(std::integral_constant<int, 5>{});
  else if (K == 3) f(std::integral_constant<int, 3>{});
  else f(std::integral_constant<int, 0>{});
}

// ---- forward

// z of a band in the accumulation type: the caller's z where that has this type, else scratch.
template <class A> FC_INLINE bool writes_through(const ForwardParams& p) { return p.z.data && dtype_size(p.z.dtype) == sizeof(A); }

template <class A> int64_t forward_scratch_as(const ForwardParams& p) {
  const int64_t band = p.norm_weight && !writes_through<A>(p) ? p.bands.rows * p.shape.W * p.shape.C : 0;
  return Ring<A>::bytes(p.shape) + aligned_bytes(band * sizeof(A));
}

template <class A, int kK> void forward_band(const ForwardParams& p, Ring<A>& ring, A* zs, int64_t n, int64_t h0, int64_t h1) {
  const ConvShape& s = p.shape;
  const int64_t blocks = ceil_div(s.C, kLanes<A>), first_pixel = (n * s.H + h0) * s.W;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t c0 = block * kLanes<A>, lanes = s.C - c0 < kLanes<A> ? s.C - c0 : kLanes<A>;
    const A* weight = static_cast<const A*>(p.packed) + block * s.K * s.K * kLanes<A>;
    const Vec<A> bias = load_lanes<A>(static_cast<const A*>(p.bias) + c0, lanes);
    ring.start(h0);
    for (int64_t h = h0; h < h1; ++h) {
      int64_t first, end;
      ring.window(h, first, end, [&](int64_t r, A* out) __attribute__((always_inline)) { stage_row(p.x, s, (n * s.H + r) * s.W, c0, lanes, out); });
      if (zs) {
        A* out = zs + (h - h0) * s.W * s.C + c0;
        conv_row<A, kK>(ring.rows, first, end, weight, s.K, s.W,
                        [&](int64_t w, Vec<A> v) __attribute__((always_inline)) { store_lanes<A>(out + w * s.C, v + bias, lanes); });
      } else {
        const int64_t pixel = (n * s.H + h) * s.W;
        with_type<A>(p.y.dtype, [&](auto* type) __attribute__((always_inline)) {
          using T = std::remove_cv_t<std::remove_pointer_t<decltype(type)>>;
          T* out = reinterpret_cast<T*>(at(p.y, pixel * s.C + c0));
          conv_row<A, kK>(ring.rows, first, end, weight, s.K, s.W,
                          [&](int64_t w, Vec<A> v) __attribute__((always_inline)) { store_lanes<A>(out + w * s.C, v + bias, lanes); });
        });
      }
    }
  }
  if (!zs) return;
  const int64_t pixels = (h1 - h0) * s.W;
  if (p.z.data && !writes_through<A>(p)) write(p.z, first_pixel * s.C, pixels * s.C, zs);
  layer_norm_forward(p, zs, first_pixel, pixels);
}

template <class A> void forward_as(const ForwardParams& p, char* scratch, int64_t begin, int64_t end) {
  const ConvShape& s = p.shape;
  Ring<A> ring(scratch, s);
  A* band_scratch = reinterpret_cast<A*>(scratch);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t n = task / p.bands.per_image, h0 = task % p.bands.per_image * p.bands.rows;
    const int64_t h1 = h0 + p.bands.rows < s.H ? h0 + p.bands.rows : s.H;
    A* zs = nullptr;
    if (p.norm_weight) zs = writes_through<A>(p) ? static_cast<A*>(p.z.data) + (n * s.H + h0) * s.W * s.C : band_scratch;
    with_kernel_size(s.K, [&](auto size) __attribute__((always_inline)) { forward_band<A, decltype(size)::value>(p, ring, zs, n, h0, h1); });
  }
}

// ---- backward

// dz of one channel block of a row: dy itself, or the norm's backward
//   dz = rstd (g dy - mean_c(g dy) - xhat mean_c(g dy xhat)),   xhat = (z - mean) rstd,   g = norm_weight
// with the two means from couple().
template <class A> FC_INLINE void stage_dz(const BackwardParams& p, int64_t pixel, const A* coupling, int64_t c0, int64_t lanes, A* out) {
  const ConvShape& s = p.shape;
  if (!p.norm_weight) return stage_row(p.dy, s, pixel, c0, lanes, out);
  const Vec<A> g = load_lanes<A>(static_cast<const A*>(p.norm_weight) + c0, lanes);
  const A* mean = static_cast<const A*>(p.mean) + pixel;
  const A* rstd = static_cast<const A*>(p.rstd) + pixel;
  with_type<A>(p.dy.dtype, [&](auto* dy_type) __attribute__((always_inline)) {
    with_type<A>(p.z.dtype, [&](auto* z_type) __attribute__((always_inline)) {
      auto* dy = reinterpret_cast<decltype(dy_type)>(at(p.dy, pixel * s.C + c0));
      auto* z = reinterpret_cast<decltype(z_type)>(at(p.z, pixel * s.C + c0));
      if (lanes == kLanes<A>) {
        for (int64_t w = 0; w < s.W; ++w) {
          prefetch_staged(dy + w * s.C, s.W * s.C, kLanes<A>);
          prefetch_staged(z + w * s.C, s.W * s.C, kLanes<A>);
          const Vec<A> xhat = (load_as(z + w * s.C) - mean[w]) * rstd[w];
          store(out + w * kLanes<A>, (g * load_as(dy + w * s.C) - coupling[2 * w] - xhat * coupling[2 * w + 1]) * rstd[w]);
        }
        return;
      }
      for (int64_t w = 0; w < s.W; ++w) {
        const Vec<A> xhat = (load_lanes<A>(z + w * s.C, lanes) - mean[w]) * rstd[w];
        const Vec<A> v = (g * load_lanes<A>(dy + w * s.C, lanes) - coupling[2 * w] - xhat * coupling[2 * w + 1]) * rstd[w];
        store(out + w * kLanes<A>, zero<A>());
        store_lanes<A>(out + w * kLanes<A>, v, lanes);
      }
    });
  });
}

// One band of one channel block. dweight [K * K][lanes] and, behind it, dbias gain the band's share; null: not needed.
// `coupling` starts at the first row of the band's halo, halo_h0.
template <class A, int kK>
void backward_block(const BackwardParams& p, Ring<A>& ring, A* x_row, const A* coupling, int64_t halo_h0, int64_t block, int64_t n, int64_t h0,
                    int64_t h1, A* dweight) {
  const ConvShape& s = p.shape;
  const int64_t c0 = block * kLanes<A>, lanes = s.C - c0 < kLanes<A> ? s.C - c0 : kLanes<A>, taps = s.K * s.K;
  const A* weight = static_cast<const A*>(p.packed) + block * taps * kLanes<A>;
  Vec<A> dbias[4] = {};
  ring.start(h0);
  for (int64_t h = h0; h < h1; ++h) {
    const int64_t pixel = (n * s.H + h) * s.W;
    int64_t first, end;
    ring.window(h, first, end, [&](int64_t r, A* out) __attribute__((always_inline)) {
      stage_dz(p, (n * s.H + r) * s.W, coupling + 2 * (r - halo_h0) * s.W, c0, lanes, out);
    });
    if (p.dx.data)
      with_type<A>(p.dx.dtype, [&](auto* type) __attribute__((always_inline)) {
        using T = std::remove_cv_t<std::remove_pointer_t<decltype(type)>>;
        T* dx = reinterpret_cast<T*>(at(p.dx, pixel * s.C + c0));
        const T* more = p.dshortcut.data ? reinterpret_cast<const T*>(at(p.dshortcut, pixel * s.C + c0)) : nullptr;
        for (int64_t w = 0; w < s.W; ++w) prefetch_for_write(dx + (w + s.W) * s.C);
        for (int64_t w = 0; more && w < s.W; ++w) prefetch_staged(more + w * s.C, s.W * s.C, kLanes<A>);
        conv_row<A, kK>(ring.rows, first, end, weight, s.K, s.W, [&](int64_t w, Vec<A> v) __attribute__((always_inline)) {
          store_lanes<A>(dx + w * s.C, more ? v + load_lanes<A>(more + w * s.C, lanes) : v, lanes);
        });
      });
    if (dweight) {
      stage_row(p.x, s, pixel, c0, lanes, x_row);
      wgrad_row<A, kK>(ring.rows, first, end, x_row, s.K, s.W, dweight);
      const A* dz = ring.rows[s.pad()];
      for (int64_t w = 0; w < s.W; ++w) dbias[w & 3] += load(dz + w * kLanes<A>);
    }
  }
  if (dweight) store(dweight + taps * kLanes<A>, load(dweight + taps * kLanes<A>) + ((dbias[0] + dbias[1]) + (dbias[2] + dbias[3])));
}

template <class A> int64_t halo_elements(const BackwardParams& p) {
  return p.norm_weight ? 2 * (p.plan.bands.rows + 2 * p.shape.pad()) * p.shape.W : 0;
}

template <class A> int64_t backward_scratch_as(const BackwardParams& p) {
  const int64_t row = row_elements<A>(p.shape), norm_row = 2 * kNormPixels * p.shape.C;
  return Ring<A>::bytes(p.shape) + aligned_bytes(row * sizeof(A)) + aligned_bytes(halo_elements<A>(p) * sizeof(A)) + aligned_bytes(norm_row * sizeof(A));
}

template <class A> void backward_as(const BackwardParams& p, char* scratch, int64_t begin, int64_t end) {
  const ConvShape& s = p.shape;
  Ring<A> ring(scratch, s);
  A* x_row = carve<A>(scratch, row_elements<A>(s));
  A* coupling = carve<A>(scratch, halo_elements<A>(p));
  A* norm_row = carve<A>(scratch, 2 * kNormPixels * s.C);
  const int64_t blocks = ceil_div(s.C, kLanes<A>), block_elements = (s.K * s.K + 1) * kLanes<A>, bands = p.plan.bands.count;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t slice = task / p.plan.groups, group = task % p.plan.groups;
    const int64_t block0 = part_begin(blocks, p.plan.groups, group), block1 = part_begin(blocks, p.plan.groups, group + 1);
    A* partial = p.partial ? static_cast<A*>(p.partial) + slice * blocks * block_elements : nullptr;
    A* dnorm = p.norm_weight && group == 0 ? static_cast<A*>(p.norm_partial) + slice * 2 * s.C : nullptr;
    if (partial)
      for (int64_t i = block0 * block_elements; i < block1 * block_elements; ++i) partial[i] = 0;
    if (dnorm)
      for (int64_t c = 0; c < 2 * s.C; ++c) dnorm[c] = 0;
    const int64_t band1 = part_begin(bands, p.plan.slices, slice + 1);
    for (int64_t band = part_begin(bands, p.plan.slices, slice); band < band1; ++band) {
      const int64_t n = band / p.plan.bands.per_image, h0 = band % p.plan.bands.per_image * p.plan.bands.rows;
      const int64_t h1 = h0 + p.plan.bands.rows < s.H ? h0 + p.plan.bands.rows : s.H;
      const int64_t halo_h0 = h0 > s.pad() ? h0 - s.pad() : 0, halo_h1 = h1 + s.pad() < s.H ? h1 + s.pad() : s.H;
      if (p.norm_weight) {
        // Here and not in a pass of its own: dy and z are then in the L2 cache when the blocks stage them.
        const auto pixel = [&](int64_t h) { return (n * s.H + h) * s.W; };
        const auto out = [&](int64_t h) { return coupling + 2 * (h - halo_h0) * s.W; };
        couple<A, false>(p, pixel(halo_h0), pixel(h0), norm_row, out(halo_h0), nullptr);
        if (dnorm) couple<A, true>(p, pixel(h0), pixel(h1), norm_row, out(h0), dnorm);
        else couple<A, false>(p, pixel(h0), pixel(h1), norm_row, out(h0), nullptr);
        couple<A, false>(p, pixel(h1), pixel(halo_h1), norm_row, out(h1), nullptr);
      }
      if (!p.dx.data && !partial) continue;
      for (int64_t block = block0; block < block1; ++block)
        with_kernel_size(s.K, [&](auto size) __attribute__((always_inline)) {
          backward_block<A, decltype(size)::value>(p, ring, x_row, coupling, halo_h0, block, n, h0, h1,
                                                   partial ? partial + block * block_elements : nullptr);
        });
    }
  }
}

// Attention inside shifted windows, one window and head at a time. Included once per SIMD level.
//
// Where the time goes: the products run at the peak of the multipliers, so the rest is kept small and the memory busy.
// q, k, v and dy of a window are gathered as rows [N][padded D] in the accumulation type, k and v also as columns
// [D][padded N], so that every product is of scalars with vectors. Logits of padded columns are -inf: their weights are 0.

// A task's view of its head, and a thread's buffers.
template <class A> struct WindowTask {
  const WindowParams& p;
  int64_t head, N, Np, D, Dp;
  int64_t Nv;                               // keys taken as vectors; one that would have a vector of its own is taken by rows
  A factor;                                 // of the logits
  A *q, *k, *v, *dy, *out;                  // [N][Dp]
  A *k_columns, *v_columns;                 // [D][Np]
  A *weights, *slope, *bias, *dbias;        // [N][Np]
  A* mask;                                  // [4][Np]: what a query of each region adds to its logits
  A *q_inverse, *k_inverse;                 // [N]: 1 / norm, with logit_scale
  A* dpad;                                  // [3][Dp]
  int64_t *pixel_row, *pixel_column;        // [wh], [ww]: of the window's tokens in the map, -1 where padded
  int64_t next_image, *next_row, *next_column;  // the same of the window after it; -1 where there is none
  uint8_t* region;                          // [N]
  bool masked;

  WindowTask(const WindowParams& params, char* scratch)
      : p(params), N(p.wh * p.ww), Np(padded<A>(N)), D(p.D), Dp(padded<A>(D)), Nv(N % kLanes<A> == 1 && N > 1 ? N - 1 : Np) {
    for (A** rows : {&q, &k, &v, &dy, &out}) *rows = carve<A>(scratch, N * Dp);
    for (A** columns : {&k_columns, &v_columns}) *columns = carve<A>(scratch, D * Np);
    for (A** square : {&weights, &slope, &bias, &dbias}) *square = carve<A>(scratch, N * Np);
    mask = carve<A>(scratch, 4 * Np);
    for (A** vector : {&q_inverse, &k_inverse}) *vector = carve<A>(scratch, N);
    dpad = carve<A>(scratch, 3 * Dp);
    pixel_row = carve<int64_t>(scratch, p.wh);
    pixel_column = carve<int64_t>(scratch, p.ww);
    next_row = carve<int64_t>(scratch, p.wh);
    next_column = carve<int64_t>(scratch, p.ww);
    region = carve<uint8_t>(scratch, N);
  }

  // f(place in [N][Np], row of the bias table), for each pair of query and key.
  template <class F> FC_INLINE void for_pairs(F&& f) {
    for (int64_t a = 0, i = 0; a < p.wh; ++a)
      for (int64_t b = 0; b < p.ww; ++b, ++i)
        for (int64_t c = 0, j = i * Np; c < p.wh; ++c) {
          const int64_t row = (a - c + p.wh - 1) * (2 * p.ww - 1) + b + p.ww - 1;
          for (int64_t d = 0; d < p.ww; ++d, ++j) f(j, row - d);
        }
  }

  void begin(int64_t head_of_task) {
    head = head_of_task;
    factor = p.logit_scale ? static_cast<const A*>(p.logit_scale)[head] : static_cast<A>(p.scale);
    const A* table = static_cast<const A*>(p.table);
    for_pairs([&](int64_t pair, int64_t row) __attribute__((always_inline)) { bias[pair] = table ? table[row * p.heads + head] : A(0); });
    for (int64_t i = 0; i < N; ++i)
      for (int64_t j = N; j < Np; ++j) bias[i * Np + j] = -static_cast<A>(__builtin_inf());
  }

  // Which tokens are in a window: (i + shift) mod the size of what is shifted, which is the map or the padded map.
  static void locate(int64_t* pixel, int64_t window, int64_t size, int64_t first, int64_t shift, bool pad_first) {
    for (int64_t a = 0; a < window; ++a) {
      const int64_t i = first + a, whole = round_up(size, window);
      const int64_t at = pad_first ? (i + shift) % whole : i < size ? (i + shift) % size : size;
      pixel[a] = at < size ? at : -1;
    }
  }
  void locate(int64_t row, int64_t column) {
    locate(pixel_row, p.wh, p.H, row * p.wh, p.sh, p.pad_first);
    locate(pixel_column, p.ww, p.W, column * p.ww, p.sw, p.pad_first);
    // The shift brings the far ends of an axis together in its last window.
    const bool last_row = p.sh && row == p.rows - 1, last_column = p.sw && column == p.columns - 1;
    masked = last_row || last_column;
    if (!masked) return;
    for (int64_t a = 0, i = 0; a < p.wh; ++a)
      for (int64_t b = 0; b < p.ww; ++b, ++i)
        region[i] = static_cast<uint8_t>(2 * (last_row && a >= p.wh - p.sh) + (last_column && b >= p.ww - p.sw));
    for (int64_t r = 0; r < 4; ++r)
      for (int64_t j = 0; j < Np; ++j) mask[r * Np + j] = j < N && region[j] != r ? static_cast<A>(p.mask_value) : A(0);
  }

  void locate_next(int64_t window) {
    next_image = window < 0 ? -1 : window / (p.rows * p.columns);
    if (window < 0) return;
    locate(next_row, p.wh, p.H, window / p.columns % p.rows * p.wh, p.sh, p.pad_first);
    locate(next_column, p.ww, p.W, window % p.columns * p.ww, p.sw, p.pad_first);
  }

  // Calls f(token, row of the map, column of the map); -1, -1 for a padded token.
  template <class F> FC_INLINE void for_tokens(F&& f) {
    const int64_t wh = p.wh, ww = p.ww;
    const int64_t *pixel_h = pixel_row, *pixel_w = pixel_column;
    for (int64_t a = 0, i = 0; a < wh; ++a)
      for (int64_t b = 0; b < ww; ++b, ++i) {
        const bool inside = pixel_h[a] >= 0 && pixel_w[b] >= 0;
        f(i, inside ? pixel_h[a] : -1, inside ? pixel_w[b] : -1);
      }
  }

  // Rows of `from`, whose element (image, row, column, head) begins at the given strides; `pad` for padded tokens.
  void gather(Array from, const int64_t* stride, int64_t image, const A* pad, A* to) {
    with_type<A>(from.dtype, [&](auto* type) __attribute__((always_inline)) {
      using T = std::remove_cv_t<std::remove_pointer_t<decltype(type)>>;
      const T* base = static_cast<const T*>(from.data) + image * stride[0] + head * stride[3];
      const int64_t count = D, width = Dp, row = stride[1], column = stride[2];
      for_tokens([&](int64_t i, int64_t h, int64_t w) __attribute__((always_inline)) {
        A* token = to + i * width;
        if (h >= 0) return copy_row(base + h * row + w * column, token, count);
        for (int64_t d = 0; d < count; d += kLanes<A>) {
          const int64_t lanes = count - d < kLanes<A> ? count - d : kLanes<A>;
          store(token + d, pad ? load_lanes<A>(pad + d, lanes) : zero<A>());
        }
      });
    });
  }
  template <class T> static FC_INLINE void copy_row(const T* from, A* to, int64_t count) {
    int64_t d = 0;
    for (; d + kLanes<A> <= count; d += kLanes<A>) store(to + d, load_as(from + d));
    if (d < count) store(to + d, load_lanes<A>(from + d, count - d));
  }
  void transpose(const A* rows, A* columns) {
    constexpr int64_t L = kLanes<A>;
    for (int64_t j = 0; j < Nv; j += L)
      for (int64_t d = 0; d < Dp; d += L) {
        Vec<A> square[L];
        FC_UNROLL for (int64_t i = 0; i < L; ++i) square[i] = j + i < N ? load(rows + (j + i) * Dp + d) : zero<A>();
        transpose_square<A>(square);
        FC_UNROLL for (int64_t i = 0; i < L; ++i) {
          if (d + i < D) store(columns + (d + i) * Np + j, square[i]);
        }
      }
  }
  void normalize(A* rows, A* inverse) {
    for (int64_t i = 0; i < N; ++i) {
      const A norm = static_cast<A>(__builtin_sqrt(dot(rows + i * Dp, rows + i * Dp, Dp)));
      inverse[i] = 1 / (norm < A(kEps) ? A(kEps) : norm);
      for (int64_t d = 0; d < Dp; d += kLanes<A>) store(rows + i * Dp + d, load(rows + i * Dp + d) * inverse[i]);
    }
  }
  static constexpr double kEps = 1e-12;

  void gather_qkv(int64_t image) {
    const A* pad = static_cast<const A*>(p.pad);
    const auto pad_of = [&](int64_t part) { return pad ? pad + (part * p.heads + head) * D : nullptr; };
    gather(p.q, p.stride[0], image, pad_of(0), q);
    gather(p.k, p.stride[1], image, pad_of(1), k);
    gather(p.v, p.stride[2], image, pad_of(2), v);
    if (p.logit_scale) {
      normalize(q, q_inverse);
      normalize(k, k_inverse);
    }
    transpose(k, k_columns);
  }

  // Calls f(first row, rows) for blocks of queries of nearly equal size, few enough that a block's logits stay in the first
  // cache. Meanwhile what the next window needs is fetched: a head's rows are short and far apart, and the processor does
  // not foresee them.
  static constexpr int64_t kRows = 16;  // a multiple of kLanes
  template <class F> FC_INLINE void for_blocks(F&& f) {
    const int64_t blocks = (N + kRows - 1) / kRows;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t first = part_begin(N, blocks, b), rows = part_begin(N, blocks, b + 1) - first;
      fetch(part_begin(p.wh, blocks, b), part_begin(p.wh, blocks, b + 1));
      f(first, rows);
    }
  }
  // Sums over the columns of f(row, column) of a block's rows: of kLanes rows at once, the lanes are added together.
  template <class F> FC_INLINE void sum_rows(int64_t rows, int64_t columns, A* sums, F&& f) {
    for (int64_t r = 0; r < rows; r += kLanes<A>) {
      Vec<A> sum[kLanes<A>];
      FC_UNROLL for (int64_t l = 0; l < kLanes<A>; ++l) sum[l] = zero<A>();
      for (int64_t l = 0; l < kLanes<A> && r + l < rows; ++l)
        for (int64_t j = 0; j < columns; j += kLanes<A>) sum[l] += f(r + l, j);
      store(sums + r, sum_each<A>(sum));
    }
  }
  // c (a block's rows of [Np]) = a b^T, of b [N][Dp] and its columns.
  void by_keys(int64_t rows, const A* a, const A* b, const A* columns, A* c) {
    product<A>(rows, a, Dp, 1, columns, Np, Nv, D, c);
    if (Nv >= N) return;
    alignas(64) A last[kRows];
    sum_rows(rows, Dp, last, [&](int64_t r, int64_t d) __attribute__((always_inline)) { return load(a + r * Dp + d) * load(b + Nv * Dp + d); });
    for (int64_t r = 0; r < rows; ++r) c[r * Np + Nv] = last[r];
  }
  // weights (a block's rows) = exp(logits - max), and the inverses of their sums.
  FC_INLINE void softmax(int64_t first, int64_t rows, A* weight, A* inverse) {
    by_keys(rows, q + first * Dp, k, k_columns, weight);
    constexpr A kLeast = -static_cast<A>(__builtin_inf());
    alignas(64) A top[kRows], last[kRows];  // last: of the key that is taken by rows
    for (int64_t r = 0; r < rows; r += kLanes<A>) {
      Vec<A> most[kLanes<A>];
      FC_UNROLL for (int64_t l = 0; l < kLanes<A>; ++l) most[l] = broadcast<A>(kLeast);
      store(last + r, broadcast<A>(kLeast));
      for (int64_t l = 0; l < kLanes<A> && r + l < rows; ++l) {
        const int64_t i = first + r + l;
        const A *extra = masked ? mask + region[i] * Np : nullptr, *more = bias + i * Np;
        A* row = weight + (r + l) * Np;
        for (int64_t j = 0; j < Nv; j += kLanes<A>) {
          Vec<A> logit = load(row + j) * factor + load(more + j);
          if (extra) logit += load(extra + j);
          store(row + j, logit);
          most[l] = logit > most[l] ? logit : most[l];
        }
        if (Nv < N) last[r + l] = row[Nv] * factor + more[Nv] + (extra ? extra[Nv] : A(0));
      }
      const Vec<A> each = largest_each<A>(most), other = load(last + r);
      store(top + r, other > each ? other : each);
    }
    sum_rows(rows, Nv, inverse, [&](int64_t r, int64_t j) __attribute__((always_inline)) {
      const Vec<A> e = exponential(load(weight + r * Np + j) - top[r]);
      store(weight + r * Np + j, e);
      return e;
    });
    for (int64_t r = 0; r < rows; r += kLanes<A>) {
      if (Nv < N) store(last + r, exponential(load(last + r) - load(top + r)));
      store(inverse + r, A(1) / (Nv < N ? load(inverse + r) + load(last + r) : load(inverse + r)));
    }
    for (int64_t r = 0; r < rows && Nv < N; ++r) weight[r * Np + Nv] = last[r];
  }

  void forward(int64_t image) {
    gather_qkv(image);
    for_blocks([&](int64_t first, int64_t rows) __attribute__((always_inline)) {
      alignas(64) A inverse[kRows];
      softmax(first, rows, weights, inverse);
      product<A>(rows, weights, Np, 1, v, Dp, Dp, N, out + first * Dp);
      scale_rows(out + first * Dp, rows, inverse);
    });
    const int64_t C = p.heads * D;
    scatter(image * p.H * p.W * C + head * D, C, out, 1, nullptr);
  }
  void scale_rows(A* to, int64_t rows, const A* by) {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t d = 0; d < Dp; d += kLanes<A>) store(to + r * Dp + d, load(to + r * Dp + d) * by[r]);
  }

  // With P = weights / their sums: dS = P (dP - sum over the row of P dP), added to dbias; then dv = P^T dy, dq = dS k,
  // dk = dS^T q. The sums divide dy, which is narrower than P and dP.
  void backward(int64_t image, A* dlogit_scale) {
    const int64_t C = p.heads * D, stride[4] = {p.H * p.W * C, p.W * C, C, D};
    gather_qkv(image);
    gather(p.dy, stride, image, nullptr, dy);
    transpose(v, v_columns);
    for_blocks([&](int64_t first, int64_t rows) __attribute__((always_inline)) {
      alignas(64) A inverse[kRows], delta[kRows];
      A *weight = weights + first * Np, *s = slope + first * Np, *sum = dbias + first * Np;
      softmax(first, rows, weight, inverse);
      scale_rows(dy + first * Dp, rows, inverse);
      by_keys(rows, dy + first * Dp, v, v_columns, s);
      sum_rows(rows, Nv, delta, [&](int64_t r, int64_t j) __attribute__((always_inline)) { return load(weight + r * Np + j) * load(s + r * Np + j); });
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t last = r * Np + Nv;
        const A mean = (Nv < N ? delta[r] + weight[last] * s[last] : delta[r]) * inverse[r];
        for (int64_t j = r * Np; j < last; j += kLanes<A>) {
          const Vec<A> ds = load(weight + j) * (load(s + j) - mean);
          store(s + j, ds);
          store(sum + j, load(sum + j) + ds);
        }
        if (Nv < N) sum[last] += s[last] = weight[last] * (s[last] - mean);
      }
    });
    const int64_t base = image * p.H * p.W * 3 * C + head * D;
    product<A>(N, weights, 1, Np, dy, Dp, Dp, N, out);
    scatter(base + 2 * C, 3 * C, out, 1, dpad + 2 * Dp);
    product<A>(N, slope, Np, 1, k, Dp, Dp, N, out);
    if (p.logit_scale)
      for (int64_t i = 0; i < N; ++i) *dlogit_scale += dot(out + i * Dp, q + i * Dp, Dp);
    through_norm(q, q_inverse, out);
    scatter(base, 3 * C, out, factor, dpad);
    product<A>(N, slope, 1, Np, q, Dp, Dp, N, out);
    through_norm(k, k_inverse, out);
    scatter(base + C, 3 * C, out, factor, dpad + Dp);
  }
  // Gradient of q or k from that of their normalised vectors.
  void through_norm(const A* rows, const A* inverse, A* grad) {
    if (!p.logit_scale) return;
    for (int64_t i = 0; i < N; ++i) {
      A* g = grad + i * Dp;
      const A* row = rows + i * Dp;
      const A along = inverse[i] < A(1 / kEps) ? dot(g, row, Dp) : A(0);  // a smaller norm is a constant
      for (int64_t d = 0; d < Dp; d += kLanes<A>) store(g + d, (load(g + d) - load(row + d) * along) * inverse[i]);
    }
  }
  // Rows times scale to where the tokens are in p.out: element `base` + pixel * `step`. Padded tokens' are added to `sum`.
  void scatter(int64_t base, int64_t step, const A* rows, A scale, A* sum) {
    with_type<A>(p.out.dtype, [&](auto* type) __attribute__((always_inline)) {
      using T = std::remove_cv_t<std::remove_pointer_t<decltype(type)>>;
      T* to = static_cast<T*>(p.out.data) + base;
      const int64_t count = D, width = Dp, line = p.W * step;
      for_tokens([&](int64_t i, int64_t h, int64_t w) __attribute__((always_inline)) {
        const A* token = rows + i * width;
        T* place = to + h * line + w * step;
        for (int64_t d = 0; d < count; d += kLanes<A>) {
          if (h >= 0) store_lanes<A>(place + d, load(token + d) * scale, count - d < kLanes<A> ? count - d : kLanes<A>);
          else if (sum) store(sum + d, load(sum + d) + load(rows + i * width + d) * scale);
        }
      });
    });
  }

  // Prefetches what the next window reads and writes, of its rows from begin to end. Inline, or GCC takes it for a no-op.
  FC_INLINE void fetch(int64_t begin, int64_t end) {
    if (next_image < 0) return;
    const int64_t C = p.heads * D, parts = p.dy.data ? 3 : 1, stride[4] = {p.H * p.W * C, p.W * C, C, D};
    const int64_t out_stride[4] = {stride[0] * parts, stride[1] * parts, C * parts, D};
    fetch(p.q, p.stride[0], 0, begin, end);
    fetch(p.k, p.stride[1], 0, begin, end);
    fetch(p.v, p.stride[2], 0, begin, end);
    if (p.dy.data) fetch(p.dy, stride, 0, begin, end);
    for (int64_t part = 0; part < parts; ++part) fetch({p.out.data, p.out.dtype}, out_stride, part * C, begin, end);
  }
  FC_INLINE void fetch(Array array, const int64_t* stride, int64_t offset, int64_t begin, int64_t end) {
    const int64_t size = dtype_size(array.dtype), step = stride[2] * size, bytes = D * size, ww = p.ww;
    for (int64_t a = begin; a < end; ++a) {
      if (next_row[a] < 0) continue;
      const char* row = at(array, next_image * stride[0] + next_row[a] * stride[1] + head * stride[3] + offset);
      for (int64_t b = 0; b < ww; ++b)
        for (int64_t i = 0; i < bytes && next_column[b] >= 0; i += 64) prefetch_l2(row + next_column[b] * step + i);
    }
  }
};

template <class A> int64_t window_scratch_as(const WindowParams& p) {
  const int64_t N = p.wh * p.ww, Np = padded<A>(N), Dp = padded<A>(p.D);
  const auto bytes = [](int64_t count, int64_t size) { return aligned_bytes(count * size); };
  const int64_t size = sizeof(A);
  return 5 * bytes(N * Dp, size) + 2 * bytes(p.D * Np, size) + 4 * bytes(N * Np, size) + bytes(4 * Np, size) + 2 * bytes(N, size) +
         bytes(3 * Dp, size) + 2 * bytes(p.wh, 8) + 2 * bytes(p.ww, 8) + bytes(N, 1);
}

// A task is slice * heads + head. Backward where dy is given: partial of a task holds dtable, dlogit_scale and dpad of its head.
template <class A> void window_attention_as(const WindowParams& p, char* scratch, int64_t begin, int64_t end) {
  WindowTask<A> task(p, scratch);
  const int64_t windows = p.rows * p.columns, positions = (2 * p.wh - 1) * (2 * p.ww - 1), count = positions + 1 + 3 * p.D;
  for (int64_t t = begin; t < end; ++t) {
    const int64_t slice = t / p.heads, stop = part_begin(p.B * windows, p.slices, slice + 1);
    A dlogit_scale = 0;
    task.begin(t % p.heads);
    if (p.dy.data) {
      for (int64_t i = 0; i < task.N * task.Np; ++i) task.dbias[i] = 0;
      for (int64_t i = 0; i < 3 * task.Dp; ++i) task.dpad[i] = 0;
    }
    for (int64_t w = part_begin(p.B * windows, p.slices, slice); w < stop; ++w) {
      task.locate(w % windows / p.columns, w % p.columns);
      task.locate_next(w + 1 < stop ? w + 1 : -1);
      if (p.dy.data) task.backward(w / windows, &dlogit_scale);
      else task.forward(w / windows);
    }
    if (!p.dy.data) continue;
    A* partial = static_cast<A*>(p.partial) + t * count;
    for (int64_t i = 0; i < positions; ++i) partial[i] = 0;
    task.for_pairs([&](int64_t pair, int64_t row) __attribute__((always_inline)) { partial[row] += task.dbias[pair]; });
    partial[positions] = dlogit_scale;
    for (int64_t part = 0; part < 3; ++part)
      for (int64_t d = 0; d < p.D; ++d) partial[positions + 1 + part * p.D + d] = task.dpad[part * task.Dp + d];
  }
}

// Attention inside shifted windows, one window and head at a time. Included once per SIMD level.
//
// q, k, v and dy of a window are gathered as rows [N][padded D] in the accumulation type, k and v also as columns
// [D][padded N], so that every product is of scalars with vectors. Logits of padded columns are -inf: their weights are 0.

// Lanes past the end of a row are zero where it is a factor, and never read where it is a result.
template <class A> FC_INLINE int64_t padded(int64_t count) { return round_up(count, kLanes<A>); }

// c[R][V vectors] = sum over k of a[., k] b[k, .]
template <class A, int R, int V>
FC_INLINE void product_block(const A* a, int64_t a_row, int64_t a_step, const A* b, int64_t b_step, int64_t steps, A* c, int64_t c_row) {
  Vec<A> sum[R][V] = {};
  for (int64_t k = 0; k < steps; ++k) {
    Vec<A> right[V];
    FC_UNROLL for (int v = 0; v < V; ++v) right[v] = load(b + k * b_step + v * kLanes<A>);
    FC_UNROLL for (int r = 0; r < R; ++r) {
      const Vec<A> left = broadcast<A>(a[r * a_row + k * a_step]);
      FC_UNROLL for (int v = 0; v < V; ++v) sum[r][v] += left * right[v];
    }
  }
  FC_UNROLL for (int r = 0; r < R; ++r) FC_UNROLL for (int v = 0; v < V; ++v) store(c + r * c_row + v * kLanes<A>, sum[r][v]);
}
// As many sums as leave registers for the factors.
template <class A, int V>
void product_columns(int64_t rows, const A* a, int64_t a_row, int64_t a_step, const A* b, int64_t b_step, int64_t steps, A* c, int64_t c_row) {
  constexpr int R = (kManyRegisters ? 24 : 12) / V, kFew = R < 4 ? 2 : 4;
  int64_t i = 0;
  for (; i + R <= rows; i += R) product_block<A, R, V>(a + i * a_row, a_row, a_step, b, b_step, steps, c + i * c_row, c_row);
  for (; i + kFew <= rows; i += kFew) product_block<A, kFew, V>(a + i * a_row, a_row, a_step, b, b_step, steps, c + i * c_row, c_row);
  for (; i < rows; ++i) product_block<A, 1, V>(a + i * a_row, a_row, a_step, b, b_step, steps, c + i * c_row, c_row);
}
// c (rows x columns) = a b; columns is a multiple of a vector. With a_row = 1, a_step = its row length, a is transposed.
template <class A> void product(int64_t rows, const A* a, int64_t a_row, int64_t a_step, const A* b, int64_t columns, int64_t steps, A* c) {
  constexpr int64_t L = kLanes<A>, kMost = kManyRegisters ? 4 : 2;
  for (int64_t j = 0; j < columns;) {
    const int64_t left = (columns - j) / L, vectors = left < kMost ? left : kMost;
    if (vectors == 4) product_columns<A, 4>(rows, a, a_row, a_step, b + j, columns, steps, c + j, columns);
    else if (vectors == 3) product_columns<A, 3>(rows, a, a_row, a_step, b + j, columns, steps, c + j, columns);
    else if (vectors == 2) product_columns<A, 2>(rows, a, a_row, a_step, b + j, columns, steps, c + j, columns);
    else product_columns<A, 1>(rows, a, a_row, a_step, b + j, columns, steps, c + j, columns);
    j += vectors * L;
  }
}

template <class A> FC_INLINE A largest_lane(Vec<A> v) {
  alignas(64) A lanes[kLanes<A>];
  store(lanes, v);
  for (int64_t half = kLanes<A> / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i) lanes[i] = lanes[i + half] > lanes[i] ? lanes[i + half] : lanes[i];
  return lanes[0];
}

// The lanes of a and b in turn, from lane kFrom on.
template <class A, int kFrom, int... I> FC_INLINE Vec<A> interleave(Vec<A> a, Vec<A> b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (I / 2 + kFrom + I % 2 * static_cast<int>(kLanes<A>))...);
}
// A square of kLanes vectors, transposed: of the bits of an element's place, row above lane, each step rotates one.
template <class A> FC_INLINE void transpose_square(Vec<A>* v) {
  constexpr int L = kLanes<A>;
  constexpr auto kIndices = std::make_integer_sequence<int, L>{};
  FC_UNROLL for (int step = 1; step < L; step *= 2) {
    Vec<A> next[L];
    FC_UNROLL for (int i = 0; i < L / 2; ++i) {
      next[2 * i] = interleave<A, 0>(v[i], v[i + L / 2], kIndices);
      next[2 * i + 1] = interleave<A, L / 2>(v[i], v[i + L / 2], kIndices);
    }
    FC_UNROLL for (int i = 0; i < L; ++i) v[i] = next[i];
  }
}
template <class A> FC_INLINE A dot(const A* a, const A* b, int64_t count) {
  Vec<A> sum = zero<A>();
  for (int64_t i = 0; i < count; i += kLanes<A>) sum += load(a + i) * load(b + i);
  return sum_lanes<A>(sum);
}

// A task's view of its head, and a thread's buffers.
template <class A> struct WindowTask {
  const WindowParams& p;
  int64_t head, N, Np, D, Dp;
  A factor;                                 // of the logits
  A *q, *k, *v, *dy, *out;                  // [N][Dp]
  A *k_columns, *v_columns;                 // [D][Np]
  A *weights, *slope, *bias, *dbias;        // [N][Np]
  A* mask;                                  // [4][Np]: what a query of each region adds to its logits
  A *q_inverse, *k_inverse;                 // [N]: 1 / norm, with logit_scale
  A* dpad;                                  // [3][Dp]
  int64_t *pixel_row, *pixel_column;        // [wh], [ww]: of the window's tokens in the map, -1 where padded
  uint8_t* region;                          // [N]
  bool masked;

  WindowTask(const WindowParams& params, char* scratch)
      : p(params), N(p.wh * p.ww), Np(padded<A>(N)), D(p.D), Dp(padded<A>(D)) {
    for (A** rows : {&q, &k, &v, &dy, &out}) *rows = carve<A>(scratch, N * Dp);
    for (A** columns : {&k_columns, &v_columns}) *columns = carve<A>(scratch, D * Np);
    for (A** square : {&weights, &slope, &bias, &dbias}) *square = carve<A>(scratch, N * Np);
    mask = carve<A>(scratch, 4 * Np);
    for (A** vector : {&q_inverse, &k_inverse}) *vector = carve<A>(scratch, N);
    dpad = carve<A>(scratch, 3 * Dp);
    pixel_row = carve<int64_t>(scratch, p.wh);
    pixel_column = carve<int64_t>(scratch, p.ww);
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

  // Calls f(token, row of the map, column of the map); -1, -1 for a padded token.
  template <class F> FC_INLINE void for_tokens(F&& f) {
    for (int64_t a = 0, i = 0; a < p.wh; ++a)
      for (int64_t b = 0; b < p.ww; ++b, ++i) {
        const bool inside = pixel_row[a] >= 0 && pixel_column[b] >= 0;
        f(i, inside ? pixel_row[a] : -1, inside ? pixel_column[b] : -1);
      }
  }

  // Rows of `from`, whose element (image, row, column, head) begins at the given strides; `pad` for padded tokens.
  void gather(Array from, const int64_t* stride, int64_t image, const A* pad, A* to) {
    with_type<A>(from.dtype, [&](auto* type) __attribute__((always_inline)) {
      using T = std::remove_cv_t<std::remove_pointer_t<decltype(type)>>;
      const T* base = static_cast<const T*>(from.data) + image * stride[0] + head * stride[3];
      for_tokens([&](int64_t i, int64_t h, int64_t w) __attribute__((always_inline)) {
        for (int64_t d = 0; d < D; d += kLanes<A>) {
          const int64_t lanes = D - d < kLanes<A> ? D - d : kLanes<A>;
          Vec<A> value = zero<A>();
          if (h >= 0) value = load_lanes<A>(base + h * stride[1] + w * stride[2] + d, lanes);
          else if (pad) value = load_lanes<A>(pad + d, lanes);
          store(to + i * Dp + d, value);
        }
      });
    });
  }
  void transpose(const A* rows, A* columns) {
    constexpr int64_t L = kLanes<A>;
    for (int64_t j = 0; j < Np; j += L)
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

  // weights = exp(logits - max); inverse of the sum of row i in f(i, .).
  template <class F> FC_INLINE void softmax(F&& f) {
    product<A>(N, q, Dp, 1, k_columns, Np, D, weights);
    for (int64_t i = 0; i < N; ++i) {
      A* row = weights + i * Np;
      const A* extra = masked ? mask + region[i] * Np : nullptr;
      Vec<A> most = broadcast<A>(-static_cast<A>(__builtin_inf())), sum = zero<A>();
      for (int64_t j = 0; j < Np; j += kLanes<A>) {
        Vec<A> logit = load(row + j) * factor + load(bias + i * Np + j);
        if (extra) logit += load(extra + j);
        store(row + j, logit);
        most = logit > most ? logit : most;
      }
      const A top = largest_lane<A>(most);
      for (int64_t j = 0; j < Np; j += kLanes<A>) {
        const Vec<A> e = exponential(load(row + j) - top);
        store(row + j, e);
        sum += e;
      }
      f(i, 1 / sum_lanes<A>(sum));
    }
  }

  void forward(int64_t image) {
    gather_qkv(image);
    A* inverse = slope;
    softmax([&](int64_t i, A value) __attribute__((always_inline)) { inverse[i] = value; });
    product<A>(N, weights, Np, 1, v, Dp, N, out);
    for_tokens([&](int64_t i, int64_t h, int64_t w) __attribute__((always_inline)) {
      if (h < 0) return;
      for (int64_t d = 0; d < Dp; d += kLanes<A>) store(out + i * Dp + d, load(out + i * Dp + d) * inverse[i]);
      write(p.out, (((image * p.H + h) * p.W + w) * p.heads + head) * D, D, out + i * Dp);
    });
  }

  // dS = P (dP - sum over the row of P dP), added to dbias; then dv = P^T dy, dq = dS k, dk = dS^T q.
  void backward(int64_t image, A* dlogit_scale) {
    const int64_t C = p.heads * D, stride[4] = {p.H * p.W * C, p.W * C, C, D};
    gather_qkv(image);
    gather(p.dy, stride, image, nullptr, dy);
    transpose(v, v_columns);
    product<A>(N, dy, Dp, 1, v_columns, Np, D, slope);
    softmax([&](int64_t i, A inverse) __attribute__((always_inline)) {
      A *weight = weights + i * Np, *s = slope + i * Np, *sum = dbias + i * Np;
      Vec<A> through = zero<A>();
      for (int64_t j = 0; j < Np; j += kLanes<A>) {
        const Vec<A> scaled = load(weight + j) * inverse;
        store(weight + j, scaled);
        through += scaled * load(s + j);
      }
      const A delta = sum_lanes<A>(through);
      for (int64_t j = 0; j < Np; j += kLanes<A>) {
        const Vec<A> ds = load(weight + j) * (load(s + j) - delta);
        store(s + j, ds);
        store(sum + j, load(sum + j) + ds);
      }
    });
    product<A>(N, weights, 1, Np, dy, Dp, N, out);
    scatter(image, 2, out);
    product<A>(N, slope, Np, 1, k, Dp, N, out);
    if (p.logit_scale)
      for (int64_t i = 0; i < N; ++i) *dlogit_scale += dot(out + i * Dp, q + i * Dp, Dp);
    through_factor(q, q_inverse, out);
    scatter(image, 0, out);
    product<A>(N, slope, 1, Np, q, Dp, N, out);
    through_factor(k, k_inverse, out);
    scatter(image, 1, out);
  }
  // Gradient of q or k from that of their product: the factor, and the norm where there is one.
  void through_factor(const A* rows, const A* inverse, A* grad) {
    for (int64_t i = 0; i < N; ++i) {
      A *g = grad + i * Dp, scale = factor, along = 0;
      const A* row = rows + i * Dp;
      if (p.logit_scale) {
        scale *= inverse[i];
        along = inverse[i] < A(1 / kEps) ? dot(g, row, Dp) : A(0);  // a smaller norm is a constant
      }
      for (int64_t d = 0; d < Dp; d += kLanes<A>) store(g + d, (load(g + d) - load(row + d) * along) * scale);
    }
  }
  void scatter(int64_t image, int64_t part, const A* rows) {
    for_tokens([&](int64_t i, int64_t h, int64_t w) __attribute__((always_inline)) {
      if (h >= 0) return write(p.out, ((((image * p.H + h) * p.W + w) * 3 + part) * p.heads + head) * D, D, rows + i * Dp);
      A* sum = dpad + part * Dp;
      for (int64_t d = 0; d < Dp; d += kLanes<A>) store(sum + d, load(sum + d) + load(rows + i * Dp + d));
    });
  }
};

template <class A> int64_t window_scratch_as(const WindowParams& p) {
  const int64_t N = p.wh * p.ww, Np = padded<A>(N), Dp = padded<A>(p.D);
  const auto bytes = [](int64_t count, int64_t size) { return aligned_bytes(count * size); };
  const int64_t size = sizeof(A);
  return 5 * bytes(N * Dp, size) + 2 * bytes(p.D * Np, size) + 4 * bytes(N * Np, size) + bytes(4 * Np, size) + 2 * bytes(N, size) +
         bytes(3 * Dp, size) + bytes(p.wh, 8) + bytes(p.ww, 8) + bytes(N, 1);
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

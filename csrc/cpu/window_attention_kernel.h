// Attention in the windows of a map, on the tokens where they lie. Included once per SIMD level.
//
// One head of one window at a time: its q, k and v (N tokens of D channels) are gathered into scratch, the N x N logits stay
// there too. Rows of scratch are whole vectors: N and D rounded up to Np and Dp.

template <class A> constexpr int64_t kAttentionRows = kManyRegisters ? 6 : 4;
template <class A> constexpr int64_t kAttentionVectors = kManyRegisters ? 4 : 2;

// c[m][n] = sum_k a[m][k] b[k][n] (a[k][m] if kAcross) for kRows rows m and kVectors vectors of columns n.
template <class A, bool kAcross, int64_t kRows, int64_t kVectors>
FC_INLINE void product_tile(const A* a, int64_t lda, const A* b, int64_t ldb, A* c, int64_t ldc, int64_t K) {
  Vec<A> acc[kRows][kVectors];
  FC_UNROLL for (int64_t i = 0; i < kRows; ++i) {
    FC_UNROLL for (int64_t j = 0; j < kVectors; ++j) acc[i][j] = zero<A>();
  }
  for (int64_t k = 0; k < K; ++k) {
    Vec<A> row[kVectors];
    FC_UNROLL for (int64_t j = 0; j < kVectors; ++j) row[j] = load(b + k * ldb + j * kLanes<A>);
    FC_UNROLL for (int64_t i = 0; i < kRows; ++i) {
      const A factor = kAcross ? a[k * lda + i] : a[i * lda + k];
      FC_UNROLL for (int64_t j = 0; j < kVectors; ++j) acc[i][j] += row[j] * factor;
    }
  }
  FC_UNROLL for (int64_t i = 0; i < kRows; ++i) {
    FC_UNROLL for (int64_t j = 0; j < kVectors; ++j) store(c + i * ldc + j * kLanes<A>, acc[i][j]);
  }
}

template <class A, bool kAcross, int64_t kVectors>
FC_INLINE void product_columns(const A* a, int64_t lda, const A* b, int64_t ldb, A* c, int64_t ldc, int64_t M, int64_t K) {
  constexpr int64_t kRows = kAttentionRows<A>;
  const int64_t next = kAcross ? 1 : lda;
  int64_t m = 0;
  for (; m + kRows <= M; m += kRows) product_tile<A, kAcross, kRows, kVectors>(a + m * next, lda, b, ldb, c + m * ldc, ldc, K);
  for (; m + 2 <= M; m += 2) product_tile<A, kAcross, 2, kVectors>(a + m * next, lda, b, ldb, c + m * ldc, ldc, K);
  for (; m < M; ++m) product_tile<A, kAcross, 1, kVectors>(a + m * next, lda, b, ldb, c + m * ldc, ldc, K);
}

// c (M, N) = a (M, K) b (K, N), or with kAcross a^T (K, M) b; N a multiple of the vector.
template <class A, bool kAcross> void product(const A* a, int64_t lda, const A* b, int64_t ldb, A* c, int64_t ldc, int64_t M, int64_t N, int64_t K) {
  constexpr int64_t kVectors = kAttentionVectors<A>, kTile = kVectors * kLanes<A>;
  int64_t n = 0;
  for (; n + kTile <= N; n += kTile) product_columns<A, kAcross, kVectors>(a, lda, b + n, ldb, c + n, ldc, M, K);
  if constexpr (kVectors == 4) {
    for (; n + 2 * kLanes<A> <= N; n += 2 * kLanes<A>) product_columns<A, kAcross, 2>(a, lda, b + n, ldb, c + n, ldc, M, K);
  }
  for (; n < N; n += kLanes<A>) product_columns<A, kAcross, 1>(a, lda, b + n, ldb, c + n, ldc, M, K);
}

template <class A> FC_INLINE int64_t whole(int64_t n) { return round_up(n, kLanes<A>); }

// Where the tokens of a window are: the pixel of the image, or -1 where the map is padded, and the region it lay in before it was
// rolled.
struct WindowTokens {
  int64_t* pixel;
  float* region;
  bool mixed;  // of several regions
};

FC_INLINE int64_t region_of(int64_t place, int64_t size, int64_t window, int64_t shift) {
  return shift == 0 || place < size - window ? 0 : place < size - shift ? 1 : 2;
}
FC_INLINE int64_t source_of(int64_t place, int64_t shift, int64_t size, int64_t padded, bool pad_first) {
  if (!pad_first) return place >= size ? -1 : place + shift < size ? place + shift : place + shift - size;
  const int64_t source = place + shift < padded ? place + shift : place + shift - padded;
  return source < size ? source : -1;
}

FC_INLINE void find_tokens(const AttentionParams& p, int64_t window, WindowTokens& t) {
  const int64_t across = p.Wp / p.ww, y0 = window / across * p.wh, x0 = window % across * p.ww;
  t.mixed = false;
  for (int64_t i = 0; i < p.wh; ++i) {
    const int64_t y = source_of(y0 + i, p.sh, p.H, p.Hp, p.pad_first), above = region_of(y0 + i, p.Hp, p.wh, p.sh);
    for (int64_t j = 0; j < p.ww; ++j) {
      const int64_t x = source_of(x0 + j, p.sw, p.W, p.Wp, p.pad_first), n = i * p.ww + j;
      t.pixel[n] = y < 0 || x < 0 ? -1 : y * p.W + x;
      t.region[n] = static_cast<float>(3 * above + region_of(x0 + j, p.Wp, p.ww, p.sw));
      t.mixed |= t.region[n] != t.region[0];
    }
  }
}

// Tokens of one head into rows of Dp, times `factor`; `pad` for those that the image does not have.
template <class A, class T>
FC_INLINE void gather_as(const AttentionParams& p, const WindowTokens& t, const T* from, const int64_t (&stride)[2], const A* pad, A factor, A* to) {
  const int64_t N = p.wh * p.ww, Dp = whole<A>(p.D);
  for (int64_t n = 0; n < N; ++n, to += Dp) {
    const int64_t pixel = t.pixel[n];
    if (pixel >= 0) {
      const T* row = from + pixel / p.W * stride[0] + pixel % p.W * stride[1];
      for (int64_t d = 0; d < p.D; d += kLanes<A>) store(to + d, load_lanes<A>(row + d, p.D - d < kLanes<A> ? p.D - d : kLanes<A>) * factor);
    } else {
      for (int64_t d = 0; d < Dp; ++d) to[d] = pad && d < p.D ? pad[d] * factor : A(0);
    }
  }
}
template <class A>
void gather(const AttentionParams& p, const WindowTokens& t, const Tokens& tokens, int64_t b, int64_t head, const void* pad, A factor, A* to) {
  const int64_t stride[2] = {tokens.stride_h, tokens.stride_w};
  with_type<A>(tokens.array.dtype, [&](auto* type) __attribute__((always_inline)) {
    using T = std::remove_cv_t<std::remove_pointer_t<decltype(type)>>;
    gather_as<A, T>(p, t, reinterpret_cast<const T*>(at(tokens.array, b * tokens.stride_b + head * tokens.stride_head)), stride, static_cast<const A*>(pad), factor, to);
  });
}

// Rows of Dp back to their tokens; what belongs to padded ones is added up in `pad` if there is one.
template <class A> void scatter(const AttentionParams& p, const WindowTokens& t, MutableArray to, int64_t begin, int64_t stride, const A* rows, A* pad) {
  const int64_t N = p.wh * p.ww, Dp = whole<A>(p.D);
  with_type<A>(to.dtype, [&](auto* type) __attribute__((always_inline)) {
    using T = std::remove_cv_t<std::remove_pointer_t<decltype(type)>>;
    T* first = reinterpret_cast<T*>(at(to, begin));
    for (int64_t n = 0; n < N; ++n) {
      const A* row = rows + n * Dp;
      if (t.pixel[n] >= 0) {
        for (int64_t d = 0; d < p.D; d += kLanes<A>)
          store_lanes<A>(first + t.pixel[n] * stride + d, load(row + d), p.D - d < kLanes<A> ? p.D - d : kLanes<A>);
      } else if (pad) {
        for (int64_t d = 0; d < p.D; ++d) pad[d] += row[d];
      }
    }
  });
}

// to (D, Np) = from (N, Dp) transposed; columns from N on are zeros.
template <class A> void transpose(const A* from, int64_t N, int64_t D, A* to) {
  const int64_t Dp = whole<A>(D), Np = whole<A>(N);
  for (int64_t n = 0; n < Np; n += kLanes<A>)
    for (int64_t d = 0; d < D; ++d) {
      Vec<A> v = zero<A>();
      for (int64_t i = 0; i < kLanes<A>; ++i)
        if (n + i < N) v[i] = from[(n + i) * Dp + d];
      store(to + d * Np + n, v);
    }
}

// Divides each row by its norm, or by 1e-12 where that is less; 1 / norm into `inverse`, negative where it was less.
template <class A> void normalize(A* rows, int64_t N, int64_t D, A* inverse) {
  constexpr A kEps = A(1e-12);
  const int64_t Dp = whole<A>(D);
  for (int64_t n = 0; n < N; ++n, rows += Dp) {
    Vec<A> squares = zero<A>();
    for (int64_t d = 0; d < Dp; d += kLanes<A>) squares += load(rows + d) * load(rows + d);
    const A norm = static_cast<A>(__builtin_sqrt(sum_lanes<A>(squares)));
    const bool small = norm < kEps;
    const A factor = A(1) / (small ? kEps : norm);
    inverse[n] = small ? -factor : factor;
    for (int64_t d = 0; d < Dp; d += kLanes<A>) store(rows + d, load(rows + d) * factor);
  }
}

// The gradient of rows before `normalize` from that of its result, in place: (g - x (x g)) / norm.
template <class A> void normalize_backward(const A* rows, const A* inverse, int64_t N, int64_t D, A* grad) {
  const int64_t Dp = whole<A>(D);
  for (int64_t n = 0; n < N; ++n, rows += Dp, grad += Dp) {
    Vec<A> products = zero<A>();
    for (int64_t d = 0; d < Dp; d += kLanes<A>) products += load(rows + d) * load(grad + d);
    const A along = inverse[n] < 0 ? A(0) : sum_lanes<A>(products), factor = inverse[n] < 0 ? -inverse[n] : inverse[n];
    for (int64_t d = 0; d < Dp; d += kLanes<A>) store(grad + d, (load(grad + d) - load(rows + d) * along) * factor);
  }
}

// Logits to probabilities, in place: + bias + mask, softmax over the first N of the Np columns, zeros after them.
template <class A> void softmax_rows(const AttentionParams& p, const WindowTokens& t, const A* bias, A* rows) {
  const int64_t N = p.wh * p.ww, Np = whole<A>(N), last = Np - kLanes<A>;
  Vec<A> lane;
  for (int64_t i = 0; i < kLanes<A>; ++i) lane[i] = static_cast<A>(last + i);
  const auto real = lane < broadcast<A>(static_cast<A>(N));
  const Vec<A> lowest = broadcast<A>(-static_cast<A>(__builtin_inf())), mask = broadcast<A>(static_cast<A>(p.mask_value));
  for (int64_t m = 0; m < N; ++m) {
    A* row = rows + m * Np;
    const float region = t.region[m];
    Vec<A> high = lowest;
    for (int64_t n = 0; n < Np; n += kLanes<A>) {
      Vec<A> v = load(row + n);
      const int64_t lanes = n < last ? kLanes<A> : N - last;
      if (bias) v += load_lanes<A>(bias + m * N + n, lanes);
      if (t.mixed) {
        Vec<A> apart;
        for (int64_t i = 0; i < kLanes<A>; ++i) apart[i] = static_cast<A>(t.region[n + i]);
        v += apart == broadcast<A>(static_cast<A>(region)) ? zero<A>() : mask;
      }
      if (n == last) v = real ? v : lowest;
      high = v > high ? v : high;
      store(row + n, v);
    }
    A largest = high[0];
    for (int64_t i = 1; i < kLanes<A>; ++i) largest = high[i] > largest ? high[i] : largest;
    Vec<A> sums = zero<A>();
    for (int64_t n = 0; n < Np; n += kLanes<A>) {
      const Vec<A> x = load(row + n) - largest;
      const Vec<A> e = x == x ? exponential(x) : x;
      sums += e;
      store(row + n, e);
    }
    const A factor = A(1) / sum_lanes<A>(sums);
    for (int64_t n = 0; n < Np; n += kLanes<A>) store(row + n, load(row + n) * factor);
  }
}

// dS = P (dP - rowsum(P dP)), into dP.
template <class A> void softmax_backward(const A* probabilities, int64_t N, A* grad) {
  const int64_t Np = whole<A>(N);
  for (int64_t m = 0; m < N; ++m, probabilities += Np, grad += Np) {
    for (int64_t n = N; n < Np; ++n) grad[n] = A(0);  // beside them an Inf would make NaN
    Vec<A> products = zero<A>();
    for (int64_t n = 0; n < Np; n += kLanes<A>) products += load(probabilities + n) * load(grad + n);
    const A delta = sum_lanes<A>(products);
    for (int64_t n = 0; n < Np; n += kLanes<A>) store(grad + n, load(probabilities + n) * (load(grad + n) - delta));
    for (int64_t n = N; n < Np; ++n) grad[n] = A(0);
  }
}

template <class A> FC_INLINE int64_t attention_bytes(const AttentionParams& p, bool backward) {
  const int64_t N = p.wh * p.ww, Np = whole<A>(N), Dp = whole<A>(p.D);
  const int64_t tokens = N * Dp * (backward ? 5 : 4), turned = Dp * Np, logits = N * Np * (backward ? 3 : 1);
  return (tokens + turned + logits + 2 * Np) * static_cast<int64_t>(sizeof(A)) + Np * 12 + 64 * 16;
}
template <class A> int64_t attention_forward_scratch_as(const AttentionParams& p) { return attention_bytes<A>(p, false); }
template <class A> int64_t attention_backward_scratch_as(const AttentionParams& p) { return attention_bytes<A>(p, true); }

template <class A> FC_INLINE const A* head_of(const void* values, int64_t head, int64_t size) {
  return values ? static_cast<const A*>(values) + head * size : nullptr;
}

// q, k and v of a window's head, the logits' factor in q, or the norms of q and k in `inverse`; the probabilities.
template <class A>
void attention_probabilities(const AttentionParams& p, const WindowTokens& t, int64_t b, int64_t head, A* q, A* k, A* v, A* turned, A* inverse, A* P) {
  const int64_t N = p.wh * p.ww, Np = whole<A>(N), Dp = whole<A>(p.D);
  const auto pad = [&](int part) { return p.pad ? static_cast<const A*>(p.pad) + (part * p.heads + head) * p.D : nullptr; };
  const bool cosine = p.logit_scale != nullptr;
  gather<A>(p, t, p.q, b, head, pad(0), cosine ? A(1) : static_cast<A>(p.scale), q);
  gather<A>(p, t, p.k, b, head, pad(1), A(1), k);
  gather<A>(p, t, p.v, b, head, pad(2), A(1), v);
  if (cosine) {
    normalize<A>(q, N, p.D, inverse);
    normalize<A>(k, N, p.D, inverse + Np);
    const A factor = *head_of<A>(p.logit_scale, head, 1);
    for (int64_t i = 0; i < N * Dp; i += kLanes<A>) store(q + i, load(q + i) * factor);
  }
  transpose<A>(k, N, p.D, turned);
  product<A, false>(q, Dp, turned, Np, P, Np, N, Np, p.D);
  softmax_rows<A>(p, t, head_of<A>(p.bias, head, N * N), P);
}

template <class A> FC_INLINE WindowTokens window_tokens(const AttentionParams& p, char*& scratch) {
  const int64_t Np = whole<A>(p.wh * p.ww);
  WindowTokens t{carve<int64_t>(scratch, Np), carve<float>(scratch, Np), false};
  for (int64_t n = 0; n < Np; ++n) t.region[n] = 0;
  return t;
}

template <class A> void attention_forward_as(const AttentionParams& p, char* scratch, int64_t begin, int64_t end) {
  const int64_t N = p.wh * p.ww, Np = whole<A>(N), Dp = whole<A>(p.D), windows = p.Hp / p.wh * (p.Wp / p.ww);
  WindowTokens t = window_tokens<A>(p, scratch);
  A *q = carve<A>(scratch, N * Dp), *k = carve<A>(scratch, N * Dp), *v = carve<A>(scratch, N * Dp), *y = carve<A>(scratch, N * Dp);
  A *turned = carve<A>(scratch, Dp * Np), *P = carve<A>(scratch, N * Np), *inverse = carve<A>(scratch, 2 * Np);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / windows;
    find_tokens(p, task % windows, t);
    for (int64_t head = 0; head < p.heads; ++head) {
      attention_probabilities<A>(p, t, b, head, q, k, v, turned, inverse, P);
      product<A, false>(P, Np, v, Dp, y, Dp, N, Dp, N);
      scatter<A>(p, t, p.y, b * p.H * p.W * p.heads * p.D + head * p.D, p.heads * p.D, y, nullptr);
    }
  }
}

// A task is the windows of one chunk, for one head: its share of the sums over windows is one row of the partials.
template <class A> void attention_backward_as(const AttentionParams& p, char* scratch, int64_t begin, int64_t end) {
  const int64_t N = p.wh * p.ww, Np = whole<A>(N), Dp = whole<A>(p.D), windows = p.Hp / p.wh * (p.Wp / p.ww);
  const int64_t all = p.B * windows, row = p.H * p.W;
  WindowTokens t = window_tokens<A>(p, scratch);
  A *q = carve<A>(scratch, N * Dp), *k = carve<A>(scratch, N * Dp), *v = carve<A>(scratch, N * Dp), *dy = carve<A>(scratch, N * Dp), *grad = carve<A>(scratch, N * Dp);
  A *turned = carve<A>(scratch, Dp * Np), *P = carve<A>(scratch, N * Np), *dS = carve<A>(scratch, N * Np), *dbias = carve<A>(scratch, N * Np);
  A* inverse = carve<A>(scratch, 2 * Np);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t chunk = task / p.heads, head = task % p.heads;
    A* dpad = p.dpad ? static_cast<A*>(p.dpad) + (chunk * 3 * p.heads + head) * p.D : nullptr;
    const auto dpad_of = [&](int part) { return dpad ? dpad + part * p.heads * p.D : nullptr; };
    for (int part = 0; dpad && part < 3; ++part)
      for (int64_t d = 0; d < p.D; ++d) dpad_of(part)[d] = A(0);
    for (int64_t i = 0; i < N * Np; i += kLanes<A>) store(dbias + i, zero<A>());
    A dlogit_scale = 0;
    for (int64_t window = all * chunk / p.chunks; window < all * (chunk + 1) / p.chunks; ++window) {
      const int64_t b = window / windows;
      find_tokens(p, window % windows, t);
      attention_probabilities<A>(p, t, b, head, q, k, v, turned, inverse, P);
      const Tokens dout{p.dy, row * p.heads * p.D, p.W * p.heads * p.D, p.heads * p.D, p.D};
      gather<A>(p, t, dout, b, head, nullptr, A(1), dy);
      const auto put = [&](int part) {
        scatter<A>(p, t, p.dqkv, part * p.part_stride + b * row * p.pixel_stride + head * p.D, p.pixel_stride, grad, dpad_of(part));
      };
      product<A, true>(P, Np, dy, Dp, grad, Dp, N, Dp, N);
      put(2);
      transpose<A>(v, N, p.D, turned);
      product<A, false>(dy, Dp, turned, Np, dS, Np, N, Np, p.D);
      softmax_backward<A>(P, N, dS);
      if (p.dbias) {
        for (int64_t i = 0; i < N * Np; i += kLanes<A>) store(dbias + i, load(dbias + i) + load(dS + i));
      }
      product<A, true>(dS, Np, q, Dp, grad, Dp, N, Dp, N);  // of k, or of k / |k|
      if (p.logit_scale) normalize_backward<A>(k, inverse + Np, N, p.D, grad);
      put(1);
      product<A, false>(dS, Np, k, Dp, grad, Dp, N, Dp, N);  // of scale q, or of logit_scale q / |q|
      if (p.logit_scale) {
        const A factor = *head_of<A>(p.logit_scale, head, 1);
        // q / |q| again: the factor may be 0
        const auto pad = p.pad ? static_cast<const A*>(p.pad) + head * p.D : nullptr;
        gather<A>(p, t, p.q, b, head, pad, A(1), q);
        normalize<A>(q, N, p.D, inverse);
        Vec<A> products = zero<A>();
        for (int64_t i = 0; i < N * Dp; i += kLanes<A>) {
          products += load(q + i) * load(grad + i);
          store(grad + i, load(grad + i) * factor);
        }
        dlogit_scale += sum_lanes<A>(products);
        normalize_backward<A>(q, inverse, N, p.D, grad);
      } else {
        for (int64_t i = 0; i < N * Dp; i += kLanes<A>) store(grad + i, load(grad + i) * static_cast<A>(p.scale));
      }
      put(0);
    }
    if (p.dbias) {
      A* to = static_cast<A*>(p.dbias) + task * N * N;
      for (int64_t m = 0; m < N; ++m)
        for (int64_t n = 0; n < N; ++n) to[m * N + n] = dbias[m * Np + n];
    }
    if (p.dlogit_scale) static_cast<A*>(p.dlogit_scale)[task] = dlogit_scale;
  }
}

// Products of small matrices in a thread's own memory, and what comes with them: transposes, sums and maxima of rows. Included
// once per SIMD level.

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
      const A left = a[r * a_row + k * a_step];
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
// c (rows x columns) = a b; columns is a multiple of a vector, b and c have rows of `row`. With a_row = 1, a_step = its row
// length, a is transposed.
template <class A>
void product(int64_t rows, const A* a, int64_t a_row, int64_t a_step, const A* b, int64_t row, int64_t columns, int64_t steps, A* c) {
  constexpr int64_t L = kLanes<A>, kMost = kManyRegisters ? 4 : 2;
  for (int64_t j = 0; j < columns;) {
    const int64_t left = (columns - j) / L, vectors = left < kMost ? left : kMost;
    if (vectors == 4) product_columns<A, 4>(rows, a, a_row, a_step, b + j, row, steps, c + j, row);
    else if (vectors == 3) product_columns<A, 3>(rows, a, a_row, a_step, b + j, row, steps, c + j, row);
    else if (vectors == 2) product_columns<A, 2>(rows, a, a_row, a_step, b + j, row, steps, c + j, row);
    else product_columns<A, 1>(rows, a, a_row, a_step, b + j, row, steps, c + j, row);
    j += vectors * L;
  }
}

// The largest lane of each of kLanes vectors, as sum_each adds them.
template <class A, int kGroup, int... I> FC_INLINE Vec<A> larger_halves(Vec<A> a, Vec<A> b, std::integer_sequence<int, I...>) {
  constexpr int kHalf = kGroup / 2;
  const Vec<A> low = __builtin_shufflevector(a, b, (I / kHalf * kGroup + I % kHalf)...);
  const Vec<A> high = __builtin_shufflevector(a, b, (I / kHalf * kGroup + I % kHalf + kHalf)...);
  return high > low ? high : low;
}
template <class A, int kGroup = kLanes<A>> FC_INLINE Vec<A> largest_each(const Vec<A>* v) {
  if constexpr (kGroup == 1) {
    return v[0];
  } else {
    Vec<A> half[kGroup / 2];
    FC_UNROLL for (int i = 0; i < kGroup / 2; ++i) {
      half[i] = larger_halves<A, kGroup>(v[2 * i], v[2 * i + 1], std::make_integer_sequence<int, kLanes<A>>{});
    }
    return largest_each<A, kGroup / 2>(half);
  }
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

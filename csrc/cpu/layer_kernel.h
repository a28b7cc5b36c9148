// A fully connected layer on a few vectors, and its gradients. Each result is one sum in one order, whatever the tasks.
// Included once per SIMD level.

// out[n][m] = function(pre[n][m]), pre = bias[m] + sum_k in[n][k] weight[m][k], for blocks of rows m. kLanes rows at
// once: their products are added up lane by lane, and the lanes at the end for all rows together.
template <class A> void layer_forward_as(const LayerParams& p, int64_t begin, int64_t end) {
  const int64_t N = p.N, M = p.M, K = p.K, full = K / kLanes<A> * kLanes<A>;
  const int64_t m1 = end * kLayerBlock < M ? end * kLayerBlock : M;
  const A *weight = static_cast<const A*>(p.weight), *bias = static_cast<const A*>(p.bias);
  for (int64_t m = begin * kLayerBlock; m < m1; m += kLanes<A>) {
    const int64_t rows = m1 - m < kLanes<A> ? m1 - m : kLanes<A>;
    const A* row[kLanes<A>];
    for (int64_t i = 0; i < kLanes<A>; ++i) row[i] = weight + (m + (i < rows ? i : 0)) * K;
    const Vec<A> start = bias ? load_lanes<A>(bias + m, rows) : zero<A>();
    for (int64_t n = 0; n < N; ++n) {
      const A* in = static_cast<const A*>(p.in) + n * K;
      Vec<A> acc[kLanes<A>];
      FC_UNROLL for (int64_t i = 0; i < kLanes<A>; ++i) acc[i] = zero<A>();
      for (int64_t k = 0; k < full; k += kLanes<A>) {
        const Vec<A> v = load_as(in + k);
        FC_UNROLL for (int64_t i = 0; i < kLanes<A>; ++i) acc[i] += v * load_as(row[i] + k);
      }
      if (full < K) {
        const Vec<A> v = load_lanes<A>(in + full, K - full);
        FC_UNROLL for (int64_t i = 0; i < kLanes<A>; ++i) acc[i] += v * load_lanes<A>(row[i] + full, K - full);
      }
      const Vec<A> pre = sum_each<A>(acc) + start;
      if (p.pre) store_lanes<A>(static_cast<A*>(p.pre) + n * M + m, pre, rows);
      store_lanes<A>(static_cast<A*>(p.out) + n * M + m, value_of<A>(p.function, pre), rows);
    }
  }
}

// kImages vectors by kVectors vectors of columns, `lanes` of the last one.
template <class A, int kImages, int kVectors> FC_INLINE void layer_backward_tile(const LayerParams& p, int64_t n, int64_t k, int64_t lanes) {
  const int64_t M = p.M, K = p.K;
  const A *dout = static_cast<const A*>(p.dout) + n * M, *weight = static_cast<const A*>(p.weight) + k;
  Vec<A> acc[kImages][kVectors];
  FC_UNROLL for (int i = 0; i < kImages; ++i) {
    FC_UNROLL for (int j = 0; j < kVectors; ++j) acc[i][j] = zero<A>();
  }
  const auto at_lanes = [&](int j) __attribute__((always_inline)) { return j + 1 < kVectors ? kLanes<A> : lanes; };
  for (int64_t m = 0; m < M; ++m) {
    FC_UNROLL for (int j = 0; j < kVectors; ++j) {
      const Vec<A> w = load_lanes<A>(weight + m * K + j * kLanes<A>, at_lanes(j));
      FC_UNROLL for (int i = 0; i < kImages; ++i) acc[i][j] += w * dout[i * M + m];
    }
  }
  FC_UNROLL for (int i = 0; i < kImages; ++i) {
    FC_UNROLL for (int j = 0; j < kVectors; ++j) {
      const int64_t at = (n + i) * K + k + j * kLanes<A>;
      Vec<A> v = acc[i][j] * static_cast<A>(p.scale);
      if (p.gradient_at) v = gradient_of<A>(p.function, load_lanes<A>(static_cast<const A*>(p.gradient_at) + at, at_lanes(j)), v);
      store_lanes<A>(static_cast<A*>(p.out) + at, v, at_lanes(j));
    }
  }
}

template <class A, int kVectors> FC_INLINE void layer_backward_columns(const LayerParams& p, int64_t k, int64_t lanes) {
  int64_t n = 0;
  for (; n + 4 <= p.N; n += 4) layer_backward_tile<A, 4, kVectors>(p, n, k, lanes);
  for (; n < p.N; ++n) layer_backward_tile<A, 1, kVectors>(p, n, k, lanes);
}

// out[n][k] = scale sum_m dout[n][m] weight[m][k], times the derivative of `function`, for blocks of columns k.
template <class A> void layer_backward_as(const LayerParams& p, int64_t begin, int64_t end) {
  constexpr int kVectors = kManyRegisters ? 4 : 2;
  constexpr int64_t kTile = kVectors * kLanes<A>;
  const int64_t k1 = end * kLayerBlock < p.K ? end * kLayerBlock : p.K;
  int64_t k = begin * kLayerBlock;
  for (; k + kTile <= k1; k += kTile) layer_backward_columns<A, kVectors>(p, k, kLanes<A>);
  for (; k < k1; k += kLanes<A>) layer_backward_columns<A, 1>(p, k, k1 - k < kLanes<A> ? k1 - k : kLanes<A>);
}

template <class A, int kRows> FC_INLINE void layer_weight_rows(const LayerParams& p, int64_t m) {
  const int64_t N = p.N, M = p.M, K = p.K;
  const A *dout = static_cast<const A*>(p.dout) + m, *in = static_cast<const A*>(p.in);
  A *dweight = static_cast<A*>(p.dweight) + m * K, *dbias = static_cast<A*>(p.dbias) + m;
  const auto step = [&](int64_t k, int64_t lanes) __attribute__((always_inline)) {
    Vec<A> acc[kRows];
    FC_UNROLL for (int i = 0; i < kRows; ++i) acc[i] = zero<A>();
    for (int64_t n = 0; n < N; ++n) {
      const Vec<A> v = load_lanes<A>(in + n * K + k, lanes);
      FC_UNROLL for (int i = 0; i < kRows; ++i) acc[i] += v * dout[n * M + i];
    }
    FC_UNROLL for (int i = 0; i < kRows; ++i) store_lanes<A>(dweight + i * K + k, acc[i], lanes);
  };
  int64_t k = 0;
  for (; k + kLanes<A> <= K; k += kLanes<A>) step(k, kLanes<A>);
  if (k < K) step(k, K - k);
  for (int i = 0; i < kRows; ++i) {
    dbias[i] = 0;
    for (int64_t n = 0; n < N; ++n) dbias[i] += dout[n * M + i];
  }
}

// dweight[m][k] = sum_n dout[n][m] in[n][k] and dbias[m] = sum_n dout[n][m], for blocks of rows m.
template <class A> void layer_weight_as(const LayerParams& p, int64_t begin, int64_t end) {
  const int64_t m1 = end * kLayerBlock < p.M ? end * kLayerBlock : p.M;
  int64_t m = begin * kLayerBlock;
  for (; m + 4 <= m1; m += 4) layer_weight_rows<A, 4>(p, m);
  for (; m < m1; ++m) layer_weight_rows<A, 1>(p, m);
}

// The two passes over a map of a squeeze-and-excitation, each way: sums of pixels, and factor and summand for each channel
// of an image. Included once per SIMD level.

constexpr int64_t kMapChunk = 4096;  // elements converted at a time
constexpr int64_t kPlaneRun = 1024;  // elements of a plane added up before they join its sum
constexpr int64_t kRepeats = 512;    // elements that the factors of few channels are repeated to
constexpr int kRowsAtOnce = 4;       // added up before they join the sums; more are more streams than the prefetchers follow

template <class A> FC_INLINE int64_t rows_of_chunk(int64_t C) {
  const int64_t rows = kMapChunk / C;
  return rows < kRowsAtOnce ? kRowsAtOnce : rows / kRowsAtOnce * kRowsAtOnce;
}
// Elements of a map converted at a time, and of the buffers for it: none where nothing is. Little scratch leaves the heap as it is.
template <class A> FC_INLINE int64_t map_size(const MapParams& p) {
  const auto differs = [](const void* data, DType dtype) { return data && dtype_size(dtype) != sizeof(A); };
  if (!differs(p.x.data, p.x.dtype) && !differs(p.dy.data, p.dy.dtype) && !differs(p.out.data, p.out.dtype)) return 0;
  return p.channels_last ? rows_of_chunk<A>(p.C) * p.C : kPlanes * p.L < 2 * kMapChunk ? kPlanes * p.L : kMapChunk;
}
// Elements after which the factors of rows of C channels are read again: whole vectors cross from row to row, and none a cache line.
template <class A> FC_INLINE int64_t period_of(int64_t C) {
  int64_t period = C;
  while (period % kLanes<A> || period < kRepeats) period *= 2;
  return period <= kMapChunk ? period : C;
}
template <class A> FC_INLINE int64_t repeats_size(const MapParams& p) {
  return p.channels_last && period_of<A>(p.C) != p.C ? period_of<A>(p.C) : 0;
}
template <class A> int64_t map_scratch_as(const MapParams& p) {
  return 2 * aligned_bytes(map_size<A>(p) * static_cast<int64_t>(sizeof(A))) + 2 * aligned_bytes(repeats_size<A>(p) * static_cast<int64_t>(sizeof(A)));
}

// sum[c] += what kRows rows hold there, of x or of dy x.
template <class A, int kRows, bool kProduct> FC_INLINE void add_rows(const A* x, const A* dy, A* sum, int64_t C) {
  const auto step = [&](int64_t c, int64_t lanes) __attribute__((always_inline)) {
    Vec<A> v[kRows];
    FC_UNROLL for (int i = 0; i < kRows; ++i) {
      v[i] = load_lanes<A>(x + i * C + c, lanes);
      if (kProduct) v[i] *= load_lanes<A>(dy + i * C + c, lanes);
    }
    FC_UNROLL for (int half = kRows / 2; half > 0; half /= 2) {
      FC_UNROLL for (int i = 0; i < half; ++i) v[i] += v[i + half];
    }
    store_lanes<A>(sum + c, load_lanes<A>(sum + c, lanes) + v[0], lanes);
  };
  int64_t c = 0;
  for (; c + kLanes<A> <= C; c += kLanes<A>) step(c, kLanes<A>);
  if (c < C) step(c, C - c);
}

template <class A, bool kProduct> void sum_slice(const MapParams& p, int64_t slice, A* a, A* b) {
  const int64_t C = p.C, n = slice / p.slices, row0 = slice % p.slices * kSlicePixels;
  const int64_t row1 = row0 + kSlicePixels < p.L ? row0 + kSlicePixels : p.L, step = rows_of_chunk<A>(C);
  A* sum = static_cast<A*>(p.partial) + slice * C;
  for (int64_t c = 0; c < C; ++c) sum[c] = 0;
  for (int64_t row = row0; row < row1; row += step) {
    const int64_t count = row1 - row < step ? row1 - row : step, at = (n * p.L + row) * C;
    const A* x = read(p.x, at, count * C, a);
    const A* dy = kProduct ? read(p.dy, at, count * C, b) : nullptr;
    int64_t i = 0;
    const auto add = [&](auto rows) __attribute__((always_inline)) {
      constexpr int kRows = decltype(rows)::value;
      for (; i + kRows <= count; i += kRows) add_rows<A, kRows, kProduct>(x + i * C, dy + (kProduct ? i * C : 0), sum, C);
    };
    add(std::integral_constant<int, kRowsAtOnce>{}), add(std::integral_constant<int, 1>{});
  }
}

// The lane sums of one run of elements, kLanes by kLanes, in four chains.
template <class A, bool kProduct> FC_INLINE Vec<A> sum_run(const A* x, const A* dy, int64_t count) {
  Vec<A> v[4] = {zero<A>(), zero<A>(), zero<A>(), zero<A>()};
  const auto term = [&](int64_t i, int64_t lanes) __attribute__((always_inline)) {
    Vec<A> t = load_lanes<A>(x + i, lanes);
    if (kProduct) t *= load_lanes<A>(dy + i, lanes);
    return t;
  };
  int64_t i = 0;
  for (; i + 4 * kLanes<A> <= count; i += 4 * kLanes<A>) {
    FC_UNROLL for (int j = 0; j < 4; ++j) v[j] += term(i + j * kLanes<A>, kLanes<A>);
  }
  for (; i + kLanes<A> <= count; i += kLanes<A>) v[0] += term(i, kLanes<A>);
  if (i < count) v[1] += term(i, count - i);
  return (v[0] + v[1]) + (v[2] + v[3]);
}

// Sums of the planes [first, last): small ones kLanes at a time, so that their lanes are added up together.
template <class A, bool kProduct> void sum_planes(const MapParams& p, int64_t first, int64_t last, A* a, A* b) {
  A* sum = static_cast<A*>(p.partial);
  const int64_t L = p.L;
  if (kPlanes * L >= 2 * kMapChunk) {
    for (int64_t plane = first; plane < last; ++plane) {
      Vec<A> total = zero<A>();
      for (int64_t i = 0; i < L; i += kPlaneRun) {
        const int64_t count = L - i < kPlaneRun ? L - i : kPlaneRun;
        total += sum_run<A, kProduct>(read(p.x, plane * L + i, count, a), kProduct ? read(p.dy, plane * L + i, count, b) : nullptr, count);
      }
      sum[plane] = sum_lanes<A>(total);
    }
    return;
  }
  const A* x = read(p.x, first * L, (last - first) * L, a);
  const A* dy = kProduct ? read(p.dy, first * L, (last - first) * L, b) : nullptr;
  for (int64_t plane = first; plane < last; plane += kLanes<A>, x += kLanes<A> * L, dy += kProduct ? kLanes<A> * L : 0) {
    const int64_t planes = last - plane < kLanes<A> ? last - plane : kLanes<A>;
    Vec<A> v[kLanes<A>];
    FC_UNROLL for (int64_t i = 0; i < kLanes<A>; ++i) {
      const int64_t at = (i < planes ? i : 0) * L;
      v[i] = sum_run<A, kProduct>(x + at, dy + (kProduct ? at : 0), L);
    }
    store_lanes<A>(sum + plane, sum_each<A>(v), planes);
  }
}

template <class A> void map_sum_as(const MapParams& p, char* scratch, int64_t begin, int64_t end) {
  const int64_t size = map_size<A>(p);
  A *a = carve<A>(scratch, size), *b = carve<A>(scratch, size);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t first = task * kPlanes, last = first + kPlanes < p.N * p.C ? first + kPlanes : p.N * p.C;
    if (p.channels_last) p.dy.data ? sum_slice<A, true>(p, task, a, b) : sum_slice<A, false>(p, task, a, b);
    else p.dy.data ? sum_planes<A, true>(p, first, last, a, b) : sum_planes<A, false>(p, first, last, a, b);
  }
}

// out = in factor + summand (or null) for `count` elements in a row, over which factor and summand repeat.
template <class A, bool kAdd>
FC_INLINE void apply_rows(const A* in, const A* factor, const A* summand, int64_t period, A* out, int64_t count) {
  for (int64_t i = 0; i < count; i += period, in += period, out += period) {
    const int64_t elements = count - i < period ? count - i : period;
    const auto step = [&](int64_t c, int64_t lanes) __attribute__((always_inline)) {
      Vec<A> v = load_lanes<A>(in + c, lanes) * load_lanes<A>(factor + c, lanes);
      if constexpr (kAdd) v += load_lanes<A>(summand + c, lanes);
      store_lanes<A>(out + c, v, lanes);
    };
    int64_t c = 0;
    for (; c + kLanes<A> <= elements; c += kLanes<A>) step(c, kLanes<A>);
    if (c < elements) step(c, elements - c);
  }
}

// The same for a plane of one channel, in whole vectors: the first and the last overlap those between, which are aligned.
template <class A, bool kAdd> FC_INLINE void apply_run(const A* in, A factor, A summand, A* out, int64_t count) {
  const auto value = [&](int64_t i, int64_t lanes) __attribute__((always_inline)) {
    Vec<A> v = load_lanes<A>(in + i, lanes) * factor;
    if constexpr (kAdd) v += summand;  // without: -0 stays -0
    return v;
  };
  if (count < kLanes<A>) return store_lanes<A>(out, value(0, count), count);
  store_as(out, value(0, kLanes<A>));
  int64_t i = kLanes<A> - static_cast<int64_t>(reinterpret_cast<uintptr_t>(out) / sizeof(A)) % kLanes<A>;
  for (; i + kLanes<A> <= count; i += kLanes<A>) {
    store<A>(out + i, value(i, kLanes<A>));
  }
  if (i < count) store_as(out + count - kLanes<A>, value(count - kLanes<A>, kLanes<A>));
}

template <class A> FC_INLINE const A* repeated(const A* values, int64_t C, int64_t period, A* repeats) {
  if (!values || period == C) return values;
  for (int64_t i = 0; i < period; i += C) {
    for (int64_t c = 0; c < C; ++c) repeats[i + c] = values[c];
  }
  return repeats;
}

template <class A, bool kAdd> void apply_as(const MapParams& p, char* scratch, int64_t begin, int64_t end) {
  const int64_t C = p.C, L = p.L, size = map_size<A>(p), period = period_of<A>(C);
  A *a = carve<A>(scratch, size), *o = carve<A>(scratch, size), *factors = carve<A>(scratch, repeats_size<A>(p)), *summands = carve<A>(scratch, repeats_size<A>(p));
  const Array in = p.dy.data ? p.dy : p.x;
  const A *factor = static_cast<const A*>(p.factor), *summand = static_cast<const A*>(p.summand);
  const bool direct = dtype_size(p.out.dtype) == sizeof(A);
  const auto target = [&](int64_t element) __attribute__((always_inline)) { return direct ? reinterpret_cast<A*>(at(p.out, element)) : o; };
  int64_t image = -1;
  for (int64_t task = end - 1; task >= begin; --task) {  // backwards: the cache holds what the sums read last
    if (p.channels_last) {
      const int64_t n = task / p.slices, row0 = task % p.slices * kSlicePixels, step = rows_of_chunk<A>(C);
      const int64_t row1 = row0 + kSlicePixels < L ? row0 + kSlicePixels : L;
      const bool ready = n == image && period != C;
      const A* f = ready ? factors : repeated<A>(factor + n * C, C, period, factors);
      const A* s = ready ? summands : repeated<A>(kAdd ? summand + n * C : nullptr, C, period, summands);
      image = n;
      for (int64_t row = row0; row < row1; row += step) {
        const int64_t count = (row1 - row < step ? row1 - row : step) * C, element = (n * L + row) * C;
        const A* from = read(in, element, count, a);
        A* to = target(element);
        apply_rows<A, kAdd>(from, f, s, period, to, count);
        if (!direct) write(p.out, element, count, to);
      }
    } else {
      const int64_t last = (task + 1) * kPlanes < p.N * C ? (task + 1) * kPlanes : p.N * C;
      for (int64_t plane = task * kPlanes; plane < last; ++plane)
        for (int64_t i = 0; i < L; i += kMapChunk) {
          const int64_t count = L - i < kMapChunk ? L - i : kMapChunk, element = plane * L + i;
          const A* from = read(in, element, count, a);
          A* to = target(element);
          apply_run<A, kAdd>(from, factor[plane], kAdd ? summand[plane] : A(0), to, count);
          if (!direct) write(p.out, element, count, to);
        }
    }
  }
}
template <class A> void map_apply_as(const MapParams& p, char* scratch, int64_t begin, int64_t end) {
  p.summand ? apply_as<A, true>(p, scratch, begin, end) : apply_as<A, false>(p, scratch, begin, end);
}

constexpr int64_t kFoldBlock = 16;  // slices added up before they join the total

template <class A> void fold_as(const FoldParams& p, int64_t begin, int64_t end) {
  const int64_t C = p.C;
  const A scale = static_cast<A>(p.scale);
  for (int64_t n = begin; n < end; ++n) {
    const A* partial = static_cast<const A*>(p.partial) + n * p.slices * C;
    for (int64_t c = 0; c < C; c += kLanes<A>) {
      const int64_t lanes = C - c < kLanes<A> ? C - c : kLanes<A>, at = n * C + c;
      Vec<A> total = zero<A>();
      for (int64_t s0 = 0; s0 < p.slices; s0 += kFoldBlock) {
        Vec<A> block = zero<A>();
        for (int64_t s = s0; s < p.slices && s < s0 + kFoldBlock; ++s) block += load_lanes<A>(partial + s * C + c, lanes);
        total += block;
      }
      if (p.z) {
        const Vec<A> z = load_lanes<A>(static_cast<const A*>(p.z) + at, lanes);
        store_lanes<A>(static_cast<A*>(p.gate) + at, value_of<A>(p.function, z), lanes);
        total = gradient_of<A>(p.function, z, total);
      }
      store_lanes<A>(static_cast<A*>(p.out) + at, total * scale, lanes);
    }
  }
}

// grouped_conv: a direct convolution over planes. Included once per level (kernels_level.h).
//
// The channels of a few groups are staged as zero-padded planes of the accumulation type, one for each phase of the stride. In
// a plane a tap is a constant offset from its output, whatever the row: vectors run over pixels, across the ends of rows, and
// the columns between `cols` and the pitch are computed and dropped.

// The planes of one channel: [stride_h][stride_w][rows][pitch]. Vectors may run past the end of each phase.
struct Planes {
  int64_t rows, pitch, phase, channel, count;  // count: elements of a channel's output plane

  Planes(const GroupedParams& p, int64_t lanes) {
    int64_t last_h = 0, last_w = 0;
    for (int64_t t = 0; t < p.taps; ++t) {
      last_h = p.tap_h[t] > last_h ? p.tap_h[t] : last_h;
      last_w = p.tap_w[t] > last_w ? p.tap_w[t] : last_w;
    }
    rows = p.band_rows + last_h / p.stride_h;
    pitch = p.cols + last_w / p.stride_w;
    phase = rows * pitch + lanes;
    channel = round_up(p.stride_h * p.stride_w * phase + pitch + lanes, lanes);
    count = round_up(p.band_rows * pitch + lanes, lanes);
  }
  int64_t offset(const GroupedParams& p, int64_t t) const {
    const int64_t h = p.tap_h[t], w = p.tap_w[t];
    return (h % p.stride_h * p.stride_w + w % p.stride_w) * phase + h / p.stride_h * pitch + w / p.stride_w;
  }
};

#if defined(__clang__)
template <class V, int... kIndex> FC_INLINE V shuffle(V a, V b, std::integer_sequence<int, kIndex...>) { return __builtin_shufflevector(a, b, kIndex...); }
#else
template <class V, int... kIndex> FC_INLINE V shuffle(V a, V b, std::integer_sequence<int, kIndex...>) {
  using Index = std::conditional_t<sizeof(a[0]) == 8, int64_t, int32_t>;
  typedef Index Indices __attribute__((vector_size(FASTCONV_VECTOR_BYTES)));
  return __builtin_shuffle(a, b, Indices{kIndex...});
}
#endif

// Of two rows that are kStep apart in a square of vectors: the 2 x 2 blocks off the diagonal change places.
template <int kStep, class V, int... kLane> FC_INLINE void exchange(V& a, V& b, std::integer_sequence<int, kLane...>) {
  constexpr int kCount = sizeof...(kLane);
  const V low = shuffle(a, b, std::integer_sequence<int, (kLane & kStep ? kCount + kLane - kStep : kLane)...>{});
  b = shuffle(a, b, std::integer_sequence<int, (kLane & kStep ? kCount + kLane : kLane + kStep)...>{});
  a = low;
}
template <class A, int kStep> FC_INLINE void transpose_from(Vec<A>* v) {
  if constexpr (kStep < kLanes<A>) {
    FC_UNROLL for (int64_t i = 0; i < kLanes<A>; ++i)
      if (!(i & kStep)) exchange<kStep>(v[i], v[i + kStep], std::make_integer_sequence<int, static_cast<int>(kLanes<A>)>{});
    transpose_from<A, 2 * kStep>(v);
  }
}
template <class A> FC_INLINE void transpose(Vec<A>* v) { transpose_from<A, 1>(v); }

// `count` pixels of `channels` channels, `step` elements apart, to channels `plane` elements apart. Writes whole vectors: zeros behind.
template <class A, class T> void pixels_to_planes(const T* from, int64_t step, int64_t count, int64_t channels, A* to, int64_t plane) {
  for (int64_t c = 0; c < channels; c += kLanes<A>) {
    const int64_t lanes = channels - c < kLanes<A> ? channels - c : kLanes<A>;
    for (int64_t i = 0; i < count; i += kLanes<A>) {
      Vec<A> v[kLanes<A>];
      const int64_t left = count - i;
      if (left >= kLanes<A> && lanes == kLanes<A>) {
        FC_UNROLL for (int64_t k = 0; k < kLanes<A>; ++k) v[k] = load_as(from + (i + k) * step + c);
      } else {
        for (int64_t k = 0; k < kLanes<A>; ++k) v[k] = k < left ? load_lanes<A>(from + (i + k) * step + c, lanes) : zero<A>();
      }
      transpose<A>(v);
      if (lanes == kLanes<A>) {
        FC_UNROLL for (int64_t k = 0; k < kLanes<A>; ++k) store_as(to + (c + k) * plane + i, v[k]);
      } else {
        for (int64_t k = 0; k < lanes; ++k) store_as(to + (c + k) * plane + i, v[k]);
      }
    }
  }
}

template <class A, class T> void planes_to_pixels(const A* from, int64_t plane, int64_t count, int64_t channels, T* to, int64_t step) {
  for (int64_t i = 0; i < count; i += kLanes<A>) {
    const int64_t pixels = count - i < kLanes<A> ? count - i : kLanes<A>;
    for (int64_t c = 0; c < channels; c += kLanes<A>) {
      const int64_t lanes = channels - c < kLanes<A> ? channels - c : kLanes<A>;
      Vec<A> v[kLanes<A>];
      if (lanes == kLanes<A>) {
        FC_UNROLL for (int64_t k = 0; k < kLanes<A>; ++k) v[k] = load_as(from + (c + k) * plane + i);
      } else {
        for (int64_t k = 0; k < kLanes<A>; ++k) v[k] = k < lanes ? load_as(from + (c + k) * plane + i) : zero<A>();
      }
      transpose<A>(v);
      if (pixels == kLanes<A> && lanes == kLanes<A>) {
        FC_UNROLL for (int64_t k = 0; k < kLanes<A>; ++k) store_as(to + (i + k) * step + c, v[k]);
      } else {
        for (int64_t k = 0; k < pixels; ++k) store_lanes<A>(to + (i + k) * step + c, v[k], lanes);
      }
    }
  }
}

// One row of a channel, every step-th element; whole vectors, zeros behind.
template <class A, class T> FC_INLINE void row_to_plane(const T* from, int64_t step, int64_t count, A* to) {
  for (int64_t i = 0; i < count; i += kLanes<A>) {
    const int64_t lanes = count - i < kLanes<A> ? count - i : kLanes<A>;
    if (step == 1) {
      store_as(to + i, load_lanes<A>(from + i, lanes));
      continue;
    }
    T values[kLanes<A>] = {};
    for (int64_t k = 0; k < lanes; ++k) values[k] = from[(i + k) * step];
    store_as(to + i, load_as(values));
  }
}

template <class A, class T> FC_INLINE void plane_to_row(const A* from, int64_t count, T* to, int64_t step) {
  for (int64_t i = 0; i < count; i += kLanes<A>) {
    const int64_t lanes = count - i < kLanes<A> ? count - i : kLanes<A>;
    if (step == 1) {
      store_lanes<A>(to + i, load_as(from + i), lanes);
      continue;
    }
    T values[kLanes<A>];
    store_as(values, load_as(from + i));
    for (int64_t k = 0; k < lanes; ++k) to[(i + k) * step] = values[k];
  }
}

// Where an activation is: image n, channels from c0 on.
struct Map {
  int64_t n, c0, channels, C, H, W;
  bool nhwc;
  int64_t element(int64_t c, int64_t h, int64_t w) const { return nhwc ? ((n * H + h) * W + w) * C + c0 + c : ((n * C + c0 + c) * H + h) * W + w; }
};

// Rows [first, first + rows * stride_h) of a map into planes; rows outside [0, end) and columns outside the map are zeros.
template <class A>
void stage_planes(Array a, const Map& m, int64_t first, int64_t end, int64_t rows, int64_t stride_h, int64_t stride_w, int64_t pad_w, int64_t pitch,
                  int64_t phase, int64_t channel, A* planes) {
  for (int64_t r = 0; r < rows * stride_h; ++r) {
    const int64_t h = first + r;
    for (int64_t phase_w = 0; phase_w < stride_w; ++phase_w) {
      const int64_t before = pad_w - phase_w, j0 = before > 0 ? ceil_div(before, stride_w) : 0;
      int64_t j1 = m.W + before > 0 ? ceil_div(m.W + before, stride_w) : 0;
      j1 = j1 < pitch ? j1 : pitch;
      if (j1 <= j0) continue;
      A* out = planes + (r % stride_h * stride_w + phase_w) * phase + r / stride_h * pitch + j0;
      if (h < 0 || h >= end) {
        for (int64_t c = 0; c < m.channels; ++c)
          for (int64_t j = 0; j < j1 - j0; j += kLanes<A>) store_as(out + c * channel + j, zero<A>());
        continue;
      }
      with_type<A>(a.dtype, [&](auto* type) __attribute__((always_inline)) {
        const auto* from = reinterpret_cast<decltype(type)>(at(a, 0)) + m.element(0, h, j0 * stride_w - before);
        if (m.nhwc) return pixels_to_planes<A>(from, stride_w * m.C, j1 - j0, m.channels, out, channel);
        for (int64_t c = 0; c < m.channels; ++c) row_to_plane<A>(from + c * m.H * m.W, stride_w, j1 - j0, out + c * channel);
      });
    }
  }
}

template <class A> void clear(A* p, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes<A>) store(p + i, zero<A>());
}

// kRows output channels of kVectors vectors of pixels.
template <class A, int kRows, int kVectors>
FC_INLINE void grouped_tile(const GroupedParams& p, const Planes& planes, const int64_t* offsets, const A* x, const A* weight, const A* bias, A* y) {
  Vec<A> acc[kRows][kVectors];
  FC_UNROLL for (int r = 0; r < kRows; ++r) FC_UNROLL for (int v = 0; v < kVectors; ++v) acc[r][v] = broadcast<A>(bias ? bias[r] : A(0));
  for (int64_t c = 0; c < p.in_width; ++c, x += planes.channel)
    for (int64_t t = 0; t < p.taps; ++t, weight += p.block) {
      const A* at_tap = x + offsets[t];
      Vec<A> pixels[kVectors];
      FC_UNROLL for (int v = 0; v < kVectors; ++v) pixels[v] = load_as(at_tap + v * kLanes<A>);
      FC_UNROLL for (int r = 0; r < kRows; ++r) FC_UNROLL for (int v = 0; v < kVectors; ++v) acc[r][v] += pixels[v] * weight[r];
    }
  FC_UNROLL for (int r = 0; r < kRows; ++r) FC_UNROLL for (int v = 0; v < kVectors; ++v) store(y + r * planes.count + v * kLanes<A>, acc[r][v]);
}

// Runs f<min(rows, kMost)>.
template <int kMost, class F> FC_INLINE void with_rows(int64_t rows, F&& f) {
  if constexpr (kMost > 1) {
    if (rows < kMost) return with_rows<kMost - 1>(rows, static_cast<F&&>(f));
  }
  f(std::integral_constant<int, kMost>{});
}

// All output channels of a group, for `count` elements of the flat plane.
template <class A>
void grouped_plane(const GroupedParams& p, const Planes& planes, const int64_t* offsets, int64_t count, const A* x, const A* weight, const A* bias, A* y) {
  constexpr int kMost = kManyRegisters ? 4 : 2;  // 24 accumulators, or 12
  const int64_t block = p.in_width * p.taps * p.block;
  for (int64_t q = 0; q < count;) {
    const int64_t vectors = ceil_div(count - q, kLanes<A>) >= kMost ? kMost : ceil_div(count - q, kLanes<A>) >= 2 ? 2 : 1;
    for (int64_t o = 0; o < p.out_width; o += p.block)
      with_rows<GroupedParams::kMaxBlock>(p.out_width - o < p.block ? p.out_width - o : p.block, [&](auto rows) __attribute__((always_inline)) {
        const A *w = weight + o / p.block * block, *b = bias ? bias + o : nullptr;
        A* out = y + o * planes.count + q;
        if (vectors == kMost) grouped_tile<A, decltype(rows)::value, kMost>(p, planes, offsets, x + q, w, b, out);
        else if (vectors == 2) grouped_tile<A, decltype(rows)::value, 2>(p, planes, offsets, x + q, w, b, out);
        else grouped_tile<A, decltype(rows)::value, 1>(p, planes, offsets, x + q, w, b, out);
      });
    q += vectors * kLanes<A>;
  }
}

template <class A> int64_t grouped_x_elements(const GroupedParams& p, const Planes& planes) {
  return p.together * p.in_width * planes.channel + 4 * kLanes<A>;
}

template <class A> int64_t grouped_scratch_as(const GroupedParams& p) {
  const Planes planes(p, kLanes<A>);
  return aligned_bytes(grouped_x_elements<A>(p, planes) * sizeof(A)) + aligned_bytes(p.together * p.out_width * planes.count * sizeof(A));
}

template <class A> void grouped_as(const GroupedParams& p, char* scratch, int64_t begin, int64_t end) {
  const Planes planes(p, kLanes<A>);
  int64_t offsets[GroupedParams::kMaxTaps];
  for (int64_t t = 0; t < p.taps; ++t) offsets[t] = planes.offset(p, t);
  A* x = carve<A>(scratch, grouped_x_elements<A>(p, planes));
  A* y = carve<A>(scratch, p.together * p.out_width * planes.count);
  clear(x, grouped_x_elements<A>(p, planes));  // the columns of padding stay so
  const int64_t blocks = ceil_div(p.groups, p.together), outputs = ceil_div(p.out_width, p.block);
  const int64_t weights = outputs * p.in_width * p.taps * p.block;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t n = task / blocks / p.bands, row0 = task / blocks % p.bands * p.band_rows, g0 = task % blocks * p.together;
    const int64_t rows = p.rows - row0 < p.band_rows ? p.rows - row0 : p.band_rows;
    const int64_t groups = p.groups - g0 < p.together ? p.groups - g0 : p.together;
    const Map in{n, g0 * p.in_width, groups * p.in_width, p.groups * p.in_width, p.H, p.W, p.nhwc};
    const Map out{n, g0 * p.out_width, groups * p.out_width, p.groups * p.out_width, p.out_H, p.out_W, p.nhwc};
    stage_planes(p.in, in, row0 * p.stride_h - p.pad_h, p.H, planes.rows, p.stride_h, p.stride_w, p.pad_w, planes.pitch, planes.phase, planes.channel, x);
    for (int64_t g = 0; g < groups; ++g)
      grouped_plane(p, planes, offsets, rows * planes.pitch, x + g * p.in_width * planes.channel, static_cast<const A*>(p.packed) + (g0 + g) * weights,
                    p.bias ? static_cast<const A*>(p.bias) + (g0 + g) * p.out_width : nullptr, y + g * p.out_width * planes.count);
    with_type<A>(p.out.dtype, [&](auto* type) __attribute__((always_inline)) {
      using T = std::remove_cv_t<std::remove_pointer_t<decltype(type)>>;
      for (int64_t r = 0; r < rows; ++r) {
        T* to = reinterpret_cast<T*>(at(p.out, out.element(0, (row0 + r) * p.step_h + p.first_h, p.first_w)));
        const A* from = y + r * planes.pitch;
        if (p.nhwc) planes_to_pixels(from, planes.count, p.cols, out.channels, to, p.step_w * out.C);
        else
          for (int64_t c = 0; c < out.channels; ++c) plane_to_row(from + c * planes.count, p.cols, to + c * p.out_H * p.out_W, p.step_w);
      }
    });
  }
}

// ---- dweight: sums over the pixels of dy times x, lane by lane

// kRows output channels, kTaps taps of one input channel. `sums` are [output channel][in_width * taps + 1] vectors.
template <class A, int kRows, int kTaps>
FC_INLINE void grouped_wgrad_tile(const A* x, const int64_t* offsets, const A* dy, int64_t plane, int64_t count, A* sums, int64_t row) {
  Vec<A> acc[kRows][kTaps] = {};
  for (int64_t q = 0; q < count; q += kLanes<A>) {
    Vec<A> d[kRows];
    FC_UNROLL for (int r = 0; r < kRows; ++r) d[r] = load(dy + r * plane + q);
    FC_UNROLL for (int t = 0; t < kTaps; ++t) {
      const Vec<A> pixels = load_as(x + offsets[t] + q);
      FC_UNROLL for (int r = 0; r < kRows; ++r) acc[r][t] += d[r] * pixels;
    }
  }
  FC_UNROLL for (int r = 0; r < kRows; ++r) FC_UNROLL for (int t = 0; t < kTaps; ++t) {
    A* sum = sums + (r * row + t) * kLanes<A>;
    store(sum, load(sum) + acc[r][t]);
  }
}

template <class A, int kTaps>
void grouped_wgrad_group(const GroupedParams& p, const Planes& planes, const int64_t* offsets, int64_t count, const A* x, const A* dy, A* sums) {
  constexpr int kMost = kTaps > 3 ? 2 : kManyRegisters ? GroupedParams::kMaxBlock : 4;
  const int64_t row = p.in_width * p.taps + 1, block = p.block < kMost ? p.block : kMost;
  for (int64_t c = 0; c < p.in_width; ++c)
    for (int64_t o = 0; o < p.out_width; o += block)
      with_rows<kMost>(p.out_width - o < block ? p.out_width - o : block, [&](auto rows) __attribute__((always_inline)) {
        for (int64_t t = 0; t < p.taps; t += kTaps)
          grouped_wgrad_tile<A, decltype(rows)::value, kTaps>(x + c * planes.channel, offsets + t, dy + o * planes.count, planes.count, count,
                                                              sums + (o * row + c * p.taps + t) * kLanes<A>, row);
      });
  for (int64_t o = 0; o < p.out_width; ++o) {
    A* sum = sums + (o * row + row - 1) * kLanes<A>;
    Vec<A> acc = load(sum);
    for (int64_t q = 0; q < count; q += kLanes<A>) acc += load(dy + o * planes.count + q);
    store(sum, acc);
  }
}

template <class A> int64_t grouped_sums(const GroupedParams& p) { return p.together * p.out_width * (p.in_width * p.taps + 1) * kLanes<A>; }

template <class A> int64_t grouped_dy_elements(const GroupedParams& p, const Planes& planes) {
  return p.together * p.out_width * planes.count + 2 * kLanes<A>;
}

template <class A> int64_t grouped_wgrad_scratch_as(const GroupedParams& p) {
  const Planes planes(p, kLanes<A>);
  return aligned_bytes(grouped_x_elements<A>(p, planes) * sizeof(A)) + aligned_bytes(grouped_dy_elements<A>(p, planes) * sizeof(A)) +
         aligned_bytes(grouped_sums<A>(p) * sizeof(A));
}

template <class A> void grouped_wgrad_as(const GroupedParams& p, char* scratch, int64_t begin, int64_t end) {
  const Planes planes(p, kLanes<A>);
  int64_t offsets[GroupedParams::kMaxTaps];
  for (int64_t t = 0; t < p.taps; ++t) offsets[t] = planes.offset(p, t);
  A* x = carve<A>(scratch, grouped_x_elements<A>(p, planes));
  A* dy = carve<A>(scratch, grouped_dy_elements<A>(p, planes));
  A* sums = carve<A>(scratch, grouped_sums<A>(p));
  clear(x, grouped_x_elements<A>(p, planes));
  clear(dy, grouped_dy_elements<A>(p, planes));
  const int64_t blocks = ceil_div(p.groups, p.together), row = p.in_width * p.taps + 1, bands = p.N * p.bands;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t slice = task / blocks, g0 = task % blocks * p.together;
    const int64_t groups = p.groups - g0 < p.together ? p.groups - g0 : p.together;
    clear(sums, grouped_sums<A>(p));
    const int64_t band1 = part_begin(bands, p.slices, slice + 1);
    for (int64_t band = part_begin(bands, p.slices, slice); band < band1; ++band) {
      const int64_t n = band / p.bands, row0 = band % p.bands * p.band_rows;
      const int64_t rows = p.rows - row0 < p.band_rows ? p.rows - row0 : p.band_rows;
      const Map in{n, g0 * p.in_width, groups * p.in_width, p.groups * p.in_width, p.H, p.W, p.nhwc};
      const Map out{n, g0 * p.out_width, groups * p.out_width, p.groups * p.out_width, p.out_H, p.out_W, p.nhwc};
      stage_planes(p.in, in, row0 * p.stride_h - p.pad_h, p.H, planes.rows, p.stride_h, p.stride_w, p.pad_w, planes.pitch, planes.phase, planes.channel, x);
      stage_planes(p.dy, out, row0, row0 + rows, p.band_rows, 1, 1, 0, planes.pitch, 0, planes.count, dy);
      for (int64_t g = 0; g < groups; ++g) {
        const A *x_group = x + g * p.in_width * planes.channel, *dy_group = dy + g * p.out_width * planes.count;
        A* sums_group = sums + g * p.out_width * row * kLanes<A>;
        const int64_t count = rows * planes.pitch;
        if (p.taps % 7 == 0) grouped_wgrad_group<A, 7>(p, planes, offsets, count, x_group, dy_group, sums_group);
        else if (p.taps % 5 == 0) grouped_wgrad_group<A, 5>(p, planes, offsets, count, x_group, dy_group, sums_group);
        else if (p.taps % 3 == 0) grouped_wgrad_group<A, 3>(p, planes, offsets, count, x_group, dy_group, sums_group);
        else grouped_wgrad_group<A, 1>(p, planes, offsets, count, x_group, dy_group, sums_group);
      }
    }
    A* partial = static_cast<A*>(p.partial) + (slice * p.groups + g0) * p.out_width * row;
    for (int64_t i = 0; i < groups * p.out_width * row; ++i) partial[i] = sum_lanes<A>(load(sums + i * kLanes<A>));
  }
}

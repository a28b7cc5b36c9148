// The gradients of a linear layer's weight and bias, of which torch's products reach three quarters of the arithmetic up to Zen 4.
// Included once per SIMD level.

// kOutputs x kColumns vectors of dweight stay in registers over kSteps rows of dy and x. Both are repacked before, so that the
// innermost loop reads them in order: in panels of kOutputs and of kColumns vectors, row after row. The gap between panels keeps
// them off a multiple of the page size, where the first level of cache has room for eight lines.
constexpr int64_t kOutputs = kManyRegisters ? 8 : 4, kColumns = 3, kSteps = 128, kGap = 16;
template <class A> constexpr int64_t kColumnPanel = kColumns * kLanes<A>;
template <class A> constexpr int64_t kDyPanelSize = kOutputs * kSteps + kGap;
template <class A> constexpr int64_t kXPanelSize = kColumnPanel<A> * kSteps + kGap;

// c[kOutputs][V vectors] += dy^T x over `rows` rows of a panel each. Meanwhile a line of each of as many rows at `next`, a part of
// what is repacked next, comes into the second level of cache.
template <class A, int V>
FC_INLINE void add_product(const A* dy, const A* x, int64_t rows, A* c, int64_t c_row, const char* next, int64_t next_row) {
  Vec<A> sum[kOutputs][V] = {};  // from zero: one by one, the rounding of many rows would add up
  for (int64_t k = 0; k < rows; ++k) {
    prefetch_l2(next + k * next_row);
    Vec<A> right[V];
    FC_UNROLL for (int v = 0; v < V; ++v) right[v] = load(x + (k * V + v) * kLanes<A>);
    FC_UNROLL for (int r = 0; r < kOutputs; ++r) {
      const A left = dy[k * kOutputs + r];
      FC_UNROLL for (int v = 0; v < V; ++v) sum[r][v] += left * right[v];
    }
  }
  FC_UNROLL for (int r = 0; r < kOutputs; ++r)
    FC_UNROLL for (int v = 0; v < V; ++v) store(c + r * c_row + v * kLanes<A>, load(c + r * c_row + v * kLanes<A>) + sum[r][v]);
}

// A block of dweight: D rows of C, from (first_d, first_c) on.
template <class A> struct WeightBlock {
  const LinearWgradParams& p;
  const int64_t first_d, first_c, D, C, padded_D, padded_C;
  A *dy_panels, *x_panels, *dweight, *recent;
  double* dbias;

  WeightBlock(const LinearWgradParams& p, int64_t task, char* scratch)
      : p(p), first_d(task / p.blocks_c * p.block_d), first_c(task % p.blocks_c * p.block_c),
        D(p.D - first_d < p.block_d ? p.D - first_d : p.block_d), C(p.C - first_c < p.block_c ? p.C - first_c : p.block_c),
        padded_D(round_up(D, kOutputs)), padded_C(round_up(C, kLanes<A>)) {
    dy_panels = carve<A>(scratch, padded_D / kOutputs * kDyPanelSize<A>);
    x_panels = carve<A>(scratch, ceil_div(padded_C, kColumnPanel<A>) * kXPanelSize<A>);
    dweight = carve<A>(scratch, padded_D * padded_C);
    recent = carve<A>(scratch, padded_D);
    dbias = carve<double>(scratch, padded_D);
    for (int64_t i = 0; i < padded_D * padded_C; i += kLanes<A>) store(dweight + i, zero<A>());
    for (int64_t i = 0; i < padded_D; ++i) dbias[i] = 0;
  }

  const A* dy(int64_t row) const { return static_cast<const A*>(p.dy.data) + row * p.D + first_d; }
  const A* x(int64_t row) const { return static_cast<const A*>(p.x.data) + row * p.C + first_c; }

  // Panels of dy, a few rows at a time: lines of one panel lie together, those of one row far apart.
  void pack_dy(int64_t first, int64_t rows) {
    for (int64_t k = 0; k < rows; k += 8) {
      const int64_t few = rows - k < 8 ? rows - k : 8;
      for (int64_t d = 0; d < padded_D; d += kOutputs) {
        A* panel = dy_panels + d / kOutputs * kDyPanelSize<A> + k * kOutputs;
        const int64_t count = D - d < kOutputs ? D - d : kOutputs;
        for (int64_t q = 0; q < few; ++q, panel += kOutputs) {
          const A* row = dy(first + k + q) + d;
          if (count == kOutputs) __builtin_memcpy(panel, row, kOutputs * sizeof(A));
          else for (int64_t i = 0; i < kOutputs; ++i) panel[i] = i < count ? row[i] : A(0);
        }
        if (p.dbias.data && first_c == 0) add_bias(panel - few * kOutputs, few, recent + d);
      }
    }
  }
  void pack_x(int64_t first, int64_t rows) {
    for (int64_t k = 0; k < rows; k += 4) {
      const int64_t few = rows - k < 4 ? rows - k : 4;
      for (int64_t c = 0; c < padded_C; c += kColumnPanel<A>) {
        const int64_t width = panel_width(c);
        A* panel = x_panels + c / kColumnPanel<A> * kXPanelSize<A> + k * width;
        for (int64_t q = 0; q < few; ++q, panel += width)
          for (int64_t i = 0; i < width; i += kLanes<A>) {
            const int64_t left = C - c - i;
            store(panel + i, load_lanes<A>(x(first + k + q) + c + i, left < kLanes<A> ? left : kLanes<A>));
          }
      }
    }
  }
  int64_t panel_width(int64_t c) const { return padded_C - c < kColumnPanel<A> ? padded_C - c : kColumnPanel<A>; }

  // Sums of few rows add up to one of kSteps, and those to dbias in double.
  static FC_INLINE void add_bias(const A* panel, int64_t rows, A* recent) {
    A sum[kOutputs] = {};
    for (int64_t k = 0; k < rows; ++k) FC_UNROLL for (int i = 0; i < kOutputs; ++i) sum[i] += panel[k * kOutputs + i];
    FC_UNROLL for (int i = 0; i < kOutputs; ++i) recent[i] += sum[i];
  }

  // The line of each row of the next kSteps that product `index` fetches: first those of dy, then those of x.
  const char* line(int64_t index, int64_t first, int64_t& row_bytes) const {
    constexpr int64_t kLine = 64 / sizeof(A);
    const int64_t of_dy = ceil_div(D, kLine), of_x = ceil_div(C, kLine);
    row_bytes = 0;
    if (first + kSteps > p.rows || index >= of_dy + of_x) return reinterpret_cast<const char*>(dy_panels);
    row_bytes = (index < of_dy ? p.D : p.C) * static_cast<int64_t>(sizeof(A));
    return reinterpret_cast<const char*>(index < of_dy ? dy(first) + index * kLine : x(first) + (index - of_dy) * kLine);
  }

  void add_rows(int64_t first, int64_t rows) {
    for (int64_t d = 0; d < padded_D; ++d) recent[d] = 0;
    pack_dy(first, rows), pack_x(first, rows);
    for (int64_t d = 0; d < padded_D; ++d) dbias[d] += static_cast<double>(recent[d]);
    int64_t index = 0, row_bytes;
    for (int64_t c = 0; c < padded_C; c += kColumnPanel<A>) {
      const A* right = x_panels + c / kColumnPanel<A> * kXPanelSize<A>;
      const int64_t vectors = panel_width(c) / kLanes<A>;
      for (int64_t d = 0; d < padded_D; d += kOutputs) {
        const A* left = dy_panels + d / kOutputs * kDyPanelSize<A>;
        A* sums = dweight + d * padded_C + c;
        const char* next = line(index++, first + rows, row_bytes);
        if (vectors == 3) add_product<A, 3>(left, right, rows, sums, padded_C, next, row_bytes);
        else if (vectors == 2) add_product<A, 2>(left, right, rows, sums, padded_C, next, row_bytes);
        else add_product<A, 1>(left, right, rows, sums, padded_C, next, row_bytes);
      }
    }
  }

  void write_out() const {
    for (int64_t d = 0; d < D; ++d) {
      A* row = static_cast<A*>(p.dweight.data) + (first_d + d) * p.C + first_c;
      for (int64_t c = 0; c < C; c += kLanes<A>) store_lanes<A>(row + c, load(dweight + d * padded_C + c), C - c < kLanes<A> ? C - c : kLanes<A>);
    }
    if (p.dbias.data && first_c == 0)
      for (int64_t d = 0; d < D; ++d) static_cast<A*>(p.dbias.data)[first_d + d] = static_cast<A>(dbias[d]);
  }
};

template <class A> int64_t linear_wgrad_scratch_as(const LinearWgradParams& p) {
  const int64_t D = round_up(p.block_d, kOutputs), C = round_up(p.block_c, kLanes<A>);
  const int64_t sizes[] = {D / kOutputs * kDyPanelSize<A>, ceil_div(C, kColumnPanel<A>) * kXPanelSize<A>, D * C, D};
  int64_t bytes = aligned_bytes(D * static_cast<int64_t>(sizeof(double)));
  for (int64_t size : sizes) bytes += aligned_bytes(size * static_cast<int64_t>(sizeof(A)));
  return bytes;
}
template <class A> void linear_wgrad_as(const LinearWgradParams& p, char* scratch, int64_t begin, int64_t end) {
  for (int64_t task = begin; task < end; ++task) {
    WeightBlock<A> block(p, task, scratch);
    for (int64_t row = 0; row < p.rows; row += kSteps) block.add_rows(row, p.rows - row < kSteps ? p.rows - row : kSteps);
    block.write_out();
  }
}

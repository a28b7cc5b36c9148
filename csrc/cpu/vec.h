// Vectors of one SIMD level, and loads and stores that convert to and from the accumulation type.
// Included once per level, inside its namespace (kernels_level.h): no include guard, no headers, no STL.

#define FC_INLINE inline __attribute__((always_inline))
#define FC_UNROLL _Pragma("GCC unroll 64")

constexpr int64_t kVectorBytes = FASTCONV_VECTOR_BYTES;
constexpr bool kManyRegisters = kVectorBytes == 64 || FASTCONV_REGISTERS >= 32;

typedef float FloatVec __attribute__((vector_size(FASTCONV_VECTOR_BYTES)));
typedef double DoubleVec __attribute__((vector_size(FASTCONV_VECTOR_BYTES)));
typedef float FloatVecU __attribute__((vector_size(FASTCONV_VECTOR_BYTES), aligned(4), may_alias));
typedef double DoubleVecU __attribute__((vector_size(FASTCONV_VECTOR_BYTES), aligned(8), may_alias));
typedef uint32_t U32Vec __attribute__((vector_size(FASTCONV_VECTOR_BYTES)));
typedef uint16_t U16Vec __attribute__((vector_size(FASTCONV_VECTOR_BYTES / 2)));
typedef uint16_t U16VecU __attribute__((vector_size(FASTCONV_VECTOR_BYTES / 2), aligned(2), may_alias));

template <class A> struct VecTraits;
template <> struct VecTraits<float> { using Vec = FloatVec; using Unaligned = FloatVecU; };
template <> struct VecTraits<double> { using Vec = DoubleVec; using Unaligned = DoubleVecU; };
template <class A> using Vec = typename VecTraits<A>::Vec;
template <class A> constexpr int64_t kLanes = kVectorBytes / static_cast<int64_t>(sizeof(A));

struct BFloat16 { uint16_t bits; };
struct Half { uint16_t bits; };

template <class A> FC_INLINE Vec<A> zero() { return Vec<A>{}; }
template <class A> FC_INLINE Vec<A> broadcast(A a) { return Vec<A>{} + a; }
// Scratch is aligned and in the accumulation type.
template <class A> FC_INLINE Vec<A> load(const A* p) { return *reinterpret_cast<const Vec<A>*>(p); }
template <class A> FC_INLINE void store(A* p, Vec<A> v) { *reinterpret_cast<Vec<A>*>(p) = v; }

// A fixed tree: the same bits for every caller.
template <class A> FC_INLINE A sum_lanes(Vec<A> v) {
  alignas(64) A lanes[kLanes<A>];
  store(lanes, v);
  for (int64_t half = kLanes<A> / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

// a and b hold sums in groups of kGroup lanes, an item a group; half of each group is added to the other half, the items
// stay in order. From single items on, all the way, kLanes vectors become the one of their sums.
template <class A, int kGroup, int... I> FC_INLINE Vec<A> add_halves(Vec<A> a, Vec<A> b, std::integer_sequence<int, I...>) {
  constexpr int kHalf = kGroup / 2;
  return __builtin_shufflevector(a, b, (I / kHalf * kGroup + I % kHalf)...) +
         __builtin_shufflevector(a, b, (I / kHalf * kGroup + I % kHalf + kHalf)...);
}
template <class A, int kGroup = kLanes<A>> FC_INLINE Vec<A> sum_each(const Vec<A>* v) {
  constexpr auto kIndices = std::make_integer_sequence<int, kLanes<A>>{};
  if constexpr (kGroup == 1) {
    return v[0];
  } else {
    Vec<A> half[kGroup / 2];
    FC_UNROLL for (int i = 0; i < kGroup / 2; ++i) half[i] = add_halves<A, kGroup>(v[2 * i], v[2 * i + 1], kIndices);
    return sum_each<A, kGroup / 2>(half);
  }
}

#if FASTCONV_VECTOR_BYTES == 64
FC_INLINE FloatVec half_to_float(const uint16_t* p) { return (FloatVec)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
FC_INLINE void float_to_half(uint16_t* p, FloatVec v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif FASTCONV_VECTOR_BYTES == 32
FC_INLINE FloatVec half_to_float(const uint16_t* p) { return (FloatVec)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
FC_INLINE void float_to_half(uint16_t* p, FloatVec v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
}
#else
// Half bits to float: shift exponent and mantissa into place and scale by 2^112, which also normalises subnormals.
FC_INLINE float half_bits_to_float(uint16_t h) {
  const uint32_t magnitude = static_cast<uint32_t>(h & 0x7FFF) << 13;
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16;
  if (magnitude >= 0x0F800000u) return __builtin_bit_cast(float, sign | 0x7F800000u | (magnitude & 0x007FFFFFu));  // Inf, NaN
  return __builtin_bit_cast(float, sign | __builtin_bit_cast(uint32_t, __builtin_bit_cast(float, magnitude) * 0x1p112f));
}
// Round to nearest even: subnormal results by an exact float addition, the others by integer arithmetic.
FC_INLINE uint16_t float_to_half_bits(float f) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, f), magnitude = bits & 0x7FFFFFFFu;
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
  if (magnitude > 0x7F800000u) return sign | 0x7E00;
  if (magnitude >= 0x477FF000u) return sign | 0x7C00;  // rounds to 65536 or more
  if (magnitude < 0x38800000u)
    return sign | static_cast<uint16_t>(__builtin_bit_cast(uint32_t, __builtin_bit_cast(float, magnitude) + 0.5f) - 0x3F000000u);
  return sign | static_cast<uint16_t>((magnitude - 0x38000000u + 0xFFFu + ((magnitude >> 13) & 1)) >> 13);
}
FC_INLINE FloatVec half_to_float(const uint16_t* p) {
  FloatVec v;
  for (int64_t i = 0; i < kLanes<float>; ++i) v[i] = half_bits_to_float(p[i]);
  return v;
}
FC_INLINE void float_to_half(uint16_t* p, FloatVec v) {
  for (int64_t i = 0; i < kLanes<float>; ++i) p[i] = float_to_half_bits(v[i]);
}
#endif

FC_INLINE FloatVec load_as(const float* p) { return *reinterpret_cast<const FloatVecU*>(p); }
FC_INLINE DoubleVec load_as(const double* p) { return *reinterpret_cast<const DoubleVecU*>(p); }
FC_INLINE FloatVec load_as(const BFloat16* p) {
  return (FloatVec)(__builtin_convertvector(*reinterpret_cast<const U16VecU*>(p), U32Vec) << 16);
}
FC_INLINE FloatVec load_as(const Half* p) { return half_to_float(reinterpret_cast<const uint16_t*>(p)); }

FC_INLINE void store_as(float* p, FloatVec v) { *reinterpret_cast<FloatVecU*>(p) = v; }
FC_INLINE void store_as(double* p, DoubleVec v) { *reinterpret_cast<DoubleVecU*>(p) = v; }
FC_INLINE void store_as(BFloat16* p, FloatVec v) {  // round to nearest even, NaN stays NaN
  const U32Vec bits = (U32Vec)v, is_nan = (U32Vec)(v != v);
  const U32Vec rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  *reinterpret_cast<U16VecU*>(p) = __builtin_convertvector((rounded & ~is_nan) | (0x7FC0 & is_nan), U16Vec);
}
FC_INLINE void store_as(Half* p, FloatVec v) { float_to_half(reinterpret_cast<uint16_t*>(p), v); }

#if FASTCONV_VECTOR_BYTES == 64
FC_INLINE __mmask16 first_lanes(int64_t lanes) { return static_cast<__mmask16>((1u << lanes) - 1); }
#endif

// The first `lanes` lanes only, the others zero: the tail of the channels.
template <class A, class T> FC_INLINE Vec<A> load_lanes(const T* p, int64_t lanes) {
  if (lanes == kLanes<A>) return load_as(p);
#if FASTCONV_VECTOR_BYTES == 64
  if constexpr (std::is_same_v<T, float>) return (FloatVec)_mm512_maskz_loadu_ps(first_lanes(lanes), p);
#endif
  T tail[kLanes<A>] = {};
  for (int64_t i = 0; i < lanes; ++i) tail[i] = p[i];
  return load_as(tail);
}
template <class A, class T> FC_INLINE void store_lanes(T* p, Vec<A> v, int64_t lanes) {
  if (lanes == kLanes<A>) return store_as(p, v);
#if FASTCONV_VECTOR_BYTES == 64
  if constexpr (std::is_same_v<T, float>) return _mm512_mask_storeu_ps(p, first_lanes(lanes), (__m512)v);
#endif
  T tail[kLanes<A>];
  store_as(tail, v);
  for (int64_t i = 0; i < lanes; ++i) p[i] = tail[i];
}

// Calls f with a null pointer of the element type of `dtype`; only the types that go with the accumulation type A.
template <class A, class F> FC_INLINE void with_type(DType dtype, F&& f) {
  if constexpr (sizeof(A) == 8) {
    f(static_cast<const double*>(nullptr));
  } else {
    if (dtype == DType::kFloat) f(static_cast<const float*>(nullptr));
    else if (dtype == DType::kBFloat16) f(static_cast<const BFloat16*>(nullptr));
    else f(static_cast<const Half*>(nullptr));
  }
}

FC_INLINE const char* at(Array a, int64_t element) { return static_cast<const char*>(a.data) + element * dtype_size(a.dtype); }
FC_INLINE char* at(MutableArray a, int64_t element) { return static_cast<char*>(a.data) + element * dtype_size(a.dtype); }

// `count` elements from `begin` on in the accumulation type: the array itself where it has that type, else converted.
template <class A> const A* read(Array a, int64_t begin, int64_t count, A* scratch) {
  if (dtype_size(a.dtype) == sizeof(A)) return reinterpret_cast<const A*>(at(a, begin));
  with_type<A>(a.dtype, [&](auto* type) __attribute__((always_inline)) {
    using T = std::remove_cv_t<std::remove_pointer_t<decltype(type)>>;
    const T* p = reinterpret_cast<const T*>(at(a, begin));
    for (int64_t i = 0; i < count; i += kLanes<A>) {
      const int64_t lanes = count - i < kLanes<A> ? count - i : kLanes<A>;
      store_lanes<A>(scratch + i, load_lanes<A>(p + i, lanes), lanes);
    }
  });
  return scratch;
}
template <class A> void write(MutableArray a, int64_t begin, int64_t count, const A* values) {
  with_type<A>(a.dtype, [&](auto* type) __attribute__((always_inline)) {
    using T = std::remove_cv_t<std::remove_pointer_t<decltype(type)>>;
    T* p = reinterpret_cast<T*>(at(a, begin));
    for (int64_t i = 0; i < count; i += kLanes<A>) {
      const int64_t lanes = count - i < kLanes<A> ? count - i : kLanes<A>;
      store_lanes<A>(p + i, load_lanes<A>(values + i, lanes), lanes);
    }
  });
}

FC_INLINE void prefetch(const void* p) { __builtin_prefetch(p); }
FC_INLINE void prefetch_l2(const void* p) { __builtin_prefetch(p, 0, 2); }
FC_INLINE void prefetch_for_write(const void* p) { __builtin_prefetch(p, 1); }

// Pieces of a thread's scratch, each on a cache line of its own.
FC_INLINE int64_t aligned_bytes(int64_t bytes) { return round_up(bytes, 64); }
template <class T> FC_INLINE T* carve(char*& scratch, int64_t count) {
  T* p = reinterpret_cast<T*>(scratch);
  scratch += aligned_bytes(count * static_cast<int64_t>(sizeof(T)));
  return p;
}

// Arrays whose dtype is known at run time, read and written in float32. The switch is the same for the whole grid.
#pragma once

#include "params.h"
#include "portable.cuh"

namespace fastconv::cuda {

// N elements as they lie in memory, in one access: 8 of 16 bits, 4, or 1. Neighbouring lanes then read side by side, so
// that an access of a warp takes no more sectors than it has bytes for. Loading is apart from converting, so that several
// loads are in flight before the first is waited for.
template <int N> struct Raw { Vec<uint32_t, 4> words; };
template <> struct Raw<1> { Vec<uint32_t, 1> words; };

template <int N> FC_DEVICE Raw<N> load_raw(const Array& a, int64_t offset, bool in = true) {
  static_assert(N == 8 || N == 4 || N == 1);
  const bool wide = N != 8 && a.dtype == DType::kFloat;
  const char* p = static_cast<const char*>(a.data) + (wide ? 4 : 2) * offset;
  if constexpr (N == 8) {
    return {load_global<Vec<uint32_t, 4>>(p, in)};
  } else if constexpr (N == 4) {
    if (wide) return {load_global<Vec<uint32_t, 4>>(p, in)};
    const auto halves = load_global<Vec<uint32_t, 2>>(p, in);
    return {{halves[0], halves[1], 0, 0}};
  } else {
    return {{load_global<uint32_t>(p, in && wide) | load_global<uint16_t>(p, in && !wide)}};
  }
}

template <class T, int N> FC_DEVICE Vec<float, N> halves_to_float(const Raw<N>& raw) {
  Vec<float, N> v;
#pragma unroll
  for (int i = 0; i < N; ++i) v[i] = to_float(T{static_cast<uint16_t>(raw.words[i / 2] >> 16 * (i % 2))});
  return v;
}

template <int N> FC_DEVICE Vec<float, N> to_float(const Raw<N>& raw, DType dtype) {
  if (dtype == DType::kBFloat16) return halves_to_float<bf16>(raw);
  if constexpr (N < 8) {
    if (dtype == DType::kFloat) {
      Vec<float, N> v;
#pragma unroll
      for (int i = 0; i < N; ++i) v[i] = bits_float(raw.words[i]);
      return v;
    }
  }
  return halves_to_float<fp16>(raw);
}

// N elements from `offset` on, whatever their dtype; zeros, and no access, where `in` is false.
template <int N> FC_DEVICE Vec<float, N> load_array(const Array& a, int64_t offset, bool in = true) {
  if constexpr (N == 8) {
    if (a.dtype == DType::kFloat) {
      const float* p = static_cast<const float*>(a.data) + offset;
      const auto low = load_global<Vec<float, 4>>(p, in), high = load_global<Vec<float, 4>>(p + 4, in);
      return {low[0], low[1], low[2], low[3], high[0], high[1], high[2], high[3]};
    }
  }
  return to_float(load_raw<N>(a, offset, in), a.dtype);
}

template <int N> FC_DEVICE void store_array(const MutableArray& a, int64_t offset, const Vec<float, N>& v, bool in = true) {
  if (a.dtype == DType::kBFloat16) {
    store_global(static_cast<bf16*>(a.data) + offset, from_float<bf16>(v), in);
  } else if (a.dtype == DType::kHalf) {
    store_global(static_cast<fp16*>(a.data) + offset, from_float<fp16>(v), in);
  } else {
    constexpr int kPart = N < 4 ? N : 4;
    float* p = static_cast<float*>(a.data) + offset;
#pragma unroll
    for (int i = 0; i < N; i += kPart) {
      Vec<float, kPart> part;
#pragma unroll
      for (int j = 0; j < kPart; ++j) part[j] = v[i + j];
      store_global(p + i, part, in);
    }
  }
}

// Whether rows of C elements of every array can be read 8 at a time. Arrays without data do not matter.
template <class... Arrays> bool in_vectors(int64_t C, const Arrays&... arrays) {
  return C % 8 == 0 && ((reinterpret_cast<uintptr_t>(arrays.data) % 16 == 0) && ...);
}

// How many elements of every array load_raw and store_array can move at a time.
template <class... Arrays> int vector_width(int64_t C, const Arrays&... arrays) {
  if (!in_vectors(C, arrays...)) return 1;
  return ((arrays.data && arrays.dtype == DType::kFloat) || ...) ? 4 : 8;
}

}  // namespace fastconv::cuda

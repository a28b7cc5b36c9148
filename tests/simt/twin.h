// The names of csrc/cuda/portable.cuh on the simulator; included by it, in its place between #else and #endif. Compiled
// with the sanitizer that the kernels get, so that it sees every access here. `site`: where the kernel stands.
#pragma once

#include <bit>
#include <cmath>
#include <cstring>

#include "simt.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define threadIdx (::simt::here.thread)
#define blockIdx (::simt::here.block)
#define blockDim (::simt::here.block_size)
#define gridDim (::simt::here.grid)
#define FC_SHARED(T, name, count) T* const name = static_cast<T*>(::simt::shared(sizeof(T) * (count), ::simt::Site::current()))
#define FC_DYNAMIC_SHARED(name) unsigned char* const name = static_cast<unsigned char*>(::simt::dynamic_shared())

struct CUstream_st;
using cudaStream_t = CUstream_st*;

namespace fastconv::cuda {

using simt::Site;
using simt::Space;
using simt::Use;

inline void sync_threads(Site site = Site::current()) { simt::sync_threads(site); }
inline void sync_cluster(Site site = Site::current()) { simt::sync_cluster(site); }
inline void sync_warp(Site site = Site::current()) { simt::sync_warp(site); }

inline uint32_t byte_permute(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = a | static_cast<uint64_t>(b) << 32;
  uint32_t picked = 0;
  for (unsigned i = 0; i < 4; ++i) picked |= static_cast<uint32_t>(bytes >> (selector >> 4 * i & 7) * 8 & 0xFF) << 8 * i;
  return picked;
}
inline uint32_t float_bits(float v) { return std::bit_cast<uint32_t>(v); }
inline float bits_float(uint32_t v) { return std::bit_cast<float>(v); }
inline float to_float(float v) { return v; }
inline float to_float(bf16 v) { return bits_float(static_cast<uint32_t>(v.bits) << 16); }
inline float to_float(fp16 v) { return static_cast<float>(std::bit_cast<_Float16>(v.bits)); }
template <class T> T from_float(float v);
template <> inline float from_float<float>(float v) { return v; }
template <> inline bf16 from_float<bf16>(float v) {
  const uint32_t bits = float_bits(v);
  return {static_cast<uint16_t>(v != v ? 0x7FFF : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}
template <> inline fp16 from_float<fp16>(float v) { return {std::bit_cast<uint16_t>(static_cast<_Float16>(v))}; }
template <class T> uint32_t from_floats(float low, float high) { return pack(from_float<T>(low).bits, from_float<T>(high).bits); }
inline uint32_t to_tf32(float v) {
  const uint32_t bits = float_bits(v);
  return std::isfinite(v) ? (bits + 0x1000) & ~0x1FFFu : bits;  // ties away from zero
}
inline float rsqrt(float v) { return 1 / std::sqrt(v); }
inline float flushed(float v) { return std::abs(v) < 0x1p-126f ? std::copysign(0.0f, v) : v; }
inline float exp2(float v) { return flushed(std::exp2(flushed(v))); }
inline float log2(float v) { return std::log2(flushed(v)); }
inline float reciprocal(float v) { return flushed(1 / flushed(v)); }

template <class V> V load_word(Space space, const void* p, bool in, Site site) {
  simt::access(space, Use::read, p, sizeof(V), in, site);
  V v{};
  if (in) __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <class V> void store_word(Space space, void* p, const V& v, bool in, Site site) {
  simt::access(space, Use::write, p, sizeof(V), in, site);
  if (in) __builtin_memcpy(p, &v, sizeof v);
}
template <class V, class T> V load_global(const T* p, bool in = true, Site site = Site::current()) {
  return load_word<V>(Space::global, p, in, site);
}
template <class V, class T> V load_shared(const T* p, bool in = true, Site site = Site::current()) {
  return load_word<V>(Space::shared, p, in, site);
}
template <class V, class T> void store_global(T* p, const V& v, bool in = true, Site site = Site::current()) {
  store_word(Space::global, p, v, in, site);
}
template <class V, class T> void store_shared(T* p, const V& v, bool in = true, Site site = Site::current()) {
  store_word(Space::shared, p, v, in, site);
}

inline float load_cluster(const float* p, int rank, Site site = Site::current()) {
  return *static_cast<const float*>(simt::of_block(p, sizeof *p, rank, site));
}

// Ordered, which on the GPU takes a thread_fence: TSan knows atomics, and no fences.
inline unsigned atomic_add(unsigned* p, unsigned v) { return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST); }
inline int atomic_add(int* p, int v) { return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST); }
inline float atomic_add(float* p, float v) {
  uint32_t* word = reinterpret_cast<uint32_t*>(p);
  uint32_t before = __atomic_load_n(word, __ATOMIC_SEQ_CST);
  while (!__atomic_compare_exchange_n(word, &before, float_bits(bits_float(before) + v), false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {}
  return bits_float(before);
}
inline void thread_fence() {}

template <int kBytes> void copy_async(void* shared, const void* global, bool in = true, Site site = Site::current()) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  simt::copy_async(shared, global, kBytes, in, site);
  // The source may be read from now on, the destination written: whoever reads that before the wait gets NaN.
  const auto* source = static_cast<const volatile unsigned char*>(global);
  if (in) (void)source[0], (void)source[kBytes - 1];
  std::memset(shared, 0xFF, kBytes);
}
inline void copy_async_commit() { simt::copy_async_commit(); }
template <int kPending> void copy_async_wait() { simt::copy_async_wait(kPending); }

template <bool kTrans = false, int kCount>
void ldmatrix(uint32_t (&fragment)[kCount], const void* row, Site site = Site::current()) {
  static_assert(kCount == 1 || kCount == 2 || kCount == 4);
  const unsigned lane = simt::lane();
  simt::access(Space::shared, Use::read, row, 16, lane < 8 * kCount, site);
  simt::count_ldmatrix();
  const simt::Lanes* lanes = simt::exchange("ldmatrix", &row, sizeof row, site);
  for (unsigned i = 0; i < kCount; ++i) {
    uint16_t pair[2];
    for (unsigned j = 0; j < 2; ++j) {
      const unsigned along = lane / 4, across = lane % 4 * 2 + j;
      const uint16_t* p;
      simt::peek(lanes, 8 * i + (kTrans ? across : along), &p, sizeof p);
      pair[j] = p[kTrans ? along : across];
    }
    fragment[i] = pack(pair[0], pair[1]);
  }
}

// d[16 x 8] += a[16 x K] b[K x 8], K = 4 kWide kBlocks, over the registers of the lanes: register i of a holds kWide
// neighbouring columns (of b: rows), row g + 8 (i % 2) of column block i / 2. Products and their sum in double.
template <int kWide, int kBlocks, class Value>
void mma(const char* what, float (&d)[4], const uint32_t (&a)[2 * kBlocks], const uint32_t (&b)[kBlocks], Value value, Site site) {
  struct Operands {
    uint32_t a[2 * kBlocks], b[kBlocks];
  } mine;
  std::copy(a, a + 2 * kBlocks, mine.a);
  std::copy(b, b + kBlocks, mine.b);
  simt::count_mma(16 * 8 * 4 * kWide * kBlocks);
  const simt::Lanes* lanes = simt::exchange(what, &mine, sizeof mine, site);
  const unsigned g = simt::lane() / 4, t = simt::lane() % 4;
  Operands rows[4], columns[2][4];  // by t of the lane that holds them
  for (unsigned k = 0; k < 4; ++k) {
    simt::peek(lanes, g * 4 + k, &rows[k], sizeof(Operands));
    for (unsigned n = 0; n < 2; ++n) simt::peek(lanes, (2 * t + n) * 4 + k, &columns[n][k], sizeof(Operands));
  }
  for (unsigned i = 0; i < 4; ++i) {
    double sum = d[i];
    for (unsigned block = 0; block < kBlocks; ++block)
      for (unsigned k = 0; k < 4; ++k)
        for (unsigned e = 0; e < kWide; ++e)
          sum += double{value(rows[k].a[i / 2 + 2 * block], e)} * value(columns[i % 2][k].b[block], e);
    d[i] = static_cast<float>(sum);
  }
}
template <class T> void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site site = Site::current()) {
  mma<2, 2>("mma_m16n8k16", d, a, b, [](uint32_t word, unsigned e) { return to_float(T{static_cast<uint16_t>(word >> 16 * e)}); }, site);
}
template <class T> void mma_m16n8k8(float (&d)[4], const uint32_t (&a)[2], uint32_t b, Site site = Site::current()) {
  const auto value = [](uint32_t word, unsigned e) { return to_float(T{static_cast<uint16_t>(word >> 16 * e)}); };
  mma<2, 1>("mma_m16n8k8", d, a, {b}, value, site);
}
inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site site = Site::current()) {
  mma<1, 2>("mma_m16n8k8_tf32", d, a, b, [](uint32_t word, unsigned) { return bits_float(word & ~0x1FFFu); }, site);
}

template <class T> T shuffle_from(const char* what, T v, unsigned lane, Site site) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  simt::peek(simt::exchange(what, &v, sizeof v, site), lane, &v, sizeof v);
  return v;
}
template <class T> T shuffle_xor(T v, int lanes, Site site = Site::current()) {
  return shuffle_from("shuffle_xor", v, (simt::lane() ^ lanes) % kWarp, site);
}
template <class T> T shuffle_down(T v, int delta, Site site = Site::current()) {
  const unsigned from = simt::lane() + delta;
  return shuffle_from("shuffle_down", v, from < kWarp ? from : simt::lane(), site);
}
template <class T> T shuffle(T v, int lane, Site site = Site::current()) { return shuffle_from("shuffle", v, lane & (kWarp - 1), site); }

inline bool warp_any(bool v, Site site = Site::current()) {
  const simt::Lanes* lanes = simt::exchange("warp_any", &v, sizeof v, site);
  bool any = false;
  for (unsigned lane = 0; lane < kWarp; ++lane) simt::peek(lanes, lane, &v, sizeof v), any |= v;
  return any;
}

inline int64_t shared_memory_limit() { return simt::config.shared_limit; }

template <class... P, class... A>
int launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t, A&&... args) {
  return simt::launch(grid, block, shared_bytes, [&] { kernel(static_cast<P>(args)...); });
}
template <class... P> int clusters_that_fit(void (*)(P...), unsigned blocks, dim3, size_t) { return blocks <= simt::config.cluster; }
template <class... P, class... A>
int launch_clusters(void (*kernel)(P...), unsigned blocks, dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t, A&&... args) {
  return simt::launch(grid, block, shared_bytes, [&] { kernel(static_cast<P>(args)...); }, blocks);
}

}  // namespace fastconv::cuda

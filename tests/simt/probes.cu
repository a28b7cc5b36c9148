// Small kernels that the engine's own tests run; each launcher is called through ctypes and returns the error code.
#include "geometry.h"
#include "portable.cuh"
#include "residual_scale_kernel.h"

#define PROBE extern "C" __attribute__((visibility("default")))

namespace fastconv::cuda {
namespace {

constexpr int kThreads = 64;

// --- values

// out[i] = in[kThreads - 1 - i] through shared memory.
__global__ void reverse_kernel(const float* in, float* out, bool barrier) {
  FC_SHARED(float, tile, kThreads);
  store_shared(tile + threadIdx.x, load_global<float>(in + threadIdx.x));
  if (barrier) sync_threads();
  store_global(out + threadIdx.x, load_shared<float>(tile + kThreads - 1 - threadIdx.x));
}

// The same within a warp, which has no lock step either.
__global__ void reverse_warp_kernel(const float* in, float* out, bool barrier) {
  FC_SHARED(float, tile, kWarp);
  store_shared(tile + threadIdx.x, load_global<float>(in + threadIdx.x));
  if (barrier) sync_warp();
  store_global(out + threadIdx.x, load_shared<float>(tile + kWarp - 1 - threadIdx.x));
}

__global__ void shuffles_kernel(const float* in, float* out) {
  const float v = load_global<float>(in + threadIdx.x);
  store_global(out + threadIdx.x, shuffle_xor(v, 5));
  store_global(out + 32 + threadIdx.x, shuffle_down(v, 3));
  store_global(out + 64 + threadIdx.x, shuffle(v, 7));
  store_global(out + 96 + threadIdx.x, warp_sum(v));
}

// Whether any lane holds a 1, for each bit of in; then the bytes of in and of the next lane's, picked in each order of four.
__global__ void words_kernel(const uint32_t* in, uint32_t* out) {
  const uint32_t v = load_global<uint32_t>(in + threadIdx.x), other = shuffle_down(v, 1);
  uint32_t any = 0;
  for (int bit = 0; bit < 32; ++bit) any |= static_cast<uint32_t>(warp_any(v >> bit & 1)) << bit;
  store_global(out + threadIdx.x, any);
  for (uint32_t i = 0; i < 1 << 12; ++i)
    store_global(out + (i + 1) * kWarp + threadIdx.x, byte_permute(v, other, (i & 7) | (i >> 3 & 7) << 4 | (i >> 6 & 7) << 8 | i >> 9 << 12));
}

// Fresh shared memory, static and dynamic.
__global__ void fresh_kernel(float* out) {
  FC_SHARED(float, tile, kWarp);
  FC_DYNAMIC_SHARED(raw);
  store_global(out + threadIdx.x, load_shared<float>(tile + threadIdx.x));
  store_global(out + kWarp + threadIdx.x, load_shared<float>(raw + 4 * threadIdx.x));
}

// Two groups of copies: out = what shared memory holds before any wait, after the first, after both; the odd copies of the
// second group are zero-filled.
__global__ void copies_kernel(const float* in, float* out) {
  FC_SHARED(float, tile, 2 * 4 * kWarp);
  const int i = 4 * threadIdx.x;
  copy_async<16>(tile + i, in + i);
  copy_async_commit();
  copy_async<16>(tile + 128 + i, in + 128 + i, threadIdx.x % 2 == 0);
  copy_async_commit();
  for (int step = 0; step < 3; ++step) {
    if (step == 1) copy_async_wait<1>();
    if (step == 2) copy_async_wait<0>();
    store_global(out + step * 256 + i, load_shared<Vec<float, 4>>(tile + i));
    store_global(out + step * 256 + 128 + i, load_shared<Vec<float, 4>>(tile + 128 + i));
  }
}
__global__ void small_copies_kernel(const float* in, float* out) {
  FC_SHARED(float, tile, 3 * kWarp);
  copy_async<4>(tile + threadIdx.x, in + threadIdx.x, threadIdx.x != 3);
  copy_async<8>(tile + kWarp + 2 * threadIdx.x, in + kWarp + 2 * threadIdx.x, threadIdx.x != 5);
  copy_async_commit();
  copy_async_wait<0>();
  store_global(out + threadIdx.x, load_shared<float>(tile + threadIdx.x));
  store_global(out + kWarp + 2 * threadIdx.x, load_shared<Vec<float, 2>>(tile + kWarp + 2 * threadIdx.x));
}
__global__ void unwaited_kernel(const float* in, float* out) {
  FC_SHARED(float, tile, kWarp);
  copy_async<4>(tile + threadIdx.x, in + threadIdx.x);
  copy_async_commit();
  store_global(out + threadIdx.x, 1.0f);
}

// c[16 x 8] = a[16 x 16] b[16 x 8], all by rows in memory: b's fragments come transposed.
template <class T> __global__ void mma_kernel(const T* a, const T* b, float* c, bool by_address, bool halves) {
  FC_SHARED(T, left, 16 * 16);
  FC_SHARED(T, right, 16 * 8);
  const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
  store_shared(left + 8 * lane, load_global<Vec<T, 8>>(a + 8 * lane));
  store_shared(right + 4 * lane, load_global<Vec<T, 4>>(b + 4 * lane));
  sync_warp();
  uint32_t af[4], bf[2];
  float d[4] = {};
  if (by_address) {
    ldmatrix(af, left + lane % 16 * 16 + lane / 16 * 8);
    ldmatrix<true>(bf, right + lane % 16 * 8);
  } else {  // the layout in words, as portable.cuh states it
    for (int i = 0; i < 4; ++i) af[i] = load_shared<uint32_t>(left + (g + i % 2 * 8) * 16 + 2 * t + i / 2 * 8);
    for (int i = 0; i < 2; ++i) {
      const T *row = right + (2 * t + 8 * i) * 8 + g, *next = row + 8;
      bf[i] = pack(load_shared<T>(row).bits, load_shared<T>(next).bits);
    }
  }
  if (halves) {
    mma_m16n8k8<T>(d, {af[0], af[1]}, bf[0]);
    mma_m16n8k8<T>(d, {af[2], af[3]}, bf[1]);
  } else {
    mma_m16n8k16<T>(d, af, bf);
  }
  for (int i = 0; i < 4; ++i) store_global(c + (g + i / 2 * 8) * 8 + 2 * t + i % 2, d[i]);
}
// c[16 x 8] = a[16 x 8] b[8 x 8] in tf32.
__global__ void mma_tf32_kernel(const float* a, const float* b, float* c) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  uint32_t af[4], bf[2];
  float d[4] = {};
  for (int i = 0; i < 4; ++i) af[i] = to_tf32(load_global<float>(a + (g + i % 2 * 8) * 8 + t + i / 2 * 4));
  for (int i = 0; i < 2; ++i) bf[i] = to_tf32(load_global<float>(b + (t + 4 * i) * 8 + g));
  mma_m16n8k8_tf32(d, af, bf);
  for (int i = 0; i < 4; ++i) store_global(c + (g + i / 2 * 8) * 8 + 2 * t + i % 2, d[i]);
}
// Fragments of the matrices in[4][8][8], plain and transposed, one value a word: out[2][7][32][2] for x1, x2 and x4.
template <bool kTrans> FC_DEVICE void fragments(const uint16_t* tile, uint32_t* out) {
  const int lane = threadIdx.x;
  uint32_t one[1], two[2], four[4], all[7];
  ldmatrix<kTrans>(one, tile + lane % 8 * 8);
  ldmatrix<kTrans>(two, tile + lane % 16 * 8);
  ldmatrix<kTrans>(four, tile + lane * 8);
  all[0] = one[0], all[1] = two[0], all[2] = two[1];
  for (int i = 0; i < 4; ++i) all[3 + i] = four[i];
  for (int i = 0; i < 7; ++i) store_global(out + (i * 32 + lane) * 2, Vec<uint32_t, 2>{{all[i] & 0xFFFF, all[i] >> 16}});
}
__global__ void ldmatrix_kernel(const uint16_t* in, uint32_t* out) {
  FC_SHARED(uint16_t, tile, 4 * 64);
  store_shared(tile + 8 * threadIdx.x, load_global<Vec<uint16_t, 8>>(in + 8 * threadIdx.x));
  sync_warp();
  fragments<false>(tile, out);
  fragments<true>(tile, out + 7 * 64);
}

// out[0..n) bfloat16, [n..2n) float16, each way of rounding; then back to float.
__global__ void conversions_kernel(const float* in, uint16_t* out, float* back, int n) {
  for (int i = threadIdx.x; i < n; i += kWarp) {
    const float v = load_global<float>(in + i);
    store_global(out + i, from_float<bf16>(v));
    store_global(out + n + i, from_float<fp16>(v));
    store_global(back + i, to_float(from_float<bf16>(v)));
    store_global(back + n + i, to_float(from_float<fp16>(v)));
    store_global(back + 2 * n + i, bits_float(to_tf32(v)));
  }
}

// --- orders and faults

// What each thread saw of a counter without atomics: the order in which the threads ran.
__global__ void order_kernel(int* ticket, int* order) {
  store_global(order + threadIdx.x, atomic_add(ticket, 1));
  sync_threads();
  store_global(order + blockDim.x + threadIdx.x, atomic_add(ticket, 1));
}
// The block index as threads see it, and the sizes.
__global__ void where_kernel(int* out) {
  const int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  store_global(out + block * static_cast<int>(blockDim.x * blockDim.y * blockDim.z) + thread, block * 1000 + thread);
}
__global__ void divergent_kernel(float* out) {
  if (threadIdx.x < 32) {
    sync_threads();
  } else {
    sync_threads();
  }
  store_global(out + threadIdx.x, 1.0f);
}
__global__ void deadlock_kernel(float* out) {
  float v = 1;
  if (threadIdx.x < 32) sync_threads();
  else if (threadIdx.x < 48) v = shuffle_xor(v, 1);
  store_global(out + threadIdx.x, v);
}
__global__ void exited_kernel(float* out) {
  if (threadIdx.x == 9) return;
  store_global(out + threadIdx.x, shuffle_xor(1.0f, 1));
}
__global__ void early_exit_kernel(float* out) {
  if (threadIdx.x >= 40) return;
  sync_threads();
  store_global(out + threadIdx.x, 1.0f);
}
enum class Wrong : int { overrun, underrun, misaligned, shared_as_global, global_as_shared, global_overrun };
__global__ void wrong_kernel(float* out, Wrong wrong) {
  FC_SHARED(float, tile, kWarp);
  store_shared(tile + threadIdx.x, 1.0f);
  const int i = threadIdx.x;
  if (wrong == Wrong::overrun) store_shared(tile + i + 1, 2.0f);
  if (wrong == Wrong::underrun) store_shared(tile + i - 1, 2.0f);
  if (wrong == Wrong::misaligned) store_global(out + i, load_shared<Vec<float, 4>>(tile + (i & 1))[0]);
  if (wrong == Wrong::shared_as_global) store_global(out + i, load_global<float>(tile + i));
  if (wrong == Wrong::global_as_shared) store_shared(out + i, 1.0f);
  if (wrong == Wrong::global_overrun) store_global(out + i + 1, 1.0f);
}
__global__ void limit_kernel(float* out) {
  FC_SHARED(float, tile, 1024);
  store_shared(tile + threadIdx.x, 1.0f);
  store_global(out + threadIdx.x, load_shared<float>(tile + threadIdx.x));
}
// Every block adds to the same sums, with or without an atomic. The barriers order nothing between blocks.
__global__ void one_address_kernel(float* out, bool atomic) {
  float* p = out + threadIdx.x;
  sync_threads();
  if (atomic) atomic_add(p, 1.0f);
  else store_global(p, load_global<float>(p) + 1);
  sync_threads();
}
// Writes a second value where slower threads may still read the first, unless a barrier keeps them apart.
__global__ void overwrite_kernel(const float* in, float* out, bool barrier) {
  FC_SHARED(float, tile, kThreads);
  store_shared(tile + threadIdx.x, load_global<float>(in + threadIdx.x));
  sync_threads();
  store_global(out + threadIdx.x, load_shared<float>(tile + kThreads - 1 - threadIdx.x));
  if (barrier) sync_threads();
  store_shared(tile + threadIdx.x, 100.0f);
}

// --- patterns that are counted by hand in test_simt_engine.py

__global__ void strided_kernel(const float* in, float* out, int stride) {
  store_global(out + threadIdx.x, load_global<float>(in + static_cast<int64_t>(threadIdx.x) * stride));
}
__global__ void halo_kernel(const bf16* in, bf16* out, int n) {  // out[i] = in[i + 1], 8 at a time, with the neighbour's first
  for (int i = threadIdx.x * 8; i < n; i += kWarp * 8) {
    Vec<bf16, 8> v = load_global<Vec<bf16, 8>>(in + i);
    const bf16 next = load_global<bf16>(in + i + 8, i + 8 < n);
    for (int j = 0; j < 7; ++j) v[j] = v[j + 1];
    v[7] = next;
    store_global(out + i, v);
  }
}
// A transpose through shared memory of rows of `pitch` words: pitch 32 conflicts 32 ways, 33 not at all; then 16-byte reads.
__global__ void conflict_kernel(float* out, int pitch) {
  FC_DYNAMIC_SHARED(raw);
  float* tile = reinterpret_cast<float*>(raw);
  for (int row = 0; row < 32; ++row) store_shared(tile + row * pitch + threadIdx.x, 1.0f);
  sync_warp();
  float sum = 0;
  for (int column = 0; column < 32; ++column) sum += load_shared<float>(tile + static_cast<int>(threadIdx.x) * pitch + column);
  const Vec<float, 4> four = load_shared<Vec<float, 4>>(raw + 16 * threadIdx.x);
  const Vec<float, 4> apart = load_shared<Vec<float, 4>>(raw + 128 * (threadIdx.x % 8));
  store_global(out + threadIdx.x, sum + four[0] + apart[0]);
}

// --- what only the comparison with a GPU runs (tests/gpu/probes.py)

// Every pattern of 16 bits as bfloat16, then as float16, to float.
__global__ void widen_kernel(float* out) {
  for (int i = threadIdx.x; i < 1 << 16; i += kWarp) {
    store_global(out + i, to_float(bf16{static_cast<uint16_t>(i)}));
    store_global(out + (1 << 16) + i, to_float(fp16{static_cast<uint16_t>(i)}));
  }
}
// Of a and b: both in bfloat16, both in float16; a's bits, its inverse root, its root, a b + a in one rounding, 2^a, 1 / a, log2 of a.
__global__ void arithmetic_kernel(const float* a, const float* b, uint32_t* pairs, float* out, int n) {
  for (int i = threadIdx.x; i < n; i += kWarp) {
    const float v = load_global<float>(a + i), w = load_global<float>(b + i);
    store_global(pairs + i, from_floats<bf16>(v, w));
    store_global(pairs + n + i, from_floats<fp16>(v, w));
    store_global(pairs + 2 * n + i, float_bits(v));
    store_global(out + i, rsqrt(v));
    store_global(out + n + i, sqrtf(v));
    store_global(out + 2 * n + i, fmaf(v, w, v));
    store_global(out + 3 * n + i, exp2(v));
    store_global(out + 4 * n + i, reciprocal(v));
    store_global(out + 5 * n + i, log2(v));
  }
}
__global__ void wide_shuffles_kernel(const double* in, double* out) {
  const double v = load_global<double>(in + threadIdx.x);
  store_global(out + threadIdx.x, shuffle_xor(v, 9));
  store_global(out + 32 + threadIdx.x, shuffle_down(v, 11));
  store_global(out + 64 + threadIdx.x, shuffle(v, 30));
}
// A warp's values of V to shared memory and back from the other end, each access without some of the lanes.
template <class V> FC_DEVICE void carry(const unsigned char* in, unsigned char* out, unsigned char* tile) {
  const int i = threadIdx.x, size = sizeof(V);
  store_shared(tile + size * i, V{});
  store_shared(tile + size * i, load_global<V>(in + size * i, i % 3 != 0), i % 5 != 0);
  sync_warp();
  store_global(out + size * i, load_shared<V>(tile + size * (kWarp - 1 - i), i % 7 != 0), i % 11 != 0);
  sync_warp();
}
__global__ void widths_kernel(const unsigned char* in, unsigned char* out) {  // [30 x 32] bytes: of 2, 4, 8 and 16 a lane
  FC_SHARED(unsigned char, tile, 16 * kWarp);
  carry<uint16_t>(in, out, tile);
  carry<uint32_t>(in + 2 * kWarp, out + 2 * kWarp, tile);
  carry<Vec<uint32_t, 2>>(in + 6 * kWarp, out + 6 * kWarp, tile);
  carry<Vec<uint32_t, 4>>(in + 14 * kWarp, out + 14 * kWarp, tile);
}
// The sum of each block, then by the block that draws the last ticket the sum of those.
__global__ void last_block_kernel(const float* in, float* partial, unsigned* ticket, float* out) {
  FC_SHARED(unsigned, drawn, 1);
  const float sum = warp_sum(load_global<float>(in + blockIdx.x * kWarp + threadIdx.x));
  if (threadIdx.x == 0) {
    store_global(partial + blockIdx.x, sum);
    thread_fence();
    store_shared(drawn, atomic_add(ticket, 1u));
    thread_fence();
  }
  sync_threads();
  if (load_shared<unsigned>(drawn) + 1 != gridDim.x || threadIdx.x != 0) return;
  float total = 0;
  for (unsigned i = 0; i < gridDim.x; ++i) total += load_global<float>(partial + i);
  store_global(out, total);
}
// All of the dynamic shared memory, read from the other end.
__global__ void dynamic_kernel(const uint32_t* in, uint32_t* out, int words) {
  FC_DYNAMIC_SHARED(raw);
  for (int i = threadIdx.x; i < words; i += blockDim.x) store_shared(raw + 4 * i, load_global<uint32_t>(in + i));
  sync_threads();
  for (int i = threadIdx.x; i < words; i += blockDim.x) store_global(out + i, load_shared<uint32_t>(raw + 4 * (words - 1 - i)));
}

int run(void (*kernel)(const float*, float*, bool), int threads, const void* in, void* out, bool barrier) {
  return launch(kernel, dim3(1), dim3(threads), 0, nullptr, static_cast<const float*>(in), static_cast<float*>(out), barrier);
}

}  // namespace
}  // namespace fastconv::cuda

using namespace fastconv::cuda;

#define FLOATS(p) static_cast<float*>(p)
PROBE int probe_reverse(const void* in, void* out, int barrier) { return run(reverse_kernel, kThreads, in, out, barrier); }
PROBE int probe_reverse_warp(const void* in, void* out, int barrier) { return run(reverse_warp_kernel, kWarp, in, out, barrier); }
PROBE int probe_overwrite(const void* in, void* out, int barrier) { return run(overwrite_kernel, kThreads, in, out, barrier); }
PROBE int probe_shuffles(void* in, void* out) { return launch(shuffles_kernel, 1, kWarp, 0, nullptr, FLOATS(in), FLOATS(out)); }
#define WORDS(p) static_cast<uint32_t*>(p)
PROBE int probe_words(void* in, void* out) { return launch(words_kernel, 1, kWarp, 0, nullptr, WORDS(in), WORDS(out)); }
PROBE int probe_fresh(void* out) { return launch(fresh_kernel, 1, kWarp, 4 * kWarp, nullptr, FLOATS(out)); }
PROBE int probe_copies(void* in, void* out) { return launch(copies_kernel, 1, kWarp, 0, nullptr, FLOATS(in), FLOATS(out)); }
PROBE int probe_small_copies(void* in, void* out) { return launch(small_copies_kernel, 1, kWarp, 0, nullptr, FLOATS(in), FLOATS(out)); }
PROBE int probe_unwaited(void* in, void* out) { return launch(unwaited_kernel, 1, kWarp, 0, nullptr, FLOATS(in), FLOATS(out)); }
template <class T> int launch_mma(void* a, void* b, void* c, int by_address, int halves) {
  return launch(mma_kernel<T>, 1, kWarp, 0, nullptr, static_cast<T*>(a), static_cast<T*>(b), FLOATS(c), by_address != 0, halves != 0);
}
PROBE int probe_mma_bf16(void* a, void* b, void* c, int by_address, int halves) { return launch_mma<bf16>(a, b, c, by_address, halves); }
PROBE int probe_mma_fp16(void* a, void* b, void* c, int by_address, int halves) { return launch_mma<fp16>(a, b, c, by_address, halves); }
PROBE int probe_mma_tf32(void* a, void* b, void* c) {
  return launch(mma_tf32_kernel, 1, kWarp, 0, nullptr, FLOATS(a), FLOATS(b), FLOATS(c));
}
PROBE int probe_ldmatrix(void* in, void* out) {
  return launch(ldmatrix_kernel, 1, kWarp, 0, nullptr, static_cast<uint16_t*>(in), static_cast<uint32_t*>(out));
}
PROBE int probe_conversions(void* in, void* out, void* back, int n) {
  return launch(conversions_kernel, 1, kWarp, 0, nullptr, FLOATS(in), static_cast<uint16_t*>(out), FLOATS(back), n);
}
PROBE int probe_order(void* ticket, void* order, int threads) {
  return launch(order_kernel, 1, threads, 0, nullptr, static_cast<int*>(ticket), static_cast<int*>(order));
}
PROBE int probe_where(void* out, int gx, int gy, int gz, int bx, int by, int bz, int64_t shared_bytes) {
  return launch(where_kernel, dim3(gx, gy, gz), dim3(bx, by, bz), shared_bytes, nullptr, static_cast<int*>(out));
}
PROBE int probe_divergent(void* out) { return launch(divergent_kernel, 1, kThreads, 0, nullptr, FLOATS(out)); }
PROBE int probe_deadlock(void* out) { return launch(deadlock_kernel, 1, kThreads, 0, nullptr, FLOATS(out)); }
PROBE int probe_exited(void* out) { return launch(exited_kernel, 1, kWarp, 0, nullptr, FLOATS(out)); }
PROBE int probe_early_exit(void* out) { return launch(early_exit_kernel, 1, kThreads, 0, nullptr, FLOATS(out)); }
PROBE int probe_wrong(void* out, int wrong) { return launch(wrong_kernel, 1, kWarp, 0, nullptr, FLOATS(out), static_cast<Wrong>(wrong)); }
PROBE int probe_limit(void* out, int64_t shared_bytes) { return launch(limit_kernel, 1, kWarp, shared_bytes, nullptr, FLOATS(out)); }
PROBE int probe_one_address(void* out, int blocks, int atomic) {
  return launch(one_address_kernel, dim3(blocks), kThreads, 0, nullptr, FLOATS(out), atomic != 0);
}
PROBE int probe_strided(void* in, void* out, int stride) {
  return launch(strided_kernel, 1, kWarp, 0, nullptr, FLOATS(in), FLOATS(out), stride);
}
PROBE int probe_halo(void* in, void* out, int n) {
  return launch(halo_kernel, 1, kWarp, 0, nullptr, static_cast<bf16*>(in), static_cast<bf16*>(out), n);
}
PROBE int probe_conflict(void* out, int pitch) { return launch(conflict_kernel, 1, kWarp, 32 * 4 * pitch, nullptr, FLOATS(out), pitch); }
PROBE int probe_widen(void* out) { return launch(widen_kernel, 1, kWarp, 0, nullptr, FLOATS(out)); }
PROBE int probe_arithmetic(void* a, void* b, void* pairs, void* out, int n) {
  return launch(arithmetic_kernel, 1, kWarp, 0, nullptr, FLOATS(a), FLOATS(b), static_cast<uint32_t*>(pairs), FLOATS(out), n);
}
PROBE int probe_wide_shuffles(void* in, void* out) {
  return launch(wide_shuffles_kernel, 1, kWarp, 0, nullptr, static_cast<double*>(in), static_cast<double*>(out));
}
PROBE int probe_widths(void* in, void* out) {
  return launch(widths_kernel, 1, kWarp, 0, nullptr, static_cast<unsigned char*>(in), static_cast<unsigned char*>(out));
}
PROBE int probe_last_block(void* in, void* partial, void* ticket, void* out, int blocks) {
  unsigned* drawn = static_cast<unsigned*>(ticket);
  return launch(last_block_kernel, dim3(blocks), kWarp, 0, nullptr, FLOATS(in), FLOATS(partial), drawn, FLOATS(out));
}
PROBE int probe_dynamic(void* in, void* out, int words) {
  return launch(dynamic_kernel, 1, 256, 4 * words, nullptr, static_cast<uint32_t*>(in), static_cast<uint32_t*>(out), words);
}
PROBE int64_t probe_shared_memory_limit() { return shared_memory_limit(); }
#include "cluster_probes.h"
#include "mma_probes.h"

// The only door to the hardware: shared memory, barriers, clusters, cp.async, ldmatrix, mma, shuffles, memory accesses, launch.
//
// A kernel file <op>_kernel.cu includes this file, its own <op>_kernel.h and ../geometry.h, nothing else, and compiles
// twice: with nvcc for a GPU, and with g++ -DFASTCONV_SIMT -x c++ -I tests/simt for the simulator, where twin.h takes the
// place of everything between #else and #endif. Both sides define the same names.
//
// Rule of kernel files, held by tests/test_simt_lint.py: global and shared memory are reached through load_global,
// store_global, load_shared, store_shared, load_cluster, copy_async, ldmatrix and atomic_add alone, so that the simulator checks and
// counts every access. A pointer is offset and passed on; it is never dereferenced or subscripted (local arrays are).
// Nothing outside this file names asm, __shared__, <<<>>>, a __*_sync intrinsic, or a type of the CUDA headers.
// threadIdx, blockIdx, blockDim, gridDim, dim3, cudaStream_t, __global__, __launch_bounds__, fmaf and sqrtf mean on both
// sides what they mean in CUDA. An access that only some lanes need takes its condition as the last argument instead of
// standing in a branch: lanes stay together, and the simulator's counters see one access a warp.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef FASTCONV_SIMT
#define FC_DEVICE inline
#else
#define FC_DEVICE __device__ __forceinline__
#endif

namespace fastconv::cuda {

constexpr int kWarp = 32;

// Storage of a 16-bit float: no arithmetic, because products and sums are formed in float32.
struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };

// N values that move through memory as one access (2 to 16 bytes); in registers any N.
template <class T, int N> struct alignas(sizeof(T) * N) Vec {
  T value[N];
  FC_DEVICE T& operator[](int i) { return value[i]; }
  FC_DEVICE const T& operator[](int i) const { return value[i]; }
};
template <class T> constexpr int kVector = 16 / static_cast<int>(sizeof(T));  // elements of a 16-byte access

// Two 32-bit or 16-bit values in one register, as mma and the packed conversions take them: `low` in the low half.
FC_DEVICE uint32_t pack(uint16_t low, uint16_t high) { return low | static_cast<uint32_t>(high) << 16; }

}  // namespace fastconv::cuda

#ifdef FASTCONV_SIMT
#include "twin.h"
#else
#include <cuda_runtime.h>

// Static shared memory: `name` is a pointer to `count` elements, 16-byte aligned for vector accesses. At the top of a
// kernel, never in a branch.
#define FC_SHARED(T, name, count)                \
  __shared__ __align__(16) T name##_shared[count]; \
  T* const name = name##_shared
// Dynamic shared memory of the launch, as bytes: one symbol of one type, since kernels of one file share the extern.
#define FC_DYNAMIC_SHARED(name)                                      \
  extern __shared__ __align__(128) unsigned char fc_dynamic_shared[]; \
  unsigned char* const name = fc_dynamic_shared

namespace fastconv::cuda {

// --- barriers

// All threads of the block, and their shared-memory accesses so far.
FC_DEVICE void sync_threads() { __syncthreads(); }
// All lanes of the warp, and their memory accesses so far: lanes do not run in step.
FC_DEVICE void sync_warp() { __syncwarp(); }

// --- conversions

// Bytes of the word that a nibble of `selector` picks each, from the low one on: 0 to 3 of a, 4 to 7 of b.
FC_DEVICE uint32_t byte_permute(uint32_t a, uint32_t b, uint32_t selector) { return __byte_perm(a, b, selector); }
FC_DEVICE uint32_t float_bits(float v) { return __float_as_uint(v); }
FC_DEVICE float bits_float(uint32_t v) { return __uint_as_float(v); }
FC_DEVICE float to_float(float v) { return v; }
// bfloat16 is the upper half of a float.
FC_DEVICE float to_float(bf16 v) { return __uint_as_float(static_cast<uint32_t>(v.bits) << 16); }
// In PTX, so that no header of device types is parsed in every kernel file.
FC_DEVICE float to_float(fp16 v) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v.bits));
  return f;
}
// Round to nearest even.
template <class T> FC_DEVICE T from_float(float v);
template <> FC_DEVICE float from_float<float>(float v) { return v; }
template <> FC_DEVICE bf16 from_float<bf16>(float v) {
  bf16 r;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r.bits) : "f"(v));
  return r;
}
template <> FC_DEVICE fp16 from_float<fp16>(float v) {
  fp16 r;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r.bits) : "f"(v));
  return r;
}
// Two at once: one instruction instead of three.
template <class T> FC_DEVICE uint32_t from_floats(float low, float high);
template <> FC_DEVICE uint32_t from_floats<bf16>(float low, float high) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
template <> FC_DEVICE uint32_t from_floats<fp16>(float low, float high) {
  uint32_t r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
// mma drops the low 13 bits of a tf32 operand; rounding first keeps the error unbiased.
FC_DEVICE uint32_t to_tf32(float v) {
  uint32_t r;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(v));
  return r;
}
// The hardware's approximation (2 ulp): a division and a root apart cost ten times as much.
FC_DEVICE float rsqrt(float v) { return rsqrtf(v); }
// 2^v to 2 ulp and 1 / v to 1 ulp, one instruction each; a denormal result is 0.
FC_DEVICE float exp2(float v) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
}
FC_DEVICE float reciprocal(float v) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
}
// To 2^-22.
FC_DEVICE float log2(float v) {
  float r;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
}

// --- memory

template <int kBytes> struct Word;
template <> struct Word<2> { using Type = uint16_t; };
template <> struct Word<4> { using Type = uint32_t; };
template <> struct Word<8> { using Type = uint2; };
template <> struct Word<16> { using Type = uint4; };

// Through a built-in vector type: member by member a Vec would be read in as many instructions.
template <class V> FC_DEVICE V load_word(const void* p) {
  const auto word = *static_cast<const typename Word<sizeof(V)>::Type*>(p);
  V v;
  __builtin_memcpy(&v, &word, sizeof v);
  return v;
}
template <class V> FC_DEVICE void store_word(void* p, const V& v) {
  typename Word<sizeof(V)>::Type word;
  __builtin_memcpy(&word, &v, sizeof v);
  *static_cast<decltype(word)*>(p) = word;
}

// V is a scalar or a Vec; p is aligned to it. Where `in` is false the result is zero and p is not touched.
template <class V, class T> FC_DEVICE V load_global(const T* p) { return load_word<V>(p); }
template <class V, class T> FC_DEVICE V load_global(const T* p, bool in) { return in ? load_word<V>(p) : V{}; }
// In PTX where it is wide: nvcc 13 splits the assignment of a vector type into its members below compute_100.
template <class V, class T> FC_DEVICE void store_global(T* p, const V& v) {
  if constexpr (sizeof(V) < 8) {
    store_word<V>(p, v);
  } else {
    uint32_t word[sizeof(V) / 4];
    __builtin_memcpy(word, &v, sizeof v);
    if constexpr (sizeof(V) == 8)
      asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(p), "r"(word[0]), "r"(word[1]) : "memory");
    else
      asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(word[0]), "r"(word[1]), "r"(word[2]), "r"(word[3]) : "memory");
  }
}
template <class V, class T> FC_DEVICE void store_global(T* p, const V& v, bool in) { if (in) store_global<V>(p, v); }
template <class V, class T> FC_DEVICE V load_shared(const T* p) { return load_word<V>(p); }
template <class V, class T> FC_DEVICE V load_shared(const T* p, bool in) { return in ? load_word<V>(p) : V{}; }
template <class V, class T> FC_DEVICE void store_shared(T* p, const V& v) { store_word<V>(p, v); }
template <class V, class T> FC_DEVICE void store_shared(T* p, const V& v, bool in) { if (in) store_word<V>(p, v); }

// Returns the value before. For tickets and flags, in global or shared memory: a sum of floats is never formed so.
FC_DEVICE unsigned atomic_add(unsigned* p, unsigned v) { return atomicAdd(p, v); }
FC_DEVICE int atomic_add(int* p, int v) { return atomicAdd(p, v); }
FC_DEVICE float atomic_add(float* p, float v) { return atomicAdd(p, v); }
// Orders this thread's writes before its later ones for every block: what a ticket needs before it is drawn.
FC_DEVICE void thread_fence() { __threadfence(); }

// --- clusters: up to 16 blocks that run together and read each other's shared memory. Before sm_90 each has one block.

// All threads of the cluster, and their accesses so far, to global memory too. No block may exit while another still reads from it.
FC_DEVICE void sync_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  __syncthreads();
#endif
}
// What lies at p, in this block's shared memory, in that of block `rank` of the cluster.
FC_DEVICE float load_cluster(const float* p, int rank) {
#if __CUDA_ARCH__ >= 900
  uint32_t address;
  float v;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(p))), "r"(rank));
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(v) : "r"(address) : "memory");
  return v;
#else
  return *p;
#endif
}

// --- cp.async: global to shared memory without registers, landing in the background

FC_DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// kBytes = 4, 8 or 16, both pointers aligned to it. Where `in` is false zeros land and the source is not read, but it must
// still be a valid pointer. 16 bytes bypass the L1 cache (.cg), which smaller copies cannot.
template <int kBytes> FC_DEVICE void copy_async(void* shared, const void* global, bool in = true) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  const int read = in ? kBytes : 0;
  if constexpr (kBytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(read) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;"
                 ::"r"(shared_address(shared)), "l"(global), "n"(kBytes), "r"(read) : "memory");
}
// Closes a group of this thread's copies, which may be empty: counting groups is what waiting goes by.
FC_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most kPending of this thread's latest groups are in flight. Other threads' copies need a barrier after it.
template <int kPending> FC_DEVICE void copy_async_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory"); }

// --- warp collectives: all 32 lanes call them together

// 8x8 matrices of 16-bit values from shared memory in the layout of mma operands. Lane 8 i + r gives the 16-byte aligned
// address of row r of matrix i; fragment[i] holds elements (lane / 4, 2 (lane % 4)) and the next, of the transpose with kTrans.
template <bool kTrans = false> FC_DEVICE void ldmatrix(uint32_t (&fragment)[1], const void* row) {
  if constexpr (kTrans)
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];" : "=r"(fragment[0]) : "r"(shared_address(row)) : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(fragment[0]) : "r"(shared_address(row)) : "memory");
}
template <bool kTrans = false> FC_DEVICE void ldmatrix(uint32_t (&fragment)[2], const void* row) {
  if constexpr (kTrans)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(fragment[0]), "=r"(fragment[1]) : "r"(shared_address(row)) : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(fragment[0]), "=r"(fragment[1]) : "r"(shared_address(row)) : "memory");
}
template <bool kTrans = false> FC_DEVICE void ldmatrix(uint32_t (&fragment)[4], const void* row) {
  if constexpr (kTrans)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3]) : "r"(shared_address(row)) : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3]) : "r"(shared_address(row)) : "memory");
}

// d[16 x 8] += a[16 x 16] b[16 x 8], a by rows, b by columns, T = bf16 or fp16, sums in float32. With g = lane / 4 and
// t = lane % 4: a[i] holds row g + 8 (i % 2), columns 2 t + 8 (i / 2) and the next; b[i] rows 2 t + 8 i and the next of
// column g; d[i] row g + 8 (i / 2), column 2 t + i % 2.
template <class T> FC_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <> FC_DEVICE void mma_m16n8k16<bf16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <> FC_DEVICE void mma_m16n8k16<fp16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// The same half as deep, a[16 x 8] b[8 x 8]: only what holds columns (of b: rows) below 8.
template <class T> FC_DEVICE void mma_m16n8k8(float (&d)[4], const uint32_t (&a)[2], uint32_t b);
template <> FC_DEVICE void mma_m16n8k8<bf16>(float (&d)[4], const uint32_t (&a)[2], uint32_t b) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(b));
}
template <> FC_DEVICE void mma_m16n8k8<fp16>(float (&d)[4], const uint32_t (&a)[2], uint32_t b) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(b));
}
// d[16 x 8] += a[16 x 8] b[8 x 8] on to_tf32 operands: a[i] holds row g + 8 (i % 2), column t + 4 (i / 2); b[i] row t + 4 i
// of column g; d as above. Only where allow_tf32 permits: 10 bits of mantissa.
FC_DEVICE void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// T of 4 or 8 bytes. A shuffle exchanges registers and orders no memory: sync_warp does.
template <class T> FC_DEVICE T shuffle_xor(T v, int lanes) { return __shfl_xor_sync(~0u, v, lanes); }
// The value of lane + delta; a lane past the end keeps its own.
template <class T> FC_DEVICE T shuffle_down(T v, int delta) { return __shfl_down_sync(~0u, v, delta); }
template <class T> FC_DEVICE T shuffle(T v, int lane) { return __shfl_sync(~0u, v, lane); }
// Whether any lane says so.
FC_DEVICE bool warp_any(bool v) { return __any_sync(~0u, v); }

// --- launch

// Bytes of shared memory that a block may have on the current device.
inline int64_t shared_memory_limit() {
  int device = 0, bytes = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  return cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) == cudaSuccess ? bytes : 0;
}

// Above 48 KiB of dynamic shared memory a kernel has to opt in first. The error code, 0 = cudaSuccess.
inline int opt_in(const void* kernel, size_t shared_bytes) {
  if (shared_bytes <= 48 * 1024) return 0;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
  return error == cudaSuccess ? 0 : cudaGetLastError();
}

// Error code of the launch.
template <class... P, class... A>
int launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream, A&&... args) {
  if (const int error = opt_in(reinterpret_cast<const void*>(kernel), shared_bytes)) return error;
  kernel<<<grid, block, shared_bytes, stream>>>(static_cast<P>(args)...);
  return cudaGetLastError();
}

// What a launch in clusters of `blocks` along x takes.
struct ClusterLaunch {
  cudaLaunchConfig_t config{};
  cudaLaunchAttribute attribute{};
  int error;
  ClusterLaunch(const void* kernel, unsigned blocks, dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {blocks, 1, 1};
    config.gridDim = grid, config.blockDim = block, config.dynamicSmemBytes = shared_bytes, config.stream = stream;
    config.attrs = &attribute, config.numAttrs = 1;
    error = opt_in(kernel, shared_bytes);
    if (error == 0 && blocks > 8 && cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) != cudaSuccess)
      error = cudaGetLastError();
  }
  ClusterLaunch(const ClusterLaunch&) = delete;  // config points to attribute
};

// How many clusters of so many blocks the GPU holds at a time, which also depends on how many multiprocessors stand together.
template <class... P> int clusters_that_fit(void (*kernel)(P...), unsigned blocks, dim3 block, size_t shared_bytes) {
  ClusterLaunch c(reinterpret_cast<const void*>(kernel), blocks, dim3(blocks), block, shared_bytes, nullptr);
  int clusters = 0;
  if (c.error == 0 && cudaOccupancyMaxActiveClusters(&clusters, kernel, &c.config) == cudaSuccess) return clusters;
  cudaGetLastError();
  return 0;
}

// launch() in clusters; grid.x is a multiple of `blocks`.
template <class... P, class... A>
int launch_clusters(void (*kernel)(P...), unsigned blocks, dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream, A&&... args) {
  if (blocks == 1) return launch(kernel, grid, block, shared_bytes, stream, args...);
  ClusterLaunch c(reinterpret_cast<const void*>(kernel), blocks, grid, block, shared_bytes, stream);
  if (c.error != 0) return c.error;
  const cudaError_t error = cudaLaunchKernelEx(&c.config, kernel, static_cast<P>(args)...);
  return error == cudaSuccess ? cudaGetLastError() : (cudaGetLastError(), error);
}

}  // namespace fastconv::cuda
#endif

namespace fastconv::cuda {

template <class T, int N> FC_DEVICE Vec<float, N> to_float(const Vec<T, N>& v) {
  Vec<float, N> r;
#pragma unroll
  for (int i = 0; i < N; ++i) r[i] = to_float(v[i]);
  return r;
}
template <class T, int N> FC_DEVICE Vec<T, N> from_float(const Vec<float, N>& v) {
  Vec<T, N> r;
  if constexpr (sizeof(T) == 4 || N % 2) {
#pragma unroll
    for (int i = 0; i < N; ++i) r[i] = from_float<T>(v[i]);
  } else {
#pragma unroll
    for (int i = 0; i < N; i += 2) {
      const uint32_t pair = from_floats<T>(v[i], v[i + 1]);
      r[i].bits = static_cast<uint16_t>(pair);
      r[i + 1].bits = static_cast<uint16_t>(pair >> 16);
    }
  }
  return r;
}

// Sum over the lanes of the warp, the same bits in each: a butterfly adds in one fixed tree.
FC_DEVICE float warp_sum(float v) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) v += shuffle_xor(v, lanes);
  return v;
}

}  // namespace fastconv::cuda

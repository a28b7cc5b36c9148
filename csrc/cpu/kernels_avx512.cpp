// The kernels for x86-64 with AVX-512 (F, BW, DQ, VL).
// Every header comes before the target switch: inline code that other files share must stay baseline.
#include <cstdint>
#include <type_traits>
#include <utility>

#include "cpu/kernels.h"
#if defined(__x86_64__)
#include <immintrin.h>
#define FASTCONV_LEVEL avx512
#define FASTCONV_VECTOR_BYTES 64
#define FASTCONV_REGISTERS 32
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), apply_to = function)
#include "cpu/kernels_level.h"
#pragma clang attribute pop
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#include "cpu/kernels_level.h"
#endif
#endif

// The kernels for x86-64 with AVX2, FMA and F16C.
// Every header comes before the target switch: inline code that other files share must stay baseline.
#include <cstdint>
#include <type_traits>
#include <utility>

#include "cpu/kernels.h"
#if defined(__x86_64__)
#include <immintrin.h>
#define FASTCONV_LEVEL avx2
#define FASTCONV_VECTOR_BYTES 32
#define FASTCONV_REGISTERS 16
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#include "cpu/kernels_level.h"
#pragma clang attribute pop
#else
#pragma GCC target("avx2,fma,f16c")
#include "cpu/kernels_level.h"
#endif
#endif

// The kernels for any CPU, in vectors of 16 bytes (SSE2 on x86-64, NEON on aarch64), and the choice of the level.
#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#include "cpu/kernels.h"

#define FASTCONV_LEVEL default
#define FASTCONV_VECTOR_BYTES 16
#if defined(__aarch64__)
#define FASTCONV_REGISTERS 32
#else
#define FASTCONV_REGISTERS 16
#endif
#include "cpu/kernels_level.h"

namespace fastconv::cpu {
namespace {

// The best level that this CPU runs and FASTCONV_CPU_CAPABILITY (default | avx2 | avx512) allows.
const Kernels& choose() {
  const char* set = std::getenv("FASTCONV_CPU_CAPABILITY");
  const std::string wanted = set ? set : "";
  std::string supported = "default";
  const Kernels* best = &kernels_default;
  if (wanted == "default") return *best;
#if defined(__x86_64__)
  const auto offer = [&](const Kernels& level, bool runs) {
    if (!runs || best->name == wanted) return;
    best = &level;
    supported += std::string(", ") + level.name;
  };
  offer(kernels_avx2, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"));  // F16C is older than both
  offer(kernels_avx512, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"));
#endif
  if (!wanted.empty() && best->name != wanted)
    throw std::runtime_error("fastconv: FASTCONV_CPU_CAPABILITY must be one of " + supported + " on this machine, got " + wanted + "; unset it");
  return *best;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace fastconv::cpu

// The CPU library's own facts.
#include "cpu/glue.h"

namespace fastconv::cpu {
namespace {

std::string cpu_capability() { return kernels().name; }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastconv, m) { m.def("cpu_capability() -> str"); }
STABLE_TORCH_LIBRARY_IMPL(fastconv, CompositeExplicitAutograd, m) { m.impl("cpu_capability", TORCH_BOX(&cpu_capability)); }

}  // namespace fastconv::cpu

// All kernels for one SIMD level, named by FASTCONV_LEVEL (kernels_<level>.cpp includes this under its target).

#define FC_STRING(x) FC_STRING_(x)
#define FC_STRING_(x) #x
#define FC_TABLE(level) FC_TABLE_(level)
#define FC_TABLE_(level) kernels_##level
#define FC_NAMESPACE(level) FC_NAMESPACE_(level)
#define FC_NAMESPACE_(level) level_##level

namespace fastconv::cpu {
namespace FC_NAMESPACE(FASTCONV_LEVEL) {
namespace {

#include "vec.h"

#include "layer_norm_kernel.h"

#include "depthwise_conv_kernel.h"

#include "residual_scale_kernel.h"

#include "activation_kernel.h"

#include "global_response_norm_kernel.h"

#include "functions.h"

#include "layer_kernel.h"

#include "squeeze_excite_kernel.h"

#include "grouped_conv_kernel.h"

#include "small_product_kernel.h"

#include "window_attention_kernel.h"

#include "linear_kernel.h"

// Picks the accumulation type.
#define FC_SCRATCH(name, Params, dtype) \
  int64_t name(const Params& p) { return is_double(dtype) ? name##_as<double>(p) : name##_as<float>(p); }
#define FC_TASKS(name, Params, dtype)                                                                              \
  void name(const Params& p, void* scratch, int64_t begin, int64_t end) {                                          \
    if (is_double(dtype)) name##_as<double>(p, static_cast<char*>(scratch), begin, end);                           \
    else name##_as<float>(p, static_cast<char*>(scratch), begin, end);                                             \
  }
FC_SCRATCH(forward_scratch, ForwardParams, p.x.dtype)
FC_TASKS(forward, ForwardParams, p.x.dtype)
FC_SCRATCH(backward_scratch, BackwardParams, p.dy.dtype)
FC_TASKS(backward, BackwardParams, p.dy.dtype)
FC_SCRATCH(residual_scratch, ResidualParams, p.y.dtype)
FC_TASKS(residual_forward, ResidualParams, p.y.dtype)
FC_TASKS(residual_backward, ResidualParams, p.y.dtype)
FC_SCRATCH(gelu_scratch, GeluParams, p.x.dtype)
FC_TASKS(gelu, GeluParams, p.x.dtype)
FC_SCRATCH(grn_scratch, GrnParams, p.x.dtype)
FC_TASKS(grn_sum, GrnParams, p.x.dtype)
FC_TASKS(grn_apply, GrnParams, p.x.dtype)
FC_SCRATCH(window_scratch, WindowParams, p.q.dtype)
FC_TASKS(window_attention, WindowParams, p.q.dtype)
FC_SCRATCH(map_scratch, MapParams, p.x.dtype)
FC_TASKS(map_sum, MapParams, p.x.dtype)
FC_TASKS(map_apply, MapParams, p.x.dtype)
#define FC_SMALL_TASKS(name, Params)                                  \
  void name(const Params& p, int64_t begin, int64_t end) {            \
    if (p.is_double) name##_as<double>(p, begin, end);                \
    else name##_as<float>(p, begin, end);                             \
  }
FC_SMALL_TASKS(fold, FoldParams)
FC_SMALL_TASKS(layer_forward, LayerParams)
FC_SMALL_TASKS(layer_backward, LayerParams)
FC_SMALL_TASKS(layer_weight, LayerParams)
FC_SCRATCH(grouped_scratch, GroupedParams, p.in.dtype)
FC_TASKS(grouped, GroupedParams, p.in.dtype)
FC_SCRATCH(grouped_wgrad_scratch, GroupedParams, p.in.dtype)
FC_TASKS(grouped_wgrad, GroupedParams, p.in.dtype)
FC_SCRATCH(linear_wgrad_scratch, LinearWgradParams, p.x.dtype)
FC_TASKS(linear_wgrad, LinearWgradParams, p.x.dtype)

}  // namespace
}  // namespace level_*

extern const Kernels FC_TABLE(FASTCONV_LEVEL) = {
    FC_STRING(FASTCONV_LEVEL),
    FASTCONV_VECTOR_BYTES,
    FC_NAMESPACE(FASTCONV_LEVEL)::pack_weight,
    FC_NAMESPACE(FASTCONV_LEVEL)::forward_scratch,
    FC_NAMESPACE(FASTCONV_LEVEL)::forward,
    FC_NAMESPACE(FASTCONV_LEVEL)::backward_scratch,
    FC_NAMESPACE(FASTCONV_LEVEL)::backward,
    FC_NAMESPACE(FASTCONV_LEVEL)::residual_scratch,
    FC_NAMESPACE(FASTCONV_LEVEL)::residual_forward,
    FC_NAMESPACE(FASTCONV_LEVEL)::residual_backward,
    FC_NAMESPACE(FASTCONV_LEVEL)::gelu_scratch,
    FC_NAMESPACE(FASTCONV_LEVEL)::gelu,
    FC_NAMESPACE(FASTCONV_LEVEL)::grn_scratch,
    FC_NAMESPACE(FASTCONV_LEVEL)::grn_sum,
    FC_NAMESPACE(FASTCONV_LEVEL)::grn_apply,
    FC_NAMESPACE(FASTCONV_LEVEL)::window_scratch,
    FC_NAMESPACE(FASTCONV_LEVEL)::window_attention,
    FC_NAMESPACE(FASTCONV_LEVEL)::map_scratch,
    FC_NAMESPACE(FASTCONV_LEVEL)::map_sum,
    FC_NAMESPACE(FASTCONV_LEVEL)::map_apply,
    FC_NAMESPACE(FASTCONV_LEVEL)::fold,
    FC_NAMESPACE(FASTCONV_LEVEL)::layer_forward,
    FC_NAMESPACE(FASTCONV_LEVEL)::layer_backward,
    FC_NAMESPACE(FASTCONV_LEVEL)::layer_weight,
    FC_NAMESPACE(FASTCONV_LEVEL)::grouped_scratch,
    FC_NAMESPACE(FASTCONV_LEVEL)::grouped,
    FC_NAMESPACE(FASTCONV_LEVEL)::grouped_wgrad_scratch,
    FC_NAMESPACE(FASTCONV_LEVEL)::grouped_wgrad,
    FC_NAMESPACE(FASTCONV_LEVEL)::linear_wgrad_scratch,
    FC_NAMESPACE(FASTCONV_LEVEL)::linear_wgrad,
};

}  // namespace fastconv::cpu

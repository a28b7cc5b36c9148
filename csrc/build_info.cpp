// fastconv._C: build facts, work splits, byte and FLOP counts for Python. No torch.
#include <pybind11/pybind11.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "geometry.h"
#include "window_geometry.h"

namespace py = pybind11;
using fastconv::ConvShape;

namespace {

const char* cpu_vendor() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_is("amd")) return "amd";
  if (__builtin_cpu_is("intel")) return "intel";
#endif
  return "other";
}

int64_t cpu_family() {
#if defined(__x86_64__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (__get_cpuid(1, &a, &b, &c, &d)) return (a >> 8 & 15) + ((a >> 8 & 15) == 15 ? a >> 20 & 255 : 0);
#endif
  return 0;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build facts and geometry: the numbers that the kernels use, for tests and benchmarks.";
  m.def("cpu_vendor", &cpu_vendor, "\"amd\", \"intel\" or \"other\": whose processor this is.");
  m.def("cpu_family", &cpu_family, "Its family by cpuid, 0 where there is none: 25 is AMD's Zen 3 and 4, 26 Zen 5.");
  m.def("build_info", [] {
    py::dict facts;
    facts["compiler"] = FASTCONV_COMPILER;
    facts["torch_target"] = FASTCONV_TORCH_TARGET;
    facts["torch_built_with"] = FASTCONV_TORCH_VERSION;
    facts["cxx_standard"] = static_cast<long>(__cplusplus);
    facts["cuda"] = FASTCONV_CUDA;
    facts["cuda_missing"] = FASTCONV_CUDA_MISSING;
    return facts;
  });
  const auto shape = [](const char* name) { return py::arg(name); };
#define FC_SHAPE shape("N"), shape("H"), shape("W"), shape("C"), shape("K")
  m.def("forward_bands", [](int64_t N, int64_t H, int64_t W, int64_t C, int64_t K, int64_t threads) {
    const auto b = fastconv::forward_bands({N, H, W, C, K}, threads);
    return py::make_tuple(b.rows, b.per_image, b.count);
  }, FC_SHAPE, shape("threads"), "(rows, bands an image, bands) of the forward pass.");
  m.def("backward_plan", [](int64_t N, int64_t H, int64_t W, int64_t C, int64_t K, int64_t channel_blocks, bool norm) {
    const auto p = fastconv::backward_plan({N, H, W, C, K}, channel_blocks, norm);
    return py::make_tuple(p.bands.count, p.slices, p.groups);
  }, FC_SHAPE, shape("channel_blocks"), shape("norm"), "(bands, slices, channel groups) of the backward pass.");

  m.def("cuda_forward_tiles", [](int64_t N, int64_t H, int64_t W, int64_t C, int64_t K, int64_t size) {
    const auto t = fastconv::conv_forward_tiles({N, H, W, C, K}, size);
    return py::make_tuple(t.images, t.rows, t.columns, t.count);
  }, FC_SHAPE, shape("size"), "(images, rows, columns, tiles) of the forward pass on a GPU, x of `size` bytes an element.");
  m.def("cuda_joined_plan", [](int64_t N, int64_t H, int64_t W, int64_t C, int64_t K, int64_t size, int64_t shared, int64_t multiprocessors) {
    const auto p = fastconv::conv_norm_plan({N, H, W, C, K}, size, size, {shared, multiprocessors});
    return py::make_tuple(p.tiles.images, p.tiles.rows, p.tiles.columns, p.tiles.count, p.together, p.threads, p.shared);
  }, FC_SHAPE, shape("size"), shape("shared"), shape("multiprocessors"),
     "(images, rows, columns, tiles, chunks together, threads, bytes of shared memory) of a block of the forward pass with the norm in one"
     " launch, x and z of `size` bytes an element, on a GPU of so much shared memory a block and so many multiprocessors. No tiles: two launches.");
  m.def("cuda_backward_plan", [](int64_t N, int64_t H, int64_t W, int64_t C, int64_t K) {
    const ConvShape s{N, H, W, C, K};
    const auto t = fastconv::conv_backward_tiles(s);
    return py::make_tuple(t.images, t.rows, t.columns, t.count, fastconv::conv_wgrad_slices(s), fastconv::norm_bwd_slices(s));
  }, FC_SHAPE, "(images, rows, columns, tiles, partials of dweight, partials of dnorm_weight) of the backward pass on a GPU.");
  m.def("cuda_response_plan", [](int64_t L, int64_t C, int64_t width, int64_t size, int64_t sums, int64_t shared, int64_t cluster) {
    const auto p = fastconv::response_plan(L, C, width, size, sums, {shared, 132, cluster});
    return py::make_tuple(p.blocks, p.threads, p.shared);
  }, shape("L"), shape("C"), shape("width"), shape("size"), shape("sums"), shape("shared"), shape("cluster"),
     "(blocks of an image, threads, bytes of shared memory) of a global_response_norm that holds an image of L pixels on the chip, `size` bytes"
     " of an element and `sums` of a channel, in accesses of `width` elements, on a GPU of so much shared memory a block and so many blocks"
     " a cluster. No blocks: two passes over memory.");
  m.def("cuda_gate_plan", [](int64_t L, int64_t C, bool channels_last, int64_t width, int64_t size, int64_t shared, int64_t cluster) {
    const auto p = fastconv::gate_plan(L, C, channels_last, width, size, {shared, 132, cluster});
    return py::make_tuple(p.blocks, p.threads, p.shared);
  }, shape("L"), shape("C"), shape("channels_last"), shape("width"), shape("size"), shape("shared"), shape("cluster"),
     "The same of a squeeze_excite that holds the map its second pass scales.");
  m.def("cuda_grouped_conv", [](int64_t N, int64_t H, int64_t W, int64_t C, int64_t K, int64_t stride, int64_t pad_h, int64_t pad_w, int64_t groups) {
    const fastconv::GroupedConvShape s{N, H, W, C, K, stride, pad_h, pad_w, groups};
    return py::make_tuple(fastconv::grouped_serves(s), fastconv::grouped_pays(s));
  }, FC_SHAPE, shape("stride"), shape("pad_h"), shape("pad_w"), shape("groups"),
     "(whether the CUDA kernels of grouped_conv can run a call, whether they are the choice), for maps in channels_last of bfloat16 or float16.");
  m.def("cuda_window_plan", [](int64_t wh, int64_t ww, int64_t D, bool backward, int64_t shared) {
    const auto p = fastconv::window_plan({1, wh, ww, 1, D, wh, ww}, backward, shared);
    return py::make_tuple(p.warps, p.rows, p.bands, p.shared);
  }, shape("wh"), shape("ww"), shape("D"), shape("backward"), shape("shared"),
     "(warps, rows of patches in shared memory at a time, rows of sums for the table, bytes of shared memory) of a block of window_attention"
     " on tensor cores, on a GPU of so much shared memory a block. No warps: it does not fit.");
  m.def("cuda_partial_floats", [](int64_t N, int64_t H, int64_t W, int64_t C, int64_t K, bool norm) {
    const ConvShape s{N, H, W, C, K};
    return fastconv::conv_wgrad_floats(s) + (norm ? fastconv::norm_bwd_floats(s) : 0);
  }, FC_SHAPE, shape("norm"), "Floats of all partial sums of the backward pass on a GPU; each is written and read once.");

#define FC_COUNT(name, expression, doc)                                                                           \
  m.def(name, [](int64_t N, int64_t H, int64_t W, int64_t C, int64_t K) {                                          \
    const ConvShape s{N, H, W, C, K};                                                                              \
    return expression;                                                                                             \
  }, FC_SHAPE, doc)
  FC_COUNT("depthwise_conv_flops", fastconv::conv_flops(s), "FLOPs of the forward pass.");
  FC_COUNT("depthwise_conv_bwd_flops", 2 * fastconv::conv_flops(s), "FLOPs of all gradients.");
  FC_COUNT("depthwise_conv_norm_flops", fastconv::conv_norm_flops(s), "FLOPs of the forward pass.");
  FC_COUNT("depthwise_conv_norm_bwd_flops", fastconv::conv_norm_bwd_flops(s), "FLOPs of all gradients.");

#define FC_BYTES(name, expression, doc)                                                                           \
  m.def(name, [](int64_t N, int64_t H, int64_t W, int64_t C, int64_t K, int64_t size) {                            \
    const ConvShape s{N, H, W, C, K};                                                                              \
    return expression;                                                                                             \
  }, FC_SHAPE, shape("size"), doc)
  FC_BYTES("depthwise_conv_bytes", fastconv::conv_bytes(s, size), "Fewest bytes of the forward pass, `size` bytes an element.");
  FC_BYTES("depthwise_conv_bwd_bytes", fastconv::conv_bwd_bytes(s, size), "Fewest bytes of all gradients.");
  FC_BYTES("depthwise_conv_norm_bytes", fastconv::conv_norm_bytes(s, size, true), "Fewest bytes of the forward pass in training.");
  FC_BYTES("depthwise_conv_norm_infer_bytes", fastconv::conv_norm_bytes(s, size, false), "Fewest bytes of the forward pass in inference.");
  FC_BYTES("depthwise_conv_norm_bwd_bytes", fastconv::conv_norm_bwd_bytes(s, size), "Fewest bytes of all gradients.");

  m.def("global_response_norm_bytes", &fastconv::global_response_norm_bytes, shape("elements"), shape("size"), "Fewest bytes of the forward pass.");
  m.def("global_response_norm_bwd_bytes", &fastconv::global_response_norm_bwd_bytes, shape("elements"), shape("size"), "Fewest bytes of all gradients.");
  m.def("residual_scale_bytes", &fastconv::residual_scale_bytes, shape("elements"), shape("size"), "Fewest bytes of the forward pass.");
  m.def("residual_scale_bwd_bytes", &fastconv::residual_scale_bwd_bytes, shape("elements"), shape("size"), "Fewest bytes of all gradients.");
  m.def("squeeze_excite_bytes", &fastconv::squeeze_excite_bytes, shape("elements"), shape("size"), "Fewest bytes of the forward pass.");
  m.def("squeeze_excite_bwd_bytes", &fastconv::squeeze_excite_bwd_bytes, shape("elements"), shape("size"), "Fewest bytes of all gradients.");
}

// The CPU kernels as the op glue sees them: pointers, sizes and a range of tasks. No torch here.
//
// Each SIMD level is one translation unit (kernels_<level>.cpp) that compiles the same sources for its instruction set
// and fills one Kernels table; kernels() returns the table for this machine.
#pragma once

#include <cstdint>

#include "geometry.h"

namespace fastconv::cpu {

constexpr int64_t kSlicePixels = 256, kPlanes = 16, kLayerBlock = 64;

enum class DType : uint8_t { kFloat, kBFloat16, kHalf, kDouble };

constexpr int64_t dtype_size(DType d) { return d == DType::kDouble ? 8 : d == DType::kFloat ? 4 : 2; }
// Sums are taken in float, for double in double.
constexpr bool is_double(DType d) { return d == DType::kDouble; }

// An array in memory: rows of C channels, one a pixel.
struct Array {
  const void* data = nullptr;
  DType dtype = DType::kFloat;
};
struct MutableArray {
  void* data = nullptr;
  DType dtype = DType::kFloat;
};

// A convolution, with the norm after it where norm_weight is given. `packed` holds the weights as
// [channel block][K * K][lanes] in the accumulation type (pack_weight).
struct ForwardParams {
  ConvShape shape;
  Bands bands;
  Array x;
  const void* packed;
  const void* bias;                        // [C] in the accumulation type
  const void *norm_weight, *norm_bias;     // [C] in the accumulation type, or null
  double eps;
  MutableArray y, z;                       // z, the convolution's output for backward, or null
  void *mean, *rstd;                       // [pixels] in the accumulation type, or null
};

struct BackwardParams {
  ConvShape shape;
  BackwardPlan plan;
  Array dy, x;
  const void* packed;                      // flipped weights
  Array z;                                 // with the norm, else null: the convolution's output and its statistics
  const void *norm_weight, *mean, *rstd;   // [C], [pixels], [pixels]
  void* norm_partial;                      // [slices][2][C]: dnorm_weight, dnorm_bias
  MutableArray dx;                         // null: not needed
  Array dshortcut;                         // in the dtype of dx, which it is added to; or null
  void* partial;                           // [slices][channel block][K * K + 1][lanes]: dweight, dbias; null: not needed
};

struct ResidualParams {
  int64_t N, L, C;                         // N images of L pixels
  Array shortcut, y, dout;
  const void *gamma, *mask;                // [C] and [N] in the accumulation type, or null
  MutableArray out, dy;
  int64_t slices;
  void* partial;                           // [slices][C]: dgamma
};

// Elements at a time where a dtype is not the accumulation type: small enough for the L1 cache.
constexpr int64_t kChunk = 2048;

enum class Activation : uint8_t { kNone, kGelu, kGeluTanh };

struct GeluParams {
  int64_t count;
  Activation act;
  Array x, dy;                             // dy: backward
  MutableArray y, dx;                      // y: null in a backward that does not need it
};

// N images of L pixels, each split into `bands`. a = act(x).
struct GrnParams {
  int64_t N, L, C, bands;
  Activation act;
  Array x, dy;                             // dy: backward
  const void *factor, *term;               // [N][C] and [C], backward [N][C]
  MutableArray out;                        // y, backward dx
  void* partial;                           // [N][bands][C], backward [N][bands][2][C]
};

// What stands between and behind the layers of a squeeze-and-excitation: fastconv/ops/squeeze_excite.py has the same order.
enum class Function : uint8_t { kRelu, kSilu, kGelu, kHardswish, kLeakyRelu, kIdentity, kSigmoid, kHardsigmoid };
constexpr int64_t kFunctions = 8;

// The passes over a map. Channels last it is N images of L pixels of C channels, split into slices of kSlicePixels
// pixels; channels first N * C planes of L pixels, a plane a sum.
struct MapParams {
  int64_t N, L, C;
  bool channels_last;
  int64_t slices;                          // of an image, channels last
  Array x, dy;                             // dy null: the sums of x; else of dy x
  void* partial;                           // [N][slices][C], or [N][C] channels first
  const void *factor, *summand;            // out = (dy, or x where it is null) factor + summand, [N][C]; summand or null
  MutableArray out;
};

// A layer on N vectors, or its gradients. [M, K] is the weight; all in the accumulation type.
struct LayerParams {
  bool is_double;
  int64_t N, M, K;
  const void *in, *weight, *bias;          // [N][K] (gradients of the weight: what it was applied to), [M][K], [M] or null
  const void* dout;                        // [N][M]
  void *pre, *out;                         // what `function` is applied to, or null; its result
  Function function;
  const void* gradient_at;                 // backward: [N][K], where the derivative of `function` is taken, or null
  double scale;                            // backward: of the result
  void *dweight, *dbias;                   // [M][K], [M]
};

// Partial sums to means, or through the gate's derivative: for each image.
struct FoldParams {
  bool is_double;
  int64_t C, slices;
  const void *partial, *z;                 // [N][slices][C], [N][C]; z null: forward
  double scale;
  void *out, *gate;                        // [N][C]: mean, or the gradient of z and gate(z)
  Function function;
};

// One pass of a grouped convolution over activations (N, C, H, W), or (N, H, W, C) where nhwc:
//   out[row * step + first] = bias + sum over the group's in_width channels and the taps of packed * in[row * stride + tap - pad]
// for rows x cols output pixels, in bands of band_rows rows. Forward has steps of 1; dx is one pass a phase of the stride, over dy.
struct GroupedParams {
  static constexpr int64_t kMaxTaps = 49;
  static constexpr int64_t kMaxBlock = 6;
  int64_t N, groups, in_width, out_width;  // channels a group
  int64_t H, W, out_H, out_W;              // of the arrays
  bool nhwc;
  int64_t rows, cols;
  int64_t step_h, step_w, first_h, first_w;
  int64_t stride_h, stride_w, pad_h, pad_w;
  int64_t taps, tap_h[kMaxTaps], tap_w[kMaxTaps];
  int64_t block;                           // output channels computed together
  int64_t together;                        // groups staged at a time
  int64_t band_rows, bands;
  Array in;
  const void* packed;                      // [group][block of outputs][in_width][taps][block] in the accumulation type
  const void* bias;                        // [groups * out_width] in the accumulation type, or null
  MutableArray out;
  // dweight, from dy, whose sizes are those of `out`
  Array dy;
  int64_t slices;                          // runs of consecutive bands
  void* partial;                           // [slices][groups * out_width][in_width * taps + 1]: dweight, dbias
};

// B maps of H x W tokens in rows x columns windows. Backward where dy is given.
struct WindowParams {
  int64_t B, H, W, heads, D;
  int64_t wh, ww, sh, sw;                  // window and shift
  int64_t rows, columns, slices;           // windows of a map; slices of the windows of all maps
  bool pad_first;                          // pad, then shift
  double scale, mask_value;
  Array q, k, v, dy;                       // dy [B][H][W][heads][D]
  int64_t stride[3][4];                    // of q, k, v: image, row, column, head; in elements
  const void *table, *logit_scale, *pad;   // [positions][heads], [heads], [3][heads][D] in the accumulation type, or null
  MutableArray out;                        // y as dy is; backward dqkv [B][H][W][3][heads][D]
  void* partial;                           // [slices][heads][positions + 1 + 3 * D]: dtable, dlogit_scale, dpad
};

// dweight = dy^T x and dbias, the sum of dy, of dy [rows][D] and x [rows][C] in the accumulation type.
struct LinearWgradParams {
  int64_t rows, D, C;
  int64_t block_d, block_c, blocks_c, blocks;  // of dweight
  Array dy, x;
  MutableArray dweight, dbias;                 // dbias null: not needed
};

struct Kernels {
  const char* name;
  int64_t vector_bytes;
  // [C, K * K] of any dtype -> packed, for the channel blocks [begin, end)
  void (*pack_weight)(const ConvShape&, Array weight, bool flip, bool to_double, void* packed, int64_t begin, int64_t end);
  // Each runs the tasks [begin, end); `scratch` is 64-byte aligned and belongs to the calling thread.
  int64_t (*forward_scratch)(const ForwardParams&);
  void (*forward)(const ForwardParams&, void* scratch, int64_t begin, int64_t end);  // a task is a band
  int64_t (*backward_scratch)(const BackwardParams&);
  void (*backward)(const BackwardParams&, void* scratch, int64_t begin, int64_t end);  // a task is slice * groups + group
  int64_t (*residual_scratch)(const ResidualParams&);
  void (*residual_forward)(const ResidualParams&, void* scratch, int64_t begin, int64_t end);   // a task is a slice
  void (*residual_backward)(const ResidualParams&, void* scratch, int64_t begin, int64_t end);  // a task is a slice
  int64_t (*gelu_scratch)(const GeluParams&);
  void (*gelu)(const GeluParams&, void* scratch, int64_t begin, int64_t end);  // a task is kChunk elements
  int64_t (*grn_scratch)(const GrnParams&);
  void (*grn_sum)(const GrnParams&, void* scratch, int64_t begin, int64_t end);    // a task is image * bands + band
  void (*grn_apply)(const GrnParams&, void* scratch, int64_t begin, int64_t end);  // a task is image * bands + band
  int64_t (*window_scratch)(const WindowParams&);
  void (*window_attention)(const WindowParams&, void* scratch, int64_t begin, int64_t end);  // a task is slice * heads + head
  int64_t (*map_scratch)(const MapParams&);
  void (*map_sum)(const MapParams&, void* scratch, int64_t begin, int64_t end);    // a task is a slice, or kPlanes planes
  void (*map_apply)(const MapParams&, void* scratch, int64_t begin, int64_t end);  // the same
  void (*fold)(const FoldParams&, int64_t begin, int64_t end);                     // a task is an image
  void (*layer_forward)(const LayerParams&, int64_t begin, int64_t end);           // a task is kLayerBlock rows of the weight
  void (*layer_backward)(const LayerParams&, int64_t begin, int64_t end);          // a task is kLayerBlock columns
  void (*layer_weight)(const LayerParams&, int64_t begin, int64_t end);            // a task is kLayerBlock rows
  int64_t (*grouped_scratch)(const GroupedParams&);
  void (*grouped)(const GroupedParams&, void* scratch, int64_t begin, int64_t end);        // a task is (band of an image) * blocks of groups + block
  int64_t (*grouped_wgrad_scratch)(const GroupedParams&);
  void (*grouped_wgrad)(const GroupedParams&, void* scratch, int64_t begin, int64_t end);  // a task is slice * blocks of groups + block
  int64_t (*linear_wgrad_scratch)(const LinearWgradParams&);
  void (*linear_wgrad)(const LinearWgradParams&, void* scratch, int64_t begin, int64_t end);  // a task is a block of dweight
};

const Kernels& kernels();

extern const Kernels kernels_default;
#if defined(__x86_64__)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#endif

}  // namespace fastconv::cpu

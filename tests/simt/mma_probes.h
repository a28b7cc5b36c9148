// Plans of csrc/geometry.h and csrc/cuda/conv_mma.h, for tests; the last part of probes.cu.
#include "conv_mma.h"

// Floats of partial sums: of a convolution's backward, of the norm's, of residual_scale's.
PROBE int64_t probe_partial_floats(int what, int64_t N, int64_t H, int64_t W, int64_t C, int64_t K) {
  const fastconv::ConvShape s{N, H, W, C, K};
  return what == 0 ? fastconv::conv_wgrad_floats(s) : what == 1 ? fastconv::norm_bwd_floats(s) : residual_scale_slices(s.pixels(), C) * C;
}

// The tensor cores' tiles of a convolution: fields of ConvMmaTiles, then the passes of an ldmatrix, the bytes of shared memory
// forward and backward, and whether the table chooses them.
PROBE void probe_mma_tiles(int64_t N, int64_t H, int64_t W, int64_t C, int64_t K, int64_t* out) {
  const fastconv::ConvShape s{N, H, W, C, K};
  const ConvMmaTiles t = conv_mma_tiles(s);
  const int64_t values[] = {t.tall, t.slabs, t.across, t.bands, t.stacked, t.rows, t.pitch, t.stride, t.plane, t.count, mma_passes(t),
                            conv_mma_shared(t, K, false), conv_mma_shared(t, K, true), conv_mma_pays(s, t)};
  for (int64_t v : values) *out++ = v;
}

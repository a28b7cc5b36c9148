// The pieces of window_attention on tensor cores. T is bfloat16 or float16, kD the channels of a head in shared memory.
//
// A window is cut into patches of 4 x 4 tokens, numbered row by row, and its tokens are counted patch by patch: sixteen are the rows of
// an mma, and how two tokens lie to each other is the offset of their patches and a place in the fragment. README.md draws it.
#pragma once

#include "array.cuh"
#include "window_attention_kernel.h"

namespace fastconv::cuda {

constexpr int kTokens = 16;  // of a patch
constexpr float kLog2e = 1.44269504f;
constexpr float kNever = -1e30f;  // logit of a token past the window, below any other: finite, so that its weight is 0 and not NaN

template <int kD> struct WindowBlock {
  static constexpr int kPitch = 2 * kD + 16, kPieces = kD / 8;  // of a token: bytes, and pieces of 16 bytes
  static constexpr int kThreads = 8 * kWarp;
};

// --- places

// Where the token at place i of the shifted axis lies in the map; `size` or more where it is padded.
FC_DEVICE int window_source(int i, int size, int window, int shift, bool pad_first) {
  if (pad_first) return (i + shift) % ((size + window - 1) / window * window);
  return i < size ? (i + shift) % size : size;
}

// A token: its row in the map, kPadded, or kUnreal past the window; its column and, above that, its region, which shifts tell apart.
using Place = Vec<int, 2>;
constexpr int kPadded = -1, kUnreal = -2, kColumnBits = 28;
FC_DEVICE int column_of(const Place& at) { return at[1] & ((1 << kColumnBits) - 1); }
// What the mask goes by: the region, or kUnreal.
FC_DEVICE int code_of(const Place& at) { return at[0] == kUnreal ? kUnreal : at[1] >> kColumnBits; }

// The window that a block is at: its image, and whether some pairs of its tokens are masked.
struct Window {
  int b;
  bool masked;
};

// Fills in the places of a window's tokens. Barriers before and after.
FC_DEVICE Window locate(const WindowParams& p, int window, Place* places) {
  const WindowSizes& s = p.sizes;
  const int b = window / s.of_map, inside = window - b * s.of_map, h0 = inside / s.columns * s.wh, w0 = inside % s.columns * s.ww;
  const bool last_row = h0 + s.wh >= s.H, last_column = w0 + s.ww >= s.W;
  sync_threads();
#pragma unroll 1
  for (int n = threadIdx.x; n < s.down * s.across * kTokens; n += blockDim.x) {
    const int patch = n / kTokens, row = patch / s.across * 4 + n % kTokens / 4, column = patch % s.across * 4 + n % 4;
    Place at{kUnreal, 0};
    if (row < s.wh && column < s.ww) {
      const int h = window_source(h0 + row, s.H, s.wh, p.sh, p.pad_first), w = window_source(w0 + column, s.W, s.ww, p.sw, p.pad_first);
      const int region = 2 * (last_row && row >= s.wh - p.sh) + (last_column && column >= s.ww - p.sw);
      at[0] = h < s.H && w < s.W ? h : kPadded;
      at[1] = (h < s.H && w < s.W ? w : 0) | region << kColumnBits;
    }
    store_shared(places + n, at);
  }
  sync_threads();
  return {b, (last_row && p.sh > 0) || (last_column && p.sw > 0) || s.wh % 4 != 0 || s.ww % 4 != 0};
}

// --- rows of tokens

// Tokens from `places` on of a head, to shared memory, piece by piece; `thread` of `threads` ends with the pieces that it began.
template <int kD>
FC_DEVICE void stage_tokens(const WindowParams& p, const WindowInput& x, int64_t b, int head, const Place* places, int tokens,
                            unsigned char* to, int thread, int threads) {
  constexpr int kPieces = WindowBlock<kD>::kPieces;
  const int D = p.sizes.D;
  const uint16_t* const base = static_cast<const uint16_t*>(x.data) + b * x.stride_b + head * x.stride_head;
  const uint16_t* const pad = static_cast<const uint16_t*>(x.pad) + (x.pad ? head * D : 0);
#pragma unroll 1
  for (int i = thread; i < tokens * kPieces; i += threads) {
    const int token = i / kPieces, c = i % kPieces * 8;
    const auto at = load_shared<Place>(places + token);
    const bool inside = at[0] >= 0, padded = at[0] == kPadded && x.pad != nullptr;
    const uint16_t* const from = padded ? pad : inside ? base + at[0] * x.stride_h + column_of(at) * x.stride_w : base;
    unsigned char* const here = to + token * WindowBlock<kD>::kPitch + c * 2;
    if (p.vectors) {
      const bool in = (inside || padded) && c < D;
      copy_async<16>(here, from + (in ? c : 0), in);
    } else {
#pragma unroll 1
      for (int j = 0; j < 8; ++j) {
        const bool in = (inside || padded) && c + j < D;
        store_shared(reinterpret_cast<uint16_t*>(here) + j, load_global<uint16_t>(from + (in ? c + j : 0), in));
      }
    }
  }
  copy_async_commit();
}

// Divides tokens by their norms, of which `inverse`, where it is given, keeps the reciprocals. By the threads that staged them.
template <class T, int kD> FC_DEVICE void normalize_tokens(unsigned char* rows, int tokens, float* inverse, int thread, int threads) {
  constexpr int kPieces = WindowBlock<kD>::kPieces;
#pragma unroll 1
  for (int i = thread; i < tokens * kPieces; i += threads) {
    const int token = i / kPieces;
    unsigned char* const here = rows + token * WindowBlock<kD>::kPitch + i % kPieces * 16;
    auto value = to_float(load_shared<Vec<T, 8>>(reinterpret_cast<T*>(here)));
    float sum = 0;
#pragma unroll
    for (int j = 0; j < 8; ++j) sum = fmaf(value[j], value[j], sum);
#pragma unroll
    for (int lanes = kPieces / 2; lanes > 0; lanes /= 2) sum += shuffle_xor(sum, lanes);
    const float factor = sum < 1e-24f ? 1e12f : rsqrt(sum);  // a norm of 1e-12 at least
#pragma unroll
    for (int j = 0; j < 8; ++j) value[j] *= factor;
    store_shared(reinterpret_cast<T*>(here), from_float<T>(value));
    if (inverse) store_shared(inverse + token, factor, i % kPieces == 0);
  }
}

// Sixteen tokens from shared memory to where they lie in the map; `to`: of a row of `pitch` elements for each token, this head's.
template <int kD>
FC_DEVICE void write_tokens(const WindowParams& p, const unsigned char* rows, const Place* places, uint16_t* to, int64_t b, int64_t pitch) {
  constexpr int kPieces = WindowBlock<kD>::kPieces;
  const int D = p.sizes.D;
#pragma unroll 1
  for (int i = threadIdx.x % kWarp; i < kTokens * kPieces; i += kWarp) {
    const int c = i % kPieces * 8;
    const auto at = load_shared<Place>(places + i / kPieces);
    const unsigned char* const here = rows + i / kPieces * WindowBlock<kD>::kPitch + c * 2;
    uint16_t* const out = to + (at[0] >= 0 ? ((b * p.shape.H + at[0]) * p.shape.W + column_of(at)) * pitch : 0) + c;
    if (p.vectors) {
      store_global(out, load_shared<Vec<uint32_t, 4>>(here), at[0] >= 0 && c < D);
    } else {
#pragma unroll 1
      for (int j = 0; j < 8; ++j)
        store_global(out + j, load_shared<uint16_t>(reinterpret_cast<const uint16_t*>(here) + j), at[0] >= 0 && c + j < D);
    }
  }
}

// --- fragments

// Where a lane of ldmatrix reads of sixteen tokens: their fragment of A, or with kTrans of B with the tokens summed over; and of B with
// the channels summed over.
template <int kD> FC_DEVICE const unsigned char* tall(const unsigned char* rows) {
  const int lane = threadIdx.x % kWarp;
  return rows + lane % 16 * WindowBlock<kD>::kPitch + lane / 16 * 16;
}
template <int kD> FC_DEVICE const unsigned char* wide(const unsigned char* rows) {
  const int lane = threadIdx.x % kWarp;
  return rows + (lane / 16 * 8 + lane % 8) * WindowBlock<kD>::kPitch + lane / 8 % 2 * 16;
}

// A warp's own sixteen tokens as A. Of 128 channels they stay in shared memory: sums take the registers.
template <int kD> struct OwnTokens {
  static constexpr bool kHeld = kD <= 64;
  uint32_t held[kHeld ? kD / 16 : 1][4] = {};
  const unsigned char* rows = nullptr;
  FC_DEVICE void load(const unsigned char* from) {
    rows = tall<kD>(from);
    if constexpr (kHeld) {
#pragma unroll
      for (int i = 0; i < kD / 16; ++i) ldmatrix(held[i], rows + 32 * i);
    }
  }
  FC_DEVICE void part(int i, uint32_t (&a)[4]) const {
    if constexpr (kHeld) {
#pragma unroll
      for (int j = 0; j < 4; ++j) a[j] = held[i][j];
    } else {
      ldmatrix(a, rows + 32 * i);
    }
  }
};

// acc[own token, other token] = sum over channels of own other; `rows`: the sixteen others.
template <class T, int kD> FC_DEVICE void products(float (&acc)[2][4], const OwnTokens<kD>& own, const unsigned char* rows) {
  const unsigned char* const from = wide<kD>(rows);
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) acc[i][j] = 0;
#pragma unroll
  for (int i = 0; i < kD / 16; ++i) {
    uint32_t a[4], b[4];
    own.part(i, a);
    ldmatrix(b, from + 32 * i);
    mma_m16n8k16<T>(acc[0], a, {b[0], b[1]});
    mma_m16n8k16<T>(acc[1], a, {b[2], b[3]});
  }
}
// acc[own token, channel] += sum over the sixteen others of weight[own token, other token] other.
template <class T, int kD> FC_DEVICE void add_weighted(float (&acc)[kD / 8][4], const float (&weight)[2][4], const unsigned char* rows) {
  const unsigned char* const from = tall<kD>(rows);
  uint32_t a[4];
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int j = 0; j < 2; ++j) a[2 * i + j] = from_floats<T>(weight[i][2 * j], weight[i][2 * j + 1]);
#pragma unroll
  for (int i = 0; i < kD / 16; ++i) {
    uint32_t b[4];
    ldmatrix<true>(b, from + 32 * i);
    mma_m16n8k16<T>(acc[2 * i], a, {b[0], b[1]});
    mma_m16n8k16<T>(acc[2 * i + 1], a, {b[2], b[3]});
  }
}

// --- logits

// Number of a token in its window: its bias to another is in the table at the difference of theirs, from the centre on. That of a
// patch's first token, and of another in the patch from there on:
FC_DEVICE int number_of_patch(const WindowSizes& s, int patch) { return patch / s.across * 4 * s.pitch + patch % s.across * 4; }
FC_DEVICE int number_inside(const WindowSizes& s, int token) { return token / 4 * s.pitch + token % 4; }
// Patches one after another.
struct PatchWalk {
  int number, column = 0;
  FC_DEVICE PatchWalk(const WindowSizes& s, int row) : number(row * 4 * s.pitch) {}
  FC_DEVICE void next(const WindowSizes& s) {
    number += 4;
    if (++column == s.across) column = 0, number += 4 * (s.pitch - s.across);
  }
};

// What a lane knows of its two rows of a fragment, tokens lane / 4 and 8 more of its warp's patch: of queries with kSign = -1, of keys
// with 1; and of the whole call: logits count in powers of two.
template <int kSign> struct Rows {
  int number[2], code[2];
  const float* table;
  float factor, mask_value;
  FC_DEVICE Rows(const WindowParams& p, const float* table, float factor) : table(table), factor(factor * kLog2e), mask_value(p.mask_value * kLog2e) {}
  FC_DEVICE void at(const WindowParams& p, const Place* places, int patch) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int token = threadIdx.x % kWarp / 4 + 8 * i;
      number[i] = p.sizes.centre - kSign * (number_of_patch(p.sizes, patch) + number_inside(p.sizes, token));
      code[i] = code_of(load_shared<Place>(places + patch * kTokens + token));
    }
  }
  // Products with the tokens of another patch, whose number that is, become logits. `others`: its places.
  FC_DEVICE void logits(const WindowParams& p, float (&x)[2][4], int patch_number, const Place* others, bool masked) const {
    const int pitch = p.sizes.pitch, column = threadIdx.x % 4 * 2, other = patch_number + number_inside(p.sizes, column);
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j)
        x[i][j] = fmaf(x[i][j], factor, load_shared<float>(table + number[j / 2] + kSign * (other + 2 * i * pitch + j % 2)));
    if (!masked) return;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const auto pair = load_shared<Vec<int, 4>>(reinterpret_cast<const int*>(others + 8 * i + column));
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int theirs = code_of({pair[j % 2 * 2], pair[j % 2 * 2 + 1]}), mine = code[j / 2];
        x[i][j] = mine == kUnreal || theirs == kUnreal ? kNever : x[i][j] + (mine == theirs ? 0 : mask_value);
      }
    }
  }
};

// The table of a head in powers of two, with zeros beyond the window; a barrier follows in locate().
FC_DEVICE void stage_table(const WindowParams& p, int head, float* to) {
  const WindowSizes& s = p.sizes;
  const int rows = 8 * s.down - 1;
#pragma unroll 1
  for (int i = threadIdx.x; i < rows * s.pitch; i += blockDim.x) {
    const int row = i / s.pitch - (4 * s.down - 1) + s.wh - 1, column = i % s.pitch - (4 * s.across - 1) + s.ww - 1;
    const bool in = p.table && row >= 0 && row < 2 * s.wh - 1 && column >= 0 && column < 2 * s.ww - 1;
    const int64_t position = in ? row * (2 * s.ww - 1) + column : 0;
    store_shared(to + i, load_global<float>(p.table + (in ? position * s.heads + head : 0), in) * kLog2e);
  }
}

FC_DEVICE float larger(float a, float b) { return a > b ? a : b; }
// Over the four lanes that share a row of a fragment.
FC_DEVICE float row_sum(float v) {
  v += shuffle_xor(v, 1);
  return v + shuffle_xor(v, 2);
}
FC_DEVICE float row_max(float v) {
  v = larger(v, shuffle_xor(v, 1));
  return larger(v, shuffle_xor(v, 2));
}

// Sums of a warp's sixteen tokens, in shared memory as T, for write_tokens.
template <class T, int kD> FC_DEVICE void store_tokens(unsigned char* rows, const float (&acc)[kD / 8][4], const float (&factor)[2]) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int i = 0; i < kD / 8; ++i)
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      unsigned char* const to = rows + (lane / 4 + 8 * j) * WindowBlock<kD>::kPitch + (8 * i + lane % 4 * 2) * 2;
      store_shared(reinterpret_cast<uint32_t*>(to), from_floats<T>(acc[i][2 * j] * factor[j], acc[i][2 * j + 1] * factor[j]));
    }
}

template <class Launch> int with_window_type(const WindowParams& p, Launch launch) {
  const auto with_width = [&](auto type) {
    switch (p.shape.width()) {
      case 16: return launch.template operator()<decltype(type), 16>();
      case 32: return launch.template operator()<decltype(type), 32>();
      case 64: return launch.template operator()<decltype(type), 64>();
      default: return launch.template operator()<decltype(type), 128>();
    }
  };
  return p.dtype == DType::kBFloat16 ? with_width(bf16{}) : with_width(fp16{});
}

}  // namespace fastconv::cuda

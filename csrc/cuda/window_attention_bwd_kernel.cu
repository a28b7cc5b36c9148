// window_attention on tensor cores, backward. Nothing but the inputs is kept from forward, and no sum crosses from one warp to another:
//
//   queries, twice through the keys:  the log of the sum of a row's weights, and delta = sum of P dP;  then dq = sum of dS k
//   keys, once through the queries:   dv = sum of P^T dy, dk = sum of dS^T q, and dS^T itself into the gradient of the table
//
// with S = q k^T and dP = dy v^T formed anew each time: nine products, where five would do if sums could cross.
#include "window_attention.cuh"
#include "window_attention_kernel.h"

#include "reduce_kernel.h"

namespace fastconv::cuda {
namespace {

// Places in shared memory.
struct Shared {
  Place* places;
  float* table;
  float* log_sum;
  float* delta;
  float* sums;
  float* band;
  float* pads;
  float* inverse;
  unsigned char* own_first;
  unsigned char* own_second;
  unsigned char* first;
  unsigned char* second;
};

// Two inputs' patches in rows [row, last) of the window, the first normalised, for all warps: with barriers before and after.
template <class T, int kD>
FC_DEVICE void stage_rows(const WindowParams& p, const Shared& sh, const WindowInput& first, const WindowInput& second, int64_t b, int head,
                          int begin, int stop) {
  const int tokens = (stop - begin) * kTokens;
  sync_threads();  // those before have been read
  stage_tokens<kD>(p, first, b, head, sh.places + begin * kTokens, tokens, sh.first, threadIdx.x, blockDim.x);
  stage_tokens<kD>(p, second, b, head, sh.places + begin * kTokens, tokens, sh.second, threadIdx.x, blockDim.x);
  copy_async_wait<0>();
  if (p.logit_scale) normalize_tokens<T, kD>(sh.first, tokens, nullptr, threadIdx.x, blockDim.x);
  sync_threads();
}
// A warp's own patch of two inputs, as fragments.
template <class T, int kD>
FC_DEVICE void stage_own(const WindowParams& p, const Shared& sh, const WindowInput& first, const WindowInput& second, int64_t b, int head,
                         int patch, OwnTokens<kD>& a, OwnTokens<kD>& other) {
  const int lane = threadIdx.x % kWarp;
  stage_tokens<kD>(p, first, b, head, sh.places + patch * kTokens, kTokens, sh.own_first, lane, kWarp);
  stage_tokens<kD>(p, second, b, head, sh.places + patch * kTokens, kTokens, sh.own_second, lane, kWarp);
  copy_async_wait<0>();
  if (p.logit_scale) normalize_tokens<T, kD>(sh.own_first, kTokens, sh.inverse, lane, kWarp);
  sync_warp();
  a.load(sh.own_first);
  other.load(sh.own_second);
}

// Sums of a row's weights, and of these times dP, relative to its largest logit so far, which log_sum is: of each lane's columns apart.
FC_DEVICE void add_statistics(const float (&x)[2][4], const float (&dp)[2][4], float (&log_sum)[2], float (&sum)[2], float (&delta)[2]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float top = larger(larger(larger(x[0][2 * i], x[0][2 * i + 1]), larger(x[1][2 * i], x[1][2 * i + 1])), log_sum[i]);
    const float keep = exp2(log_sum[i] - top);
    sum[i] *= keep, delta[i] *= keep, log_sum[i] = top;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float weight = exp2(x[j / 2][2 * i + j % 2] - top);
      sum[i] += weight, delta[i] = fmaf(weight, dp[j / 2][2 * i + j % 2], delta[i]);
    }
  }
}

// Gradient before the factor and, in cosine attention, the norm. Returns what the lane's rows add to the gradient of the factor.
template <class T, int kD>
FC_DEVICE float through_factor(const WindowParams& p, const OwnTokens<kD>& unit, const float* inverses, float factor, float (&grad)[kD / 8][4]) {
  const int lane = threadIdx.x % kWarp;
  float along[2] = {}, inverse[2] = {1, 1};
  if (p.logit_scale) {
    // A fragment of A holds the same columns as the sums over two runs of eight channels.
    const auto element = [](const uint32_t (&a)[4], int run, int j) {
      return to_float(T{static_cast<uint16_t>(a[run % 2 * 2 + j / 2] >> 16 * (j % 2))});
    };
#pragma unroll
    for (int i = 0; i < kD / 8; ++i) {
      uint32_t a[4];
      unit.part(i / 2, a);
#pragma unroll
      for (int j = 0; j < 4; ++j) along[j / 2] = fmaf(grad[i][j], element(a, i, j), along[j / 2]);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) along[i] = row_sum(along[i]), inverse[i] = load_shared<float>(inverses + lane / 4 + 8 * i);
    const float through[2] = {inverse[0] < 1e12f ? along[0] : 0, inverse[1] < 1e12f ? along[1] : 0};  // a smaller norm is a constant
#pragma unroll
    for (int i = 0; i < kD / 8; ++i) {
      uint32_t a[4];
      unit.part(i / 2, a);
#pragma unroll
      for (int j = 0; j < 4; ++j) grad[i][j] = fmaf(-element(a, i, j), through[j / 2], grad[i][j]);
    }
  }
#pragma unroll
  for (int i = 0; i < kD / 8; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) grad[i][j] *= factor * inverse[j / 2];
  return lane % 4 == 0 ? along[0] + along[1] : 0;
}

// Gradients of a warp's patch go out, through `rows`, and those of its padded tokens into the warp's sums. `part`: of q, k, v.
template <class T, int kD>
FC_DEVICE void write_gradient(const WindowParams& p, const Shared& sh, int64_t b, int head, int patch, int part, unsigned char* rows,
                              const float (&grad)[kD / 8][4]) {
  const int lane = threadIdx.x % kWarp;
  const WindowSizes& s = p.sizes;
  const Place* const places = sh.places + patch * kTokens;
  const bool padded[2] = {load_shared<Place>(places + lane / 4)[0] == kPadded, load_shared<Place>(places + lane / 4 + 8)[0] == kPadded};
  if (p.dpad && warp_any(padded[0] || padded[1])) {
    float* const sums = sh.pads + part * kD + lane * 2;
#pragma unroll
    for (int i = 0; i < kD / 8; ++i) {
      Vec<float, 2> sum;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float v = (padded[0] ? grad[i][j] : 0) + (padded[1] ? grad[i][2 + j] : 0);
#pragma unroll
        for (int lanes = 4; lanes < kWarp; lanes *= 2) v += shuffle_xor(v, lanes);
        sum[j] = v;
      }
      const auto before = load_shared<Vec<float, 2>>(sums + 8 * i, lane < 4);
      store_shared(sums + 8 * i, Vec<float, 2>{before[0] + sum[0], before[1] + sum[1]}, lane < 4);
    }
  }
  sync_warp();
  store_tokens<T, kD>(rows, grad, {1, 1});
  sync_warp();
  uint16_t* const to = static_cast<uint16_t*>(p.out) + (part * s.heads + head) * s.D;
  write_tokens<kD>(p, rows, places, to, b, int64_t{3} * s.heads * s.D);
  sync_warp();
}

// What the band holds goes to the relative positions that it is of: `first` is the offset of rows of its first row of patches. Each
// position is one thread's.
FC_DEVICE void fold_band(const WindowParams& p, const Shared& sh, int first) {
  const int across = p.sizes.across, pitch = p.sizes.pitch, total = 8 * p.sizes.down - 1;
  const int columns = 8 * across - 1, rows = 4 * p.plan.bands + 3;
  for (int i = threadIdx.x; i < rows * columns; i += blockDim.x) {
    const int down = i / columns - 3, right = i % columns - (4 * across - 1);  // to the query from the key, from row 4 * first on
    float sum = 0;
#pragma unroll 1
    for (int k = 0; k < 16; ++k) {  // the key's token in its patch
      const int a = down + k / 4, b = right + k % 4 + 4 * (across - 1), tile = (a >> 2) * (2 * across - 1) + (b >> 2);
      const bool in = a >= 0 && a < 4 * p.plan.bands && b >= 0 && b < 4 * (2 * across - 1);
      const int q = a % 4 * 4 + b % 4;  // the query's
      const int place = q / 8 * 128 + (k % 8 * 4 + q % 8 / 2) * 4 + k / 8 * 2 + q % 2;
      sum += load_shared<float>(sh.band + (in ? tile * static_cast<int>(kWindowBandFloats) + place : 0), in);
    }
    float* const to = sh.sums + p.sizes.centre + (4 * first + down) * pitch + right;
    const int row = 4 * first + down + 4 * p.sizes.down - 1;
    const bool in = row >= 0 && row < total;
    store_shared(in ? to : sh.sums, load_shared<float>(in ? to : sh.sums, in) + sum, in);
  }
}
FC_DEVICE void clear(float* from, int count) {  // in fours
  for (int i = threadIdx.x * 4; i < count; i += blockDim.x * 4) store_shared(from + i, Vec<float, 4>{});
}

template <class T, int kD> __global__ void __launch_bounds__(WindowBlock<kD>::kThreads, 1) window_attention_mma_bwd_kernel(WindowParams p) {
  FC_DYNAMIC_SHARED(shared);
  FC_SHARED(float, warp_sums, WindowBlock<kD>::kThreads / kWarp);
  constexpr int kToken = WindowBlock<kD>::kPitch, kPatch = kTokens * kToken;
  const WindowSizes& s = p.sizes;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, slice = blockIdx.x / s.heads, head = blockIdx.x % s.heads;
  const int across = s.across, down = s.down, patches = down * across, tokens = patches * kTokens;
  const int table_floats = (8 * down - 1) * s.pitch, band_floats = p.plan.bands * (2 * across - 1) * static_cast<int>(kWindowBandFloats);
  const int end = static_cast<int>(part_begin(p.windows, p.slices, slice + 1));
  Shared sh;
  const auto floats = [&](int byte) { return reinterpret_cast<float*>(shared + byte); };
  sh.places = reinterpret_cast<Place*>(shared + p.plan.places), sh.table = floats(p.plan.table);
  sh.log_sum = floats(p.plan.statistics), sh.delta = sh.log_sum + tokens, sh.sums = floats(p.plan.sums), sh.band = floats(p.plan.band);
  sh.pads = floats(p.plan.pads) + warp * 3 * kD, sh.inverse = floats(p.plan.inverse) + warp * kTokens;
  sh.own_first = shared + p.plan.own + warp * 2 * kPatch, sh.own_second = sh.own_first + kPatch;
  sh.first = shared + p.plan.staged, sh.second = sh.first + p.plan.rows * across * kPatch;
  const float factor = p.logit_scale ? load_global<float>(p.logit_scale + head) : p.scale;
  stage_table(p, head, sh.table);
  clear(sh.sums, table_floats);
  clear(floats(p.plan.pads), p.plan.warps * 3 * kD);
  float dfactor = 0;

  for (int window = static_cast<int>(part_begin(p.windows, p.slices, slice)); window < end; ++window) {
    const Window at = locate(p, window, sh.places);
    OwnTokens<kD> a, other;
    const auto last_of = [&](int row) { return row + p.plan.rows < down ? row + p.plan.rows : down; };

    for (int pass = 0; pass < patches; pass += p.plan.warps) {
      const int patch = pass + warp;
      const bool active = patch < patches;
      Rows<-1> mine(p, sh.table, factor);
      if (active) {
        stage_own<T, kD>(p, sh, p.q, p.dy, at.b, head, patch, a, other);
        mine.at(p, sh.places, patch);
      }
      float log_sum[2] = {kNever, kNever}, delta[2] = {}, sum[2] = {}, dq[kD / 8][4] = {};
#pragma unroll 1
      for (int round = 0; round < 2; ++round) {
        for (int row = 0; row < down; row = last_of(row)) {
          const int begin = row * across, stop = last_of(row) * across;
          if ((pass == 0 && round == 0) || p.plan.rows < down) stage_rows<T, kD>(p, sh, p.k, p.v, at.b, head, begin, stop);
          PatchWalk walk(s, row);
#pragma unroll 1
          for (int key = begin; active && key < stop; ++key, walk.next(s)) {
            float x[2][4], dp[2][4];
            products<T>(x, a, sh.first + (key - begin) * kPatch);
            products<T>(dp, other, sh.second + (key - begin) * kPatch);
            mine.logits(p, x, walk.number, sh.places + key * kTokens, at.masked);
            if (round == 0) {
              add_statistics(x, dp, log_sum, sum, delta);
            } else {
#pragma unroll
              for (int i = 0; i < 2; ++i)
#pragma unroll
                for (int j = 0; j < 4; ++j) x[i][j] = exp2(x[i][j] - log_sum[j / 2]) * (dp[i][j] - delta[j / 2]);
              add_weighted<T, kD>(dq, x, sh.first + (key - begin) * kPatch);
            }
          }
        }
        if (round == 1) continue;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float top = row_max(log_sum[i]), keep = exp2(log_sum[i] - top);
          sum[i] = row_sum(sum[i] * keep), delta[i] = row_sum(delta[i] * keep) / sum[i];
          log_sum[i] = top + log2(sum[i]);
          const int token = patch * kTokens + lane / 4 + 8 * i;
          store_shared(sh.log_sum + token, log_sum[i], active && lane % 4 == 0);
          store_shared(sh.delta + token, delta[i], active && lane % 4 == 0);
        }
      }
      if (!active) continue;
      dfactor += through_factor<T, kD>(p, a, sh.inverse, factor, dq);
      write_gradient<T, kD>(p, sh, at.b, head, patch, 0, sh.own_first, dq);
    }

    for (int pass = 0; pass < patches; pass += p.plan.warps) {
      const int patch = pass + warp, column = patch % across;
      const bool active = patch < patches;
      // Rows of patches: the last of this pass, and how far above it the warp's own lies.
      const int last_row = ((pass + p.plan.warps < patches ? pass + p.plan.warps : patches) - 1) / across, up = last_row - patch / across;
      Rows<1> mine(p, sh.table, factor);
      if (active) {
        stage_own<T, kD>(p, sh, p.k, p.v, at.b, head, patch, a, other);
        mine.at(p, sh.places, patch);
      }
      float dk[kD / 8][4] = {}, dv[kD / 8][4] = {};
      for (int row = 0; row < down; row = last_of(row)) {
        const int begin = row * across, stop = last_of(row) * across;
        if (pass == 0 || p.plan.rows < down) stage_rows<T, kD>(p, sh, p.q, p.dy, at.b, head, begin, stop);
        for (int of_row = begin; of_row < stop; of_row += across) {
          if (p.dtable) {
            clear(sh.band, band_floats);
            sync_threads();
          }
          // Of a row of patches each warp takes one after another, starting apart: with an odd number of steps no two of one row of
          // keys are ever as far from theirs, and every sum in the band has one writer between two barriers.
          const int steps = across | 1;
#pragma unroll 1
          for (int step = 0; step < steps; ++step) {
            const int i = step - column + (step < column ? steps : 0);
            if (active && i < across) {
              const int query = of_row + i;
              float x[2][4], ds[2][4];
              products<T>(x, a, sh.first + (query - begin) * kPatch);
              products<T>(ds, other, sh.second + (query - begin) * kPatch);
              mine.logits(p, x, of_row / across * 4 * s.pitch + 4 * i, sh.places + query * kTokens, at.masked);
#pragma unroll
              for (int h = 0; h < 2; ++h) {
                const int token = query * kTokens + 8 * h + lane % 4 * 2;
                const auto log_sum = load_shared<Vec<float, 2>>(sh.log_sum + token), delta = load_shared<Vec<float, 2>>(sh.delta + token);
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                  const bool never = x[h][j] == kNever;  // then dP may be NaN, and the offset another pair's too
                  x[h][j] = exp2(x[h][j] - log_sum[j % 2]);
                  ds[h][j] = never ? 0 : x[h][j] * (ds[h][j] - delta[j % 2]);
                }
                if (p.dtable) {
                  const int tile = up * (2 * across - 1) + i - column + across - 1;
                  float* const to = sh.band + tile * static_cast<int>(kWindowBandFloats) + h * 128 + lane * 4;
                  auto sums = load_shared<Vec<float, 4>>(to);
#pragma unroll
                  for (int j = 0; j < 4; ++j) sums[j] += ds[h][j];
                  store_shared(to, sums);
                }
              }
              add_weighted<T, kD>(dv, x, sh.second + (query - begin) * kPatch);
              add_weighted<T, kD>(dk, ds, sh.first + (query - begin) * kPatch);
            }
            if (p.dtable) sync_threads();
          }
          if (p.dtable) {
            fold_band(p, sh, of_row / across - last_row);
            sync_threads();
          }
        }
      }
      if (!active) continue;
      through_factor<T, kD>(p, a, sh.inverse, factor, dk);
      write_gradient<T, kD>(p, sh, at.b, head, patch, 1, sh.own_first, dk);
      write_gradient<T, kD>(p, sh, at.b, head, patch, 2, sh.own_second, dv);
    }
  }

  dfactor = warp_sum(dfactor);
  store_shared(warp_sums + warp, dfactor, lane == 0);
  sync_threads();
  const int64_t offset = slice * p.partial_floats;
  const int rows = 2 * s.wh - 1, columns = 2 * s.ww - 1, positions = p.dtable ? rows * columns : 0, D = s.D;
  for (int i = threadIdx.x; i < positions; i += blockDim.x) {
    const int below = i / columns - (s.wh - 1), right = i % columns - (s.ww - 1);
    store_global(p.dtable + offset + i * s.heads + head, load_shared<float>(sh.sums + s.centre + below * s.pitch + right));
  }
  for (int i = threadIdx.x; i < (p.dpad ? 3 * D : 0); i += blockDim.x) {
    float sum = 0;
    for (int w = 0; w < p.plan.warps; ++w) sum += load_shared<float>(floats(p.plan.pads) + (w * 3 + i / D) * kD + i % D);
    store_global(p.dpad + offset + (i / D * s.heads + head) * D + i % D, sum);
  }
  if (p.dlogit_scale && threadIdx.x == 0) {
    float sum = 0;
    for (int w = 0; w < p.plan.warps; ++w) sum += load_shared<float>(warp_sums + w);
    store_global(p.dlogit_scale + offset + head, sum);
  }
}

}  // namespace

int window_attention_mma_bwd_launch(const WindowParams& p, Stream stream) {
  return with_window_type(p, [&]<class T, int kD>() {
    return launch(window_attention_mma_bwd_kernel<T, kD>, dim3(static_cast<unsigned>(p.slices * p.shape.heads)), dim3(p.plan.warps * kWarp),
                  p.plan.shared, stream, p);
  });
}

}  // namespace fastconv::cuda

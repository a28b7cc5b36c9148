// window_attention on tensor cores, forward: a warp has a patch of queries and goes through the window's keys, which lie in shared
// memory with their values, as an online softmax.
#include "window_attention_kernel.h"

#include "window_attention.cuh"

namespace fastconv::cuda {
namespace {

// Patches of keys between two looks at the largest logit.
constexpr int kTogether = 2;

template <class T, int kD> __global__ void __launch_bounds__(WindowBlock<kD>::kThreads, kD <= 32 ? 2 : 1) window_attention_mma_fwd_kernel(WindowParams p) {
  FC_DYNAMIC_SHARED(shared);
  constexpr int kToken = WindowBlock<kD>::kPitch, kGroup = kTogether;
  const WindowSizes& s = p.sizes;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, slice = blockIdx.x / s.heads, head = blockIdx.x % s.heads;
  const int across = s.across, down = s.down, patches = down * across;
  const int end = static_cast<int>(part_begin(p.windows, p.slices, slice + 1));
  Place* const places = reinterpret_cast<Place*>(shared + p.plan.places);
  float* const table = reinterpret_cast<float*>(shared + p.plan.table);
  unsigned char* const own = shared + p.plan.own + warp * kTokens * kToken;
  unsigned char* const keys = shared + p.plan.staged;
  unsigned char* const values = keys + p.plan.rows * across * kTokens * kToken;
  const float factor = p.logit_scale ? load_global<float>(p.logit_scale + head) : p.scale;
  Rows<-1> mine(p, table, factor);
  stage_table(p, head, table);

  for (int window = static_cast<int>(part_begin(p.windows, p.slices, slice)); window < end; ++window) {
    const Window at = locate(p, window, places);
    for (int first = 0; first < patches; first += p.plan.warps) {
      const int patch = first + warp;
      const bool active = patch < patches;
      OwnTokens<kD> queries;
      float most[2] = {kNever, kNever}, sum[2] = {}, out[kD / 8][4] = {};
      if (active) stage_tokens<kD>(p, p.q, at.b, head, places + patch * kTokens, kTokens, own, lane, kWarp);
      for (int row = 0; row < down; row += p.plan.rows) {
        const int begin = row * across, last = row + p.plan.rows < down ? row + p.plan.rows : down, stop = last * across;
        const bool stage = first == 0 || p.plan.rows < down;
        if (stage) {
          const int tokens = (stop - begin) * kTokens;
          sync_threads();  // those before have been read
          stage_tokens<kD>(p, p.k, at.b, head, places + begin * kTokens, tokens, keys, threadIdx.x, blockDim.x);
          stage_tokens<kD>(p, p.v, at.b, head, places + begin * kTokens, tokens, values, threadIdx.x, blockDim.x);
          copy_async_wait<0>();
          if (p.logit_scale) normalize_tokens<T, kD>(keys, tokens, nullptr, threadIdx.x, blockDim.x);
        }
        copy_async_wait<0>();
        if (row == 0 && active && p.logit_scale) normalize_tokens<T, kD>(own, kTokens, nullptr, lane, kWarp);
        if (stage) sync_threads();
        else sync_warp();
        if (!active) continue;
        if (row == 0) {
          queries.load(own);
          mine.at(p, places, patch);
        }
        PatchWalk walk(s, row);
#pragma unroll 1
        for (int key = begin; key < stop; key += kGroup) {
          float x[kGroup][2][4], top[2] = {most[0], most[1]};
#pragma unroll
          for (int g = 0; g < kGroup; ++g) {
            if (key + g >= stop) continue;
            products<T>(x[g], queries, keys + (key + g - begin) * kTokens * kToken);
            mine.logits(p, x[g], walk.number, places + (key + g) * kTokens, at.masked);
            walk.next(s);
#pragma unroll
            for (int j = 0; j < 4; ++j) top[j / 2] = larger(larger(x[g][0][j], x[g][1][j]), top[j / 2]);
          }
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            top[i] = row_max(top[i]);
            const float keep = exp2(most[i] - top[i]);
            most[i] = top[i], sum[i] *= keep;
#pragma unroll
            for (int c = 0; c < kD / 8; ++c) out[c][2 * i] *= keep, out[c][2 * i + 1] *= keep;
          }
#pragma unroll
          for (int g = 0; g < kGroup; ++g) {
            if (key + g >= stop) continue;
#pragma unroll
            for (int i = 0; i < 2; ++i)
#pragma unroll
              for (int j = 0; j < 4; ++j) x[g][i][j] = exp2(x[g][i][j] - most[j / 2]), sum[j / 2] += x[g][i][j];
            add_weighted<T, kD>(out, x[g], values + (key + g - begin) * kTokens * kToken);
          }
        }
      }
      if (!active) continue;
      const float inverse[2] = {1 / row_sum(sum[0]), 1 / row_sum(sum[1])};
      sync_warp();
      store_tokens<T, kD>(own, out, inverse);
      sync_warp();
      uint16_t* const y = static_cast<uint16_t*>(p.out) + head * s.D;
      write_tokens<kD>(p, own, places + patch * kTokens, y, at.b, p.shape.heads * s.D);
      sync_warp();
    }
  }
}

}  // namespace

int window_attention_mma_launch(const WindowParams& p, Stream stream) {
  return with_window_type(p, [&]<class T, int kD>() {
    return launch(window_attention_mma_fwd_kernel<T, kD>, dim3(static_cast<unsigned>(p.slices * p.shape.heads)), dim3(p.plan.warps * kWarp),
                  p.plan.shared, stream, p);
  });
}

}  // namespace fastconv::cuda

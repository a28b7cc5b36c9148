// Blocks that read each other's shared memory; a part of probes.cu.

// What each thread adds up is `in` of the thread opposite in every block of its cluster, times the block's number from 1 on.
// Unless they meet first the others' values may not be there yet, and unless they meet last a block may be gone.
__global__ void cluster_kernel(const float* in, float* out, int blocks, bool meet_first, bool meet_last) {
  FC_SHARED(float, mine, kThreads);
  const int i = static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
  store_shared(mine + threadIdx.x, load_global<float>(in + i));
  if (meet_first) sync_cluster();
  float sum = 0;
  for (int rank = 0; rank < blocks; ++rank)
    sum = fmaf(static_cast<float>(rank + 1), load_cluster(mine + kThreads - 1 - threadIdx.x, rank), sum);
  store_global(out + i, sum);
  if (meet_last) sync_cluster();
}
PROBE int probe_cluster(void* in, void* out, int grid, int blocks, int meet_first, int meet_last) {
  const bool first = meet_first != 0, last = meet_last != 0;
  return launch_clusters(cluster_kernel, blocks, dim3(grid), kThreads, 0, nullptr, FLOATS(in), FLOATS(out), blocks, first, last);
}
PROBE int probe_clusters_that_fit(int blocks) { return clusters_that_fit(cluster_kernel, blocks, kThreads, 0); }

// The gradients of a linear layer's parameters on the CPU: tensors to kernel arguments.
#include "cpu/glue.h"

namespace fastconv::cpu {
namespace {

constexpr const char* kOp = "linear_wgrad";
constexpr int64_t kMaxBlockD = 192, kMaxBlockC = 384;  // its sums and panels in float fit a second level of cache of 1 MiB

// The blocks that cost the busiest thread least: products, and what is repacked for them. No choice changes a bit.
void choose_blocks(LinearWgradParams& p, int64_t threads) {
  const int64_t fewest_d = ceil_div(p.D, kMaxBlockD), fewest_c = ceil_div(p.C, kMaxBlockC);
  int64_t least = 0;
  for (int64_t d = fewest_d; d < fewest_d + threads; ++d)
    for (int64_t c = fewest_c; c < fewest_c + threads; ++c) {
      const int64_t block_d = round_up(ceil_div(p.D, d), 8), block_c = round_up(ceil_div(p.C, c), 16);
      const int64_t blocks_c = ceil_div(p.C, block_c), blocks = ceil_div(p.D, block_d) * blocks_c;
      const int64_t cost = ceil_div(blocks, threads) * (block_d + 4) * (block_c + 4);
      if (least && cost >= least) continue;
      least = cost;
      p.block_d = block_d, p.block_c = block_c, p.blocks_c = blocks_c, p.blocks = blocks;
    }
}

std::tuple<Tensor, Tensor> linear_wgrad(Tensor dy, Tensor x, bool need_dbias) {
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(dy.dim() == 2 && x.dim() == 2, kOp, ": dy and x must have two axes, got ", shape_string(dy), " and ", shape_string(x));
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, kOp, ": x must be float32 or float64");
  LinearWgradParams p{};
  p.rows = x.size(0), p.C = x.size(1), p.D = dy.size(1);
  check_like(kOp, "x", x, {p.rows, p.C}, dtype);
  check_like(kOp, "dy", dy, {p.rows, p.D}, dtype);
  STD_TORCH_CHECK(p.C > 0, kOp, ": x must have channels, got ", shape_string(x));
  if (p.rows == 0 || p.D == 0) return {torch::stable::new_zeros(x, {p.D, p.C}), torch::stable::new_zeros(x, {need_dbias ? p.D : 0})};
  Tensor dweight = empty(x, {p.D, p.C}, dtype), dbias = need_dbias ? empty(x, {p.D}, dtype) : nothing(x, dtype);
  choose_blocks(p, torch::stable::get_num_threads());
  p.dy = array(dy), p.x = array(x), p.dweight = mutable_array(dweight);
  if (need_dbias) p.dbias = mutable_array(dbias);
  run(p, p.blocks, kernels().linear_wgrad_scratch, kernels().linear_wgrad);
  return {dweight, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastconv, CPU, m) { m.impl("linear_wgrad", TORCH_BOX(&linear_wgrad)); }

}  // namespace fastconv::cpu

"""Triton kernels of gelu_linear's passes over activations (see fastconv/ops/gelu_linear.py)."""

import triton
import triton.language as tl

from ._activation import activate, activation_slope
from ._common import launch

CONFIG = {"BLOCK": 1024, "num_warps": 4}  # 8 elements a thread. By resources, not yet measured on a GPU.


@triton.jit
def gelu_linear_fwd_kernel(x, y, count, ACT: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i, mask=i < count, other=0.0).to(tl.float32)
    tl.store(y + i, activate(value, ACT).to(y.dtype.element_ty), mask=i < count)


@triton.jit
def gelu_linear_bwd_kernel(
    dy,  # (count,)
    x,  # (count,)
    dx,  # (count,)
    count,
    RECOMPUTE: tl.constexpr,  # the activation of x takes the place of dy
    ACT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i, mask=i < count, other=0.0).to(tl.float32)
    grad = tl.load(dy + i, mask=i < count, other=0.0).to(tl.float32)
    tl.store(dx + i, (grad * activation_slope(value, ACT)).to(dx.dtype.element_ty), mask=i < count)
    if RECOMPUTE:
        tl.store(dy + i, activate(value, ACT).to(dy.dtype.element_ty), mask=i < count)


def fwd(x, tanh, out_dtype):
    y = x.new_empty(x.shape, dtype=out_dtype)
    count = x.numel()
    if count > 0:
        launch(gelu_linear_fwd_kernel, triton.cdiv(count, CONFIG["BLOCK"]), x, x, y, count, ACT=1 + tanh, **CONFIG)
    return y


def bwd(dy, x, tanh, recompute):
    dx, count = x.new_empty(x.shape), x.numel()
    if count > 0:
        constants = dict(RECOMPUTE=recompute, ACT=1 + tanh, **CONFIG)
        launch(gelu_linear_bwd_kernel, triton.cdiv(count, CONFIG["BLOCK"]), x, dy, x, dx, count, **constants)
    return dx

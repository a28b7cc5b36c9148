"""GELU and its derivative in float32, for the kernels that recompute it. ACT is a value of global_response_norm's ACTIVATIONS."""

import triton
import triton.language as tl


@triton.jit
def activate(x, ACT: tl.constexpr):
    if ACT == 0:
        return x
    elif ACT == 1:
        return x * (0.5 * (1.0 + tl.erf(x * 0.7071067811865476)))
    else:
        return x / (1.0 + tl.exp(-1.5957691216057308 * x * (1.0 + 0.044715 * x * x)))


@triton.jit
def activation_slope(x, ACT: tl.constexpr):
    if ACT == 0:
        return tl.full(x.shape, 1.0, tl.float32)
    elif ACT == 1:
        return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    else:
        e = tl.exp(-1.5957691216057308 * tl.abs(x) * (1.0 + 0.044715 * x * x))  # of what is negative: 1 - s keeps its digits
        larger = 1.0 / (1.0 + e)
        s = tl.where(x < 0, e * larger, larger)
        return s + x * (e * larger * larger) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)

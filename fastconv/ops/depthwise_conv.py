"""Hub of `depthwise_conv`: check, reference, raw ops, Function and public function."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from . import _registry
from ._checks import check_device, check_float, check_vector, dense, resolve_dtypes, without_autocast
from ._function import first_order_only, needs_grad
from ._layout import in_nchw

OP = "depthwise_conv"


class Shape(NamedTuple):
    """Sizes of one call: N images of H x W pixels and C channels, filters of K x K taps."""

    N: int
    H: int
    W: int
    C: int
    K: int


def check_conv(op: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> Shape:
    """Validate the arguments that depthwise_conv and depthwise_conv_norm share."""
    check_float(op, "x", x)
    check_float(op, "weight", weight)
    if x.dim() != 4:
        raise ValueError(f"{op}: x must be (N, H, W, C), got {tuple(x.shape)}; add the batch dimension with x[None]")
    N, H, W, C = x.shape
    if weight.dim() != 4 or weight.shape[0] != C or weight.shape[1] != 1:
        raise ValueError(
            f"{op}: weight must be (C, 1, K, K) with C={C}, got {tuple(weight.shape)}; "
            "x is NHWC: permute an NCHW tensor with x.permute(0, 2, 3, 1)"
        )
    K = weight.shape[2]
    if weight.shape[3] != K or K % 2 == 0:
        raise ValueError(
            f"{op}: weight must have a square kernel of odd size, got {K} x {weight.shape[3]}; use torch.nn.functional.conv2d for others"
        )
    check_vector(op, "bias", bias, C)
    if bias is not None and bias.dtype != weight.dtype:
        raise TypeError(f"{op}: bias must have the dtype of weight ({weight.dtype}), got {bias.dtype}")
    check_device(op, x, weight=weight, bias=bias)
    return Shape(N, H, W, C, K)


def reference(x, weight, bias=None, compute_dtype=None, out_dtype=None):
    """Plain PyTorch, in any dtype: the eager backend, and in float64 the truth of the tests."""
    compute_dtype = compute_dtype or x.dtype
    out_dtype = out_dtype or compute_dtype
    if x.numel() == 0:  # conv2d refuses maps without pixels; keep the graph, so that gradients are zeros
        zero = weight.sum() * 0 + (0 if bias is None else bias.sum() * 0)
        return (x + zero).to(out_dtype)
    with without_autocast(x.device):
        y = F.conv2d(
            x.permute(0, 3, 1, 2).to(compute_dtype),
            weight.to(compute_dtype),
            None if bias is None else bias.to(compute_dtype),
            padding=weight.shape[-1] // 2,
            groups=weight.shape[0],
        )
        return y.permute(0, 2, 3, 1).to(out_dtype)


def flops(x_shape, K: int) -> int:
    """Floating-point operations of one pass over the taps (a multiply-add counts as two)."""
    N, H, W, C = x_shape
    return 2 * N * H * W * C * K * K


# Raw ops. Maps are contiguous NHWC, but x in backward, which is `in_nchw`. A gradient that is not needed comes back as an empty
# tensor. dweight and dbias have weight's dtype, dx has x's.
SCHEMAS = {
    "depthwise_conv_fwd": "(Tensor x, Tensor weight, Tensor? bias, ScalarType out_dtype) -> Tensor",
    "depthwise_conv_bwd": "(Tensor dy, Tensor x, Tensor weight, bool need_dx, bool need_dweight)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias)",
}


def _fake_fwd(x, weight, bias, out_dtype):
    return x.new_empty(x.shape, dtype=out_dtype)


def _fake_bwd(dy, x, weight, need_dx, need_dweight):
    dx = x.new_empty(dy.shape if need_dx else (0,))
    dweight = weight.new_empty(weight.shape if need_dweight else (0,))
    return dx, dweight, weight.new_empty((weight.shape[0],) if need_dweight else (0,))


def _flops_fwd(x_shape, weight_shape, *args, **kwargs):
    return flops(x_shape, weight_shape[-1])


def _flops_bwd(dy_shape, x_shape, weight_shape, need_dx, need_dweight, *args, **kwargs):
    return flops(dy_shape, weight_shape[-1]) * (int(need_dx) + int(need_dweight))


_registry.define(
    OP,
    SCHEMAS,
    {"depthwise_conv_fwd": _fake_fwd, "depthwise_conv_bwd": _fake_bwd},
    {"depthwise_conv_fwd": _flops_fwd, "depthwise_conv_bwd": _flops_bwd},
    backends=("cpu", "cuda", "triton"),
)


class DepthwiseConv(torch.autograd.Function):
    """Autograd of depthwise_conv; use the function, which checks and chooses the backend."""

    @staticmethod
    def forward(ctx, x, weight, bias, out_dtype, backend):
        ctx.backend = backend
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight)
        return _registry.raw("depthwise_conv_fwd", backend)(x, weight, bias, out_dtype)

    @staticmethod
    @first_order_only(OP)
    def backward(ctx, saved, dy):
        if dy is None:
            return None, None, None, None, None
        x, weight = saved
        need_dx, need_dweight, need_dbias = ctx.needs_input_grad[:3]
        bwd = _registry.raw("depthwise_conv_bwd", ctx.backend)
        dx, dweight, dbias = bwd(dy.contiguous(), in_nchw(x, "NHWC", True), weight, need_dx, need_dweight or need_dbias)
        return dx if need_dx else None, dweight if need_dweight else None, dbias if need_dbias else None, None, None


def depthwise_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    compute_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Depthwise convolution with stride 1 and "same" zero padding, channels last.

    y[n, h, w, c] = bias[c] + sum_{i, j} weight[c, 0, i, j] * x[n, h + i - K // 2, w + j - K // 2, c]

    Args:
        x: (N, H, W, C) float32 | bfloat16 | float16 | float64. Any strides; contiguous costs no copy. An NCHW tensor
            in channels_last format is this after `x.permute(0, 2, 3, 1)`.
        weight: (C, 1, K, K), any odd K (3, 5 and 7 are fast); the dtype of x unless compute_dtype is given.
        bias: (C,) of weight's dtype, or None.
        compute_dtype: lowest precision in which products may be formed; default x.dtype. Under autocast, pass its
            dtype: x and the parameters then keep their own dtypes, and so do their gradients.
        out_dtype: dtype of the result; default compute_dtype.

    Returns:
        (N, H, W, C), contiguous. Sums are accumulated in float32 (float64 for float64).

    Raises:
        ValueError: a shape or device does not fit. TypeError: a dtype does not fit. RuntimeError: a forced backend
        cannot run the call, or a second derivative is asked for.

    Deterministic: equal inputs give equal bits, whatever the number of threads. NaN or Inf in x reaches exactly the
    outputs whose window holds it; an Inf in weight too, but for the Triton kernels, where it meets the padding as NaN.

    Source: Howard et al. 2017 (MobileNets), equation 3; the 7x7 form is Liu et al. 2022 (ConvNeXt), section 2.5.
    """
    check_conv(OP, x, weight, bias)
    compute_dtype, out_dtype = resolve_dtypes(OP, x, weight, compute_dtype, out_dtype)
    backend = _registry.select(OP, x, weight, bias).backend
    if backend == "eager":
        return reference(x, weight, bias, compute_dtype, out_dtype)
    x, weight, bias = dense(x), dense(weight), dense(bias)
    if not needs_grad(x, weight, bias):
        return _registry.raw("depthwise_conv_fwd", backend)(x, weight, bias, out_dtype)
    return DepthwiseConv.apply(x, weight, bias, out_dtype, backend)

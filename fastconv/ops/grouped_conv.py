"""Hub of `grouped_conv`: check, reference, raw ops, Function and public function."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from . import _grouped, _registry
from ._checks import check_device, check_float, dense, resolve_dtypes, without_autocast
from ._function import first_order_only, needs_grad
from ._grouped import Shape, is_nhwc, pair
from ._layout import in_format, in_layout, in_nchw

OP = "grouped_conv"
KERNELS = (1, 3, 5, 7)


def check(x, weight, bias=None, stride=1, padding=0, groups=1) -> Shape:
    check_float(OP, "x", x)
    check_float(OP, "weight", weight)
    if x.dim() != 4:
        raise ValueError(f"{OP}: x must be (N, C, H, W), got {tuple(x.shape)}; add the batch dimension with x[None]")
    N, C, H, W = x.shape
    if not isinstance(groups, int) or groups < 1 or C % groups:
        raise ValueError(f"{OP}: groups must divide the channels of x, C={C}, got {groups!r}")
    if weight.dim() != 4 or weight.shape[1] * groups != C or weight.shape[0] % groups or not weight.shape[0]:
        raise ValueError(
            f"{OP}: weight must be (C_out, C / groups, K, K) with C={C} and groups={groups}, which divides C_out, "
            f"got {tuple(weight.shape)}; x is NCHW: permute an NHWC tensor with x.permute(0, 3, 1, 2)"
        )
    K = weight.shape[2]
    if weight.shape[3] != K or K not in KERNELS:
        raise ValueError(
            f"{OP}: weight must have a square kernel of size 1, 3, 5 or 7, got {K} x {weight.shape[3]}; "
            "use torch.nn.functional.conv2d for others"
        )
    if bias is not None:
        check_float(OP, "bias", bias)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"{OP}: bias must be (C_out,) with C_out={weight.shape[0]}, got {tuple(bias.shape)}")
        if bias.dtype != weight.dtype:
            raise TypeError(f"{OP}: bias must have the dtype of weight ({weight.dtype}), got {bias.dtype}; convert one")
    check_device(OP, x, weight=weight, bias=bias)
    shape = Shape(N, C, H, W, weight.shape[0], K, pair(OP, "stride", stride, 1), pair(OP, "padding", padding, 0), groups)
    if H < 1 or W < 1 or H + 2 * shape.padding[0] < K or W + 2 * shape.padding[1] < K:
        raise ValueError(f"{OP}: x must hold the kernel of {K} x {K} with padding {shape.padding}, got a map of {H} x {W}; pad more")
    return shape


def reference(x, weight, bias=None, stride=1, padding=0, groups=1, compute_dtype=None):
    """Plain PyTorch, in any dtype: the eager backend, and in float64 the truth of the tests."""
    dtype = compute_dtype or x.dtype
    with without_autocast(x.device):
        return F.conv2d(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype), stride, padding, 1, groups)


# Raw ops. x, dy and dx are contiguous, (N, H, W, C) with nhwc, else (N, C, H, W); y, and x in backward, are `in_nchw`.
# A gradient that is not needed comes back as an empty tensor. dweight and dbias have weight's dtype, dx has x's.
_GEOMETRY = "int stride_h, int stride_w, int padding_h, int padding_w, int groups, bool nhwc"
SCHEMAS = {
    "grouped_conv_fwd": f"(Tensor x, Tensor weight, Tensor? bias, {_GEOMETRY}, ScalarType out_dtype) -> Tensor",
    "grouped_conv_bwd": f"(Tensor dy, Tensor x, Tensor weight, {_GEOMETRY}, bool need_dx, bool need_dweight)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias)",
}


def _fake_fwd(x, weight, bias, stride_h, stride_w, padding_h, padding_w, groups, nhwc, out_dtype):
    N, C, H, W = (x.permute(0, 3, 1, 2) if nhwc else x).shape
    _, C, H, W = Shape(N, C, H, W, weight.shape[0], weight.shape[2], (stride_h, stride_w), (padding_h, padding_w), groups).out
    memory_format = torch.channels_last if nhwc else torch.contiguous_format
    return torch.empty(N, C, H, W, dtype=out_dtype, device=x.device, memory_format=memory_format)


def _fake_bwd(dy, x, weight, stride_h, stride_w, padding_h, padding_w, groups, nhwc, need_dx, need_dweight):
    N, C, H, W = x.shape
    dx = x.new_empty(((N, H, W, C) if nhwc else x.shape) if need_dx else (0,))
    return dx, *(weight.new_empty(size if need_dweight else (0,)) for size in (weight.shape, weight.shape[:1]))


def flops(y_shape, weight_shape) -> int:
    """Floating-point operations of one pass over the taps (a multiply-add counts as two). y in either layout."""
    return 2 * math.prod(weight_shape[1:]) * math.prod(y_shape)


def _flops_fwd(x_shape, weight_shape, *args, out_shape=None, **kwargs):
    return flops(out_shape, weight_shape)


def _flops_bwd(dy_shape, x_shape, weight_shape, *args, **kwargs):
    need_dx, need_dweight = args[-2:]
    return flops(dy_shape, weight_shape) * (int(need_dx) + int(need_dweight))


_registry.define(
    OP,
    SCHEMAS,
    {"grouped_conv_fwd": _fake_fwd, "grouped_conv_bwd": _fake_bwd},
    {"grouped_conv_fwd": _flops_fwd, "grouped_conv_bwd": _flops_bwd},
    backends=("cpu", "cuda", "triton"),
)


class GroupedConv(torch.autograd.Function):
    """Autograd of grouped_conv, each pass by our kernel or torch's; use the function, which checks and chooses."""

    @staticmethod
    def forward(ctx, x, weight, bias, shape, nhwc, dtype, backend, passes):
        ctx.shape, ctx.nhwc, ctx.dtype, ctx.backend, ctx.passes = shape, nhwc, dtype, backend, passes
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return _forward(x, weight, bias, shape, nhwc, dtype, backend) if passes.fwd else reference(x, weight, bias, *shape[-3:], dtype)

    @staticmethod
    @first_order_only(OP)
    def backward(ctx, saved, dy):
        if dy is None:
            return (None,) * 8
        x, weight = saved
        shape, nhwc, dtype, passes = ctx.shape, ctx.nhwc, ctx.dtype, ctx.passes
        need_dx, need_dweight, need_dbias = ctx.needs_input_grad[:3]
        dx = dweight = dbias = None
        ours = need_dx and passes.dx, (need_dweight or need_dbias) and passes.dweight
        if any(ours):
            bwd = _registry.raw("grouped_conv_bwd", ctx.backend)
            maps = in_layout(dy, "NCHW", nhwc), in_nchw(x, "NCHW", nhwc)
            dx, dweight, dbias = bwd(*maps, weight.contiguous(), *shape.stride, *shape.padding, shape.groups, nhwc, *ours)
            dx = in_format(dx, "NCHW", nhwc) if ours[0] else None
        theirs = [need_dx and not ours[0], need_dweight and not ours[1], need_dbias and not ours[1]]
        if any(theirs):
            settings = [weight.shape[0]], shape.stride, shape.padding, (1, 1), False, (0, 0), shape.groups
            grads = torch.ops.aten.convolution_backward(dy, x.to(dtype), weight.to(dtype), *settings, theirs)
            dx = grads[0].to(x.dtype) if theirs[0] else dx
            dweight = grads[1].to(weight.dtype) if theirs[1] else dweight
            dbias = grads[2].to(ctx.bias_dtype) if theirs[2] else dbias
        return dx if need_dx else None, dweight if need_dweight else None, dbias if need_dbias else None, *(None,) * 5


def _forward(x, weight, bias, shape, nhwc, dtype, backend):
    """As the raw op."""
    fwd = _registry.raw("grouped_conv_fwd", backend)
    return fwd(in_layout(x, "NCHW", nhwc), dense(weight), dense(bias), *shape.stride, *shape.padding, shape.groups, nhwc, dtype)


def grouped_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    groups: int = 1,
    *,
    compute_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Grouped two-dimensional convolution, as torch.nn.functional.conv2d without dilation.

    y[n, o, h, w] = bias[o] + sum_{c, i, j} weight[o, c, i, j] * x[n, g C / groups + c, h stride + i - padding, w stride + j - padding]
    with g = o // (C_out / groups), the group of output o, and c in [0, C / groups).

    Args:
        x: (N, C, H, W) float32 | bfloat16 | float16 | float64, contiguous or in channels_last without a copy.
        weight: (C_out, C / groups, K, K) with K of 1, 3, 5 or 7; the dtype of x unless compute_dtype is given.
        bias: (C_out,) of weight's dtype, or None.
        stride, padding: pixels, one integer for both axes or (height, width).
        groups: divides C and C_out.
        compute_dtype: lowest precision in which products may be formed, and the dtype of the result; default x.dtype. Under
            autocast, pass its dtype: x and the parameters then keep their own dtypes, and so do their gradients.

    Returns:
        (N, C_out, H', W') with H' = (H + 2 padding - K) // stride + 1, in channels_last where x or weight is, else contiguous.
        Sums are accumulated in float32 (float64 for float64).

    Raises:
        ValueError: a shape or device does not fit. TypeError: a dtype does not fit. RuntimeError: a forced backend
        cannot run the call, or a second derivative is asked for.

    Deterministic: equal inputs give equal bits, whatever the number of threads. NaN or Inf in x reaches exactly the outputs
    whose window holds it; in a weight or dy it may meet the padding too, and never leaves its group. Where torch's own kernel is
    as fast, by a committed table, that runs ("native"), with all derivatives.

    Source: Krizhevsky et al. 2012 (AlexNet), section 3.5; Xie et al. 2017 (ResNeXt), section 3.
    """
    shape = check(x, weight, bias, stride, padding, groups)
    dtype, _ = resolve_dtypes(OP, x, weight, compute_dtype, None)
    choice, passes = _grouped.choose(OP, x, weight, bias, shape, dtype)
    if choice.backend in ("eager", "native"):
        return reference(x, weight, bias, *shape[-3:], dtype)
    nhwc = is_nhwc(x, weight)
    if not needs_grad(x, weight, bias):
        return _forward(x, weight, bias, shape, nhwc, dtype, choice.backend)
    return GroupedConv.apply(x, weight, bias, shape, nhwc, dtype, choice.backend, passes)

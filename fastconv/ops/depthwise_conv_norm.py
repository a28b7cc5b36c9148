"""Hub of `depthwise_conv_norm`: check, reference, raw ops, Function and public function."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from . import _registry
from ._checks import check_device, check_vector, dense, resolve_dtypes, without_autocast
from ._function import first_order_only, needs_grad
from ._layout import in_nchw
from .depthwise_conv import Shape, check_conv
from .depthwise_conv import flops as conv_flops
from .depthwise_conv import reference as conv_reference

OP = "depthwise_conv_norm"


def check(x, weight, bias, norm_weight, norm_bias) -> Shape:
    shape = check_conv(OP, x, weight, bias)
    for name, tensor in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if tensor is None:
            raise ValueError(f"{OP}: {name} must be (C,) with C={shape.C}, got None; pass ones and zeros for a norm without parameters")
        check_vector(OP, name, tensor, shape.C)
    if norm_bias.dtype != norm_weight.dtype:
        raise TypeError(f"{OP}: norm_bias must have the dtype of norm_weight ({norm_weight.dtype}), got {norm_bias.dtype}")
    if (norm_weight.dtype == torch.float64) != (x.dtype == torch.float64):
        raise TypeError(
            f"{OP}: float64 cannot be mixed with other dtypes: x is {x.dtype}, norm_weight {norm_weight.dtype}; convert all of them"
        )
    check_device(OP, x, norm_weight=norm_weight, norm_bias=norm_bias)
    return shape


def reference(x, weight, bias, norm_weight, norm_bias, eps=1e-6, compute_dtype=None, out_dtype=None, shortcut=False):
    """Plain PyTorch, in any dtype: the eager backend, and in float64 the truth of the tests."""
    compute_dtype = compute_dtype or x.dtype
    z = conv_reference(x, weight, bias, compute_dtype, compute_dtype)
    with without_autocast(x.device):
        norm_dtype = torch.promote_types(compute_dtype, norm_weight.dtype)
        y = F.layer_norm(z.to(norm_dtype), (z.shape[-1],), norm_weight.to(norm_dtype), norm_bias.to(norm_dtype), eps)
        y = y.to(out_dtype or compute_dtype)
    return (y, x) if shortcut else y


def flops(x_shape, K: int) -> int:
    """Convolution, plus 8 operations an element for the norm (mean, centred square, normalise, scale and shift)."""
    N, H, W, C = x_shape
    return conv_flops(x_shape, K) + 8 * N * H * W * C


# Raw ops. Maps are contiguous NHWC, but x in backward, which is `in_nchw`. `save` asks for what backward needs: z, the
# convolution's output (N, H * W, C) in z_dtype, and mean and rstd, (N, H, W) in the accumulation dtype; without it they come
# back empty. So does a gradient that is not needed. dx holds dshortcut, in its shape and in the dtype of x, where that is given.
SCHEMAS = {
    "depthwise_conv_norm_fwd": "(Tensor x, Tensor weight, Tensor? bias, Tensor norm_weight, Tensor norm_bias, float eps,"
    " ScalarType z_dtype, ScalarType out_dtype, bool save) -> (Tensor y, Tensor z, Tensor mean, Tensor rstd)",
    "depthwise_conv_norm_bwd": "(Tensor dy, Tensor x, Tensor weight, Tensor norm_weight, Tensor z, Tensor mean, Tensor rstd,"
    " Tensor? dshortcut, bool need_dx, bool need_dweight, bool need_dnorm)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dnorm_weight, Tensor dnorm_bias)",
}


def _fake_fwd(x, weight, bias, norm_weight, norm_bias, eps, z_dtype, out_dtype, save):
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    N, H, W, C = x.shape
    rows = x.shape[:-1] if save else (0,)
    y = x.new_empty(x.shape, dtype=out_dtype)
    z = x.new_empty((N, H * W, C) if save else (0,), dtype=z_dtype)
    return y, z, x.new_empty(rows, dtype=acc), x.new_empty(rows, dtype=acc)


def _fake_bwd(dy, x, weight, norm_weight, z, mean, rstd, dshortcut, need_dx, need_dweight, need_dnorm):
    C = weight.shape[0]
    dx = x.new_empty(dy.shape if need_dx else (0,))
    dweight = weight.new_empty(weight.shape if need_dweight else (0,))
    dbias = weight.new_empty((C,) if need_dweight else (0,))
    dnorm = (C,) if need_dnorm else (0,)
    return dx, dweight, dbias, norm_weight.new_empty(dnorm), norm_weight.new_empty(dnorm)


def _flops_fwd(x_shape, weight_shape, *args, **kwargs):
    return flops(x_shape, weight_shape[-1])


def _flops_bwd(dy_shape, x_shape, weight_shape, norm, z, mean, rstd, dshortcut, need_dx, need_dweight, need_dnorm, **kwargs):
    N, H, W, C = dy_shape
    return conv_flops(dy_shape, weight_shape[-1]) * (int(need_dx) + int(need_dweight)) + (14 + (dshortcut is not None)) * N * H * W * C


_registry.define(
    OP,
    SCHEMAS,
    {"depthwise_conv_norm_fwd": _fake_fwd, "depthwise_conv_norm_bwd": _fake_bwd},
    {"depthwise_conv_norm_fwd": _flops_fwd, "depthwise_conv_norm_bwd": _flops_bwd},
    backends=("cpu", "cuda", "triton"),
)


class DepthwiseConvNorm(torch.autograd.Function):
    """Autograd of depthwise_conv_norm; use the function, which checks and chooses the backend."""

    @staticmethod
    def forward(ctx, x, weight, bias, norm_weight, norm_bias, eps, z_dtype, out_dtype, shortcut, backend):
        fwd = _registry.raw("depthwise_conv_norm_fwd", backend)
        y, z, mean, rstd = fwd(x, weight, bias, norm_weight, norm_bias, eps, z_dtype, out_dtype, True)
        ctx.backend = backend
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, norm_weight, z, mean, rstd, bias)  # bias: for first_order_only
        return (y, x) if shortcut else y  # autograd makes x a view with this node behind it, whose gradient backward gets

    @staticmethod
    @first_order_only(OP)
    def backward(ctx, saved, dy, dshortcut=None):
        if dy is None:
            return (dshortcut, *(None,) * 9)
        need_dx, need_dweight, need_dbias, need_dgamma, need_dbeta = ctx.needs_input_grad[:5]
        bwd = _registry.raw("depthwise_conv_norm_bwd", ctx.backend)
        dshortcut = None if dshortcut is None or not need_dx else dshortcut.contiguous()
        x, *others, _ = saved
        maps = dy.contiguous(), in_nchw(x, "NHWC", True)
        grads = bwd(*maps, *others, dshortcut, need_dx, need_dweight or need_dbias, need_dgamma or need_dbeta)
        return *(g if needed else None for g, needed in zip(grads, ctx.needs_input_grad[:5])), *(None,) * 5


def depthwise_conv_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    eps: float = 1e-6,
    *,
    compute_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
    shortcut: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Depthwise convolution followed by LayerNorm over the channels, in one op (the head of a ConvNeXt block).

    z = depthwise_conv(x, weight, bias);  y = (z - mean_c z) / sqrt(var_c z + eps) * norm_weight + norm_bias
    with shortcut:  backward adds the shortcut's gradient where it stores x's:  dx = dshortcut + (dy/dx)^T dy

    Args:
        x: (N, H, W, C) float32 | bfloat16 | float16 | float64. Any strides; contiguous costs no copy. An NCHW tensor
            in channels_last format is this after `x.permute(0, 2, 3, 1)`.
        weight: (C, 1, K, K), any odd K (3, 5 and 7 are fast); the dtype of x unless compute_dtype is given.
        bias: (C,) of weight's dtype, or None.
        norm_weight, norm_bias: (C,), float32 | bfloat16 | float16 whatever x is; float64 with float64.
        eps: added to the (biased) variance.
        compute_dtype: lowest precision in which products may be formed, and the dtype in which z is kept for backward;
            default x.dtype. Under autocast, pass its dtype: x and the parameters then keep their own dtypes, and so do
            their gradients.
        out_dtype: dtype of the result; default compute_dtype.
        shortcut: return (y, x), for a residual block, whose sum takes this x: its gradient then costs backward one read of it,
            and no pass of its own.

    Returns:
        (N, H, W, C), contiguous. Sums and statistics are accumulated in float32 (float64 for float64); the variance in
        two passes. With shortcut also x, made contiguous: where x requires a gradient a view of it, which is not to be
        written over in place (autograd raises). Its gradient is added in float32.

    Raises:
        ValueError: a shape or device does not fit. TypeError: a dtype does not fit. RuntimeError: a forced backend
        cannot run the call, or a second derivative is asked for.

    Deterministic: equal inputs give equal bits, whatever the number of threads. Keeps z and two statistics a pixel for
    backward; keeps nothing where no input requires a gradient.

    Source: Liu et al. 2022 (A ConvNet for the 2020s), figure 4; Ba et al. 2016 (Layer Normalization), equations 3, 4.
    """
    check(x, weight, bias, norm_weight, norm_bias)
    compute_dtype, out_dtype = resolve_dtypes(OP, x, weight, compute_dtype, out_dtype)
    backend = _registry.select(OP, x, weight, bias, norm_weight, norm_bias).backend
    if backend == "eager":
        return reference(x, weight, bias, norm_weight, norm_bias, eps, compute_dtype, out_dtype, shortcut)
    x, weight, bias, norm_weight, norm_bias = map(dense, (x, weight, bias, norm_weight, norm_bias))
    if not needs_grad(x, weight, bias, norm_weight, norm_bias):
        fwd = _registry.raw("depthwise_conv_norm_fwd", backend)
        y = fwd(x, weight, bias, norm_weight, norm_bias, eps, compute_dtype, out_dtype, False)[0]
        return (y, x) if shortcut else y
    joined = shortcut and x.requires_grad  # else a frozen x would come back as one that requires a gradient
    out = DepthwiseConvNorm.apply(x, weight, bias, norm_weight, norm_bias, eps, compute_dtype, out_dtype, joined, backend)
    return (out, x) if shortcut and not joined else out

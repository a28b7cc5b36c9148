"""Hub of `global_response_norm`: check, reference, raw ops, Function and public function."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from . import _registry
from ._checks import check_device, check_float, check_vector, dense, names, without_autocast
from ._function import first_order_only, needs_grad

OP = "global_response_norm"
ACTIVATIONS = {None: 0, "gelu": 1, "gelu_tanh": 2}


def check(x, weight, bias, act=None, out_dtype=None) -> torch.dtype:
    """Returns the dtype of the result."""
    check_float(OP, "x", x)
    if x.dim() != 4:
        raise ValueError(f"{OP}: x must be (N, H, W, C), got {tuple(x.shape)}; an NCHW tensor is passed as x.permute(0, 2, 3, 1)")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            raise ValueError(f"{OP}: {name} must be (C,) with C={x.shape[-1]}, got None; pass zeros")
        check_vector(OP, name, tensor, x.shape[-1])
    if bias.dtype != weight.dtype:
        raise TypeError(f"{OP}: bias must have the dtype of weight ({weight.dtype}), got {bias.dtype}; convert one")
    if act not in ACTIVATIONS:
        raise ValueError(f"{OP}: act must be one of {', '.join(map(repr, ACTIVATIONS))}, got {act!r}")
    check_device(OP, x, weight=weight, bias=bias)
    dtype = out_dtype or torch.promote_types(x.dtype, weight.dtype)
    if dtype not in _registry.FLOAT_DTYPES:
        raise TypeError(f"{OP}: out_dtype must be one of {names(_registry.FLOAT_DTYPES)} or None, got {dtype}")
    involved = {x.dtype, weight.dtype, dtype}
    if torch.float64 in involved and len(involved) > 1:
        raise TypeError(f"{OP}: float64 cannot be mixed with other dtypes, got {sorted(map(str, involved))}; convert all of them")
    return dtype


def reference(x, weight, bias, eps=1e-6, act=None, out_dtype=None):
    """Plain PyTorch, in any dtype: the eager backend, and in float64 the truth of the tests.

    Half precision is computed in float32 and rounded once: the squares of a large map leave float16's range.
    """
    out_dtype = out_dtype or torch.promote_types(x.dtype, weight.dtype)
    with without_autocast(x.device):
        wide = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
        a = x.to(wide)
        if act is not None:
            a = F.gelu(a, approximate="tanh" if act == "gelu_tanh" else "none")
        norm = torch.linalg.vector_norm(a, dim=(1, 2), keepdim=True)
        normed = norm / (norm.mean(-1, keepdim=True) + eps)
        return (a + torch.addcmul(bias.to(wide), weight.to(wide), a * normed)).to(out_dtype)


# Raw ops on (N, L, C) contiguous tensors; act is a value of ACTIVATIONS. norm: (N, C) in the accumulation type, the norms
# over the map, all that backward needs beside x; empty without `save`. So is a gradient that is not needed.
SCHEMAS = {
    "global_response_norm_fwd": "(Tensor x, Tensor weight, Tensor bias, float eps, int act, ScalarType out_dtype, bool save)"
    " -> (Tensor y, Tensor norm)",
    "global_response_norm_bwd": "(Tensor dy, Tensor x, Tensor weight, Tensor norm, float eps, int act, bool need_dx, bool need_dweight)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias)",
}


def _fake_fwd(x, weight, bias, eps, act, out_dtype, save):
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty(x.shape, dtype=out_dtype), x.new_empty((x.shape[0], x.shape[2]) if save else (0,), dtype=acc)


def _fake_bwd(dy, x, weight, norm, eps, act, need_dx, need_dweight):
    parameters = weight.shape if need_dweight else (0,)
    return x.new_empty(x.shape if need_dx else (0,)), weight.new_empty(parameters), weight.new_empty(parameters)


def flops(x_shape, *args, per_element: int) -> int:
    """Operations of an element; an activation counts as one, as PyTorch's own count leaves it out."""
    count = per_element
    for size in x_shape:
        count *= size
    return count


_registry.define(
    OP,
    SCHEMAS,
    {"global_response_norm_fwd": _fake_fwd, "global_response_norm_bwd": _fake_bwd},
    {
        "global_response_norm_fwd": lambda x_shape, *args, **kwargs: flops(x_shape, per_element=4),
        "global_response_norm_bwd": lambda dy_shape, *args, **kwargs: flops(dy_shape, per_element=7),
    },
    backends=("cpu", "cuda", "triton"),
)


class GlobalResponseNorm(torch.autograd.Function):
    """Autograd of global_response_norm; use the function, which checks and chooses the backend."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps, act, dtype, backend):
        y, norm = _registry.raw("global_response_norm_fwd", backend)(x, weight, bias, eps, act, dtype, True)
        ctx.eps, ctx.act, ctx.backend = eps, act, backend
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, norm, bias)  # bias: for first_order_only
        return y

    @staticmethod
    @first_order_only(OP)
    def backward(ctx, saved, dy):
        if dy is None:
            return (None,) * 7
        need_dx, need_dweight, need_dbias = ctx.needs_input_grad[:3]
        bwd = _registry.raw("global_response_norm_bwd", ctx.backend)
        grads = bwd(dy.contiguous(), *saved[:-1], ctx.eps, ctx.act, need_dx, need_dweight or need_dbias)
        return *(g if needed else None for g, needed in zip(grads, ctx.needs_input_grad[:3])), None, None, None, None


def global_response_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float = 1e-6,
    act: str | None = None,
    *,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Global response normalisation (GRN), with the activation before it: the middle of a ConvNeXt V2 block's MLP.

    a = act(x);  g_c = ||a_c|| over H and W;  y = a + weight * a * g / (mean_c g + eps) + bias

    Args:
        x: (N, H, W, C) float32 | bfloat16 | float16 | float64. Any strides; contiguous costs no copy. An NCHW tensor in
            channels_last format is this after `x.permute(0, 2, 3, 1)`.
        weight, bias: (C,), float32 | bfloat16 | float16 whatever x is; float64 with float64.
        eps: added to the mean of the norms.
        act: None, "gelu" (exact) or "gelu_tanh".
        out_dtype: dtype of the result; default that of PyTorch's promotion over x and weight.

    Returns:
        (N, H, W, C), contiguous; computed in float32 (float64 for float64), from the activation as it is before rounding.

    Raises:
        ValueError: a shape or device does not fit. TypeError: a dtype does not fit. RuntimeError: a forced backend
        cannot run the call, or a second derivative is asked for.

    A channel that is zero over a whole map gets no gradient through its norm. Deterministic: equal inputs give equal bits,
    whatever the number of threads. Keeps x, not act(x), for backward, and C norms an image.

    Source: Woo et al. 2023 (ConvNeXt V2), equations 1 to 3 and algorithm 1.
    """
    dtype = check(x, weight, bias, act, out_dtype)
    backend = _registry.select(OP, x, weight, bias).backend
    if backend in ("eager", "native"):
        return reference(x, weight, bias, eps, act, dtype)
    N, H, W, C = x.shape
    args = (x.contiguous().view(N, H * W, C), dense(weight), dense(bias), eps, ACTIVATIONS[act], dtype)
    if needs_grad(x, weight, bias):
        return GlobalResponseNorm.apply(*args, backend).view(x.shape)
    return _registry.raw("global_response_norm_fwd", backend)(*args, False)[0].view(x.shape)

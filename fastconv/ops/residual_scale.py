"""Hub of `residual_scale`: check, reference, raw ops, Function and public function."""

from __future__ import annotations

import torch

from . import _registry
from ._checks import check_device, check_float, check_vector, dense
from ._function import first_order_only, needs_grad

OP = "residual_scale"


def check(shortcut, y, gamma, mask) -> None:
    check_float(OP, "shortcut", shortcut)
    check_float(OP, "y", y)
    if shortcut.dim() < 2:
        raise ValueError(f"{OP}: shortcut must be (N, ..., C), got {tuple(shortcut.shape)}")
    if y.shape != shortcut.shape:
        raise ValueError(f"{OP}: y must have the shape of shortcut {tuple(shortcut.shape)}, got {tuple(y.shape)}")
    check_vector(OP, "gamma", gamma, y.shape[-1])
    if mask is not None:
        check_float(OP, "mask", mask)
        if mask.requires_grad:
            raise ValueError(f"{OP}: mask must not require a gradient; detach it with mask.detach()")
        if mask.numel() not in (1, y.shape[0]) or (mask.numel() > 1 and mask.shape[0] != y.shape[0]):
            raise ValueError(f"{OP}: mask must hold one value, or one an image as (N, 1, ...) with N={y.shape[0]}, got {tuple(mask.shape)}")
    check_device(OP, shortcut, y=y, gamma=gamma, mask=mask)
    involved = {t.dtype for t in (shortcut, y, gamma, mask) if t is not None}
    if torch.float64 in involved and len(involved) > 1:
        raise TypeError(f"{OP}: float64 cannot be mixed with other dtypes, got {sorted(map(str, involved))}; convert all of them")


def out_dtype(shortcut, y, gamma, mask) -> torch.dtype:
    """The dtype that eager PyTorch's promotion gives the result."""
    dtype = torch.promote_types(shortcut.dtype, y.dtype)
    for tensor in (gamma, mask):
        if tensor is not None:
            dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def reference(shortcut, y, gamma=None, mask=None):
    """Plain PyTorch, in any dtype: the eager backend, and in float64 the truth of the tests."""
    if gamma is not None:
        y = y * gamma
    if mask is not None:
        y = y * mask.reshape(-1, *[1] * (y.dim() - 1))
    return shortcut + y


# Raw ops on (N, L, C) contiguous tensors; gamma (C,), mask (N,). A gradient that is not needed comes back empty;
# the shortcut's gradient is dout itself.
SCHEMAS = {
    "residual_scale_fwd": "(Tensor shortcut, Tensor y, Tensor? gamma, Tensor? mask, ScalarType out_dtype) -> Tensor",
    "residual_scale_bwd": "(Tensor dout, Tensor y, Tensor? gamma, Tensor? mask, bool need_dy, bool need_dgamma)"
    " -> (Tensor dy, Tensor dgamma)",
}


def _fake_fwd(shortcut, y, gamma, mask, out_dtype):
    return shortcut.new_empty(shortcut.shape, dtype=out_dtype)


def _fake_bwd(dout, y, gamma, mask, need_dy, need_dgamma):
    dy = y.new_empty(y.shape if need_dy else (0,))
    return dy, (y if gamma is None else gamma).new_empty((y.shape[-1],) if need_dgamma else (0,))


def _numel(shape) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


_registry.define(
    OP,
    SCHEMAS,
    {"residual_scale_fwd": _fake_fwd, "residual_scale_bwd": _fake_bwd},
    {
        "residual_scale_fwd": lambda shortcut_shape, *args, **kwargs: 3 * _numel(shortcut_shape),
        "residual_scale_bwd": lambda dout_shape, *args, **kwargs: 4 * _numel(dout_shape),
    },
    backends=("cpu", "cuda", "triton"),
    # 8 images of ConvNeXt-T: 1.5x faster at 2.4 M elements, 1.05x at 1.2 M, slower from 0.6 M down, where the bookkeeping
    # of a Function costs more than one pass saves. AMD EPYC, 2 threads, 2026-11-22: `pytest benchmarks -k residual`.
    min_cpu_elements=1_000_000,
)


class ResidualScale(torch.autograd.Function):
    """Autograd of residual_scale; use the function, which checks and chooses the backend."""

    @staticmethod
    def forward(ctx, shortcut, y, gamma, mask, dtype, backend):
        ctx.backend, ctx.shortcut_dtype = backend, shortcut.dtype
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(y, gamma, mask)
        return _registry.raw("residual_scale_fwd", backend)(shortcut, y, gamma, mask, dtype)

    @staticmethod
    @first_order_only(OP)
    def backward(ctx, saved, dout):
        if dout is None:
            return (None,) * 6
        y, gamma, mask = saved
        need_dshortcut, need_dy, need_dgamma = ctx.needs_input_grad[:3]
        dy = dgamma = None
        if need_dy or need_dgamma:
            bwd = _registry.raw("residual_scale_bwd", ctx.backend)
            dy, dgamma = bwd(dout.contiguous(), y, gamma, mask, need_dy, need_dgamma)
        dshortcut = dout.to(ctx.shortcut_dtype) if need_dshortcut else None
        return dshortcut, dy if need_dy else None, dgamma if need_dgamma else None, None, None, None


def residual_scale(
    shortcut: torch.Tensor,
    y: torch.Tensor,
    gamma: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """The tail of a residual block: layer scale, stochastic depth and the residual sum in one pass.

    out = shortcut + mask * (gamma * y)

    Args:
        shortcut, y: (N, ..., C) float32 | bfloat16 | float16 | float64, channels last; the dtypes may differ.
        gamma: (C,) layer scale, or None for 1.
        mask: one value an image, (N, 1, ..., 1), or one for all; zeros and 1 / keep_prob as stochastic depth draws
            them. Gets no gradient. None for 1.

    Returns:
        shortcut's shape, contiguous, in the dtype of PyTorch's promotion over the arguments; computed in float32
        (float64 for float64).

    Raises:
        ValueError: a shape or device does not fit. TypeError: a dtype does not fit. RuntimeError: a forced backend
        cannot run the call, or a second derivative is asked for.

    Deterministic: dgamma is summed by partials of a fixed shape in a fixed order. Under torch.compile this is plain
    PyTorch, which Inductor fuses with its neighbours.

    Source: Touvron et al. 2021 (CaiT), equation 6 (LayerScale); Huang et al. 2016 (stochastic depth), equation 2.
    """
    check(shortcut, y, gamma, mask)
    backend = _registry.select(OP, shortcut, y, gamma, mask).backend
    if backend in ("eager", "native") or torch.compiler.is_compiling() or (gamma is None and mask is None):
        return reference(shortcut, y, gamma, mask)
    dtype = out_dtype(shortcut, y, gamma, mask)
    N, C = y.shape[0], y.shape[-1]
    mask = None if mask is None else mask.reshape(-1).expand(N).contiguous()
    flat = (N, y[0].numel() // C if N and C else 0, C)
    args = (shortcut.contiguous().view(flat), y.contiguous().view(flat), dense(gamma), mask, dtype)
    if needs_grad(shortcut, y, gamma):
        return ResidualScale.apply(*args, backend).view(shortcut.shape)
    return _registry.raw("residual_scale_fwd", backend)(*args).view(shortcut.shape)

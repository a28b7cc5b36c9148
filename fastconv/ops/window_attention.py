"""Hub of `window_attention`: check, reference, raw ops, Function and public function."""

from __future__ import annotations

import torch

from . import _registry
from ._checks import dense
from ._function import first_order_only, needs_grad
from ._window import OP, check, choose, pair
from ._window import reference as reference

# Raw ops. q, k, v: (B, H, W, heads, head_dim) of any strides but the last, which is 1; pad (3, heads, head_dim) has their dtype,
# table, logit_scale (heads,) and the gradients of all three the accumulation type. Without logit_scale the factor is scale.
_CALL = "Tensor q, Tensor k, Tensor v, Tensor? table, Tensor? logit_scale, Tensor? pad"
_SETTINGS = "int wh, int ww, int sh, int sw, bool pad_first, float scale, float mask_value"
SCHEMAS = {
    "window_attention_fwd": f"({_CALL}, {_SETTINGS}) -> Tensor",
    "window_attention_bwd": f"(Tensor dy, {_CALL}, {_SETTINGS}) -> (Tensor dqkv, Tensor dtable, Tensor dlogit_scale, Tensor dpad)",
}


def _fake_fwd(q, *args):
    return q.new_empty((*q.shape[:3], q.shape[3] * q.shape[4]))


def _fake_bwd(dy, q, k, v, table, logit_scale, pad, *args):
    acc = torch.float64 if q.dtype == torch.float64 else torch.float32
    shapes = [(0,) if t is None else t.shape for t in (table, logit_scale, pad)]
    return q.new_empty((*q.shape[:3], 3, *q.shape[3:])), *(q.new_empty(shape, dtype=acc) for shape in shapes)


def flops(q_shape, wh: int, ww: int, *, products: int) -> int:
    """Of the matrix products over each window, as PyTorch counts the batched ones."""
    B, H, W, heads, head_dim = q_shape
    return 2 * products * B * heads * head_dim * (-(-H // wh) * -(-W // ww)) * (wh * ww) ** 2


_registry.define(
    OP,
    SCHEMAS,
    {"window_attention_fwd": _fake_fwd, "window_attention_bwd": _fake_bwd},
    {
        "window_attention_fwd": lambda q, k, v, t, s, p, wh, ww, *args, **kwargs: flops(q, wh, ww, products=2),
        "window_attention_bwd": lambda dy, q, k, v, t, s, p, wh, ww, *args, **kwargs: flops(q, wh, ww, products=5),
    },
    backends=("cpu", "cuda", "triton"),
)


class WindowAttention(torch.autograd.Function):
    """Autograd of window_attention; use the function, which checks and chooses the backend."""

    @staticmethod
    def forward(ctx, qkv, k, v, bias_table, logit_scale, pad_bias, settings, dtype, backend):
        ctx.settings, ctx.dtype, ctx.backend = settings, dtype, backend
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(qkv, k, v, bias_table, logit_scale, pad_bias)
        args = _raw_arguments(qkv, k, v, bias_table, logit_scale, pad_bias, dtype)
        return _registry.raw("window_attention_fwd", backend)(*args, *settings)

    @staticmethod
    @first_order_only(OP)
    def backward(ctx, saved, dy):
        if dy is None:
            return (None,) * 9
        bwd = _registry.raw("window_attention_bwd", ctx.backend)
        dqkv, *others = bwd(dy.contiguous(), *_raw_arguments(*saved, ctx.dtype), *ctx.settings)
        parts = (dqkv, None, None) if saved[1] is None else dqkv.unbind(3)
        grads = [
            grad.to(t.dtype).view(t.shape) if needed else None for grad, t, needed in zip((*parts, *others), saved, ctx.needs_input_grad)
        ]
        return *grads, None, None, None


def _raw_arguments(qkv, k, v, bias_table, logit_scale, pad_bias, dtype):
    """The tensors of the raw ops, in the dtypes that they take."""
    parts = [t.to(dtype) for t in (qkv.unbind(3) if k is None else (qkv, k, v))]  # no generator: torch.compile trips over nested ones
    wide = torch.promote_types(dtype, torch.float32)
    table, factor = [None if t is None else t.to(wide).contiguous() for t in (bias_table, logit_scale)]
    pad = None if pad_bias is None else dense(pad_bias.to(dtype))
    parts = [t if t.stride(-1) == 1 else t.contiguous() for t in parts]
    return *parts, table, factor if factor is None else factor.view(-1), pad


def window_attention(
    qkv: torch.Tensor | tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    window: tuple[int, int],
    shift: tuple[int, int] = (0, 0),
    bias_table: torch.Tensor | None = None,
    *,
    scale: float | None = None,
    logit_scale: torch.Tensor | None = None,
    pad_bias: torch.Tensor | None = None,
    order: str = "roll_pad",
    mask_value: float = -100.0,
    compute_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Multi-head attention inside shifted windows, of a map whose tokens stay where they are: the middle of a Swin block.

    In each window and head: y = softmax(scale * q k^T + bias[i - j] + mask) v

    The map is padded below and to the right to whole windows, and shifted by (-sh, -sw) around its edges.

    Args:
        qkv: (B, H, W, 3, heads, head_dim) float32 | bfloat16 | float16 | float64, or a tuple (q, k, v) of
            (B, H, W, heads, head_dim) each. Any strides: those with a last stride of 1 cost no copy.
        window: (wh, ww) in tokens; N = wh * ww.
        shift: (sh, sw), 0 <= sh < wh, 0 <= sw < ww. Tokens that the shift brings together from far apart have mask_value
            added to their logits.
        bias_table: ((2 wh - 1) (2 ww - 1), heads), the relative position bias: query (a, b) and key (c, d) of a window have row
            (a - c + wh - 1) (2 ww - 1) + b - d + ww - 1. Any float dtype, or None.
        scale: default head_dim ** -0.5.
        logit_scale: (heads,) or (heads, 1, 1): cosine attention; q and k are normalised (eps 1e-12), and this factor, as
            it is, takes the place of scale. Clamp and exp are the caller's, outside.
        pad_bias: (3, heads, head_dim), q, k and v of a padded token (the bias of the linear layer before); default zeros.
        order: "roll_pad", shift the map around its own edges, then pad (timm); or "pad_roll" (torchvision, Hugging Face).
            The same where H and W are multiples of the window.
        mask_value: added, not infinite: a logit may overcome it.
        compute_dtype: dtype of products and result; default qkv.dtype. Under autocast, pass its dtype.

    Returns:
        (B, H, W, heads * head_dim), contiguous. Logits and softmax are float32 (float64 for float64).

    Raises:
        ValueError: a shape, window, shift or device does not fit. TypeError: a dtype does not fit. RuntimeError: a forced
        backend cannot run the call, or a second derivative is asked for.

    Padded tokens are keys like any other. Deterministic: equal inputs give equal bits, whatever the number of threads. Keeps
    qkv and the small tensors for backward, and recomputes the softmax there.

    Source: Liu et al. 2021 (Swin), section 3.2 and equation 4; Liu et al. 2022 (Swin V2), equation 2.
    """
    window, shift = pair("window", window), pair("shift", shift)
    dtype = check(qkv, window, shift, bias_table, logit_scale, pad_bias, scale, order, compute_dtype)
    parts = (qkv, None, None) if isinstance(qkv, torch.Tensor) else tuple(qkv)
    others = (bias_table, logit_scale, pad_bias)
    head_dim = parts[0].shape[-1]
    backend = choose(parts[0], others, window, head_dim, dtype).backend
    if backend in ("eager", "native") or parts[0].numel() == 0:
        options = dict(scale=scale, logit_scale=logit_scale, pad_bias=pad_bias, order=order, mask_value=mask_value, compute_dtype=dtype)
        return reference(qkv, window, shift, bias_table, **options)
    settings = (*window, *shift, order == "pad_roll", head_dim**-0.5 if scale is None else scale, mask_value)
    if needs_grad(*parts, *others):
        return WindowAttention.apply(*parts, *others, settings, dtype, backend)
    return _registry.raw("window_attention_fwd", backend)(*_raw_arguments(*parts, *others, dtype), *settings)

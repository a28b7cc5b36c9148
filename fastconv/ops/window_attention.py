"""Hub of `window_attention`: check, reference, raw ops, Function and public function."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from . import _registry
from ._checks import check_device, check_float, dense, names, without_autocast
from ._function import first_order_only, needs_grad

OP = "window_attention"
ORDERS = ("roll_pad", "pad_roll")
TRITON_TOKENS, TRITON_HEAD_DIM = 256, 128  # the most that one program holds


def check(qkv, window, shift, bias_table, logit_scale, pad_bias, scale, order, compute_dtype) -> torch.dtype:
    """Returns the dtype of the result."""
    packed = isinstance(qkv, torch.Tensor)
    parts = (qkv,) if packed else tuple(qkv)
    if not packed and len(parts) != 3:
        raise ValueError(f"{OP}: qkv must be one tensor or (q, k, v), got {len(parts)} tensors")
    for name, tensor in zip(("qkv",) if packed else "qkv", parts):
        check_float(OP, name, tensor)
    x, given = parts[0], [tuple(t.shape) for t in parts]
    if packed and (x.dim() != 6 or x.shape[3] != 3):
        raise ValueError(f"{OP}: qkv must be (B, H, W, 3, heads, head_dim), got {given[0]}; unflatten the last dimension")
    if not packed and (x.dim() != 5 or given[1:] != given[:1] * 2):
        raise ValueError(f"{OP}: q, k and v must be (B, H, W, heads, head_dim) each, got {given}")
    if any(t.dtype != x.dtype for t in parts):
        raise TypeError(f"{OP}: k and v must have the dtype of q ({x.dtype}), got {names(t.dtype for t in parts)}; convert them")
    if len(window) != 2 or min(window) < 1:
        raise ValueError(f"{OP}: window must be (wh, ww), both at least 1, got {tuple(window)}")
    if len(shift) != 2 or any(not 0 <= s < w for s, w in zip(shift, window)):
        raise ValueError(f"{OP}: shift must be (sh, sw) with 0 <= sh < wh and 0 <= sw < ww, got {tuple(shift)} for window {tuple(window)}")
    if order not in ORDERS:
        raise ValueError(f"{OP}: order must be one of {', '.join(map(repr, ORDERS))}, got {order!r}")
    if scale is not None and logit_scale is not None:
        raise ValueError(f"{OP}: scale must be None where logit_scale is given, got {scale}")
    heads, head_dim = x.shape[-2:]
    positions = (2 * window[0] - 1) * (2 * window[1] - 1)
    others = {
        "bias_table": (bias_table, [(positions, heads)]),
        "logit_scale": (logit_scale, [(heads,), (heads, 1, 1)]),
        "pad_bias": (pad_bias, [(3, heads, head_dim)]),
    }
    for name, (tensor, shapes) in others.items():
        if tensor is None:
            continue
        check_float(OP, name, tensor)
        if tuple(tensor.shape) not in shapes:
            raise ValueError(f"{OP}: {name} must be {' or '.join(map(str, shapes))}, got {tuple(tensor.shape)}")
    check_device(OP, *parts[:1], **dict(zip("kv", parts[1:])), bias_table=bias_table, logit_scale=logit_scale, pad_bias=pad_bias)
    dtype = compute_dtype or x.dtype
    if dtype not in _registry.FLOAT_DTYPES:
        raise TypeError(f"{OP}: compute_dtype must be one of {names(_registry.FLOAT_DTYPES)} or None, got {dtype}")
    involved = {x.dtype, dtype, *(t.dtype for t, _ in others.values() if t is not None)}
    if torch.float64 in involved and len(involved) > 1:
        raise TypeError(f"{OP}: float64 cannot be mixed with other dtypes, got {names(sorted(involved, key=str))}; convert all of them")
    return dtype


def _pair(name: str, size) -> tuple[int, int]:
    if isinstance(size, int):
        raise TypeError(f"{OP}: {name} must be a pair, got {size}; pass ({size}, {size})")
    return tuple(int(s) for s in size)


def relative_index(window: tuple[int, int], device=None) -> torch.Tensor:
    """(N, N) int64: the row of the bias table for query i and key j of a window of N = wh * ww tokens."""
    wh, ww = window
    rows = torch.arange(wh, device=device).repeat_interleave(ww)
    cols = torch.arange(ww, device=device).repeat(wh)
    return (rows[:, None] - rows + wh - 1) * (2 * ww - 1) + cols[:, None] - cols + ww - 1


def _region(size: int, window: int, shift: int, device) -> torch.Tensor:
    """(padded size,) int64: what lay together before the roll has one number, on one axis."""
    i = torch.arange(-(-size // window) * window, device=device)
    return (i >= len(i) - window).long() + (i >= len(i) - shift).long() if shift else torch.zeros_like(i)


def _partition(x: torch.Tensor, window: tuple[int, int]) -> torch.Tensor:
    """(B, H, W, ...) to (B, windows, N, ...)."""
    (wh, ww), (B, H, W) = window, x.shape[:3]
    return x.unflatten(1, (H // wh, wh)).unflatten(3, (W // ww, ww)).transpose(2, 3).reshape(B, H // wh * (W // ww), wh * ww, *x.shape[3:])


def _gather(x, pad, window, shift, order):
    """(B, H, W, heads, head_dim) to (B, windows, heads, N, head_dim), with `pad` (heads, head_dim) in the padded tokens."""
    back = (-shift[0], -shift[1])
    if order == "roll_pad" and any(shift):
        x = x.roll(back, (1, 2))
    for dim, w in ((1, window[0]), (2, window[1])):
        if x.shape[dim] % w:
            shape = list(x.shape)
            shape[dim] = -x.shape[dim] % w
            x = torch.cat((x, x.new_zeros(shape) if pad is None else pad.expand(shape)), dim)
    if order == "pad_roll" and any(shift):
        x = x.roll(back, (1, 2))
    return _partition(x, window).transpose(2, 3)


def _scatter(y, size, window, shift, order):
    """The inverse of `_gather`, without the padded tokens: (B, H, W, heads * head_dim)."""
    (H, W), (wh, ww) = size, window
    rows, cols = -(-H // wh), -(-W // ww)
    y = y.transpose(2, 3).flatten(3).unflatten(2, window).unflatten(1, (rows, cols)).transpose(2, 3)
    y = y.reshape(y.shape[0], rows * wh, cols * ww, y.shape[-1])
    if order == "pad_roll" and any(shift):
        y = y.roll(shift, (1, 2))
    y = y[:, :H, :W]
    return y.roll(shift, (1, 2)) if order == "roll_pad" and any(shift) else y.contiguous()


def reference(
    qkv,
    window,
    shift=(0, 0),
    bias_table=None,
    *,
    scale=None,
    logit_scale=None,
    pad_bias=None,
    order="roll_pad",
    mask_value=-100.0,
    compute_dtype=None,
):
    """Plain PyTorch, in any dtype: the eager backend, and in float64 the truth of the tests.

    Logits of half precision products are biased and go through the softmax in float32, as under autocast.
    """
    parts = qkv.unbind(3) if isinstance(qkv, torch.Tensor) else qkv
    dtype = compute_dtype or parts[0].dtype
    wide = torch.promote_types(dtype, torch.float32)
    H, W, heads, head_dim = parts[0].shape[1:]
    with without_autocast(parts[0].device):
        pads = (None,) * 3 if pad_bias is None else pad_bias.to(dtype).unbind(0)
        q, k, v = (_gather(part.to(dtype), pad, window, shift, order) for part, pad in zip(parts, pads))
        if logit_scale is not None:
            q, k = (F.normalize(t.to(wide), dim=-1).to(dtype) for t in (q, k))
            logits = (q @ k.mT).to(wide) * logit_scale.to(wide).view(heads, 1, 1)
        else:
            logits = ((q * (head_dim**-0.5 if scale is None else scale)) @ k.mT).to(wide)
        if bias_table is not None:
            logits = logits + bias_table.to(wide)[relative_index(window, q.device)].permute(2, 0, 1)
        if any(shift):
            row, col = (_region(*axis, q.device) for axis in zip((H, W), window, shift))
            region = _partition((3 * row[:, None] + col)[None], window)[0]  # (windows, N)
            logits = logits + mask_value * (region[:, None, :] != region[:, :, None])[:, None].to(wide)
        return _scatter(logits.softmax(-1).to(dtype) @ v, (H, W), window, shift, order)


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
    backends=(),
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
    parts = (t.to(dtype) for t in (qkv.unbind(3) if k is None else (qkv, k, v)))
    wide = torch.promote_types(dtype, torch.float32)
    table, factor = (None if t is None else t.to(wide).contiguous() for t in (bias_table, logit_scale))
    pad = None if pad_bias is None else dense(pad_bias.to(dtype))
    return *(t if t.stride(-1) == 1 else t.contiguous() for t in parts), table, factor if factor is None else factor.view(-1), pad


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
    window, shift = _pair("window", window), _pair("shift", shift)
    dtype = check(qkv, window, shift, bias_table, logit_scale, pad_bias, scale, order, compute_dtype)
    parts = (qkv, None, None) if isinstance(qkv, torch.Tensor) else tuple(qkv)
    others = (bias_table, logit_scale, pad_bias)
    backend = _registry.select(OP, parts[0], *others).backend
    head_dim = parts[0].shape[-1]
    if backend in ("eager", "native"):
        options = dict(scale=scale, logit_scale=logit_scale, pad_bias=pad_bias, order=order, mask_value=mask_value, compute_dtype=dtype)
        return reference(qkv, window, shift, bias_table, **options)
    settings = (*window, *shift, order == "pad_roll", head_dim**-0.5 if scale is None else scale, mask_value)
    if needs_grad(*parts, *others):
        return WindowAttention.apply(*parts, *others, settings, dtype, backend)
    return _registry.raw("window_attention_fwd", backend)(*_raw_arguments(*parts, *others, dtype), *settings)

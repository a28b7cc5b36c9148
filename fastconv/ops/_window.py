"""Arguments of window_attention, and the op in plain PyTorch: gather the windows of a map, attend inside them, put the tokens back."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from . import _registry
from ._checks import check_device, check_float, names, without_autocast
from ._function import constant_when_traced
from ._registry import FLOAT_DTYPES, Choice

OP = "window_attention"
ORDERS = ("roll_pad", "pad_roll")
HEAD_DIM = 128  # the most that the kernels of a GPU take
TRITON_TOKENS, CUDA_SIDE = 256, 24  # of a window: in all, which a Triton program holds whole; along a side, in shared memory
CUDA_FIRST = 144  # tokens from which on the CUDA kernels are the first choice: Triton's of 7x7 and 8x8 have them all in registers


def check(qkv, window, shift, bias_table, logit_scale, pad_bias, scale, order, compute_dtype) -> torch.dtype:
    """Returns the dtype of the result."""
    packed = not isinstance(qkv, tuple | list)
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
    if dtype not in FLOAT_DTYPES:
        raise TypeError(f"{OP}: compute_dtype must be one of {names(FLOAT_DTYPES)} or None, got {dtype}")
    involved = {x.dtype, dtype, *(t.dtype for t, _ in others.values() if t is not None)}
    if torch.float64 in involved and len(involved) > 1:
        raise TypeError(f"{OP}: float64 cannot be mixed with other dtypes, got {names(sorted(involved, key=str))}; convert all of them")
    return dtype


def choose(x: torch.Tensor, others, window: tuple[int, int], head_dim: int, dtype: torch.dtype) -> Choice:
    """The backend of a call: by device and dtypes as for every op, then by what the kernels of a GPU take. `x` is on its device."""
    choice = _registry.select(OP, x, *others)
    if choice.backend not in ("cuda", "triton"):
        return choice
    order = ("cuda", "triton") if window[0] * window[1] >= CUDA_FIRST else ("triton", "cuda")
    dtypes, reasons = tuple(t.dtype for t in (x, *others) if t is not None), []
    for backend in (choice.backend,) if _registry.is_forced() else order:
        reason = _registry.missing(OP, backend, x.device, dtypes) or _unserved(backend, x.device, window, head_dim, dtype)
        if not reason:
            return Choice(backend)
        reasons.append(f"{backend}: {reason}")
    if _registry.is_forced():
        _registry.unable(OP, choice.backend, reason)
    return Choice("eager", "; ".join(reasons))


def _unserved(backend: str, device: torch.device, window: tuple[int, int], head_dim: int, dtype: torch.dtype) -> str:
    """Why the kernels do not take a call of these sizes, or ""."""
    if head_dim > HEAD_DIM:
        return f"a head_dim of {HEAD_DIM} at most, got {head_dim}"
    if backend == "triton":
        return f"windows of {TRITON_TOKENS} tokens at most, got {window}" if window[0] * window[1] > TRITON_TOKENS else ""
    if dtype not in (torch.bfloat16, torch.float16):
        return f"tensor cores take bfloat16 and float16, got {names([dtype])}"
    if max(window) > CUDA_SIDE:
        return f"windows of {CUDA_SIDE} x {CUDA_SIDE} tokens at most, got {window}"
    if device.type == "cuda" and not _fits(*window, head_dim, device):
        return f"the shared memory of a block of this GPU is too small for windows of {window} and a head_dim of {head_dim}"
    return ""


@constant_when_traced
def _fits(wh: int, ww: int, head_dim: int, device: torch.device) -> bool:
    from fastconv import _C

    shared = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    return _C.cuda_window_plan(wh, ww, head_dim, True, shared)[0] > 0


def pair(name: str, size) -> tuple[int, int]:
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

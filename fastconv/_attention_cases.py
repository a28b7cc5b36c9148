"""The inputs of a case of window_attention, and the op from its formula, for `fastconv.testing`."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch


def attention_inputs(case, dtype: torch.dtype, randn: Callable) -> tuple[dict, dict, torch.Tensor]:
    """Tensors, options and gradient of the result. With a scale far above 1, logits near +-10 scale, as alike tokens have them."""
    (B, H, W, C), heads = case.shape, case.heads
    head_dim, (wh, ww) = C // heads, case.window
    qkv = randn("qkv", B, H, W, 3, heads, head_dim)
    if case.scale != 1:
        signs = torch.randn(B, H, W, 1, 1, 1, generator=torch.Generator().manual_seed(1)).sign()
        qkv[..., :2, :, :] = 1 + 0.3 * qkv[..., :2, :, :]
        qkv[..., 1:2, :, :] *= signs.to(qkv)
    tensors = {
        "qkv": qkv,
        "bias_table": randn("bias_table", (2 * wh - 1) * (2 * ww - 1), heads),
        "logit_scale": randn("logit_scale", heads, mean=6 * case.scale if case.scale == 1 else 10 * case.scale),
        "pad_bias": randn("pad_bias", 3, heads, head_dim),
    }
    options = {"window": case.window, "shift": case.shift, "order": case.order} | ({"compute_dtype": dtype} if case.wide else {})
    return tensors, options, randn("dout", *case.shape).to(dtype)


def _source(i: int, size: int, window: int, shift: int, order: str) -> int | None:
    """The row of the map that row i of the shifted map holds; None where it is padded."""
    if order == "roll_pad":
        return (i + shift) % size if i < size else None
    i = (i + shift) % (-(-size // window) * window)
    return i if i < size else None


def attention_formula(qkv, bias_table, logit_scale, pad_bias, *, window, shift=(0, 0), order="roll_pad", mask_value=-100.0, **_):
    """Cosine attention of one token at a time."""
    (B, H, W), (wh, ww) = qkv.shape[:3], window
    unit = [t / (t * t).sum(-1, keepdim=True).sqrt() for t in (*qkv.unbind(3)[:2], *pad_bias[:2])]
    v, v_pad = qkv[:, :, :, 2], pad_bias[2].expand(B, -1, -1)
    rows: list[list] = [[None] * W for _ in range(H)]
    for h0, w0 in itertools.product(range(0, H, wh), range(0, W, ww)):
        tokens = []
        for a, b in itertools.product(range(wh), range(ww)):
            at = _source(h0 + a, H, wh, shift[0], order), _source(w0 + b, W, ww, shift[1], order)
            region = h0 + wh >= H and a >= wh - shift[0] and shift[0] > 0, w0 + ww >= W and b >= ww - shift[1] and shift[1] > 0
            tokens.append((a, b, at if None not in at else None, region))
        keys = torch.stack([unit[3].expand(B, -1, -1) if at is None else unit[1][:, at[0], at[1]] for *_, at, _ in tokens], 1)
        values = torch.stack([v_pad if at is None else v[:, at[0], at[1]] for *_, at, _ in tokens], 1)
        results = []
        for a, b, at, region in tokens:
            index = [(a - c + wh - 1) * (2 * ww - 1) + b - d + ww - 1 for c, d, *_ in tokens]
            mask = keys.new_tensor([0.0 if other == region else mask_value for *_, other in tokens])
            query = unit[2].expand(B, -1, -1) if at is None else unit[0][:, at[0], at[1]]
            logits = (query[:, None] * keys).sum(-1) * logit_scale + bias_table[index] + mask[:, None]
            weight = (logits - logits.amax(1, keepdim=True).detach()).exp()
            results.append(((weight / weight.sum(1, keepdim=True))[..., None] * values).sum(1).flatten(1))
        for (*_, at, _), result in zip(tokens, results):
            if at is not None:  # a padded query's result is dropped, but has a gradient, of zeros
                others = sum(other for (*_, place, _), other in zip(tokens, results) if place is None)
                rows[at[0]][at[1]] = torch.where(torch.tensor(True), result, others)
    return torch.stack([torch.stack(row, 1) for row in rows], 1)

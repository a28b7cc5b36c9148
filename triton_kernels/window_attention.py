"""Triton kernels of window_attention (see fastconv/ops/window_attention.py).

A program takes the windows of one head in turn, so that its sums over windows for the gradients of the small tensors stay with
it. A window's keys and values are on chip whole, its queries BLOCK_M at a time.
"""

import torch
import triton
import triton.language as tl

from . import _common
from ._common import launch, reduce_partials

# float32 on tensor cores, in three products: of full precision without one instruction for each product of scalars.
PRECISION = tl.constexpr("tf32x3")
FEW_PROGRAMS = 264  # two to each of an H200's multiprocessors


def config(N: int, D: int, half: bool, crowded: bool) -> dict:
    """Tile of a program. By registers, not yet measured on a GPU: float32 and windows of more than 64 tokens spill some.

    `crowded`: a query takes more registers, backward or with its norm.
    """
    BLOCK_N, BLOCK_D = (max(16, triton.next_power_of_2(size)) for size in (N, D))
    BLOCK_M = 32 if half and not crowded and 16 < BLOCK_N <= 64 else 16
    return {"BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N, "BLOCK_D": BLOCK_D, "num_warps": 4 if half and BLOCK_N <= 64 else 8}


def slices_of(windows: int, heads: int, backward: bool) -> int:
    """Programs of a head; by the shape alone. Backward each has a partial sum of N x N, whose bytes are a seventh of those of eight
    windows at most: fewer windows have one only where programs would be few."""
    most = max(triton.cdiv(windows, 8), FEW_PROGRAMS // heads) if backward else windows
    return max(1, min(windows, most, _common.MAX_SLICES, _common.TARGET_PROGRAMS // heads))


@triton.jit
def _source(i, size, WINDOW: tl.constexpr, SHIFT: tl.constexpr, PAD_FIRST: tl.constexpr):
    """Where the token at place i of the shifted axis lies in the map; size or more where it is padded."""
    if PAD_FIRST:
        return (i + SHIFT) % (tl.cdiv(size, WINDOW) * WINDOW)
    return tl.where(i < size, (i + SHIFT) % size, size)


@triton.jit
def _tokens(
    n,
    row,
    column,
    H,
    W,
    WH: tl.constexpr,
    WW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PAD_FIRST: tl.constexpr,
):
    """Row and column in the map, whether they lie inside it, and the region, of tokens n of a window."""
    a, b = n // WW, n % WW
    h = _source(row * WH + a, H, WH, SH, PAD_FIRST)
    w = _source(column * WW + b, W, WW, SW, PAD_FIRST)
    # The shift brings the far ends of an axis together in its last window.
    below = ((row + 1) * WH >= H) & (a >= WH - SH)
    right = ((column + 1) * WW >= W) & (b >= WW - SW)
    inside = (n < WH * WW) & (h < H) & (w < W)
    return h.to(tl.int64), w.to(tl.int64), inside, 2 * below.to(tl.int32) + right.to(tl.int32)


@triton.jit
def _load(x, pad, offset, inside, real, d, D):
    """[tokens, BLOCK_D]: tokens of the map, `pad` (D,) for those of the window that are not, zeros for the rest."""
    value = tl.load(x + offset[:, None] + d[None, :], mask=inside[:, None] & (d < D)[None, :], other=0.0)
    if pad is not None:
        padded = tl.load(pad + d, mask=d < D, other=0.0)
        value = tl.where((real & (inside == 0))[:, None], padded[None, :], value)
    return value


@triton.jit
def _inverse_norm(x):
    value = x.to(tl.float32)
    return 1.0 / tl.maximum(tl.sqrt(tl.sum(value * value, 1)), 1e-12, tl.PropagateNan.ALL)


@triton.jit
def _bias(table, m, n, head, heads, WH: tl.constexpr, WW: tl.constexpr):
    """What queries m and keys n add to their logits in every window, -inf for keys past the window: [queries, keys]."""
    real = (n < WH * WW)[None, :]
    if table is None:
        return tl.where(real & (m >= 0)[:, None], 0.0, -float("inf"))
    # The row of the table of a pair is the difference of a number of the query and one of the key.
    query = (m // WW + WH - 1) * (2 * WW - 1) + m % WW + WW - 1
    key = n // WW * (2 * WW - 1) + n % WW
    offset = (query * heads + head)[:, None] - (key * heads)[None, :]
    return tl.where(real, tl.load(table + offset, mask=(m < WH * WW)[:, None] & real, other=0.0), -float("inf"))


@triton.jit
def _probabilities(q, k, bias, factor, region_m, region_n, mask_value, SHIFTED: tl.constexpr):
    """softmax(factor q k^T + bias + mask): [queries, keys] float32."""
    logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * factor + bias
    if SHIFTED:
        logits += tl.where(region_m[:, None] == region_n[None, :], 0.0, mask_value)
    weight = tl.exp(logits - tl.max(logits, 1)[:, None])
    return weight / tl.sum(weight, 1)[:, None]


@triton.jit
def window_attention_fwd_kernel(
    q,  # (B, H, W, heads, D)
    k,
    v,
    table,  # (positions, heads) float32, or None
    logit_scale,  # (heads,) float32, or None
    pad,  # (3, heads, D), or None
    y,  # (B, H, W, heads, D), contiguous
    q_stride_b,
    q_stride_h,
    q_stride_w,
    q_stride_head,
    k_stride_b,
    k_stride_h,
    k_stride_w,
    k_stride_head,
    v_stride_b,
    v_stride_h,
    v_stride_w,
    v_stride_head,
    windows,
    H,
    W,
    heads,
    D,
    slices,
    scale,
    mask_value,
    WH: tl.constexpr,
    WW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PAD_FIRST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    head = tl.program_id(0) % heads
    columns = tl.cdiv(W, WW)
    per_map = tl.cdiv(H, WH) * columns
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    factor = scale
    if logit_scale is not None:
        factor = tl.load(logit_scale + head)
    pad_q = pad
    pad_k = pad
    pad_v = pad
    if pad is not None:
        pad_q += head * D
        pad_k += (heads + head) * D
        pad_v += (2 * heads + head) * D
    for window in range(tl.program_id(0) // heads, windows, slices):
        b = (window // per_map).to(tl.int64)
        row = window % per_map // columns
        column = window % columns
        h_n, w_n, inside_n, region = _tokens(n, row, column, H, W, WH, WW, SH, SW, PAD_FIRST)
        real = n < WH * WW
        keys = _load(k, pad_k, b * k_stride_b + h_n * k_stride_h + w_n * k_stride_w + head * k_stride_head, inside_n, real, d, D)
        values = _load(v, pad_v, b * v_stride_b + h_n * v_stride_h + w_n * v_stride_w + head * v_stride_head, inside_n, real, d, D)
        if logit_scale is not None:
            keys = (keys.to(tl.float32) * _inverse_norm(keys)[:, None]).to(k.dtype.element_ty)
        for m0 in range(0, BLOCK_N, BLOCK_M):
            m = m0 + tl.arange(0, BLOCK_M)
            h, w, inside, region_m = _tokens(m, row, column, H, W, WH, WW, SH, SW, PAD_FIRST)
            offset = b * q_stride_b + h * q_stride_h + w * q_stride_w + head * q_stride_head
            queries = _load(q, pad_q, offset, inside, m < WH * WW, d, D)
            if logit_scale is not None:
                queries = (queries.to(tl.float32) * _inverse_norm(queries)[:, None]).to(q.dtype.element_ty)
            bias = _bias(table, m, n, head, heads, WH, WW)
            p = _probabilities(queries, keys, bias, factor, region_m, region, mask_value, SH + SW > 0)
            out = tl.dot(p.to(v.dtype.element_ty), values, input_precision=PRECISION)
            pixel = (b * H + h) * W + w
            tl.store(
                y + ((pixel * heads + head) * D)[:, None] + d[None, :], out.to(y.dtype.element_ty), mask=inside[:, None] & (d < D)[None, :]
            )


@triton.jit
def _through_norm(grad, unit, inverse):
    """Gradient before `unit = x * inverse` from that of unit; a norm below 1e-12 is a constant."""
    along = tl.where(inverse < 1e12, tl.sum(grad * unit, 1), 0.0)
    return (grad - unit * along[:, None]) * inverse[:, None]


@triton.jit
def window_attention_bwd_kernel(
    dy,  # (B, H, W, heads, D), contiguous
    q,  # (B, H, W, heads, D)
    k,
    v,
    table,  # (positions, heads) float32, or None
    logit_scale,  # (heads,) float32, or None
    pad,  # (3, heads, D), or None
    dqkv,  # (B, H, W, 3, heads, D), contiguous
    dbias,  # (slices, heads, N, N) float32, or None
    small,  # (slices, heads, 1 + 3 D) float32: dlogit_scale and dpad
    q_stride_b,
    q_stride_h,
    q_stride_w,
    q_stride_head,
    k_stride_b,
    k_stride_h,
    k_stride_w,
    k_stride_head,
    v_stride_b,
    v_stride_h,
    v_stride_w,
    v_stride_head,
    windows,
    H,
    W,
    heads,
    D,
    slices,
    scale,
    mask_value,
    WH: tl.constexpr,
    WW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PAD_FIRST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    N: tl.constexpr = WH * WW
    head = tl.program_id(0) % heads
    first = tl.program_id(0) // heads
    columns = tl.cdiv(W, WW)
    per_map = tl.cdiv(H, WH) * columns
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    factor = scale
    if logit_scale is not None:
        factor = tl.load(logit_scale + head)
    pad_q = pad
    pad_k = pad
    pad_v = pad
    if pad is not None:
        pad_q += head * D
        pad_k += (heads + head) * D
        pad_v += (2 * heads + head) * D
    if dbias is not None:
        dbias += tl.program_id(0).to(tl.int64) * N * N  # slice * heads + head
    dscale = tl.zeros([BLOCK_M], tl.float32)
    dpad_q = tl.zeros([BLOCK_D], tl.float32)
    dpad_k = tl.zeros([BLOCK_D], tl.float32)
    dpad_v = tl.zeros([BLOCK_D], tl.float32)
    real = n < N
    for window in range(first, windows, slices):
        b = (window // per_map).to(tl.int64)
        row = window % per_map // columns
        column = window % columns
        h_n, w_n, inside_n, region = _tokens(n, row, column, H, W, WH, WW, SH, SW, PAD_FIRST)
        keys = _load(k, pad_k, b * k_stride_b + h_n * k_stride_h + w_n * k_stride_w + head * k_stride_head, inside_n, real, d, D)
        values = _load(v, pad_v, b * v_stride_b + h_n * v_stride_h + w_n * v_stride_w + head * v_stride_head, inside_n, real, d, D)
        if logit_scale is not None:
            k_inverse = _inverse_norm(keys)
            keys = (keys.to(tl.float32) * k_inverse[:, None]).to(k.dtype.element_ty)
        dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        for m0 in range(0, BLOCK_N, BLOCK_M):
            m = m0 + tl.arange(0, BLOCK_M)
            h, w, inside, region_m = _tokens(m, row, column, H, W, WH, WW, SH, SW, PAD_FIRST)
            offset = b * q_stride_b + h * q_stride_h + w * q_stride_w + head * q_stride_head
            queries = _load(q, pad_q, offset, inside, m < N, d, D)
            if logit_scale is not None:
                q_inverse = _inverse_norm(queries)
                queries = (queries.to(tl.float32) * q_inverse[:, None]).to(q.dtype.element_ty)
            pixel = (b * H + h) * W + w
            grad = _load(dy, None, (pixel * heads + head) * D, inside, m < N, d, D)
            bias = _bias(table, m, n, head, heads, WH, WW)
            p = _probabilities(queries, keys, bias, factor, region_m, region, mask_value, SH + SW > 0)
            dv += tl.dot(tl.trans(p.to(v.dtype.element_ty)), grad, input_precision=PRECISION)
            dp = tl.dot(grad, tl.trans(values), input_precision=PRECISION)
            ds = p * (dp - tl.sum(p * dp, 1)[:, None])
            if dbias is not None:
                element = dbias + m[:, None] * N + n[None, :]
                pairs = (m < N)[:, None] & real[None, :]
                before = tl.load(element, mask=pairs & (window > first), other=0.0)
                tl.store(element, before + ds, mask=pairs)
            ds = ds.to(q.dtype.element_ty)
            dk += tl.dot(tl.trans(ds), queries, input_precision=PRECISION)
            dq = tl.dot(ds, keys, input_precision=PRECISION)
            if logit_scale is not None:
                unit = queries.to(tl.float32)
                dscale += tl.sum(dq * unit, 1)
                dq = _through_norm(dq, unit, q_inverse)
            dq *= factor
            if pad is not None:
                dpad_q += tl.sum(tl.where(((m < N) & (inside == 0))[:, None], dq, 0.0), 0)
            out = dqkv + ((pixel * 3 * heads + head) * D)[:, None] + d[None, :]
            tl.store(out, dq.to(dqkv.dtype.element_ty), mask=inside[:, None] & (d < D)[None, :])
        if logit_scale is not None:
            dk = _through_norm(dk, keys.to(tl.float32), k_inverse)
        dk *= factor
        out = dqkv + ((((b * H + h_n) * W + w_n) * 3 * heads + head) * D)[:, None] + d[None, :]
        mask = inside_n[:, None] & (d < D)[None, :]
        tl.store(out + heads * D, dk.to(dqkv.dtype.element_ty), mask=mask)
        tl.store(out + 2 * heads * D, dv.to(dqkv.dtype.element_ty), mask=mask)
        if pad is not None:
            padded = (real & (inside_n == 0))[:, None]
            dpad_k += tl.sum(tl.where(padded, dk, 0.0), 0)
            dpad_v += tl.sum(tl.where(padded, dv, 0.0), 0)
    small += tl.program_id(0).to(tl.int64) * (1 + 3 * D)
    tl.store(small, tl.sum(dscale, 0))
    tl.store(small + 1 + d, dpad_q, mask=d < D)
    tl.store(small + 1 + D + d, dpad_k, mask=d < D)
    tl.store(small + 1 + 2 * D + d, dpad_v, mask=d < D)


@triton.jit
def window_attention_fold_kernel(
    dbias,  # (heads, N, N) float32
    dtable,  # (positions, heads) float32
    heads,
    WH: tl.constexpr,
    WW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The sum over the pairs of each relative position, query by query."""
    head = tl.program_id(0) % heads
    position = tl.program_id(0) // heads * BLOCK + tl.arange(0, BLOCK)
    down = position // (2 * WW - 1) - (WH - 1)
    right = position % (2 * WW - 1) - (WW - 1)
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(WH * WW):
        a = i // WW - down
        b = i % WW - right
        pair = (a >= 0) & (a < WH) & (b >= 0) & (b < WW)
        total += tl.load(dbias + (head * WH * WW + i) * WH * WW + a * WW + b, mask=pair, other=0.0)
    tl.store(dtable + position * heads + head, total, mask=position < (2 * WH - 1) * (2 * WW - 1))


def _arguments(q, k, v, logit_scale, wh, ww, sh, sw, pad_first, scale, mask_value, backward):
    """What both passes take after their tensors, the slices, and the constants of compilation."""
    B, H, W, heads, D = q.shape
    windows = B * triton.cdiv(H, wh) * triton.cdiv(W, ww)
    slices = slices_of(windows, heads, backward)
    strides = [stride for t in (q, k, v) for stride in t.stride()[:4]]
    tile = config(wh * ww, D, q.element_size() == 2, backward or logit_scale is not None)
    constants = {"WH": wh, "WW": ww, "SH": sh, "SW": sw, "PAD_FIRST": pad_first, **tile}
    return (*strides, windows, H, W, heads, D, slices, float(scale), float(mask_value)), slices, constants


def fwd(q, k, v, table, logit_scale, pad, wh, ww, sh, sw, pad_first, scale, mask_value):
    B, H, W, heads, D = q.shape
    y = q.new_empty((B, H, W, heads * D))
    if q.numel() > 0:
        args, slices, constants = _arguments(q, k, v, logit_scale, wh, ww, sh, sw, pad_first, scale, mask_value, False)
        launch(window_attention_fwd_kernel, slices * heads, q, q, k, v, table, logit_scale, pad, y, *args, **constants)
    return y


def bwd(dy, q, k, v, table, logit_scale, pad, wh, ww, sh, sw, pad_first, scale, mask_value):
    B, H, W, heads, D = q.shape
    N, positions = wh * ww, (2 * wh - 1) * (2 * ww - 1)
    dqkv = q.new_empty((B, H, W, 3, heads, D))
    dtable, dlogit_scale, dpad = (
        q.new_empty((0,) if t is None else shape, dtype=torch.float32)
        for t, shape in ((table, (positions, heads)), (logit_scale, (heads,)), (pad, (3, heads, D)))
    )
    if q.numel() == 0:
        return dqkv, dtable.zero_(), dlogit_scale.zero_(), dpad.zero_()
    args, slices, constants = _arguments(q, k, v, logit_scale, wh, ww, sh, sw, pad_first, scale, mask_value, True)
    partial = None if table is None else dtable.new_empty((slices, 1, heads * N * N))
    small = dtable.new_empty((slices, 1, heads * (1 + 3 * D)))
    launch(window_attention_bwd_kernel, slices * heads, q, dy, q, k, v, table, logit_scale, pad, dqkv, partial, small, *args, **constants)
    if table is not None:
        dbias = dtable.new_empty((heads * N * N,))
        reduce_partials(partial, dbias)
        fold = {"WH": wh, "WW": ww, "BLOCK": 128, "num_warps": 4}
        launch(window_attention_fold_kernel, heads * triton.cdiv(positions, fold["BLOCK"]), q, dbias, dtable, heads, **fold)
    if logit_scale is not None or pad is not None:
        sums = dtable.new_empty((heads, 1 + 3 * D))
        reduce_partials(small, sums)
        if logit_scale is not None:
            dlogit_scale.copy_(sums[:, 0])
        if pad is not None:
            dpad.copy_(sums[:, 1:].view(heads, 3, D).transpose(0, 1))
    return dqkv, dtable, dlogit_scale, dpad

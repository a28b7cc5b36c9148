"""Triton kernels of depthwise_conv (see fastconv/ops/depthwise_conv.py): forward, dx by the same kernel, dweight.

The rows of a tile are tuples of blocks, grown by `+`: the form that every Triton from 3.6 compiles.
"""
# ruff: noqa: RUF005, SIM108

import torch
import triton
import triton.language as tl

from ._common import block_c, launch, reduce_partials, rows_per_slice


def config(H: int, W: int, C: int, K: int) -> dict:
    """Tile of a program. Chosen by resources (registers, idle lanes), not yet measured on a GPU.

    A thread owns 4 channels of one column and BLOCK_H rows of it, so that a loaded value serves KH output rows from
    registers. BLOCK_H need not be a power of two: H = 56, 28, 14 and 7 divide evenly.
    """
    BLOCK_C = block_c(C, 64)
    # Without wide loads each channel has its own address and mask in registers; other K spill with 8 rows.
    rows = 8 if C % 16 == 0 and K <= 7 else 4
    return {
        "K": K,
        "KH": K if K <= 7 else 1,  # rows of taps unrolled; all of them keep K weights a channel in registers
        "BLOCK_H": triton.cdiv(H, triton.cdiv(H, rows)),
        "BLOCK_W": 8,
        "BLOCK_C": BLOCK_C,
        "num_warps": max(1, BLOCK_C // 16),
    }


@triton.jit
def depthwise_conv_fwd_kernel(
    x,  # (N, H, W, C)
    weight,  # (K * K, C)
    bias,  # (C,) or None
    more,  # (N, H, W, C) added to y, or None
    y,  # (N, H, W, C)
    H,
    W,
    C,
    FLIP: tl.constexpr,  # mirror the taps: x is dy and y is dx
    K: tl.constexpr,
    KH: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    tile = tl.program_id(0)
    blocks_c, tiles_w, tiles_h = tl.cdiv(C, BLOCK_C), tl.cdiv(W, BLOCK_W), tl.cdiv(H, BLOCK_H)
    c0 = tile % blocks_c * BLOCK_C
    w0 = tile // blocks_c % tiles_w * BLOCK_W
    h0 = tile // blocks_c // tiles_w % tiles_h * BLOCK_H
    n = (tile // blocks_c // tiles_w // tiles_h).to(tl.int64)

    c = c0 + tl.arange(0, BLOCK_C)
    w = w0 + tl.arange(0, BLOCK_W)
    offset = tl.arange(0, BLOCK_W)[:, None] * C + c[None, :]  # [BLOCK_W, BLOCK_C]
    mask_c = c < C

    zero = tl.zeros([BLOCK_W, BLOCK_C], tl.float32)
    acc = ()  # BLOCK_H x [BLOCK_W, BLOCK_C]
    for _ in tl.static_range(BLOCK_H):
        acc = acc + (zero,)
    for kh in range(0, K, KH):
        for kw in range(K):
            taps = ()  # KH x [1, BLOCK_C]
            for i in tl.static_range(KH):
                tap = (kh + i) * K + kw
                if FLIP:
                    tap = K * K - 1 - tap
                taps = taps + (tl.load(weight + tap * C + c, mask=mask_c, other=0.0).to(tl.float32)[None, :],)
            column = w + kw - K // 2
            mask = ((column >= 0) & (column < W))[:, None] & mask_c[None, :]
            for r in tl.static_range(BLOCK_H + KH - 1):
                h = h0 + kh + r - K // 2
                pixel = ((n * H + h) * W + w0 + kw - K // 2) * C
                value = tl.load(x + pixel + offset, mask=mask & (h >= 0) & (h < H), other=0.0).to(tl.float32)
                updated = ()
                for i in tl.static_range(BLOCK_H):
                    if r - i >= 0 and r - i < KH:
                        updated = updated + (acc[i] + value * taps[r - i],)
                    else:
                        updated = updated + (acc[i],)
                acc = updated

    if bias is not None:
        shift = tl.load(bias + c, mask=mask_c, other=0.0).to(tl.float32)[None, :]
    else:
        shift = tl.zeros([1, BLOCK_C], tl.float32)
    for i in tl.static_range(BLOCK_H):
        pixel = ((n * H + h0 + i) * W + w0) * C
        mask = (w < W)[:, None] & mask_c[None, :] & (h0 + i < H)
        result = acc[i] + shift
        if more is not None:
            result += tl.load(more + pixel + offset, mask=mask, other=0.0).to(tl.float32)
        tl.store(y + pixel + offset, result.to(y.dtype.element_ty), mask=mask)


@triton.jit
def depthwise_conv_wgrad_kernel(
    x,  # (N, H, W, C)
    dy,  # (N, H, W, C)
    partial,  # (slices, K * K + 1, C) float32: the sums of each slice of tiles; the last row is dbias
    tiles,  # N * tiles of an image
    tiles_per_slice,
    H,
    W,
    C,
    K: tl.constexpr,
    KH: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # One column of KH taps a program; the programs that share a slice run side by side and find it in cache.
    pid = tl.program_id(0)
    blocks_c, tiles_w, tiles_h = tl.cdiv(C, BLOCK_C), tl.cdiv(W, BLOCK_W), tl.cdiv(H, BLOCK_H)
    kw = pid % K
    kh = pid // K % (K // KH) * KH
    c0 = pid // (K * (K // KH)) % blocks_c * BLOCK_C
    slice_index = pid // (K * (K // KH)) // blocks_c
    is_bias = (kw == K // 2) & (kh == 0)

    c = c0 + tl.arange(0, BLOCK_C)
    offset = tl.arange(0, BLOCK_W)[:, None] * C + c[None, :]  # [BLOCK_W, BLOCK_C]
    mask_c = c < C
    dbias = tl.zeros([BLOCK_W, BLOCK_C], tl.float32)
    acc = ()  # KH x [BLOCK_W, BLOCK_C]
    for _ in tl.static_range(KH):
        acc = acc + (dbias,)

    for tile in range(slice_index * tiles_per_slice, tl.minimum((slice_index + 1) * tiles_per_slice, tiles)):
        w0 = tile % tiles_w * BLOCK_W
        h0 = tile // tiles_w % tiles_h * BLOCK_H
        n = (tile // tiles_w // tiles_h).to(tl.int64)
        w = w0 + tl.arange(0, BLOCK_W)
        column = w + kw - K // 2
        # A pair counts where both pixels lie in the image. Elsewhere both are zero, or the sum keeps its value: a lone
        # zero would turn an Inf on the other side into NaN.
        mask = ((w < W) & (column >= 0) & (column < W))[:, None] & mask_c[None, :]
        rows = ()  # BLOCK_H x [BLOCK_W, BLOCK_C]
        for i in tl.static_range(BLOCK_H):
            pixel = ((n * H + h0 + i) * W + w0) * C
            row = tl.load(dy + pixel + offset, mask=mask & (h0 + i < H), other=0.0).to(tl.float32)
            rows = rows + (row,)
            if is_bias:
                dbias += row
        for r in tl.static_range(BLOCK_H + KH - 1):
            h = h0 + kh + r - K // 2
            inside = (h >= 0) & (h < H)
            pixel = ((n * H + h) * W + w0 + kw - K // 2) * C
            value = tl.load(x + pixel + offset, mask=mask & inside, other=0.0).to(tl.float32)
            updated = ()
            for i in tl.static_range(KH):
                if r - i >= 0 and r - i < BLOCK_H:
                    pair = inside & (h0 + r - i < H)
                    updated = updated + (tl.where(pair, acc[i] + rows[r - i] * value, acc[i]),)
                else:
                    updated = updated + (acc[i],)
            acc = updated

    partial += slice_index.to(tl.int64) * (K * K + 1) * C
    for i in tl.static_range(KH):
        tl.store(partial + ((kh + i) * K + kw) * C + c, tl.sum(acc[i], 0), mask=mask_c)
    tl.store(partial + K * K * C + c, tl.sum(dbias, 0), mask=mask_c & is_bias)


def conv(x, weight, bias, out_dtype, flip=False, more=None):
    """The convolution, or with `flip` its gradient by the input; plus `more` where that is given."""
    N, H, W, C = x.shape
    K = weight.shape[-1]
    y = x.new_empty(x.shape, dtype=out_dtype)
    if y.numel() == 0:
        return y
    cfg = config(H, W, C, K)
    programs = N * triton.cdiv(H, cfg["BLOCK_H"]) * triton.cdiv(W, cfg["BLOCK_W"]) * triton.cdiv(C, cfg["BLOCK_C"])
    weight = weight.view(C, K * K).t().contiguous()  # channels last too: coalesced loads
    bias = None if bias is None else bias.contiguous()
    launch(depthwise_conv_fwd_kernel, programs, x, x, weight, bias, more, y, H, W, C, FLIP=flip, **cfg)
    return y


def wgrad(dy, x, weight):
    """(dweight, dbias) in weight's dtype."""
    N, H, W, C = x.shape
    K = weight.shape[-1]
    dweight, dbias = weight.new_empty(weight.shape), weight.new_empty(C)
    if x.numel() == 0:
        return dweight.zero_(), dbias.zero_()
    cfg = config(H, W, C, K)
    tiles = N * triton.cdiv(H, cfg["BLOCK_H"]) * triton.cdiv(W, cfg["BLOCK_W"])
    programs = K * (K // cfg["KH"]) * triton.cdiv(C, cfg["BLOCK_C"])
    tiles_per_slice, slices = rows_per_slice(tiles, 1, programs)
    partial = x.new_empty((slices, K * K + 1, C), dtype=torch.float32)
    launch(depthwise_conv_wgrad_kernel, slices * programs, x, x, dy, partial, tiles, tiles_per_slice, H, W, C, **cfg)
    reduce_partials(partial, dweight, dbias)
    return dweight, dbias


def fwd(x, weight, bias, out_dtype):
    return conv(x, weight, bias, out_dtype)


def bwd(dy, x, weight, need_dx, need_dweight):
    return gradients(dy, x.permute(0, 2, 3, 1), weight, None, need_dx, need_dweight)


def gradients(dy, x, weight, dshortcut, need_dx, need_dweight):
    """dx, with dshortcut in it where that is given, dweight and dbias."""
    dx = conv(dy, weight, None, x.dtype, flip=True, more=dshortcut) if need_dx else x.new_empty(0)
    return dx, *(wgrad(dy, x, weight) if need_dweight else (weight.new_empty(0), weight.new_empty(0)))

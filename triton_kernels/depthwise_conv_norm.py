"""Triton kernels of depthwise_conv_norm (see fastconv/ops/depthwise_conv_norm.py): the convolution of depthwise_conv
writes z, one kernel normalises it; one kernel gives dz, which goes back through the convolution's gradients.
"""

import torch
import triton
import triton.language as tl

from . import depthwise_conv
from ._common import launch, reduce_partials, rows_per_slice


def config(C: int) -> dict:
    """Tile of a program: BLOCK_N pixels of all C channels where they fit. Chosen by resources, not yet measured on a GPU."""
    BLOCK_C = min(4096, triton.next_power_of_2(C))
    return {
        "BLOCK_N": max(1, min(16, 1024 // BLOCK_C)),
        "BLOCK_C": BLOCK_C,
        "num_warps": max(4, min(16, BLOCK_C // 256)),
    }


@triton.jit
def depthwise_conv_norm_fwd_kernel(
    z,  # (rows, C)
    norm_weight,  # (C,)
    norm_bias,  # (C,)
    y,  # (rows, C)
    mean,  # (rows,) float32, or None
    rstd,  # (rows,) float32, or None
    eps,
    rows,
    C,
    ONE_BLOCK: tl.constexpr,  # C <= BLOCK_C: z is read once
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    lane = tl.arange(0, BLOCK_C)[None, :]
    mask_row = (row < rows)[:, None]
    offset = row[:, None] * C

    if ONE_BLOCK:
        mask = mask_row & (lane < C)
        value = tl.load(z + offset + lane, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_N, BLOCK_C]
        mu = tl.sum(value, 1) / C
        centred = tl.where(mask, value - mu[:, None], 0.0)
        rs = tl.rsqrt(tl.sum(centred * centred, 1) / C + eps)
        scale = tl.load(norm_weight + lane, mask=lane < C, other=0.0).to(tl.float32)
        shift = tl.load(norm_bias + lane, mask=lane < C, other=0.0).to(tl.float32)
        tl.store(y + offset + lane, (centred * rs[:, None] * scale + shift).to(y.dtype.element_ty), mask=mask)
    else:
        acc = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
        for c0 in range(0, C, BLOCK_C):
            acc += tl.load(z + offset + c0 + lane, mask=mask_row & (c0 + lane < C), other=0.0).to(tl.float32)
        mu = tl.sum(acc, 1) / C
        acc = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
        for c0 in range(0, C, BLOCK_C):
            mask = mask_row & (c0 + lane < C)
            value = tl.load(z + offset + c0 + lane, mask=mask, other=0.0).to(tl.float32)
            centred = tl.where(mask, value - mu[:, None], 0.0)
            acc += centred * centred
        rs = tl.rsqrt(tl.sum(acc, 1) / C + eps)
        for c0 in range(0, C, BLOCK_C):
            c = c0 + lane
            mask = mask_row & (c < C)
            value = tl.load(z + offset + c, mask=mask, other=0.0).to(tl.float32)
            scale = tl.load(norm_weight + c, mask=c < C, other=0.0).to(tl.float32)
            shift = tl.load(norm_bias + c, mask=c < C, other=0.0).to(tl.float32)
            result = (value - mu[:, None]) * rs[:, None] * scale + shift
            tl.store(y + offset + c, result.to(y.dtype.element_ty), mask=mask)
    if mean is not None:
        tl.store(mean + row, mu, mask=row < rows)
        tl.store(rstd + row, rs, mask=row < rows)


@triton.jit
def _load_gradient(dy, z, norm_weight, mu, rs, offset, c, mask, C):
    """(dy, dy * norm_weight, normalised z), zero outside the mask: [BLOCK_N, BLOCK_C] each."""
    grad = tl.load(dy + offset + c, mask=mask, other=0.0).to(tl.float32)
    value = tl.load(z + offset + c, mask=mask, other=0.0).to(tl.float32)
    scale = tl.load(norm_weight + c, mask=c < C, other=0.0).to(tl.float32)
    return grad, tl.where(mask, grad * scale, 0.0), tl.where(mask, (value - mu[:, None]) * rs[:, None], 0.0)


@triton.jit
def depthwise_conv_norm_bwd_kernel(
    dy,  # (rows, C)
    z,  # (rows, C)
    norm_weight,  # (C,)
    mean,  # (rows,)
    rstd,  # (rows,)
    dz,  # (rows, C), or None
    partial,  # (slices, 2, C) float32: the sums of each slice of rows for dnorm_weight and dnorm_bias; or None
    rows,
    slice_rows,
    C,
    ONE_BLOCK: tl.constexpr,  # C <= BLOCK_C: dy and z are read once
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    slice_index = (tl.program_id(0) // tl.cdiv(C, BLOCK_C)).to(tl.int64)
    lane = tl.arange(0, BLOCK_C)[None, :]
    c = tl.program_id(0) % tl.cdiv(C, BLOCK_C) * BLOCK_C + lane
    dnorm_weight = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    dnorm_bias = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    end = tl.minimum((slice_index + 1) * slice_rows, rows)
    for row0 in range(slice_index * slice_rows, end, BLOCK_N):
        row = (row0 + tl.arange(0, BLOCK_N)).to(tl.int64)
        mask_row = (row < end)[:, None]
        offset = row[:, None] * C
        mu = tl.load(mean + row, mask=row < end, other=0.0)
        rs = tl.load(rstd + row, mask=row < end, other=0.0)
        mask = mask_row & (c < C)
        grad, scaled, normal = _load_gradient(dy, z, norm_weight, mu, rs, offset, c, mask, C)
        dnorm_weight += grad * normal
        dnorm_bias += grad
        if dz is not None:
            if ONE_BLOCK:
                total = tl.sum(scaled, 1)
                along = tl.sum(scaled * normal, 1)
            else:  # every block of channels sums the whole rows again
                total = tl.zeros([BLOCK_N], tl.float32)
                along = tl.zeros([BLOCK_N], tl.float32)
                for c1 in range(0, C, BLOCK_C):
                    other = c1 + lane
                    _, part, part_normal = _load_gradient(dy, z, norm_weight, mu, rs, offset, other, mask_row & (other < C), C)
                    total += tl.sum(part, 1)
                    along += tl.sum(part * part_normal, 1)
            result = rs[:, None] * (scaled - (total[:, None] + normal * along[:, None]) / C)
            tl.store(dz + offset + c, result.to(dz.dtype.element_ty), mask=mask)
    if partial is not None:
        partial += slice_index * 2 * C
        tl.store(partial + c, tl.sum(dnorm_weight, 0)[None, :], mask=c < C)
        tl.store(partial + C + c, tl.sum(dnorm_bias, 0)[None, :], mask=c < C)


def fwd(x, weight, bias, norm_weight, norm_bias, eps, z_dtype, out_dtype, save):
    C, rows = x.shape[-1], x.shape[0] * x.shape[1] * x.shape[2]
    z = depthwise_conv.conv(x, weight, bias, z_dtype)
    y = x.new_empty(x.shape, dtype=out_dtype)
    mean, rstd = (x.new_empty(x.shape[:-1] if save else (0,), dtype=torch.float32) for _ in range(2))
    if y.numel() > 0:
        cfg = config(C)
        programs = triton.cdiv(rows, cfg["BLOCK_N"])
        saved = (mean, rstd) if save else (None, None)
        args = (z, norm_weight.contiguous(), norm_bias.contiguous(), y, *saved, eps, rows, C)
        launch(depthwise_conv_norm_fwd_kernel, programs, x, *args, ONE_BLOCK=cfg["BLOCK_C"] >= C, **cfg)
    return y, z.flatten(1, 2) if save else x.new_empty(0, dtype=z_dtype), mean, rstd


def bwd(dy, x, weight, norm_weight, z, mean, rstd, dshortcut, need_dx, need_dweight, need_dnorm):
    x = x.permute(0, 2, 3, 1)
    C, rows = x.shape[-1], x.shape[0] * x.shape[1] * x.shape[2]
    dnorm_weight, dnorm_bias = (norm_weight.new_empty((C,) if need_dnorm else (0,)) for _ in range(2))
    need_dz = need_dx or need_dweight
    dz = x.new_empty(x.shape, dtype=z.dtype) if need_dz else None
    if x.numel() == 0:
        dnorm_weight.zero_(), dnorm_bias.zero_()
    elif need_dz or need_dnorm:
        cfg = config(C)
        if C % 8:  # addresses and masks of single elements: with as many rows some registers spill
            cfg["BLOCK_N"] = max(1, cfg["BLOCK_N"] // 2)
        blocks = triton.cdiv(C, cfg["BLOCK_C"])
        slice_rows, slices = rows_per_slice(rows, cfg["BLOCK_N"], blocks)
        partial = x.new_empty((slices, 2, C), dtype=torch.float32) if need_dnorm else None
        args = (dy, z, norm_weight.contiguous(), mean, rstd, dz, partial, rows, slice_rows, C)
        launch(depthwise_conv_norm_bwd_kernel, slices * blocks, x, *args, ONE_BLOCK=blocks == 1, **cfg)
        if need_dnorm:
            reduce_partials(partial, dnorm_weight, dnorm_bias)
    return *depthwise_conv.gradients(dz, x, weight, dshortcut, need_dx, need_dweight), dnorm_weight, dnorm_bias

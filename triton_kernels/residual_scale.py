"""Triton kernels of residual_scale (see fastconv/ops/residual_scale.py)."""

import torch
import triton
import triton.language as tl

from ._common import block_c, launch, reduce_partials, rows_per_slice


def config(C: int) -> dict:
    """Tile of a program: BLOCK_N pixels of BLOCK_C channels, 8 elements a thread. By resources, not yet measured on a GPU."""
    BLOCK_C = block_c(C, 128)
    return {"BLOCK_N": 1024 // BLOCK_C, "BLOCK_C": BLOCK_C, "num_warps": 4}


@triton.jit
def _load_mask(mask, row0, row, end, L):
    """mask of the image of each row: [BLOCK_N, 1]. One 64-bit division a block, the lanes' in 32 bits."""
    first = row0 // L
    image = first + (row - first * L).to(tl.int32) // L
    return tl.load(mask + image, mask=row < end, other=0.0).to(tl.float32)[:, None]


@triton.jit
def residual_scale_fwd_kernel(
    shortcut,  # (N, L, C) as (rows, C)
    y,  # (N, L, C)
    gamma,  # (C,) or None
    mask,  # (N,) or None
    out,  # (N, L, C)
    rows,
    L,
    C,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row0 = (tl.program_id(0) // tl.cdiv(C, BLOCK_C)).to(tl.int64) * BLOCK_N
    row = row0 + tl.arange(0, BLOCK_N)
    c = tl.program_id(0) % tl.cdiv(C, BLOCK_C) * BLOCK_C + tl.arange(0, BLOCK_C)
    offset = row[:, None] * C + c[None, :]
    inside = (row < rows)[:, None] & (c < C)[None, :]
    value = tl.load(y + offset, mask=inside, other=0.0).to(tl.float32)
    if gamma is not None:
        value *= tl.load(gamma + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    if mask is not None:
        value *= _load_mask(mask, row0, row, rows, L)
    value += tl.load(shortcut + offset, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + offset, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def residual_scale_bwd_kernel(
    dout,  # (N, L, C) as (rows, C)
    y,  # (N, L, C)
    gamma,  # (C,) or None
    mask,  # (N,) or None
    dy,  # (N, L, C) or None
    partial,  # (slices, 1, C) float32: the sums of each slice of rows for dgamma; or None
    rows,
    slice_rows,
    L,
    C,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    slice_index = (tl.program_id(0) // tl.cdiv(C, BLOCK_C)).to(tl.int64)
    c = tl.program_id(0) % tl.cdiv(C, BLOCK_C) * BLOCK_C + tl.arange(0, BLOCK_C)
    dgamma = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    end = tl.minimum((slice_index + 1) * slice_rows, rows)
    for row0 in range(slice_index * slice_rows, end, BLOCK_N):
        row = (row0 + tl.arange(0, BLOCK_N)).to(tl.int64)
        offset = row[:, None] * C + c[None, :]
        inside = (row < end)[:, None] & (c < C)[None, :]
        grad = tl.load(dout + offset, mask=inside, other=0.0).to(tl.float32)
        if mask is not None:
            grad *= _load_mask(mask, row0, row, end, L)
        if partial is not None:
            dgamma += grad * tl.load(y + offset, mask=inside, other=0.0).to(tl.float32)
        if dy is not None:
            if gamma is not None:
                grad *= tl.load(gamma + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
            tl.store(dy + offset, grad.to(dy.dtype.element_ty), mask=inside)
    if partial is not None:
        tl.store(partial + slice_index * C + c, tl.sum(dgamma, 0), mask=c < C)


def fwd(shortcut, y, gamma, mask, out_dtype):
    N, L, C = shortcut.shape
    out = shortcut.new_empty(shortcut.shape, dtype=out_dtype)
    if out.numel() > 0:
        cfg = config(C)
        programs = triton.cdiv(N * L, cfg["BLOCK_N"]) * triton.cdiv(C, cfg["BLOCK_C"])
        gamma = None if gamma is None else gamma.contiguous()
        launch(residual_scale_fwd_kernel, programs, shortcut, shortcut, y, gamma, mask, out, N * L, L, C, **cfg)
    return out


def bwd(dout, y, gamma, mask, need_dy, need_dgamma):
    N, L, C = y.shape
    dy = y.new_empty(y.shape if need_dy else (0,))
    dgamma = (y if gamma is None else gamma).new_empty((C,) if need_dgamma else (0,))
    if y.numel() == 0:
        return dy, dgamma.zero_()
    if not (need_dy or need_dgamma):
        return dy, dgamma
    cfg = config(C)
    blocks = triton.cdiv(C, cfg["BLOCK_C"])
    slice_rows, slices = rows_per_slice(N * L, cfg["BLOCK_N"], blocks)
    partial = y.new_empty((slices, 1, C), dtype=torch.float32) if need_dgamma else None
    gamma = None if gamma is None else gamma.contiguous()
    args = (dout, y, gamma, mask, dy if need_dy else None, partial, N * L, slice_rows, L, C)
    launch(residual_scale_bwd_kernel, slices * blocks, y, *args, **cfg)
    if need_dgamma:
        reduce_partials(partial, dgamma)
    return dy, dgamma

"""Triton kernels of global_response_norm (see fastconv/ops/global_response_norm.py).

Each direction is three launches: partial sums over the pixels of each image, a few operations on the sums, and a pass that
applies them. That pass takes the images in reverse, those first whose pixels the L2 cache still holds.
"""

import torch
import triton
import triton.language as tl

from ._activation import activate, activation_slope
from ._common import block_c, launch, reduce_partials, rows_per_slice


def config(C: int) -> dict:
    """Tile of a program: BLOCK_N pixels of BLOCK_C channels, 8 elements a thread. By resources, not yet measured on a GPU."""
    BLOCK_C = block_c(C, 128)
    return {"BLOCK_N": 1024 // BLOCK_C, "BLOCK_C": BLOCK_C, "num_warps": 4}


@triton.jit
def global_response_norm_sum_kernel(
    x,  # (N, L, C)
    dy,  # (N, L, C) or None
    partial,  # (N, slices, 1, C) float32: sums of a^2; with dy (N, slices, 2, C): of dy a and of dy
    L,
    C,
    slice_rows,
    slices,
    ACT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    index = (tl.program_id(0) // tl.cdiv(C, BLOCK_C)).to(tl.int64)  # of the slice: image * slices + slice
    c = tl.program_id(0) % tl.cdiv(C, BLOCK_C) * BLOCK_C + tl.arange(0, BLOCK_C)
    first = index // slices * L
    begin = index % slices * slice_rows
    end = tl.minimum(begin + slice_rows, L)
    product = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    total = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for row0 in range(begin, end, BLOCK_N):
        row = row0 + tl.arange(0, BLOCK_N)
        offset = (first + row)[:, None] * C + c[None, :]
        inside = (row < end)[:, None] & (c < C)[None, :]
        a = activate(tl.load(x + offset, mask=inside, other=0.0).to(tl.float32), ACT)
        if dy is None:
            product += a * a
        else:
            grad = tl.load(dy + offset, mask=inside, other=0.0).to(tl.float32)
            product += a * grad
            total += grad
    if dy is None:
        tl.store(partial + index * C + c, tl.sum(product, 0), mask=c < C)
    else:
        tl.store(partial + index * 2 * C + c, tl.sum(product, 0), mask=c < C)
        tl.store(partial + (index * 2 + 1) * C + c, tl.sum(total, 0), mask=c < C)


@triton.jit
def _sum_slices(partial, image, slices, r, c, C, ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Sum over the slices of an image, in order, of row r of ROWS: [BLOCK_C]."""
    acc = tl.zeros([BLOCK_C], tl.float32)
    for s in range(slices):
        acc += tl.load(partial + ((image * slices + s) * ROWS + r) * C + c, mask=c < C, other=0.0)
    return acc


@triton.jit
def global_response_norm_fwd_sums_kernel(
    partial,  # (N, slices, 1, C)
    norm,  # (N, C) float32
    scale,  # (N,) float32: 1 / (mean of norm + eps)
    slices,
    C,
    eps,
    BLOCK_C: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK_C], tl.float32)
    for c0 in range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        g = tl.sqrt(_sum_slices(partial, image, slices, 0, c, C, 1, BLOCK_C))
        tl.store(norm + image * C + c, g, mask=c < C)
        total += g
    tl.store(scale + image, 1.0 / (tl.sum(total, 0) / C + eps))


@triton.jit
def global_response_norm_fwd_kernel(
    x,  # (N, L, C)
    weight,  # (C,)
    bias,  # (C,)
    norm,  # (N, C) float32
    scale,  # (N,) float32
    y,  # (N, L, C)
    N,
    L,
    C,
    ACT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    block = (tl.program_id(0) // tl.cdiv(C, BLOCK_C)).to(tl.int64)
    image = N - 1 - block // tl.cdiv(L, BLOCK_N)
    row = block % tl.cdiv(L, BLOCK_N) * BLOCK_N + tl.arange(0, BLOCK_N)
    c = tl.program_id(0) % tl.cdiv(C, BLOCK_C) * BLOCK_C + tl.arange(0, BLOCK_C)
    offset = (image * L + row)[:, None] * C + c[None, :]
    inside = (row < L)[:, None] & (c < C)[None, :]
    a = activate(tl.load(x + offset, mask=inside, other=0.0).to(tl.float32), ACT)
    normed = tl.load(norm + image * C + c, mask=c < C, other=0.0) * tl.load(scale + image)
    factor = tl.load(weight + c, mask=c < C, other=0.0).to(tl.float32) * normed + 1.0
    value = a * factor[None, :] + tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    tl.store(y + offset, value.to(y.dtype.element_ty), mask=inside)


@triton.jit
def global_response_norm_bwd_sums_kernel(
    partial,  # (N, slices, 2, C)
    weight,  # (C,)
    norm,  # (N, C) float32
    scale,  # (N,) float32: 1 / (mean of norm + eps)
    term,  # (N, C) float32: dg / g
    sums,  # (N, 2, C) float32: dweight and dbias of each image
    slices,
    C,
    eps,
    BLOCK_C: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK_C], tl.float32)
    through = tl.zeros([BLOCK_C], tl.float32)
    for c0 in range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        g = tl.load(norm + image * C + c, mask=c < C, other=0.0)
        product = _sum_slices(partial, image, slices, 0, c, C, 2, BLOCK_C)
        total += g
        through += tl.load(weight + c, mask=c < C, other=0.0).to(tl.float32) * product * g
        tl.store(sums + image * 2 * C + c, product, mask=c < C)
        tl.store(sums + (image * 2 + 1) * C + c, _sum_slices(partial, image, slices, 1, c, C, 2, BLOCK_C), mask=c < C)
    inverse = 1.0 / (tl.sum(total, 0) / C + eps)
    through_mean = tl.sum(through, 0) * inverse * inverse / C
    tl.store(scale + image, inverse)
    for c0 in range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        g = tl.load(norm + image * C + c, mask=c < C, other=0.0)
        product = _sum_slices(partial, image, slices, 0, c, C, 2, BLOCK_C)
        dg = tl.load(weight + c, mask=c < C, other=0.0).to(tl.float32) * product * inverse - through_mean
        # A channel that is zero throughout: its norm has no derivative there, and 0 is what PyTorch takes.
        tl.store(term + image * C + c, tl.where(g == 0.0, 0.0 * dg, dg / tl.where(g == 0.0, 1.0, g)), mask=c < C)
        tl.store(sums + image * 2 * C + c, product * g * inverse, mask=c < C)


@triton.jit
def global_response_norm_bwd_kernel(
    dy,  # (N, L, C)
    x,  # (N, L, C)
    weight,  # (C,)
    norm,  # (N, C) float32
    scale,  # (N,) float32
    term,  # (N, C) float32
    dx,  # (N, L, C)
    N,
    L,
    C,
    ACT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    block = (tl.program_id(0) // tl.cdiv(C, BLOCK_C)).to(tl.int64)
    image = N - 1 - block // tl.cdiv(L, BLOCK_N)
    row = block % tl.cdiv(L, BLOCK_N) * BLOCK_N + tl.arange(0, BLOCK_N)
    c = tl.program_id(0) % tl.cdiv(C, BLOCK_C) * BLOCK_C + tl.arange(0, BLOCK_C)
    offset = (image * L + row)[:, None] * C + c[None, :]
    inside = (row < L)[:, None] & (c < C)[None, :]
    value = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(dy + offset, mask=inside, other=0.0).to(tl.float32)
    normed = tl.load(norm + image * C + c, mask=c < C, other=0.0) * tl.load(scale + image)
    factor = tl.load(weight + c, mask=c < C, other=0.0).to(tl.float32) * normed + 1.0
    da = grad * factor[None, :] + activate(value, ACT) * tl.load(term + image * C + c, mask=c < C, other=0.0)[None, :]
    tl.store(dx + offset, (da * activation_slope(value, ACT)).to(dx.dtype.element_ty), mask=inside)


def _sum(x, dy, act, cfg):
    """partial of the sum kernel, (N, slices, 1 or 2, C); the slices follow the shape alone."""
    N, L, C = x.shape
    blocks = triton.cdiv(C, cfg["BLOCK_C"])
    slice_rows, slices = rows_per_slice(L, cfg["BLOCK_N"], N * blocks)
    partial = x.new_empty((N, slices, 1 if dy is None else 2, C), dtype=torch.float32)
    launch(global_response_norm_sum_kernel, N * slices * blocks, x, x, dy, partial, L, C, slice_rows, slices, ACT=act, **cfg)
    return partial


def fwd(x, weight, bias, eps, act, out_dtype, save):
    N, L, C = x.shape
    y, norm = x.new_empty(x.shape, dtype=out_dtype), x.new_empty((N, C), dtype=torch.float32)
    if x.numel() == 0:
        return y, norm.zero_() if save else norm.new_empty(0)
    cfg = config(C)
    partial, scale = _sum(x, None, act, cfg), norm.new_empty(N)
    sums = {"BLOCK_C": min(1024, triton.next_power_of_2(C)), "num_warps": 4}
    launch(global_response_norm_fwd_sums_kernel, N, x, partial, norm, scale, partial.shape[1], C, eps, **sums)
    programs = N * triton.cdiv(L, cfg["BLOCK_N"]) * triton.cdiv(C, cfg["BLOCK_C"])
    args = (x, weight.contiguous(), bias.contiguous(), norm, scale, y, N, L, C)
    launch(global_response_norm_fwd_kernel, programs, x, *args, ACT=act, **cfg)
    return y, norm if save else norm.new_empty(0)


def bwd(dy, x, weight, norm, eps, act, need_dx, need_dweight):
    N, L, C = x.shape
    dx = x.new_empty(x.shape if need_dx else (0,))
    dweight, dbias = (weight.new_empty((C,) if need_dweight else (0,)) for _ in range(2))
    if x.numel() == 0:
        return dx, dweight.zero_(), dbias.zero_()
    weight, cfg = weight.contiguous(), config(C)
    partial, scale, term, sums = _sum(x, dy, act, cfg), norm.new_empty(N), norm.new_empty((N, C)), norm.new_empty((N, 2, C))
    args = (partial, weight, norm, scale, term, sums, partial.shape[1], C, eps)
    launch(global_response_norm_bwd_sums_kernel, N, x, *args, BLOCK_C=min(1024, triton.next_power_of_2(C)), num_warps=4)
    if need_dx:
        programs = N * triton.cdiv(L, cfg["BLOCK_N"]) * triton.cdiv(C, cfg["BLOCK_C"])
        launch(global_response_norm_bwd_kernel, programs, x, dy, x, weight, norm, scale, term, dx, N, L, C, ACT=act, **cfg)
    if need_dweight:
        reduce_partials(sums, dweight, dbias)
    return dx, dweight, dbias

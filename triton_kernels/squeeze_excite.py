"""Triton kernels of squeeze_excite (see fastconv/ops/squeeze_excite.py): the passes over the map. The layers between them,
on a vector an image, are torch's own products."""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from ._common import block_c, launch, rows_per_slice

ACTS = (F.relu, F.silu, F.gelu, F.hardswish, F.leaky_relu, lambda h: h)
aten = torch.ops.aten
ACT_GRADIENTS = (  # of (dy, what act was applied to)
    lambda dy, h: aten.threshold_backward(dy, h, 0),
    aten.silu_backward,
    aten.gelu_backward,
    aten.hardswish_backward,
    lambda dy, h: aten.leaky_relu_backward(dy, h, 0.01, False),
    lambda dy, h: dy,
)
SIGMOID = 6  # the place of the first gate in the hub's FUNCTIONS; the other is hardsigmoid


def config(L: int, C: int, channels_last: bool) -> dict:
    """Tile of a program: BLOCK_L pixels of BLOCK_C channels, 8 elements a thread. By resources, not yet measured on a GPU."""
    if channels_last:
        BLOCK_C = block_c(C, 128)
        return {"BLOCK_L": 1024 // BLOCK_C, "BLOCK_C": BLOCK_C, "num_warps": 4}
    BLOCK_L = min(512, max(32, triton.next_power_of_2(L)))
    return {"BLOCK_L": BLOCK_L, "BLOCK_C": 1024 // BLOCK_L, "num_warps": 4}


@triton.jit
def _gate(z, SIGMOID: tl.constexpr):
    if SIGMOID:
        return 1.0 / (1.0 + tl.exp(-z))
    return tl.minimum(tl.maximum(z + 3.0, 0.0, tl.PropagateNan.ALL), 6.0, tl.PropagateNan.ALL) / 6.0


@triton.jit
def _gate_gradient(dy, z, SIGMOID: tl.constexpr):
    if SIGMOID:
        s = 1.0 / (1.0 + tl.exp(-z))
        return dy * ((1.0 - s) * s)
    return tl.where((z > -3.0) & (z < 3.0), dy / 6.0, 0.0)


@triton.jit
def squeeze_excite_sum_kernel(
    x,  # (N, L, C) in any order of L and C
    dy,  # the same, or None: the sums of x, else of dy x
    z,  # (N, C) float32, or None: the sums go through the gate's derivative
    out,  # (slices, N, C) float32
    N,
    L,
    C,
    stride_l,
    stride_c,
    slices,
    slice_pixels,
    scale,
    SIGMOID: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    image = tl.program_id(0) // tl.cdiv(C, BLOCK_C)
    c = tl.program_id(0) % tl.cdiv(C, BLOCK_C) * BLOCK_C + tl.arange(0, BLOCK_C)
    n = (image // slices).to(tl.int64)
    slice_index = (image % slices).to(tl.int64)
    acc = tl.zeros([BLOCK_L, BLOCK_C], tl.float32)
    end = tl.minimum((slice_index + 1) * slice_pixels, L)
    for l0 in range(slice_index * slice_pixels, end, BLOCK_L):
        pixel = (l0 + tl.arange(0, BLOCK_L)).to(tl.int64)
        offset = n * L * C + pixel[:, None] * stride_l + c[None, :].to(tl.int64) * stride_c
        inside = (pixel < end)[:, None] & (c < C)[None, :]
        value = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32)
        if dy is not None:
            value *= tl.load(dy + offset, mask=inside, other=0.0).to(tl.float32)
        acc += value
    total = tl.sum(acc, 0) * scale
    if z is not None:
        total = _gate_gradient(total, tl.load(z + n * C + c, mask=c < C, other=0.0), SIGMOID)
    tl.store(out + (slice_index * N + n) * C + c, total, mask=c < C)


@triton.jit
def squeeze_excite_fold_kernel(
    partial,  # (slices, size) float32
    z,  # (size,) float32, or None
    out,  # (size,) float32
    slices,
    size,
    SIGMOID: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    s = tl.arange(0, BLOCK_S)[:, None]
    acc = tl.zeros([BLOCK_S, BLOCK], tl.float32)
    for s0 in range(0, slices, BLOCK_S):
        offset = (s0 + s).to(tl.int64) * size + i[None, :]
        acc += tl.load(partial + offset, mask=(s0 + s < slices) & (i < size)[None, :], other=0.0)
    total = tl.sum(acc, 0)
    if z is not None:
        total = _gate_gradient(total, tl.load(z + i, mask=i < size, other=0.0), SIGMOID)
    tl.store(out + i, total, mask=i < size)


@triton.jit
def squeeze_excite_scale_kernel(
    x,  # (N, L, C) in any order of L and C
    z,  # (N, C) float32
    summand,  # (N, C) float32, or None
    out,  # as x
    L,
    C,
    stride_l,
    stride_c,
    SIGMOID: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    block = tl.program_id(0) // tl.cdiv(C, BLOCK_C)
    c = tl.program_id(0) % tl.cdiv(C, BLOCK_C) * BLOCK_C + tl.arange(0, BLOCK_C)
    n = (block // tl.cdiv(L, BLOCK_L)).to(tl.int64)
    pixel = (block % tl.cdiv(L, BLOCK_L)).to(tl.int64) * BLOCK_L + tl.arange(0, BLOCK_L)
    offset = n * L * C + pixel[:, None] * stride_l + c[None, :].to(tl.int64) * stride_c
    inside = (pixel < L)[:, None] & (c < C)[None, :]
    factor = _gate(tl.load(z + n * C + c, mask=c < C, other=0.0), SIGMOID)
    value = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32) * factor[None, :]
    if summand is not None:
        value += tl.load(summand + n * C + c, mask=c < C, other=0.0)[None, :]
    tl.store(out + offset, value.to(out.dtype.element_ty), mask=inside)


def _sizes(x, channels_last) -> tuple[int, int, int, int, int]:
    """N, L, C and the strides of L and C."""
    N, C = x.shape[0], x.shape[3 if channels_last else 1]
    L = x.shape[1] * x.shape[2] if channels_last else x.shape[2] * x.shape[3]
    return N, L, C, *((C, 1) if channels_last else (1, L))


def _sum(x, dy, z, scale, gate, channels_last):
    """scale times the sums of x, or of dy x, over the pixels: (N, C); with z their gradient through the gate."""
    N, L, C, stride_l, stride_c = _sizes(x, channels_last)
    cfg = config(L, C, channels_last)
    blocks = N * triton.cdiv(C, cfg["BLOCK_C"])
    slice_pixels, slices = rows_per_slice(L, cfg["BLOCK_L"], blocks)
    partial = x.new_empty((slices, N, C), dtype=torch.float32)
    options = {"SIGMOID": gate == SIGMOID}
    args = (x, dy, z if slices == 1 else None, partial, N, L, C, stride_l, stride_c, slices, slice_pixels, scale)
    launch(squeeze_excite_sum_kernel, slices * blocks, x, *args, **options, **cfg)
    if slices == 1:
        return partial[0]
    out = x.new_empty((N, C), dtype=torch.float32)
    args = (partial, z, out, slices, N * C)
    launch(squeeze_excite_fold_kernel, triton.cdiv(N * C, 64), x, *args, **options, BLOCK_S=16, BLOCK=64, num_warps=4)
    return out


def _scale(x, z, summand, gate, channels_last, dtype):
    N, L, C, *strides = _sizes(x, channels_last)
    cfg = config(L, C, channels_last)
    out = x.new_empty(x.shape, dtype=dtype)
    programs = N * triton.cdiv(L, cfg["BLOCK_L"]) * triton.cdiv(C, cfg["BLOCK_C"])
    launch(squeeze_excite_scale_kernel, programs, x, x, z, summand, out, L, C, *strides, SIGMOID=gate == SIGMOID, **cfg)
    return out


def _layer(v, weight, bias):
    return F.linear(v, weight.flatten(1).float(), None if bias is None else bias.float())


@torch.no_grad()  # its products are not to be recorded, whoever calls
def fwd(x, w1, b1, w2, b2, act, gate, out_dtype, channels_last, save):
    N, L, C, *_ = _sizes(x, channels_last)
    none = x.new_empty(0, dtype=torch.float32)
    if x.numel() == 0:
        pooled = x.new_zeros((N, C) if save else (0,), dtype=torch.float32)
        hidden = none if w2 is None or not save else x.new_zeros((N, w1.shape[0]), dtype=torch.float32)
        return x.new_empty(x.shape, dtype=out_dtype), pooled, hidden, torch.zeros_like(pooled)
    pooled = _sum(x, None, None, 1 / L, gate, channels_last)
    z, hidden = _layer(pooled, w1, b1), none
    if w2 is not None:
        hidden = z
        z = _layer(ACTS[act](hidden), w2, b2)
    y = _scale(x, z, None, gate, channels_last, out_dtype)
    return y, *((pooled, hidden, z) if save else (none, none.clone(), none.clone()))


@torch.no_grad()
def bwd(dy, x, w1, w2, pooled, hidden, z, act, gate, channels_last, need_dx, need_fc1, need_fc2):
    x = x.permute(0, 2, 3, 1) if channels_last else x
    L = _sizes(x, channels_last)[1]
    second, need_fc2 = w1 if w2 is None else w2, need_fc2 and w2 is not None
    gradients = [
        (w, torch.zeros if x.numel() == 0 and needed else torch.empty, needed) for w, needed in ((w1, need_fc1), (second, need_fc2))
    ]
    dw1, dw2 = (make(w.shape if needed else (0,), dtype=w.dtype, device=w.device) for w, make, needed in gradients)
    db1, db2 = (make(w.shape[:1] if needed else (0,), dtype=w.dtype, device=w.device) for w, make, needed in gradients)
    dx = x.new_empty(x.shape if need_dx else (0,))
    if x.numel() == 0 or not (need_dx or need_fc1 or need_fc2):
        return dx, dw1, db1, dw2, db2
    dz = _sum(x, dy, z, 1.0, gate, channels_last)
    if need_fc2:
        dw2.copy_((dz.T @ ACTS[act](hidden)).view(dw2.shape))
        db2.copy_(dz.sum(0))
    if w2 is not None and (need_dx or need_fc1):
        dz = ACT_GRADIENTS[act](dz @ w2.flatten(1).float(), hidden)
    if need_fc1:
        dw1.copy_((dz.T @ pooled).view(dw1.shape))
        db1.copy_(dz.sum(0))
    if need_dx:
        dpooled = (dz @ w1.flatten(1).float()) / L
        dx = _scale(dy, z, dpooled, gate, channels_last, x.dtype)
    return dx, dw1, db1, dw2, db2

"""Triton kernels of grouped_conv (see fastconv/ops/grouped_conv.py): forward, dx by the same kernel, dweight.

Implicit matrix products, one for each tap of each group: pixels x channels a group. Blocks are powers of two of at least 16,
the rest masked, so widths of 16, 32 and 64 channels a group waste nothing.
"""

import torch
import triton
import triton.language as tl

from ._common import launch, rows_per_slice


def config(pixels: int, in_width: int, out_width: int, dtype: torch.dtype) -> dict:
    """Tile of a program. Chosen by resources (registers: a BLOCK_I of 64 spills), not yet measured on a GPU."""
    return {
        "BLOCK_M": 64 if pixels > 32 else 32,
        "BLOCK_I": min(32, max(16, triton.next_power_of_2(in_width))),
        "BLOCK_O": min(64, max(16, triton.next_power_of_2(out_width))),
        "PRECISION": "tf32" if dtype == torch.float32 and torch.backends.cudnn.allow_tf32 else "ieee",
        "num_warps": 4,
    }


@triton.jit
def grouped_conv_fwd_kernel(
    x,  # (N, H, W, groups * in_width) in any layout
    weight,  # (groups, K * K, in_width, out_width)
    bias,  # (groups * out_width,) or None
    y,  # (N, out_H, out_W, groups * out_width) in any layout; rows x cols of its pixels are written
    H,
    W,
    out_H,
    out_W,
    rows,
    cols,
    in_width,
    out_width,
    groups,
    x_stride_pixel,
    x_stride_channel,
    y_stride_pixel,
    y_stride_channel,
    first_h,  # the input of tap 0 of pixel (0, 0)
    first_w,
    PHASE_H: tl.constexpr,  # the output of pixel (0, 0)
    PHASE_W: tl.constexpr,
    TAP_H: tl.constexpr,  # the first tap; the next are STEP apart
    TAP_W: tl.constexpr,
    STRIDE_H: tl.constexpr,  # of the input
    STRIDE_W: tl.constexpr,
    STEP_H: tl.constexpr,  # of the taps, and of the output pixels
    STEP_W: tl.constexpr,
    FLIP: tl.constexpr,  # later taps meet earlier pixels: x is dy and y is dx
    K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    pid = tl.program_id(0)
    blocks_o, tiles = tl.cdiv(out_width, BLOCK_O), tl.cdiv(rows * cols, BLOCK_M)
    o = pid % blocks_o * BLOCK_O + tl.arange(0, BLOCK_O)
    group = pid // blocks_o % groups
    m = pid // blocks_o // groups % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (pid // blocks_o // groups // tiles).to(tl.int64)
    row, col = m // cols, m % cols
    mask_m, mask_o = m < rows * cols, o < out_width
    i = tl.arange(0, BLOCK_I)

    acc = tl.zeros([BLOCK_M, BLOCK_O], tl.float32)
    for kh in range(TAP_H, K, STEP_H):
        for kw in range(TAP_W, K, STEP_W):
            if FLIP:
                h, w = row * STRIDE_H + first_h - (kh - TAP_H) // STEP_H, col * STRIDE_W + first_w - (kw - TAP_W) // STEP_W
            else:
                h, w = row * STRIDE_H + first_h + kh, col * STRIDE_W + first_w + kw
            inside = mask_m & (h >= 0) & (h < H) & (w >= 0) & (w < W)
            pixel = ((n * H + h) * W + w) * x_stride_pixel
            if x_stride_channel != 1:  # planes: images lie a whole map of all channels apart
                pixel += n * (in_width * groups - 1) * x_stride_channel
            taps = weight + ((group.to(tl.int64) * K + kh) * K + kw) * in_width * out_width
            for i0 in range(0, in_width, BLOCK_I):
                mask_i = i0 + i < in_width
                channel = (group * in_width + i0 + i).to(tl.int64) * x_stride_channel
                a = tl.load(x + pixel[:, None] + channel[None, :], mask=inside[:, None] & mask_i[None, :], other=0.0)
                b = tl.load(taps + (i0 + i)[:, None] * out_width + o[None, :], mask=mask_i[:, None] & mask_o[None, :], other=0.0)
                acc = tl.dot(a, b.to(a.dtype), acc, input_precision=PRECISION)

    channel = group * out_width + o
    if bias is not None:
        acc += tl.load(bias + channel, mask=mask_o, other=0.0).to(tl.float32)[None, :]
    pixel = ((n * out_H + row * STEP_H + PHASE_H) * out_W + col * STEP_W + PHASE_W) * y_stride_pixel
    if y_stride_channel != 1:
        pixel += n * (out_width * groups - 1) * y_stride_channel
    offset = pixel[:, None] + channel.to(tl.int64)[None, :] * y_stride_channel
    tl.store(y + offset, acc.to(y.dtype.element_ty), mask=mask_m[:, None] & mask_o[None, :])


@triton.jit
def grouped_conv_bwd_kernel(
    x,  # (N, H, W, groups * in_width) in any layout
    dy,  # (N, out_H, out_W, groups * out_width) in any layout
    partial,  # (slices, in_width * K * K + 1, groups * out_width) float32: the sums of each slice of tiles; the last row is dbias
    tiles,  # N * tiles of a map
    tiles_per_slice,
    H,
    W,
    out_H,
    out_W,
    in_width,
    out_width,
    groups,
    x_stride_pixel,
    x_stride_channel,
    y_stride_pixel,
    y_stride_channel,
    padding_h,
    padding_w,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    # One tap a program; the programs that share a slice run side by side and find it in cache.
    pid = tl.program_id(0)
    blocks_o, blocks_i = tl.cdiv(out_width, BLOCK_O), tl.cdiv(in_width, BLOCK_I)
    tap = pid % (K * K)
    i = pid // (K * K) % blocks_i * BLOCK_I + tl.arange(0, BLOCK_I)
    o = pid // (K * K) // blocks_i % blocks_o * BLOCK_O + tl.arange(0, BLOCK_O)
    group = pid // (K * K) // blocks_i // blocks_o % groups
    slice_index = pid // (K * K) // blocks_i // blocks_o // groups
    is_bias = (tap == 0) & (pid // (K * K) % blocks_i == 0)
    mask_i, mask_o = i < in_width, o < out_width
    channel_i = (group * in_width + i).to(tl.int64) * x_stride_channel
    channel_o = (group * out_width + o).to(tl.int64)
    per_map = tl.cdiv(out_H * out_W, BLOCK_M)

    acc = tl.zeros([BLOCK_I, BLOCK_O], tl.float32)
    dbias = tl.zeros([BLOCK_O], tl.float32)
    for tile in range(slice_index * tiles_per_slice, tl.minimum((slice_index + 1) * tiles_per_slice, tiles)):
        n = (tile // per_map).to(tl.int64)
        m = tile % per_map * BLOCK_M + tl.arange(0, BLOCK_M)
        row, col = m // out_W, m % out_W
        h, w = row * STRIDE_H + tap // K - padding_h, col * STRIDE_W + tap % K - padding_w
        mask_m = m < out_H * out_W
        inside = mask_m & (h >= 0) & (h < H) & (w >= 0) & (w < W)
        pixel = ((n * H + h) * W + w) * x_stride_pixel
        if x_stride_channel != 1:
            pixel += n * (in_width * groups - 1) * x_stride_channel
        pixel_y = ((n * out_H + row) * out_W + col) * y_stride_pixel
        if y_stride_channel != 1:
            pixel_y += n * (out_width * groups - 1) * y_stride_channel
        a = tl.load(x + channel_i[:, None] + pixel[None, :], mask=mask_i[:, None] & inside[None, :], other=0.0)
        d = tl.load(dy + pixel_y[:, None] + channel_o[None, :] * y_stride_channel, mask=mask_m[:, None] & mask_o[None, :], other=0.0)
        acc = tl.dot(a, d.to(a.dtype), acc, input_precision=PRECISION)
        if is_bias:
            dbias += tl.sum(d.to(tl.float32), 0)

    C = groups * out_width
    partial += slice_index.to(tl.int64) * (in_width * K * K + 1) * C
    offset = (i[:, None] * (K * K) + tap) * C + channel_o[None, :]
    tl.store(partial + offset, acc, mask=mask_i[:, None] & mask_o[None, :])
    tl.store(partial + in_width * K * K * C + channel_o, dbias, mask=mask_o & is_bias)


def _sizes(t: torch.Tensor, nhwc: bool) -> tuple[int, int, int, int]:
    """(N, C, H, W) of a raw map."""
    return tuple((t.permute(0, 3, 1, 2) if nhwc else t).shape)


def _strides(H: int, W: int, C: int, nhwc: bool) -> tuple[int, int]:
    """Elements between pixels and between channels. A map of one pixel is in both layouts."""
    return (C, 1) if nhwc or H * W == 1 else (1, H * W)


def _conv(x, weight, bias, y, nhwc, groups, rows, cols, first, phase, tap, strides, steps, flip):
    (N, C, H, W), (_, out_C, out_H, out_W), K = _sizes(x, nhwc), _sizes(y, nhwc), int(weight.shape[1] ** 0.5)
    if N * rows * cols == 0:
        return
    cfg = config(rows * cols, C // groups, out_C // groups, x.dtype)
    programs = N * triton.cdiv(rows * cols, cfg["BLOCK_M"]) * groups * triton.cdiv(out_C // groups, cfg["BLOCK_O"])
    args = H, W, out_H, out_W, rows, cols, C // groups, out_C // groups, groups, *_strides(H, W, C, nhwc)
    args += *_strides(out_H, out_W, out_C, nhwc), *first
    constants = {"PHASE_H": phase[0], "PHASE_W": phase[1], "TAP_H": tap[0], "TAP_W": tap[1]}
    constants |= {"STRIDE_H": strides[0], "STRIDE_W": strides[1], "STEP_H": steps[0], "STEP_W": steps[1], "FLIP": flip, "K": K}
    launch(grouped_conv_fwd_kernel, programs, x, x, weight, bias, y, *args, **constants, **cfg)


def fwd(x, weight, bias, stride_h, stride_w, padding_h, padding_w, groups, nhwc, out_dtype):
    N, _, H, W = _sizes(x, nhwc)
    out_C, in_width, K = weight.shape[:3]
    out_H, out_W = (H + 2 * padding_h - K) // stride_h + 1, (W + 2 * padding_w - K) // stride_w + 1
    memory_format = torch.channels_last if nhwc else torch.contiguous_format
    y = torch.empty(N, out_C, out_H, out_W, dtype=out_dtype, device=x.device, memory_format=memory_format)
    taps = weight.view(groups, out_C // groups, in_width, K * K).permute(0, 3, 2, 1).contiguous()
    bias = None if bias is None else bias.contiguous()
    first, strides = (-padding_h, -padding_w), (stride_h, stride_w)
    _conv(x, taps, bias, y.permute(0, 2, 3, 1) if nhwc else y, nhwc, groups, out_H, out_W, first, (0, 0), (0, 0), strides, (1, 1), False)
    return y


def dgrad(dy, x, weight, stride, padding, groups, nhwc):
    """dx, one launch for each phase of the stride: only the taps that reach it."""
    _, _, H, W = _sizes(x, nhwc)
    out_C, in_width, K = weight.shape[:3]
    dx = torch.empty_like(x)
    taps = weight.view(groups, out_C // groups, in_width, K * K).permute(0, 3, 1, 2).contiguous()
    for phase_h in range(min(stride[0], H)):
        for phase_w in range(min(stride[1], W)):
            phase = phase_h, phase_w
            tap = tuple((a + p) % s for a, p, s in zip(phase, padding, stride))
            first = tuple((a + p - k) // s for a, p, k, s in zip(phase, padding, tap, stride))
            rows, cols = (triton.cdiv(size - a, s) for size, a, s in zip((H, W), phase, stride))
            _conv(dy, taps, None, dx, nhwc, groups, rows, cols, first, phase, tap, (1, 1), stride, True)
    return dx


def wgrad(dy, x, weight, stride, padding, groups, nhwc):
    """(dweight, dbias) in weight's dtype."""
    (N, C, H, W), (_, _, out_H, out_W) = _sizes(x, nhwc), _sizes(dy, nhwc)
    out_C, in_width, K = weight.shape[:3]
    if N == 0:
        return torch.zeros_like(weight), weight.new_zeros(out_C)
    cfg = config(out_H * out_W, in_width, out_C // groups, x.dtype)
    if x.dtype == torch.float32:  # with 64 pixels some registers spill
        cfg["BLOCK_M"] = 32
    tiles = N * triton.cdiv(out_H * out_W, cfg["BLOCK_M"])
    programs = K * K * triton.cdiv(in_width, cfg["BLOCK_I"]) * triton.cdiv(out_C // groups, cfg["BLOCK_O"]) * groups
    tiles_per_slice, slices = rows_per_slice(tiles, 1, programs)
    partial = x.new_empty((slices, in_width * K * K + 1, out_C), dtype=torch.float32)
    args = tiles, tiles_per_slice, H, W, out_H, out_W, in_width, out_C // groups, groups, *_strides(H, W, C, nhwc)
    args += *_strides(out_H, out_W, out_C, nhwc), *padding
    launch(grouped_conv_bwd_kernel, slices * programs, x, x, dy, partial, *args, STRIDE_H=stride[0], STRIDE_W=stride[1], K=K, **cfg)
    sums = partial.sum(0)  # in a fixed order: slices follow the shape alone
    dweight = sums[:-1].view(in_width, K, K, out_C).permute(3, 0, 1, 2).contiguous()
    return dweight.to(weight.dtype), sums[-1].clone().to(weight.dtype)


def bwd(dy, x, weight, stride_h, stride_w, padding_h, padding_w, groups, nhwc, need_dx, need_dweight):
    geometry = (stride_h, stride_w), (padding_h, padding_w), groups, nhwc
    x = x.permute(0, 2, 3, 1) if nhwc else x
    dx = dgrad(dy, x, weight, *geometry) if need_dx else x.new_empty(0)
    return dx, *(wgrad(dy, x, weight, *geometry) if need_dweight else (weight.new_empty(0), weight.new_empty(0)))

"""What the ops share: launching, and the ordered reduction of partial sums."""

import torch
import triton
import triton.language as tl

# Partials are split by these constants and the shape alone, never by the device's number of processors: the sums then
# have one order, and so the same bits, everywhere.
TARGET_PROGRAMS = 1024
MAX_SLICES = 256


def launch(kernel, programs: int, x: torch.Tensor, *args, **config) -> None:
    """Run `kernel` on `programs` instances, on the device of x whatever the current device is.

    One grid axis only: the others stop at 65,535.
    """
    with torch.cuda.device_of(x):
        kernel[(programs,)](*args, **config, num_stages=1, enable_fp_fusion=True)


def block_c(C: int, largest: int) -> int:
    """Channels of one program: the largest of three powers of two that leaves at most an eighth of the lanes idle."""
    sizes = (largest, largest // 2, largest // 4)
    return min(triton.next_power_of_2(C), next((size for size in sizes if -C % size <= C // 8), sizes[-1]))


def rows_per_slice(rows: int, block: int, programs_per_slice: int) -> tuple[int, int]:
    """Split `rows` into slices of whole blocks; returns (rows in a slice, slices)."""
    wanted = max(1, min(MAX_SLICES, TARGET_PROGRAMS // programs_per_slice))
    per_slice = triton.cdiv(triton.cdiv(rows, block), wanted) * block
    return per_slice, triton.cdiv(rows, per_slice)


@triton.jit
def reduce_kernel(
    partial,  # (S, R, C) float32
    first,  # the sums of rows 0 .. FIRST_ROWS - 1: element (r, c) at r + c * FIRST_ROWS
    second,  # (C,) the sums of row FIRST_ROWS, or None
    S,
    C,
    FIRST_ROWS: tl.constexpr,
    R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    r = tl.program_id(0) % R
    c = tl.program_id(0) // R * BLOCK_C + tl.arange(0, BLOCK_C)
    s = tl.arange(0, BLOCK_S)[:, None]
    acc = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    for s0 in range(0, S, BLOCK_S):
        offset = ((s0 + s).to(tl.int64) * R + r) * C + c[None, :]
        acc += tl.load(partial + offset, mask=(s0 + s < S) & (c[None, :] < C), other=0.0)
    total = tl.sum(acc, 0)
    if second is None:
        tl.store(first + r + c * FIRST_ROWS, total.to(first.dtype.element_ty), mask=c < C)
    else:
        tl.store(first + r + c * FIRST_ROWS, total.to(first.dtype.element_ty), mask=(c < C) & (r < FIRST_ROWS))
        tl.store(second + c, total.to(second.dtype.element_ty), mask=(c < C) & (r == FIRST_ROWS))


def reduce_partials(partial: torch.Tensor, first: torch.Tensor, second: torch.Tensor | None = None) -> None:
    """Sum partial (S, R, C) over its slices, in a fixed order, into first (C, ...) and, its last row, second (C,)."""
    S, R, C = partial.shape
    first_rows = R if second is None else R - 1
    BLOCK_C = min(64, triton.next_power_of_2(C))
    programs = R * triton.cdiv(C, BLOCK_C)
    args = (partial, first, second, S, C)
    launch(reduce_kernel, programs, partial, *args, FIRST_ROWS=first_rows, R=R, BLOCK_S=16, BLOCK_C=BLOCK_C, num_warps=4)

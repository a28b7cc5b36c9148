"""Which kernel runs each pass of `grouped_conv`: by a committed table, never by timing. And the layout of its maps."""

from __future__ import annotations

import importlib.util
import itertools
import math
from typing import NamedTuple

import torch

from . import _registry
from ._function import constant_when_traced


class Shape(NamedTuple):
    """Sizes of one call: N maps of H x W, C channels to out_C in `groups`, filters of K x K taps."""

    N: int
    C: int
    H: int
    W: int
    out_C: int
    K: int
    stride: tuple[int, int]
    padding: tuple[int, int]
    groups: int

    @property
    def out(self) -> tuple[int, int, int, int]:
        H, W = ((size + 2 * p - self.K) // s + 1 for size, p, s in zip((self.H, self.W), self.padding, self.stride))
        return self.N, self.out_C, H, W


def pair(op: str, name: str, value, least: int) -> tuple[int, int]:
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2 or not all(isinstance(v, (int, torch.SymInt)) and not isinstance(v, bool) for v in pair) or min(pair) < least:
        raise ValueError(f"{op}: {name} must be one integer of at least {least} or two, got {value!r}")
    return pair


class Passes(NamedTuple):
    """Whether our kernel runs a pass; torch's own runs the others."""

    fwd: bool
    dx: bool
    dweight: bool


ALL, NONE = Passes(True, True, True), Passes(False, False, False)
MIN_ELEMENTS = 2**18  # of the result; below, the bookkeeping of a call costs more than its kernel gains
UNMEASURED = "torch's own kernel, as long as nobody has measured a faster one here"

# Of 3x3 kernels with as many channels a group out as in, for each pass (forward, dx, dweight): channels a group, and the least
# side of the output, from which on ours are at least a tenth faster.
# AMD EPYC (Zen 5), one thread, torch 2.15, 2026-11-23: benchmarks/tune_grouped_conv.py DTYPE. float32 with AVX512 again on
# 2026-11-28, torch 2.14, beside other work: what held both times, from the larger side on.
_TABLE: dict[tuple[str, torch.dtype, bool, int], tuple[dict[int, int], dict[int, int], dict[int, int]]] = {
    # instruction set, dtype, whether channels_last, stride
    ("AVX512", torch.float32, False, 1): (
        {2: 7, 4: 14, 6: 7, 8: 28, 10: 7, 12: 7, 20: 7, 24: 56, 56: 56},
        {2: 7, 4: 14, 6: 7, 8: 56, 10: 7, 12: 7, 20: 7, 24: 56, 40: 56, 56: 56},
        {2: 7, 4: 7, 6: 7, 8: 56, 10: 28, 12: 14, 20: 28},
    ),
    ("AVX512", torch.float32, False, 2): (
        {2: 7, 4: 56, 6: 7, 8: 56, 10: 56, 12: 56, 20: 56, 24: 56, 56: 56},
        {2: 7, 4: 56, 6: 28, 8: 56, 10: 7, 12: 56, 20: 7, 24: 56, 40: 56, 56: 56},
        {2: 7, 4: 7, 6: 14, 8: 56, 10: 14, 12: 14, 20: 56, 24: 56},
    ),
    ("AVX512", torch.float32, True, 1): (
        {2: 7, 4: 7, 6: 7, 8: 56, 10: 14, 12: 7, 20: 7},
        {2: 7, 6: 7, 10: 14, 12: 7, 20: 14},
        {2: 14, 4: 28, 6: 28, 8: 56},
    ),
    ("AVX512", torch.float32, True, 2): (
        {2: 56, 6: 56, 10: 56, 12: 56},
        {},
        {2: 56, 4: 56, 6: 56, 8: 28, 10: 28, 12: 56, 20: 28, 24: 28, 40: 56, 56: 56},
    ),
    ("AVX2", torch.float32, False, 1): (
        {2: 7, 4: 7, 6: 7, 8: 14, 10: 7, 12: 7, 20: 7, 24: 56},
        {2: 7, 4: 7, 6: 7, 8: 56, 10: 7, 12: 7, 20: 7, 24: 56, 56: 56},
        {2: 7, 4: 7, 6: 7, 8: 56, 10: 7, 12: 7, 20: 14, 24: 56},
    ),
    ("AVX2", torch.float32, False, 2): (
        {2: 7, 4: 7, 6: 7, 8: 56, 10: 7, 12: 7, 20: 56, 24: 56, 56: 56},
        {2: 7, 4: 7, 6: 7, 8: 56, 10: 7, 12: 7, 20: 7, 24: 56, 40: 56, 56: 56},
        {2: 7, 4: 7, 6: 7, 8: 56, 10: 7, 12: 7, 20: 14, 24: 56, 56: 56},
    ),
    ("AVX2", torch.float32, True, 1): (
        {2: 7, 4: 7, 6: 7, 8: 7, 10: 7, 12: 7, 20: 56},
        {2: 7, 4: 7, 6: 7, 8: 7, 10: 7, 12: 7, 20: 56},
        {2: 7, 4: 7, 6: 56, 8: 56, 10: 14, 12: 14, 20: 28, 24: 56, 40: 56, 56: 28},
    ),
    ("AVX2", torch.float32, True, 2): (
        {2: 7, 4: 56, 6: 7, 8: 56, 10: 7, 12: 56, 20: 56},
        {10: 7, 12: 7},
        {2: 28, 4: 28, 6: 28, 8: 56, 10: 28, 12: 28, 20: 28, 24: 28, 40: 28, 56: 28},
    ),
    ("AVX512", torch.bfloat16, False, 1): (
        {2: 7, 4: 28, 6: 7, 8: 56, 10: 7, 12: 14, 20: 7},
        {2: 7, 4: 28, 6: 7, 8: 56, 10: 7, 12: 28, 20: 14},
        {2: 7, 4: 7, 6: 7, 8: 14, 10: 14, 12: 14, 20: 28, 24: 28},
    ),
    ("AVX512", torch.bfloat16, False, 2): (
        {2: 7, 6: 7, 10: 7},
        {2: 7, 6: 7, 10: 7, 20: 14, 24: 14, 56: 56},
        {2: 7, 4: 7, 6: 14, 8: 14, 10: 14, 12: 14, 24: 28},
    ),
    ("AVX512", torch.bfloat16, True, 1): ({2: 7, 4: 14, 6: 7, 12: 14}, {2: 7, 4: 14, 6: 7, 8: 56, 12: 14}, {2: 7, 4: 7, 6: 28}),
    ("AVX512", torch.bfloat16, True, 2): ({2: 7}, {2: 7, 6: 7, 10: 7}, {2: 7, 4: 7, 6: 7, 8: 56}),
}
# The dtypes that torch computes by a product of matrices for each group: 3 to 30 times faster at every width measured.
_EVERY = dict.fromkeys((2, 4, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 56), 14)
_SLOW = ("AVX512",), (torch.float16, torch.float64), (False, True), (1, 2)
_TABLE.update({key: (_EVERY, _EVERY, _EVERY) for key in itertools.product(*_SLOW)})


def _rows(dtype: torch.dtype, nhwc: bool, stride: int) -> tuple | None:
    """The table's, None on other processors than were measured: oneDNN has faster ways on Intel's."""
    fast_half = dtype == torch.float16 and torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_fp16_supported()
    if not _MEASURED or fast_half:
        return None
    return _TABLE.get((torch.backends.cpu.get_cpu_capability(), dtype, nhwc, stride))


@constant_when_traced
def _sides(width: int, *key) -> tuple[float, ...] | None:
    """Of `width` channels a group, the shorter side of outputs from which each pass is ours; plain numbers, for torch.compile."""
    rows = _rows(*key)
    return None if rows is None else tuple(row.get(width, math.inf) for row in rows)


_MEASURED = importlib.util.find_spec("fastconv._C") is not None and importlib.import_module("fastconv._C").cpu_vendor() == "amd"


def is_nhwc(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether F.conv2d returns channels_last: where one of its arguments has that layout alone."""
    return any(not t.is_contiguous() and t.is_contiguous(memory_format=torch.channels_last) for t in (x, weight))


def passes(device: str, dtypes: set[torch.dtype], width: int, shape: Shape, nhwc: bool) -> Passes:
    """The passes that are ours in a call on these maps with `width` channels a group."""
    N, C, H, W = shape.out
    square = shape.K == 3 and shape.stride[0] == shape.stride[1] and C == shape.C
    if device != "cpu" or len(dtypes) > 1 or not square or N * C * H * W < MIN_ELEMENTS:
        return NONE
    sides = _sides(width, *dtypes, nhwc, shape.stride[0])
    return NONE if sides is None else Passes(*(min(H, W) >= side for side in sides))


def native_everywhere(weight: torch.Tensor, groups: int, stride: tuple[int, int]) -> str:
    """Why torch's own kernel runs every call of a convolution with this weight, or "" where ours may win some."""
    device, dtype, (out_C, width, K, _) = weight.device.type, weight.dtype, weight.shape
    if device == "meta":
        return ""
    if device == "cuda":  # csrc/geometry.h: grouped_pays
        served = K == 3 and stride[0] == stride[1] and out_C == width * groups and width in range(2, 25, 2)
        return "" if served else UNMEASURED
    if device != "cpu":
        return UNMEASURED
    measured = [rows for nhwc in (False, True) if (rows := _rows(dtype, nhwc, stride[0]))]
    if K != 3 or stride[0] != stride[1] or out_C != width * groups or not measured:
        return UNMEASURED
    return "" if any(width in row for rows in measured for row in rows) else f"torch's own kernel is as fast at {width} channels a group"


def cuda_passes(x, weight, dtype: torch.dtype, shape, nhwc: bool, forced: bool) -> Passes:
    """All where the CUDA C++ kernels serve a call and, unless they are forced, are the choice of the table in csrc/geometry.h:
    here again, for torch.compile's symbolic sizes."""
    alike = x.dtype == dtype and dtype in (torch.bfloat16, torch.float16) and weight.dtype in (dtype, torch.float32)
    if not alike or not nhwc or shape.stride[0] != shape.stride[1] or shape.out_C != shape.C:
        return NONE
    (N, C, H, W), width = shape.out, shape.C // shape.groups
    serves = shape.K == 3 and shape.stride[0] in (1, 2) and 2 <= width <= 32 and C < 1 << 20
    serves = serves and max(shape.H, H) * max(shape.W, W) < (1 << 29) // C
    pays = width <= 24 and width % 2 == 0 and N * H * W * C >= 1 << 20
    return ALL if serves and (forced or pays) else NONE


def choose(op: str, x, weight, bias, shape, compute_dtype) -> tuple[_registry.Choice, Passes]:
    """The backend of a call, with the reason, and the passes that it runs; "native" where that is none."""
    choice = _registry.select(op, x, weight, bias)
    if choice.backend == "eager":  # before the layout is looked at: vmap knows none but contiguous
        return choice, NONE
    forced, nhwc, dtype = _registry.is_forced(), is_nhwc(x, weight), compute_dtype or x.dtype
    if choice.backend == "cuda":
        ours = cuda_passes(x, weight, dtype, shape, nhwc, forced)
    else:
        ours = ALL if forced else passes(x.device.type, {x.dtype, weight.dtype, dtype}, weight.shape[1], shape, nhwc)
    trained = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))
    runs = any(ours) if trained else ours.fwd
    theirs = [name for name, mine in zip(Passes._fields, ours) if not mine] if trained and runs else []
    kernel = f"ours but for {' and '.join(theirs)}" if theirs else "ours" if runs else "torch's own"
    reason = "" if forced else f"{kernel}, by the table for such sizes"
    return (choice._replace(reason=reason) if runs else _registry.Choice("native", reason)), ours

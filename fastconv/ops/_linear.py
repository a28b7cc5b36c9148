"""Linear layers over maps as 1x1 convolutions, where torch's convolutions (oneDNN) are faster than its matrix products (MKL).

MKL keeps AMD's processors from its AVX-512 code: its float32 products reach less than half of what oneDNN's do on Zen 5, and
on Zen 4, where such code has no more lanes, four fifths to all of it; F.linear also copies the bias to every row first. Both are
torch's own kernels and both have all derivatives; which one runs is decided at each call, by the shape. Gradients of weight and
bias are a kernel of ours where it is faster than either.
"""

from __future__ import annotations

import importlib.util
import os

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import register_flop_formula

from fastconv import _library

from ._function import constant_when_traced


def _prefers_convolution() -> bool:
    if importlib.util.find_spec("fastconv._C") is None or not torch.backends.mkl.is_available():
        return False
    from fastconv import _C

    return _C.cpu_vendor() == "amd" and torch.backends.cpu.get_cpu_capability().startswith("AVX512")


PREFERS_CONVOLUTION = _prefers_convolution()  # of this processor


def _up_to_zen4() -> bool:
    if not PREFERS_CONVOLUTION:
        return False
    from fastconv import _C

    return _C.cpu_family() < 26  # Zen 5


UP_TO_ZEN4 = _up_to_zen4()  # where AVX-512 has no more lanes than what MKL uses
# There linear_wgrad, the gradients of weight and bias in one kernel of ours, is 1.03x to 1.26x as fast as torch's best and its sum
# at transformers' and ConvNeXt's shapes, but 0.7x to 0.98x under these bounds, where MKL's product wins over few rows or for more
# outputs than inputs, and else the convolution. 2 threads, torch 2.14, 2026-11-29; not measured on other processors.
WEIGHT_KERNEL = UP_TO_ZEN4 and not _library.cpu_missing and os.environ.get("FASTCONV_CPU_CAPABILITY", "avx512") in ("", "avx512")
MIN_WEIGHT = 2**13  # elements a thread: each repacks what its share of them needs
MIN_WEIGHT_PRODUCTS = 2**24
MIN_WEIGHT_ROWS = 2048

# Where the convolution wins, forward and backward, on an AMD EPYC (Zen 5), 2 threads, torch 2.15, 2026-11-22: about 1.1x at
# MIN_PRODUCTS, 1.3x to 2.3x at ConvNeXt-T's shapes, 0.7x to 1.3x under MIN_ROWS. `pytest benchmarks -k linear` measures it.
MIN_ROWS = 192
MIN_PRODUCTS = 2**23  # rows x in_features x out_features
MIN_ELEMENTS = 20_480  # below it, or on one thread, torch computes a 1x1 convolution by MKL too


@constant_when_traced
def _threads() -> int:
    return torch.get_num_threads()


@constant_when_traced
def _full_precision() -> bool:
    """Whether float32 means float32 to both kernels: each has its own switch for less."""
    mkldnn = torch.backends.mkldnn
    return mkldnn.enabled and torch.get_float32_matmul_precision() == "highest" and mkldnn.conv.fp32_precision in ("none", "ieee")


def convolution_is_faster(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether linear(x, weight) is to run as a convolution."""
    rows = x.numel() // max(x.shape[-1], 1)
    return (
        PREFERS_CONVOLUTION
        and x.device.type == "cpu" == weight.device.type
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and x.is_contiguous()
        and rows >= MIN_ROWS
        and rows * weight.numel() >= MIN_PRODUCTS
        and x.numel() > MIN_ELEMENTS
        and _threads() > 1
        and _full_precision()
    )


def _as_map(x: torch.Tensor) -> torch.Tensor:
    """Rows (rows, C) as one image of one column in channels_last: what the rows were before matters to oneDNN, which is half as
    fast on many small images."""
    return x.view(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)


def _forward(x, weight, bias):
    y = F.conv2d(_as_map(x), weight[:, :, None, None], bias).permute(0, 2, 3, 1).view(-1, weight.shape[0])
    return y.data  # no view to autograd: of one that a Function returns nobody may change the values, and many a dropout does


def _backward(dy, x, weight, need_dx: bool, need_dweight: bool, need_dbias: bool):
    dx = dweight = dbias = None
    by = _weight_gradient_by(x.shape[0], *weight.shape) if need_dweight else ""
    second_order = torch.is_grad_enabled() and (dy.requires_grad or x.requires_grad)  # of which our kernel knows nothing
    convolved = by == "convolution" or (by == "kernel" and second_order)
    if by == "product":
        dweight = dy.t() @ x
    elif by and not convolved:
        dweight, dbias = torch.ops.fastconv.linear_wgrad(dy, x, need_dbias)
    if need_dx or convolved:
        settings = [1, 1], [0, 0], [1, 1], False, [0, 0], 1  # stride, padding, dilation, transposed, output padding, groups
        maps = _as_map(dy), _as_map(x), weight[:, :, None, None]
        dx, conv_dweight, _ = torch.ops.aten.convolution_backward(*maps, None, *settings, [need_dx, convolved, False])
        dx = dx.permute(0, 2, 3, 1).reshape(x.shape) if need_dx else None
        dweight = conv_dweight.flatten(1) if convolved else dweight
    return dx, dweight, None if not need_dbias else dy.sum(0) if dbias is None else dbias


def _weight_gradient_by(rows: int, outputs: int, inputs: int) -> str:
    if not UP_TO_ZEN4:
        return "convolution"
    if WEIGHT_KERNEL and outputs * inputs >= MIN_WEIGHT * _threads() and rows * outputs * inputs >= MIN_WEIGHT_PRODUCTS:
        return "kernel"
    return "product" if rows < MIN_WEIGHT_ROWS or outputs > inputs else "convolution"


# The same as operators of their own, for torch.compile. In a graph of its own the compiler takes an image of one column for
# contiguous NCHW, and transposes every map before and after the convolution.
def _backward_op(dy, x, weight, *needs):
    return [t for t in _backward(dy, x, weight, *needs) if t is not None]


_operators = torch.library.Library("fastconv", "FRAGMENT")
for _schema, _kernel, _fake in (
    ("pointwise_conv(Tensor x, Tensor weight, Tensor? bias) -> Tensor", _forward, lambda x, w, b: x.new_empty((x.shape[0], w.shape[0]))),
    (
        "pointwise_conv_backward(Tensor dy, Tensor x, Tensor weight, bool need_dx, bool need_dweight, bool need_dbias) -> Tensor[]",
        _backward_op,
        lambda dy, x, w, *needs: [x.new_empty(shape) for shape, need in zip((x.shape, w.shape, w.shape[:1]), needs) if need],
    ),
    (
        "linear_wgrad(Tensor dy, Tensor x, bool need_dbias) -> (Tensor dweight, Tensor dbias)",
        None,  # csrc/cpu/linear.cpp
        lambda dy, x, need_dbias: (x.new_empty((dy.shape[1], x.shape[1])), x.new_empty((dy.shape[1] if need_dbias else 0,))),
    ),
):
    _operators.define(_schema)
    if _kernel is not None:
        _operators.impl(_schema.split("(")[0], _kernel, "CPU")
    torch.library.register_fake(f"fastconv::{_schema.split('(')[0]}", _fake, lib=_operators)


@register_flop_formula(torch.ops.fastconv.linear_wgrad)
def _flops(dy_shape, x_shape, *args, **kwargs) -> int:
    return 2 * dy_shape[0] * dy_shape[1] * x_shape[1]


class PointwiseConv(torch.autograd.Function):
    """x weight^T + bias for x (rows, C), as a 1x1 convolution. Differs from torch's own in dbias alone: oneDNN adds up its rows one
    by one, which over the 25,088 pixels of a first stage is ten times less accurate than the sum that nn.Linear takes."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        ctx.set_materialize_grads(False)
        return torch.ops.fastconv.pointwise_conv(x, weight, bias) if torch.compiler.is_compiling() else _forward(x, weight, bias)

    @staticmethod
    def backward(ctx, dy):
        if dy is None:
            return None, None, None
        x, weight = ctx.saved_tensors
        return gradients(dy.contiguous(), x, weight, *ctx.needs_input_grad)


def gradients(dy, x, weight, need_dx: bool, need_dweight: bool, need_dbias: bool):
    """dx, dweight and dbias of PointwiseConv, each None where it is not needed."""
    needs = need_dx, need_dweight, need_dbias
    if not torch.compiler.is_compiling():
        return _backward(dy, x, weight, *needs)
    grads = iter(torch.ops.fastconv.pointwise_conv_backward(dy, x, weight, *needs))
    return tuple(next(grads) if need else None for need in needs)


def as_convolution(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """F.linear(x, weight, bias) by the kernel of a 1x1 convolution."""
    y = PointwiseConv.apply(x.reshape(-1, x.shape[-1]), weight, bias)
    return y.view(*x.shape[:-1], weight.shape[0])


def linear(x, weight, bias):
    """F.linear, as a convolution where that is faster."""
    return as_convolution(x, weight, bias) if convolution_is_faster(x, weight) else F.linear(x, weight, bias)


def linear_gradients(dout, x, weight, need_dx: bool, need_dweight: bool, need_dbias: bool):
    """dout weight, dout^T x and the sum of dout, each None where it is not needed, by the kernel of `linear`. Without need_dweight
    of x only the shape is read."""
    if (need_dx or need_dweight) and convolution_is_faster(x, weight):
        return gradients(dout, x, weight, need_dx, need_dweight, need_dbias)
    return dout @ weight if need_dx else None, dout.t() @ x if need_dweight else None, dout.sum(0) if need_dbias else None

"""Grouped convolutions of any model, one module at a time: torch's own, and timm's with standardised weights or "same" padding.

Depthwise convolutions are left alone, and so is every site where the committed table knows no call that the kernels win.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ..ops import Choice, _grouped, grouped_conv, is_disabled
from ..ops.grouped_conv import KERNELS, OP, Shape
from ._block import _exporting
from ._graph import Unsupported
from ._module import PLAIN, FastModule, settle, unwrapped
from ._rule import Rule
from ._run_body import autocast_dtype

WIDTHS = range(2, 129)  # channels a group


def _standardised(conv: nn.Module) -> torch.Tensor:
    """The weights of timm's ScaledStdConv2d."""
    weight, scale = conv.weight, (conv.gain * conv.scale).view(-1)
    flat = weight.reshape(1, conv.out_channels, -1)
    return F.batch_norm(flat, None, None, weight=scale, training=True, momentum=0.0, eps=conv.eps).reshape_as(weight)


def _standardised_by_variance(conv: nn.Module) -> torch.Tensor:
    """The weights of the bundled ScaledStdConv2d."""
    var, mean = torch.var_mean(conv.weight, (1, 2, 3), correction=0, keepdim=True)
    return (conv.weight - mean) * torch.rsqrt(var + conv.eps) * (conv.gain * conv.scale)


# module, class: how its weights come about, None for as they are, and whether it pads to "same" as it goes
KINDS = {
    ("torch.nn.modules.conv", "Conv2d"): (None, False),
    ("timm.layers.conv2d_same", "Conv2dSame"): (None, True),
    ("timm.layers.std_conv", "ScaledStdConv2d"): (_standardised, False),
    ("timm.layers.std_conv", "ScaledStdConv2dSame"): (_standardised, True),
    ("fastconv.models.nfnet", "ScaledStdConv2d"): (_standardised_by_variance, False),
}


@dataclass(frozen=True)
class ConvLayout:
    standardise: Callable | None
    pad_same: Callable | None  # of timm, where padding follows the size of the input


@dataclass(frozen=True)
class GroupedConvRule(Rule):
    """nn.Conv2d with groups of more than one channel."""

    ops = (OP,)

    def matches(self, module: nn.Module) -> bool:
        return isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)) and 1 < module.groups < module.in_channels

    @property
    def mixin(self) -> type:
        return FastGroupedConv

    def read(self, conv: nn.Module) -> tuple[ConvLayout, dict[str, tuple[str, str]]]:
        kind = unwrapped(type(conv))
        found = KINDS.get((kind.__module__, kind.__qualname__))
        if found is None:
            raise Unsupported(f"it is a {kind.__name__}, whose forward fastconv does not know")
        if kind.forward.__qualname__ != f"{kind.__name__}.forward":
            raise Unsupported(f"{kind.__name__}.forward was replaced by {kind.forward.__qualname__}")
        K, width, out_width = conv.kernel_size[0], conv.in_channels // conv.groups, conv.out_channels // conv.groups
        requirements = {
            f"undilated, not {conv.dilation}": conv.dilation == (1, 1),
            f"padded with zeros, not by {conv.padding_mode}": conv.padding_mode == "zeros",
            f"square of size 1, 3, 5 or 7, not {conv.kernel_size}": conv.kernel_size == (K, K) and K in KERNELS,
            f"of {WIDTHS[0]} to {WIDTHS[-1]} channels a group, not {width} to {out_width}": width in WIDTHS and out_width in WIDTHS,
        }
        for needed, met in requirements.items():
            if not met:
                raise Unsupported(f"the convolution must be {needed}")
        standardise, same = found
        pads = same and getattr(conv, "same_pad", True)
        layout = ConvLayout(standardise, sys.modules["timm.layers.padding"].pad_same if pads else None)
        reason = _grouped.native_everywhere(conv.weight, conv.groups, conv.stride)
        return layout, {OP: ("native", reason) if reason else ("fused", "")}


RULES = (GroupedConvRule("", ()),)


class FastGroupedConv(FastModule):
    """The convolution by whichever kernel is the faster for the call."""

    def forward(self, *args, **kwargs):
        if is_disabled() or torch.jit.is_tracing() or _exporting():
            return super().forward(*args, **kwargs)
        x = args[0] if len(args) == 1 and not kwargs else None
        reason = _input_reason(self, x)
        if reason:
            settle(self, OP, Choice("eager", reason))
            return super().forward(*args, **kwargs)
        layout = self._fastconv.layout
        weight, bias = layout.standardise(self) if layout.standardise else self.weight, self.bias
        padding = _padding(self)
        if layout.pad_same:
            x, padding = layout.pad_same(x, self.kernel_size, self.stride, self.dilation), (0, 0)
        compute_dtype = autocast_dtype(x)
        reason = _weight_reason(x, weight, bias, padding, compute_dtype)
        arguments = x, weight, bias, self.stride, padding, self.groups
        choice = Choice("eager", reason) if reason else _choice(*arguments, compute_dtype)
        if settle(self, OP, choice) not in ("eager", "native"):
            return grouped_conv(*arguments, compute_dtype=compute_dtype)
        return F.conv2d(x, weight, bias, self.stride, padding, self.dilation, self.groups)


def _choice(x, weight, bias, stride, padding, groups, compute_dtype) -> Choice:
    shape = Shape(*x.shape, weight.shape[0], weight.shape[-1], stride, padding, groups)
    return _grouped.choose(OP, x, weight, bias, shape, compute_dtype)[0]


def _padding(conv: nn.Conv2d) -> tuple[int, int]:
    if isinstance(conv.padding, str):  # "same" has stride 1, and K is odd
        return (conv.kernel_size[0] // 2 if conv.padding == "same" else 0,) * 2
    return conv.padding


def _input_reason(conv: nn.Conv2d, x) -> str:
    """Why the original forward must run, or ""."""
    if x is None:
        return "called with other arguments than one tensor"
    if type(x) not in PLAIN:
        return f"the input is a {type(x).__name__}"
    if x.dim() != 4 or x.shape[1] != conv.in_channels:
        return "the input is not (N, C, H, W) with the channels of the convolution"
    return ""


def _weight_reason(x, weight, bias, padding, compute_dtype) -> str:
    """Why the op cannot take these, or ""."""
    for parameter in (weight, bias):
        if parameter is not None and type(parameter) not in PLAIN:
            return f"a parameter is a {type(parameter).__name__}"
        if parameter is not None and parameter.device != x.device:
            return "the input and the parameters are on different devices"
    if bias is not None and bias.dtype != weight.dtype:
        return "weight and bias have different dtypes"
    if compute_dtype is None and weight.dtype != x.dtype:
        return "the input and the weight have different dtypes"
    if compute_dtype is not None and torch.float64 in (x.dtype, weight.dtype):
        return "autocast does not cast float64"
    small = any(size + 2 * p < weight.shape[-1] for size, p in zip(x.shape[2:], padding))
    return "the map is smaller than the kernel" if small else ""

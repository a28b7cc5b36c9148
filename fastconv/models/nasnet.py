"""NASNet-A.

Zoph, Vasudevan, Shlens, Le: Learning Transferable Architectures for Scalable Image Recognition, CVPR 2018 (arXiv 1707.07012).

Two small cells found by a search on CIFAR-10, one that keeps the resolution and one that halves it, stacked for ImageNet. A cell takes
the results of the two cells before it and adds up five pairs among separable convolutions, poolings and its inputs; what no pair
uses is concatenated.

                        cells between reductions    stem, last channels    params M   GMACs         top-1 %
    nasnet_a_mobile     4                           32, 1056                   5.29   0.564 at 224    74.0
    nasnetalarge        6                           96, 4032                  88.75   23.78 at 331    82.7

Module names are timm's (and those of the checkpoints that were ported from TensorFlow, whose mobile network leaves out cells 4 and 5 of
each six). Padding is TensorFlow's "same", which puts the odd row at the end; as in timm, average pooling at stride 2 counts those
zeros.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


def _pad_same(x: torch.Tensor, kernel_size: int, stride: int, value: float = 0.0) -> torch.Tensor:
    """Rows and columns for ceil(size / stride) results, the odd one at the end."""
    height, width = (max((-(-size // stride) - 1) * stride + kernel_size - size, 0) for size in x.shape[-2:])
    return F.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2), value=value)


def _max_pool(x: torch.Tensor) -> torch.Tensor:
    return F.max_pool2d(_pad_same(x, 3, 2, -torch.inf), 3, stride=2)


def _avg_pool(x: torch.Tensor, stride: int = 1) -> torch.Tensor:
    if stride == 1:
        return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
    return F.avg_pool2d(_pad_same(x, 3, stride), 3, stride=stride)


class SeparableConv2d(nn.Module):
    """Depthwise and 1x1 convolution."""

    def __init__(self, in_chans: int, out_chans: int, kernel_size: int, stride: int):
        super().__init__()
        self.kernel_size, self.stride = kernel_size, stride
        self.depthwise_conv2d = nn.Conv2d(in_chans, in_chans, kernel_size, stride, groups=in_chans, bias=False)
        self.pointwise_conv2d = nn.Conv2d(in_chans, out_chans, kernel_size=1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.pointwise_conv2d(self.depthwise_conv2d(_pad_same(x, self.kernel_size, self.stride)))


class BranchSeparables(nn.Module):
    """ReLU, separable convolution, BatchNorm, twice; the first has the stride."""

    def __init__(self, in_chans: int, out_chans: int, kernel_size: int, stride: int = 1):
        super().__init__()
        self.separable_1 = SeparableConv2d(in_chans, out_chans, kernel_size, stride)
        self.bn_sep_1 = nn.BatchNorm2d(out_chans, eps=1e-3)
        self.separable_2 = SeparableConv2d(out_chans, out_chans, kernel_size, 1)
        self.bn_sep_2 = nn.BatchNorm2d(out_chans, eps=1e-3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.bn_sep_1(self.separable_1(F.relu(x)))
        return self.bn_sep_2(self.separable_2(F.relu(x)))


class ActConvBn(nn.Module):
    """ReLU, 1x1 convolution, BatchNorm."""

    def __init__(self, in_chans: int, out_chans: int):
        super().__init__()
        self.conv = nn.Conv2d(in_chans, out_chans, kernel_size=1, bias=False)
        self.bn = nn.BatchNorm2d(out_chans, eps=1e-3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(self.conv(F.relu(x)))


class Cell(nn.Module):
    """What every cell does with its inputs: the last result `x` goes through a 1x1 convolution to `chans`. So does `previous`, the one
    before, or, where it has twice the side, every second pixel of it and of it shifted by one, each to half of the channels.
    """

    def __init__(self, in_chans: int, previous_chans: int, chans: int, halve_previous: bool = False):
        super().__init__()
        self.conv_1x1 = ActConvBn(in_chans, chans)
        self.halve_previous = halve_previous
        if halve_previous:
            self.path_1 = nn.Sequential()
            self.path_1.add_module("conv", nn.Conv2d(previous_chans, chans // 2, kernel_size=1, bias=False))
            self.path_2 = nn.Sequential()
            self.path_2.add_module("conv", nn.Conv2d(previous_chans, chans // 2, kernel_size=1, bias=False))
            self.final_path_bn = nn.BatchNorm2d(chans // 2 * 2, eps=1e-3)
        else:
            self.conv_prev_1x1 = ActConvBn(previous_chans, chans)

    def inputs(self, x: torch.Tensor, previous: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.halve_previous:
            return self.conv_1x1(x), self.conv_prev_1x1(previous)
        previous = F.relu(previous)
        shifted = F.pad(previous, (-1, 1, -1, 1))
        paths = [self.path_1(previous[..., ::2, ::2]), self.path_2(shifted[..., ::2, ::2])]
        return self.conv_1x1(x), self.final_path_bn(torch.cat(paths, dim=1))


class NormalCell(Cell):
    """Keeps the resolution: 6 * chans channels. Figure 4 of the paper, left."""

    def __init__(self, in_chans: int, previous_chans: int, chans: int, halve_previous: bool = False):
        super().__init__(in_chans, previous_chans, chans, halve_previous)
        self.comb_iter_0_left = BranchSeparables(chans, chans, 5)
        self.comb_iter_0_right = BranchSeparables(chans, chans, 3)
        self.comb_iter_1_left = BranchSeparables(chans, chans, 5)
        self.comb_iter_1_right = BranchSeparables(chans, chans, 3)
        self.comb_iter_4_left = BranchSeparables(chans, chans, 3)

    def forward(self, x: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
        x, previous = self.inputs(x, previous)
        pairs = [
            self.comb_iter_0_left(x) + self.comb_iter_0_right(previous),
            self.comb_iter_1_left(previous) + self.comb_iter_1_right(previous),
            _avg_pool(x) + previous,
            2 * _avg_pool(previous),
            self.comb_iter_4_left(x) + x,
        ]
        return torch.cat([previous, *pairs], dim=1)


class ReductionCell(Cell):
    """Halves the resolution: 4 * chans channels. Figure 4 of the paper, right.

    The first of the stem (previous_chans None) sees the stem's map as its previous input too, at its own width.
    """

    def __init__(self, in_chans: int, previous_chans: int | None, chans: int, halve_previous: bool = False):
        super().__init__(in_chans, previous_chans or in_chans, chans, halve_previous)
        right_chans = chans
        self.raw_previous = previous_chans is None
        if self.raw_previous:
            del self.conv_prev_1x1
            right_chans = in_chans
        self.comb_iter_0_left = BranchSeparables(chans, chans, 5, 2)
        self.comb_iter_0_right = BranchSeparables(right_chans, chans, 7, 2)
        self.comb_iter_1_right = BranchSeparables(right_chans, chans, 7, 2)
        self.comb_iter_2_right = BranchSeparables(right_chans, chans, 5, 2)
        self.comb_iter_4_left = BranchSeparables(chans, chans, 3)

    def forward(self, x: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
        x, previous = (self.conv_1x1(x), previous) if self.raw_previous else self.inputs(x, previous)
        first = self.comb_iter_0_left(x) + self.comb_iter_0_right(previous)
        second = _max_pool(x) + self.comb_iter_1_right(previous)
        third = _avg_pool(x, stride=2) + self.comb_iter_2_right(previous)
        return torch.cat([second, third, _avg_pool(first) + second, self.comb_iter_4_left(first) + _max_pool(x)], dim=1)


class ConvNorm(nn.Module):
    """The stem's convolution, without padding and activation."""

    def __init__(self, in_chans: int, out_chans: int):
        super().__init__()
        self.conv = nn.Conv2d(in_chans, out_chans, kernel_size=3, stride=2, bias=False)
        self.bn = nn.BatchNorm2d(out_chans, eps=1e-3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(self.conv(x))


class NASNet(nn.Module):
    """Stem with two reduction cells; three stages of `cells` normal cells with a reduction cell between; average pooling, linear head.

    Args:
        cells: normal cells of each stage, six at most.
        stem_chans: channels of the stem's convolution.
        num_features: channels of the last cell, divisible by 24.
        in_chans: channels of the images, (N, in_chans, H, W).
        num_classes: size of the head.
        drop_rate: dropout before the head, 0.5 in the paper.
    """

    def __init__(
        self, cells: int, stem_chans: int, num_features: int, *, in_chans: int = 3, num_classes: int = 1000, drop_rate: float = 0.0
    ):
        super().__init__()
        chans = num_features // 24
        self.conv0 = ConvNorm(in_chans, stem_chans)
        self.cell_stem_0 = ReductionCell(stem_chans, None, chans // 4)
        self.cell_stem_1 = ReductionCell(chans // 4 * 4, stem_chans, chans // 2, halve_previous=True)
        before, last = chans // 4 * 4, chans // 2 * 4
        self.order = []
        for stage in range(3):
            width = chans * 2**stage
            if stage:
                self._add(f"reduction_cell_{stage - 1}", ReductionCell(last, before, width))
                last = 4 * width
            for i in range(cells):
                self._add(f"cell_{6 * stage + i}", NormalCell(last, before, width, halve_previous=i == 0))
                before, last = last, 6 * width
        self.head_drop = nn.Dropout(drop_rate)
        self.last_linear = nn.Linear(last, num_classes)

    def _add(self, name: str, cell: Cell) -> None:
        self.add_module(name, cell)
        self.order.append(name)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        stem = self.conv0(x)
        previous = self.cell_stem_0(stem, stem)
        x = self.cell_stem_1(previous, stem)
        for name in self.order:
            result = getattr(self, name)(x, previous)
            # the first cell after a reduction takes what the reduction took as previous
            previous, x = (previous if name.startswith("reduction") else x), result
        return self.last_linear(self.head_drop(F.relu(x).mean((-2, -1))))


def nasnet_a_mobile(**kw) -> NASNet:
    return NASNet(4, 32, 1056, **kw)


def nasnetalarge(**kw) -> NASNet:
    return NASNet(6, 96, 4032, **kw)

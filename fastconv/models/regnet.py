"""RegNetX and RegNetY.

Radosavovic, Kosaraju, Girshick, He, Dollar: Designing Network Design Spaces, CVPR 2020 (arXiv 2003.13678).

Instead of one network, a space of them: bottleneck blocks without a bottleneck (1x1, grouped 3x3, 1x1, all of one width), whose widths
follow a line, u_j = w_0 + w_a * j at block j, quantised to w_0 * w_m^k so that they form four stages. X has no attention, Y adds
squeeze-and-excitation after the 3x3. Depth stays near 20 blocks; the number is the multiply-accumulates in units of 10 M.

                   params M   GMACs at 224    top-1 % (official repository, 100 epochs)
    regnetx_002        2.68          0.199    68.9
    regnetx_004        5.16          0.398    72.7
    regnetx_006        6.20          0.601    74.1
    regnetx_008        7.26          0.800    75.2
    regnetx_016        9.19          1.60     77.0
    regnetx_032       15.30          3.18     78.3
    regnetx_040       22.12          3.96     78.6
    regnetx_064       26.21          6.46     79.2
    regnetx_080       39.57          8.00     79.3
    regnetx_120       46.11         12.09     79.7
    regnetx_160       54.28         15.94     80.0
    regnetx_320      107.81         31.74     80.5
    regnety_002        3.16          0.200    70.4
    regnety_004        4.34          0.402    74.1
    regnety_006        6.06          0.601    75.5
    regnety_008        6.26          0.797    76.3
    regnety_016       11.20          1.61     78.0
    regnety_032       19.44          3.18     79.0
    regnety_040       20.65          3.97     79.4
    regnety_064       30.58          6.36     79.9
    regnety_080       39.18          7.96     79.9
    regnety_120       51.82         12.09     80.3
    regnety_160       83.59         15.91     80.4
    regnety_320      145.05         32.28     81.0

Module names are timm's.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict

import torch
from torch import nn


def _conv_norm(in_chans: int, out_chans: int, kernel: int = 1, stride: int = 1, groups: int = 1, act: bool = True) -> nn.Sequential:
    layers = OrderedDict(
        conv=nn.Conv2d(in_chans, out_chans, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=False),
        bn=nn.BatchNorm2d(out_chans),
    )
    if act:
        layers["act"] = nn.ReLU(inplace=True)
    return nn.Sequential(layers)


class SEModule(nn.Module):
    """x * sigmoid(fc2(relu(fc1(mean of x over H and W)))): one factor for each channel of each image."""

    def __init__(self, chans: int, reduced: int):
        super().__init__()
        self.fc1 = nn.Conv2d(chans, reduced, kernel_size=1)
        self.act = nn.ReLU(inplace=True)
        self.fc2 = nn.Conv2d(reduced, chans, kernel_size=1)
        self.gate = nn.Sigmoid()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gate(self.fc2(self.act(self.fc1(x.mean((2, 3), keepdim=True)))))


class Bottleneck(nn.Module):
    """relu(shortcut + 1x1, grouped 3x3, [SE], 1x1) on (N, C, H, W), all of `out_chans`; SE is reduced to a quarter of `in_chans`."""

    def __init__(self, in_chans: int, out_chans: int, stride: int, group_width: int, se: bool):
        super().__init__()
        self.conv1 = _conv_norm(in_chans, out_chans)
        self.conv2 = _conv_norm(out_chans, out_chans, kernel=3, stride=stride, groups=out_chans // group_width)
        self.se = SEModule(out_chans, round(in_chans / 4)) if se else nn.Identity()
        self.conv3 = _conv_norm(out_chans, out_chans, act=False)
        same = stride == 1 and in_chans == out_chans
        self.downsample = nn.Identity() if same else _conv_norm(in_chans, out_chans, stride=stride, act=False)
        self.act3 = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act3(self.conv3(self.se(self.conv2(self.conv1(x)))) + self.downsample(x))


def stages(w_0: int, w_a: float, w_m: float, depth: int, group_width: int) -> list[tuple[int, int, int]]:
    """(blocks, width, group width) of each stage: section 3.3 of the paper.

    Widths are rounded to multiples of 8 and then of the group width, which is at most the width.
    """
    exponents = [round(math.log((w_0 + w_a * j) / w_0) / math.log(w_m)) for j in range(depth)]
    widths = Counter(round(w_0 * w_m**k / 8) * 8 for k in exponents)  # in order of first appearance, and the exponents grow
    groups = {width: min(group_width, width) for width in widths}
    return [(blocks, round(width / groups[width]) * groups[width], groups[width]) for width, blocks in widths.items()]


class RegNet(nn.Module):
    """Images (N, in_chans, H, W) to logits (N, num_classes): a stem of stride 2, then stages that each halve the resolution.

    Args:
        w_0, w_a, w_m, depth, group_width: the line of widths, see `stages`.
        se: RegNetY.
    """

    def __init__(
        self,
        w_0: int,
        w_a: float,
        w_m: float,
        depth: int,
        group_width: int,
        se: bool,
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
    ):
        super().__init__()
        self.stem = _conv_norm(in_chans, 32, kernel=3, stride=2)
        chans = 32
        self.stage_names = []
        for index, (blocks, width, groups) in enumerate(stages(w_0, w_a, w_m, depth, group_width), 1):
            stage = nn.Sequential()
            for i in range(blocks):
                stage.add_module(f"b{i + 1}", Bottleneck(chans, width, 2 if i == 0 else 1, groups, se))
                chans = width
            self.add_module(f"s{index}", stage)
            self.stage_names.append(f"s{index}")
        self.head = nn.Sequential(OrderedDict(pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(1), fc=nn.Linear(chans, num_classes)))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.out_channels * module.kernel_size[0] ** 2 // module.groups
                nn.init.normal_(module.weight, std=(2 / fan_out) ** 0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.head.fc.weight, std=0.01)
        nn.init.zeros_(self.head.fc.bias)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Images to feature maps (N, C, H / 32, W / 32)."""
        x = self.stem(x)
        for name in self.stage_names:
            x = self.get_submodule(name)(x)
        return x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.forward_features(x))


def regnetx_002(**kw) -> RegNet:
    return RegNet(24, 36.44, 2.49, 13, 8, se=False, **kw)


def regnetx_004(**kw) -> RegNet:
    return RegNet(24, 24.48, 2.54, 22, 16, se=False, **kw)


def regnetx_006(**kw) -> RegNet:
    return RegNet(48, 36.97, 2.24, 16, 24, se=False, **kw)


def regnetx_008(**kw) -> RegNet:
    return RegNet(56, 35.73, 2.28, 16, 16, se=False, **kw)


def regnetx_016(**kw) -> RegNet:
    return RegNet(80, 34.01, 2.25, 18, 24, se=False, **kw)


def regnetx_032(**kw) -> RegNet:
    return RegNet(88, 26.31, 2.25, 25, 48, se=False, **kw)


def regnetx_040(**kw) -> RegNet:
    return RegNet(96, 38.65, 2.43, 23, 40, se=False, **kw)


def regnetx_064(**kw) -> RegNet:
    return RegNet(184, 60.83, 2.07, 17, 56, se=False, **kw)


def regnetx_080(**kw) -> RegNet:
    return RegNet(80, 49.56, 2.88, 23, 120, se=False, **kw)


def regnetx_120(**kw) -> RegNet:
    return RegNet(168, 73.36, 2.37, 19, 112, se=False, **kw)


def regnetx_160(**kw) -> RegNet:
    return RegNet(216, 55.59, 2.10, 22, 128, se=False, **kw)


def regnetx_320(**kw) -> RegNet:
    return RegNet(320, 69.86, 2.00, 23, 168, se=False, **kw)


def regnety_002(**kw) -> RegNet:
    return RegNet(24, 36.44, 2.49, 13, 8, se=True, **kw)


def regnety_004(**kw) -> RegNet:
    return RegNet(48, 27.89, 2.09, 16, 8, se=True, **kw)


def regnety_006(**kw) -> RegNet:
    return RegNet(48, 32.54, 2.32, 15, 16, se=True, **kw)


def regnety_008(**kw) -> RegNet:
    return RegNet(56, 38.84, 2.40, 14, 16, se=True, **kw)


def regnety_016(**kw) -> RegNet:
    return RegNet(48, 20.71, 2.65, 27, 24, se=True, **kw)


def regnety_032(**kw) -> RegNet:
    return RegNet(80, 42.63, 2.66, 21, 24, se=True, **kw)


def regnety_040(**kw) -> RegNet:
    return RegNet(96, 31.41, 2.24, 22, 64, se=True, **kw)


def regnety_064(**kw) -> RegNet:
    return RegNet(112, 33.22, 2.27, 25, 72, se=True, **kw)


def regnety_080(**kw) -> RegNet:
    return RegNet(192, 76.82, 2.19, 17, 56, se=True, **kw)


def regnety_120(**kw) -> RegNet:
    return RegNet(168, 73.36, 2.37, 19, 112, se=True, **kw)


def regnety_160(**kw) -> RegNet:
    return RegNet(200, 106.23, 2.48, 18, 112, se=True, **kw)


def regnety_320(**kw) -> RegNet:
    return RegNet(232, 115.89, 2.53, 20, 232, se=True, **kw)

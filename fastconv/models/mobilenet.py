"""MobileNet V1, V2 and V3.

Howard et al.: MobileNets: Efficient Convolutional Neural Networks for Mobile Vision Applications, 2017 (arXiv 1704.04861). Sandler,
Howard, Zhu, Zhmoginov, Chen: MobileNetV2: Inverted Residuals and Linear Bottlenecks, CVPR 2018 (arXiv 1801.04381). Howard et al.:
Searching for MobileNetV3, ICCV 2019 (arXiv 1905.02244).

V1 splits every convolution into a depthwise 3x3, which filters, and a 1x1, which mixes channels: 1/C2 + 1/K^2 of the arithmetic. V2
sums thin maps and widens between them (1x1 up, depthwise, 1x1 down), without activation at the thin end, where ReLU would lose too
much. V3 finds kernels and widths by search, adds squeeze-and-excitation and hard activations (piecewise polynomials for sigmoid and
swish), and moves the last 1x1 behind the pooling.

                              params M   GMACs at 224    top-1 %
    mobilenetv1_100               4.23          0.569    70.6 (paper)
    mobilenetv2_100               3.50          0.301    72.0
    mobilenetv2_140               6.11          0.582    74.7
    mobilenetv3_large_100         5.48          0.217    75.2
    mobilenetv3_small_100         2.54          0.0565   67.4

Module names are timm's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn


class BlockSpec(NamedTuple):
    """One block; `expand` is its widest part over its input, `act` its activation, `se` whether it has squeeze-and-excitation."""

    chans: int
    kernel: int = 3
    stride: int = 1
    expand: float = 1.0
    act: type[nn.Module] = nn.ReLU6
    se: bool = False


class SqueezeExcite(nn.Module):
    """x * hardsigmoid(conv_expand(relu(conv_reduce(mean of x over H and W)))): one factor for each channel of each image."""

    def __init__(self, chans: int, reduced: int):
        super().__init__()
        self.conv_reduce = nn.Conv2d(chans, reduced, kernel_size=1)
        self.act1 = nn.ReLU(inplace=True)
        self.conv_expand = nn.Conv2d(reduced, chans, kernel_size=1)
        self.gate = nn.Hardsigmoid()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gate(self.conv_expand(self.act1(self.conv_reduce(x.mean((2, 3), keepdim=True)))))


def _conv(in_chans: int, out_chans: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_chans, out_chans, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=False)


def _round_channels(chans: float) -> int:
    """To the nearest multiple of 8, but never down by more than 10%."""
    rounded = max(8, int(chans + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * chans else rounded


class DepthwiseSeparable(nn.Module):
    """Depthwise convolution, then 1x1: V1's block (with an activation after the 1x1 and no sum), and the first of V2 and V3."""

    def __init__(self, in_chans: int, spec: BlockSpec, pointwise_act: bool, skip: bool):
        super().__init__()
        self.has_skip = skip and in_chans == spec.chans and spec.stride == 1
        self.conv_dw = _conv(in_chans, in_chans, spec.kernel, spec.stride, groups=in_chans)
        self.bn1 = nn.BatchNorm2d(in_chans)
        self.act1 = spec.act(inplace=True)
        self.se = SqueezeExcite(in_chans, _round_channels(in_chans / 4)) if spec.se else nn.Identity()
        self.conv_pw = _conv(in_chans, spec.chans)
        self.bn2 = nn.BatchNorm2d(spec.chans)
        self.act2 = spec.act(inplace=True) if pointwise_act else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.se(self.act1(self.bn1(self.conv_dw(x))))
        y = self.act2(self.bn2(self.conv_pw(y)))
        return x + y if self.has_skip else y


class InvertedResidual(nn.Module):
    """1x1 up, depthwise convolution, [SE reduced to a quarter], 1x1 down without activation; the input is added where it fits."""

    def __init__(self, in_chans: int, spec: BlockSpec):
        super().__init__()
        mid = _round_channels(spec.expand * in_chans)
        self.has_skip = in_chans == spec.chans and spec.stride == 1
        self.conv_pw = _conv(in_chans, mid)
        self.bn1 = nn.BatchNorm2d(mid)
        self.act1 = spec.act(inplace=True)
        self.conv_dw = _conv(mid, mid, spec.kernel, spec.stride, groups=mid)
        self.bn2 = nn.BatchNorm2d(mid)
        self.act2 = spec.act(inplace=True)
        self.se = SqueezeExcite(mid, _round_channels(mid / 4)) if spec.se else nn.Identity()
        self.conv_pwl = _conv(mid, spec.chans)
        self.bn3 = nn.BatchNorm2d(spec.chans)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.act1(self.bn1(self.conv_pw(x)))
        y = self.se(self.act2(self.bn2(self.conv_dw(y))))
        y = self.bn3(self.conv_pwl(y))
        return x + y if self.has_skip else y


class ConvBlock(nn.Module):
    """V3's last 1x1 convolution before the pooling."""

    def __init__(self, in_chans: int, spec: BlockSpec):
        super().__init__()
        self.conv = _conv(in_chans, spec.chans)
        self.bn1 = nn.BatchNorm2d(spec.chans)
        self.act = spec.act(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.bn1(self.conv(x)))


class MobileNet(nn.Module):
    """Images (N, in_chans, H, W) to logits (N, num_classes), at a total stride of 32.

    Args:
        version: 1: separable blocks, no sums; 2: inverted residuals and a 1x1 convolution before the pooling; 3: it comes after.
        stages: the blocks of each stage.
        stem, features: channels after the first convolution and before the head (V1 has none there: the last stage's).
        drop_rate: dropout before the head.
    """

    def __init__(
        self,
        version: int,
        stages: list[list[BlockSpec]],
        stem: int,
        features: int,
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_rate: float = 0.0,
    ):
        super().__init__()
        self.version = version
        act = nn.Hardswish if version == 3 else nn.ReLU6
        self.conv_stem = _conv(in_chans, stem, kernel=3, stride=2)
        self.bn1 = nn.BatchNorm2d(stem)
        self.act1 = act(inplace=True)
        chans = stem
        self.blocks = nn.Sequential()
        for index, specs in enumerate(stages):
            blocks = nn.Sequential()
            for spec in specs:
                if version == 1 or index == 0:
                    blocks.append(DepthwiseSeparable(chans, spec, pointwise_act=version == 1, skip=version > 1))
                elif version == 3 and index == len(stages) - 1:
                    blocks.append(ConvBlock(chans, spec))
                else:
                    blocks.append(InvertedResidual(chans, spec))
                chans = spec.chans
            self.blocks.append(blocks)
        if version == 1:
            features = chans
        else:
            self.conv_head = nn.Conv2d(chans, features, kernel_size=1, bias=version == 3)
            self.bn2 = nn.BatchNorm2d(features) if version == 2 else nn.Identity()
            self.act2 = act(inplace=True)
        self.drop = nn.Dropout(drop_rate)
        self.classifier = nn.Linear(features, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.out_channels * module.kernel_size[0] ** 2 // module.groups
                nn.init.normal_(module.weight, std=(2 / fan_out) ** 0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.uniform_(self.classifier.weight, -(num_classes**-0.5), num_classes**-0.5)
        nn.init.zeros_(self.classifier.bias)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Images to feature maps (N, C, H / 32, W / 32)."""
        x = self.blocks(self.act1(self.bn1(self.conv_stem(x))))
        return self.act2(self.bn2(self.conv_head(x))) if self.version == 2 else x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.forward_features(x).mean((2, 3), keepdim=True)
        if self.version == 3:
            x = self.act2(self.conv_head(x))
        return self.classifier(self.drop(x.flatten(1)))


def _stage(first: BlockSpec, depth: int) -> list[BlockSpec]:
    return [first] + [first._replace(stride=1)] * (depth - 1)


def mobilenetv1_100(**kw) -> MobileNet:
    stages = [_stage(BlockSpec(c, stride=s), depth) for c, s, depth in ((64, 1, 1), (128, 2, 2), (256, 2, 2), (512, 2, 6), (1024, 2, 2))]
    return MobileNet(1, stages, 32, 1024, **kw)


def _v2(width: float, **kw) -> MobileNet:
    rows = ((16, 1, 1, 1), (24, 2, 2, 6), (32, 3, 2, 6), (64, 4, 2, 6), (96, 3, 1, 6), (160, 3, 2, 6), (320, 1, 1, 6))
    stages = [_stage(BlockSpec(_round_channels(width * c), stride=s, expand=e), depth) for c, depth, s, e in rows]
    return MobileNet(2, stages, _round_channels(32 * width), max(1280, _round_channels(1280 * width)), **kw)


def mobilenetv2_100(**kw) -> MobileNet:
    return _v2(1.0, **kw)


def mobilenetv2_140(**kw) -> MobileNet:
    return _v2(1.4, **kw)


def mobilenetv3_large_100(**kw) -> MobileNet:
    relu, swish = nn.ReLU, nn.Hardswish
    stages = [
        [BlockSpec(16, act=relu)],
        [BlockSpec(24, 3, 2, 4, relu), BlockSpec(24, 3, 1, 3, relu)],
        _stage(BlockSpec(40, 5, 2, 3, relu, se=True), 3),
        [BlockSpec(80, 3, 2, 6, swish), BlockSpec(80, 3, 1, 2.5, swish), *_stage(BlockSpec(80, 3, 1, 2.3, swish), 2)],
        _stage(BlockSpec(112, 3, 1, 6, swish, se=True), 2),
        _stage(BlockSpec(160, 5, 2, 6, swish, se=True), 3),
        [BlockSpec(960, act=swish)],
    ]
    return MobileNet(3, stages, 16, 1280, **kw)


def mobilenetv3_small_100(**kw) -> MobileNet:
    relu, swish = nn.ReLU, nn.Hardswish
    stages = [
        [BlockSpec(16, 3, 2, 1, relu, se=True)],
        [BlockSpec(24, 3, 2, 4.5, relu), BlockSpec(24, 3, 1, 3.67, relu)],
        [BlockSpec(40, 5, 2, 4, swish, se=True), *_stage(BlockSpec(40, 5, 1, 6, swish, se=True), 2)],
        _stage(BlockSpec(48, 5, 1, 3, swish, se=True), 2),
        _stage(BlockSpec(96, 5, 2, 6, swish, se=True), 3),
        [BlockSpec(576, act=swish)],
    ]
    return MobileNet(3, stages, 16, 1024, **kw)

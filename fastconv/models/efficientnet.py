"""EfficientNet B0 to B7 and EfficientNetV2.

Tan, Le: EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks, ICML 2019 (arXiv 1905.11946). Tan, Le:
EfficientNetV2: Smaller Models and Faster Training, ICML 2021 (arXiv 2104.00298).

B0 comes from a search over inverted bottlenecks (1x1 up, depthwise, squeeze-and-excitation, 1x1 down); B1 to B7 scale its depth,
width and resolution together, by 1.2^phi, 1.1^phi and 1.15^phi. V2 searches for training speed: in the early stages, where
depthwise convolutions run badly, one full 3x3 replaces the 1x1 and the depthwise one ("fused"), widths are expanded less, and
image size and regularisation grow together during training.

                        width, depth factors    params M   GMACs              top-1 % (paper)
    efficientnet_b0     1.0, 1.0                    5.29    0.386 at 224      77.1
    efficientnet_b1     1.0, 1.1                    7.79    0.687 at 240      79.1
    efficientnet_b2     1.1, 1.2                    9.11    0.994 at 260      80.1
    efficientnet_b3     1.2, 1.4                   12.23    1.83 at 300       81.6
    efficientnet_b4     1.4, 1.8                   19.34    4.39 at 380       82.9
    efficientnet_b5     1.6, 2.2                   30.39   10.27 at 456       83.6
    efficientnet_b6     1.8, 2.6                   43.04   19.07 at 528       84.0
    efficientnet_b7     2.0, 3.1                   66.35   37.75 at 600       84.3
    efficientnetv2_s                               21.46    8.37 at 384       83.9
    efficientnetv2_m                               54.14   24.58 at 480       85.1
    efficientnetv2_l                              118.52   56.08 at 480       85.7
    efficientnetv2_xl                             208.12   52.53 at 384       87.3 at 512, pretrained on ImageNet-21K

Module names are timm's; padding is symmetric, as in timm's models without "tf_".
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import nn


class Stage(NamedTuple):
    """`depth` blocks of one kind: "conv", "ds" (depthwise separable), "fused" or "ir" (inverted residual)."""

    kind: str
    depth: int
    kernel: int
    stride: int
    expand: int
    chans: int


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016): in training, zeroes whole images with probability `drop_prob`, scales the others up."""

    def __init__(self, drop_prob: float):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or self.drop_prob == 0.0:
            return x
        keep_prob = 1.0 - self.drop_prob
        return x * x.new_empty((x.shape[0], 1, 1, 1)).bernoulli_(keep_prob).div_(keep_prob)


class SqueezeExcite(nn.Module):
    """x * sigmoid(conv_expand(silu(conv_reduce(mean of x over H and W)))): one factor for each channel of each image."""

    def __init__(self, chans: int, reduced: int):
        super().__init__()
        self.conv_reduce = nn.Conv2d(chans, reduced, kernel_size=1)
        self.act1 = nn.SiLU(inplace=True)
        self.conv_expand = nn.Conv2d(reduced, chans, kernel_size=1)
        self.gate = nn.Sigmoid()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gate(self.conv_expand(self.act1(self.conv_reduce(x.mean((2, 3), keepdim=True)))))


def _conv(in_chans: int, out_chans: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_chans, out_chans, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=False)


class Block(nn.Module):
    """The input is added where the shape is kept; subclasses say what to (`branch`)."""

    def __init__(self, in_chans: int, out_chans: int, stride: int, drop_path: float):
        super().__init__()
        self.has_skip = in_chans == out_chans and stride == 1
        self.act = nn.SiLU(inplace=True)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.drop_path(self.branch(x)) if self.has_skip else self.branch(x)


class ConvBlock(Block):
    """One convolution; V2's first stage."""

    def __init__(self, in_chans: int, out_chans: int, kernel: int, stride: int, expand: int, drop_path: float):
        super().__init__(in_chans, out_chans, stride, drop_path)
        self.conv = _conv(in_chans, out_chans, kernel, stride)
        self.bn1 = nn.BatchNorm2d(out_chans)

    def branch(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.bn1(self.conv(x)))


class DepthwiseSeparable(Block):
    """Depthwise convolution, SE, 1x1; an inverted residual that does not expand."""

    def __init__(self, in_chans: int, out_chans: int, kernel: int, stride: int, expand: int, drop_path: float):
        super().__init__(in_chans, out_chans, stride, drop_path)
        self.conv_dw = _conv(in_chans, in_chans, kernel, stride, groups=in_chans)
        self.bn1 = nn.BatchNorm2d(in_chans)
        self.se = SqueezeExcite(in_chans, in_chans // 4)
        self.conv_pw = _conv(in_chans, out_chans)
        self.bn2 = nn.BatchNorm2d(out_chans)

    def branch(self, x: torch.Tensor) -> torch.Tensor:
        x = self.se(self.act(self.bn1(self.conv_dw(x))))
        return self.bn2(self.conv_pw(x))


class InvertedResidual(Block):
    """1x1 to expand * in_chans channels, depthwise convolution, SE (reduced to in_chans / 4), 1x1 without activation."""

    def __init__(self, in_chans: int, out_chans: int, kernel: int, stride: int, expand: int, drop_path: float):
        super().__init__(in_chans, out_chans, stride, drop_path)
        mid = expand * in_chans
        self.conv_pw = _conv(in_chans, mid)
        self.bn1 = nn.BatchNorm2d(mid)
        self.conv_dw = _conv(mid, mid, kernel, stride, groups=mid)
        self.bn2 = nn.BatchNorm2d(mid)
        self.se = SqueezeExcite(mid, in_chans // 4)
        self.conv_pwl = _conv(mid, out_chans)
        self.bn3 = nn.BatchNorm2d(out_chans)

    def branch(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.bn1(self.conv_pw(x)))
        x = self.se(self.act(self.bn2(self.conv_dw(x))))
        return self.bn3(self.conv_pwl(x))


class FusedResidual(Block):
    """A full convolution to expand * in_chans channels, then 1x1 without activation."""

    def __init__(self, in_chans: int, out_chans: int, kernel: int, stride: int, expand: int, drop_path: float):
        super().__init__(in_chans, out_chans, stride, drop_path)
        mid = expand * in_chans
        self.conv_exp = _conv(in_chans, mid, kernel, stride)
        self.bn1 = nn.BatchNorm2d(mid)
        self.conv_pwl = _conv(mid, out_chans)
        self.bn2 = nn.BatchNorm2d(out_chans)

    def branch(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn2(self.conv_pwl(self.act(self.bn1(self.conv_exp(x)))))


_KINDS = {"conv": ConvBlock, "ds": DepthwiseSeparable, "ir": InvertedResidual, "fused": FusedResidual}


class EfficientNet(nn.Module):
    """Images (N, in_chans, H, W) to logits (N, num_classes), at a total stride of 32.

    Args:
        stages: the first block of each takes its stride, and the last stage's width.
        stem, features: channels after the first convolution and before the head.
        drop_rate: dropout before the head (paper: 0.2 for B0 to 0.5 for B7).
        drop_path_rate: stochastic depth, growing linearly with depth towards it.
    """

    def __init__(
        self,
        stages: list[Stage],
        stem: int = 32,
        features: int = 1280,
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        self.conv_stem = _conv(in_chans, stem, kernel=3, stride=2)
        self.bn1 = nn.BatchNorm2d(stem)
        self.act = nn.SiLU(inplace=True)
        chans, done, total = stem, 0, sum(stage.depth for stage in stages)
        self.blocks = nn.Sequential()
        for stage in stages:
            blocks = nn.Sequential()
            for i in range(stage.depth):
                stride = stage.stride if i == 0 else 1
                rate = drop_path_rate * done / total
                blocks.append(_KINDS[stage.kind](chans, stage.chans, stage.kernel, stride, stage.expand, rate))
                chans, done = stage.chans, done + 1
            self.blocks.append(blocks)
        self.conv_head = _conv(chans, features)
        self.bn2 = nn.BatchNorm2d(features)
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
        """Images to feature maps (N, features, H / 32, W / 32)."""
        x = self.blocks(self.act(self.bn1(self.conv_stem(x))))
        return self.act(self.bn2(self.conv_head(x)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.drop(self.forward_features(x).mean((2, 3))))


def _round_channels(chans: float) -> int:
    """To the nearest multiple of 8, but never down by more than 10%."""
    rounded = max(8, int(chans + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * chans else rounded


def _scaled(width: float, depth: float, **kw) -> EfficientNet:
    b0 = [
        Stage("ds", 1, 3, 1, 1, 16),
        Stage("ir", 2, 3, 2, 6, 24),
        Stage("ir", 2, 5, 2, 6, 40),
        Stage("ir", 3, 3, 2, 6, 80),
        Stage("ir", 3, 5, 1, 6, 112),
        Stage("ir", 4, 5, 2, 6, 192),
        Stage("ir", 1, 3, 1, 6, 320),
    ]
    stages = [s._replace(depth=math.ceil(depth * s.depth), chans=_round_channels(width * s.chans)) for s in b0]
    return EfficientNet(stages, _round_channels(32 * width), _round_channels(1280 * width), **kw)


def _v2(depths: tuple[int, ...], widths: tuple[int, ...], **kw) -> EfficientNet:
    kinds, strides, expands = ("conv", "fused", "fused", "ir", "ir", "ir", "ir"), (1, 2, 2, 2, 1, 2, 1), (1, 4, 4, 4, 6, 6, 6)
    stages = [Stage(k, d, 3, s, e, w) for k, d, s, e, w in zip(kinds, depths, strides, expands, widths)]
    return EfficientNet(stages, stem=widths[0], **kw)


def efficientnet_b0(**kw) -> EfficientNet:
    return _scaled(1.0, 1.0, **kw)


def efficientnet_b1(**kw) -> EfficientNet:
    return _scaled(1.0, 1.1, **kw)


def efficientnet_b2(**kw) -> EfficientNet:
    return _scaled(1.1, 1.2, **kw)


def efficientnet_b3(**kw) -> EfficientNet:
    return _scaled(1.2, 1.4, **kw)


def efficientnet_b4(**kw) -> EfficientNet:
    return _scaled(1.4, 1.8, **kw)


def efficientnet_b5(**kw) -> EfficientNet:
    return _scaled(1.6, 2.2, **kw)


def efficientnet_b6(**kw) -> EfficientNet:
    return _scaled(1.8, 2.6, **kw)


def efficientnet_b7(**kw) -> EfficientNet:
    return _scaled(2.0, 3.1, **kw)


def efficientnetv2_s(**kw) -> EfficientNet:
    return _v2((2, 4, 4, 6, 9, 15), (24, 48, 64, 128, 160, 256), **kw)


def efficientnetv2_m(**kw) -> EfficientNet:
    return _v2((3, 5, 5, 7, 14, 18, 5), (24, 48, 80, 160, 176, 304, 512), **kw)


def efficientnetv2_l(**kw) -> EfficientNet:
    return _v2((4, 7, 7, 10, 19, 25, 7), (32, 64, 96, 192, 224, 384, 640), **kw)


def efficientnetv2_xl(**kw) -> EfficientNet:
    return _v2((4, 8, 8, 16, 24, 32, 8), (32, 64, 96, 192, 256, 512, 640), **kw)

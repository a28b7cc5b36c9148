"""Inception v4.

Szegedy, Ioffe, Vanhoucke, Alemi: Inception-v4, Inception-ResNet and the Impact of Residual Connections on Learning, AAAI 2017
(arXiv 1602.07261).

Inception v3 made regular: one kind of module for each resolution, more of them, and a stem that itself branches. Its companion with
residual connections, Inception-ResNet v2, costs about the same and trains faster to about the same accuracy.

                    params M   GMACs at 299    top-1 % (paper, one crop)
    inception_v4       42.68          12.25    80.0

Module names are timm's (and those of the checkpoint that was ported from TensorFlow).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class ConvNormAct(nn.Module):
    """Convolution without bias, BatchNorm, ReLU."""

    def __init__(self, in_chans: int, out_chans: int, kernel_size: int | tuple[int, int], **kw):
        super().__init__()
        self.conv = nn.Conv2d(in_chans, out_chans, kernel_size, bias=False, **kw)
        self.bn = nn.BatchNorm2d(out_chans, eps=1e-3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


def _same(in_chans: int, out_chans: int, height: int, width: int) -> ConvNormAct:
    return ConvNormAct(in_chans, out_chans, (height, width), padding=(height // 2, width // 2))


def _pooled(in_chans: int, out_chans: int) -> nn.Sequential:
    return nn.Sequential(nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False), ConvNormAct(in_chans, out_chans, 1))


class Branches(nn.Module):
    """The concatenated results of `branch0`, `branch1`, ..."""

    def __init__(self, *branches: nn.Module):
        super().__init__()
        for i, branch in enumerate(branches):
            self.add_module(f"branch{i}", branch)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([branch(x) for branch in self.children()], dim=1)


class PoolOrConv(nn.Module):
    """Halved by max pooling and by a strided 3x3 convolution side by side; in the stem, figure 3 of the paper."""

    def __init__(self, in_chans: int, out_chans: int, pool_first: bool):
        super().__init__()
        self.conv = ConvNormAct(in_chans, out_chans, 3, stride=2)
        self.pool_first = pool_first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = [self.conv(x), F.max_pool2d(x, 3, stride=2)]
        return torch.cat(parts[::-1] if self.pool_first else parts, dim=1)


def mixed_4a() -> Branches:
    """Last but one of the stem: 3x3, with and without a 7x7 in two before it."""
    return Branches(
        nn.Sequential(ConvNormAct(160, 64, 1), ConvNormAct(64, 96, 3)),
        nn.Sequential(ConvNormAct(160, 64, 1), _same(64, 64, 1, 7), _same(64, 64, 7, 1), ConvNormAct(64, 96, 3)),
    )


def inception_a() -> Branches:
    """35x35; figure 4 of the paper."""
    return Branches(
        ConvNormAct(384, 96, 1),
        nn.Sequential(ConvNormAct(384, 64, 1), _same(64, 96, 3, 3)),
        nn.Sequential(ConvNormAct(384, 64, 1), _same(64, 96, 3, 3), _same(96, 96, 3, 3)),
        _pooled(384, 96),
    )


def reduction_a() -> Branches:
    """35x35 to 17x17; figure 7 of the paper."""
    return Branches(
        ConvNormAct(384, 384, 3, stride=2),
        nn.Sequential(ConvNormAct(384, 192, 1), _same(192, 224, 3, 3), ConvNormAct(224, 256, 3, stride=2)),
        nn.MaxPool2d(3, stride=2),
    )


def inception_b() -> Branches:
    """17x17; figure 5 of the paper."""
    return Branches(
        ConvNormAct(1024, 384, 1),
        nn.Sequential(ConvNormAct(1024, 192, 1), _same(192, 224, 1, 7), _same(224, 256, 7, 1)),
        nn.Sequential(
            ConvNormAct(1024, 192, 1), _same(192, 192, 7, 1), _same(192, 224, 1, 7), _same(224, 224, 7, 1), _same(224, 256, 1, 7)
        ),
        _pooled(1024, 128),
    )


def reduction_b() -> Branches:
    """17x17 to 8x8; figure 8 of the paper."""
    return Branches(
        nn.Sequential(ConvNormAct(1024, 192, 1), ConvNormAct(192, 192, 3, stride=2)),
        nn.Sequential(ConvNormAct(1024, 256, 1), _same(256, 256, 1, 7), _same(256, 320, 7, 1), ConvNormAct(320, 320, 3, stride=2)),
        nn.MaxPool2d(3, stride=2),
    )


class InceptionC(nn.Module):
    """8x8: 1x3 and 3x1 side by side end two of the branches; figure 6 of the paper."""

    def __init__(self):
        super().__init__()
        self.branch0 = ConvNormAct(1536, 256, 1)
        self.branch1_0 = ConvNormAct(1536, 384, 1)
        self.branch1_1a = _same(384, 256, 1, 3)
        self.branch1_1b = _same(384, 256, 3, 1)
        self.branch2_0 = ConvNormAct(1536, 384, 1)
        self.branch2_1 = _same(384, 448, 3, 1)
        self.branch2_2 = _same(448, 512, 1, 3)
        self.branch2_3a = _same(512, 256, 1, 3)
        self.branch2_3b = _same(512, 256, 3, 1)
        self.branch3 = _pooled(1536, 256)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        short = self.branch1_0(x)
        long = self.branch2_2(self.branch2_1(self.branch2_0(x)))
        wide = [self.branch1_1a(short), self.branch1_1b(short), self.branch2_3a(long), self.branch2_3b(long)]
        return torch.cat([self.branch0(x), *wide, self.branch3(x)], dim=1)


class InceptionV4(nn.Module):
    """Figure 9 of the paper.

    Args:
        in_chans: channels of the images, (N, in_chans, H, W) with H and W of 75 at least.
        num_classes: size of the head.
        drop_rate: dropout before the head, 0.2 in the paper's training.
    """

    def __init__(self, *, in_chans: int = 3, num_classes: int = 1000, drop_rate: float = 0.0):
        super().__init__()
        self.features = nn.Sequential(
            ConvNormAct(in_chans, 32, 3, stride=2),
            ConvNormAct(32, 32, 3),
            ConvNormAct(32, 64, 3, padding=1),
            PoolOrConv(64, 96, pool_first=True),
            mixed_4a(),
            PoolOrConv(192, 192, pool_first=False),
            *[inception_a() for _ in range(4)],
            reduction_a(),
            *[inception_b() for _ in range(7)],
            reduction_b(),
            *[InceptionC() for _ in range(3)],
        )
        self.head_drop = nn.Dropout(drop_rate)
        self.last_linear = nn.Linear(1536, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last_linear(self.head_drop(self.features(x).mean((-2, -1))))


def inception_v4(**kw) -> InceptionV4:
    return InceptionV4(**kw)

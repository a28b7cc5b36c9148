"""Inception-ResNet v2.

Szegedy, Ioffe, Vanhoucke, Alemi: Inception-v4, Inception-ResNet and the Impact of Residual Connections on Learning, AAAI 2017
(arXiv 1602.07261).

Inception modules as residual branches: their concatenation is expanded by a 1x1 convolution without activation, scaled by 0.1 to 0.2,
without which training breaks down for wide modules, and added to the input.

                           params M   GMACs at 299    top-1 % (paper, one crop)
    inception_resnet_v2       55.84          13.16    80.1

Module names are timm's (and those of the checkpoint that was ported from TensorFlow). As there, the stem is Inception v3's.
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


class Branches(nn.Module):
    """The concatenated results of `branch0`, `branch1`, ..."""

    def __init__(self, *branches: nn.Module):
        super().__init__()
        for i, branch in enumerate(branches):
            self.add_module(f"branch{i}", branch)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([branch(x) for branch in self.children()], dim=1)


class Residual(nn.Module):
    """act(x + scale * conv2d(concatenation of the branches)) on (N, chans, H, W).

    Args:
        chans: channels of x.
        scale: factor of the residual.
        branches: modules that map `chans` channels to `branch_chans` in all.
        act: with the ReLU; the last module has none.
    """

    def __init__(self, chans: int, scale: float, branch_chans: int, *branches: nn.Module, act: bool = True):
        super().__init__()
        self.scale, self.act = scale, act
        for i, branch in enumerate(branches):
            self.add_module(f"branch{i}", branch)
        self.branches = len(branches)
        self.conv2d = nn.Conv2d(branch_chans, chans, kernel_size=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.cat([getattr(self, f"branch{i}")(x) for i in range(self.branches)], dim=1)
        x = x + self.scale * self.conv2d(y)
        return F.relu(x) if self.act else x


def mixed_5b() -> Branches:
    """35x35, 192 to 320 channels: an Inception module without a residual."""
    return Branches(
        ConvNormAct(192, 96, 1),
        nn.Sequential(ConvNormAct(192, 48, 1), _same(48, 64, 5, 5)),
        nn.Sequential(ConvNormAct(192, 64, 1), _same(64, 96, 3, 3), _same(96, 96, 3, 3)),
        nn.Sequential(nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False), ConvNormAct(192, 64, 1)),
    )


def block35() -> Residual:
    """35x35; figure 16 of the paper."""
    return Residual(
        320,
        0.17,
        128,
        ConvNormAct(320, 32, 1),
        nn.Sequential(ConvNormAct(320, 32, 1), _same(32, 32, 3, 3)),
        nn.Sequential(ConvNormAct(320, 32, 1), _same(32, 48, 3, 3), _same(48, 64, 3, 3)),
    )


def mixed_6a() -> Branches:
    """35x35 to 17x17, 320 to 1088 channels; figure 7 of the paper."""
    return Branches(
        ConvNormAct(320, 384, 3, stride=2),
        nn.Sequential(ConvNormAct(320, 256, 1), _same(256, 256, 3, 3), ConvNormAct(256, 384, 3, stride=2)),
        nn.MaxPool2d(3, stride=2),
    )


def block17() -> Residual:
    """17x17; figure 17 of the paper."""
    return Residual(
        1088,
        0.10,
        384,
        ConvNormAct(1088, 192, 1),
        nn.Sequential(ConvNormAct(1088, 128, 1), _same(128, 160, 1, 7), _same(160, 192, 7, 1)),
    )


def mixed_7a() -> Branches:
    """17x17 to 8x8, 1088 to 2080 channels; figure 18 of the paper."""
    return Branches(
        nn.Sequential(ConvNormAct(1088, 256, 1), ConvNormAct(256, 384, 3, stride=2)),
        nn.Sequential(ConvNormAct(1088, 256, 1), ConvNormAct(256, 288, 3, stride=2)),
        nn.Sequential(ConvNormAct(1088, 256, 1), _same(256, 288, 3, 3), ConvNormAct(288, 320, 3, stride=2)),
        nn.MaxPool2d(3, stride=2),
    )


def block8(scale: float = 0.20, act: bool = True) -> Residual:
    """8x8; figure 19 of the paper."""
    return Residual(
        2080,
        scale,
        448,
        ConvNormAct(2080, 192, 1),
        nn.Sequential(ConvNormAct(2080, 192, 1), _same(192, 224, 1, 3), _same(224, 256, 3, 1)),
        act=act,
    )


class InceptionResNetV2(nn.Module):
    """Figure 15 of the paper, behind Inception v3's stem.

    Args:
        in_chans: channels of the images, (N, in_chans, H, W) with H and W of 75 at least.
        num_classes: size of the head.
        drop_rate: dropout before the head, 0.2 in the paper's training.
    """

    def __init__(self, *, in_chans: int = 3, num_classes: int = 1000, drop_rate: float = 0.0):
        super().__init__()
        self.conv2d_1a = ConvNormAct(in_chans, 32, 3, stride=2)
        self.conv2d_2a = ConvNormAct(32, 32, 3)
        self.conv2d_2b = ConvNormAct(32, 64, 3, padding=1)
        self.conv2d_3b = ConvNormAct(64, 80, 1)
        self.conv2d_4a = ConvNormAct(80, 192, 3)
        self.mixed_5b = mixed_5b()
        self.repeat = nn.Sequential(*[block35() for _ in range(10)])
        self.mixed_6a = mixed_6a()
        self.repeat_1 = nn.Sequential(*[block17() for _ in range(20)])
        self.mixed_7a = mixed_7a()
        self.repeat_2 = nn.Sequential(*[block8() for _ in range(9)])
        self.block8 = block8(scale=1.0, act=False)
        self.conv2d_7b = ConvNormAct(2080, 1536, 1)
        self.head_drop = nn.Dropout(drop_rate)
        self.classif = nn.Linear(1536, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv2d_2b(self.conv2d_2a(self.conv2d_1a(x)))
        x = self.conv2d_4a(self.conv2d_3b(F.max_pool2d(x, 3, stride=2)))
        x = self.repeat(self.mixed_5b(F.max_pool2d(x, 3, stride=2)))
        x = self.repeat_1(self.mixed_6a(x))
        x = self.block8(self.repeat_2(self.mixed_7a(x)))
        return self.classif(self.head_drop(self.conv2d_7b(x).mean((-2, -1))))


def inception_resnet_v2(**kw) -> InceptionResNetV2:
    return InceptionResNetV2(**kw)

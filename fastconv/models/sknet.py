"""SKNet.

Li, Wang, Hu, Yang: Selective Kernel Networks, CVPR 2019 (arXiv 1903.06586).

The receptive field chosen by the input: two branches with kernels of 3x3 and 5x5 (a 3x3 with dilation 2) are summed and pooled as in
SENet, and a softmax over the branches weighs each channel of one against the other. ResNeXt-50's bottlenecks with 32 groups and this
in the place of their 3x3 convolution are SKNet-50.

                          params M   GMACs at 224    top-1 % (paper, 224)
    skresnext50_32x4d        27.48           4.46    79.2

Module names are timm's, which names the network so.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class ConvNormAct(nn.Module):
    """Convolution without bias, BatchNorm, and ReLU unless `act` is False."""

    def __init__(
        self, in_chans: int, out_chans: int, kernel_size: int = 1, stride: int = 1, dilation: int = 1, groups: int = 1, act: bool = True
    ):
        super().__init__()
        padding = dilation * (kernel_size // 2)
        self.conv = nn.Conv2d(in_chans, out_chans, kernel_size, stride, padding, dilation, groups, bias=False)
        self.bn = nn.BatchNorm2d(out_chans)
        self.act = nn.ReLU(inplace=True) if act else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.bn(self.conv(x)))


class SelectiveKernelAttn(nn.Module):
    """Softmax over the paths of fc_select(relu(bn(fc_reduce(mean(sum over the paths))))).

    (N, paths, C, H, W) to (N, paths, C, 1, 1).
    """

    def __init__(self, chans: int, paths: int, attn_chans: int):
        super().__init__()
        self.paths = paths
        self.fc_reduce = nn.Conv2d(chans, attn_chans, kernel_size=1, bias=False)
        self.bn = nn.BatchNorm2d(attn_chans)
        self.fc_select = nn.Conv2d(attn_chans, chans * paths, kernel_size=1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.sum(1).mean((-2, -1), keepdim=True)
        x = self.fc_select(F.relu(self.bn(self.fc_reduce(x))))
        return x.unflatten(1, (self.paths, -1)).softmax(1)


class SelectiveKernel(nn.Module):
    """Grouped 3x3 convolutions with dilations 1, 2, ..., each channel weighed among them by attention."""

    def __init__(self, chans: int, stride: int, groups: int, paths: int = 2):
        super().__init__()
        self.paths = nn.ModuleList(ConvNormAct(chans, chans, 3, stride, dilation, groups) for dilation in range(1, paths + 1))
        self.attn = SelectiveKernelAttn(chans, paths, max(chans // 16, 32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.stack([path(x) for path in self.paths], dim=1)
        return (x * self.attn(x)).sum(1)


class Bottleneck(nn.Module):
    """1x1, selective kernel, 1x1 (4 * planes), added to the shortcut."""

    def __init__(self, in_chans: int, planes: int, stride: int, cardinality: int, base_width: int):
        super().__init__()
        width, out_chans = planes * base_width // 64 * cardinality, 4 * planes
        self.conv1 = ConvNormAct(in_chans, width)
        self.conv2 = SelectiveKernel(width, stride, cardinality)
        self.conv3 = ConvNormAct(width, out_chans, act=False)
        self.downsample = None
        if stride > 1 or in_chans != out_chans:
            self.downsample = nn.Sequential(nn.Conv2d(in_chans, out_chans, 1, stride, bias=False), nn.BatchNorm2d(out_chans))
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.act(self.conv3(self.conv2(self.conv1(x))) + shortcut)


class SKNet(nn.Module):
    """ResNet's stem, four stages of bottlenecks, average pooling, linear head.

    Args:
        depths: number of blocks of each stage.
        cardinality, base_width: groups of the 3x3 convolutions, and channels of each group in the first stage.
        in_chans: channels of the images, (N, in_chans, H, W).
        num_classes: size of the head.
    """

    def __init__(self, depths: tuple[int, ...], *, cardinality: int = 32, base_width: int = 4, in_chans: int = 3, num_classes: int = 1000):
        super().__init__()
        chans = 64
        self.conv1 = nn.Conv2d(in_chans, chans, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(chans)
        self.act1 = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        for stage, (depth, planes) in enumerate(zip(depths, (64, 128, 256, 512)), 1):
            blocks = []
            for i in range(depth):
                blocks.append(Bottleneck(chans, planes, 2 if stage > 1 and i == 0 else 1, cardinality, base_width))
                chans = 4 * planes
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
        self.fc = nn.Linear(chans, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.maxpool(self.act1(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(x.mean((-2, -1)))


def skresnext50_32x4d(**kw) -> SKNet:
    return SKNet((3, 4, 6, 3), **kw)

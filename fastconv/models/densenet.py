"""DenseNet.

Huang, Liu, van der Maaten, Weinberger: Densely Connected Convolutional Networks, CVPR 2017 (arXiv 1608.06993), best paper.

Each layer of a dense block takes the concatenation of all maps before it and adds k of its own ("growth rate"):
Y = [x, f(x)], not x + f(x). Features of every depth are reused and gradients reach every layer directly, so that k may be small; the
price is the memory of the maps that are kept. A layer is BN-ReLU-1x1 (4k) and BN-ReLU-3x3 (k); between the blocks a transition
halves channels (1x1) and resolution (2x2 average pooling).

                   k    layers of the blocks    params M   GMACs at 224    top-1 % (torchvision, one crop)
    densenet121    32   6, 12, 24, 16               7.98           2.83    74.4
    densenet161    48   6, 12, 36, 24              28.68           7.73    77.1
    densenet169    32   6, 12, 32, 32              14.15           3.36    75.6
    densenet201    32   6, 12, 48, 32              20.01           4.29    76.9

Module names are torchvision's (and timm's).
"""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn


class DenseLayer(nn.Module):
    """[x, conv2(relu(norm2(conv1(relu(norm1(x))))))]: (N, C, H, W) to (N, C + growth_rate, H, W)."""

    def __init__(self, in_chans: int, growth_rate: int, bn_size: int, drop_rate: float):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_chans)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(in_chans, bn_size * growth_rate, kernel_size=1, bias=False)
        self.norm2 = nn.BatchNorm2d(bn_size * growth_rate)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(bn_size * growth_rate, growth_rate, kernel_size=3, padding=1, bias=False)
        self.drop_rate = drop_rate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv1(self.relu1(self.norm1(x)))
        y = self.conv2(self.relu2(self.norm2(y)))
        return torch.cat([x, F.dropout(y, self.drop_rate, self.training)], dim=1)


def _dense_block(depth: int, in_chans: int, growth_rate: int, bn_size: int, drop_rate: float) -> nn.Sequential:
    layers = (DenseLayer(in_chans + i * growth_rate, growth_rate, bn_size, drop_rate) for i in range(depth))
    return nn.Sequential(OrderedDict((f"denselayer{i}", layer) for i, layer in enumerate(layers, 1)))


def _transition(in_chans: int) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            norm=nn.BatchNorm2d(in_chans),
            relu=nn.ReLU(inplace=True),
            conv=nn.Conv2d(in_chans, in_chans // 2, kernel_size=1, bias=False),
            pool=nn.AvgPool2d(2),
        )
    )


class DenseNet(nn.Module):
    """7x7 stem, dense blocks with transitions between them, norm, average pooling, linear head.

    Args:
        growth_rate: channels that each layer adds.
        depths: number of layers of each dense block.
        stem_chans: channels of the stem; 2 * growth_rate in the paper.
        in_chans: channels of the images, (N, in_chans, H, W) with H and W of 29 at least.
        num_classes: size of the head.
        bn_size: width of a layer's bottleneck in growth rates.
        drop_rate: dropout of each layer's new maps.
    """

    def __init__(
        self,
        growth_rate: int,
        depths: tuple[int, ...],
        stem_chans: int,
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        bn_size: int = 4,
        drop_rate: float = 0.0,
    ):
        super().__init__()
        self.features = nn.Sequential(
            OrderedDict(
                conv0=nn.Conv2d(in_chans, stem_chans, kernel_size=7, stride=2, padding=3, bias=False),
                norm0=nn.BatchNorm2d(stem_chans),
                relu0=nn.ReLU(inplace=True),
                pool0=nn.MaxPool2d(3, stride=2, padding=1),
            )
        )
        chans = stem_chans
        for i, depth in enumerate(depths, 1):
            self.features.add_module(f"denseblock{i}", _dense_block(depth, chans, growth_rate, bn_size, drop_rate))
            chans += depth * growth_rate
            if i < len(depths):
                self.features.add_module(f"transition{i}", _transition(chans))
                chans //= 2
        self.features.add_module("norm5", nn.BatchNorm2d(chans))
        self.classifier = nn.Linear(chans, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(F.relu(self.features(x), inplace=True).mean((-2, -1)))


def densenet121(**kw) -> DenseNet:
    return DenseNet(32, (6, 12, 24, 16), 64, **kw)


def densenet161(**kw) -> DenseNet:
    return DenseNet(48, (6, 12, 36, 24), 96, **kw)


def densenet169(**kw) -> DenseNet:
    return DenseNet(32, (6, 12, 32, 32), 64, **kw)


def densenet201(**kw) -> DenseNet:
    return DenseNet(32, (6, 12, 48, 32), 64, **kw)

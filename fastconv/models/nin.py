"""Network in Network.

Lin, Chen, Yan: Network In Network, ICLR 2014 (arXiv 1312.4400).

Each convolution is followed by a small multilayer perceptron at every position ("mlpconv", in effect two 1x1 convolutions), so that a
local patch is described by more than a linear filter; and instead of linear layers the last maps, one a class, are averaged.
Forerunner of the 1x1 bottlenecks of GoogLeNet and ResNet.

                    params M   GMACs at resolution    accuracy
    nin_cifar          0.967         0.222 at 32      89.6% (CIFAR-10, 91.2 with augmentation)
    nin_imagenet       7.60          1.10 at 224      59.4% top-1 (authors' Caffe model)

Sizes are those of the authors' Caffe definitions, where pooling rounds up (rounding down, nin_imagenet would have 0.97 GMACs).
`features.i` are the mlpconv layers with `conv`, `cccp1` and `cccp2`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class MlpConv(nn.Module):
    """Convolution and two 1x1 convolutions, each with a ReLU."""

    def __init__(self, in_chans: int, widths: tuple[int, int, int], kernel_size: int, stride: int = 1, padding: int = 0):
        super().__init__()
        self.conv = nn.Conv2d(in_chans, widths[0], kernel_size, stride, padding)
        self.cccp1 = nn.Conv2d(widths[0], widths[1], kernel_size=1)
        self.cccp2 = nn.Conv2d(widths[1], widths[2], kernel_size=1)
        for conv in (self.conv, self.cccp1, self.cccp2):
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
            nn.init.zeros_(conv.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for conv in (self.conv, self.cccp1, self.cccp2):
            x = F.relu(conv(x), inplace=True)
        return x


class NiN(nn.Module):
    """mlpconv layers and poolings in turn; the mean of the last maps is the logits, (N, num_classes)."""

    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.features = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.features(x).mean((-2, -1))


def nin_cifar(*, in_chans: int = 3, num_classes: int = 10, drop_rate: float = 0.5) -> NiN:
    """Images (N, in_chans, 32, 32)."""
    return NiN(
        MlpConv(in_chans, (192, 160, 96), 5, padding=2),
        nn.MaxPool2d(3, stride=2, ceil_mode=True),
        nn.Dropout(drop_rate),
        MlpConv(96, (192, 192, 192), 5, padding=2),
        nn.AvgPool2d(3, stride=2, ceil_mode=True),
        nn.Dropout(drop_rate),
        MlpConv(192, (192, 192, num_classes), 3, padding=1),
    )


def nin_imagenet(*, in_chans: int = 3, num_classes: int = 1000, drop_rate: float = 0.5) -> NiN:
    """Images (N, in_chans, 224, 224)."""
    return NiN(
        MlpConv(in_chans, (96, 96, 96), 11, stride=4),
        nn.MaxPool2d(3, stride=2, ceil_mode=True),
        MlpConv(96, (256, 256, 256), 5, padding=2),
        nn.MaxPool2d(3, stride=2, ceil_mode=True),
        MlpConv(256, (384, 384, 384), 3, padding=1),
        nn.MaxPool2d(3, stride=2, ceil_mode=True),
        nn.Dropout(drop_rate),
        MlpConv(384, (1024, 1024, num_classes), 3, padding=1),
    )

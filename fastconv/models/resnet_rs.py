"""ResNet-RS.

Bello, Fedus, Du, Cubuk, Srinivas, Lin, Shlens, Zoph: Revisiting ResNets: Improved Training and Scaling Strategies, NeurIPS 2021
(arXiv 2103.07579).

A ResNet with two known changes, ResNet-D (a stem of 3x3 convolutions, shortcuts averaged before their 1x1 convolution, no max pooling)
and squeeze-and-excitation at a quarter of the channels; most of what it gains on ResNet-200 (79.0 to 83.4%) comes from training: 350
epochs with a cosine schedule, moving average of weights, label smoothing, stochastic depth, RandAugment, dropout and less weight decay.
Depth grows with the model and resolution slowly; as accurate as EfficientNet and 1.7 to 2.7 times as fast on a TPU.

                  blocks           params M   GMACs             top-1 % (paper)
    resnetrs50    3,  4,  6, 3        35.69    2.28 at 160      78.8
    resnetrs101   3,  4, 23, 3        63.62    6.01 at 192      81.2
    resnetrs152   3,  8, 36, 3        86.62   15.53 at 256      83.0
    resnetrs200   3, 24, 36, 3        93.21   20.09 at 256      83.4
    resnetrs270   4, 29, 53, 4       129.86   26.95 at 256      83.8
    resnetrs350   4, 36, 72, 4       163.96   43.49 at 288      84.0 at 256, 84.2 at 320
    resnetrs420   4, 44, 87, 4       191.89   63.94 at 320      84.4

Module names are timm's.
"""

from __future__ import annotations

import torch
from torch import nn


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


def _conv3x3(in_chans: int, out_chans: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_chans, out_chans, kernel_size=3, stride=stride, padding=1, bias=False)


class Bottleneck(nn.Module):
    """relu(shortcut + drop_path(se(1x1 to planes, 3x3, 1x1 to 4 * planes))) on (N, C, H, W)."""

    def __init__(self, in_chans: int, planes: int, stride: int, drop_path: float):
        super().__init__()
        out_chans = 4 * planes
        self.conv1 = nn.Conv2d(in_chans, planes, kernel_size=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = _conv3x3(planes, planes, stride)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, out_chans, kernel_size=1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_chans)
        self.se = SEModule(out_chans, out_chans // 4)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride > 1 or in_chans != out_chans:
            pool = nn.AvgPool2d(2, stride, ceil_mode=True, count_include_pad=False) if stride > 1 else nn.Identity()
            self.downsample = nn.Sequential(pool, nn.Conv2d(in_chans, out_chans, kernel_size=1, bias=False), nn.BatchNorm2d(out_chans))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        return self.relu(self.drop_path(self.se(self.bn3(self.conv3(x)))) + shortcut)


class ResNetRS(nn.Module):
    """Images (N, in_chans, H, W) to logits (N, num_classes): a stem of stride 4 and four stages, halving the resolution between them.

    Args:
        depths: blocks of each stage.
        drop_rate: dropout before the head (paper: 0.25 to 0.4).
        drop_path_rate: stochastic depth, growing linearly to this at the last block (paper: 0 to 0.1).
    """

    def __init__(
        self,
        depths: tuple[int, int, int, int],
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        self.conv1 = nn.Sequential(
            _conv3x3(in_chans, 32, stride=2),
            nn.BatchNorm2d(32),
            nn.ReLU(inplace=True),
            _conv3x3(32, 32),
            nn.BatchNorm2d(32),
            nn.ReLU(inplace=True),
            _conv3x3(32, 64),
        )
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Sequential(_conv3x3(64, 64, stride=2), nn.BatchNorm2d(64), nn.ReLU(inplace=True))  # takes its place and name
        chans, done, last = 64, 0, max(sum(depths) - 1, 1)
        for stage, (planes, depth) in enumerate(zip((64, 128, 256, 512), depths)):
            blocks = []
            for i in range(depth):
                blocks.append(Bottleneck(chans, planes, 2 if i == 0 and stage > 0 else 1, drop_path_rate * done / last))
                chans, done = 4 * planes, done + 1
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.drop = nn.Dropout(drop_rate)
        self.fc = nn.Linear(chans, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Images to feature maps (N, 2048, H / 32, W / 32)."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.drop(self.avgpool(self.forward_features(x)).flatten(1)))


def resnetrs50(**kw) -> ResNetRS:
    return ResNetRS((3, 4, 6, 3), **kw)


def resnetrs101(**kw) -> ResNetRS:
    return ResNetRS((3, 4, 23, 3), **kw)


def resnetrs152(**kw) -> ResNetRS:
    return ResNetRS((3, 8, 36, 3), **kw)


def resnetrs200(**kw) -> ResNetRS:
    return ResNetRS((3, 24, 36, 3), **kw)


def resnetrs270(**kw) -> ResNetRS:
    return ResNetRS((4, 29, 53, 4), **kw)


def resnetrs350(**kw) -> ResNetRS:
    return ResNetRS((4, 36, 72, 4), **kw)


def resnetrs420(**kw) -> ResNetRS:
    return ResNetRS((4, 44, 87, 4), **kw)

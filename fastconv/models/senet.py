"""SENet-154.

Hu, Shen, Sun: Squeeze-and-Excitation Networks, CVPR 2018 (arXiv 1709.01507).

The network behind the first place of ILSVRC 2017: a block computes one factor for each of its channels from their means over the map
(squeeze), through two small fully connected layers (excitation), and multiplies them in. SENet-154 puts that into a ResNeXt-152
(64 groups) whose first 1x1 convolution has half the width, whose stem is three 3x3 convolutions, and whose shortcuts downsample by 3x3
instead of 1x1; dropout before the head.

                blocks          params M   GMACs at 224    top-1 % (paper, one crop)
    senet154    3, 8, 36, 3       115.09          20.69    81.3; 82.7 at 320

Module names are timm's.
"""

from __future__ import annotations

import torch
from torch import nn


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
    """relu(shortcut + se(1x1 to 2 * planes, 3x3 in groups to 4 * planes, 1x1)) on (N, C, H, W)."""

    def __init__(self, in_chans: int, planes: int, stride: int, groups: int):
        super().__init__()
        width = 4 * planes
        self.conv1 = nn.Conv2d(in_chans, width // 2, kernel_size=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width // 2)
        self.conv2 = nn.Conv2d(width // 2, width, kernel_size=3, stride=stride, padding=1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, width, kernel_size=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.se = SEModule(width, width // 16)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride > 1 or in_chans != width:
            kernel = 3 if stride > 1 else 1
            conv = nn.Conv2d(in_chans, width, kernel, stride=stride, padding=kernel // 2, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        return self.relu(self.se(self.bn3(self.conv3(x))) + shortcut)


class SENet(nn.Module):
    """Images (N, in_chans, H, W) to logits (N, num_classes): a stem of stride 4 and four stages, halving the resolution between them.

    Args:
        depths: blocks of each stage.
        groups: groups of the 3x3 convolutions.
        drop_rate: dropout before the head.
    """

    def __init__(
        self,
        depths: tuple[int, int, int, int],
        groups: int = 64,
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_rate: float = 0.2,
    ):
        super().__init__()
        self.conv1 = nn.Sequential(
            nn.Conv2d(in_chans, 64, kernel_size=3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(inplace=True),
            nn.Conv2d(64, 64, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(inplace=True),
            nn.Conv2d(64, 128, kernel_size=3, padding=1, bias=False),
        )
        self.bn1 = nn.BatchNorm2d(128)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        chans = 128
        for stage, (planes, depth) in enumerate(zip((64, 128, 256, 512), depths)):
            blocks = []
            for i in range(depth):
                blocks.append(Bottleneck(chans, planes, 2 if i == 0 and stage > 0 else 1, groups))
                chans = 4 * planes
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


def senet154(**kw) -> SENet:
    return SENet((3, 8, 36, 3), **kw)

"""ResNet, Wide ResNet, ResNeXt, SE-ResNet and SE-ResNeXt.

He, Zhang, Ren, Sun: Deep Residual Learning for Image Recognition, CVPR 2016 (arXiv 1512.03385). Zagoruyko, Komodakis: Wide
Residual Networks, BMVC 2016 (arXiv 1605.07146). Xie, Girshick, Dollar, Tu, He: Aggregated Residual Transformations for Deep Neural
Networks, CVPR 2017 (arXiv 1611.05431). Hu, Shen, Sun: Squeeze-and-Excitation Networks, CVPR 2018 (arXiv 1709.01507).

A block learns what to add to its input rather than its output, so that 152 layers train where 30 plain ones got worse with depth;
first in every ILSVRC and COCO task of 2015. Batch normalisation after every convolution, no dropout, one linear layer at the end.
From 50 layers on a block is a bottleneck: 1x1 down to a quarter of the channels, 3x3, 1x1 up. Wide ResNet doubles the inner width
instead of the depth; ResNeXt splits the 3x3 convolution into groups ("cardinality") and widens it at equal cost; SE multiplies a
block's channels by factors computed from their means (first at ILSVRC 2017). The stride is in the 3x3 convolution, not in the
first 1x1 of the paper ("v1.5", as torchvision and timm have it).

                         blocks           params M   GMACs at 224    top-1 % (ImageNet-1K, one crop)
    resnet18             2, 2,  2, 2         11.69           1.81    69.8 (torchvision)
    resnet34             3, 4,  6, 3         21.80           3.66    73.3
    resnet50             3, 4,  6, 3         25.56           4.09    76.1; 80.9 by a recipe of 2021
    resnet101            3, 4, 23, 3         44.55           7.80    77.4; 81.9
    resnet152            3, 8, 36, 3         60.19          11.51    78.3; 82.3
    wide_resnet50_2      3, 4,  6, 3         68.88          11.40    78.5; 81.6
    wide_resnet101_2     3, 4, 23, 3        126.89          22.75    78.8; 82.5
    resnext50_32x4d      3, 4,  6, 3         25.03           4.23    77.6; 81.2
    resnext101_32x4d     3, 4, 23, 3         44.18           7.97    78.8 (paper)
    resnext101_32x8d     3, 4, 23, 3         88.79          16.41    79.3; 82.8
    resnext101_64x4d     3, 4, 23, 3         83.46          15.46    83.2 by a recipe of 2021
    seresnet50           3, 4,  6, 3         28.09           4.09    76.7 (paper)
    seresnet101          3, 4, 23, 3         49.33           7.81    77.6
    seresnet152          3, 8, 36, 3         66.82          11.52    78.4
    seresnext50_32x4d    3, 4,  6, 3         27.56           4.23    78.9

Module names are torchvision's, and timm's for SE.
"""

from __future__ import annotations

import torch
from torch import nn


def _conv_norm(in_chans: int, out_chans: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(in_chans, out_chans, kernel_size=1, stride=stride, bias=False), nn.BatchNorm2d(out_chans))


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


class BasicBlock(nn.Module):
    """relu(shortcut + two 3x3 convolutions) on (N, C, H, W); ResNet-18 and 34."""

    expansion = 1

    def __init__(self, in_chans: int, planes: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, planes, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, kernel_size=3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _conv_norm(in_chans, planes, stride) if stride > 1 or in_chans != planes else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(x)) + shortcut)


class Bottleneck(nn.Module):
    """relu(shortcut + [se](1x1 down, 3x3 in groups, 1x1 up)) on (N, C, H, W), with 4 * planes channels at its ends.

    The inner width is planes * width_per_group / 64 a group.
    """

    expansion = 4

    def __init__(self, in_chans: int, planes: int, stride: int, groups: int = 1, width_per_group: int = 64, se: bool = False):
        super().__init__()
        width, out_chans = planes * width_per_group // 64 * groups, 4 * planes
        self.conv1 = nn.Conv2d(in_chans, width, kernel_size=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, kernel_size=3, stride=stride, padding=1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_chans, kernel_size=1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_chans)
        self.se = SEModule(out_chans, out_chans // 16) if se else nn.Identity()
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _conv_norm(in_chans, out_chans, stride) if stride > 1 or in_chans != out_chans else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        return self.relu(self.se(self.bn3(self.conv3(x))) + shortcut)


class ResNet(nn.Module):
    """Images (N, in_chans, H, W) to logits (N, num_classes): a stem of stride 4 and four stages, halving the resolution between them.

    Args:
        block, depths: BasicBlock or Bottleneck, and how many of them in each stage.
        in_chans: channels of the images.
        num_classes: size of the head.
        zero_init_residual: start every branch at zero (the last norm's weight), so that every block starts as the identity.
        **block_kw: groups, width_per_group, se of Bottleneck.
    """

    def __init__(
        self,
        block: type[BasicBlock | Bottleneck],
        depths: tuple[int, int, int, int],
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        zero_init_residual: bool = False,
        **block_kw,
    ):
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, 64, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        chans = 64
        for stage, (planes, depth) in enumerate(zip((64, 128, 256, 512), depths)):
            blocks = []
            for i in range(depth):
                blocks.append(block(chans, planes, 2 if i == 0 and stage > 0 else 1, **block_kw))
                chans = block.expansion * planes
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(chans, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif zero_init_residual and isinstance(module, (BasicBlock, Bottleneck)):
                nn.init.zeros_((module.bn3 if isinstance(module, Bottleneck) else module.bn2).weight)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Images to feature maps (N, C, H / 32, W / 32)."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.avgpool(self.forward_features(x)).flatten(1))


def resnet18(**kw) -> ResNet:
    return ResNet(BasicBlock, (2, 2, 2, 2), **kw)


def resnet34(**kw) -> ResNet:
    return ResNet(BasicBlock, (3, 4, 6, 3), **kw)


def resnet50(**kw) -> ResNet:
    return ResNet(Bottleneck, (3, 4, 6, 3), **kw)


def resnet101(**kw) -> ResNet:
    return ResNet(Bottleneck, (3, 4, 23, 3), **kw)


def resnet152(**kw) -> ResNet:
    return ResNet(Bottleneck, (3, 8, 36, 3), **kw)


def wide_resnet50_2(**kw) -> ResNet:
    return ResNet(Bottleneck, (3, 4, 6, 3), width_per_group=128, **kw)


def wide_resnet101_2(**kw) -> ResNet:
    return ResNet(Bottleneck, (3, 4, 23, 3), width_per_group=128, **kw)


def resnext50_32x4d(**kw) -> ResNet:
    return ResNet(Bottleneck, (3, 4, 6, 3), groups=32, width_per_group=4, **kw)


def resnext101_32x4d(**kw) -> ResNet:
    return ResNet(Bottleneck, (3, 4, 23, 3), groups=32, width_per_group=4, **kw)


def resnext101_32x8d(**kw) -> ResNet:
    return ResNet(Bottleneck, (3, 4, 23, 3), groups=32, width_per_group=8, **kw)


def resnext101_64x4d(**kw) -> ResNet:
    return ResNet(Bottleneck, (3, 4, 23, 3), groups=64, width_per_group=4, **kw)


def seresnet50(**kw) -> ResNet:
    return ResNet(Bottleneck, (3, 4, 6, 3), se=True, **kw)


def seresnet101(**kw) -> ResNet:
    return ResNet(Bottleneck, (3, 4, 23, 3), se=True, **kw)


def seresnet152(**kw) -> ResNet:
    return ResNet(Bottleneck, (3, 8, 36, 3), se=True, **kw)


def seresnext50_32x4d(**kw) -> ResNet:
    return ResNet(Bottleneck, (3, 4, 6, 3), groups=32, width_per_group=4, se=True, **kw)

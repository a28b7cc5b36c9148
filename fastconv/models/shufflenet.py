"""ShuffleNet v1 and v2.

Zhang, Zhou, Lin, Sun: ShuffleNet: An Extremely Efficient Convolutional Neural Network for Mobile Devices, CVPR 2018
(arXiv 1707.01083). Ma, Zhang, Zheng, Sun: ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture Design, ECCV 2018
(arXiv 1807.11164).

v1 groups the 1x1 convolutions, which cost most in a depthwise separable network, and shuffles channels between the groups so that
they still mix. v2 drops the groups for speed as measured rather than counted: it splits the channels in two, works on one half at
equal width, concatenates and shuffles.

                           stage channels          params M   GMACs at 224    top-1 %
    shufflenet_v1_x1_0     240, 480, 960 (g = 3)       1.86          0.137    67.4 (paper)
    shufflenet_v2_x0_5      48,  96, 192               1.37          0.0405   60.6 (torchvision, one crop)
    shufflenet_v2_x1_0     116, 232, 464               2.28          0.145    69.4
    shufflenet_v2_x1_5     176, 352, 704               3.50          0.296    73.0
    shufflenet_v2_x2_0     244, 488, 976               7.39          0.583    76.2

Module names of v2 are torchvision's, those of v1 the official repository's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


def channel_shuffle(x: torch.Tensor, groups: int) -> torch.Tensor:
    """Channels as (groups, C / groups), transposed, so that each group of the next convolution sees every group of the last."""
    n, c, h, w = x.shape
    return x.reshape(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)


def _pointwise(in_chans: int, out_chans: int, groups: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(in_chans, out_chans, kernel_size=1, groups=groups, bias=False), nn.BatchNorm2d(out_chans)]


def _depthwise(chans: int, stride: int) -> list[nn.Module]:
    return [nn.Conv2d(chans, chans, kernel_size=3, stride=stride, padding=1, groups=chans, bias=False), nn.BatchNorm2d(chans)]


def _stem(in_chans: int, out_chans: int) -> nn.Sequential:
    conv = nn.Conv2d(in_chans, out_chans, kernel_size=3, stride=2, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_chans), nn.ReLU(inplace=True))


class BlockV1(nn.Module):
    """Grouped 1x1, depthwise 3x3, shuffle, grouped 1x1; added to x, or at stride 2 concatenated with its average pooling.

    The paper shuffles before the depthwise convolution, which is the same network with its channels renamed; the published
    weights are those of this order.
    """

    def __init__(self, in_chans: int, out_chans: int, stride: int, groups: int, first: bool):
        super().__init__()
        self.stride = stride
        mid = out_chans // 4
        self.group_chans = mid // groups
        reduce = _pointwise(in_chans, mid, 1 if first else groups)  # the stem's 24 channels are too few to group
        self.branch_main_1 = nn.Sequential(*reduce, nn.ReLU(inplace=True), *_depthwise(mid, stride))
        self.branch_main_2 = nn.Sequential(*_pointwise(mid, out_chans - in_chans if stride == 2 else out_chans, groups))
        if stride == 2:
            self.branch_proj = nn.AvgPool2d(3, stride=2, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.branch_main_2(channel_shuffle(self.branch_main_1(x), self.group_chans))
        if self.stride == 1:
            return F.relu(x + y)
        return torch.cat([self.branch_proj(x), F.relu(y)], dim=1)


class ShuffleNetV1(nn.Module):
    """Images (N, in_chans, H, W) to logits (N, num_classes); table 1 of the paper.

    Args:
        widths: channels of the three stages, divisible by 4 * groups.
        groups: groups of the 1x1 convolutions.
    """

    def __init__(self, widths: tuple[int, int, int], groups: int, *, in_chans: int = 3, num_classes: int = 1000):
        super().__init__()
        self.first_conv = _stem(in_chans, 24)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        chans, blocks = 24, []
        for stage, (width, depth) in enumerate(zip(widths, (4, 8, 4))):
            for i in range(depth):
                blocks.append(BlockV1(chans, width, 2 if i == 0 else 1, groups, first=stage == i == 0))
                chans = width
        self.features = nn.Sequential(*blocks)
        self.classifier = nn.Sequential(nn.Linear(chans, num_classes, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.features(self.maxpool(self.first_conv(x)))
        return self.classifier(x.mean((-2, -1)))


class InvertedResidual(nn.Module):
    """v2: half of the channels pass by, the others go through 1x1, depthwise 3x3, 1x1; at stride 2 both halves are computed."""

    def __init__(self, in_chans: int, out_chans: int, stride: int):
        super().__init__()
        self.stride = stride
        half = out_chans // 2
        self.branch1 = nn.Sequential()
        if stride == 2:
            self.branch1 = nn.Sequential(*_depthwise(in_chans, 2), *_pointwise(in_chans, half), nn.ReLU(inplace=True))
        self.branch2 = nn.Sequential(
            *_pointwise(in_chans if stride == 2 else half, half),
            nn.ReLU(inplace=True),
            *_depthwise(half, stride),
            *_pointwise(half, half),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left, right = x.chunk(2, dim=1) if self.stride == 1 else (self.branch1(x), x)
        return channel_shuffle(torch.cat([left, self.branch2(right)], dim=1), 2)


class ShuffleNetV2(nn.Module):
    """Images (N, in_chans, H, W) to logits (N, num_classes); table 5 of the paper.

    Args:
        widths: channels of the three stages.
        last: channels of the 1x1 convolution before the head.
    """

    def __init__(self, widths: tuple[int, int, int], last: int = 1024, *, in_chans: int = 3, num_classes: int = 1000):
        super().__init__()
        self.conv1 = _stem(in_chans, 24)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        chans = 24
        for stage, (width, depth) in enumerate(zip(widths, (4, 8, 4)), 2):
            blocks = [InvertedResidual(chans if i == 0 else width, width, 2 if i == 0 else 1) for i in range(depth)]
            self.add_module(f"stage{stage}", nn.Sequential(*blocks))
            chans = width
        self.conv5 = nn.Sequential(*_pointwise(chans, last), nn.ReLU(inplace=True))
        self.fc = nn.Linear(last, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.maxpool(self.conv1(x))
        x = self.conv5(self.stage4(self.stage3(self.stage2(x))))
        return self.fc(x.mean((-2, -1)))


def shufflenet_v1_x1_0(**kw) -> ShuffleNetV1:
    return ShuffleNetV1((240, 480, 960), 3, **kw)


def shufflenet_v2_x0_5(**kw) -> ShuffleNetV2:
    return ShuffleNetV2((48, 96, 192), **kw)


def shufflenet_v2_x1_0(**kw) -> ShuffleNetV2:
    return ShuffleNetV2((116, 232, 464), **kw)


def shufflenet_v2_x1_5(**kw) -> ShuffleNetV2:
    return ShuffleNetV2((176, 352, 704), **kw)


def shufflenet_v2_x2_0(**kw) -> ShuffleNetV2:
    return ShuffleNetV2((244, 488, 976), 2048, **kw)

"""ResNeSt.

Zhang, Wu, Zhang, Zhu, Lin, Zhang, Sun, He, Mueller, Manmatha, Li, Smola: ResNeSt: Split-Attention Networks, CVPR workshops 2022
(arXiv 2004.08955).

Branches as in Inception and ResNeXt, weighed against each other by channel attention as in SKNet and SENet: a grouped 3x3 convolution
makes `radix` versions of its map, their sum is pooled and two small layers give each channel a softmax over the versions. Around it the
ResNet-D stem (three 3x3), average pooling in the shortcut, and average pooling in the place of strided convolution.

                  blocks           stem    params M   GMACs at resolution    top-1 %
    resnest50d    3,  4,  6, 3      32        27.48       5.37 at 224        81.1
    resnest101e   3,  4, 23, 3      64        48.28      13.32 at 256        82.8
    resnest200e   3, 24, 36, 3      64        70.20      35.52 at 320        83.9
    resnest269e   3, 30, 48, 8      64       110.93      77.35 at 416        84.5

Radix 2, one group, as published. Module names are timm's.
"""

from __future__ import annotations

import torch
from torch import nn


class SplitAttn(nn.Module):
    """Split attention: sum over r of softmax_r(fc2(relu(bn1(fc1(mean(sum_r u_r))))))_r * u_r, with u = relu(bn0(conv(x))).

    (N, C, H, W) to (N, C, H, W); u is (N, radix, C, H, W), and `conv` has `radix` groups.
    """

    def __init__(self, chans: int, radix: int = 2):
        super().__init__()
        self.radix = radix
        attn_chans = max(chans * radix // 4, 32)
        self.conv = nn.Conv2d(chans, chans * radix, kernel_size=3, padding=1, groups=radix, bias=False)
        self.bn0 = nn.BatchNorm2d(chans * radix)
        self.act0 = nn.ReLU(inplace=True)
        self.fc1 = nn.Conv2d(chans, attn_chans, kernel_size=1)
        self.bn1 = nn.BatchNorm2d(attn_chans)
        self.act1 = nn.ReLU(inplace=True)
        self.fc2 = nn.Conv2d(attn_chans, chans * radix, kernel_size=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        splits = self.act0(self.bn0(self.conv(x))).unflatten(1, (self.radix, -1))
        pooled = splits.sum(1).mean((-2, -1), keepdim=True)
        attention = self.fc2(self.act1(self.bn1(self.fc1(pooled)))).unflatten(1, (self.radix, -1)).softmax(1)
        return (splits * attention).sum(1)


class Bottleneck(nn.Module):
    """1x1, split attention, 1x1 (4 * planes), added to the shortcut; at stride 2 average pooling follows the attention."""

    def __init__(self, in_chans: int, planes: int, stride: int, radix: int):
        super().__init__()
        out_chans = 4 * planes
        self.conv1 = nn.Conv2d(in_chans, planes, kernel_size=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = SplitAttn(planes, radix)
        self.avd_last = nn.AvgPool2d(3, stride, padding=1) if stride > 1 else nn.Identity()
        self.conv3 = nn.Conv2d(planes, out_chans, kernel_size=1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_chans)
        self.act3 = nn.ReLU(inplace=True)
        self.downsample = None
        if stride > 1 or in_chans != out_chans:
            pool = nn.AvgPool2d(2, stride, ceil_mode=True, count_include_pad=False) if stride > 1 else nn.Identity()
            self.downsample = nn.Sequential(pool, nn.Conv2d(in_chans, out_chans, 1, bias=False), nn.BatchNorm2d(out_chans))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.avd_last(self.conv2(x))
        return self.act3(self.bn3(self.conv3(x)) + shortcut)


class ResNeSt(nn.Module):
    """Deep stem, four stages of bottlenecks, average pooling, linear head.

    Args:
        depths: number of blocks of each stage.
        stem_width: channels of the stem's first two convolutions; the third has twice as many.
        in_chans: channels of the images, (N, in_chans, H, W).
        num_classes: size of the head.
        radix: versions that the attention chooses among.
    """

    def __init__(self, depths: tuple[int, ...], stem_width: int, *, in_chans: int = 3, num_classes: int = 1000, radix: int = 2):
        super().__init__()
        chans = 2 * stem_width
        self.conv1 = nn.Sequential(
            nn.Conv2d(in_chans, stem_width, kernel_size=3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(stem_width),
            nn.ReLU(inplace=True),
            nn.Conv2d(stem_width, stem_width, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(stem_width),
            nn.ReLU(inplace=True),
            nn.Conv2d(stem_width, chans, kernel_size=3, padding=1, bias=False),
        )
        self.bn1 = nn.BatchNorm2d(chans)
        self.act1 = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        for stage, (depth, planes) in enumerate(zip(depths, (64, 128, 256, 512)), 1):
            blocks = []
            for i in range(depth):
                blocks.append(Bottleneck(chans, planes, 2 if stage > 1 and i == 0 else 1, radix))
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


def resnest50d(**kw) -> ResNeSt:
    return ResNeSt((3, 4, 6, 3), 32, **kw)


def resnest101e(**kw) -> ResNeSt:
    return ResNeSt((3, 4, 23, 3), 64, **kw)


def resnest200e(**kw) -> ResNeSt:
    return ResNeSt((3, 24, 36, 3), 64, **kw)


def resnest269e(**kw) -> ResNeSt:
    return ResNeSt((3, 30, 48, 8), 64, **kw)

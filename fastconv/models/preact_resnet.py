"""Pre-activation ResNet for ImageNet and CIFAR, and Wide ResNet for CIFAR.

He, Zhang, Ren, Sun: Identity Mappings in Deep Residual Networks, ECCV 2016 (arXiv 1603.05027). Zagoruyko, Komodakis: Wide Residual
Networks, BMVC 2016 (arXiv 1605.07146).

Normalisation and ReLU move in front of the convolutions of a branch, so that nothing stands on the path of the sums: a block's output
is its input plus something, and gradients reach every block unchanged. That trains 1001 layers. Where the shape changes, the
projection sees the normalised and activated input. WRN-28-10 takes basic blocks of ten times the width instead: fewer layers, more
parallel, more accurate.

                         blocks            widths                    params M   GMACs             top-1 %
    resnetv2_50          3, 4,  6, 3       256, 512, 1024, 2048         25.55    4.09 at 224
    resnetv2_101         3, 4, 23, 3       256, 512, 1024, 2048         44.54    7.80 at 224
    resnetv2_152         3, 8, 36, 3       256, 512, 1024, 2048         60.19   11.51 at 224      78.9 at 320 (paper)
    preact_resnet164     18, 18, 18        64, 128, 256                  1.70    0.245 at 32      94.5 on CIFAR-10 (paper)
    preact_resnet1001    111, 111, 111     64, 128, 256                 10.33    1.49 at 32       95.1 on CIFAR-10
    wide_resnet28_10     4, 4, 4           160, 320, 640                36.48    5.24 at 32       96.0 on CIFAR-10

Module names are timm's; the networks for CIFAR, which timm does not have, follow them. Their num_classes is 10 unless given.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn


def _conv(in_chans: int, out_chans: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_chans, out_chans, kernel, stride=stride, padding=kernel // 2, bias=False)


def _projection(in_chans: int, out_chans: int, stride: int) -> nn.Module | None:
    if stride == 1 and in_chans == out_chans:
        return None
    return nn.Sequential(OrderedDict(conv=_conv(in_chans, out_chans, kernel=1, stride=stride)))


class PreActBasic(nn.Module):
    """x + two times (norm, ReLU, 3x3 convolution) on (N, C, H, W), with dropout between them."""

    def __init__(self, in_chans: int, out_chans: int, stride: int, drop_rate: float):
        super().__init__()
        self.downsample = _projection(in_chans, out_chans, stride)
        self.norm1 = nn.BatchNorm2d(in_chans)
        self.conv1 = _conv(in_chans, out_chans, kernel=3, stride=stride)
        self.norm2 = nn.BatchNorm2d(out_chans)
        self.drop = nn.Dropout(drop_rate)
        self.conv2 = _conv(out_chans, out_chans, kernel=3)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.act(self.norm1(x))
        shortcut = x if self.downsample is None else self.downsample(y)
        y = self.act(self.norm2(self.conv1(y)))
        return self.conv2(self.drop(y)) + shortcut


class PreActBottleneck(nn.Module):
    """x + three times (norm, ReLU, convolution) on (N, C, H, W): 1x1 to a quarter of the channels, 3x3, 1x1.

    The stride is in the 3x3 convolution, or with `stride_first` in the first 1x1, as the authors have it.
    """

    def __init__(self, in_chans: int, out_chans: int, stride: int, drop_rate: float, stride_first: bool = False):
        super().__init__()
        mid = out_chans // 4
        self.downsample = _projection(in_chans, out_chans, stride)
        self.norm1 = nn.BatchNorm2d(in_chans)
        self.conv1 = _conv(in_chans, mid, kernel=1, stride=stride if stride_first else 1)
        self.norm2 = nn.BatchNorm2d(mid)
        self.conv2 = _conv(mid, mid, kernel=3, stride=1 if stride_first else stride)
        self.norm3 = nn.BatchNorm2d(mid)
        self.drop = nn.Dropout(drop_rate)
        self.conv3 = _conv(mid, out_chans, kernel=1)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.act(self.norm1(x))
        shortcut = x if self.downsample is None else self.downsample(y)
        y = self.act(self.norm2(self.conv1(y)))
        y = self.act(self.norm3(self.conv2(y)))
        return self.conv3(self.drop(y)) + shortcut


class PreActResNet(nn.Module):
    """Images (N, in_chans, H, W) to logits (N, num_classes): a stem, stages that halve the resolution between them, a last norm.

    Args:
        block: PreActBasic or PreActBottleneck.
        depths, widths: number of blocks and of channels of each stage.
        stem: channels after the first convolution.
        cifar: the stem is one 3x3 convolution of stride 1, instead of 7x7 and max pooling of stride 4.
        drop_rate: dropout inside the blocks.
        **block_kw: stride_first of PreActBottleneck.
    """

    def __init__(
        self,
        block: type[PreActBasic | PreActBottleneck],
        depths: tuple[int, ...],
        widths: tuple[int, ...],
        stem: int,
        cifar: bool = False,
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_rate: float = 0.0,
        **block_kw,
    ):
        super().__init__()
        if cifar:
            self.stem = nn.Sequential(OrderedDict(conv=_conv(in_chans, stem, kernel=3)))
        else:
            pool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
            self.stem = nn.Sequential(OrderedDict(conv=_conv(in_chans, stem, kernel=7, stride=2), pool=pool))
        chans = stem
        self.stages = nn.Sequential()
        for index, (depth, width) in enumerate(zip(depths, widths)):
            blocks = nn.Sequential()
            for i in range(depth):
                blocks.append(block(chans, width, 2 if i == 0 and index > 0 else 1, drop_rate, **block_kw))
                chans = width
            self.stages.append(nn.Sequential(OrderedDict(blocks=blocks)))
        self.norm = nn.BatchNorm2d(chans)
        self.act = nn.ReLU(inplace=True)
        self.head = nn.Sequential(
            OrderedDict(pool=nn.AdaptiveAvgPool2d(1), fc=nn.Conv2d(chans, num_classes, kernel_size=1), flatten=nn.Flatten(1))
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.normal_(self.head.fc.weight, std=0.01)
        nn.init.zeros_(self.head.fc.bias)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Images to normalised, activated feature maps."""
        return self.act(self.norm(self.stages(self.stem(x))))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.forward_features(x))


_IMAGENET = (256, 512, 1024, 2048)


def resnetv2_50(**kw) -> PreActResNet:
    return PreActResNet(PreActBottleneck, (3, 4, 6, 3), _IMAGENET, 64, **kw)


def resnetv2_101(**kw) -> PreActResNet:
    return PreActResNet(PreActBottleneck, (3, 4, 23, 3), _IMAGENET, 64, **kw)


def resnetv2_152(**kw) -> PreActResNet:
    return PreActResNet(PreActBottleneck, (3, 8, 36, 3), _IMAGENET, 64, **kw)


def _cifar(blocks: int, **kw) -> PreActResNet:
    kw = {"num_classes": 10, **kw}
    return PreActResNet(PreActBottleneck, (blocks,) * 3, (64, 128, 256), 16, cifar=True, stride_first=True, **kw)


def preact_resnet164(**kw) -> PreActResNet:
    return _cifar(18, **kw)


def preact_resnet1001(**kw) -> PreActResNet:
    return _cifar(111, **kw)


def wide_resnet28_10(**kw) -> PreActResNet:
    return PreActResNet(PreActBasic, (4,) * 3, (160, 320, 640), 16, cifar=True, **{"num_classes": 10, **kw})

"""VGG-16 and VGG-19.

Simonyan, Zisserman: Very Deep Convolutional Networks for Large-Scale Image Recognition, ICLR 2015 (arXiv 1409.1556).

Depth from nothing but 3x3 convolutions (stride 1, padding 1) and 2x2 max pooling: three 3x3 layers see as far as one of 7x7
with 27 C^2 weights for 49 C^2 and two more nonlinearities. Second in classification and first in localisation at ILSVRC 2014; no
local response normalisation. Most of the memory is in the early convolutions (24 M activations an image, 96 MB in float32,
forward alone), most of the parameters in the first linear layer (103 M of 138 M).

             convolutions by stage      params M   GMACs at 224    top-1 % (torchvision, one crop)
    vgg16    2, 2, 3, 3, 3                138.36          15.47    71.6
    vgg19    2, 2, 4, 4, 4                143.67          19.63    72.4

Module names are torchvision's.
"""

from __future__ import annotations

import torch
from torch import nn


class VGG(nn.Module):
    """Five stages of 3x3 convolutions, each halved by max pooling, then three linear layers.

    Args:
        depths: number of convolutions of each stage.
        in_chans: channels of the images, (N, in_chans, H, W) with H and W of 32 at least; 224 needs no resampling before the head.
        num_classes: size of the head.
        drop_rate: dropout after each of the two hidden linear layers.
    """

    def __init__(self, depths: tuple[int, ...], *, in_chans: int = 3, num_classes: int = 1000, drop_rate: float = 0.5):
        super().__init__()
        layers = []
        for depth, width in zip(depths, (64, 128, 256, 512, 512)):
            for _ in range(depth):
                layers += [nn.Conv2d(in_chans, width, kernel_size=3, padding=1), nn.ReLU(inplace=True)]
                in_chans = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(7)
        self.classifier = nn.Sequential(
            nn.Linear(512 * 7 * 7, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(drop_rate),
            nn.Linear(4096, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(drop_rate),
            nn.Linear(4096, num_classes),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.avgpool(self.features(x)).flatten(1))


def vgg16(**kw) -> VGG:
    return VGG((2, 2, 3, 3, 3), **kw)


def vgg19(**kw) -> VGG:
    return VGG((2, 2, 4, 4, 4), **kw)

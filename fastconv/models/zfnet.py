"""ZFNet.

Zeiler, Fergus: Visualizing and Understanding Convolutional Networks, ECCV 2014 (arXiv 1311.2901).

AlexNet seen through a deconvolutional network and mended: first filters of 7x7 at stride 2 instead of 11x11 at stride 4, which had
aliased and left out the middle frequencies. Top-5 error on ImageNet from 16.4% to 11.7% (an ensemble), the best of ILSVRC 2013.

                   third to fifth convolution    params M   GMACs at 224    top-5 % (validation, one model)
    zfnet          384, 384, 256                    62.36           1.17    83.5
    zfnet_wide     512, 1024, 512                  107.63           2.48    84.0

The first is figure 3 of the paper; the second, which the paper's ensemble adds and the lecture names, is its table 2. Numbering of
`features` and `classifier` follows torchvision's AlexNet.
"""

from __future__ import annotations

import torch
from torch import nn


class ZFNet(nn.Module):
    """Five convolutions, the first two followed by pooling and local response normalisation, and three linear layers.

    Args:
        widths: channels of the third to fifth convolution.
        in_chans: channels of the images, (N, in_chans, 224, 224).
        num_classes: size of the head.
        hidden: width of the two hidden linear layers.
        drop_rate: dropout before each of them.
    """

    def __init__(
        self,
        widths: tuple[int, int, int] = (384, 384, 256),
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        hidden: int = 4096,
        drop_rate: float = 0.5,
    ):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(in_chans, 96, kernel_size=7, stride=2, padding=1),  # 110x110
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, stride=2, ceil_mode=True),  # 55x55
            nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=2.0),
            nn.Conv2d(96, 256, kernel_size=5, stride=2),  # 26x26
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, stride=2, ceil_mode=True),  # 13x13
            nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=2.0),
            nn.Conv2d(256, widths[0], kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(widths[0], widths[1], kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(widths[1], widths[2], kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, stride=2),  # 6x6
        )
        self.classifier = nn.Sequential(
            nn.Dropout(drop_rate),
            nn.Linear(widths[2] * 6 * 6, hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(drop_rate),
            nn.Linear(hidden, hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, num_classes),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x).flatten(1))


def zfnet(**kw) -> ZFNet:
    return ZFNet((384, 384, 256), **kw)


def zfnet_wide(**kw) -> ZFNet:
    return ZFNet((512, 1024, 512), **kw)

"""AlexNet, in two groups and in one tower.

Krizhevsky, Sutskever, Hinton: ImageNet Classification with Deep Convolutional Neural Networks, NIPS 2012. Krizhevsky: One weird trick
for parallelizing convolutional neural networks, 2014 (arXiv 1404.5997).

The network that won ILSVRC 2012 and with it the field: ReLU, local response normalisation, overlapping pooling, dropout and heavy data
augmentation, trained on two GPUs of 3 GB. Each GPU held half of the channels; only the third convolution and the linear layers see
both halves, so the second, fourth and fifth are convolutions in two groups. The paper's images of 224 do not fit its first layer (11x11,
stride 4, no padding): 227 do, (227 - 11) / 4 + 1 = 55. One tower of fewer channels, without normalisation, came two years later.

                          convolutions                params M   GMACs             top-1 %
    alexnet_two_groups    96, 256, 384, 384, 256         60.97    0.724 at 227     59.3 (paper: 40.7% error, one network)
    alexnet               64, 192, 384, 256, 256         61.10    0.714 at 224     56.5 (torchvision)

Here a map is pooled before it is normalised, as in the lecture's list of layers and in most ports; the paper normalises first. Module
names of alexnet_two_groups are those of the Caffe model, those of alexnet torchvision's.
"""

from __future__ import annotations

import torch
from torch import nn


def _relu() -> nn.ReLU:
    return nn.ReLU(inplace=True)


class AlexNetTwoGroups(nn.Module):
    """Images (N, in_chans, H, W), 227x227 in the paper, to logits (N, num_classes)."""

    def __init__(self, *, in_chans: int = 3, num_classes: int = 1000, drop_rate: float = 0.5):
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, 96, kernel_size=11, stride=4)
        self.conv2 = nn.Conv2d(96, 256, kernel_size=5, padding=2, groups=2)
        self.conv3 = nn.Conv2d(256, 384, kernel_size=3, padding=1)
        self.conv4 = nn.Conv2d(384, 384, kernel_size=3, padding=1, groups=2)
        self.conv5 = nn.Conv2d(384, 256, kernel_size=3, padding=1, groups=2)
        self.pool = nn.MaxPool2d(kernel_size=3, stride=2)
        # b = a / (2 + 1e-4 * sum of a^2 over 5 channels)^0.75; torch takes the mean instead of the sum
        self.norm = nn.LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2.0)
        self.relu = _relu()
        self.avgpool = nn.AdaptiveAvgPool2d(6)  # of images of another size
        self.fc6 = nn.Linear(256 * 6 * 6, 4096)
        self.fc7 = nn.Linear(4096, 4096)
        self.fc8 = nn.Linear(4096, num_classes)
        self.drop = nn.Dropout(drop_rate)
        for name, module in self.named_children():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.constant_(module.bias, 0.0 if name in ("conv1", "conv3", "fc8") else 1.0)  # ones: ReLU starts alive

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Images to feature maps (N, 256, 6, 6) of 227x227 images."""
        x = self.norm(self.pool(self.relu(self.conv1(x))))
        x = self.norm(self.pool(self.relu(self.conv2(x))))
        x = self.relu(self.conv4(self.relu(self.conv3(x))))
        return self.pool(self.relu(self.conv5(x)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.avgpool(self.forward_features(x)).flatten(1)
        x = self.drop(self.relu(self.fc6(x)))
        return self.fc8(self.drop(self.relu(self.fc7(x))))


class AlexNet(nn.Module):
    """One tower: images (N, in_chans, H, W) to logits (N, num_classes)."""

    def __init__(self, *, in_chans: int = 3, num_classes: int = 1000, drop_rate: float = 0.5):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(in_chans, 64, kernel_size=11, stride=4, padding=2),
            _relu(),
            nn.MaxPool2d(kernel_size=3, stride=2),
            nn.Conv2d(64, 192, kernel_size=5, padding=2),
            _relu(),
            nn.MaxPool2d(kernel_size=3, stride=2),
            nn.Conv2d(192, 384, kernel_size=3, padding=1),
            _relu(),
            nn.Conv2d(384, 256, kernel_size=3, padding=1),
            _relu(),
            nn.Conv2d(256, 256, kernel_size=3, padding=1),
            _relu(),
            nn.MaxPool2d(kernel_size=3, stride=2),
        )
        self.avgpool = nn.AdaptiveAvgPool2d(6)
        self.classifier = nn.Sequential(
            nn.Dropout(drop_rate),
            nn.Linear(256 * 6 * 6, 4096),
            _relu(),
            nn.Dropout(drop_rate),
            nn.Linear(4096, 4096),
            _relu(),
            nn.Linear(4096, num_classes),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.avgpool(self.features(x)).flatten(1))


def alexnet_two_groups(**kw) -> AlexNetTwoGroups:
    return AlexNetTwoGroups(**kw)


def alexnet(**kw) -> AlexNet:
    return AlexNet(**kw)

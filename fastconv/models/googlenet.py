"""GoogLeNet (Inception v1).

Szegedy, Liu, Jia, Sermanet, Reed, Anguelov, Erhan, Vanhoucke, Rabinovich: Going Deeper with Convolutions, CVPR 2015
(arXiv 1409.4842).

Inception modules: 1x1, 3x3 and 5x5 convolutions and a pooling side by side, concatenated, with 1x1 bottlenecks that cut the depth
before the large kernels (in the lecture's example 358 M operations for 854 M; its terms sum to 271 M) and after the pooling, whose
depth would otherwise only grow. 22 layers, one linear layer, and by the paper 12 times fewer parameters than AlexNet's 60 M, "only
5 million"; 7 M are counted. Two auxiliary heads inject gradient at the lower layers in training; they go when it ends. Winner of
ILSVRC 2014 with 6.7% top-5 error.

                                         params M   GMACs at 224    top-1 % (torchvision, one crop)
    googlenet                               13.00           1.50    69.8
    without the auxiliary heads              6.62           1.50
    large_kernel=5, without the heads        7.01           1.58

Module names are torchvision's, whose published checkpoint has BatchNorm after each convolution and 3x3 in place of 5x5;
`large_kernel=5` is the paper's module.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class BasicConv2d(nn.Module):
    """Convolution without bias, BatchNorm, ReLU."""

    def __init__(self, in_chans: int, out_chans: int, **kw):
        super().__init__()
        self.conv = nn.Conv2d(in_chans, out_chans, bias=False, **kw)
        self.bn = nn.BatchNorm2d(out_chans, eps=1e-3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Inception(nn.Module):
    """Four branches, concatenated: 1x1; 1x1 and 3x3; 1x1 and `large_kernel`; max pooling and 1x1. Figure 2 (b) of the paper.

    Args:
        c1: channels of the 1x1 branch.
        reduce3, c3: channels of the bottleneck before the 3x3 convolution, and of that convolution.
        reduce5, c5: the same of the branch with the large kernel.
        pool: channels that the pooling branch is projected to.
    """

    def __init__(self, in_chans: int, c1: int, reduce3: int, c3: int, reduce5: int, c5: int, pool: int, large_kernel: int = 3):
        super().__init__()
        self.branch1 = BasicConv2d(in_chans, c1, kernel_size=1)
        self.branch2 = nn.Sequential(BasicConv2d(in_chans, reduce3, kernel_size=1), BasicConv2d(reduce3, c3, kernel_size=3, padding=1))
        self.branch3 = nn.Sequential(
            BasicConv2d(in_chans, reduce5, kernel_size=1),
            BasicConv2d(reduce5, c5, kernel_size=large_kernel, padding=large_kernel // 2),
        )
        self.branch4 = nn.Sequential(nn.MaxPool2d(3, stride=1, padding=1), BasicConv2d(in_chans, pool, kernel_size=1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)], dim=1)


class InceptionAux(nn.Module):
    """Auxiliary head: average pooling to 4x4, 1x1 convolution, two linear layers."""

    def __init__(self, in_chans: int, num_classes: int, drop_rate: float):
        super().__init__()
        self.conv = BasicConv2d(in_chans, 128, kernel_size=1)
        self.fc1 = nn.Linear(128 * 4 * 4, 1024)
        self.dropout = nn.Dropout(drop_rate)
        self.fc2 = nn.Linear(1024, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(F.adaptive_avg_pool2d(x, 4)).flatten(1)
        return self.fc2(self.dropout(F.relu(self.fc1(x), inplace=True)))


# in_chans, then the widths of Inception; table 1 of the paper
MODULES = {
    "3a": (192, 64, 96, 128, 16, 32, 32),
    "3b": (256, 128, 128, 192, 32, 96, 64),
    "4a": (480, 192, 96, 208, 16, 48, 64),
    "4b": (512, 160, 112, 224, 24, 64, 64),
    "4c": (512, 128, 128, 256, 24, 64, 64),
    "4d": (512, 112, 144, 288, 32, 64, 64),
    "4e": (528, 256, 160, 320, 32, 128, 128),
    "5a": (832, 256, 160, 320, 32, 128, 128),
    "5b": (832, 384, 192, 384, 48, 128, 128),
}


class GoogLeNet(nn.Module):
    """Stem, nine Inception modules at strides 8, 16 and 32, average pooling, one linear layer.

    Args:
        in_chans: channels of the images, (N, in_chans, H, W) with H and W of 15 at least.
        num_classes: size of the heads.
        aux_logits: with the two auxiliary heads; in training the result is then (logits, aux2, aux1), the order of the published
            definition. The paper adds their losses at a weight of 0.3.
        large_kernel: kernel of the modules' third branch, 3 as in the published checkpoint or 5 as in the paper.
        drop_rate, aux_drop_rate: dropout before the head, and within the auxiliary ones.
    """

    def __init__(
        self,
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        aux_logits: bool = True,
        large_kernel: int = 3,
        drop_rate: float = 0.2,
        aux_drop_rate: float = 0.7,
    ):
        super().__init__()
        self.conv1 = BasicConv2d(in_chans, 64, kernel_size=7, stride=2, padding=3)
        self.maxpool1 = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        self.conv2 = BasicConv2d(64, 64, kernel_size=1)
        self.conv3 = BasicConv2d(64, 192, kernel_size=3, padding=1)
        self.maxpool2 = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        for name, widths in MODULES.items():
            self.add_module(f"inception{name}", Inception(*widths, large_kernel=large_kernel))
        self.maxpool3 = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        self.maxpool4 = nn.MaxPool2d(2, stride=2, ceil_mode=True)
        self.aux1 = InceptionAux(512, num_classes, aux_drop_rate) if aux_logits else None
        self.aux2 = InceptionAux(528, num_classes, aux_drop_rate) if aux_logits else None
        self.dropout = nn.Dropout(drop_rate)
        self.fc = nn.Linear(1024, num_classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.trunc_normal_(module.weight, std=0.01)

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x = self.maxpool1(self.conv1(x))
        x = self.maxpool2(self.conv3(self.conv2(x)))
        x = self.maxpool3(self.inception3b(self.inception3a(x)))
        x = low = self.inception4a(x)
        x = middle = self.inception4d(self.inception4c(self.inception4b(x)))
        x = self.maxpool4(self.inception4e(x))
        x = self.inception5b(self.inception5a(x))
        x = self.fc(self.dropout(x.mean((-2, -1))))
        if self.training and self.aux1 is not None:
            return x, self.aux2(middle), self.aux1(low)
        return x


def googlenet(**kw) -> GoogLeNet:
    return GoogLeNet(**kw)

"""Inception v3.

Szegedy, Vanhoucke, Ioffe, Shlens, Wojna: Rethinking the Inception Architecture for Computer Vision, CVPR 2016 (arXiv 1512.00567).

Convolutions factorised further: 5x5 into two of 3x3, n x n into 1 x n and n x 1 (7 at 17x17 maps), and at the coarsest maps 1x3 and
3x1 side by side to widen the filter bank; resolution halved by convolution and pooling in parallel, so that neither a bottleneck
nor a wide map precedes the other. BatchNorm throughout, label smoothing, one auxiliary head as a regulariser.

                                  params M   GMACs at 299    top-1 % (torchvision, one crop)
    inception_v3                     23.83           5.71    77.3
    with the auxiliary head          27.16           5.71

Module names are torchvision's, whose checkpoint loads with aux_logits=True.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class BasicConv2d(nn.Module):
    """Convolution without bias, BatchNorm, ReLU."""

    def __init__(self, in_chans: int, out_chans: int, kernel_size: int | tuple[int, int], **kw):
        super().__init__()
        self.conv = nn.Conv2d(in_chans, out_chans, kernel_size, bias=False, **kw)
        self.bn = nn.BatchNorm2d(out_chans, eps=1e-3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


def _same(in_chans: int, out_chans: int, height: int, width: int) -> BasicConv2d:
    return BasicConv2d(in_chans, out_chans, (height, width), padding=(height // 2, width // 2))


def _pool3x3(x: torch.Tensor) -> torch.Tensor:
    return F.avg_pool2d(x, 3, stride=1, padding=1)


class InceptionA(nn.Module):
    """35x35: 1x1; 5x5; two 3x3; average pooling. Figure 5 of the paper."""

    def __init__(self, in_chans: int, pool_chans: int):
        super().__init__()
        self.branch1x1 = BasicConv2d(in_chans, 64, 1)
        self.branch5x5_1 = BasicConv2d(in_chans, 48, 1)
        self.branch5x5_2 = _same(48, 64, 5, 5)
        self.branch3x3dbl_1 = BasicConv2d(in_chans, 64, 1)
        self.branch3x3dbl_2 = _same(64, 96, 3, 3)
        self.branch3x3dbl_3 = _same(96, 96, 3, 3)
        self.branch_pool = BasicConv2d(in_chans, pool_chans, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branch5x5 = self.branch5x5_2(self.branch5x5_1(x))
        branch3x3dbl = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), branch5x5, branch3x3dbl, self.branch_pool(_pool3x3(x))], dim=1)


class InceptionB(nn.Module):
    """35x35 to 17x17: strided 3x3; two 3x3, the second strided; max pooling. Figure 10 of the paper."""

    def __init__(self, in_chans: int):
        super().__init__()
        self.branch3x3 = BasicConv2d(in_chans, 384, 3, stride=2)
        self.branch3x3dbl_1 = BasicConv2d(in_chans, 64, 1)
        self.branch3x3dbl_2 = _same(64, 96, 3, 3)
        self.branch3x3dbl_3 = BasicConv2d(96, 96, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branch3x3dbl = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), branch3x3dbl, F.max_pool2d(x, 3, stride=2)], dim=1)


class InceptionC(nn.Module):
    """17x17: 1x1; 7x7 as 1x7 and 7x1; that twice; average pooling. Figure 6 of the paper with n = 7."""

    def __init__(self, in_chans: int, mid_chans: int):
        super().__init__()
        self.branch1x1 = BasicConv2d(in_chans, 192, 1)
        self.branch7x7_1 = BasicConv2d(in_chans, mid_chans, 1)
        self.branch7x7_2 = _same(mid_chans, mid_chans, 1, 7)
        self.branch7x7_3 = _same(mid_chans, 192, 7, 1)
        self.branch7x7dbl_1 = BasicConv2d(in_chans, mid_chans, 1)
        self.branch7x7dbl_2 = _same(mid_chans, mid_chans, 7, 1)
        self.branch7x7dbl_3 = _same(mid_chans, mid_chans, 1, 7)
        self.branch7x7dbl_4 = _same(mid_chans, mid_chans, 7, 1)
        self.branch7x7dbl_5 = _same(mid_chans, 192, 1, 7)
        self.branch_pool = BasicConv2d(in_chans, 192, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branch7x7 = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        branch7x7dbl = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        branch7x7dbl = self.branch7x7dbl_5(self.branch7x7dbl_4(branch7x7dbl))
        return torch.cat([self.branch1x1(x), branch7x7, branch7x7dbl, self.branch_pool(_pool3x3(x))], dim=1)


class InceptionD(nn.Module):
    """17x17 to 8x8: strided 3x3; 7x7 and a strided 3x3; max pooling."""

    def __init__(self, in_chans: int):
        super().__init__()
        self.branch3x3_1 = BasicConv2d(in_chans, 192, 1)
        self.branch3x3_2 = BasicConv2d(192, 320, 3, stride=2)
        self.branch7x7x3_1 = BasicConv2d(in_chans, 192, 1)
        self.branch7x7x3_2 = _same(192, 192, 1, 7)
        self.branch7x7x3_3 = _same(192, 192, 7, 1)
        self.branch7x7x3_4 = BasicConv2d(192, 192, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branch3x3 = self.branch3x3_2(self.branch3x3_1(x))
        branch7x7x3 = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
        return torch.cat([branch3x3, self.branch7x7x3_4(branch7x7x3), F.max_pool2d(x, 3, stride=2)], dim=1)


class InceptionE(nn.Module):
    """8x8: 1x1; 1x3 and 3x1 side by side, after 1x1 and after 3x3; average pooling. Figure 7 of the paper."""

    def __init__(self, in_chans: int):
        super().__init__()
        self.branch1x1 = BasicConv2d(in_chans, 320, 1)
        self.branch3x3_1 = BasicConv2d(in_chans, 384, 1)
        self.branch3x3_2a = _same(384, 384, 1, 3)
        self.branch3x3_2b = _same(384, 384, 3, 1)
        self.branch3x3dbl_1 = BasicConv2d(in_chans, 448, 1)
        self.branch3x3dbl_2 = _same(448, 384, 3, 3)
        self.branch3x3dbl_3a = _same(384, 384, 1, 3)
        self.branch3x3dbl_3b = _same(384, 384, 3, 1)
        self.branch_pool = BasicConv2d(in_chans, 192, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branch3x3 = self.branch3x3_1(x)
        branch3x3dbl = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        wide = [self.branch3x3_2a(branch3x3), self.branch3x3_2b(branch3x3)]
        wide += [self.branch3x3dbl_3a(branch3x3dbl), self.branch3x3dbl_3b(branch3x3dbl)]
        return torch.cat([self.branch1x1(x), *wide, self.branch_pool(_pool3x3(x))], dim=1)


class InceptionAux(nn.Module):
    """Auxiliary head on the 17x17 maps."""

    def __init__(self, in_chans: int, num_classes: int):
        super().__init__()
        self.conv0 = BasicConv2d(in_chans, 128, 1)
        self.conv1 = BasicConv2d(128, 768, 5)
        self.fc = nn.Linear(768, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv1(self.conv0(F.avg_pool2d(x, 5, stride=3)))
        return self.fc(x.mean((-2, -1)))


class InceptionV3(nn.Module):
    """Table 1 of the paper.

    Args:
        in_chans: channels of the images, (N, in_chans, H, W) with H and W of 75 at least; 299 with the auxiliary head, about.
        num_classes: size of the heads.
        aux_logits: with the auxiliary head; in training the result is then (logits, aux).
        drop_rate: dropout before the head.
    """

    def __init__(self, *, in_chans: int = 3, num_classes: int = 1000, aux_logits: bool = False, drop_rate: float = 0.5):
        super().__init__()
        self.Conv2d_1a_3x3 = BasicConv2d(in_chans, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = BasicConv2d(32, 32, 3)
        self.Conv2d_2b_3x3 = BasicConv2d(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = BasicConv2d(64, 80, 1)
        self.Conv2d_4a_3x3 = BasicConv2d(80, 192, 3)
        self.Mixed_5b = InceptionA(192, 32)
        self.Mixed_5c = InceptionA(256, 64)
        self.Mixed_5d = InceptionA(288, 64)
        self.Mixed_6a = InceptionB(288)
        self.Mixed_6b = InceptionC(768, 128)
        self.Mixed_6c = InceptionC(768, 160)
        self.Mixed_6d = InceptionC(768, 160)
        self.Mixed_6e = InceptionC(768, 192)
        self.AuxLogits = InceptionAux(768, num_classes) if aux_logits else None
        self.Mixed_7a = InceptionD(768)
        self.Mixed_7b = InceptionE(1280)
        self.Mixed_7c = InceptionE(2048)
        self.dropout = nn.Dropout(drop_rate)
        self.fc = nn.Linear(2048, num_classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.trunc_normal_(module.weight, std=0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, stride=2)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, stride=2))))
        x = middle = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        x = self.fc(self.dropout(x.mean((-2, -1))))
        if self.training and self.AuxLogits is not None:
            return x, self.AuxLogits(middle)
        return x


def inception_v3(**kw) -> InceptionV3:
    return InceptionV3(**kw)

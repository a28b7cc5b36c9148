"""NFNet F0 to F6, and adaptive gradient clipping.

Brock, De, Smith, Simonyan: High-Performance Large-Scale Image Recognition Without Normalization, ICML 2021 (arXiv 2102.06171).

A ResNet without batch normalisation: each convolution standardises its own weights, each activation is scaled to unit variance, a
block divides its input by the standard deviation that it would have at initialisation and adds alpha = 0.2 times its branch, and
gradients are clipped unit by unit against the weights (`adaptive_clip_grad`), which lets large batches train. Pre-activation
bottlenecks with two grouped 3x3 convolutions of 128 channels a group, squeeze-and-excitation, GELU. F(n) has (n + 1) times F0's blocks.

                blocks           params M   GMACs at training size, at test size    top-1 % (paper)
    nfnet_f0    1,  2,  6,  3       71.49     6.98 at 192     12.38 at 256          83.6
    nfnet_f1    2,  4, 12,  6      132.63    17.44 at 224     35.54 at 320          84.7
    nfnet_f2    3,  6, 18,  9      193.78    33.14 at 256     62.59 at 352          85.1
    nfnet_f3    4,  8, 24, 12      254.92    67.94 at 320    114.76 at 416          85.7
    nfnet_f4    5, 10, 30, 15      316.07   121.12 at 384    215.24 at 512          85.9
    nfnet_f5    6, 12, 36, 18      377.21   169.50 at 416    289.76 at 544          86.0
    nfnet_f6    7, 14, 42, 21      438.36   228.29 at 448    377.28 at 576          86.5 with SAM

Module names are those of timm's nfnet_f0 to nfnet_f6; its dm_nfnet, which holds the authors' weights, pads on the right and bottom
first and has a gain on every branch.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import nn

_GELU_GAIN = 1.7015043497085571  # 1 / standard deviation of gelu(x), x of unit variance


def _unitwise_norm(x: torch.Tensor) -> torch.Tensor:
    """Euclidean norm of each row of a weight (what one unit of output sees), or of a whole vector."""
    return torch.linalg.vector_norm(x, dim=tuple(range(1, x.dim())) or None, keepdim=x.dim() > 1)


@torch.no_grad()
def adaptive_clip_grad(parameters: Iterable[torch.Tensor], clip_factor: float = 0.01, eps: float = 1e-3) -> None:
    """Adaptive gradient clipping, in place: G_i <- G_i * clip_factor * max(||W_i||, eps) / ||G_i|| where that is below 1.

    i is a unit: a row of a weight (output first), or a whole vector. Leave the last linear layer's parameters out, as the paper
    does. NaN stays.

    Args:
        parameters: those without a gradient are skipped.
        clip_factor: lambda of the paper; 0.01 for batches of 4096, more for smaller ones.
        eps: lets weights that are zero move.
    """
    for parameter in parameters:
        if parameter.grad is None:
            continue
        limit = clip_factor * _unitwise_norm(parameter).clamp(min=eps)
        norm = _unitwise_norm(parameter.grad)
        parameter.grad.mul_(torch.where(norm > limit, limit / norm, 1.0))


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016): in training, zeroes whole images with probability `drop_prob`, scales the others up."""

    def __init__(self, drop_prob: float):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or self.drop_prob == 0.0:
            return x
        keep_prob = 1.0 - self.drop_prob
        return x * x.new_empty((x.shape[0], 1, 1, 1)).bernoulli_(keep_prob).div_(keep_prob)


class ScaledStdConv2d(nn.Conv2d):
    """Convolution with weights of zero mean and variance gain^2 * gamma^2 / fan_in for each output channel, whatever is learnt.

    gamma makes up for the activation in front, so that unit variance stays.
    """

    def __init__(self, in_chans: int, out_chans: int, kernel: int, stride: int = 1, groups: int = 1, gain_init: float = 1.0):
        super().__init__(in_chans, out_chans, kernel, stride=stride, padding=kernel // 2, groups=groups)
        self.gain = nn.Parameter(torch.full((out_chans, 1, 1, 1), gain_init))
        self.scale = _GELU_GAIN * self.weight[0].numel() ** -0.5
        self.eps = 1e-5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        var, mean = torch.var_mean(self.weight, (1, 2, 3), correction=0, keepdim=True)
        weight = (self.weight - mean) * torch.rsqrt(var + self.eps) * (self.gain * self.scale)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


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


class NormFreeBlock(nn.Module):
    """shortcut + alpha * drop_path(2 * se(1x1 to a half, two grouped 3x3, 1x1 of beta * gelu(x))) on (N, C, H, W).

    beta is 1 over the standard deviation of x at initialisation; 2 makes up for the mean of SE's gate.
    """

    def __init__(self, in_chans: int, out_chans: int, stride: int, alpha: float, beta: float, group_width: int, drop_path: float):
        super().__init__()
        mid = out_chans // 2
        groups = mid // group_width
        self.alpha, self.beta = alpha, beta
        self.downsample = None
        if stride > 1 or in_chans != out_chans:
            pool = nn.AvgPool2d(2, stride, ceil_mode=True, count_include_pad=False) if stride > 1 else nn.Identity()
            self.downsample = nn.Sequential(OrderedDict(pool=pool, conv=ScaledStdConv2d(in_chans, out_chans, 1)))
        self.act = nn.GELU()
        self.conv1 = ScaledStdConv2d(in_chans, mid, 1)
        self.conv2 = ScaledStdConv2d(mid, mid, 3, stride, groups)
        self.conv2b = ScaledStdConv2d(mid, mid, 3, 1, groups)
        self.conv3 = ScaledStdConv2d(mid, out_chans, 1, gain_init=0.0)  # a block starts as its shortcut
        self.attn_last = SEModule(out_chans, out_chans // 2)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.act(x) * self.beta
        shortcut = x if self.downsample is None else self.downsample(y)
        y = self.conv2b(self.act(self.conv2(self.act(self.conv1(y)))))
        y = 2.0 * self.attn_last(self.conv3(self.act(y)))
        return self.drop_path(y) * self.alpha + shortcut


class NormFreeNet(nn.Module):
    """Images (N, in_chans, H, W) to logits (N, num_classes), at a total stride of 32.

    Args:
        depths, widths: number of blocks and of channels of each stage; there are twice the last width's features.
        stem: channels after the stem.
        group_width: channels a group of the 3x3 convolutions, a divisor of every half width.
        drop_rate: dropout before the head (paper: 0.2 for F0 to 0.5 for F5 and F6).
        drop_path_rate: stochastic depth, growing linearly to this at the last block (paper: 0.25).
    """

    def __init__(
        self,
        depths: tuple[int, ...],
        widths: tuple[int, ...] = (256, 512, 1536, 1536),
        stem: int = 128,
        group_width: int = 128,
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        chans = (in_chans, stem // 8, stem // 4, stem // 2, stem)
        layers = OrderedDict()
        for i, stride in enumerate((2, 1, 1, 2)):
            if i > 0:
                layers[f"act{i + 1}"] = nn.GELU()
            layers[f"conv{i + 1}"] = ScaledStdConv2d(chans[i], chans[i + 1], 3, stride)
        self.stem = nn.Sequential(layers)
        alpha, variance, width_in, done = 0.2, 1.0, stem, 0
        self.stages = nn.Sequential()
        for index, (depth, width) in enumerate(zip(depths, widths)):
            blocks = nn.Sequential()
            for i in range(depth):
                rate = drop_path_rate * done / max(sum(depths) - 1, 1)
                stride = 2 if i == 0 and index > 0 else 1
                blocks.append(NormFreeBlock(width_in, width, stride, alpha, variance**-0.5, group_width, rate))
                variance = (1.0 if i == 0 else variance) + alpha**2  # a first block's projection has unit variance again
                width_in, done = width, done + 1
            self.stages.append(blocks)
        self.final_conv = ScaledStdConv2d(width_in, 2 * width_in, 1)
        self.act = nn.GELU()
        self.head = nn.Sequential(
            OrderedDict(
                pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(1), drop=nn.Dropout(drop_rate), fc=nn.Linear(2 * width_in, num_classes)
            )
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="linear")
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.head.fc.weight, std=0.01)
        nn.init.zeros_(self.head.fc.bias)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Images to feature maps (N, 2 * widths[-1], H / 32, W / 32)."""
        return self.act(self.final_conv(self.stages(self.stem(x))))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.forward_features(x))


def _f(n: int, **kw) -> NormFreeNet:
    return NormFreeNet(tuple((n + 1) * depth for depth in (1, 2, 6, 3)), **kw)


def nfnet_f0(**kw) -> NormFreeNet:
    return _f(0, **kw)


def nfnet_f1(**kw) -> NormFreeNet:
    return _f(1, **kw)


def nfnet_f2(**kw) -> NormFreeNet:
    return _f(2, **kw)


def nfnet_f3(**kw) -> NormFreeNet:
    return _f(3, **kw)


def nfnet_f4(**kw) -> NormFreeNet:
    return _f(4, **kw)


def nfnet_f5(**kw) -> NormFreeNet:
    return _f(5, **kw)


def nfnet_f6(**kw) -> NormFreeNet:
    return _f(6, **kw)

"""ConvNeXt, hierarchical and isotropic.

Liu, Mao, Wu, Feichtenhofer, Darrell, Xie: A ConvNet for the 2020s, CVPR 2022 (arXiv 2201.03545).

A ResNet moved step by step towards Swin while staying a pure ConvNet: stages of (3, 3, 9, 3) blocks as in Swin's 1:1:3:1,
a 4x4 stride-4 patch stem, depthwise 7x7 convolution as the first layer of an inverted bottleneck (C -> 4C -> C), one GELU
and one LayerNorm a block, and normalised 2x2 stride-2 convolutions between the stages. Training counts as much as shape:
300 epochs of AdamW with mixup, cutmix, RandAugment, random erasing, label smoothing and stochastic depth alone took
ResNet-50 from 76.1% to 78.8% on ImageNet-1K.

                     channels                 blocks          params M   GMACs at 224    top-1 % (ImageNet-1K, 224)
    tiny             96, 192, 384, 768        3, 3,  9, 3        28.59           4.46    82.1
    small            96, 192, 384, 768        3, 3, 27, 3        50.22           8.68    83.1
    base             128, 256, 512, 1024      3, 3, 27, 3        88.59          15.35    83.8
    large            192, 384, 768, 1536      3, 3, 27, 3       197.77          34.36    84.3
    xlarge           256, 512, 1024, 2048     3, 3, 27, 3       350.20          60.92    87.0 (pretrained on ImageNet-22K)
    isotropic small  384                      18                 22.31           4.29    79.7
    isotropic base   768                      18                 87.08          16.90    82.0
    isotropic large  1024                     36                305.94          59.70    82.6

The isotropic models keep 14x14 resolution throughout, as ViT does; only the large one was trained with layer scale. Module
names are those of the published checkpoints, which load with `model.load_state_dict(checkpoint["model"])`.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import nn


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of an (N, C, H, W) tensor; the result is in channels_last memory format."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016): in training, zeroes whole images with probability `drop_prob`.

    What is kept is divided by the probability of keeping it, so that the expectation stays.
    """

    def __init__(self, drop_prob: float):
        super().__init__()
        if not 0.0 <= drop_prob < 1.0:
            raise ValueError(f"DropPath: drop_prob must be in [0, 1), got {drop_prob}")
        self.drop_prob = drop_prob

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or self.drop_prob == 0.0:
            return x
        keep_prob = 1.0 - self.drop_prob
        mask = x.new_empty((x.shape[0], *[1] * (x.dim() - 1))).bernoulli_(keep_prob)
        return x * mask.div_(keep_prob)

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob:.3f}"


class Block(nn.Module):
    """x + drop_path(gamma * pwconv2(gelu(pwconv1(norm(dwconv(x)))))) on (N, C, H, W); figure 4 of the paper."""

    def __init__(self, dim: int, drop_path: float = 0.0, layer_scale_init_value: float = 1e-6):
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, kernel_size=7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.act = nn.GELU()
        self.pwconv2 = nn.Linear(4 * dim, dim)
        self.gamma = nn.Parameter(torch.full((dim,), float(layer_scale_init_value))) if layer_scale_init_value > 0 else None
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x
        x = self.dwconv(x).permute(0, 2, 3, 1)
        x = self.pwconv2(self.act(self.pwconv1(self.norm(x))))
        if self.gamma is not None:
            x = self.gamma * x
        return shortcut + self.drop_path(x.permute(0, 3, 1, 2))


def _init_weights(model: nn.Module, head_init_scale: float) -> None:
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.mul_(head_init_scale)


def _drop_rates(drop_path_rate: float, blocks: int) -> list[float]:
    """Stochastic depth grows linearly from 0 at the first block to `drop_path_rate` at the last."""
    return [drop_path_rate * i / max(blocks - 1, 1) for i in range(blocks)]


class ConvNeXt(nn.Module):
    """Four stages of blocks, halving the resolution and widening between them.

    Args:
        depths, dims: number of blocks and of channels of each stage.
        in_chans: channels of the images, (N, in_chans, H, W) with H and W multiples of 32 (others are cropped).
        num_classes: size of the head.
        drop_path_rate: stochastic depth at the last block.
        layer_scale_init_value: initial gamma; 0 leaves layer scale out.
        head_init_scale: factor on the head's initial weights.
    """

    def __init__(
        self,
        depths: tuple[int, ...] = (3, 3, 9, 3),
        dims: tuple[int, ...] = (96, 192, 384, 768),
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_path_rate: float = 0.0,
        layer_scale_init_value: float = 1e-6,
        head_init_scale: float = 1.0,
    ):
        super().__init__()
        stem = nn.Sequential(nn.Conv2d(in_chans, dims[0], kernel_size=4, stride=4), LayerNorm2d(dims[0], eps=1e-6))
        self.downsample_layers = nn.ModuleList([stem])
        for dim, next_dim in itertools.pairwise(dims):
            self.downsample_layers.append(nn.Sequential(LayerNorm2d(dim, eps=1e-6), nn.Conv2d(dim, next_dim, kernel_size=2, stride=2)))
        rates = iter(_drop_rates(drop_path_rate, sum(depths)))
        self.stages = nn.ModuleList(
            nn.Sequential(*[Block(dim, next(rates), layer_scale_init_value) for _ in range(depth)]) for depth, dim in zip(depths, dims)
        )
        self.norm = nn.LayerNorm(dims[-1], eps=1e-6)
        self.head = nn.Linear(dims[-1], num_classes)
        _init_weights(self, head_init_scale)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Images (N, in_chans, H, W) to normalised, average-pooled features (N, dims[-1])."""
        for downsample, stage in zip(self.downsample_layers, self.stages):
            x = stage(downsample(x))
        return self.norm(x.mean((-2, -1)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.forward_features(x))


class ConvNeXtIsotropic(nn.Module):
    """Blocks of one width at one resolution behind a 16x16 patch stem; section 3.3 of the paper. Arguments as ConvNeXt's."""

    def __init__(
        self,
        depth: int = 18,
        dim: int = 384,
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_path_rate: float = 0.0,
        layer_scale_init_value: float = 0.0,
        head_init_scale: float = 1.0,
    ):
        super().__init__()
        self.stem = nn.Conv2d(in_chans, dim, kernel_size=16, stride=16)
        self.blocks = nn.Sequential(*[Block(dim, rate, layer_scale_init_value) for rate in _drop_rates(drop_path_rate, depth)])
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, num_classes)
        _init_weights(self, head_init_scale)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Images (N, in_chans, H, W) to normalised, average-pooled features (N, dim)."""
        return self.norm(self.blocks(self.stem(x)).mean((-2, -1)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.forward_features(x))


def convnext_tiny(**kw) -> ConvNeXt:
    return ConvNeXt((3, 3, 9, 3), (96, 192, 384, 768), **kw)


def convnext_small(**kw) -> ConvNeXt:
    return ConvNeXt((3, 3, 27, 3), (96, 192, 384, 768), **kw)


def convnext_base(**kw) -> ConvNeXt:
    return ConvNeXt((3, 3, 27, 3), (128, 256, 512, 1024), **kw)


def convnext_large(**kw) -> ConvNeXt:
    return ConvNeXt((3, 3, 27, 3), (192, 384, 768, 1536), **kw)


def convnext_xlarge(**kw) -> ConvNeXt:
    return ConvNeXt((3, 3, 27, 3), (256, 512, 1024, 2048), **kw)


def convnext_isotropic_small(**kw) -> ConvNeXtIsotropic:
    return ConvNeXtIsotropic(18, 384, **kw)


def convnext_isotropic_base(**kw) -> ConvNeXtIsotropic:
    return ConvNeXtIsotropic(18, 768, **kw)


def convnext_isotropic_large(**kw) -> ConvNeXtIsotropic:
    return ConvNeXtIsotropic(36, 1024, **{"layer_scale_init_value": 1e-6, **kw})

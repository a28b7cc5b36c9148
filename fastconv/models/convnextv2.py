"""ConvNeXt V2.

Woo, Debnath, Hu, Chen, Liu, Kweon, Xie: ConvNeXt V2: Co-designing and Scaling ConvNets with Masked Autoencoders, CVPR 2023
(arXiv 2301.00808).

ConvNeXt with one layer changed: layer scale goes, and global response normalisation (GRN) comes between the GELU and the
second linear layer. It divides each channel's norm over the map by the mean of the norms, so that channels compete. Found by
pretraining with masked images (fcmae.py), under which V1's wide activations fall silent or say the same; with it even 3.7 M
parameters gain from pretraining.

             channels                 blocks          params M   GMACs at 224    top-1 % (ImageNet-1K, 224, pretrained on it)
    atto     40, 80, 160, 320         2, 2,  6, 2         3.71           0.55    76.7
    femto    48, 96, 192, 384         2, 2,  6, 2         5.23           0.78    78.5
    pico     64, 128, 256, 512        2, 2,  6, 2         9.07           1.37    80.3
    nano     80, 160, 320, 640        2, 2,  8, 2        15.62           2.45    81.9
    tiny     96, 192, 384, 768        3, 3,  9, 3        28.64           4.46    83.0
    base     128, 256, 512, 1024      3, 3, 27, 3        88.72          15.35    84.9
    large    192, 384, 768, 1536      3, 3, 27, 3       197.96          34.36    85.8
    huge     352, 704, 1408, 2816     3, 3, 27, 3       660.29         114.92    86.3

Module names are those of the published checkpoints, which load with `model.load_state_dict(checkpoint["model"])`.
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


class GRN(nn.Module):
    """Global response normalisation of an (N, H, W, C) tensor; algorithm 1 of the paper.

    g_c = ||x_c|| over H and W;  out = x + gamma * x * g / (mean over c of g + 1e-6) + beta
    """

    def __init__(self, dim: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, dim))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        norm = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)
        return x + self.gamma * (x * (norm / (norm.mean(-1, keepdim=True) + 1e-6))) + self.beta


class Block(nn.Module):
    """x + drop_path(pwconv2(grn(gelu(pwconv1(norm(dwconv(x))))))) on (N, C, H, W); figure 5 of the paper."""

    def __init__(self, dim: int, drop_path: float = 0.0):
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, kernel_size=7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.act = nn.GELU()
        self.grn = GRN(4 * dim)
        self.pwconv2 = nn.Linear(4 * dim, dim)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x
        x = self.dwconv(x).permute(0, 2, 3, 1)
        x = self.pwconv2(self.grn(self.act(self.pwconv1(self.norm(x)))))
        return shortcut + self.drop_path(x.permute(0, 3, 1, 2))


def init_weights(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)


class Encoder(nn.Module):
    """Stem, four stages of blocks and what halves the resolution between them; `block` makes one of (channels, drop_path)."""

    block = Block

    def __init__(self, depths: tuple[int, ...], dims: tuple[int, ...], in_chans: int, drop_path_rate: float):
        super().__init__()
        stem = nn.Sequential(nn.Conv2d(in_chans, dims[0], kernel_size=4, stride=4), LayerNorm2d(dims[0], eps=1e-6))
        self.downsample_layers = nn.ModuleList([stem])
        for dim, next_dim in itertools.pairwise(dims):
            self.downsample_layers.append(nn.Sequential(LayerNorm2d(dim, eps=1e-6), nn.Conv2d(dim, next_dim, kernel_size=2, stride=2)))
        last = max(sum(depths) - 1, 1)  # stochastic depth grows linearly from 0 at the first block
        rates = (drop_path_rate * i / last for i in itertools.count())
        self.stages = nn.ModuleList(
            nn.Sequential(*[self.block(dim, next(rates)) for _ in range(depth)]) for depth, dim in zip(depths, dims)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for downsample, stage in zip(self.downsample_layers, self.stages):
            x = stage(downsample(x))
        return x


class ConvNeXtV2(Encoder):
    """The encoder, and a linear head over its normalised average.

    Args:
        depths, dims: number of blocks and of channels of each stage.
        in_chans: channels of the images, (N, in_chans, H, W) with H and W multiples of 32 (others are cropped).
        num_classes: size of the head.
        drop_path_rate: stochastic depth at the last block.
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
        head_init_scale: float = 1.0,
    ):
        super().__init__(depths, dims, in_chans, drop_path_rate)
        self.norm = nn.LayerNorm(dims[-1], eps=1e-6)
        self.head = nn.Linear(dims[-1], num_classes)
        init_weights(self)
        with torch.no_grad():
            self.head.weight.mul_(head_init_scale)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Images (N, in_chans, H, W) to normalised, average-pooled features (N, dims[-1])."""
        return self.norm(super().forward(x).mean((-2, -1)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.forward_features(x))


SIZES = {
    "atto": ((2, 2, 6, 2), (40, 80, 160, 320)),
    "femto": ((2, 2, 6, 2), (48, 96, 192, 384)),
    "pico": ((2, 2, 6, 2), (64, 128, 256, 512)),
    "nano": ((2, 2, 8, 2), (80, 160, 320, 640)),
    "tiny": ((3, 3, 9, 3), (96, 192, 384, 768)),
    "base": ((3, 3, 27, 3), (128, 256, 512, 1024)),
    "large": ((3, 3, 27, 3), (192, 384, 768, 1536)),
    "huge": ((3, 3, 27, 3), (352, 704, 1408, 2816)),
}


def convnextv2_atto(**kw) -> ConvNeXtV2:
    return ConvNeXtV2(*SIZES["atto"], **kw)


def convnextv2_femto(**kw) -> ConvNeXtV2:
    return ConvNeXtV2(*SIZES["femto"], **kw)


def convnextv2_pico(**kw) -> ConvNeXtV2:
    return ConvNeXtV2(*SIZES["pico"], **kw)


def convnextv2_nano(**kw) -> ConvNeXtV2:
    return ConvNeXtV2(*SIZES["nano"], **kw)


def convnextv2_tiny(**kw) -> ConvNeXtV2:
    return ConvNeXtV2(*SIZES["tiny"], **kw)


def convnextv2_base(**kw) -> ConvNeXtV2:
    return ConvNeXtV2(*SIZES["base"], **kw)


def convnextv2_large(**kw) -> ConvNeXtV2:
    return ConvNeXtV2(*SIZES["large"], **kw)


def convnextv2_huge(**kw) -> ConvNeXtV2:
    return ConvNeXtV2(*SIZES["huge"], **kw)

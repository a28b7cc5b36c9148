"""MaxViT.

Tu, Talebi, Zhang, Yang, Milanfar, Bovik, Li: MaxViT: Multi-Axis Vision Transformer, ECCV 2022 (arXiv 2204.01697).

Global attention at linear cost: each block is an MBConv with squeeze and excitation, then attention inside windows (local), then
attention among the places of a dilated grid, one of each window (global), both with a learned bias for every relative
position. Windows and grids have as many places as the last stage's map, 7x7 at 224, so every stage has a global view.

              channels                blocks          params M   GMACs at 224   top-1 % (ImageNet-1K, 224)
    tiny      64, 128, 256, 512       2, 2,  5, 2        30.92           5.55   83.62
    small     96, 192, 384, 768       2, 2,  5, 2        68.93          11.58   84.45
    base      96, 192, 384, 768       2, 6, 14, 2       119.47          23.90   84.95
    large     128, 256, 512, 1024     2, 6, 14, 2       211.79          43.49   85.17
    xlarge    192, 384, 768, 1536     2, 6, 14, 2       474.95          97.21   88.7 (pretrained on ImageNet-21K, at 512)

Module names are timm's for the published (TensorFlow) weights, whose ways are kept: "same" padding, GELU by tanh, BatchNorm eps 1e-3.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn


class DropPath(nn.Module):
    """Stochastic depth: in training, zeroes whole images with probability `drop_prob` and divides the others by 1 - drop_prob."""

    def __init__(self, drop_prob: float):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or self.drop_prob == 0.0:
            return x
        keep_prob = 1.0 - self.drop_prob
        mask = x.new_empty((x.shape[0], *[1] * (x.dim() - 1))).bernoulli_(keep_prob)
        return x * mask.div_(keep_prob)


class Conv2dSame(nn.Conv2d):
    """3x3 convolution of maps with even sides, padded as TensorFlow does: with stride 2 only below and at the right."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        padding = (0, 1, 0, 1) if self.stride[0] == 2 else (1, 1, 1, 1)
        return F.conv2d(F.pad(x, padding), self.weight, self.bias, self.stride, groups=self.groups)


class SEModule(nn.Module):
    """Squeeze and excitation: x * sigmoid(fc2(silu(fc1(mean over the map))))."""

    def __init__(self, channels: int, reduced: int):
        super().__init__()
        self.fc1 = nn.Conv2d(channels, reduced, 1)
        self.act = nn.SiLU(inplace=True)
        self.fc2 = nn.Conv2d(reduced, channels, 1)
        self.gate = nn.Sigmoid()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gate(self.fc2(self.act(self.fc1(x.mean((2, 3), keepdim=True)))))


class Downsample2d(nn.Module):
    """2x2 average pooling, and a 1x1 convolution where the channels change."""

    def __init__(self, dim: int, dim_out: int):
        super().__init__()
        self.pool = nn.AvgPool2d(2)
        self.expand = nn.Conv2d(dim, dim_out, 1) if dim != dim_out else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.expand(self.pool(x))


class MbConvBlock(nn.Module):
    """shortcut(x) + conv3(se(gelu(norm2(depthwise(gelu(norm1(conv1(pre_norm(x)))))))), widened 4 times inside."""

    def __init__(self, dim: int, dim_out: int, stride: int, drop_path: float):
        super().__init__()
        mid = 4 * dim_out
        self.shortcut = Downsample2d(dim, dim_out) if stride == 2 else nn.Identity()
        self.pre_norm = nn.BatchNorm2d(dim, eps=1e-3)
        self.conv1_1x1 = nn.Conv2d(dim, mid, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(mid, eps=1e-3)
        self.conv2_kxk = Conv2dSame(mid, mid, 3, stride, groups=mid, bias=False)
        self.norm2 = nn.BatchNorm2d(mid, eps=1e-3)
        self.act = nn.GELU(approximate="tanh")
        self.se = SEModule(mid, dim_out // 4)
        self.conv3_1x1 = nn.Conv2d(mid, dim_out, 1)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.act(self.norm1(self.conv1_1x1(self.pre_norm(x))))
        y = self.se(self.act(self.norm2(self.conv2_kxk(y))))
        return self.shortcut(x) + self.drop_path(self.conv3_1x1(y))


class Mlp(nn.Module):
    """fc2(gelu(fc1(x)))."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act(self.fc1(x)))


class RelPosBias(nn.Module):
    """(heads, window^2, window^2): a learned bias for every relative position, key less query."""

    def __init__(self, window: int, num_heads: int):
        super().__init__()
        self.window = window
        self.relative_position_bias_table = nn.Parameter(torch.zeros(num_heads, 2 * window - 1, 2 * window - 1))

    def forward(self) -> torch.Tensor:
        place = torch.arange(self.window, device=self.relative_position_bias_table.device)
        offset = place[None] - place[:, None] + self.window - 1
        bias = self.relative_position_bias_table[:, offset[:, None, :, None], offset[None, :, None, :]]
        return bias.flatten(3).flatten(1, 2)


class AttentionCl(nn.Module):
    """softmax(q k^T / sqrt(32) + bias) v on tokens (B, windows, window^2, C), projected; heads of 32 channels."""

    def __init__(self, dim: int, window: int):
        super().__init__()
        self.num_heads = dim // 32
        self.qkv = nn.Linear(dim, 3 * dim)
        self.rel_pos = RelPosBias(window, self.num_heads)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, windows, N, C = x.shape
        q, k, v = self.qkv(x).view(B * windows, N, 3, self.num_heads, 32).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=self.rel_pos()[None])
        return self.proj(x.transpose(1, 2).reshape(B, windows, N, C))


class PartitionAttention(nn.Module):
    """x + attention(norm1(x)) inside the windows of a (B, H, W, C) map, or among the places of its grids; then x + mlp(norm2(x)).

    A window is `window` x `window` neighbours; a grid as many places, H / window and W / window apart.
    """

    def __init__(self, dim: int, window: int, grid: bool, drop_path: float):
        super().__init__()
        self.window, self.grid = window, grid
        self.norm1 = nn.LayerNorm(dim, eps=1e-5)
        self.attn = AttentionCl(dim, window)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=1e-5)
        self.mlp = Mlp(dim, 4 * dim)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def _attend(self, x: torch.Tensor) -> torch.Tensor:
        B, H, W, C = x.shape
        w = self.window
        if self.grid:
            x = x.view(B, w, H // w, w, W // w, C).permute(0, 2, 4, 1, 3, 5)  # [B, row, column of the window | place in it]
        else:
            x = x.view(B, H // w, w, W // w, w, C).permute(0, 1, 3, 2, 4, 5)
        x = self.attn(x.reshape(B, -1, w * w, C)).view(B, H // w, W // w, w, w, C)
        return x.permute(0, 3, 1, 4, 2, 5).reshape(B, H, W, C) if self.grid else x.permute(0, 1, 3, 2, 4, 5).reshape(B, H, W, C)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.drop_path1(self._attend(self.norm1(x)))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class MaxVitBlock(nn.Module):
    """MBConv, window attention, grid attention, on (B, C, H, W)."""

    def __init__(self, dim: int, dim_out: int, stride: int, window: int, drop_path: float):
        super().__init__()
        self.conv = MbConvBlock(dim, dim_out, stride, drop_path)
        self.attn_block = PartitionAttention(dim_out, window, grid=False, drop_path=drop_path)
        self.attn_grid = PartitionAttention(dim_out, window, grid=True, drop_path=drop_path)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x).permute(0, 2, 3, 1)
        return self.attn_grid(self.attn_block(x)).permute(0, 3, 1, 2)


class Stem(nn.Module):
    """Two 3x3 convolutions, the first with stride 2."""

    def __init__(self, in_chans: int, dim: int):
        super().__init__()
        self.conv1 = Conv2dSame(in_chans, dim, 3, stride=2)
        self.norm1 = nn.BatchNorm2d(dim, eps=1e-3)
        self.act = nn.GELU(approximate="tanh")
        self.conv2 = Conv2dSame(dim, dim, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv2(self.act(self.norm1(self.conv1(x))))


class Stage(nn.Module):
    def __init__(self, blocks: list[nn.Module]):
        super().__init__()
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks(x)


class Head(nn.Module):
    """Average pooling, norm, a tanh layer, classifier: (B, C, H, W) to (B, num_classes)."""

    def __init__(self, dim: int, num_classes: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-5)
        self.pre_logits = nn.Sequential(OrderedDict(fc=nn.Linear(dim, dim), act=nn.Tanh()))
        self.fc = nn.Linear(dim, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.pre_logits(self.norm(x.mean((2, 3)))))


class MaxVit(nn.Module):
    """Stem, four stages of blocks, head.

    Args:
        dims, depths: channels and blocks of each stage; every stage halves the map.
        stem_dim: channels of the stem.
        img_size: sets the windows, img_size / 32; the images are (N, in_chans, H, W), both multiples of img_size.
        num_classes: size of the head.
        drop_path_rate: stochastic depth at the last block.
    """

    def __init__(
        self,
        dims: tuple[int, ...] = (64, 128, 256, 512),
        depths: tuple[int, ...] = (2, 2, 5, 2),
        stem_dim: int = 64,
        *,
        img_size: int = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        if img_size % 32:
            raise ValueError(f"MaxVit: img_size must be a multiple of 32, got {img_size}")
        self.img_size = img_size
        self.stem = Stem(in_chans, stem_dim)
        rates = iter(drop_path_rate * i / max(sum(depths) - 1, 1) for i in range(sum(depths)))
        stages, dim = [], stem_dim
        for dim_out, depth in zip(dims, depths):
            blocks = []
            for stride in [2] + [1] * (depth - 1):
                blocks.append(MaxVitBlock(dim, dim_out, stride, img_size // 32, next(rates)))
                dim = dim_out
            stages.append(Stage(blocks))
        self.stages = nn.Sequential(*stages)
        self.head = Head(dim, num_classes)
        for name, parameter in self.named_parameters():
            if name.endswith("bias_table"):
                nn.init.normal_(parameter, std=0.02)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Images to the last stage's map (N, dims[-1], H / 32, W / 32)."""
        if x.shape[2] % self.img_size or x.shape[3] % self.img_size:
            raise ValueError(f"MaxVit: height and width must be multiples of {self.img_size} (img_size), got {tuple(x.shape[2:])}")
        return self.stages(self.stem(x))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.forward_features(x))


def maxvit_tiny_tf_224(**kw) -> MaxVit:
    return MaxVit((64, 128, 256, 512), (2, 2, 5, 2), 64, **kw)


def maxvit_small_tf_224(**kw) -> MaxVit:
    return MaxVit((96, 192, 384, 768), (2, 2, 5, 2), 64, **kw)


def maxvit_base_tf_224(**kw) -> MaxVit:
    return MaxVit((96, 192, 384, 768), (2, 6, 14, 2), 64, **kw)


def maxvit_large_tf_224(**kw) -> MaxVit:
    return MaxVit((128, 256, 512, 1024), (2, 6, 14, 2), 128, **kw)


def maxvit_xlarge_tf_224(**kw) -> MaxVit:
    return MaxVit((192, 384, 768, 1536), (2, 6, 14, 2), 192, **kw)

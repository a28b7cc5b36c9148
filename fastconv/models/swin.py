"""Swin Transformer.

Liu, Lin, Cao, Hu, Wei, Zhang, Lin, Guo: Swin Transformer: Hierarchical Vision Transformer using Shifted Windows, ICCV 2021
(arXiv 2103.14030).

Self-attention inside 7x7 windows, so that its cost is linear in the image, and windows shifted by half their size in every
second block, so that neighbours exchange. A learned bias for every relative position takes the place of position embeddings,
and 2x2 patches merge between stages: a pyramid that detection and segmentation can use, as ResNet's is.

             channels   blocks         heads            params M   GMACs at 224   top-1 % (ImageNet-1K, 224)
    tiny     96         2, 2,  6, 2    3,  6, 12, 24       28.29           4.49   81.3
    small    96         2, 2, 18, 2    3,  6, 12, 24       49.61           8.74   83.0
    base     128        2, 2, 18, 2    4,  8, 16, 32       87.77          15.43   83.5
    large    192        2, 2, 18, 2    6, 12, 24, 48      196.53          34.48   86.3 (pretrained on ImageNet-22K)

Module names are those of the official checkpoints, which load with `model.load_state_dict(checkpoint["model"])`: their
buffers (relative_position_index, attn_mask) follow from the sizes and are ignored. Maps of any size: what does not fill its
last windows is padded with zeros, as in the official detection code and torchvision.
"""

from __future__ import annotations

import math

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


class Mlp(nn.Module):
    """fc2(gelu(fc1(x)))."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act(self.fc1(x)))


def relative_position_index(window: int) -> torch.Tensor:
    """(window^2, window^2) int64: for each pair of tokens the row of the bias table, (dy + window - 1)(2 window - 1) + dx + window - 1."""
    coords = torch.cartesian_prod(torch.arange(window), torch.arange(window))
    offsets = coords[:, None] - coords[None] + window - 1
    return offsets[..., 0] * (2 * window - 1) + offsets[..., 1]


def to_windows(x: torch.Tensor, window: int) -> torch.Tensor:
    """(B, H, W, C) to (B, windows, window^2, C)."""
    B, H, W, C = x.shape
    x = x.view(B, H // window, window, W // window, window, C)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(B, -1, window * window, C)


def from_windows(x: torch.Tensor, window: int, H: int, W: int) -> torch.Tensor:
    """The inverse of to_windows."""
    B, C = x.shape[0], x.shape[-1]
    x = x.view(B, H // window, W // window, window, window, C)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(B, H, W, C)


def shift_mask(H: int, W: int, window: int, shift: list[int], like: torch.Tensor) -> torch.Tensor:
    """(windows, 1, window^2, window^2): -100 between tokens that rolling brought together from opposite borders, else 0."""
    rows, cols = (
        (torch.arange(size, device=like.device) >= size - window).long() + (torch.arange(size, device=like.device) >= size - s)
        for size, s in zip((H, W), shift)
    )
    regions = to_windows((3 * rows[:, None] + cols)[None, :, :, None], window)[0]  # (windows, window^2, 1)
    return like.new_zeros(()).where(regions == regions.mT, -100.0)[:, None]


class WindowAttention(nn.Module):
    """Multi-head self-attention inside windows of a (B, H, W, C) map; section 3.2 of the paper.

    softmax(q k^T / sqrt(C / heads) + bias[relative position] + mask) v, on the map padded to whole windows and then rolled
    by -shift; an axis that a single window covers is not shifted. `pad_first=False` rolls before it pads (timm's order).
    """

    def __init__(self, dim: int, window_size: int, num_heads: int, shift_size: int = 0, pad_first: bool = True):
        super().__init__()
        self.window_size, self.shift_size, self.num_heads, self.pad_first = window_size, shift_size, num_heads, pad_first
        self.scale = (dim // num_heads) ** -0.5
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window_size - 1) ** 2, num_heads))
        self.register_buffer("relative_position_index", relative_position_index(window_size), persistent=False)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        state_dict.pop(prefix + "relative_position_index", None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _attend(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """x: (B, windows, window^2, C); mask: (windows, 1, window^2, window^2)."""
        B, windows, N, C = x.shape
        q, k, v = self.qkv(x).view(B, windows, N, 3, self.num_heads, -1).permute(3, 0, 1, 4, 2, 5)
        attn = (q * self.scale) @ k.mT + self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)
        if mask is not None:
            attn = attn + mask
        return self.proj((attn.softmax(-1) @ v).transpose(2, 3).reshape(B, windows, N, C))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        H, W, window = x.shape[1], x.shape[2], self.window_size
        padded = [-(-size // window) * window for size in (H, W)]
        shift = [self.shift_size if size > window else 0 for size in padded]
        padding = (0, 0, 0, padded[1] - W, 0, padded[0] - H)
        if self.pad_first:
            x = F.pad(x, padding)
        if any(shift):
            x = x.roll((-shift[0], -shift[1]), (1, 2))
        if not self.pad_first:
            x = F.pad(x, padding)
        x = self._attend(to_windows(x, window), shift_mask(*padded, window, shift, x) if any(shift) else None)
        x = from_windows(x, window, *padded)
        if not self.pad_first:
            x = x[:, :H, :W]
        if any(shift):
            x = x.roll(shift, (1, 2))
        return x[:, :H, :W]


class SwinTransformerBlock(nn.Module):
    """x + attention(norm1(x)), then x + mlp(norm2(x)), on (B, H, W, C)."""

    def __init__(self, dim: int, num_heads: int, window_size: int, shift_size: int, drop_path: float, pad_first: bool):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, window_size, num_heads, shift_size, pad_first)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, 4 * dim)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        state_dict.pop(prefix + "attn_mask", None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PatchMerging(nn.Module):
    """(B, H, W, C) to (B, ceil(H / 2), ceil(W / 2), 2C): each 2x2 patch as one token, normalised, then projected."""

    def __init__(self, dim: int):
        super().__init__()
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(4 * dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        x = torch.cat([x[:, dy::2, dx::2] for dx in (0, 1) for dy in (0, 1)], -1)
        return self.reduction(self.norm(x))


class PatchEmbed(nn.Module):
    """Images (B, in_chans, H, W) to normalised tokens (B, H / 4, W / 4, dim)."""

    def __init__(self, in_chans: int, dim: int):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, kernel_size=4, stride=4)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class BasicLayer(nn.Module):
    """One stage: blocks, every second one shifted by half a window, then patch merging but for the last stage."""

    def __init__(self, blocks: list[nn.Module], downsample: nn.Module | None):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x if self.downsample is None else self.downsample(x)


class SwinTransformer(nn.Module):
    """Four stages of windowed attention.

    Args:
        embed_dim, depths, num_heads: channels of the first stage (they double), blocks and heads of each stage.
        window_size: of every stage, but not larger than the stage's map at `img_size`; images of other sizes keep the windows.
        in_chans: channels of the images, (N, in_chans, H, W) with H and W multiples of 4 (others are cropped).
        num_classes: size of the head.
        drop_path_rate: stochastic depth at the last block.
        pad_first: see WindowAttention.
    """

    def __init__(
        self,
        embed_dim: int = 96,
        depths: tuple[int, ...] = (2, 2, 6, 2),
        num_heads: tuple[int, ...] = (3, 6, 12, 24),
        *,
        window_size: int = 7,
        img_size: int = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_path_rate: float = 0.0,
        pad_first: bool = True,
    ):
        super().__init__()
        self.patch_embed = PatchEmbed(in_chans, embed_dim)
        rates = iter(drop_path_rate * i / max(sum(depths) - 1, 1) for i in range(sum(depths)))
        self.layers = nn.ModuleList()
        for i, (depth, heads) in enumerate(zip(depths, num_heads)):
            dim, resolution = embed_dim << i, math.ceil(img_size // 4 / 2**i)
            window, shift = (window_size, window_size // 2) if resolution > window_size else (resolution, 0)
            blocks = [SwinTransformerBlock(dim, heads, window, shift * (j % 2), next(rates), pad_first) for j in range(depth)]
            self.layers.append(BasicLayer(blocks, PatchMerging(dim) if i < len(depths) - 1 else None))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_classes)
        for name, parameter in self.named_parameters():
            if name.endswith("bias_table") or (parameter.dim() == 2 and name.endswith("weight")):
                nn.init.trunc_normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Images (N, in_chans, H, W) to normalised, average-pooled features (N, channels of the last stage)."""
        x = self.patch_embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x).mean((1, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.forward_features(x))


def swin_tiny_patch4_window7_224(**kw) -> SwinTransformer:
    return SwinTransformer(96, (2, 2, 6, 2), (3, 6, 12, 24), **kw)


def swin_small_patch4_window7_224(**kw) -> SwinTransformer:
    return SwinTransformer(96, (2, 2, 18, 2), (3, 6, 12, 24), **kw)


def swin_base_patch4_window7_224(**kw) -> SwinTransformer:
    return SwinTransformer(128, (2, 2, 18, 2), (4, 8, 16, 32), **kw)


def swin_large_patch4_window7_224(**kw) -> SwinTransformer:
    return SwinTransformer(192, (2, 2, 18, 2), (6, 12, 24, 48), **kw)

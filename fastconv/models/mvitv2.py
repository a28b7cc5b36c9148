"""MViTv2.

Li, Wu, Fan, Mangalam, Xiong, Malik, Feichtenhofer: MViTv2: Improved Multiscale Vision Transformers for Classification and
Detection, CVPR 2022 (arXiv 2112.01526).

A pyramid by pooling: attention pools q, k and v with depthwise 3x3 convolutions and LayerNorm. Pooling q halves the map
between stages; pooling k and v (by 4 on the first stage's 56x56 map) keeps attention over the whole map cheap. Version 2 adds
relative positions split into rows and columns, adds the pooled q to the result (residual pooling), and widens in the first
attention of a stage in place of the previous stage's last Mlp (which the large model keeps).

             channels              heads           blocks          params M   GMACs at 224   top-1 % (ImageNet-1K, 224)
    tiny     96, 192, 384, 768     1, 2, 4, 8      1, 2,  5, 2        24.17           4.68   82.3
    small    96, 192, 384, 768     1, 2, 4, 8      1, 2, 11, 2        34.87           6.96   83.6
    base     96, 192, 384, 768     1, 2, 4, 8      2, 3, 16, 3        51.47          10.10   84.4
    large    144, 288, 576, 1152   2, 4, 8, 16     2, 6, 36, 4       217.99          43.71   85.3

Module names are timm's.
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


class Mlp(nn.Module):
    """fc2(gelu(fc1(x))), (..., dim) to (..., dim_out)."""

    def __init__(self, dim: int, hidden: int, dim_out: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim_out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act(self.fc1(x)))


def relative_index(queries: int, keys: int, device: torch.device) -> torch.Tensor:
    """(queries, keys) int64: the row of a relative position table of 2 max(queries, keys) - 1, on one axis of the finer map."""
    side = max(queries, keys)
    q = torch.arange(queries, device=device) * (side // queries)
    k = torch.arange(keys, device=device) * (side // keys)
    return q[:, None] - k[None] + (keys - 1) * (side // keys)


class MultiScaleAttention(nn.Module):
    """Pooling attention on a (B, H, W, dim) map: (B, H / stride_q, W / stride_q, dim_out).

    softmax(q k^T / sqrt(d) + q . rel_pos_h[row distance] + q . rel_pos_w[column distance]) v + q, projected, where q, k, v
    are pooled by depthwise convolutions that all heads share.
    """

    def __init__(self, dim: int, dim_out: int, side: int, num_heads: int, stride_q: int, stride_kv: int):
        super().__init__()
        self.num_heads = num_heads
        head_dim = dim_out // num_heads
        self.qkv = nn.Linear(dim, 3 * dim_out)
        self.proj = nn.Linear(dim_out, dim_out)
        for name, stride in (("q", stride_q), ("k", stride_kv), ("v", stride_kv)):
            setattr(self, f"pool_{name}", nn.Conv2d(head_dim, head_dim, 3, stride, padding=1, groups=head_dim, bias=False))
            setattr(self, f"norm_{name}", nn.LayerNorm(head_dim, eps=1e-6))
        positions = 2 * (side // min(stride_q, stride_kv)) - 1
        self.rel_pos_h = nn.Parameter(torch.zeros(positions, head_dim))
        self.rel_pos_w = nn.Parameter(torch.zeros(positions, head_dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, H, W, _ = x.shape
        heads = self.qkv(x).view(B, H, W, 3, self.num_heads, -1).permute(3, 0, 4, 5, 1, 2).flatten(1, 2)  # [3, B heads, d, H, W]
        pooled = [pool(part).permute(0, 2, 3, 1) for pool, part in zip((self.pool_q, self.pool_k, self.pool_v), heads)]
        q, k, v = (norm(part).unflatten(0, (B, -1)) for norm, part in zip((self.norm_q, self.norm_k, self.norm_v), pooled))
        rows = self.rel_pos_h[relative_index(q.shape[2], k.shape[2], x.device)]
        columns = self.rel_pos_w[relative_index(q.shape[3], k.shape[3], x.device)]
        bias = torch.einsum("bnhwd,hkd->bnhwk", q, rows)[..., None] + torch.einsum("bnhwd,wkd->bnhwk", q, columns)[..., None, :]
        tokens = (part.flatten(2, 3) for part in (q, k, v))
        x = F.scaled_dot_product_attention(*tokens, attn_mask=bias.flatten(4).flatten(2, 3)).view_as(q) + q
        return self.proj(x.permute(0, 2, 3, 1, 4).flatten(3))


class MultiScaleBlock(nn.Module):
    """shortcut + attention(norm1(x)), then shortcut + mlp(norm2(x)).

    The shortcut is max-pooled where q is, and projected where the channels change: with `expand_attn` in the attention, else in
    the Mlp. It is the normalised input that is projected.
    """

    def __init__(
        self, dim: int, dim_out: int, side: int, num_heads: int, stride_q: int, stride_kv: int, expand_attn: bool, drop_path: float
    ):
        super().__init__()
        attn_dim = dim_out if expand_attn else dim
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.shortcut_proj_attn = nn.Linear(dim, dim_out) if expand_attn and dim != dim_out else None
        self.shortcut_pool_attn = nn.MaxPool2d(3, stride_q, padding=1) if stride_q > 1 else None
        self.attn = MultiScaleAttention(dim, attn_dim, side, num_heads, stride_q, stride_kv)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(attn_dim, eps=1e-6)
        self.shortcut_proj_mlp = nn.Linear(dim, dim_out) if not expand_attn and dim != dim_out else None
        self.mlp = Mlp(attn_dim, 4 * attn_dim, dim_out)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm1(x)
        shortcut = x if self.shortcut_proj_attn is None else self.shortcut_proj_attn(y)
        if self.shortcut_pool_attn is not None:
            shortcut = self.shortcut_pool_attn(shortcut.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        x = shortcut + self.drop_path1(self.attn(y))
        y = self.norm2(x)
        shortcut = x if self.shortcut_proj_mlp is None else self.shortcut_proj_mlp(y)
        return shortcut + self.drop_path2(self.mlp(y))


class Stage(nn.Module):
    def __init__(self, blocks: list[nn.Module]):
        super().__init__()
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks(x)


class PatchEmbed(nn.Module):
    """Images (B, in_chans, H, W) to overlapping patches (B, H / 4, W / 4, dim)."""

    def __init__(self, in_chans: int, dim: int):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, kernel_size=7, stride=4, padding=3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x).permute(0, 2, 3, 1)


class MultiScaleVit(nn.Module):
    """Overlapping patches, four stages, norm, head on the mean.

    Args:
        embed_dim, num_heads: channels and heads of the first stage; both double from stage to stage.
        depths: blocks of each stage; every stage but the first halves the map.
        expand_attn: see MultiScaleBlock.
        img_size: side of the images (N, in_chans, img_size, img_size), a multiple of 32.
        num_classes: size of the head.
        drop_path_rate: stochastic depth at the last block.
    """

    def __init__(
        self,
        depths: tuple[int, ...] = (1, 2, 5, 2),
        embed_dim: int = 96,
        num_heads: int = 1,
        *,
        expand_attn: bool = True,
        img_size: int = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        if img_size % 32:
            raise ValueError(f"MultiScaleVit: img_size must be a multiple of 32, got {img_size}")
        self.img_size = img_size
        self.patch_embed = PatchEmbed(in_chans, embed_dim)
        rates = iter(drop_path_rate * i / max(sum(depths) - 1, 1) for i in range(sum(depths)))
        self.stages = nn.ModuleList()
        dim, side, last = embed_dim, img_size // 4, len(depths) - 1
        for i, depth in enumerate(depths):
            blocks = []
            for j in range(depth):
                stride_q = 2 if i > 0 and j == 0 else 1
                widened = i if expand_attn else min(i + (j == depth - 1), last)
                dim_out = embed_dim << widened
                blocks.append(MultiScaleBlock(dim, dim_out, side, num_heads << i, stride_q, max(4 >> i, 1), expand_attn, next(rates)))
                dim, side = dim_out, side // stride_q
            self.stages.append(Stage(blocks))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Sequential(OrderedDict(fc=nn.Linear(dim, num_classes)))
        for name, parameter in self.named_parameters():
            if "rel_pos" in name or (parameter.dim() == 2 and name.endswith("weight")):
                nn.init.trunc_normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Images to the mean of the last stage's normalised map (N, channels of the last stage)."""
        if x.shape[2:] != (self.img_size, self.img_size):
            raise ValueError(f"MultiScaleVit: images must be {self.img_size}x{self.img_size} (img_size), got {tuple(x.shape[2:])}")
        x = self.patch_embed(x)
        for stage in self.stages:
            x = stage(x)
        return self.norm(x).mean((1, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.forward_features(x))


def mvitv2_tiny(**kw) -> MultiScaleVit:
    return MultiScaleVit((1, 2, 5, 2), **kw)


def mvitv2_small(**kw) -> MultiScaleVit:
    return MultiScaleVit((1, 2, 11, 2), **kw)


def mvitv2_base(**kw) -> MultiScaleVit:
    return MultiScaleVit((2, 3, 16, 3), **kw)


def mvitv2_large(**kw) -> MultiScaleVit:
    return MultiScaleVit((2, 6, 36, 4), 144, 2, **{"expand_attn": False, **kw})

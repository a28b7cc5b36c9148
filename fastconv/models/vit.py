"""Vision Transformer, and DeiT's with a distillation token.

Dosovitskiy et al.: An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale, ICLR 2021 (arXiv 2010.11929).
Touvron, Cord, Douze, Massa, Sablayrolles, Jegou: Training data-efficient image transformers & distillation through attention,
ICML 2021 (arXiv 2012.12877).

Images as sequences: each 16x16 patch, projected, is a token; a learned class token and learned position embeddings join them,
and a plain pre-norm Transformer encoder does the rest. With little of a convolution's prior it needs more data than ImageNet-1K
(it was pretrained on ImageNet-21K or JFT-300M), or DeiT's recipe: strong augmentation, and a second token that learns
a teacher's (RegNetY-16GF's) labels by a head of its own; at inference the two heads are averaged.

                              channels   blocks   heads   params M   GMACs at 224   top-1 % (ImageNet-1K)
    tiny, patch 16            192        12       3           5.72           1.25   72.2 (DeiT's recipe)
    small, patch 16           384        12       6          22.05           4.60   79.8 (DeiT's recipe)
    base, patch 16            768        12       12         86.57          17.56   81.8 (DeiT's recipe)
    large, patch 16           1024       24       16        304.33          61.55   87.8 (pretrained on JFT-300M, at 512)
    huge, patch 14            1280       32       16        632.05         167.30   88.6 (pretrained on JFT-300M, at 518)
    DeiT base, distilled      768        12       12         87.34          17.66   83.4

Module names are timm's, which the DeiT and MAE checkpoints share: `model.load_state_dict(checkpoint["model"])`.
"""

from __future__ import annotations

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


class Attention(nn.Module):
    """Multi-head self-attention on tokens (B, N, C): softmax(q k^T / sqrt(C / heads)) v, projected."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, N, C = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, C))


class Block(nn.Module):
    """x + attention(norm1(x)), then x + mlp(norm2(x))."""

    def __init__(self, dim: int, num_heads: int, drop_path: float = 0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.drop_path1(self.attn(self.norm1(x)))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """Images (B, in_chans, img_size, img_size) to tokens (B, num_patches, dim)."""

    def __init__(self, img_size: int, patch_size: int, in_chans: int, dim: int):
        super().__init__()
        self.img_size = img_size
        self.num_patches = (img_size // patch_size) ** 2
        self.proj = nn.Conv2d(in_chans, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[2:] != (self.img_size, self.img_size):
            raise ValueError(f"PatchEmbed: images must be {self.img_size}x{self.img_size} (img_size), got {tuple(x.shape[2:])}")
        return self.proj(x).flatten(2).mT


class VisionTransformer(nn.Module):
    """Patches, class token, position embeddings, blocks, norm, head on the class token.

    Args:
        embed_dim, depth, num_heads: channels, blocks, heads of each block.
        patch_size, img_size: side of a patch and of the images, in pixels; the images are (N, in_chans, img_size, img_size).
        num_classes: size of the head.
        drop_path_rate: stochastic depth at the last block.
        distilled: adds DeiT's distillation token and its head. The result is the mean of the two heads' logits; with
            `distilled_training` set, training mode returns both, (class, distillation).
    """

    def __init__(
        self,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        *,
        patch_size: int = 16,
        img_size: int = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_path_rate: float = 0.0,
        distilled: bool = False,
    ):
        super().__init__()
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.dist_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if distilled else None
        self.pos_embed = nn.Parameter(torch.zeros(1, self.patch_embed.num_patches + 1 + distilled, embed_dim))
        rates = [drop_path_rate * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.Sequential(*[Block(embed_dim, num_heads, rate) for rate in rates])
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head = nn.Linear(embed_dim, num_classes)
        self.head_dist = nn.Linear(embed_dim, num_classes) if distilled else None
        self.distilled_training = False
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        for name in ("cls_token", "dist_token", "pos_embed"):
            if getattr(self, name) is not None:
                nn.init.trunc_normal_(getattr(self, name), std=0.02)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Images to normalised tokens (N, 1 + patches, embed_dim), the class token first, the distillation token second."""
        x = self.patch_embed(x)
        tokens = [token.expand(x.shape[0], -1, -1) for token in (self.cls_token, self.dist_token) if token is not None]
        return self.norm(self.blocks(torch.cat([*tokens, x], 1) + self.pos_embed))

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        x = self.forward_features(x)
        logits = self.head(x[:, 0])
        if self.head_dist is None:
            return logits
        distilled = self.head_dist(x[:, 1])
        return (logits, distilled) if self.training and self.distilled_training else (logits + distilled) / 2


def vit_tiny_patch16_224(**kw) -> VisionTransformer:
    return VisionTransformer(192, 12, 3, **kw)


def vit_small_patch16_224(**kw) -> VisionTransformer:
    return VisionTransformer(384, 12, 6, **kw)


def vit_base_patch16_224(**kw) -> VisionTransformer:
    return VisionTransformer(768, 12, 12, **kw)


def vit_large_patch16_224(**kw) -> VisionTransformer:
    return VisionTransformer(1024, 24, 16, **kw)


def vit_huge_patch14_224(**kw) -> VisionTransformer:
    return VisionTransformer(1280, 32, 16, **{"patch_size": 14, **kw})


def deit_base_distilled_patch16_224(**kw) -> VisionTransformer:
    return VisionTransformer(768, 12, 12, distilled=True, **kw)

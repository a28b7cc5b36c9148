"""EVA and EVA-02.

Fang, Wang, Xie, Sun, Wu, Wang, Huang, Wang, Cao: EVA: Exploring the Limits of Masked Visual Representation Learning at Scale,
CVPR 2023 (arXiv 2211.07636). Fang, Sun, Wang, Huang, Wang, Cao: EVA-02: A Visual Representation for Neon Genesis, 2023
(arXiv 2303.11331).

A ViT learns to reconstruct, from visible patches, the features that CLIP's vision tower has at the masked ones (40%), in cosine
similarity, and by that scales to a billion parameters on public data. EVA-02 learns from EVA itself as the teacher and modernises
the block: SwiGLU feed-forward (base and large with a norm inside), rotary position embeddings on q and k beside the learned ones:
at 304 M parameters it passes EVA's billion.

                    channels   hidden   blocks   heads   params M   GMACs            top-1 % (ImageNet-1K)
    EVA giant       1408       6144     40       16       1012.56   267.03 at 224    89.6 (at 336)
    EVA-02 tiny     192        512      12       3           5.76     4.66 at 336    80.7
    EVA-02 small    384        1024     12       6          22.13    15.45 at 336    85.8
    EVA-02 base     768        2048     12       12         87.12   106.89 at 448    88.6 (pretrained on ImageNet-22K)
    EVA-02 large    1024       2730     24       16        305.08   361.75 at 448    90.0 (pretrained on 38 M public images)

Module names are timm's. As in the published checkpoints, EVA, tiny and small have one qkv projection, base and large three.
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


class SwiGLU(nn.Module):
    """fc2(norm(silu(gate) * value)), gate and value two projections, or with `norm=False` two halves of one, and no norm."""

    def __init__(self, dim: int, hidden: int, norm: bool):
        super().__init__()
        if norm:
            self.fc1_g = nn.Linear(dim, hidden)
            self.fc1_x = nn.Linear(dim, hidden)
        else:
            self.fc1 = nn.Linear(dim, 2 * hidden)
        self.act = nn.SiLU()
        self.norm = nn.LayerNorm(hidden, eps=1e-6) if norm else None
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.norm is None:
            gate, value = self.fc1(x).chunk(2, -1)
            return self.fc2(self.act(gate) * value)
        return self.fc2(self.norm(self.act(self.fc1_g(x)) * self.fc1_x(x)))


def rotary_table(head_dim: int, side: int, reference_side: int) -> torch.Tensor:
    """(2, side^2, head_dim): sin and cos of each patch's angles, y's in the first half of the channels, x's in the second.

    Neighbouring channels form a pair that turns by position 10000^(-4 i / head_dim); positions are scaled as if the map had
    `reference_side` patches a side, the pretraining's, so that a finer map interpolates.
    """
    frequencies = 10000.0 ** -(torch.arange(head_dim // 4) / (head_dim // 4))
    position = torch.arange(side) / side * reference_side
    angles = (torch.cartesian_prod(position, position)[..., None] * frequencies).flatten(1).repeat_interleave(2, 1)
    return torch.stack([angles.sin(), angles.cos()])


def rotate(x: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
    """x: (B, heads, 1 + N, head_dim). Each channel pair (a, b) but the class token's to (a cos - b sin, b cos + a sin)."""
    patches = x[:, :, 1:]
    turned = torch.stack([-patches[..., 1::2], patches[..., ::2]], -1).flatten(-2)
    return torch.cat([x[:, :, :1], patches * rope[1] + turned * rope[0]], 2)


class EvaAttention(nn.Module):
    """softmax(q k^T / sqrt(C / heads)) v on tokens (B, N, C), projected; q and k rotated if a table is given. Keys have no bias."""

    def __init__(self, dim: int, num_heads: int, qkv_fused: bool):
        super().__init__()
        self.num_heads, self.qkv_fused = num_heads, qkv_fused
        if qkv_fused:
            self.qkv = nn.Linear(dim, 3 * dim, bias=False)
            self.q_bias = nn.Parameter(torch.zeros(dim))
            self.v_bias = nn.Parameter(torch.zeros(dim))
        else:
            self.q_proj = nn.Linear(dim, dim)
            self.k_proj = nn.Linear(dim, dim, bias=False)
            self.v_proj = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor, rope: torch.Tensor | None) -> torch.Tensor:
        B, N, C = x.shape
        if self.qkv_fused:
            bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
            qkv = F.linear(x, self.qkv.weight, bias).chunk(3, -1)
        else:
            qkv = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        q, k, v = (t.view(B, N, self.num_heads, -1).transpose(1, 2) for t in qkv)
        if rope is not None:
            q, k = rotate(q, rope).type_as(v), rotate(k, rope).type_as(v)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, C))


class EvaBlock(nn.Module):
    """x + attention(norm1(x)), then x + mlp(norm2(x)). `mlp`: "gelu", "swiglu" or "swiglu_norm"."""

    def __init__(self, dim: int, hidden: int, num_heads: int, mlp: str, qkv_fused: bool, drop_path: float = 0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = EvaAttention(dim, num_heads, qkv_fused)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, hidden) if mlp == "gelu" else SwiGLU(dim, hidden, norm=mlp == "swiglu_norm")
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: torch.Tensor, rope: torch.Tensor | None) -> torch.Tensor:
        x = x + self.drop_path1(self.attn(self.norm1(x), rope))
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


class Eva(nn.Module):
    """Patches, class token, position embeddings, blocks; norm and head on the mean of the patch tokens.

    Args:
        embed_dim, hidden, depth, num_heads: channels, the feed-forward's hidden channels, blocks, heads of each block.
        mlp, qkv_fused: see EvaBlock and EvaAttention.
        rotary: rotary position embeddings, as of `reference_side` patches a side.
        patch_size, img_size: side of a patch and of the images, in pixels; the images are (N, in_chans, img_size, img_size).
        num_classes: size of the head.
        drop_path_rate: stochastic depth at the last block.
    """

    def __init__(
        self,
        embed_dim: int = 192,
        hidden: int = 512,
        depth: int = 12,
        num_heads: int = 3,
        *,
        mlp: str = "swiglu",
        qkv_fused: bool = True,
        rotary: bool = True,
        reference_side: int = 16,
        patch_size: int = 14,
        img_size: int = 336,
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, self.patch_embed.num_patches + 1, embed_dim))
        table = rotary_table(embed_dim // num_heads, img_size // patch_size, reference_side) if rotary else None
        self.register_buffer("rotary", table, persistent=False)
        rates = [drop_path_rate * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.ModuleList([EvaBlock(embed_dim, hidden, num_heads, mlp, qkv_fused, rate) for rate in rates])
        self.fc_norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head = nn.Linear(embed_dim, num_classes)
        for token in (self.cls_token, self.pos_embed):
            nn.init.trunc_normal_(token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        with torch.no_grad():  # what block i adds shrinks with its depth
            for i, block in enumerate(self.blocks):
                for layer in (block.attn.proj, block.mlp.fc2):
                    layer.weight.div_((2.0 * (i + 1)) ** 0.5)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Images to the normalised mean of the patch tokens (N, embed_dim)."""
        x = self.patch_embed(x)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1) + self.pos_embed
        for block in self.blocks:
            x = block(x, self.rotary)
        return self.fc_norm(x[:, 1:].mean(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.forward_features(x))


def eva_giant_patch14_224(**kw) -> Eva:
    return Eva(1408, 6144, 40, 16, **{"mlp": "gelu", "rotary": False, "img_size": 224, **kw})


def eva02_tiny_patch14_336(**kw) -> Eva:
    return Eva(192, 512, 12, 3, **kw)


def eva02_small_patch14_336(**kw) -> Eva:
    return Eva(384, 1024, 12, 6, **kw)


def eva02_base_patch14_448(**kw) -> Eva:
    return Eva(768, 2048, 12, 12, **{"mlp": "swiglu_norm", "qkv_fused": False, "img_size": 448, **kw})


def eva02_large_patch14_448(**kw) -> Eva:
    return Eva(1024, 2730, 24, 16, **{"mlp": "swiglu_norm", "qkv_fused": False, "img_size": 448, **kw})

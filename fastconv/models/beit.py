"""BEiT.

Bao, Dong, Piao, Wei: BEiT: BERT Pre-Training of Image Transformers, ICLR 2022 (arXiv 2106.08254).

BERT's masked modelling for images: about 40% of the patches, in blocks, are replaced by a mask token, and the network predicts
the discrete visual tokens that a dVAE (DALL-E's) gives them. The ViT itself has a relative position bias in each block in place of
position embeddings, layer scale, keys without bias, and classifies the mean of the patch tokens.

                        channels   blocks   heads   params M   GMACs at 224   top-1 % (pretrained on ImageNet-22K)
    base,  patch 16     768        12       12         86.53          17.56   85.2
    large, patch 16     1024       24       16        304.43          61.55   87.4

Module names are those of the official checkpoints, which load with `model.load_state_dict(checkpoint["model"])`; their buffer
relative_position_index follows from the sizes and is ignored.
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


def relative_position_index(side: int) -> torch.Tensor:
    """(side^2 + 1, side^2 + 1) int64: for each pair of tokens, class token first, the row of the bias table.

    Patches: (dy + side - 1)(2 side - 1) + dx + side - 1. The last three rows: class to patch, patch to class, class to class.
    """
    coords = torch.cartesian_prod(torch.arange(side), torch.arange(side))
    offsets = coords[:, None] - coords[None] + side - 1
    rows = (2 * side - 1) ** 2
    index = F.pad(offsets[..., 0] * (2 * side - 1) + offsets[..., 1], (1, 0, 1, 0), value=rows)
    index[1:, 0] = rows + 1
    index[0, 0] = rows + 2
    return index


class Attention(nn.Module):
    """softmax(q k^T / sqrt(C / heads) + bias[relative position]) v on tokens (B, 1 + side^2, C), projected. Keys have no bias."""

    def __init__(self, dim: int, num_heads: int, side: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * side - 1) ** 2 + 3, num_heads))
        self.register_buffer("relative_position_index", relative_position_index(side), persistent=False)
        self.proj = nn.Linear(dim, dim)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        state_dict.pop(prefix + "relative_position_index", None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, N, C = x.shape
        qkv = F.linear(x, self.qkv.weight, torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias]))
        q, k, v = qkv.view(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)[None]
        return self.proj(F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).reshape(B, N, C))


class Block(nn.Module):
    """x + gamma_1 * attention(norm1(x)), then x + gamma_2 * mlp(norm2(x))."""

    def __init__(self, dim: int, num_heads: int, side: int, init_values: float, drop_path: float = 0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads, side)
        self.gamma_1 = nn.Parameter(torch.full((dim,), init_values))
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim)
        self.gamma_2 = nn.Parameter(torch.full((dim,), init_values))
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.drop_path1(self.gamma_1 * self.attn(self.norm1(x)))
        return x + self.drop_path2(self.gamma_2 * self.mlp(self.norm2(x)))


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


class Beit(nn.Module):
    """Patches, class token, blocks; norm and head on the mean of the patch tokens.

    Args:
        embed_dim, depth, num_heads: channels, blocks, heads of each block.
        init_values: initial layer scale.
        patch_size, img_size: side of a patch and of the images, in pixels; the images are (N, in_chans, img_size, img_size).
        num_classes: size of the head.
        drop_path_rate: stochastic depth at the last block.
    """

    def __init__(
        self,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        *,
        init_values: float = 0.1,
        patch_size: int = 16,
        img_size: int = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        rates = [drop_path_rate * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.Sequential(*[Block(embed_dim, num_heads, img_size // patch_size, init_values, rate) for rate in rates])
        self.fc_norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head = nn.Linear(embed_dim, num_classes)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
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
        x = self.blocks(torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1))
        return self.fc_norm(x[:, 1:].mean(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.forward_features(x))


def beit_base_patch16_224(**kw) -> Beit:
    return Beit(768, 12, 12, **kw)


def beit_large_patch16_224(**kw) -> Beit:
    return Beit(1024, 24, 16, **{"init_values": 1e-5, **kw})

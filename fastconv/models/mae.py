"""Masked autoencoder: self-supervised pretraining of a ViT.

He, Chen, Xie, Li, Dollar, Girshick: Masked Autoencoders Are Scalable Vision Learners, CVPR 2022 (arXiv 2111.06377).

Three quarters of the patches are removed at random, and the network paints them again. It is asymmetric: the encoder (a plain
ViT) sees the visible quarter only, without mask tokens, which makes pretraining 3 times as fast; a narrow decoder of 8 blocks,
thrown away afterwards, gets encoded and mask tokens in their places and predicts pixels. The loss is the mean squared error of
masked patches alone, best against each patch's own normalised pixels.

                       encoder                       params M   GMACs at 224    top-1 % (ImageNet-1K, fine-tuned at 224)
    base,  patch 16    768 channels, 12 blocks         111.91           9.78    83.6
    large, patch 16    1024 channels, 24 blocks        329.54          20.76    85.9
    huge,  patch 14    1280 channels, 32 blocks        657.07          48.56    86.9 (87.8 at 448)

Parameters and arithmetic are those of pretraining, decoder and all, with three quarters of the patches removed.

Module names are those of the official checkpoints. The encoder's (all but `mask_token` and `decoder_*`) are a ViT's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


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

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


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


def sincos_pos_embed(dim: int, side: int) -> torch.Tensor:
    """(1, 1 + side^2, dim): zeros for the class token; a patch at (y, x) gets sin, cos of x, then of y, at dim / 4 frequencies each."""
    frequencies = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    y, x = torch.cartesian_prod(*[torch.arange(side, dtype=torch.float64)] * 2).T[..., None] * frequencies
    embed = torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], 1).float()
    return F.pad(embed, (0, 0, 1, 0))[None]


def patchify(images: torch.Tensor, patch_size: int) -> torch.Tensor:
    """(N, C, H, W) to (N, patches, patch_size^2 C), pixels before channels."""
    N, C, H, W = images.shape
    x = images.view(N, C, H // patch_size, patch_size, W // patch_size, patch_size)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(N, -1, patch_size**2 * C)


def unpatchify(patches: torch.Tensor, patch_size: int) -> torch.Tensor:
    """The inverse of patchify, for square images."""
    side = round(patches.shape[1] ** 0.5)
    x = patches.view(patches.shape[0], side, side, patch_size, patch_size, -1)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(patches.shape[0], -1, side * patch_size, side * patch_size)


def random_masking(x: torch.Tensor, mask_ratio: float, generator: torch.Generator | None = None):
    """Keeps a random part of each image's tokens (N, L, C).

    The tokens are shuffled by sorting uniform noise; the first (1 - mask_ratio) L stay. Returns them (N, kept, C), the mask
    (N, L), 1 for what was removed, and the permutation (N, L) that undoes the shuffle. A generator must be on x's device.
    """
    N, L, C = x.shape
    shuffle = torch.rand(N, L, device=x.device, generator=generator).argsort(1)
    restore = shuffle.argsort(1)
    kept = int(L * (1 - mask_ratio))
    mask = (restore >= kept).to(x.dtype)
    return x.gather(1, shuffle[:, :kept, None].expand(-1, -1, C)), mask, restore


class MaskedAutoencoder(nn.Module):
    """Encoder of visible patches, decoder of all.

    Args:
        embed_dim, depth, num_heads: the encoder's channels, blocks and heads; `decoder_*` the decoder's.
        patch_size, img_size: side of a patch and of the images, in pixels; the images are (N, in_chans, img_size, img_size).
        norm_pix_loss: targets are each patch's pixels less their mean, divided by their standard deviation.
    """

    def __init__(
        self,
        embed_dim: int = 1024,
        depth: int = 24,
        num_heads: int = 16,
        *,
        patch_size: int = 16,
        img_size: int = 224,
        in_chans: int = 3,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        norm_pix_loss: bool = False,
    ):
        super().__init__()
        self.patch_size, self.norm_pix_loss = patch_size, norm_pix_loss
        side = img_size // patch_size
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(sincos_pos_embed(embed_dim, side), requires_grad=False)
        self.blocks = nn.ModuleList([Block(embed_dim, num_heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.decoder_embed = nn.Linear(embed_dim, decoder_embed_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_embed_dim))
        self.decoder_pos_embed = nn.Parameter(sincos_pos_embed(decoder_embed_dim, side), requires_grad=False)
        self.decoder_blocks = nn.ModuleList([Block(decoder_embed_dim, decoder_num_heads) for _ in range(decoder_depth)])
        self.decoder_norm = nn.LayerNorm(decoder_embed_dim, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder_embed_dim, patch_size**2 * in_chans)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.flatten(1))  # as the linear layer that it is
        for token in (self.cls_token, self.mask_token):
            nn.init.normal_(token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward_encoder(self, images: torch.Tensor, mask_ratio: float = 0.75, generator: torch.Generator | None = None):
        """Normalised class and visible tokens (N, 1 + kept, embed_dim), mask (N, L), unshuffling permutation (N, L)."""
        x = self.patch_embed(images) + self.pos_embed[:, 1:]
        x, mask, restore = random_masking(x, mask_ratio, generator)
        x = torch.cat([(self.cls_token + self.pos_embed[:, :1]).expand(x.shape[0], -1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x), mask, restore

    def forward_decoder(self, x: torch.Tensor, restore: torch.Tensor) -> torch.Tensor:
        """Predicted pixels of every patch, (N, L, patch_size^2 in_chans)."""
        x = self.decoder_embed(x)
        N, L = restore.shape
        tokens = torch.cat([x[:, 1:], self.mask_token.expand(N, L + 1 - x.shape[1], -1)], 1)
        tokens = tokens.gather(1, restore[..., None].expand(-1, -1, x.shape[2]))
        x = torch.cat([x[:, :1], tokens], 1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x))[:, 1:]

    def targets(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | float, torch.Tensor | float]:
        """The patches (N, L, patch_size^2 in_chans), and the mean and scale by which they are normalised."""
        patches = patchify(images, self.patch_size)
        if not self.norm_pix_loss:
            return patches, 0.0, 1.0
        var, mean = torch.var_mean(patches, -1, keepdim=True)
        return patches, mean, (var + 1e-6).sqrt()

    def reconstruct(self, images: torch.Tensor, pred: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The images with their masked patches as predicted, under the mean and variance that those really have."""
        patches, mean, scale = self.targets(images)
        return unpatchify(torch.where(mask[..., None] > 0, pred * scale + mean, patches), self.patch_size)

    def forward_loss(self, images: torch.Tensor, pred: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Mean squared error of the masked patches' pixels."""
        patches, mean, scale = self.targets(images)
        return ((pred - (patches - mean) / scale).square().mean(-1) * mask).sum() / mask.sum()

    def forward(self, images: torch.Tensor, mask_ratio: float = 0.75, generator: torch.Generator | None = None):
        """(loss, pixels predicted for every patch, mask); `generator` draws the mask, and must be on the images' device."""
        x, mask, restore = self.forward_encoder(images, mask_ratio, generator)
        pred = self.forward_decoder(x, restore)
        return self.forward_loss(images, pred, mask), pred, mask


def mae_vit_base_patch16(**kw) -> MaskedAutoencoder:
    return MaskedAutoencoder(768, 12, 12, **kw)


def mae_vit_large_patch16(**kw) -> MaskedAutoencoder:
    return MaskedAutoencoder(1024, 24, 16, **kw)


def mae_vit_huge_patch14(**kw) -> MaskedAutoencoder:
    return MaskedAutoencoder(1280, 32, 16, **{"patch_size": 14, **kw})

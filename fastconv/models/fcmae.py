"""FCMAE: the masked pretraining of ConvNeXt V2, on dense tensors.

Woo et al., CVPR 2023 (arXiv 2301.00808), section 3.1: 60% of an image's 32x32 patches are hidden, a ConvNeXt V2 sees the rest,
and one block at stride 32 that is given a learnt token for each hidden patch predicts the hidden pixels.

The encoder must not learn from where the holes are, and so the published code runs it on sparse tensors. Here it is dense and
computes the same: hidden positions are set to zero before the convolutions, where sparse ones read zero, before GRN, to whose
norms they then add nothing, and after each block. LayerNorm and linear layers work on each position by itself. The norms of GRN
are those of an image's visible positions, as in the paper's equation; the published sparse layer takes them over the whole batch.

The state_dict of `encoder` is ConvNeXtV2's without norm and head: `ConvNeXtV2.load_state_dict(..., strict=False)` takes it.
Other names are those of the published checkpoints.
"""

from __future__ import annotations

import torch
from torch import nn

from .convnextv2 import SIZES, Block, Encoder, init_weights

PATCH = 32  # one position of the encoder's result


class MaskedBlock(Block):
    """A Block that leaves hidden positions at zero; masked: (N, H, W, 1) bool, true where hidden."""

    def forward(self, x: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
        shortcut = x
        x = self.dwconv(x).permute(0, 2, 3, 1)
        x = self.pwconv1(self.norm(x)).masked_fill(masked, 0)
        x = self.pwconv2(self.grn(self.act(x))).masked_fill(masked, 0)
        return shortcut + self.drop_path(x.permute(0, 3, 1, 2))


class MaskedEncoder(Encoder):
    """Images (N, in_chans, H, W) and mask (N, H / 32, W / 32) to features (N, dims[-1], H / 32, W / 32), zero where masked."""

    block = MaskedBlock

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = x.masked_fill(_enlarged(mask, PATCH)[:, None], 0)  # so that not even a NaN gets out
        for stride, downsample, stage in zip((4, 8, 16, 32), self.downsample_layers, self.stages):
            masked = _enlarged(mask, PATCH // stride)[..., None]
            x = downsample(x).permute(0, 2, 3, 1).masked_fill(masked, 0).permute(0, 3, 1, 2)  # stays channels_last
            for block in stage:
                x = block(x, masked)
        return x


def _enlarged(mask: torch.Tensor, factor: int) -> torch.Tensor:
    return mask.repeat_interleave(factor, 1).repeat_interleave(factor, 2)


class FCMAE(nn.Module):
    """Masked autoencoder.

    Args:
        depths, dims: of the encoder, a ConvNeXtV2.
        in_chans: channels of the images, (N, in_chans, H, W) with H and W multiples of 32.
        mask_ratio: share of the patches that is hidden, rounded up to whole patches.
        decoder_dim, decoder_depth: channels and number of the decoder's blocks.
        drop_path_rate: stochastic depth at the encoder's last block.
    """

    def __init__(
        self,
        depths: tuple[int, ...] = (3, 3, 9, 3),
        dims: tuple[int, ...] = (96, 192, 384, 768),
        *,
        in_chans: int = 3,
        mask_ratio: float = 0.6,
        decoder_dim: int = 512,
        decoder_depth: int = 1,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        if not 0.0 < mask_ratio < 1.0:
            raise ValueError(f"FCMAE: mask_ratio must be in (0, 1), got {mask_ratio}")
        self.mask_ratio = mask_ratio
        self.encoder = MaskedEncoder(depths, dims, in_chans, drop_path_rate)
        self.proj = nn.Conv2d(dims[-1], decoder_dim, kernel_size=1)
        self.mask_token = nn.Parameter(torch.empty(1, decoder_dim, 1, 1))
        self.decoder = nn.Sequential(*[Block(decoder_dim) for _ in range(decoder_depth)])
        self.pred = nn.Conv2d(decoder_dim, PATCH**2 * in_chans, kernel_size=1)
        init_weights(self)
        nn.init.normal_(self.mask_token, std=0.02)

    def random_mask(self, images: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """(N, H / 32, W / 32) bool, true where hidden: in every image the same number of patches, any as likely as any other.

        A generator must be on the images' device; None is torch's own.
        """
        N, H, W = images.shape[0], images.shape[2] // PATCH, images.shape[3] // PATCH
        order = torch.rand(N, H * W, device=images.device, generator=generator).argsort(1).argsort(1)
        visible = int(H * W * (1 - self.mask_ratio) + 1e-6)
        return (order >= visible).view(N, H, W)

    def decode(self, features: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Predicted pixels of every patch, (N, H / 32, W / 32, 32 * 32 * in_chans), each patch normalised."""
        x = self.proj(features)
        x = torch.where(mask[:, None], self.mask_token.to(x.dtype), x)
        return self.pred(self.decoder(x)).permute(0, 2, 3, 1)

    def forward(
        self, images: torch.Tensor, mask: torch.Tensor | None = None, generator: torch.Generator | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(loss, pred, mask): the mean squared error over the hidden patches, `decode`'s result, and the mask, drawn if None."""
        if images.shape[-2] % PATCH or images.shape[-1] % PATCH:
            raise ValueError(f"FCMAE: images must have sides that are multiples of {PATCH}, got {tuple(images.shape[-2:])}")
        if mask is None:
            mask = self.random_mask(images, generator)
        pred = self.decode(self.encoder(images, mask), mask)
        error = (pred - self.targets(images)[0]).square().mean(-1)
        return error[mask].mean(), pred, mask

    def targets(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(patches, mean, scale): patches (N, H / 32, W / 32, 32 * 32 * in_chans) with each patch's mean at 0 and variance at 1."""
        patches = patchify(images)
        mean = patches.mean(-1, keepdim=True)
        scale = (patches.var(-1, keepdim=True) + 1e-6).sqrt()
        return (patches - mean) / scale, mean, scale

    def reconstruct(self, images: torch.Tensor, pred: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The images with their hidden patches as predicted, under the mean and variance that those really have."""
        _, mean, scale = self.targets(images)
        return unpatchify(torch.where(mask[..., None], pred * scale + mean, patchify(images)))


def patchify(images: torch.Tensor) -> torch.Tensor:
    """(N, C, H, W) to (N, H / 32, W / 32, 32 * 32 * C), rows first and channels last."""
    N, C, H, W = images.shape
    patches = images.reshape(N, C, H // PATCH, PATCH, W // PATCH, PATCH)
    return patches.permute(0, 2, 4, 3, 5, 1).reshape(N, H // PATCH, W // PATCH, PATCH * PATCH * C)


def unpatchify(patches: torch.Tensor) -> torch.Tensor:
    """The inverse of patchify."""
    N, H, W, _ = patches.shape
    return patches.reshape(N, H, W, PATCH, PATCH, -1).permute(0, 5, 1, 3, 2, 4).reshape(N, -1, H * PATCH, W * PATCH)


def fcmae(size: str = "atto", **kw) -> FCMAE:
    """FCMAE around the ConvNeXt V2 of this size: "atto", "femto", "pico", "nano", "tiny", "base", "large" or "huge"."""
    return FCMAE(*SIZES[size], **kw)

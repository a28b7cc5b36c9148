"""CoAtNet.

Dai, Liu, Le, Tan: CoAtNet: Marrying Convolution and Attention for All Data Sizes, NeurIPS 2021 (arXiv 2106.04803).

Convolution generalises from little data, attention has the capacity for much: vertically stacked, each where it is cheap. A
convolutional stem, two stages of MBConv with squeeze and excitation on the large maps, two stages of Transformer blocks
with relative attention (a learned bias for every relative position, added before the softmax) over whole maps of 14x14 and 7x7.

         channels               blocks          params M   GMACs at 224   top-1 % (ImageNet-1K, 224)
    0    96, 192, 384, 768      2,  3,  5, 2       25.04           4.55   81.6
    1    96, 192, 384, 768      2,  6, 14, 2       42.23           8.64   83.3
    2    128, 256, 512, 1024    2,  6, 14, 2       74.68          16.43   84.1
    3    192, 384, 768, 1536    2,  6, 14, 2      166.97          36.45   84.5
    4    192, 384, 768, 1536    2, 12, 28, 2      275.43          62.32   88.6 (pretrained on ImageNet-21K, at 512)

Module names are timm's, as is what the paper leaves open: heads of 32 channels, stride in the depthwise convolution, a tanh layer
before the classifier.
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


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of an (N, C, H, W) tensor."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


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
        self.pre_norm = nn.BatchNorm2d(dim)
        self.conv1_1x1 = nn.Conv2d(dim, mid, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(mid)
        self.conv2_kxk = nn.Conv2d(mid, mid, 3, stride, padding=1, groups=mid, bias=False)
        self.norm2 = nn.BatchNorm2d(mid)
        self.act = nn.GELU()
        self.se = SEModule(mid, dim_out // 4)
        self.conv3_1x1 = nn.Conv2d(mid, dim_out, 1)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.act(self.norm1(self.conv1_1x1(self.pre_norm(x))))
        y = self.se(self.act(self.norm2(self.conv2_kxk(y))))
        return self.shortcut(x) + self.drop_path(self.conv3_1x1(y))


def relative_position_index(side: int) -> torch.Tensor:
    """(side^2, side^2) int64: for each pair of tokens the row of the bias table, (dy + side - 1)(2 side - 1) + dx + side - 1."""
    coords = torch.cartesian_prod(torch.arange(side), torch.arange(side))
    offsets = coords[:, None] - coords[None] + side - 1
    return offsets[..., 0] * (2 * side - 1) + offsets[..., 1]


class RelPosBias(nn.Module):
    """(heads, side^2, side^2): a learned bias for every relative position."""

    def __init__(self, side: int, num_heads: int):
        super().__init__()
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * side - 1) ** 2, num_heads))
        self.register_buffer("relative_position_index", relative_position_index(side), persistent=False)

    def forward(self) -> torch.Tensor:
        return self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)


class Attention2d(nn.Module):
    """softmax(q k^T / sqrt(32) + bias) v over all places of a (B, dim, side, side) map, projected to dim_out channels."""

    def __init__(self, dim: int, dim_out: int, side: int):
        super().__init__()
        self.num_heads = dim_out // 32
        self.qkv = nn.Conv2d(dim, 3 * dim_out, 1)
        self.rel_pos = RelPosBias(side, self.num_heads)
        self.proj = nn.Conv2d(dim_out, dim_out, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, _, H, W = x.shape
        q, k, v = self.qkv(x).view(B, self.num_heads, -1, H * W).mT.chunk(3, -1)  # each head's q, k, v lie together
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=self.rel_pos()[None])
        return self.proj(x.mT.reshape(B, -1, H, W))


class ConvMlp(nn.Module):
    """fc2(gelu(fc1(x))), as 1x1 convolutions."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Conv2d(dim, hidden, 1)
        self.act = nn.GELU()
        self.fc2 = nn.Conv2d(hidden, dim, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act(self.fc1(x)))


class TransformerBlock2d(nn.Module):
    """shortcut(x) + attention(norm1(x)), then x + mlp(norm2(x)); with stride 2 shortcut and norm1 halve the map."""

    def __init__(self, dim: int, dim_out: int, stride: int, side: int, drop_path: float):
        super().__init__()
        norm = LayerNorm2d(dim, eps=1e-6)
        self.shortcut = Downsample2d(dim, dim_out) if stride == 2 else nn.Identity()
        self.norm1 = nn.Sequential(OrderedDict(norm=norm, down=Downsample2d(dim, dim))) if stride == 2 else norm
        self.attn = Attention2d(dim, dim_out, side)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = LayerNorm2d(dim_out, eps=1e-6)
        self.mlp = ConvMlp(dim_out, 4 * dim_out)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.shortcut(x) + self.drop_path1(self.attn(self.norm1(x)))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class Stem(nn.Module):
    """Two 3x3 convolutions, the first with stride 2."""

    def __init__(self, in_chans: int, dim: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, dim, 3, stride=2, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(dim)
        self.act = nn.GELU()
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1, bias=False)

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
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pre_logits = nn.Sequential(OrderedDict(fc=nn.Linear(dim, dim), act=nn.Tanh()))
        self.fc = nn.Linear(dim, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.pre_logits(self.norm(x.mean((2, 3)))))


class CoAtNet(nn.Module):
    """Stem, two stages of MBConv, two of attention, head.

    Args:
        dims, depths: channels and blocks of each stage; every stage halves the map.
        stem_dim: channels of the stem.
        img_size: side of the images (N, in_chans, img_size, img_size), a multiple of 32.
        num_classes: size of the head.
        drop_path_rate: stochastic depth at the last block.
    """

    def __init__(
        self,
        dims: tuple[int, ...] = (96, 192, 384, 768),
        depths: tuple[int, ...] = (2, 3, 5, 2),
        stem_dim: int = 64,
        *,
        img_size: int = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        if img_size % 32:
            raise ValueError(f"CoAtNet: img_size must be a multiple of 32, got {img_size}")
        self.img_size = img_size
        self.stem = Stem(in_chans, stem_dim)
        rates = iter(drop_path_rate * i / max(sum(depths) - 1, 1) for i in range(sum(depths)))
        stages, dim = [], stem_dim
        for i, (dim_out, depth) in enumerate(zip(dims, depths)):
            blocks = []
            for stride in [2] + [1] * (depth - 1):
                if i < 2:
                    blocks.append(MbConvBlock(dim, dim_out, stride, next(rates)))
                else:
                    blocks.append(TransformerBlock2d(dim, dim_out, stride, img_size // (4 << i), next(rates)))
                dim = dim_out
            stages.append(Stage(blocks))
        self.stages = nn.Sequential(*stages)
        self.head = Head(dim, num_classes)
        for name, parameter in self.named_parameters():
            if name.endswith("bias_table"):
                nn.init.trunc_normal_(parameter, std=0.02)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Images to the last stage's map (N, dims[-1], img_size / 32, img_size / 32)."""
        if x.shape[2:] != (self.img_size, self.img_size):
            raise ValueError(f"CoAtNet: images must be {self.img_size}x{self.img_size} (img_size), got {tuple(x.shape[2:])}")
        return self.stages(self.stem(x))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.forward_features(x))


def coatnet_0_224(**kw) -> CoAtNet:
    return CoAtNet((96, 192, 384, 768), (2, 3, 5, 2), 64, **kw)


def coatnet_1_224(**kw) -> CoAtNet:
    return CoAtNet((96, 192, 384, 768), (2, 6, 14, 2), 64, **kw)


def coatnet_2_224(**kw) -> CoAtNet:
    return CoAtNet((128, 256, 512, 1024), (2, 6, 14, 2), 128, **kw)


def coatnet_3_224(**kw) -> CoAtNet:
    return CoAtNet((192, 384, 768, 1536), (2, 6, 14, 2), 192, **kw)


def coatnet_4_224(**kw) -> CoAtNet:
    return CoAtNet((192, 384, 768, 1536), (2, 12, 28, 2), 192, **kw)

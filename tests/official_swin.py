"""Swin and Swin V2 as people have them in their own code: the structure of the official classification code, on tokens of a map
of one size, written by a user who knows nothing of fastconv."""

import math

import torch
import torch.nn.functional as F
from official_convnext import SkipImages
from torch import nn


def cut(x, size):
    """(B, H, W, C) to (B * windows, size, size, C)."""
    B, H, W, C = x.shape
    return x.view(B, H // size, size, W // size, size, C).transpose(2, 3).reshape(-1, size, size, C)


def join(windows, size, H, W):
    x = windows.view(-1, H // size, W // size, size, size, windows.shape[-1])
    return x.transpose(2, 3).reshape(-1, H, W, windows.shape[-1])


def positions(size):
    at = torch.stack(torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")).flatten(1)
    apart = at[:, :, None] - at[:, None, :] + size - 1
    return apart[0] * (2 * size - 1) + apart[1]


class Attention(nn.Module):
    def __init__(self, dim, size, heads, attn_drop=0.0, proj_drop=0.0):
        super().__init__()
        self.window_size, self.num_heads, self.scale = (size, size), heads, (dim // heads) ** -0.5
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * size - 1) ** 2, heads))
        self.register_buffer("relative_position_index", positions(size))
        self.qkv = nn.Linear(dim, 3 * dim)
        self.attn_drop, self.proj_drop = nn.Dropout(attn_drop), nn.Dropout(proj_drop)
        self.proj = nn.Linear(dim, dim)
        self.softmax = nn.Softmax(dim=-1)

    def logits(self, x):
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        bias = self.relative_position_bias_table[self.relative_position_index.view(-1)].view(x.shape[1], x.shape[1], -1)
        return (q * self.scale) @ k.transpose(-2, -1) + bias.permute(2, 0, 1), v

    def forward(self, x, mask=None):
        B, N, C = x.shape
        logits, v = self.logits(x)
        if mask is not None:
            logits = (logits.view(-1, len(mask), self.num_heads, N, N) + mask[None, :, None]).view(B, self.num_heads, N, N)
        x = (self.attn_drop(self.softmax(logits)) @ v).transpose(1, 2).reshape(B, N, C)
        return self.proj_drop(self.proj(x))


class CosineAttention(Attention):
    def __init__(self, dim, size, heads, **drops):
        super().__init__(dim, size, heads, **drops)
        del self.relative_position_bias_table, self.scale
        self.logit_scale = nn.Parameter(torch.full((heads, 1, 1), math.log(10)))
        self.cpb_mlp = nn.Sequential(nn.Linear(2, 16), nn.ReLU(inplace=True), nn.Linear(16, heads, bias=False))
        apart = torch.arange(1 - size, size) * (8 / (size - 1))
        apart = torch.sign(apart) * torch.log2(apart.abs() + 1) / 3
        self.register_buffer("relative_coords_table", torch.stack(torch.meshgrid(apart, apart, indexing="ij"), -1)[None])
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))

    def logits(self, x):
        bias = torch.cat((self.q_bias, torch.zeros_like(self.v_bias, requires_grad=False), self.v_bias))
        q, k, v = F.linear(x, self.qkv.weight, bias).reshape(*x.shape[:2], 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        logits = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        logits = logits * torch.clamp(self.logit_scale, max=math.log(100.0)).exp()
        table = self.cpb_mlp(self.relative_coords_table).view(-1, self.num_heads)
        bias = table[self.relative_position_index.view(-1)].view(x.shape[1], x.shape[1], -1).permute(2, 0, 1)
        return logits + 16 * torch.sigmoid(bias), v


class Mlp(nn.Module):
    """Its parts have other names than the official ones: what patch makes of those is tested elsewhere."""

    def __init__(self, dim):
        super().__init__()
        self.widen, self.narrow = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x):
        return self.narrow(F.gelu(self.widen(x)))


class Block(nn.Module):
    """x + attention(norm1(x)), then x + mlp(norm2(x)), on tokens (B, H * W, C)."""

    attention = Attention

    def __init__(self, dim, input_resolution, num_heads, window_size, shift_size=0, drop_path=0.0, **drops):
        super().__init__()
        self.input_resolution = input_resolution
        if min(input_resolution) <= window_size:
            window_size, shift_size = min(input_resolution), 0
        self.window_size, self.shift_size = window_size, shift_size
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = self.attention(dim, window_size, num_heads, **drops)
        self.drop_path = SkipImages(drop_path) if drop_path else nn.Identity()
        self.mlp = Mlp(dim)
        self.register_buffer("attn_mask", self.mask() if shift_size else None)

    def mask(self):
        H, W = self.input_resolution
        regions, count = torch.zeros(1, H, W, 1), 0
        edges = [slice(0, -self.window_size), slice(-self.window_size, -self.shift_size), slice(-self.shift_size, None)]
        for rows in edges:
            for columns in edges:
                regions[:, rows, columns] = count
                count += 1
        regions = cut(regions, self.window_size).flatten(1)
        return (regions[:, None] != regions[:, :, None]) * -100.0

    def attend(self, x):
        (H, W), s = self.input_resolution, self.shift_size
        B, L, C = x.shape
        assert L == H * W, "input feature has wrong size"
        x = x.view(B, H, W, C)
        if s > 0:
            x = torch.roll(x, shifts=(-s, -s), dims=(1, 2))
        x = self.attn(cut(x, self.window_size).flatten(1, 2), mask=self.attn_mask)
        x = join(x, self.window_size, H, W)
        if s > 0:
            x = torch.roll(x, shifts=(s, s), dims=(1, 2))
        return x.view(B, L, C)

    def forward(self, x):
        x = x + self.drop_path(self.attend(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class BlockV2(Block):
    """x + norm1(attention(x)), then x + norm2(mlp(x))."""

    attention = CosineAttention

    def forward(self, x):
        x = x + self.drop_path(self.norm1(self.attend(x)))
        return x + self.drop_path(self.norm2(self.mlp(x)))


class Network(nn.Module):
    """Two stages on images of one size, a multiple of eight times the window."""

    def __init__(self, image=(64, 48), dim=32, heads=2, window=2, drop_path=0.0, block=Block):
        super().__init__()
        self.embed = nn.Conv2d(3, dim, 4, 4)
        self.merge = nn.Linear(4 * dim, 2 * dim)
        size = image[0] // 4, image[1] // 4
        half = size[0] // 2, size[1] // 2
        self.high = nn.ModuleList(block(dim, size, heads, window, s, drop_path) for s in (0, window // 2))
        self.low = nn.ModuleList([block(2 * dim, half, 2 * heads, window, window // 2, drop_path)])
        self.size = size

    def forward(self, x):
        x = self.embed(x).flatten(2).transpose(1, 2)
        for block in self.high:
            x = block(x)
        B, _, C = x.shape
        x = self.merge(x.view(B, self.size[0] // 2, 2, self.size[1] // 2, 2, C).permute(0, 1, 3, 2, 4, 5).flatten(3)).flatten(1, 2)
        for block in self.low:
            x = block(x)
        return x

"""FractalNet.

Larsson, Maire, Shakhnarovich: FractalNet: Ultra-Deep Neural Networks without Residuals, ICLR 2017 (arXiv 1605.07648).

Great depth without residual connections, from paths of many lengths: f_1(z) = conv(z), f_{C+1}(z) = mean(f_C(f_C(z)), conv(z)), so that
a block of C columns has a path of one convolution beside one of 2^(C-1). In training drop-path leaves out sub-paths, either at each join
on its own (local) or all but one column of the whole network (global); the full network is used in the end, and its deepest column alone is
nearly as good.

                     blocks, columns    params M   GMACs at 32    error % (CIFAR-10, CIFAR-100, both augmented)
    fractalnet20     5, 3                  33.72        0.845      4.60, 23.73 (with drop-path and dropout)

The paper states 38.6 M parameters; the blocks that it describes (columns of 1, 2 and 4 convolutions, 64 to 512 channels) have those of
the table, as they have in other implementations.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn


def drop_local(inputs: int, drop_prob: float) -> list[int]:
    """Which inputs of a join remain: each is dropped with `drop_prob`, at least one stays."""
    draws = torch.rand(inputs, device="cpu").tolist()
    return [i for i, draw in enumerate(draws) if draw >= drop_prob] or [draws.index(max(draws))]


class ConvBlock(nn.Module):
    """3x3 convolution without bias, dropout, BatchNorm, ReLU."""

    def __init__(self, in_chans: int, out_chans: int, drop_rate: float):
        super().__init__()
        self.conv = nn.Conv2d(in_chans, out_chans, kernel_size=3, padding=1, bias=False)
        self.dropout = nn.Dropout(drop_rate)
        self.bn = nn.BatchNorm2d(out_chans)
        nn.init.kaiming_normal_(self.conv.weight, nonlinearity="relu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn(self.dropout(self.conv(x))), inplace=True)


class FractalBlock(nn.Module):
    """f_C: column c has 2^c convolutions. Of the 2^(C-1) steps that the longest takes, column c ends one of its own at every 2^(C-1-c)-th,
    where it is joined with all others that end there: the mean is their result, and the input of their next convolution.
    """

    def __init__(self, in_chans: int, out_chans: int, columns: int, drop_rate: float, drop_path: float):
        super().__init__()
        self.drop_path = drop_path
        self.columns = nn.ModuleList(
            nn.ModuleList(ConvBlock(out_chans if i else in_chans, out_chans, drop_rate) for i in range(2**c)) for c in range(columns)
        )

    def forward(self, x: torch.Tensor, column: int | None = None) -> torch.Tensor:
        """Of all columns with their joins, or of `column` alone."""
        if column is not None:
            for conv in self.columns[column]:
                x = conv(x)
            return x
        columns = len(self.columns)
        steps = 2 ** (columns - 1)
        inputs = [x] * columns
        drop_path = self.drop_path if self.training else 0.0
        for step in range(1, steps + 1):
            ending = [c for c in range(columns) if step * 2**c % steps == 0]
            kept = [ending[i] for i in drop_local(len(ending), drop_path)] if drop_path > 0 else ending
            joined = sum(self.columns[c][step * 2**c // steps - 1](inputs[c]) for c in kept) / len(kept)
            for c in ending:
                inputs[c] = joined
        return joined


class FractalNet(nn.Module):
    """Fractal blocks, each followed by 2x2 max pooling, and a linear head on the map's mean.

    Args:
        widths: channels of each block.
        columns: columns of each block; the network has len(widths) * 2^(columns - 1) convolutions in its longest path.
        in_chans: channels of the images, (N, in_chans, H, W) with H and W of 2^len(widths) at least.
        num_classes: size of the head.
        drop_path: probability that local drop-path leaves out an input of a join.
        global_ratio: part of the training passes that keep one column of the whole network, drawn anew each time, instead of
            sampling joins; only with drop_path > 0.
        drop_rates: dropout in the convolutions of each block, 0 by default; 0, 0.1, 0.2, 0.3, 0.4 in the paper.
    """

    def __init__(
        self,
        widths: tuple[int, ...] = (64, 128, 256, 512, 512),
        columns: int = 3,
        *,
        in_chans: int = 3,
        num_classes: int = 10,
        drop_path: float = 0.0,
        global_ratio: float = 0.5,
        drop_rates: Sequence[float] | None = None,
    ):
        super().__init__()
        if not 0.0 <= drop_path < 1.0:
            raise ValueError(f"FractalNet: drop_path must be in [0, 1), got {drop_path}")
        self.drop_path, self.global_ratio = drop_path, global_ratio
        ins, rates = (in_chans, *widths[:-1]), drop_rates or [0.0] * len(widths)
        self.blocks = nn.ModuleList(FractalBlock(i, o, columns, rate, drop_path) for i, o, rate in zip(ins, widths, rates, strict=True))
        self.fc = nn.Linear(widths[-1], num_classes)

    def forward(self, x: torch.Tensor, column: int | None = None) -> torch.Tensor:
        """Images to logits (N, num_classes), by the whole network or by one of its columns alone (from 0, the shallowest)."""
        if column is None and self.training and self.drop_path > 0 and torch.rand((), device="cpu").item() < self.global_ratio:
            column = torch.randint(len(self.blocks[0].columns), (), device="cpu").item()
        for block in self.blocks:
            x = F.max_pool2d(block(x, column), 2)
        return self.fc(x.mean((-2, -1)))


def fractalnet20(**kw) -> FractalNet:
    return FractalNet(**kw)

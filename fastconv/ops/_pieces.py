"""A long map, piece by piece of its rows."""

from __future__ import annotations

import torch

from ._linear import UP_TO_ZEN4

# On a CPU a long x goes through in pieces of about so many elements, which stay in the caches from pass to pass: fresh memory
# for a map of its size costs more than the passes over it. With fewer rows at a time, torch's products are slower. Where they
# have no more lanes than MKL's, the caches' share is less: a training step of timm's swin_tiny gains 2% with the larger pieces,
# one of convnext_tiny 1%, inference nothing, and without pieces inference loses 5% and 15% (Zen 4, 2 threads, 2026-11-29).
ELEMENTS = 2**22 if UP_TO_ZEN4 else 2**20
ROWS = 2048
BLOCK = 64  # rows: oneDNN's gradients of weights are three times slower at many an odd number of them


def pieces_of(rows: int, channels: int, device: torch.device, dtype: torch.dtype) -> list[slice]:
    """Of the rows of what gelu_linear's GELU takes; one, unless sums of dweight over pieces are as exact as over all."""
    if device.type != "cpu" or dtype not in (torch.float32, torch.float64):
        return [slice(0, rows)]
    blocks = -(-rows // BLOCK)
    count = max(1, rows // max(ROWS, ELEMENTS // max(channels, 1)))
    return [slice(blocks * i // count * BLOCK, min(rows, blocks * (i + 1) // count * BLOCK)) for i in range(count)]


def rows_of(x: torch.Tensor) -> torch.Tensor:
    return x.view(x.shape[:-1].numel(), x.shape[-1])

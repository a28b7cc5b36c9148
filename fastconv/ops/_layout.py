"""Maps in either memory layout, without a copy: the kernels of some ops take channels last and channels first alike."""

from __future__ import annotations

import torch


def _turned(x: torch.Tensor, from_nhwc: bool) -> torch.Tensor:
    return x.permute(0, 3, 1, 2) if from_nhwc else x.permute(0, 2, 3, 1)


def in_memory_order(x: torch.Tensor, data_format: str) -> tuple[torch.Tensor, bool]:
    """x as contiguous (N, H, W, C) or (N, C, H, W), whichever it is dense in; and whether that is channels last."""
    nhwc = data_format == "NHWC"
    if not x.is_contiguous():
        other = _turned(x, nhwc)
        if other.is_contiguous():
            return other, not nhwc
    return x.contiguous(), nhwc


def in_layout(x: torch.Tensor, data_format: str, channels_last: bool) -> torch.Tensor:
    """x contiguous in the layout asked for."""
    nhwc = data_format == "NHWC"
    return (x if channels_last == nhwc else _turned(x, nhwc)).contiguous()


def in_format(y: torch.Tensor, data_format: str, channels_last: bool) -> torch.Tensor:
    """What in_memory_order and in_layout gave, as data_format again."""
    return y if channels_last == (data_format == "NHWC") else _turned(y, channels_last)


def in_nchw(x: torch.Tensor, data_format: str, channels_last: bool) -> torch.Tensor:
    """x as (N, C, H, W), dense in the layout asked for. Raw ops take a map that backward reads like this, and no view of it, which
    torch.compile would keep in its place, and beside it what else backward needs of the same values: between convolutions Inductor
    stores anything of four axes as channels_last, (N, H, W, C) too, and transposes it back."""
    x = x if data_format == "NCHW" else x.permute(0, 3, 1, 2)
    return x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)

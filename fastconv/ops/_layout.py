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


# A map that backward reads, with its channels joined to the axis beside them. torch.compile keeps it in that form from forward to
# backward; of four axes Inductor would take it for (N, C, H, W), store it as channels_last, and transpose it back.
def joined(x: torch.Tensor, channels_last: bool) -> torch.Tensor:
    """x as (N, H, W C), or (N, C H, W)."""
    return x.flatten(2) if channels_last else x.flatten(1, 2)


def split(x: torch.Tensor, C: int, channels_last: bool) -> torch.Tensor:
    """What `joined` was given."""
    return x.unflatten(2, (x.shape[2] // C, C)) if channels_last else x.unflatten(1, (C, x.shape[1] // C))

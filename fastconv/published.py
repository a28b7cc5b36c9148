"""The comparison table of the ConvNeXt paper (Liu et al. 2022, tables 1, 2 and 9), counted again from the bundled models.

Only R-101x3 and R-152x4 are missing: BiT's networks, which the bundle does not hold.
"""

from __future__ import annotations

from fnmatch import fnmatch
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from .models import MODELS


class Row(NamedTuple):
    """A row as published: parameters in millions, and FLOPs in billions of multiply-adds an image, as the paper counts them."""

    title: str
    name: str  # of the bundled model
    size: int  # side of the image in pixels
    params: float
    gmacs: float
    img_size: int | None = None  # options of the model: what an image of that size needs
    window_size: int | None = None
    note: str = ""  # where the published figure is not the count, rounded


TABLE = (
    Row("ResNet-50", "resnet50", 224, 25.6, 4.1),
    Row("RegNetY-16G", "regnety_160", 224, 84, 16.0, note="15.9 in its own paper"),
    Row("EffNet-B7", "efficientnet_b7", 600, 66, 37.0, note="as its own paper counts"),
    Row("EffNetV2-L", "efficientnetv2_l", 480, 120, 53.0, note="as its own paper counts"),
    Row("EffNetV2-XL", "efficientnetv2_xl", 480, 208, 94.0, note="93.4 at 512, the size of its own paper"),
    Row("DeiT-S", "vit_small_patch16_224", 224, 22, 4.6),
    Row("DeiT-B", "vit_base_patch16_224", 224, 87, 17.6),
    Row("ViT-L/16", "vit_large_patch16_224", 224, 304, 61.6),
    Row("ViT-B/16", "vit_base_patch16_224", 384, 87, 55.5, 384),
    Row("ViT-L/16", "vit_large_patch16_224", 384, 305, 191.1, 384),
    Row("Swin-T", "swin_tiny_patch4_window7_224", 224, 28, 4.5),
    Row("Swin-S", "swin_small_patch4_window7_224", 224, 50, 8.7),
    Row("Swin-B", "swin_base_patch4_window7_224", 224, 88, 15.4),
    Row("Swin-B", "swin_base_patch4_window7_224", 384, 88, 47.1, 384, 12),
    Row("Swin-L", "swin_large_patch4_window7_224", 224, 197, 34.5),
    Row("Swin-L", "swin_large_patch4_window7_224", 384, 197, 103.9, 384, 12),
    Row("ConvNeXt-T", "convnext_tiny", 224, 29, 4.5),
    Row("ConvNeXt-T", "convnext_tiny", 384, 29, 13.1),
    Row("ConvNeXt-S", "convnext_small", 224, 50, 8.7),
    Row("ConvNeXt-S", "convnext_small", 384, 50, 25.5),
    Row("ConvNeXt-B", "convnext_base", 224, 89, 15.4),
    Row("ConvNeXt-B", "convnext_base", 384, 89, 45.0, note="45.1 where it is pretrained on ImageNet-22K"),
    Row("ConvNeXt-L", "convnext_large", 224, 198, 34.4),
    Row("ConvNeXt-L", "convnext_large", 384, 198, 101.0),
    Row("ConvNeXt-XL", "convnext_xlarge", 224, 350, 60.9),
    Row("ConvNeXt-XL", "convnext_xlarge", 384, 350, 179.0),
    Row("ConvNeXt-S (iso.)", "convnext_isotropic_small", 224, 22, 4.3),
    Row("ConvNeXt-B (iso.)", "convnext_isotropic_base", 224, 87, 16.9),
    Row("ConvNeXt-L (iso.)", "convnext_isotropic_large", 224, 306, 59.7),
)


def count(row: Row) -> tuple[float, float]:
    """Parameters (millions) and multiply-adds an image (billions) of the bundled model; nothing is computed."""
    with torch.device("meta"):
        model = MODELS[row.name].build(**{n: v for n in ("img_size", "window_size") if (v := getattr(row, n))}).eval()
    with torch.inference_mode(), FlopCounterMode(display=False) as counter, torch.device("meta"):
        model(torch.empty(1, 3, row.size, row.size))
    return sum(p.numel() for p in model.parameters()) / 1e6, counter.get_total_flops() / 2e9


def show(pattern: str) -> None:
    """Print the rows whose bundled models match."""
    columns = f"{'params M: published':>19} {'counted':>8}  {'GMACs: published':>16} {'counted':>8}"
    print(f"{'model':<18} {'image':>5}  {columns}  bundled as")
    for row in (row for row in TABLE if fnmatch(row.name, pattern)):
        params, gmacs = count(row)
        bundled = f"{row.name}; {row.note}" if row.note else row.name
        print(f"{row.title:<18} {row.size:5}  {row.params:19g} {params:8.2f}  {row.gmacs:16.1f} {gmacs:8.2f}  {bundled}")

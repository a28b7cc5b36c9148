"""Bundled architectures in plain PyTorch, and what is published about each."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import nn

from . import convnext


class Spec(NamedTuple):
    """One bundled model: its constructor, parameters (millions), GMACs an image at `resolution`, and the ops it gains from."""

    build: Callable[..., nn.Module]
    family: str
    params: float
    gmacs: float
    resolution: int
    ops: tuple[str, ...]


_CONVNEXT_OPS = ("depthwise_conv_norm", "residual_scale")
_UNSCALED_OPS = ("depthwise_conv_norm",)  # without layer scale a block's tail is a plain sum

MODELS: dict[str, Spec] = {
    "convnext_tiny": Spec(convnext.convnext_tiny, "ConvNeXt", 28.59, 4.46, 224, _CONVNEXT_OPS),
    "convnext_small": Spec(convnext.convnext_small, "ConvNeXt", 50.22, 8.68, 224, _CONVNEXT_OPS),
    "convnext_base": Spec(convnext.convnext_base, "ConvNeXt", 88.59, 15.35, 224, _CONVNEXT_OPS),
    "convnext_large": Spec(convnext.convnext_large, "ConvNeXt", 197.77, 34.36, 224, _CONVNEXT_OPS),
    "convnext_xlarge": Spec(convnext.convnext_xlarge, "ConvNeXt", 350.20, 60.92, 224, _CONVNEXT_OPS),
    "convnext_isotropic_small": Spec(convnext.convnext_isotropic_small, "ConvNeXt isotropic", 22.31, 4.29, 224, _UNSCALED_OPS),
    "convnext_isotropic_base": Spec(convnext.convnext_isotropic_base, "ConvNeXt isotropic", 87.08, 16.90, 224, _UNSCALED_OPS),
    "convnext_isotropic_large": Spec(convnext.convnext_isotropic_large, "ConvNeXt isotropic", 305.94, 59.70, 224, _CONVNEXT_OPS),
}

"""Bundled architectures in plain PyTorch, one file a family, and what is published about each."""

from __future__ import annotations

import importlib
from typing import NamedTuple

from torch import nn


class Spec(NamedTuple):
    """One bundled model: the function `name` in the file `module`, parameters (millions), GMACs an image at `resolution`, and
    the ops that it gains from."""

    name: str
    module: str
    family: str
    params: float
    gmacs: float
    resolution: int
    ops: tuple[str, ...]

    def build(self, **kw) -> nn.Module:
        """The model with random weights. Its file is imported here: `import fastconv` loads no architecture."""
        return getattr(importlib.import_module(f".{self.module}", __name__), self.name)(**kw)


MODELS: dict[str, Spec] = {}


def _family(module: str, family: str, ops: tuple[str, ...], **models: tuple[float, float, int]) -> None:
    """Add models of one file: name=(parameters in millions, GMACs, resolution)."""
    MODELS.update({name: Spec(name, module, family, *published, ops) for name, published in models.items()})


_CONVNEXT = ("depthwise_conv_norm", "residual_scale", "gelu_linear")
_UNSCALED = ("depthwise_conv_norm", "gelu_linear")  # without layer scale a block's tail is a plain sum
_family(
    "convnext",
    "ConvNeXt",
    _CONVNEXT,
    convnext_tiny=(28.59, 4.46, 224),
    convnext_small=(50.22, 8.68, 224),
    convnext_base=(88.59, 15.35, 224),
    convnext_large=(197.77, 34.36, 224),
    convnext_xlarge=(350.20, 60.92, 224),
)
_family(
    "convnext",
    "ConvNeXt isotropic",
    _UNSCALED,
    convnext_isotropic_small=(22.31, 4.29, 224),
    convnext_isotropic_base=(87.08, 16.90, 224),
)
_family("convnext", "ConvNeXt isotropic", _CONVNEXT, convnext_isotropic_large=(305.94, 59.70, 224))
_family(
    "convnextv2",
    "ConvNeXt V2",
    ("depthwise_conv_norm", "global_response_norm"),
    convnextv2_atto=(3.71, 0.55, 224),
    convnextv2_femto=(5.23, 0.78, 224),
    convnextv2_pico=(9.07, 1.37, 224),
    convnextv2_nano=(15.62, 2.45, 224),
    convnextv2_tiny=(28.64, 4.46, 224),
    convnextv2_base=(88.72, 15.35, 224),
    convnextv2_large=(197.96, 34.36, 224),
    convnextv2_huge=(660.29, 114.92, 224),
)

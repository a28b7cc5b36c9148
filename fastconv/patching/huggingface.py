"""Blocks of Hugging Face transformers."""

from ._block import BlockRule

RULES = (
    BlockRule("transformers.models.convnext.modeling_convnext", ("ConvNextLayer",)),
    BlockRule("transformers.models.convnextv2.modeling_convnextv2", ("ConvNextV2Layer",)),
    BlockRule("transformers.models.dinov3_convnext.modeling_dinov3_convnext", ("DINOv3ConvNextLayer",)),
)

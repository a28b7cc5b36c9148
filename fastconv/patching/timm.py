"""Blocks of timm."""

from ._block import BlockRule

RULES = (
    BlockRule("timm.models.convnext", ("ConvNeXtBlock",)),
    BlockRule("timm.models.edgenext", ("ConvBlock",)),
    BlockRule("timm.models.maxxvit", ("ConvNeXtBlock",)),
    BlockRule("timm.models.rdnet", ("Block", "BlockESE")),
    BlockRule("timm.models.csatv2", ("Block",)),
)

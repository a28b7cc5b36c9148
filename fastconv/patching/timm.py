"""Blocks of timm."""

from ._block import BlockRule

_LATER = "rule not written yet"

RULES = (
    BlockRule("timm.models.convnext", ("ConvNeXtBlock",)),
    BlockRule("timm.models.edgenext", ("ConvBlock",)),
    BlockRule("timm.models.maxxvit", ("ConvNeXtBlock",), unsupported=f"{_LATER}: maxxvit.ConvNeXtBlock"),
    BlockRule("timm.models.rdnet", ("Block", "BlockESE"), unsupported=f"{_LATER}: rdnet.Block"),
    BlockRule("timm.models.csatv2", ("Block",), unsupported=f"{_LATER}: csatv2.Block"),
)

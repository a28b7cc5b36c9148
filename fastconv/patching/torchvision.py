"""Blocks of torchvision. CNBlock holds convolution, norm and MLP in one Sequential, with permutations as modules."""

from ._block import BlockRule

RULES = (
    BlockRule(
        "torchvision.models.convnext",
        ("CNBlock",),
        drop_paths=("stochastic_depth",),
        inline=("block", "block.1", "block.6"),
        in_place=True,
    ),
)

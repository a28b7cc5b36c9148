"""Blocks with the structure of the official ConvNeXt and ConvNeXt V2 code, which is mostly met as a copy in user code, and
which the bundled models have too. They are found by the names of their parts; what they compute is read from forward."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ._block import BlockRule

_PARTS = ("dwconv", "norm", "pwconv1", "act", "pwconv2")


@dataclass(frozen=True)
class OfficialRule(BlockRule):
    def matches(self, module: nn.Module) -> bool:
        return all(name in module._modules for name in _PARTS) and isinstance(module.dwconv, nn.Conv2d)


RULES = (OfficialRule("", ()),)

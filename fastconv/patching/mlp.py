"""MLPs of transformers, wherever a model has them, on maps or on tokens: GELU and the linear layer after it as one op.

They are found by the names of their parts, which timm, the official Swin and the bundled models share, or by torchvision's
class; what they compute is read from forward. The MLPs inside ConvNeXt blocks are those blocks' part.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ..ops import is_disabled
from ._block import _exporting
from ._body import GELU_LINEAR, GRN, Body, chain, read_body
from ._graph import Unsupported
from ._module import PLAIN, FastModule
from ._rule import Rule
from ._run_body import active_fusions, may_reroute, run_body

_PARTS = ("fc1", "act", "fc2")


@dataclass(frozen=True)
class MlpRule(Rule):
    """Chains of children with a GELU before a linear layer."""

    ops = (GELU_LINEAR,)
    inside_blocks = False

    def matches(self, module: nn.Module) -> bool:
        fc1, _, fc2 = (module._modules.get(name) for name in _PARTS)
        linear = "act" in module._modules and isinstance(fc1, nn.Linear) and isinstance(fc2, nn.Linear)
        if linear and fc1.out_features == fc2.in_features:  # a gated MLP's is twice as wide
            return True
        return bool(self.classes) and super().matches(module)

    @property
    def mixin(self) -> type:
        return FastMlp

    def read(self, module: nn.Module) -> tuple[Body, dict[str, tuple[str, str]]]:
        steps = chain(module)
        if steps is None:
            raise Unsupported("its forward does more than call its layers one after another")
        body, sites = read_body(module, steps, ())
        if not sites.keys() & {GELU_LINEAR, GRN}:
            raise Unsupported("it has no GELU before a linear layer")
        return body, sites


RULES = (MlpRule("torchvision.ops.misc", ("MLP",)),)


class FastMlp(FastModule):
    """The layers as they are, but for those that an op replaces in this call."""

    def forward(self, *args, **kwargs):
        if is_disabled() or torch.jit.is_tracing() or _exporting():
            return super().forward(*args, **kwargs)
        body = self._fastconv.layout
        x = args[0] if len(args) == 1 and not kwargs else None
        reason = _input_reason(x)
        fusions = active_fusions(self, body, reason, x)
        reroute = not reason and may_reroute(self, body)
        if not (fusions or reroute):
            return super().forward(*args, **kwargs)
        return run_body(self, body, x, fusions=fusions, reroute=reroute)


def _input_reason(x) -> str:
    if x is None:
        return "called with other arguments than one tensor"
    return "" if type(x) in PLAIN else f"the input is a {type(x).__name__}"

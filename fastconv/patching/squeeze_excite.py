"""Squeeze-and-excitation modules of every library: which classes, what they compute, and the fused forward."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ..ops import is_disabled, squeeze_excite
from ..ops.squeeze_excite import fused
from ._block import _exporting, _input_reason
from ._graph import MUL, Unsupported, is_call, trace
from ._module import FastModule, Kinds, backend_of, bypass_reason, child_at, unwrapped
from ._rule import Rule
from ._run_body import autocast_dtype, parameter_reason

OP = "squeeze_excite"
_ACTIVATIONS = "torch.nn.modules.activation"
_TIMM = "timm.layers.activations"
# Where a class is defined, its name: what the op calls it.
ACTS = {
    (_ACTIVATIONS, "ReLU"): "relu",
    (_ACTIVATIONS, "SiLU"): "silu",
    (_TIMM, "Swish"): "silu",
    (_ACTIVATIONS, "GELU"): "gelu",
    (_TIMM, "GELU"): "gelu",
    (_ACTIVATIONS, "Hardswish"): "hardswish",
    (_TIMM, "HardSwish"): "hardswish",
    (_ACTIVATIONS, "LeakyReLU"): "leaky_relu",
}
GATES = {
    (_ACTIVATIONS, "Sigmoid"): "sigmoid",
    (_TIMM, "Sigmoid"): "sigmoid",
    (_ACTIVATIONS, "Hardsigmoid"): "hardsigmoid",
    (_TIMM, "HardSigmoid"): "hardsigmoid",
}


@dataclass(frozen=True)
class GateLayout:
    """Where the parts of a gate are: paths of the layers, fc2 "" where there is one; and the op's names of the functions."""

    fc1: str
    fc2: str
    act: str
    gate: str
    kinds: Kinds  # children whose calls the fused op replaces


@dataclass(frozen=True)
class GateRule(Rule):
    """Classes of squeeze-and-excitation modules."""

    inline: tuple[str, ...] = ()  # containers to read through

    ops = (OP,)

    @property
    def mixin(self) -> type:
        return FastGate

    def read(self, module: nn.Module) -> tuple[GateLayout, dict[str, tuple[str, str]]]:
        return _read(module, self.inline), {OP: ("fused", "")}


_BUNDLED = ("coatnet", "efficientnet", "maxvit", "mobilenet", "nfnet", "regnet", "resnet", "resnet_rs", "senet")
RULES = (
    *(GateRule(f"fastconv.models.{family}", ("SEModule", "SqueezeExcite")) for family in _BUNDLED),
    GateRule("timm.layers.squeeze_excite", ("SEModule", "EffectiveSEModule")),
    GateRule("timm.models._efficientnet_blocks", ("SqueezeExcite",)),
    GateRule("timm.models.senet", ("SEModule",)),
    GateRule("timm.models.hgnet", ("EseModule",)),
    GateRule("torchvision.ops.misc", ("SqueezeExcitation",)),
    GateRule("transformers.models.regnet.modeling_regnet", ("RegNetSELayer",), inline=("attention",)),
    GateRule("transformers.models.efficientnet.modeling_efficientnet", ("EfficientNetSqueezeExciteLayer",)),
)


def _read(module: nn.Module, inline: tuple[str, ...]) -> GateLayout:
    """x * gate([fc2(act(] fc1(mean(x)) [))]), with any Identity between."""
    x, result = trace(module, inline)
    factors = result.args if is_call(result, MUL) else ()
    if len(factors) != 2 or x not in factors:
        raise Unsupported("its result is not its input times a gate")
    node = factors[1] if factors[0] is x else factors[0]
    paths: list[str] = []
    while getattr(node, "op", "") == "call_module" and not isinstance(child_at(module, node.target), nn.AdaptiveAvgPool2d):
        paths.insert(0, node.target)
        node = node.args[0] if len(node.args) == 1 and not node.kwargs else None
    pool = _pool(module, node, x)
    computed = sum(n.op not in ("placeholder", "output", "get_attr") for n in result.graph.nodes)
    if computed != len(paths) + 2:  # and the pool and the product
        raise Unsupported("its forward computes more than a gate from the means of its input")
    kinds = [(path, unwrapped(type(child_at(module, path)))) for path in (*inline, *pool, *paths)]
    parts = [path for path in paths if type(child_at(module, path)) is not nn.Identity]
    for path in parts[1:-1] if len(parts) not in (2, 4) else ():
        if not isinstance(child_at(module, path), nn.Conv2d) and _name(ACTS, child_at(module, path)) is None:
            raise Unsupported(f"{path} is a {type(child_at(module, path)).__name__}, between its layers")
    if len(parts) not in (2, 4):
        raise Unsupported(f"it has {len(parts)} parts, not one layer and a gate, or two with an activation between")
    gate = _function(GATES, module, parts[-1], "gate")
    act = "identity" if len(parts) == 2 else _function(ACTS, module, parts[1], "activation")
    fc1, fc2 = parts[0], parts[2] if len(parts) == 4 else ""
    channels = _layer(module, fc1)
    if _layer(module, fc2 or fc1) != channels[::-1]:
        raise Unsupported("its gate has not one value for each channel")
    return GateLayout(fc1, fc2, act, gate, tuple(kinds))


def _pool(module: nn.Module, node, x) -> tuple[str, ...]:
    """The path of the module that takes the means, () where a method does."""
    op, target, args = (getattr(node, name, None) for name in ("op", "target", "args"))
    if op == "call_module" and args == (x,) and child_at(module, target).output_size in (1, (1, 1)):
        return (target,)
    if (op, target) == ("call_method", "mean") and args in ((x, (2, 3)), (x, [2, 3])) and node.kwargs == {"keepdim": True}:
        return ()
    raise Unsupported("what it squeezes is not the mean over the map")


def _layer(module: nn.Module, path: str) -> tuple[int, int]:
    """Channels in and out of a 1x1 convolution."""
    conv = child_at(module, path)
    if unwrapped(type(conv)) is not nn.Conv2d:
        raise Unsupported(f"{path} is a {type(conv).__name__}, not a Conv2d")
    if conv.kernel_size != (1, 1) or conv.stride != (1, 1) or conv.padding not in ((0, 0), "same", "valid") or conv.groups != 1:
        raise Unsupported(f"{path} is not a plain 1x1 convolution")
    return conv.in_channels, conv.out_channels


def _name(known: dict, function: nn.Module) -> str | None:
    kind = type(function)
    exact = getattr(function, "approximate", "none") == "none" and getattr(function, "negative_slope", 0.01) == 0.01
    return known.get((kind.__module__, kind.__qualname__)) if exact else None


def _function(known: dict, module: nn.Module, path: str, role: str) -> str:
    name = _name(known, child_at(module, path))
    if name is None:
        raise Unsupported(f"its {role} is {child_at(module, path)}")
    return name


class FastGate(FastModule):
    """The whole module as one op. Parameters are read at each call, in the order in which the original reads them."""

    def forward(self, *args, **kwargs):
        if is_disabled() or torch.jit.is_tracing() or _exporting():
            return super().forward(*args, **kwargs)
        layout = self._fastconv.layout
        x = args[0] if len(args) == 1 and not kwargs else None
        layers = compute_dtype = None
        reason = _input_reason(x) or bypass_reason(self, layout.kinds)
        if not reason:
            layers = [child_at(self, path) for path in (layout.fc1, layout.fc2) if path]
            compute_dtype = autocast_dtype(x)
            reason = _reason(layout, layers, x, compute_dtype)
        backend = backend_of(self, OP, reason, x)
        if backend in ("eager", "native"):
            return super().forward(*args, **kwargs)
        parameters = [parameter for layer in layers for parameter in (layer.weight, layer.bias)]
        if not layout.fc2:
            parameters += None, None
        if any("weight" not in layer._parameters or "bias" not in layer._parameters for layer in layers):  # nobody has seen these
            return squeeze_excite(x, *parameters, layout.act, layout.gate, "NCHW", compute_dtype=compute_dtype)
        out_dtype = x.dtype if compute_dtype is None else torch.promote_types(x.dtype, compute_dtype)
        return fused(x, *parameters, layout.act, layout.gate, "NCHW", out_dtype, backend)


def _reason(layout: GateLayout, layers: list[nn.Module], x: torch.Tensor, compute_dtype: torch.dtype | None) -> str:
    """Why the op cannot run in this call, or "". Of what is parametrized, which reading would compute, the op makes sure."""
    channels, dtype = x.shape[1], x.dtype
    for path, layer in zip((layout.fc1, layout.fc2), layers):
        weight, bias = layer._parameters.get("weight"), layer._parameters.get("bias")
        for parameter in (weight, bias):
            reason = parameter_reason(path, parameter, x)
            if reason:
                return reason
        if (layer.in_channels != channels) if weight is None else (weight.shape[1:] != (channels, 1, 1)):
            return f"the input of {path} does not have its channels"
        if weight is None:
            channels = layer.out_channels
            continue
        channels = weight.shape[0]
        if bias is not None and bias.shape != (channels,):
            return f"the bias of {path} does not have its channels"
        if bias is not None and bias.dtype != weight.dtype:
            return f"weight and bias of {path} have different dtypes"
        if compute_dtype is None and weight.dtype != dtype:
            return "input and layers have different dtypes"
        if compute_dtype is not None and torch.float64 in (dtype, weight.dtype):
            return "autocast does not cast this mixture of dtypes"
    return "" if channels == x.shape[1] else "its gate has not one value for each channel"

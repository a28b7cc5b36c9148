"""Runs the body of a patched block: its layers as they are, except those that an op replaces in this call."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ..ops import Choice, _linear, gelu_linear, global_response_norm, select
from ..ops._linear import as_convolution, convolution_is_faster
from ..ops._registry import ORDER, switched_off
from ..ops.gelu_linear import linear_gelu_linear
from ._body import GELU_LINEAR, GRN, Body, Fusion
from ._graph import MASK, Gate, Step
from ._module import PLAIN, FastModule, Kinds, bypass_reason, child_at, choose, sites_of
from ._report import record

ACTS = {None: None, "none": "gelu", "tanh": "gelu_tanh"}  # the form of a GELU as global_response_norm calls it


def parameter_reason(path: str, parameter: torch.Tensor | None, x: torch.Tensor) -> str:
    if parameter is None:  # none, or parametrized: computing that here would compute it twice
        return ""
    if type(parameter) not in PLAIN:
        return f"the parameter of {path} is a {type(parameter).__name__}"
    return "" if parameter.device == x.device else f"the input and {path} are on different devices"


def autocast_dtype(x: torch.Tensor) -> torch.dtype | None:
    device = x.device.type
    return torch.get_autocast_dtype(device) if device in ORDER and torch.is_autocast_enabled(device) else None


def output_dtype(block: FastModule, consumer_kinds: Kinds, device: str, compute_dtype: torch.dtype) -> torch.dtype:
    """The dtype of a norm's output under autocast. Autocast runs LayerNorm in float32, except on the CPU. Where the next
    operation casts its input to autocast's dtype, and nobody looks on, the output is written in that dtype at once."""
    if device == "cpu" or (consumer_kinds and not bypass_reason(block, consumer_kinds)):
        return compute_dtype
    return torch.float32


def plain_steps(block: FastModule, steps: tuple[Step, ...], y: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    for step in steps:
        if step == "nchw":
            y = y.permute(0, 3, 1, 2)
        elif step == "nhwc":
            y = y.permute(0, 2, 3, 1)
        elif step == MASK:
            y = y.masked_fill(mask, 0)
        elif isinstance(step, Gate):
            y = y * F.interpolate(child_at(block, step.child)(y), size=y.shape[2:], mode=step.mode, align_corners=step.align_corners)
        else:
            y = child_at(block, step)(y)
    return y


def active_fusions(block: FastModule, body: Body, reason: str, x: torch.Tensor | None) -> tuple[Fusion, ...]:
    """The fusions that run in this call. `reason`: why none can, or ""."""
    reason = reason or (bypass_reason(block, body.containers) if body.fusions else "")
    return tuple(f for f in body.fusions if choose(block, f.op, reason or _fusion_reason(block, f, x), x))


def _fusion_reason(block: FastModule, fusion: Fusion, x: torch.Tensor) -> str:
    reason = bypass_reason(block, fusion.kinds)
    if reason:
        return reason
    for path, kind in fusion.kinds:
        if kind is nn.Dropout and child_at(block, path).p > 0 and child_at(block, path).training:
            return f"{path} drops values"
    parameters = child_at(block, fusion.path)._parameters
    for name in (fusion.weight, fusion.bias):
        if name not in parameters:
            return f"the {name} of {fusion.path} is parametrized"
        reason = parameter_reason(fusion.path, parameters[name], x)
        if reason:
            return reason
    return ""


def may_reroute(block: FastModule, body: Body) -> bool:
    """Whether the linear layers of the body may run as convolutions in this call; if not, only speed is lost: no warning."""
    if not any(op == "linear" for op, _, _ in block._fastconv.sites):
        return False
    reason = switched_off("linear") or bypass_reason(block, (*body.containers, *body.linear_kinds))
    if not torch.compiler.is_compiling():
        record(sites_of(block)["linear"], Choice("eager", reason), warn=False)
    return not reason


def run_body(
    block: FastModule, body: Body, y: torch.Tensor, mask: torch.Tensor | None = None, *, fusions: tuple[Fusion, ...], reroute: bool
) -> torch.Tensor:
    if not fusions and not reroute:
        return plain_steps(block, body.steps, y, mask)
    starts = {fusion.start: fusion for fusion in fusions}
    i = 0
    while i < len(body.leaves):
        leaf, fusion = body.leaves[i], starts.get(i)
        if fusion is not None and _fits(block, fusion, y):
            y = _fused(block, fusion, y)
            i = fusion.stop
            continue
        layer = child_at(block, leaf) if reroute and leaf in body.linears else None
        if layer is not None and _convolvable(layer, y):
            after = starts.get(i + 1)
            if after is not None and _joins(block, layer, after, y):
                y = _joined(block, layer, after, y)
                i = after.stop
            else:
                y = as_convolution(y, layer.weight, layer.bias)
                i += 1
            if not torch.compiler.is_compiling():
                sites_of(block)["linear"].backend = "onednn"
            continue
        y = plain_steps(block, (leaf,), y, mask)
        i += 1
    return y


def _joins(block: FastModule, layer: nn.Linear, fusion: Fusion, x: torch.Tensor) -> bool:
    """Whether a linear layer and the gelu_linear after it run as one: where the choice of the latter is that of its own call."""
    if fusion.op != GELU_LINEAR or torch.compiler.is_compiling():
        return False
    weight, bias = _parameters(block, fusion)
    same = weight.dtype == x.dtype and weight.shape[1] == layer.out_features and (bias is None or bias.dtype == x.dtype)
    hidden = x.detach()[..., :1].expand(*x.shape[:-1], layer.out_features)  # as what lies between, in all that is looked at
    return same and select(GELU_LINEAR, hidden, weight, bias).backend == "cpu"


def _joined(block: FastModule, layer: nn.Linear, fusion: Fusion, x: torch.Tensor) -> torch.Tensor:
    weight, bias = _parameters(block, fusion)
    sites_of(block)[GELU_LINEAR].backend = "cpu"
    return linear_gelu_linear(x, layer.weight, layer.bias, weight.flatten(1), bias, fusion.gelu, "cpu")


def _fits(block: FastModule, fusion: Fusion, y: torch.Tensor) -> bool:
    """Whether what comes out of the layer before is what the op takes; it may be anybody's layer."""
    reason, dtypes = "", {p.dtype for p in _parameters(block, fusion) if p is not None}
    channels = child_at(block, fusion.path)._parameters[fusion.weight].flatten(1 if fusion.op == GELU_LINEAR else 0).shape[-1]
    if (
        type(y) not in PLAIN
        or y.dim() < 2
        or (y.dim() != 4 and (fusion.op == GRN or fusion.view == "nchw"))
        or y.shape[-1 if fusion.view == "nhwc" else 1] != channels
    ):
        reason = f"{fusion.path} gets no tensor of its shape"
    elif not _mixes(fusion.op, y, dtypes):
        reason = f"the input of {fusion.path} and its parameters have different dtypes"
    if reason:
        return choose(block, fusion.op, reason, y)
    backend = select(fusion.op, y, *_parameters(block, fusion)).backend
    if not torch.compiler.is_compiling():
        sites_of(block)[fusion.op].backend = backend
    return backend != "native"  # the layers themselves are that, and the linear one may run as a convolution


def _mixes(op: str, y: torch.Tensor, dtypes: set[torch.dtype]) -> bool:
    if len(dtypes) > 1 or (torch.float64 in dtypes) != (y.dtype == torch.float64):
        return False
    return op == GRN or dtypes == {y.dtype} or autocast_dtype(y) is not None


def _parameters(block: FastModule, fusion: Fusion) -> tuple[torch.Tensor, torch.Tensor | None]:
    child = child_at(block, fusion.path)
    return getattr(child, fusion.weight), getattr(child, fusion.bias)


def _fused(block: FastModule, fusion: Fusion, y: torch.Tensor) -> torch.Tensor:
    weight, bias = _parameters(block, fusion)
    nchw = fusion.view == "nchw"
    x = y.permute(0, 2, 3, 1) if nchw else y
    if not torch.compiler.is_compiling():
        sites_of(block)[fusion.op].copies += not x.is_contiguous()
    dtype = autocast_dtype(x)
    if fusion.op == GELU_LINEAR:
        out = gelu_linear(x, weight.flatten(1), bias, fusion.gelu, compute_dtype=dtype)
    else:
        if dtype is not None:  # autocast takes the norm in float32, except on the CPU; parameters may be wider than the input
            seen = not fusion.consumer_kinds or bypass_reason(block, fusion.consumer_kinds)
            wide = torch.promote_types(x.dtype, weight.dtype) if x.device.type == "cpu" else torch.float32
            dtype = wide if seen else dtype
        out = global_response_norm(x, weight.reshape(-1), bias.reshape(-1), fusion.eps, ACTS[fusion.gelu], out_dtype=dtype)
    return out.permute(0, 3, 1, 2) if nchw else out


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """F.linear, as a convolution where that is faster."""
    plain = type(x) in PLAIN and type(weight) in PLAIN and type(bias) in (*PLAIN, type(None))
    return (_linear.linear if plain and not switched_off("linear") else F.linear)(x, weight, bias)


def linear_layer(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """layer(x) of a layer without hooks, as a convolution where that is faster."""
    return layer(x) if switched_off("linear") or not _convolvable(layer, x) else as_convolution(x, layer.weight, layer.bias)


def _convolvable(layer: nn.Linear, x: torch.Tensor) -> bool:
    parameters = layer._parameters  # without those that are parametrized
    plain = type(parameters.get("weight")) in PLAIN and type(parameters.get("bias", ...)) in (*PLAIN, type(None))
    return plain and x.shape[-1] == layer.in_features and convolution_is_faster(x, layer.weight)

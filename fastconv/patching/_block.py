"""The fused forward of a ConvNeXt block, whichever library wrote it; the rule files say which classes those are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ..ops import depthwise_conv_norm, is_disabled, residual_scale, select
from ..ops._function import constant_when_traced, needs_grad
from ..ops._registry import REROUTED
from ._analysis import BlockLayout, read_block
from ._body import GELU_LINEAR, GRN
from ._module import PLAIN, FastModule, bypass_reason, child_at, choose, sites_of
from ._rule import Rule
from ._run_body import active_fusions, autocast_dtype, may_reroute, output_dtype, parameter_reason, plain_steps, run_body

FUSED = ("depthwise_conv_norm", "residual_scale")
OPS = (*FUSED, GRN, GELU_LINEAR, *REROUTED)


@dataclass(frozen=True)
class BlockRule(Rule):
    """Classes of ConvNeXt blocks."""

    drop_paths: tuple[str, ...] = ("drop_path",)
    inline: tuple[str, ...] = ()  # children to read through, because the convolution lies inside
    in_place: bool = False  # the sum is written over the branch

    ops = FUSED

    @property
    def mixin(self) -> type:
        return FastBlock

    def read(self, module: nn.Module) -> tuple[BlockLayout, dict[str, tuple[str, str]]]:
        return read_block(module, self.drop_paths, self.inline, self.in_place)


class FastBlock(FastModule):
    """shortcut(x) + drop_path(gamma * body(norm(conv(before(x))))), conv + norm as one op and all that follows body as another.

    Parameters are read at each call, in the order and as often as the original reads them (a parametrization may hold
    state); children that are not fused away are called, so that their hooks and adapters run.
    """

    def forward(self, *args, **kwargs):
        # disabled(): nothing is counted. Traced graphs get torch's own operators, so that they run without fastconv.
        if is_disabled() or torch.jit.is_tracing() or _exporting():
            return super().forward(*args, **kwargs)
        layout = self._fastconv.layout
        fits = len(args) == 1 + layout.masked and not kwargs
        x, *masks = args if fits else (None,)
        reason = _input_reason(x, *masks)
        tail = choose(self, "residual_scale", reason or _tail_reason(self, layout, x), x)
        y = x if reason else plain_steps(self, layout.before, x)
        head = choose(self, "depthwise_conv_norm", reason or _input_reason(y) or _head_reason(self, layout, y), x)
        fusions = active_fusions(self, layout.body, reason, x)
        reroute = not reason and may_reroute(self, layout.body)
        # What ran before the convolution must not run twice.
        if not (head or tail or fusions or reroute) and (reason or not layout.before):
            return super().forward(*args, **kwargs)
        y, x = _fused_head(self, layout, y, x) if head else (_plain_head(self, layout, y), x)
        y = run_body(self, layout.body, y, *masks, fusions=fusions, reroute=reroute)
        return _fused_tail(self, layout, x, y) if tail else _plain_tail(self, layout, x, y)


@constant_when_traced
def _exporting() -> bool:
    """torch.compiler.is_exporting() as it is: where torch 2.11 compiles, it stands for True."""
    return torch.compiler.is_exporting()


def _input_reason(x, *masks) -> str:
    """Why no op can run on this input, or "". A reason is a fixed text, and what it tests can be a guard of torch.compile."""
    if x is None:
        return "called with other arguments than one tensor" if not masks else "called with other arguments than an input and a mask"
    for tensor in (x, *masks):
        if type(tensor) not in PLAIN:
            return f"the input is a {type(tensor).__name__}"
    return "" if x.dim() == 4 else "the input is not (N, C, H, W)"


def _head_reason(block: FastBlock, layout: BlockLayout, x: torch.Tensor) -> str:
    reason = bypass_reason(block, layout.head_kinds)
    if reason:
        return reason
    conv, norm = child_at(block, layout.conv), child_at(block, layout.norm)
    weight, norm_weight = conv._parameters.get("weight"), norm._parameters.get("weight")
    reason = parameter_reason(layout.conv, weight, x) or parameter_reason(layout.norm, norm_weight, x)
    if reason or x.shape[1] != conv.in_channels:
        return reason or "the input does not have the block's channels"
    compute_dtype = autocast_dtype(x)
    if compute_dtype is None:
        same = (weight is None or weight.dtype == x.dtype) and (norm_weight is None or norm_weight.dtype == x.dtype)
        return "" if same else "input, convolution and norm have different dtypes"
    if x.dtype == torch.float64 or (norm_weight is not None and norm_weight.dtype not in (torch.float32, compute_dtype)):
        return "autocast does not cast this mixture of dtypes"
    return ""


def _tail_reason(block: FastBlock, layout: BlockLayout, x: torch.Tensor) -> str:
    gamma = block._parameters.get(layout.gamma) if layout.gamma else None
    return bypass_reason(block, layout.tail_kinds) or parameter_reason(layout.gamma, gamma, x)


def _fused_head(block: FastBlock, layout: BlockLayout, x: torch.Tensor, block_x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """norm(conv(x)) as (N, H, W, C), and the block's input for the shortcut.

    Where the convolution takes that very input, and as it lies, the shortcut starts from the op's second result: backward then adds
    its gradient where it stores the convolution's, in place of a pass that reads both and writes their sum.
    """
    conv, norm = child_at(block, layout.conv), child_at(block, layout.norm)
    same, x = x is block_x, x.permute(0, 2, 3, 1)
    if not torch.compiler.is_compiling() and not x.is_contiguous():
        sites_of(block)["depthwise_conv_norm"].copies += 1
    compute_dtype = autocast_dtype(x)
    out_dtype = None if compute_dtype is None else output_dtype(block, layout.consumer_kinds, x.device.type, compute_dtype)
    parameters = conv.weight, conv.bias, norm.weight, norm.bias
    shared = same and x.is_contiguous() and needs_grad(x)
    y = depthwise_conv_norm(x, *parameters, norm.eps, compute_dtype=compute_dtype, out_dtype=out_dtype, shortcut=shared)
    return (y[0], y[1].permute(0, 3, 1, 2)) if shared else (y, block_x)


def _plain_head(block: FastBlock, layout: BlockLayout, x: torch.Tensor) -> torch.Tensor:
    y = child_at(block, layout.conv)(x)
    if layout.norm_view == "nchw":
        return child_at(block, layout.norm)(y).permute(0, 2, 3, 1)
    return child_at(block, layout.norm)(y.permute(0, 2, 3, 1))


def _fused_tail(block: FastBlock, layout: BlockLayout, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    gamma = _gamma(block, layout)
    dtype = y.dtype if gamma is None else torch.promote_types(y.dtype, gamma.dtype)
    mask = None
    if layout.drop_path:
        drop_path = child_at(block, layout.drop_path)
        if drop_path.training and type(drop_path) is not nn.Identity:
            # The model's own module draws the mask, in the shape and dtype in which it would: its random stream stays.
            ones = torch.ones((y.shape[0], 1, 1, 1), dtype=dtype, device=y.device)
            mask = drop_path(ones)
            mask = None if mask is ones else mask
    shortcut = (child_at(block, layout.shortcut)(x) if layout.shortcut else x).permute(0, 2, 3, 1)
    if not torch.compiler.is_compiling():  # only now all dtypes are known
        sites_of(block)["residual_scale"].backend = select("residual_scale", shortcut, y, gamma, mask).backend
    out = residual_scale(shortcut, y, gamma, mask).permute(0, 3, 1, 2)
    return out.to(dtype) if layout.in_place else out


def _plain_tail(block: FastBlock, layout: BlockLayout, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    gamma = _gamma(block, layout)
    y = (y if gamma is None else y * gamma).permute(0, 3, 1, 2)
    if layout.drop_path:
        y = child_at(block, layout.drop_path)(y)
    shortcut = child_at(block, layout.shortcut)(x) if layout.shortcut else x
    return y.add_(shortcut) if layout.in_place else y + shortcut


def _gamma(block: FastBlock, layout: BlockLayout) -> torch.Tensor | None:
    return getattr(block, layout.gamma).reshape(-1) if layout.gamma else None

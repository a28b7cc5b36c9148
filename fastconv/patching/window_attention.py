"""Swin Transformers, V1 and V2, of timm, torchvision, Hugging Face, and with the structure of the official code: attention on
the map as it lies, without rolling, padding or cutting it into windows.

What is patched is what owns the rolling and the windows: the block, or torchvision's and the bundled models' attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from ..ops import Choice, is_disabled
from ._attention import OP, AttentionLayout, Parts, Window, attend, call_reason, choose, pair, plain, read_attention
from ._block import _exporting
from ._graph import Unsupported
from ._module import FastModule, settle
from ._rule import Rule

OTHER_ARGUMENTS = "called with other arguments than one tensor"


class FastAttention(FastModule):
    """Attention of a map (B, H, W, C), in the method `entry`."""

    entry: ClassVar[str] = "forward"

    def forward(self, *args, **kwargs):
        return self._attention(super().forward, args, kwargs)

    def _attention(self, original, args, kwargs):
        if is_disabled() or torch.jit.is_tracing() or _exporting():
            return original(*args, **kwargs)
        layout = self._fastconv.layout
        reason, x, H, W = self._located(args, kwargs)
        reason = reason or call_reason(self, layout, x, H, W)
        choice = Choice("eager", reason) if reason else choose(self, layout, x, H, W)
        if settle(self, OP, choice) != "eager":
            return self.run(self, layout, *args, **kwargs)
        return original(*args, **kwargs)

    def _located(self, args, kwargs) -> tuple[str, torch.Tensor | None, int, int]:
        """Why the arguments are not those expected, or ""; the input, and the size of its map."""
        x = args[0] if len(args) == 1 and not kwargs else None
        reason = OTHER_ARGUMENTS if x is None else plain(x)
        if not reason and x.dim() != 4:
            reason = "the input is not (B, H, W, C)"
        return (reason, x, 0, 0) if reason else (reason, x, x.shape[1], x.shape[2])

    @staticmethod
    def run(module: nn.Module, layout: AttentionLayout, x: torch.Tensor, **attention) -> torch.Tensor:
        """What `entry` computes, with the op."""
        return attend(module, layout, x, **attention)

    @staticmethod
    def rehearsals(module: nn.Module, layout: AttentionLayout) -> Iterator[tuple[tuple[int, int, int], dict]]:
        """(B, H, W) of maps to try it on, with attributes to set before: one of which padding is part of every window that is
        masked, and one without, where a mask that is added twice shows."""
        (wh, ww), _, _ = layout.parts.geometry(module, 1 << 16, 1 << 16)
        yield (2, wh + 1, 2 * ww + 1), {}
        yield (1, 2 * wh, 3 * ww), {}

    @staticmethod
    def inputs(x: torch.Tensor) -> tuple:
        """The arguments of forward for this map (B, H, W, C)."""
        return (x,)


def clamped(attention: nn.Module, H: int, W: int) -> Window:
    """torchvision, and the bundled models: an axis that one window covers is not shifted."""
    window, shift = pair(attention.window_size), pair(attention.shift_size)
    order = "pad_roll" if getattr(attention, "pad_first", True) else "roll_pad"
    return window, tuple(s if size > w else 0 for size, w, s in zip((H, W), window, shift)), order


def stored(block: nn.Module, H: int, W: int) -> Window:
    """timm and the official code: what the block says; only the first takes maps that need padding, and rolls before."""
    return pair(block.window_size), pair(block.shift_size), "roll_pad"


def stored_padded(layer: nn.Module, H: int, W: int) -> Window:
    """Hugging Face: what the layer says, padded before it is rolled."""
    return pair(layer.window_size), pair(layer.shift_size), "pad_roll"


def _mask_reason(block: nn.Module, H: int, W: int) -> str:
    """Why the mask that a block keeps is not that of this map, or "". A mask made anew fits any."""
    shifted = any(pair(block.shift_size))
    if getattr(block, "dynamic_mask", False):
        return ""
    if (block.attn_mask is not None) != shifted:
        return "attn_mask and shift_size contradict each other"
    windows = [(-(-size // w), -(-kept // w)) for size, kept, w in zip((H, W), block.input_resolution, pair(block.window_size))]
    return "attn_mask is of another size than this map" if shifted and any(a != b for a, b in windows) else ""


class FastTimmBlock(FastAttention):
    """A block whose method _attn is the attention of a map: norms and residuals stay the block's own code."""

    entry = "_attn"

    def forward(self, *args, **kwargs):
        return super(FastAttention, self).forward(*args, **kwargs)

    def _attn(self, *args, **kwargs):
        return self._attention(super()._attn, args, kwargs)

    def _located(self, args, kwargs):
        reason, x, H, W = super()._located(args, kwargs)
        return reason or _mask_reason(self, H, W), x, H, W

    @staticmethod
    def rehearsals(module, layout):
        yield (1, *module.input_resolution), {}
        (wh, ww), _, _ = stored(module, 0, 0)
        yield (2, wh + 1, 2 * ww + 1), {"dynamic_mask": True}


class FastTokenBlock(FastAttention):
    """The official block: tokens (B, H * W, C) of a map of its input_resolution."""

    def _located(self, args, kwargs):
        x = args[0] if len(args) == 1 and not kwargs else None
        reason = OTHER_ARGUMENTS if x is None else plain(x)
        (H, W), (wh, ww) = self.input_resolution, pair(self.window_size)
        if not reason and (x.dim() != 3 or x.shape[1] != H * W or H % wh or W % ww):
            reason = "the input is not (B, H * W, C) with the block's input_resolution, in whole windows"
        return reason or _mask_reason(self, H, W), x, H, W

    @staticmethod
    def run(module, layout, x, **attention):
        B, L, C = x.shape
        tokens = x if layout.cosine else module.norm1(x)
        tokens = attend(module, layout, tokens.view(B, *module.input_resolution, C), **attention).view(B, L, C)
        x = x + module.drop_path(module.norm1(tokens) if layout.cosine else tokens)
        branch = module.norm2(module.mlp(x)) if layout.cosine else module.mlp(module.norm2(x))
        return x + module.drop_path(branch)

    @staticmethod
    def rehearsals(module, layout):
        yield (2, *module.input_resolution), {}

    @staticmethod
    def inputs(x):
        return (x.flatten(1, 2),)


class FastSwinLayer(FastAttention):
    """Hugging Face's SwinLayer: (hidden states, attention weights). On a small map it makes its window smaller for good."""

    def _located(self, args, kwargs):
        x, size, always_partition, others = _layer_arguments(*args, **kwargs)
        reason = plain(x) or _token_reason(x, size)
        if not reason and any(others.values()):
            reason = "called with arguments that may ask for the attention weights"
        reason = reason or _implementation_reason(self)
        if not reason and not always_partition:
            self.set_shift_and_window_size(size)
        return reason, x, *size

    @staticmethod
    def run(module, layout, *args, attention=None, **kwargs):
        x, (H, W), *_ = _layer_arguments(*args, **kwargs)
        B, L, C = x.shape
        given = {} if attention is None else {"attention": attention}
        y = attend(module, layout, module.layernorm_before(x).view(B, H, W, C), **given)
        x = x + module.drop_path(y.view(B, L, C))
        return module.dropout(module.mlp(module.layernorm_after(x))) + x, None

    @staticmethod
    def rehearsals(module, layout):
        reason = _implementation_reason(module)
        if reason:
            raise Unsupported(reason)
        return FastAttention.rehearsals(module, layout)

    @staticmethod
    def inputs(x):
        return x.flatten(1, 2), tuple(x.shape[1:3])


def _implementation_reason(layer: nn.Module) -> str:
    """The eager one returns the attention weights; one that the user has registered may compute anything."""
    return "" if layer.attention.config._attn_implementation == "sdpa" else 'its attn_implementation is not "sdpa"'


def _layer_arguments(hidden_states, input_dimensions, always_partition=False, **others):
    return hidden_states, input_dimensions, always_partition, others


def _token_reason(x: torch.Tensor, size: tuple[int, int]) -> str:
    return "" if x.dim() == 3 and x.shape[1] == size[0] * size[1] else "the input is not (B, H * W, C)"


class FastSwinv2Layer(FastAttention):
    """Hugging Face's Swinv2Layer: (hidden states,)."""

    def _located(self, args, kwargs):
        x, size, weights = _layer_v2_arguments(*args, **kwargs)
        reason = plain(x) or _token_reason(x, size) or ("the attention weights are asked for" if weights else "")
        return reason, x, *size

    @staticmethod
    def run(module, layout, *args, attention=None, **kwargs):
        x, (H, W), _ = _layer_v2_arguments(*args, **kwargs)
        B, L, C = x.shape
        given = {} if attention is None else {"attention": attention}
        y = attend(module, layout, x.view(B, H, W, C), **given).view(B, L, C)
        x = x + module.drop_path(module.layernorm_before(y))
        return (x + module.drop_path(module.layernorm_after(module.output(module.intermediate(x)))),)

    @staticmethod
    def inputs(x):
        return x.flatten(1, 2), tuple(x.shape[1:3])


def _layer_v2_arguments(hidden_states, input_dimensions, output_attentions=False):
    return hidden_states, input_dimensions, output_attentions


@dataclass(frozen=True)
class AttentionRule(Rule):
    """Classes of blocks, or of attention, that keep its parts in `parts`."""

    parts: Parts | None = None
    fast: type = FastAttention

    ops = (OP,)

    @property
    def mixin(self) -> type:
        return self.fast

    def read(self, module: nn.Module) -> tuple[AttentionLayout, dict[str, tuple[str, str]]]:
        return read_attention(module, self.parts, self.fast), {OP: ("fused", "")}


@dataclass(frozen=True)
class OfficialAttentionRule(AttentionRule):
    """Blocks with the parts of the official Swin and Swin V2 code, which is mostly met as a copy in user code."""

    def matches(self, module: nn.Module) -> bool:
        attn = module._modules.get("attn")
        if attn is None or not {"norm1", "norm2", "mlp", "drop_path"} <= module._modules.keys() or not hasattr(module, "input_resolution"):
            return False
        biased = "relative_position_bias_table" in attn._parameters or {"logit_scale", "cpb_mlp"} <= {*attn._parameters, *attn._modules}
        return biased and {"qkv", "proj"} <= attn._modules.keys() and hasattr(module, "shift_size")


_CHILDREN = dict(attn="attn", holder="attn", projections=("attn.qkv",), proj="attn.proj", dropouts=("attn.attn_drop", "attn.proj_drop"))
_BLOCK = Parts(stored, **_CHILDREN)
_TORCHVISION = Parts(clamped, "", "", ("qkv",), "proj", functional=True)
_BUNDLED = Parts(clamped, "", "", ("qkv",), "proj")
_SWIN_LAYER = Parts(
    stored_padded,
    "attention",
    "attention",
    tuple(f"attention.{name}_proj" for name in "qkv"),
    "attention.o_proj",
    ("dropout",),
    heads="num_attention_heads",
    scale="scaling",
)
_SWINV2_LAYER = Parts(
    stored_padded,
    "attention",
    "attention.self",
    tuple(f"attention.self.{name}" for name in ("query", "key", "value")),
    "attention.output.dense",
    ("attention.self.dropout", "attention.output.dropout"),
    positions="continuous_position_bias_mlp",
    heads="num_attention_heads",
    mask_value=-200.0,  # it adds the mask twice
)

RULES = (
    AttentionRule("timm.models.swin_transformer", ("SwinTransformerBlock",), _BLOCK, FastTimmBlock),
    AttentionRule("timm.models.swin_transformer_v2", ("SwinTransformerV2Block",), _BLOCK, FastTimmBlock),
    AttentionRule("torchvision.models.swin_transformer", ("ShiftedWindowAttention",), _TORCHVISION),
    AttentionRule("transformers.models.swin.modeling_swin", ("SwinLayer",), _SWIN_LAYER, FastSwinLayer),
    AttentionRule("transformers.models.swinv2.modeling_swinv2", ("Swinv2Layer",), _SWINV2_LAYER, FastSwinv2Layer),
    AttentionRule("fastconv.models.swin", ("WindowAttention",), _BUNDLED),
    AttentionRule("fastconv.models.swin_v2", ("WindowAttention",), _BUNDLED),
    OfficialAttentionRule("", (), _BLOCK, FastTokenBlock),
)

"""Reads a block's forward as a symbolic graph and tells which computation it is, whatever its class is called.

Matching what the code does, instead of trusting a class name, covers blocks that were copied into user code and declines
a class whose next version computes something else. Nothing is executed and no child is entered: children are leaves.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torch.fx
import torch.nn.functional as F
from torch import nn

from ._body import Body, read_body
from ._graph import (
    ADD,
    MASK,
    MUL,
    TO_NCHW,
    TO_NHWC,
    Unsupported,
    gate,
    is_attribute,
    is_call,
    is_child,
    permutation,
    scale,
    trace,
    trace_inputs,
)
from ._module import Kinds, child_at, unwrapped


@dataclass(frozen=True)
class BlockLayout:
    """Where the parts of a ConvNeXt block are. Paths are relative to the block; "" where it has no such part."""

    before: tuple[str, ...]  # children to call before the convolution
    conv: str
    norm: str
    norm_view: str  # the view that the norm's own forward takes, "nchw" or "nhwc"
    body: Body  # what lies between the norm and the layer scale
    gamma: str
    drop_path: str
    shortcut: str
    in_place: bool  # the sum is written over the branch and keeps its dtype; a symbolic graph does not show it
    head_kinds: Kinds  # children whose calls the fused op replaces
    tail_kinds: Kinds
    consumer_kinds: Kinds  # children, outermost first, that take the norm's output and cast it to autocast's dtype; () if none does
    masked: bool  # whether forward takes a mask, true where the body's output is zero, as its second argument


def _depthwise_reason(conv: nn.Module) -> str:
    """Why the op cannot be this convolution, or ""."""
    if unwrapped(type(conv)) is not nn.Conv2d:
        return f"its convolution is a {type(conv).__name__}"
    if nn.Conv2d.forward.__qualname__ != "Conv2d.forward":
        return f"torch.nn.Conv2d.forward was replaced by {nn.Conv2d.forward.__qualname__}"
    K = conv.kernel_size[0]
    requirements = {
        "depthwise without channel multiplier": conv.groups == conv.in_channels == conv.out_channels,
        f"of stride 1, not {conv.stride}": conv.stride == (1, 1),
        f"undilated, not {conv.dilation}": conv.dilation == (1, 1),
        f"square and odd, not {conv.kernel_size}": conv.kernel_size == (K, K) and K % 2 == 1,
        f'padded with zeros to "same" size, not by {conv.padding}': conv.padding in ((K // 2, K // 2), "same")
        and conv.padding_mode == "zeros",
    }
    return next((f"the convolution must be {needed}" for needed, met in requirements.items() if not met), "")


def _norm_reason(norm: nn.Module, C: int, layout: str) -> str:
    """Why this child is not LayerNorm over the channels with both parameters, of maps in this layout, or ""."""
    kind = type(norm).__name__
    if getattr(norm, "weight", None) is None or getattr(norm, "bias", None) is None:
        return f"the norm ({kind}) has no weight or no bias"
    try:
        x, node = trace(norm)
    except Unsupported as error:
        return f"the norm ({kind}): {error}"
    if layout == "nchw":
        if permutation(node) != TO_NCHW:
            return f"the norm ({kind}) is not a LayerNorm over the channels"
        node = node.args[0]
    arguments = dict(zip(("input", "normalized_shape", "weight", "bias", "eps"), node.args), **node.kwargs)
    source = arguments.get("input")
    if layout == "nchw" and permutation(source) == TO_NHWC:
        source = source.args[0]
    same = (
        is_call(node, (F.layer_norm,))
        and source is x
        and tuple(arguments["normalized_shape"]) == (C,)
        and is_attribute(arguments.get("weight"), "weight")
        and is_attribute(arguments.get("bias"), "bias")
        and arguments.get("eps") == getattr(norm, "eps", None)
    )
    return "" if same else f"the norm ({kind}) is not a LayerNorm over the channels"


def _drop_path_reason(drop_path: nn.Module) -> str:
    """Why drop_path(x) is not x times a mask drawn as for drop_path(ones), one value an image, or "".

    Tried on a copy, in both modes, from the same random state: the fused op asks the model's own module for the mask.
    """
    if unwrapped(type(drop_path)) is nn.Identity:
        return ""
    reason = f"{type(drop_path).__name__} is not stochastic depth with one mask value an image"
    if any(True for _ in (*drop_path.parameters(), *drop_path.children())):
        return reason
    probe = copy.deepcopy(drop_path)
    try:
        with torch.device("cpu"), torch.random.fork_rng(devices=[]), torch.no_grad():
            x = torch.arange(1.0, 1 + 64 * 6).view(64, 2, 1, 3)
            for training in (False, True):
                probe.train(training)
                start = torch.get_rng_state()
                dropped, after = probe(x), torch.get_rng_state()
                torch.set_rng_state(start)
                mask = probe(x.new_ones(64, 1, 1, 1))
                same = torch.equal(after, torch.get_rng_state()) and torch.allclose(dropped, x * mask, rtol=1e-6, atol=0)
                if not same or (not training and not torch.equal(dropped, x)):
                    return reason
    except Exception as error:  # user code, perhaps under a mode that forbids looking at values
        return f"{reason} ({type(error).__name__})"
    return ""


def _consumers(block: nn.Module, path: str) -> Kinds:
    """The children through which the norm's output reaches a plain Linear or Conv2d, () where it reaches anything else first."""
    child = child_at(block, path)
    kind = unwrapped(type(child))
    if kind in (nn.Linear, nn.Conv2d):
        return ((path, kind),)
    if kind.__module__.startswith("torch.") or not len(list(child.children())):
        return ()
    try:
        x, _ = trace(child)
    except Unsupported:
        return ()
    users = list(x.users)
    if len(users) != 1 or users[0].op != "call_module" or users[0].args != (x,):
        return ()
    inner = _consumers(block, f"{path}.{users[0].target}")
    return ((path, kind), *inner) if inner else ()


def read_block(
    block: nn.Module, drop_paths: tuple[str, ...], inline: tuple[str, ...], in_place: bool
) -> tuple[BlockLayout, dict[str, tuple[str, str]]]:
    """The layout of a ConvNeXt block and, by op, (status, reason). Raises Unsupported where it is another computation.

    "linear" is among the ops where the block has such layers and this processor may run them faster as convolutions.

    shortcut(x) + drop_path(gamma * body(norm(conv(before(x))))), with conv depthwise; gamma, drop_path, shortcut and before
    are optional. With a second argument, body may hold masked_fill(second argument, 0).
    """
    (x, *others), result = trace_inputs(block, inline)
    if len(others) > 1:
        raise Unsupported(f"its forward takes {1 + len(others)} inputs")
    if not is_call(result, ADD) or len(result.args) != 2 or result.kwargs:
        raise Unsupported("its forward does not end in a residual sum")
    shortcut, node = result.args
    if not _is_shortcut(shortcut, x):
        shortcut, node = node, shortcut
    if not _is_shortcut(shortcut, x):
        raise Unsupported("its forward does not end in a sum with its input")
    steps: list[tuple] = []
    last, gated = node, None
    while node is not x:
        last = node
        if len(node.users) != 1 and node is not gated:  # by an operation in place, say
            raise Unsupported(f"the output of {node.target} is used twice")
        dims = permutation(node)
        if node.op == "call_module" and len(node.args) == 1 and not node.kwargs:
            steps.append(("call", node.target))
            node = node.args[0]
        elif dims in (TO_NHWC, TO_NCHW):
            steps.append(("nhwc" if dims == TO_NHWC else "nchw", ""))
            node = node.args[0]
        elif is_call(node, ("masked_fill",)) and node.args[1:] == (*others, 0) and not node.kwargs:
            steps.append((MASK, ""))
            node = node.args[0]
        elif is_call(node, MUL) and len(node.args) == 2 and gate(node):
            step, node = gate(node)
            steps.append(("gate", step))
            gated = node
        elif is_call(node, MUL) and len(node.args) == 2:
            steps.append(("scale", node))
            node = next((a for a in node.args if isinstance(a, torch.fx.Node) and not _reads_parameter(a)), None)
        else:
            raise Unsupported(f"its forward holds {node.target!r}, which the fused block does not know")
        if not isinstance(node, torch.fx.Node):
            raise Unsupported("its forward is not one chain of operations")
    if not set(x.users) <= {last, shortcut, result}:
        raise Unsupported("its input is used otherwise too")
    if any(len(mask.users) != sum(kind == MASK for kind, _ in steps) for mask in others):
        raise Unsupported("its second input is used otherwise than as a mask")
    steps.reverse()
    return _parse(block, steps, shortcut.target if shortcut is not x else "", drop_paths, inline, in_place, bool(others))


def _is_shortcut(node, x) -> bool:
    return node is x or (isinstance(node, torch.fx.Node) and node.op == "call_module" and node.args == (x,) and not node.kwargs)


def _reads_parameter(node) -> bool:
    if is_call(node, ("reshape", "view")):
        node = node.args[0]
    return node.op == "get_attr" or (node.op == "call_module" and str(node.target).startswith("parametrizations."))


def _parse(block, steps, shortcut, drop_paths, inline, in_place, masked):
    chain = " > ".join(name if kind == "call" else kind for kind, name in steps)
    unknown = Unsupported(f"its forward is another computation: {chain}")
    layout, gamma, drop_path, calls, body = "nchw", "", "", [], []
    for kind, value in steps:
        step = kind in ("call", "gate", MASK)
        late = drop_path or (gamma and step)
        early = kind in ("gate", MASK) and len(calls) < 2
        if kind == "call" and value in drop_paths:
            drop_path = value
        elif (step or kind == "scale") and (late or early or (kind == "gate" and layout != "nchw")):
            raise unknown
        elif step:
            calls.append((value or MASK, layout))
        elif kind == "scale":
            channels = next((c.out_channels for c in (child_at(block, p) for p, _ in calls if is_child(p)) if isinstance(c, nn.Conv2d)), -1)
            found = [s for s in (scale(a, block, channels) for a in value.args) if s]
            if gamma or len(found) != 1 or found[0][1] != layout:
                raise unknown
            gamma = found[0][0]
        elif kind == layout:
            raise unknown
        else:
            layout = kind
    before = []
    while calls and calls[0][1] == "nchw" and is_child(calls[0][0]) and not isinstance(child_at(block, calls[0][0]), nn.Conv2d):
        before.append(calls.pop(0)[0])
        if any(getattr(m, "inplace", False) for m in child_at(block, before[-1]).modules()):
            raise Unsupported(f"{before[-1]} writes over the input, which the shortcut needs")
    if layout != "nchw" or len(calls) < 3 or calls[0][1] != "nchw":
        raise unknown
    (conv_path, _), (norm_path, norm_layout), *rest = calls
    if not (is_child(conv_path) and is_child(norm_path)):
        raise unknown
    conv, norm = child_at(block, conv_path), child_at(block, norm_path)
    view = "nhwc"
    for path, needed in rest:
        body += [needed, path] if needed != view else [path]
        view = needed
    body += ["nhwc"] if view != "nhwc" else []

    head_reason = _depthwise_reason(conv) or _norm_reason(norm, conv.out_channels, norm_layout)
    tail_reason = _drop_path_reason(child_at(block, drop_path)) if drop_path else ""
    plain_sum = not gamma and (not drop_path or type(child_at(block, drop_path)) is nn.Identity)
    sites = {
        "depthwise_conv_norm": ("declined" if head_reason else "fused", head_reason),
        "residual_scale": ("declined", tail_reason) if tail_reason else ("native", "a plain sum") if plain_sum else ("fused", ""),
    }

    body, body_sites = read_body(block, body, inline)
    sites.update(body_sites)

    def kinds(*paths: str) -> Kinds:
        return tuple((path, unwrapped(type(child_at(block, path)))) for path in paths if path)

    found = BlockLayout(
        before=tuple(before),
        conv=conv_path,
        norm=norm_path,
        norm_view=norm_layout,
        body=body,
        gamma=gamma,
        drop_path=drop_path,
        shortcut=shortcut,
        in_place=in_place,
        head_kinds=kinds(*inline, conv_path, norm_path),
        tail_kinds=kinds(*inline, drop_path),
        consumer_kinds=_consumers(block, rest[0][0]) if is_child(rest[0][0]) else (),
        masked=masked,
    )
    return found, sites

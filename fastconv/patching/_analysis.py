"""Reads a block's forward as a symbolic graph and tells which computation it is, whatever its class is called.

Matching what the code does, instead of trusting a class name, covers blocks that were copied into user code and declines
a class whose next version computes something else. Nothing is executed and no child is entered: children are leaves.
"""

from __future__ import annotations

import copy
import operator
from dataclasses import dataclass

import torch
import torch.fx
import torch.nn.functional as F
from torch import nn

from ..ops import _linear
from ._module import Kinds, child_at, unwrapped

TO_NHWC, TO_NCHW = (0, 2, 3, 1), (0, 3, 1, 2)
_ADD = (operator.add, torch.add, "add")
_MUL = (operator.mul, torch.mul, "mul")
_PERMUTE = (torch.permute, "permute")


class Unsupported(Exception):
    """The graph is not the computation looked for; the message is the reason that the report shows."""


@dataclass(frozen=True)
class BlockLayout:
    """Where the parts of a ConvNeXt block are. Paths are relative to the block; "" where it has no such part."""

    before: tuple[str, ...]  # children to call before the convolution
    conv: str
    norm: str
    norm_view: str  # the view that the norm's own forward takes, "nchw" or "nhwc"
    body: tuple[str, ...]  # children to call between the norm and the layer scale; "nchw" and "nhwc" switch the view
    gamma: str
    drop_path: str
    shortcut: str
    in_place: bool  # the sum is written over the branch and keeps its dtype; a symbolic graph does not show it
    head_kinds: Kinds  # children whose calls the fused op replaces
    tail_kinds: Kinds
    consumer_kinds: Kinds  # children, outermost first, that take the norm's output and cast it to autocast's dtype; () if none does
    leaves: tuple[str, ...]  # body with its containers opened; () if no nn.Linear is there
    linears: tuple[str, ...]  # the leaves that are nn.Linear
    linear_kinds: Kinds  # the linears, and the containers that were opened


class _Tracer(torch.fx.Tracer):
    def __init__(self, inline: tuple[str, ...]):
        super().__init__()
        self.inline = inline

    def is_leaf_module(self, m, module_qualified_name):
        return module_qualified_name not in self.inline


def trace(module: nn.Module, inline: tuple[str, ...] = ()) -> tuple[torch.fx.Node, torch.fx.Node]:
    """The only input and the result of the module's forward."""
    try:
        graph = _Tracer(inline).trace(module)
    except Exception as error:  # user code meets a symbolic value: any exception may come out
        raise Unsupported(f"its forward cannot be read symbolically ({type(error).__name__})") from None
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    if len(inputs) != 1:
        raise Unsupported(f"its forward takes {len(inputs)} inputs")
    (output,) = (n for n in graph.nodes if n.op == "output")
    result = output.args[0]
    if not isinstance(result, torch.fx.Node):
        raise Unsupported("its forward does not return one tensor")
    return inputs[0], result


def _is(node, targets) -> bool:
    return isinstance(node, torch.fx.Node) and node.op in ("call_function", "call_method") and node.target in targets


def _permutation(node) -> tuple[int, ...] | None:
    if not _is(node, _PERMUTE):
        return None
    dims = [*node.args[1:], *node.kwargs.values()]
    return tuple(dims[0]) if len(dims) == 1 and isinstance(dims[0], (tuple, list)) else tuple(dims)


def _is_attribute(node, name: str) -> bool:
    """Whether a node reads this parameter of the root, parametrized or not."""
    if not isinstance(node, torch.fx.Node):
        return False
    return (node.op, node.target) in (("get_attr", name), ("call_module", f"parametrizations.{name}"))


def _scale(node, block: nn.Module, C: int) -> tuple[str, str] | None:
    """(name, layout) of the per-channel parameter that a node reads: "nhwc" for (C,), "nchw" for (1, C, 1, 1) or (C, 1, 1)."""
    view = None
    if _is(node, ("reshape", "view")):
        view, node = tuple(node.args[1:]), node.args[0]
        view = tuple(view[0]) if len(view) == 1 and isinstance(view[0], (tuple, list)) else view
    name = str(getattr(node, "target", "")).removeprefix("parametrizations.")
    if "." in name or not _is_attribute(node, name):
        return None
    shape = view or tuple(getattr(block, name).shape)
    if shape == (C,):
        return name, "nhwc"
    return (name, "nchw") if shape in ((1, -1, 1, 1), (1, C, 1, 1), (-1, 1, 1), (C, 1, 1)) else None


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
        if _permutation(node) != TO_NCHW:
            return f"the norm ({kind}) is not a LayerNorm over the channels"
        node = node.args[0]
    arguments = dict(zip(("input", "normalized_shape", "weight", "bias", "eps"), node.args), **node.kwargs)
    source = arguments.get("input")
    if layout == "nchw" and _permutation(source) == TO_NHWC:
        source = source.args[0]
    same = (
        _is(node, (F.layer_norm,))
        and source is x
        and tuple(arguments["normalized_shape"]) == (C,)
        and _is_attribute(arguments.get("weight"), "weight")
        and _is_attribute(arguments.get("bias"), "bias")
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


def _opened(block: nn.Module, path: str) -> tuple[list[str], list[str]]:
    """(leaves, containers) of a child whose forward only calls its children one after another; ([path], []) for any other."""
    child = child_at(block, path)
    try:
        x, node = trace(child) if len(child._modules) else (None, None)
    except Unsupported:
        x = None
    if x is None:
        return [path], []
    names = []
    while node is not x:
        if node.op != "call_module" or len(node.args) != 1 or node.kwargs or len(node.users) != 1:
            return [path], []
        names.insert(0, node.target)
        node = node.args[0]
    if len(x.users) != 1:
        return [path], []
    leaves, containers = [], [path]
    for name in names:
        inner_leaves, inner_containers = _opened(block, f"{path}.{name}")
        leaves += inner_leaves
        containers += inner_containers
    return leaves, containers


def _linears(block: nn.Module, body: list[str]) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """(leaves, linears, containers) of a body, empty where it holds no nn.Linear that runs over an NHWC view."""
    leaves, linears, containers, view = [], [], [], "nhwc"
    for step in body:
        if step in ("nchw", "nhwc"):
            view = step
            leaves.append(step)
            continue
        inside, opened = _opened(block, step) if view == "nhwc" else ([step], [])
        found = [path for path in inside if unwrapped(type(child_at(block, path))) is nn.Linear]
        leaves += inside if found else [step]
        linears += found
        containers += opened if found else []
    plain = nn.Linear.forward.__qualname__ == "Linear.forward"
    return (tuple(leaves), tuple(linears), tuple(containers)) if linears and plain else ((), (), ())


def read_block(
    block: nn.Module, drop_paths: tuple[str, ...], inline: tuple[str, ...], in_place: bool
) -> tuple[BlockLayout, dict[str, tuple[str, str]]]:
    """The layout of a ConvNeXt block and, by op, (status, reason). Raises Unsupported where it is another computation.

    "linear" is among the ops where the block has such layers and this processor may run them faster as convolutions.

    shortcut(x) + drop_path(gamma * body(norm(conv(before(x))))), with conv depthwise; gamma, drop_path, shortcut and before
    are optional.
    """
    x, result = trace(block, inline)
    if not _is(result, _ADD) or len(result.args) != 2 or result.kwargs:
        raise Unsupported("its forward does not end in a residual sum")
    shortcut, node = result.args
    if not _is_shortcut(shortcut, x):
        shortcut, node = node, shortcut
    if not _is_shortcut(shortcut, x):
        raise Unsupported("its forward does not end in a sum with its input")
    steps: list[tuple] = []
    last = node
    while node is not x:
        last = node
        if len(node.users) != 1:  # by an operation in place, say
            raise Unsupported(f"the output of {node.target} is used twice")
        dims = _permutation(node)
        if node.op == "call_module" and len(node.args) == 1 and not node.kwargs:
            steps.append(("call", node.target))
            node = node.args[0]
        elif dims in (TO_NHWC, TO_NCHW):
            steps.append(("nhwc" if dims == TO_NHWC else "nchw", ""))
            node = node.args[0]
        elif _is(node, _MUL) and len(node.args) == 2:
            steps.append(("scale", node))
            node = next((a for a in node.args if isinstance(a, torch.fx.Node) and not _reads_parameter(a)), None)
        else:
            raise Unsupported(f"its forward holds {node.target!r}, which the fused block does not know")
        if not isinstance(node, torch.fx.Node):
            raise Unsupported("its forward is not one chain of operations")
    if not set(x.users) <= {last, shortcut, result}:
        raise Unsupported("its input is used otherwise too")
    steps.reverse()
    return _parse(block, steps, shortcut.target if shortcut is not x else "", drop_paths, inline, in_place)


def _is_shortcut(node, x) -> bool:
    return node is x or (isinstance(node, torch.fx.Node) and node.op == "call_module" and node.args == (x,) and not node.kwargs)


def _reads_parameter(node) -> bool:
    if _is(node, ("reshape", "view")):
        node = node.args[0]
    return node.op == "get_attr" or (node.op == "call_module" and str(node.target).startswith("parametrizations."))


def _parse(block, steps, shortcut, drop_paths, inline, in_place):
    chain = " > ".join(name if kind == "call" else kind for kind, name in steps)
    unknown = Unsupported(f"its forward is another computation: {chain}")
    layout, gamma, drop_path, calls, body = "nchw", "", "", [], []
    for kind, value in steps:
        if kind == "call" and value in drop_paths:
            drop_path = value
        elif (drop_path and kind in ("call", "scale")) or (gamma and kind == "call"):
            raise unknown
        elif kind == "call":
            calls.append((value, layout))
        elif kind == "scale":
            channels = next((c.out_channels for c in (child_at(block, p) for p, _ in calls) if isinstance(c, nn.Conv2d)), -1)
            found = [s for s in (_scale(a, block, channels) for a in value.args) if s]
            if gamma or len(found) != 1 or found[0][1] != layout:
                raise unknown
            gamma = found[0][0]
        elif kind == layout:
            raise unknown
        else:
            layout = kind
    before = []
    while calls and calls[0][1] == "nchw" and not isinstance(child_at(block, calls[0][0]), nn.Conv2d):
        before.append(calls.pop(0)[0])
        if any(getattr(m, "inplace", False) for m in child_at(block, before[-1]).modules()):
            raise Unsupported(f"{before[-1]} writes over the input, which the shortcut needs")
    if layout != "nchw" or len(calls) < 3 or calls[0][1] != "nchw":
        raise unknown
    (conv_path, _), (norm_path, norm_layout), *rest = calls
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

    leaves, linears, containers = _linears(block, body)
    if linears and _linear.PREFERS_CONVOLUTION:
        sites["linear"] = ("native", "as 1x1 convolutions where oneDNN beats MKL")

    def kinds(*paths: str) -> Kinds:
        return tuple((path, unwrapped(type(child_at(block, path)))) for path in paths if path)

    found = BlockLayout(
        before=tuple(before),
        conv=conv_path,
        norm=norm_path,
        norm_view=norm_layout,
        body=tuple(body),
        gamma=gamma,
        drop_path=drop_path,
        shortcut=shortcut,
        in_place=in_place,
        head_kinds=kinds(*inline, conv_path, norm_path),
        tail_kinds=kinds(*inline, drop_path),
        consumer_kinds=_consumers(block, rest[0][0]),
        leaves=leaves,
        linears=linears,
        linear_kinds=kinds(*containers, *linears),
    )
    return found, sites

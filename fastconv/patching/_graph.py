"""Reads the forward of a module as a symbolic graph. Nothing is executed and no child is entered: children are leaves."""

from __future__ import annotations

import operator
from typing import NamedTuple

import torch
import torch.fx
import torch.nn.functional as F
from torch import nn

TO_NHWC, TO_NCHW = (0, 2, 3, 1), (0, 3, 1, 2)
MASK = ".masked_fill"  # among the steps of a body: zeroes what the forward's second argument says; no child can have this name
VIEWS = ("nchw", "nhwc")
ADD = (operator.add, torch.add, "add")
MUL = (operator.mul, torch.mul, "mul")
PERMUTE = (torch.permute, "permute")


class Gate(NamedTuple):
    """A step of a body: x * interpolate(child(x), size of x, mode, align_corners=align_corners), of NCHW maps."""

    child: str
    mode: str
    align_corners: bool | None


Step = str | Gate  # a child, a view, MASK, or a gate


def is_child(step: Step) -> bool:
    return isinstance(step, str) and step not in VIEWS and step != MASK


class Unsupported(Exception):
    """The graph is not the computation looked for; the message is the reason that the report shows."""


class _Tracer(torch.fx.Tracer):
    def __init__(self, inline: tuple[str, ...]):
        super().__init__()
        self.inline = inline

    def is_leaf_module(self, m, module_qualified_name):
        return module_qualified_name not in self.inline


def trace(module: nn.Module, inline: tuple[str, ...] = ()) -> tuple[torch.fx.Node, torch.fx.Node]:
    """The only input and the result of the module's forward."""
    inputs, result = trace_inputs(module, inline)
    if len(inputs) != 1:
        raise Unsupported(f"its forward takes {len(inputs)} inputs")
    return inputs[0], result


def trace_inputs(module: nn.Module, inline: tuple[str, ...] = ()) -> tuple[list[torch.fx.Node], torch.fx.Node]:
    """The inputs and the result of the module's forward."""
    try:
        graph = _Tracer(inline).trace(module)
    except Exception as error:  # user code meets a symbolic value: any exception may come out
        raise Unsupported(f"its forward cannot be read symbolically ({type(error).__name__})") from None
    (output,) = (n for n in graph.nodes if n.op == "output")
    result = output.args[0]
    if not isinstance(result, torch.fx.Node):
        raise Unsupported("its forward does not return one tensor")
    return [n for n in graph.nodes if n.op == "placeholder"], result


def is_call(node, targets) -> bool:
    return isinstance(node, torch.fx.Node) and node.op in ("call_function", "call_method") and node.target in targets


def permutation(node) -> tuple[int, ...] | None:
    if not is_call(node, PERMUTE):
        return None
    dims = [*node.args[1:], *node.kwargs.values()]
    return tuple(dims[0]) if len(dims) == 1 and isinstance(dims[0], (tuple, list)) else tuple(dims)


def is_attribute(node, name: str) -> bool:
    """Whether a node reads this parameter of the root, parametrized or not."""
    if not isinstance(node, torch.fx.Node):
        return False
    return (node.op, node.target) in (("get_attr", name), ("call_module", f"parametrizations.{name}"))


def gate(product: torch.fx.Node) -> tuple[Gate, torch.fx.Node] | None:
    """The gate that a product is, and the node that it gates; None for any other."""
    for x, resized in (product.args, product.args[::-1]):
        if not is_call(resized, (F.interpolate,)) or len(resized.args) != 1:
            continue
        given = {"size": None, "mode": "nearest", "align_corners": None, **resized.kwargs}
        call, size = resized.args[0], given.pop("size")
        shape = size.args[0] if is_call(size, (operator.getitem,)) and size.args[1] == slice(2, None, None) else None
        if call.op != "call_module" or call.args != (x,) or call.kwargs or not is_call(shape, (getattr,)) or shape.args != (x, "shape"):
            continue
        others = {k: v for k, v in given.items() if v not in (None, False)}.keys() - {"mode", "align_corners"}
        once = all(len(n.users) == 1 for n in (resized, call, size, shape))
        if once and not others and set(x.users) == {product, call, shape}:
            return Gate(call.target, given["mode"], given["align_corners"]), x
    return None


def scale(node, block: nn.Module, C: int) -> tuple[str, str] | None:
    """(name, layout) of the per-channel parameter that a node reads: "nhwc" for (C,) or (1, 1, 1, C), "nchw" for (1, C, 1, 1) or
    (C, 1, 1)."""
    view = None
    if is_call(node, ("reshape", "view")):
        view, node = tuple(node.args[1:]), node.args[0]
        view = tuple(view[0]) if len(view) == 1 and isinstance(view[0], (tuple, list)) else view
    name = str(getattr(node, "target", "")).removeprefix("parametrizations.")
    if "." in name or not is_attribute(node, name):
        return None
    shape = view or tuple(getattr(block, name).shape)
    if shape in ((C,), (1, 1, 1, -1), (1, 1, 1, C)):
        return name, "nhwc"
    return (name, "nchw") if shape in ((1, -1, 1, 1), (1, C, 1, 1), (-1, 1, 1), (C, 1, 1)) else None

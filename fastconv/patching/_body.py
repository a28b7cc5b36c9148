"""What lies between the norm and the tail of a block, an MLP as a rule: which of its layers the fused ops replace."""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
import torch.fx
import torch.nn.functional as F
from torch import nn

from ..ops import _linear
from ._graph import ADD, MUL, VIEWS, Step, Unsupported, is_call, is_child, scale, trace
from ._module import Kinds, child_at, unwrapped

GRN, GELU_LINEAR = "global_response_norm", "gelu_linear"
_NORMS = {torch.norm: "p", "norm": "p", torch.linalg.vector_norm: "ord"}  # by the name of their second argument


@dataclass(frozen=True)
class Fusion:
    """Consecutive leaves, from `start` up to `stop`, that one op replaces."""

    op: str
    start: int
    stop: int
    view: str  # that the leaves take, "nchw" or "nhwc"
    gelu: str | None  # form of the GELU in front, "none" or "tanh"; None where the op begins without one
    path: str  # of the GRN, or of the linear layer or 1x1 convolution
    weight: str  # parameters of that child
    bias: str
    eps: float
    kinds: Kinds  # the leaves
    consumer_kinds: Kinds  # what casts a GRN's output to autocast's dtype, and what it passes unchanged; () if nothing does


@dataclass(frozen=True)
class Body:
    """Paths are relative to the block. "nchw" and "nhwc" among the steps switch the view, MASK zeroes what is masked, a Gate
    multiplies by what it says."""

    steps: tuple[Step, ...]  # children to call
    leaves: tuple[Step, ...]  # the same with containers opened; () if there is nothing to replace
    containers: Kinds  # those that were opened
    linears: tuple[str, ...]  # the leaves that are nn.Linear and take NHWC
    linear_kinds: Kinds
    fusions: tuple[Fusion, ...]


def read_body(block: nn.Module, steps: list[Step], inline: tuple[str, ...]) -> tuple[Body, dict[str, tuple[str, str]]]:
    """The body, and by op (status, reason) of the ops that it has a place for. `inline`: containers that the steps lie in."""
    leaves, containers, view, views = [], list(inline), "nhwc", []
    for step in steps:
        view = step if step in VIEWS else view
        inside, opened = _opened(block, step) if is_child(step) else ([step], [])
        known = any(isinstance(child_at(block, path), (nn.Linear, nn.Conv2d)) or _grn(child_at(block, path)) for path in inside if opened)
        leaves += inside if known else [step]
        containers += opened if known else []
        views += [view] * (len(leaves) - len(views))
    children = [child_at(block, leaf) if is_child(leaf) else None for leaf in leaves]
    fusions, sites = _fusions(leaves, children, views)
    linears = [n for n, c, v in zip(leaves, children, views) if v == "nhwc" and _pointwise(c, v)]

    def kinds(paths) -> Kinds:
        return tuple((path, unwrapped(type(child_at(block, path)))) for path in paths)

    if _linear.PREFERS_CONVOLUTION and set(linears) - {f.path for f in fusions if f.op == GELU_LINEAR}:
        sites["linear"] = ("native", "as 1x1 convolutions where oneDNN beats MKL")
    if not linears and not fusions:
        leaves, containers = [], []
    return Body(tuple(steps), tuple(leaves), kinds(containers), tuple(linears), kinds(linears), fusions), sites


def chain(module: nn.Module) -> list[str] | None:
    """The children that the module's forward calls one after another, where it does nothing else."""
    try:
        x, node = trace(module) if len(module._modules) else (None, None)
    except Unsupported:
        return None
    names = []
    while node is not x:
        if node.op != "call_module" or len(node.args) != 1 or node.kwargs or len(node.users) != 1:
            return None
        names.insert(0, node.target)
        node = node.args[0]
    return names if x is not None and len(x.users) == 1 else None


def _opened(block: nn.Module, path: str) -> tuple[list[str], list[str]]:
    """(leaves, containers) of a child that is a chain; ([path], []) for any other."""
    names = chain(child_at(block, path))
    if names is None:
        return [path], []
    leaves, containers = [], [path]
    for name in names:
        inner_leaves, inner_containers = _opened(block, f"{path}.{name}")
        leaves += inner_leaves
        containers += inner_containers
    return leaves, containers


def _fusions(leaves, children, views) -> tuple[tuple[Fusion, ...], dict[str, tuple[str, str]]]:
    fusions, sites = [], {}
    last = None  # the linear layer before
    for i, (leaf, child, view) in enumerate(zip(leaves, children, views)):
        grn = child is not None and _grn(child)
        pointwise = _pointwise(child, view)
        if not grn and not pointwise:
            if child is not None and _called_grn(child):
                sites[GRN] = ("declined", f"{leaf} ({type(child).__name__}) is not a global response norm that fastconv knows")
            continue
        start = next((j for j in range(i - 1, -1, -1) if not _identity(children[j])), -1)
        gelu = _gelu(children[start]) if start >= 0 else None
        start = i if gelu is None else start
        kinds = tuple((leaves[j], unwrapped(type(children[j]))) for j in range(start, i + 1))
        if grn:
            weight, bias, eps, layout = grn
            if layout == view:
                consumers = _consumers(leaves, children, views, i)
                fusions.append(Fusion(GRN, start, i + 1, view, gelu, leaf, weight, bias, eps, kinds, consumers))
                sites.setdefault(GRN, ("fused", ""))
            else:
                sites[GRN] = ("declined", f"{leaf} ({type(child).__name__}) does not take the {view.upper()} maps that it gets")
            continue
        if gelu is not None:
            fusions.append(Fusion(GELU_LINEAR, start, i + 1, view, gelu, leaf, "weight", "bias", 0.0, kinds, ()))
            sites.setdefault(GELU_LINEAR, ("fused", ""))
        elif last is not None:
            reason = _between(leaves[last + 1 : i], children[last + 1 : i], leaf)
            if reason:
                sites[GELU_LINEAR] = ("declined", reason)
        last = i
    return tuple(f for f in fusions if sites[f.op][0] == "fused"), sites


def _between(leaves, children, linear: str) -> str:
    """Why what lies between two linear layers is not a GELU alone, or "" where another op, or none, has its place there."""
    found = [(n, c) for n, c in zip(leaves, children) if not _identity(c)]
    if not found or any(c is not None and (_grn(c) or _called_grn(c)) for _, c in found):
        return ""
    if any(c is not None and _gelu(c) for _, c in found):
        name, child = next((n, c) for n, c in found if c is None or not _gelu(c))
        kind = "a mask or a gate" if child is None else f"{name} ({type(child).__name__})"
        return f"{kind} lies beside the GELU before {linear}"
    name, child = found[0]
    return f"the activation before {linear} is no GELU: {name} ({type(child).__name__})" if child is not None else ""


def _identity(child: nn.Module | None) -> bool:
    kind = None if child is None else unwrapped(type(child))
    return kind is nn.Identity or (kind is nn.Dropout and child.p == 0)


def _gelu(child: nn.Module | None) -> str | None:
    """The form of a child that is GELU, "none" or "tanh"; None for any other."""
    if child is None or len(child._parameters) or len(child._modules) or isinstance(child, (nn.Dropout, nn.Identity)):
        return None
    try:
        x, node = trace(child)
    except Unsupported:
        return None
    if not is_call(node, (F.gelu,)) or node.args != (x,) or set(x.users) != {node}:
        return None
    return node.kwargs.get("approximate", "none")


def _pointwise(child: nn.Module | None, view: str) -> bool:
    """Whether a child is a linear layer over the channels."""
    kind = None if child is None else unwrapped(type(child))
    if view == "nhwc":
        return kind is nn.Linear and nn.Linear.forward.__qualname__ == "Linear.forward"
    if kind is not nn.Conv2d or nn.Conv2d.forward.__qualname__ != "Conv2d.forward":
        return False
    return (child.kernel_size, child.stride, child.groups) == ((1, 1), (1, 1), 1) and child.padding in ((0, 0), "same", "valid")


def _consumers(leaves, children, views, i: int) -> Kinds:
    """The leaves through which the output of leaf i reaches a linear layer, () where it reaches anything else first."""
    found = []
    for leaf, child, view in list(zip(leaves, children, views))[i + 1 :]:
        if child is not None:
            found.append((leaf, unwrapped(type(child))))
        if _pointwise(child, view):
            return tuple(found)
        if not _identity(child):
            break
    return ()


def _called_grn(child: nn.Module) -> bool:
    return any(part in type(child).__name__ for part in ("GRN", "ResponseNorm"))


def _grn(module: nn.Module) -> tuple[str, str, float, str] | None:
    """(weight, bias, eps, layout) of a module that computes x + weight * x * g / (mean(g) + eps) + bias with g = ||x|| over the
    map of each image and channel; None for any other."""
    if len([p for p in module._parameters.values() if p is not None]) != 2 and "parametrizations" not in module._modules:
        return None
    try:
        return _read_grn(module)
    except Unsupported:
        return None


def _read_grn(module: nn.Module) -> tuple[str, str, float, str] | None:
    x, result = trace(module)
    terms = _terms(result)
    if len(terms) != 3 or [x] not in terms:
        return None
    terms.remove([x])
    (bias,), product = sorted(terms, key=len)
    if len(product) != 3 or x not in product:
        return None
    product.remove(x)
    ratio = next((f for f in product if is_call(f, (operator.truediv, torch.div, "div")) and not f.kwargs), None)
    if ratio is None:
        return None
    product.remove(ratio)
    g, denominator = ratio.args
    if not is_call(denominator, ADD) or denominator.kwargs:
        return None
    mean, eps = denominator.args
    dims = _reduced(g, x, _NORMS)
    channel = _reduced(mean, g, {torch.mean: "", "mean": ""})
    layout = {((1, 2), (3,)): "nhwc", ((2, 3), (1,)): "nchw"}.get((dims, channel))
    C = next(module.parameters()).numel()
    parameters = [scale(node, module, C) for node in (product[0], bias)]
    steps = {n for n in x.graph.nodes if n.op in ("call_function", "call_method")}
    if layout is None or not isinstance(eps, float) or None in parameters or not steps <= _ancestors(result):
        return None
    (weight, weight_layout), (bias, bias_layout) = parameters
    return (weight, bias, eps, layout) if weight_layout == bias_layout == layout else None


def _terms(node) -> list[list]:
    """A sum of products as a list of lists of factors."""
    if is_call(node, ADD) and len(node.args) == 2 and not node.kwargs:
        return _terms(node.args[0]) + _terms(node.args[1])
    if is_call(node, (torch.addcmul, "addcmul")) and len(node.args) == 3 and not node.kwargs:
        return [*_terms(node.args[0]), _factors(node.args[1]) + _factors(node.args[2])]
    return [_factors(node)]


def _factors(node) -> list:
    return [f for a in node.args for f in _factors(a)] if is_call(node, MUL) and len(node.args) == 2 and not node.kwargs else [node]


def _reduced(node, source, functions: dict) -> tuple[int, ...] | None:
    """The dimensions, of four, over which one of these reductions takes `source`, as a 2-norm where it is a norm; None for another."""
    if not is_call(node, functions) or not node.args or node.args[0] is not source:
        return None
    order = functions[node.target]
    names = ("input", order, "dim", "keepdim") if order else ("input", "dim", "keepdim")
    given = {"ord": 2} if order == "ord" else {}
    given.update(zip(names, node.args), **node.kwargs)
    dim = given.pop("dim", None)
    given = {name: value for name, value in given.items() if value is not None}  # out and dtype
    if dim is None or given != {"input": source, "keepdim": True, **({order: 2} if order else {})}:
        return None
    return tuple(sorted(d % 4 for d in (dim if isinstance(dim, (tuple, list)) else (dim,))))


def _ancestors(node: torch.fx.Node) -> set[torch.fx.Node]:
    found, left = set(), [node]
    while left:
        found.add(left[-1])
        left += [n for n in left.pop().all_input_nodes if n not in found]
    return found

"""`patch` and its kin: swap the fused ops into a model that somebody else wrote, in place, and take them out again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from torch import nn

from ..ops._registry import REROUTED
from . import _block, grouped, huggingface, mlp, official, squeeze_excite, timm, torchvision, window_attention
from ._module import FastModule, Plan, current_fast_class, fast_class, make_sites, patchable_class, rebased, sites_of
from ._report import NOT_PATCHED, Report, Site, Warned, _sites
from ._rule import Rule
from ._verify import Verification, verify

__all__ = ["Report", "Site", "Verification", "patch", "report", "unpatch", "verify"]

OPS = (*_block.OPS, squeeze_excite.OP, window_attention.OP, grouped.OP)
LIBRARIES = (timm, torchvision, huggingface, squeeze_excite, official, window_attention, mlp, grouped)
RULES: tuple[Rule, ...] = tuple(rule for library in LIBRARIES for rule in library.RULES)  # the first that matches


def _requested(ops: str | Iterable[str]) -> frozenset[str]:
    names = OPS if ops == "auto" else (ops,) if isinstance(ops, str) else tuple(ops)
    unknown = [n for n in names if n not in OPS]
    if unknown:
        raise ValueError(f'patch: ops must be "auto" or among {", ".join(OPS)}, got {", ".join(map(repr, unknown))}')
    return frozenset(names)


def patch(
    model: nn.Module,
    ops: str | Iterable[str] = "auto",
    strict: bool = False,
    filter_fn: Callable[[str, nn.Module], bool] | None = None,
) -> Report:
    """Make every block that fastconv knows run its fused ops, in place. The model keeps all that is the user's: parameters
    and their names, hooks, random streams, dtypes under autocast, memory format, class names, checkpoints.

    Args:
        model: any module. Patch again in every process that unpickles the model: a saved model is a plain one.
        ops: "auto" for all, or names: "depthwise_conv_norm", "residual_scale", "global_response_norm", "gelu_linear",
            "linear", "squeeze_excite", "window_attention", "grouped_conv". A later call decides anew for the blocks that it
            covers.
        strict: raise RuntimeError, changing nothing, where a block that fastconv recognises cannot be fused or none is
            recognised, and later where a call cannot be.
        filter_fn: only blocks for which filter_fn(name, module) is true.

    Returns:
        The Report of what runs fused and of what does not and why. Calls that fall back at run time, because of a shape,
        a dtype, a device or a hook put in later, run the original code; the report counts them (outside torch.compile)
        and a RuntimeWarning names each reason once.

    Raises:
        ValueError: an unknown op. RuntimeError: see strict.
    """
    requested = _requested(ops)
    warned = Warned()
    sites: list[Site] = []
    swaps: list[tuple[nn.Module, type, dict[str, Site] | None]] = []
    memo: dict = {}
    for name, module, rule in _recognised(model):
        if rule is None or (filter_fn is not None and not filter_fn(name, module)):
            continue
        current = current_fast_class(module)
        if current is not None and (current._fastconv.requested, current._fastconv.strict) == (requested, strict):
            sites += _named(name, sites_of(module).values())
            continue
        base = patchable_class(type(module)) if current is None else current._fastconv.base
        kind = type(module)
        try:
            if current is not None:  # what it computes is to be read from its own forward
                module.__class__ = rebased(kind, current, base, memo)
            layout, inspected = rule.inspect(module)
        finally:
            module.__class__ = kind
        rows = tuple((op, *inspected[op]) for op in OPS if op in requested and op in inspected)
        new = make_sites(name, module, rows, warned)
        sites += new.values()
        active = any(status == "fused" or op in REROUTED for op, status, _ in rows)
        target = fast_class(rule.mixin, Plan(base, requested, strict, rows, layout)) if active else base
        swaps.append((module, rebased(kind, current or base, target, memo), new))
    result = Report(sites)
    if strict and (result.declined or not sites):
        lines = "\n".join(f"  {s.name} ({s.type}): {s.op}: {s.reason}" for s in result.declined) or "  no block was recognised"
        raise RuntimeError(f"fastconv.patch(strict=True): not every block can be fused, nothing was changed:\n{lines}")
    for module, kind, new in swaps:
        module.__class__ = kind
        _sites[module] = new
    return result


def unpatch(model: nn.Module) -> nn.Module:
    """Give every patched module its own class back. Returns the model.

    Raises RuntimeError, changing nothing, where a class that fastconv cannot rebuild was put above the patched one.
    """
    memo: dict = {}
    swaps = []
    for module in model.modules():
        current = current_fast_class(module)
        if current is not None:
            swaps.append((module, rebased(type(module), current, current._fastconv.base, memo)))
    for module, kind in swaps:
        module.__class__ = kind
    for module in model.modules():
        _sites.pop(module, None)
    return model


def report(model: nn.Module) -> Report:
    """The Report of a model as it is now: patched or not, a copy, or loaded from a file."""
    sites: list[Site] = []
    for name, module, rule in _recognised(model):
        if module in _sites or current_fast_class(module) is not None:
            found = sites_of(module) if isinstance(module, FastModule) else _sites[module]
            sites += _named(name, found.values())
            continue
        _, inspected = rule.inspect(module)
        rows = [(op, "declined", reason if status == "declined" else NOT_PATCHED) for op, (status, reason) in inspected.items()]
        sites += make_sites(name, module, rows, Warned()).values()
    return Report(sites)


def _recognised(model: nn.Module) -> Iterator[tuple[str, nn.Module, Rule | None]]:
    """(name, module, rule) of every module that a rule knows or that is patched already."""
    blocks: tuple[str, ...] = ()
    for name, module in model.named_modules():
        rule = next((rule for rule in RULES if rule.matches(module)), None)
        if rule is None and module not in _sites and current_fast_class(module) is None:
            continue
        if rule is not None and not rule.inside_blocks and blocks and name.startswith(blocks):
            continue
        if isinstance(rule, _block.BlockRule):
            blocks += (f"{name}." if name else "",)
        yield name, module, rule


def _named(name: str, sites: Iterable[Site]) -> list[Site]:
    """These sites under the path that they have in the model asked about; the live ones where it is theirs."""
    return [site if site.name == name else replace(site, name=name) for site in sites]

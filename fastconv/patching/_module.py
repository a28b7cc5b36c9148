"""How a module is patched: its `__class__` becomes a subclass that keeps its name, and can be taken back exactly."""

from __future__ import annotations

import copy
import copyreg
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn.modules import module as _torch_module
from torch.nn.utils.parametrize import is_parametrized

from ..ops import Choice, select
from ._report import ASKED_FOR, Site, Warned, _sites, record

# Classes that torch itself puts above a module's class, per instance (parametrizations) or per class (FSDP2, replicate).
_WRAPPERS = ("torch.nn.utils.parametrize", "torch.distributed.")
PLAIN = (torch.Tensor, torch.nn.Parameter)


Kinds = tuple[tuple[str, type], ...]  # paths of children and the classes that they had at patch time


@dataclass(frozen=True)
class Plan:
    """What a patched class does: equal plans share one class, so that torch.compile sees one type."""

    base: type
    requested: frozenset[str]
    strict: bool
    sites: tuple[tuple[str, str, str], ...]  # op, status, reason
    layout: Any  # what the mixin's forward needs to know about the class; hashable


class FastModule:
    """Mixin of every patched class: what copying, saving and replicating must keep. `_fastconv` is its Plan."""

    _fastconv: Plan

    def __deepcopy__(self, memo):
        inherited = getattr(super(), "__deepcopy__", None)
        if inherited is not None:
            replica = inherited(memo)
        else:
            replica = memo[id(self)] = self.__new__(type(self))
            if is_parametrized(self):  # torch forbids its __getstate__
                state = {k: v for k, v in self.__dict__.items() if k != "_compiled_call_impl"}
            else:
                state = super().__reduce_ex__(4)[2]
            replica.__setstate__(copy.deepcopy(state, memo))
        _sites[replica] = {
            op: replace(site, backend="-", why="", fallbacks=type(site.fallbacks)(), copies=0, warned=copy.deepcopy(site.warned, memo))
            for op, site in sites_of(self).items()
        }
        return replica

    def __reduce_ex__(self, protocol):
        """Save the original class: a checkpoint of the whole model must load where fastconv is not installed."""
        reduced = super().__reduce_ex__(protocol)
        if "_fastconv" not in vars(type(self)):
            return reduced
        make, args, *rest = reduced
        if make is copyreg.__newobj__:  # pickle insists that its class be the object's own
            return (copyreg._reconstructor, (self._fastconv.base, object, None), *rest)
        return (make, tuple(self._fastconv.base if a is type(self) else a for a in args), *rest)

    def _replicate_for_data_parallel(self):
        replica = super()._replicate_for_data_parallel()
        _sites[replica] = sites_of(self)
        return replica


def sites_of(module: FastModule) -> dict[str, Site]:
    """The sites of a patched module; made afresh for one that was copied in a way that fastconv does not see."""
    sites = _sites.get(module)
    if sites is None:
        sites = _sites[module] = make_sites("", module, module._fastconv.sites, Warned())
    return sites


def make_sites(name: str, module: torch.nn.Module, sites: Iterable[tuple[str, str, str]], warned: Warned) -> dict[str, Site]:
    return {op: Site(name, type(module).__name__, op, status, reason, warned=warned) for op, status, reason in sites}


def choose(module: FastModule, op: str, reason: str, *tensors: torch.Tensor | None) -> bool:
    """Whether `op` runs fused in this call. Counts and warns where it does not, or raises under strict=True."""
    return backend_of(module, op, reason, *tensors) != "eager"


def backend_of(module: FastModule, op: str, reason: str, *tensors: torch.Tensor | None) -> str:
    """As `choose`: what runs, "eager" for the original code, "native" where that is the faster one."""
    if (op, "fused", "") not in module._fastconv.sites:
        return "eager"
    choice = Choice("eager", reason) if reason else select(op, *tensors)
    return settle(module, op, choice)


def settle(module: FastModule, op: str, choice: Choice) -> str:
    """Count, warn or raise as `choose` does, for a choice that is made already; its backend."""
    plan = module._fastconv
    if not torch.compiler.is_compiling():  # a counter would recompile every call, a warning would break the graph
        record(sites_of(module)[op], choice)
    if plan.strict and choice.backend == "eager" and choice.reason not in ASKED_FOR:
        raise RuntimeError(f"fastconv.patch(strict=True): {op} in {plan.base.__name__} cannot run fused: {choice.reason}")
    return choice.backend


def unwrapped(kind: type) -> type:
    """The class below the one that `parametrize` puts above it."""
    return kind.__bases__[0] if kind.__module__ == _WRAPPERS[0] else kind


def hooked(module: torch.nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)


def globally_hooked() -> bool:
    m = _torch_module
    return bool(m._global_forward_hooks or m._global_forward_pre_hooks or m._global_backward_hooks or m._global_backward_pre_hooks)


def child_at(module: torch.nn.Module, path: str) -> torch.nn.Module:
    for part in path.split("."):
        module = module._modules.get(part) or getattr(module, part)  # the latter is a function in Python
    return module


def bypass_reason(module: torch.nn.Module, kinds: Kinds) -> str:
    """Why the calls of these children may not be bypassed, or ""."""
    if globally_hooked():
        return "a global module hook is registered"
    for name, kind in kinds:
        child = child_at(module, name)
        if type(child) is not kind and unwrapped(type(child)) is not kind:
            return f"{name} is a {type(child).__name__}, not a {kind.__name__}"
        if "forward" in child.__dict__:
            return f"the forward of {name} is replaced on the instance"
        if hooked(child):
            return f"a hook sits on {name}"
        if child._compiled_call_impl is not None:
            return f"{name} is compiled on its own"
    return ""


_classes: dict[tuple[type, Plan], type] = {}


def fast_class(mixin: type, plan: Plan) -> type:
    """The subclass of plan.base that runs the plan: one for all modules with equal plans."""
    if (mixin, plan) not in _classes:
        base = plan.base
        namespace = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__, "_fastconv": plan}
        _classes[mixin, plan] = type(base)(base.__name__, (mixin, base), namespace)
    return _classes[mixin, plan]


def patchable_class(kind: type) -> type:
    """The class to build on: below whatever torch put above it."""
    while kind.__module__.startswith(_WRAPPERS):
        kind = kind.__bases__[-1]
    return kind


def current_fast_class(module: torch.nn.Module) -> type | None:
    return next((c for c in type(module).__mro__ if "_fastconv" in vars(c)), None)


def rebased(kind: type, old: type, new: type, memo: dict) -> type:
    """`kind` with `old` exchanged for `new` below the classes that torch put above it."""
    if old is new:
        return kind
    if kind is old:
        return new
    if (kind, new) not in memo:
        if not kind.__module__.startswith(_WRAPPERS):
            raise RuntimeError(
                f"fastconv: {kind.__module__}.{kind.__qualname__} was put above the patched class {old.__name__} and cannot be rebuilt; "
                "undo it before fastconv.unpatch(model)"
            )
        bases = tuple(rebased(b, old, new, memo) if issubclass(b, old) else b for b in kind.__bases__)
        namespace = {k: v for k, v in vars(kind).items() if k not in ("__dict__", "__weakref__")}
        memo[kind, new] = type(kind)(kind.__name__, bases, namespace)
    return memo[kind, new]

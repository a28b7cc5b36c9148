"""Lets fastconv.ops run the simulated kernels: inside `simulated()` backend "cuda" can be forced on CPU tensors.

The library registers its raw ops under the CPU dispatch key of a namespace of their own; above them everything is the
real thing: hub, autograd.Function, patched models.
"""

from __future__ import annotations

import contextlib
import pathlib

import torch

from fastconv.ops import _registry
from fastconv.ops._registry import OPS, hub

from . import build
from .control import Simulator

NAMESPACE = "fastconv_simt"
_loaded: dict[pathlib.Path, Simulator] = {}
_definitions: list[torch.library.Library] = []


def load(path: pathlib.Path | None = None) -> Simulator:
    """Register the ops of a library of build.ops(), by default of the kernels as they are: of one library in a process."""
    if path is None:
        path = next(iter(_loaded), None) or build.ops()
    if path not in _loaded:
        if _loaded:
            raise RuntimeError(f"{next(iter(_loaded))} is loaded; another library of simulated ops needs another process")
        definitions = torch.library.Library(NAMESPACE, "FRAGMENT")
        for op in (op for op, backends in OPS.items() if "cuda" in backends):
            for name, schema in hub(op).SCHEMAS.items():
                definitions.define(name + schema)
                fake = getattr(hub(op), name.replace(op, "_fake"))
                torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=definitions)
        torch.ops.load_library(str(path))
        _definitions.append(definitions)
        _loaded[path] = Simulator(path)
    return _loaded[path]


@contextlib.contextmanager
def simulated(path: pathlib.Path | None = None):
    """Inside: `use_backend("cuda")` runs the simulated kernels on CPU tensors. Yields the Simulator."""
    simulator = load(path)
    real = _registry.missing

    def missing(op, backend, device, dtypes):
        if backend != "cuda" or torch.device(device).type != "cpu" or "cuda" not in OPS[op]:
            return real(op, backend, device, dtypes)
        return real(op, backend, "cuda", dtypes) if torch.float64 in dtypes else ""

    before = dict(_registry.NAMESPACES)
    _registry.NAMESPACES["cuda"] = NAMESPACE
    _registry.missing = missing
    try:
        yield simulator
    finally:
        _registry.NAMESPACES.clear()
        _registry.NAMESPACES.update(before)
        _registry.missing = real

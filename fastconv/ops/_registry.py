"""Which backend runs an op, and why: a fixed order of pure predicates, no try/except.

A backend is a family of kernels behind one raw op schema. Each raw op is defined once per dispatcher
namespace: `fastconv` holds the compiled kernels (the dispatcher picks CPU or CUDA by device) and
`fastconv_triton` the Triton ones. `eager` is the hub's reference() and has no raw op.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch.utils.flop_counter import register_flop_formula

from fastconv import _library

NAMESPACES = {"cpu": "fastconv", "cuda": "fastconv", "triton": "fastconv_triton"}
BACKENDS = ("cpu", "cuda", "triton", "eager")
ORDER = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}  # by device type; eager closes every order
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
OPS: dict[str, tuple[str, ...]] = {}  # op -> the backends that it has kernels for
REROUTED = ("linear",)  # no ops of ours: `patch` hands these to another kernel of torch where that is the faster one

TRANSFORM = "a torch.func transform is active"

_libraries: dict[str, torch.library.Library] = {}
_state: dict = {"forced": os.environ.get("FASTCONV_BACKEND") or None, "disabled": False}
_disabled_ops = frozenset(filter(None, os.environ.get("FASTCONV_DISABLE", "").replace(" ", "").split(",")))
_has_triton = importlib.util.find_spec("triton") is not None
_interpreting = os.environ.get("TRITON_INTERPRET") == "1"


def check_environment() -> None:
    """Called once every op is defined: a misspelt switch must not pass for an obeyed one."""
    if _state["forced"] not in (None, *BACKENDS):
        raise ValueError(f"FASTCONV_BACKEND must be one of {', '.join(BACKENDS)}, got {_state['forced']!r}")
    known = {*OPS, *REROUTED}
    for op in sorted(_disabled_ops - known):
        raise ValueError(f"FASTCONV_DISABLE must list ops out of {', '.join(sorted(known))}, got {op!r}")


class Choice(NamedTuple):
    """The backend that runs a call; `reason` says why a faster one does not ("" when none was passed over)."""

    backend: str
    reason: str = ""


def define(op: str, schemas: dict[str, str], fakes: dict[str, Callable], flops: dict[str, Callable], backends: tuple[str, ...]) -> None:
    """Register the raw ops of one hub: schema, fake kernel and FLOP formula, in every namespace that has kernels."""
    OPS[op] = backends
    for namespace in sorted({NAMESPACES[b] for b in backends}):
        if namespace not in _libraries:
            _libraries[namespace] = torch.library.Library(namespace, "FRAGMENT")
        library = _libraries[namespace]
        for name, schema in schemas.items():
            library.define(name + schema)
            torch.library.register_fake(f"{namespace}::{name}", fakes[name], lib=library)
            overload = getattr(getattr(torch.ops, namespace), name)
            register_flop_formula(overload)(flops[name])
            if namespace == "fastconv_triton":
                kernel = _triton_kernel(op, name)
                for key in ("CUDA", "CPU"):  # CPU: Triton's interpreter, for tests
                    library.impl(name, kernel, key)


def _triton_kernel(op: str, name: str) -> Callable:
    """Import the Triton module at the first call: `import fastconv` must not import triton."""

    def call(*args):
        return getattr(importlib.import_module(f"fastconv.triton_kernels.{op}"), name.removeprefix(op + "_"))(*args)

    return call


def hub(op: str):
    """The module of an op: its check, reference, schemas and Function."""
    return importlib.import_module(f"fastconv.ops.{op}")


def raw(name: str, backend: str):
    """The raw op `name` (such as "depthwise_conv_fwd") of a backend."""
    return getattr(getattr(torch.ops, NAMESPACES[backend]), name).default


def triton_missing() -> str:
    """Why Triton cannot be used in this process, or ""."""
    if not _has_triton:
        return "triton is not installed (pip install triton)"
    if torch.version.hip is not None and _state["forced"] != "triton":
        return "Triton on ROCm is untested: force it with fastconv.use_backend('triton')"
    return ""


def missing(op: str, backend: str, device: str, dtypes: tuple[torch.dtype, ...]) -> str:
    """Why `backend` cannot run `op` on this device type and these dtypes, or ""."""
    if backend not in OPS[op]:
        return f"{op} has no {backend} kernel"
    if backend == "cpu":
        return _library.cpu_missing if device == "cpu" else f"the cpu kernels need CPU tensors, got {device}"
    if backend == "cuda":
        return "the CUDA C++ kernels are not built"
    if device != "cuda" and not (device == "cpu" and _interpreting):
        return f"Triton needs CUDA tensors, got {device}"
    if torch.float64 in dtypes:
        return "float64: the Triton kernels accumulate in float32"
    return triton_missing()


def switched_off(op: str) -> str:
    """What has `op` run the original code in this call, whatever its tensors are, or "": a switch of the user's, a transform."""
    if _state["disabled"]:
        return "fastconv.disabled()"
    if op in _disabled_ops:
        return "FASTCONV_DISABLE"
    if torch._C._are_functorch_transforms_active():
        return TRANSFORM
    return "forced" if _state["forced"] == "eager" else ""


def select(op: str, *tensors: torch.Tensor | None) -> Choice:
    """The backend for a call of `op` on these tensors, and the reason where it is eager.

    Raises RuntimeError where `use_backend` or FASTCONV_BACKEND names a backend that cannot run the call.
    """
    given = [t for t in tensors if t is not None]
    device = given[0].device.type
    dtypes = tuple(t.dtype for t in given)
    reason = switched_off(op)
    if reason:
        return Choice("eager", reason)
    forced = _state["forced"]
    if forced is not None:
        reason = missing(op, forced, device, dtypes)
        if reason:
            raise RuntimeError(f"{op}: backend {forced!r} was asked for and cannot run: {reason}")
        return Choice(forced)
    reasons = []
    for backend in ORDER.get(device, ()):
        if backend not in OPS[op]:
            continue
        reason = missing(op, backend, device, dtypes)
        if not reason:
            return Choice(backend)
        reasons.append(f"{backend}: {reason}")
    return Choice("eager", "; ".join(reasons) or f"no kernels for device type {device}")


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Force every op of this process onto one backend ("cpu", "triton", "eager"; None: automatic) inside the block.

    A call that the backend cannot run raises RuntimeError instead of falling back.
    """
    if name is not None and name not in BACKENDS:
        raise ValueError(f"use_backend: name must be one of {', '.join(BACKENDS)} or None, got {name!r}")
    before, _state["forced"] = _state["forced"], name
    try:
        yield
    finally:
        _state["forced"] = before


@contextlib.contextmanager
def disabled() -> Iterator[None]:
    """Run original code everywhere inside the block: patched modules their own forward, ops their eager reference.

    Process-wide. Use it around whatever needs second derivatives.
    """
    before, _state["disabled"] = _state["disabled"], True
    try:
        yield
    finally:
        _state["disabled"] = before


def is_disabled() -> bool:
    return _state["disabled"]

"""Which backend runs an op, and why: a fixed order of pure predicates, no try/except.

A backend is a family of kernels behind one raw op schema; `_definition.py` holds those.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from typing import NamedTuple

import torch

from fastconv import _library

from ._definition import MIN_CPU_ELEMENTS, NAMESPACES, OPS, define, hub, raw

__all__ = ["BACKENDS", "NAMESPACES", "OPS", "Choice", "define", "disabled", "hub", "missing", "raw", "select", "use_backend"]

BACKENDS = ("cpu", "cuda", "triton", "eager")
ORDER = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}  # by device type; eager closes every order
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
REROUTED = ("linear",)  # no ops of ours: `patch` hands these to another kernel of torch where that is the faster one

TRANSFORM = "a torch.func transform is active"

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
    """The backend that runs a call; `reason` says why a faster one does not ("" when none was passed over), or of an op that
    chooses between ours and torch's by a table what that says.

    Beside the names of BACKENDS: "native", torch's own operators, where they are the fastest.
    """

    backend: str
    reason: str = ""


_CPU = Choice("cpu")
_NATIVE = Choice("native")


def triton_missing() -> str:
    """Why Triton cannot be used in this process, or ""."""
    if not _has_triton:
        return "triton is not installed (pip install triton)"
    if torch.version.hip is not None and _state["forced"] != "triton":
        return "Triton on ROCm is untested: force it with fastconv.use_backend('triton')"
    return ""


def cuda_missing(device: torch.device | str) -> str:
    """Why the CUDA C++ kernels cannot run on this device, or ""."""
    if _library.cuda_missing or not torch.cuda.is_initialized():  # before that there is no CUDA tensor
        return _library.cuda_missing
    gpu = torch.cuda.get_device_properties(device)  # unlike get_device_capability a constant to torch.compile
    return "" if gpu.major >= 8 else f"the CUDA C++ kernels need compute capability 8.0, the GPU has {gpu.major}.{gpu.minor}"


def missing(op: str, backend: str, device: torch.device | str, dtypes: tuple[torch.dtype, ...]) -> str:
    """Why `backend` cannot run `op` on this device and these dtypes, or ""."""
    if backend not in OPS[op]:
        return f"{op} has no {backend} kernel"
    kind = torch.device(device).type
    if backend == "cpu":
        return _library.cpu_missing if kind == "cpu" else f"the cpu kernels need CPU tensors, got {kind}"
    if backend == "cuda":
        if kind != "cuda":
            return f"the CUDA C++ kernels need CUDA tensors, got {kind}"
        if torch.float64 in dtypes:
            return "float64: the CUDA C++ kernels accumulate in float32"
        return cuda_missing(device)
    if kind != "cuda" and not (kind == "cpu" and _interpreting):
        return f"Triton needs CUDA tensors, got {kind}"
    if torch.float64 in dtypes:
        return "float64: the Triton kernels accumulate in float32"
    return triton_missing()


def _native_is_faster(op: str, tensors) -> bool:
    small = tensors[0].numel() < MIN_CPU_ELEMENTS[op]
    return small and all(t is None or t.dtype == torch.float32 for t in tensors)


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
    reason = switched_off(op)
    if reason:
        return Choice("eager", reason)
    device, forced = tensors[0].device, _state["forced"]
    if device.type == "cpu" and forced is None and not _library.cpu_missing and ORDER["cpu"][0] == "cpu" and "cpu" in OPS[op]:
        # what the general case below comes to, sooner
        return _NATIVE if _native_is_faster(op, tensors) else _CPU
    dtypes = tuple(t.dtype for t in tensors if t is not None)
    if forced is not None:
        reason = missing(op, forced, device, dtypes)
        if reason:
            raise RuntimeError(f"{op}: backend {forced!r} was asked for and cannot run: {reason}")
        return Choice(forced)
    reasons = []
    for backend in ORDER.get(device.type, ()):
        if backend not in OPS[op]:
            continue
        reason = missing(op, backend, device, dtypes)
        if not reason:
            return Choice(backend)
        reasons.append(f"{backend}: {reason}")
    return Choice("eager", "; ".join(reasons) or f"no kernels for device type {device.type}")


def unable(op: str, backend: str, reason: str) -> str:
    """What runs a call whose sizes the selected backend does not take: eager. Raises RuntimeError where the backend is forced."""
    if _state["forced"] == backend:
        raise RuntimeError(f"{op}: backend {backend!r} was asked for and cannot run: {reason}")
    return "eager"


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Force every op of this process onto one backend ("cpu", "cuda", "triton", "eager"; None: automatic) inside the block.

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


def is_forced() -> bool:
    """Whether `use_backend` or FASTCONV_BACKEND names a backend."""
    return _state["forced"] is not None


def is_disabled() -> bool:
    return _state["disabled"]

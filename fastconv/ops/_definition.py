"""Defines the raw ops of a hub, and finds them and the hub again by name.

Each raw op is defined once per dispatcher namespace: `fastconv` holds the compiled kernels (the dispatcher picks CPU or
CUDA by device) and `fastconv_triton` the Triton ones. `eager` is the hub's reference() and has no raw op.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
from torch.utils.flop_counter import register_flop_formula

NAMESPACES = {"cpu": "fastconv", "cuda": "fastconv", "triton": "fastconv_triton"}
OPS: dict[str, tuple[str, ...]] = {}  # op -> the backends that it has kernels for
MIN_CPU_ELEMENTS: dict[str, int] = {}  # op -> see define()

_libraries: dict[str, torch.library.Library] = {}


def define(
    op: str,
    schemas: dict[str, str],
    fakes: dict[str, Callable],
    flops: dict[str, Callable],
    backends: tuple[str, ...],
    min_cpu_elements: int = 0,
) -> None:
    """Register the raw ops of one hub: schema, fake kernel and FLOP formula, in every namespace that has kernels.

    On float32 tensors of fewer than min_cpu_elements torch's own CPU kernels are faster: there the choice is "native".
    """
    OPS[op], MIN_CPU_ELEMENTS[op] = backends, min_cpu_elements
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

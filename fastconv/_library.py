"""Loads the compiled libraries that this installation has, and records why one is missing."""

from __future__ import annotations

import importlib.util
import pathlib

import torch

_here = pathlib.Path(__file__).parent
_cpu_library = _here / "_ops_cpu.so"


def _load_cpu() -> str:
    if not _cpu_library.exists():
        return "the CPU library is not built (install a C++ compiler, then reinstall fastconv)"
    if importlib.util.find_spec("fastconv._C") is None:
        return "fastconv._C is not built (install a C++ compiler, then reinstall fastconv)"
    try:
        torch.ops.load_library(str(_cpu_library))
    except OSError as error:  # reported by `fastconv doctor` and by every fallback, never swallowed
        return f"the CPU library does not load: {error}"
    return ""


cpu_missing: str = _load_cpu()

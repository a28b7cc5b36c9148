"""Loads the compiled libraries that this installation has, and records why one is missing."""

from __future__ import annotations

import importlib.util
import pathlib

import torch

_here = pathlib.Path(__file__).parent
_cpu_library = _here / "_ops_cpu.so"
_cuda_library = _here / "_ops_cuda.so"


def _load(path: pathlib.Path, name: str) -> str:
    try:
        torch.ops.load_library(str(path))
    except OSError as error:  # reported by `fastconv doctor` and by every fallback, never swallowed
        return f"the {name} library does not load: {error.__cause__ or error}"
    return ""


def _load_cpu() -> str:
    if not _cpu_library.exists():
        return "the CPU library is not built (install a C++ compiler, then reinstall fastconv)"
    if importlib.util.find_spec("fastconv._C") is None:
        return "fastconv._C is not built (install a C++ compiler, then reinstall fastconv)"
    return _load(_cpu_library, "CPU")


def build_info() -> dict:
    """What setup.py wrote down; empty where the compiled parts are left out."""
    if importlib.util.find_spec("fastconv._C") is None:
        return {}
    from fastconv import _C

    return _C.build_info()


def _load_cuda() -> str:
    if not _cuda_library.exists():
        reason = (
            build_info().get("cuda_missing") or "no compiled parts (install a C++ compiler and the CUDA toolkit, then reinstall fastconv)"
        )
        return f"the CUDA library is not built: {reason}"
    if torch.version.cuda is None:  # it needs libtorch_cuda, which such a torch lacks
        return f"the CUDA library needs a CUDA build of torch, this is torch {torch.__version__}"
    return _load(_cuda_library, "CUDA")


cpu_missing: str = _load_cpu()
cuda_missing: str = _load_cuda()

"""Argument checks shared by the hubs. Messages name op, argument, requirement, value and remedy."""

from __future__ import annotations

import contextlib

import torch

from ._function import constant_when_traced
from ._registry import FLOAT_DTYPES

HALF_DTYPES = (torch.float16, torch.bfloat16)


def names(dtypes) -> str:
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)


def check_float(op: str, name: str, tensor: torch.Tensor) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{op}: {name} must be one of {names(FLOAT_DTYPES)}, got {tensor.dtype}; convert it with {name}.float()")


def check_device(op: str, x: torch.Tensor, **others: torch.Tensor | None) -> None:
    device = x.device
    for name, tensor in others.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(
                f"{op}: {name} must be on the device of the first argument ({device}), got {tensor.device}; "
                f"move it with {name}.to({str(device)!r})"
            )


def check_vector(op: str, name: str, tensor: torch.Tensor | None, C: int) -> None:
    if tensor is None:
        return
    check_float(op, name, tensor)
    if tensor.dim() != 1 or tensor.shape[0] != C:
        raise ValueError(f"{op}: {name} must be (C,) with C={C}, got {tuple(tensor.shape)}")


def resolve_dtypes(op: str, x: torch.Tensor, weight: torch.Tensor, compute_dtype, out_dtype) -> tuple[torch.dtype, torch.dtype]:
    """The dtypes of the products and of the output, and the rule for mixing them (as in eager PyTorch without autocast)."""
    for name, dtype in (("compute_dtype", compute_dtype), ("out_dtype", out_dtype)):
        if dtype is not None and dtype not in FLOAT_DTYPES:
            raise TypeError(f"{op}: {name} must be one of {names(FLOAT_DTYPES)} or None, got {dtype}")
    if compute_dtype is None:
        if weight.dtype != x.dtype:
            raise TypeError(f"{op}: weight must have the dtype of x ({x.dtype}), got {weight.dtype}; convert one, or pass compute_dtype=")
        compute_dtype = x.dtype
    out_dtype = out_dtype or compute_dtype
    involved = {x.dtype, weight.dtype, compute_dtype, out_dtype}
    if torch.float64 in involved and len(involved) > 1:
        raise TypeError(f"{op}: float64 cannot be mixed with other dtypes, got {names(sorted(involved, key=str))}; convert all of them")
    return compute_dtype, out_dtype


def dense(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.contiguous()


@constant_when_traced
def _has_autocast(device_type: str) -> bool:
    """torch 2.11 cannot trace the function itself."""
    return torch.amp.is_autocast_available(device_type)


def without_autocast(device: torch.device):
    """torch.autocast switched off, also on device types that have none (meta)."""
    return torch.autocast(device.type, enabled=False) if _has_autocast(device.type) else contextlib.nullcontext()

"""`verify`: is the patched model as accurate as it was? Asked of the user's own model, on the user's own inputs."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from ..ops import disabled


class Verification(NamedTuple):
    """Errors against a float64 copy of the model, as relative L2: of the outputs and of each parameter's gradient."""

    output: float
    output_unpatched: float
    gradients: dict[str, tuple[float, float]]  # parameter -> (patched, unpatched)
    failures: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.failures


def verify(model: nn.Module, *inputs: torch.Tensor) -> Verification:
    """Compare the patched model with its original code on these inputs, outputs and gradients, in eval mode.

    The truth is a float64 copy that runs the original code. The patched outputs may be at most 2x as far from it as the
    original's, the gradients 3x, plus the dtype's rounding (float32 1e-5 for outputs and 1e-4 for gradients, its epsilon
    for half types). Leaves parameters, .grad, buffers, modes and random streams as they are.
    """
    device = next((x.device.type for x in inputs), "cpu")
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        outputs, gradients = _run(model, inputs)
        with disabled():
            plain_outputs, plain_gradients = _run(model, inputs)
            truth_inputs = [x.double() if x.is_floating_point() else x for x in inputs]
            with torch.autocast(device, enabled=False):
                true_outputs, true_gradients = _run(copy.deepcopy(model).double(), truth_inputs)
    finally:
        for module, training in modes:
            module.training = training
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else outputs.dtype
    output_atol, gradient_atol = (1e-5, 1e-4) if dtype in (torch.float32, torch.float64) else (torch.finfo(dtype).eps,) * 2
    error, plain = _relative(outputs, true_outputs), _relative(plain_outputs, true_outputs)
    errors = {n: (_relative(gradients[n], g), _relative(plain_gradients[n], g)) for n, g in true_gradients.items()}
    failures = [] if error <= 2 * plain + output_atol else [f"outputs: {error:.2e} against {plain:.2e} unpatched"]
    failures += [f"gradient of {n}: {e:.2e} against {p:.2e} unpatched" for n, (e, p) in errors.items() if not e <= 3 * p + gradient_atol]
    return Verification(error, plain, errors, tuple(failures))


def _run(model: nn.Module, inputs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """All floating outputs in one vector, and the gradients of a fixed random projection of them."""
    with torch.enable_grad():
        leaves = [t for t in tree_leaves(model(*inputs)) if isinstance(t, torch.Tensor) and t.is_floating_point()]
        outputs = torch.cat([t.reshape(-1) for t in leaves])
        direction = torch.randn(outputs.numel(), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        projected = (outputs.double() * direction.to(outputs.device)).sum()
        gradients = torch.autograd.grad(projected, list(parameters.values()), allow_unused=True)
    return outputs.detach(), {n: g for n, g in zip(parameters, gradients) if g is not None}


def _relative(a: torch.Tensor, truth: torch.Tensor) -> float:
    truth = truth.double()
    return ((a.double() - truth).norm() / truth.norm().clamp_min(1e-30)).item()

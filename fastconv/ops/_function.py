"""What every autograd.Function of the package shares."""

from __future__ import annotations

import functools

import torch


def first_order_only(op: str):
    """Decorate a Function's backward: a second derivative raises an error that names the remedy.

    As torch's `once_differentiable`, with our message: asking for create_graph=True is fine as long as nobody
    differentiates through the gradients of this op.
    """
    message = (
        f"{op}: second derivatives are not implemented by the fused kernels; "
        "compute them inside `with fastconv.disabled():`, which runs the original code"
    ).encode()

    def decorate(backward):
        @functools.wraps(backward)
        def wrapper(ctx, *grads):
            if torch.compiler.is_compiling():
                return backward(ctx, *grads)
            with torch.no_grad():
                outputs = backward(ctx, *grads)
            if not torch.is_grad_enabled() or not any(g is not None and g.requires_grad for g in (*grads, *ctx.saved_tensors)):
                return outputs
            present = [o for o in outputs if o is not None]
            raising = torch._C._functions.DelayedError(message, len(present))(*[o.detach().requires_grad_() for o in present])
            raising = iter(raising if isinstance(raising, (list, tuple)) else [raising])
            return tuple(None if o is None else next(raising) for o in outputs)

        return wrapper

    return decorate


def needs_grad(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd will want a backward of an op on these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
